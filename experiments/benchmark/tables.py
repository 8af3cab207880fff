"""Markdown tables of results."""

import statistics
from collections.abc import Iterable
from typing import Any

from experiments.benchmark.figures import Record, Row, met, overhead, seconds
from experiments.benchmark.targets import TARGETS
from experiments.benchmark.workloads import EQUAL_RIDGE

ONLY_EQUAL_RIDGE = frozenset(name for name in EQUAL_RIDGE if "ridge" in name)
"""Implementations that are there for the tables at equal ridge alone."""


def table(header: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def targets(results: dict[str, Any], remarks: dict[str, str]) -> str:
    """The table of targets; a missed one says so, with its remark."""
    lines = []
    for target in TARGETS:
        measured = target.measured(results)
        bound = "-" if target.at_most is None else f"{target.at_most:.2f}"
        if isinstance(measured, str):
            lines.append([target.name, bound, "-", measured])
            continue
        value, source = measured
        verdict = ""
        if target.at_most is not None:
            verdict = "met" if value <= target.at_most else "**missed**"
        words = [verdict, source, remarks.get(target.name, "")]
        lines.append([target.name, bound, f"{value:.2f}", "; ".join(w for w in words if w)])
    return table(["figure", "must be at most", "measured", ""], lines)


def case(record: Record, *, equal_ridge: bool = False) -> str:
    """The rows of a case: those at equal ridge, or those that are not there for that alone."""
    rows = {
        name: row
        for name, row in record["rows"].items()
        if (name in EQUAL_RIDGE if equal_ridge else name not in ONLY_EQUAL_RIDGE)
    }
    header = ["", "ms", "min - max", "evaluations", "largest residual", "median residual"]
    forward = record["mode"] == "forward"
    header += ["cell, ms", "overhead"] if forward else ["gradient error"]
    header += ["compilation, s", "memory, MiB"]
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed']}", *["-"] * (len(header) - 2)])
        else:
            lines.append([name, *_cells(row, record["tol"], forward)])
    return table(header, lines)


def _cells(row: Row, tol: float, forward: bool) -> list[str]:
    times = row["seconds"]["call"]
    largest = f"{row['residual_largest']:.1e}"
    counts = [str(row[way]) for way in ("forward", "backward") if row[way] is not None]
    cells = [
        milliseconds(seconds(row)),
        f"{milliseconds(min(times))} - {milliseconds(max(times))}",
        " / ".join(counts),
        largest if met(row, tol) or not tol else f"**{largest}**",
        f"{row['residual_median']:.1e}",
    ]
    if forward:
        kinds = [kind for kind in ("cell", "prepared cell") if row["seconds"].get(kind)]
        costs = [milliseconds(statistics.median(row["seconds"][kind])) for kind in kinds]
        cells += [" / ".join(costs) or "-"]
        cells += [" / ".join(f"{overhead(row, kind):.2f}" for kind in kinds) or "-"]
    else:
        cells.append(f"{row['gradient_error']:.1e}")
    return [*cells, f"{max(0.0, row['first'] - seconds(row)):.1f}", f"{row['memory'] / 2**20:.0f}"]


def series(axis: str, cases: dict[str, Record]) -> str:
    """Median milliseconds of every implementation over the sizes of a series."""
    names = list(dict.fromkeys(name for record in cases.values() for name in record["rows"]))
    lines = []
    for record in cases.values():
        cells = [str(record["size"])]
        for name in names:
            row = record["rows"].get(name, {"failed": "not run"})
            if "failed" in row:
                cells.append("failed")
                continue
            counts = f"{row['forward']}/{row['backward']}"
            mark = "" if met(row, record["tol"]) else " *"
            cells.append(f"{milliseconds(seconds(row))} ({counts}){mark}")
        lines.append(cells)
    return table([axis, *names], lines)


def milliseconds(seconds: float) -> str:
    """Three digits, or as many as there are before the point."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
