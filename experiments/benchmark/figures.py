"""Numbers drawn from the rows of a record: medians, who met the tolerance, overheads, ratios."""

import statistics
from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]
Record = dict[str, Any]

SLACK = 1.02
"""Residuals are recomputed in another precision than the one in which the solver stopped."""


def seconds(row: Row) -> float:
    """Median of the turns."""
    return statistics.median(row["seconds"]["call"])


def met(row: Row, tol: float) -> bool:
    """Every sample's residual is within the tolerance."""
    return "failed" not in row and row["residual_largest"] <= SLACK * tol


def overhead(row: Row, cell: str) -> float | None:
    """Time of the call over that of its evaluations; None where the cell was not timed."""
    if not row["seconds"].get(cell):
        return None
    return seconds(row) / (row["forward"] * statistics.median(row["seconds"][cell]))


def fastest(
    record: Record, names: Iterable[str], *, within: bool = True, error: float | None = None
) -> str | None:
    """The fastest of these implementations.

    Args:
        record: a case.
        names: candidates; those that are not in the record are left out.
        within: only those that met the tolerance.
        error: only those whose gradient error is at most this.
    """
    rows = {name: record["rows"][name] for name in names if name in record["rows"]}
    usable = {
        name: seconds(row)
        for name, row in rows.items()
        if "failed" not in row
        and (met(row, record["tol"]) or not within)
        and (error is None or row["gradient_error"] <= error)
    }
    return min(usable, key=usable.__getitem__) if usable else None
