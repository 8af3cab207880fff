"""The generated parts of docs/benchmarks.md, and the pictures in it, made from docs/data.

A part for each workload, one for the targets, and one for the tables at equal ridge.
"""

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from matplotlib.figure import Figure

from experiments.benchmark.workloads import AXES, EQUAL_RIDGE, PEERS, WORKLOADS
from experiments.studies.tables import Document, Part, Study, markdown_table, origin

Row = dict[str, Any]
Record = dict[str, Any]
"""A case: its settings, and under `rows` a row for each implementation."""

SLACK = 1.02
"""Residuals are recomputed in another precision than the one in which the solver stopped."""

ONLY_EQUAL_RIDGE = frozenset(name for name in EQUAL_RIDGE if "ridge" in name)
"""Implementations that are there for the tables at equal ridge alone."""


def seconds(row: Row, what: str = "call") -> float:
    """Median of the turns."""
    return statistics.median(row["seconds"][what])


def met(row: Row, tol: float) -> bool:
    """Every sample's residual is within the tolerance."""
    return "failed" not in row and row["residual_largest"] <= SLACK * tol


def overhead(row: Row, cell: str) -> float:
    """Time of the call over that of its evaluations."""
    return seconds(row) / (row["forward"] * seconds(row, cell))


def prepared_share(row: Row, what: str) -> float:
    """Time of something that was prepared for the loop over that of the same as it is written."""
    return seconds(row, f"prepared {what}") / seconds(row, what)


def milliseconds(seconds: float) -> str:
    """Three digits, or as many as there are before the point."""
    value = 1e3 * seconds
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


# ---- Targets ----

Measured = tuple[float, str] | str
"""The figure and what it was computed from, or why there is none."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A figure with a bound.

    Attributes:
        name: what it is.
        at_most: the bound; None for a figure that is only told.
        workload: whose results it needs.
        case: name of the case.
        measure: the case -> the figure.
    """

    name: str
    at_most: float | None
    workload: str
    case: str
    measure: Callable[[Record], Measured]

    def measured(self, document: Document) -> Measured:
        """The figure, or why there is none."""
        try:
            return self.measure(document[self.workload]["cases"][self.case])
        except KeyError:
            return "not measured"


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


def ratio(
    own: Iterable[str], *others: str, within: bool = False, as_accurate: bool = True
) -> Callable[[Record], Measured]:
    """Time of the fastest of `own` that met the tolerance over that of the fastest of `others`.

    Args:
        own: implementations.
        *others: implementations.
        within: the others have to have met the tolerance too.
        as_accurate: where gradients were computed, only those of `own` count whose gradient error
            is at most that of the one they are compared with.
    """

    def measure(record: Record) -> Measured:
        theirs = fastest(record, others, within=within)
        if theirs is None:
            reason = "met the tolerance" if within else "was measured"
            return f"none of {', '.join(others)} {reason}"
        rows = record["rows"]
        error = rows[theirs].get("gradient_error") if as_accurate else None
        ours = fastest(record, own, error=error)
        if ours is None:
            return f"none of {', '.join(own)} was within the tolerance and as good as {theirs}"
        return seconds(rows[ours]) / seconds(rows[theirs]), f"{ours} / {theirs}"

    return measure


def beside(what: str, figure: Callable[[Row, str], float]) -> Callable[[Record], Measured]:
    """A figure of deq_jax's row, about something that was timed beside the call."""

    def measure(record: Record) -> Measured:
        row = record["rows"]["deq_jax"]
        return "not measured" if "failed" in row else (figure(row, what), "deq_jax")

    return measure


_SOLVERS = (
    "deq_jax",
    "deq_jax, 2 devices",
    "deq_jax, tolerance / 2",
    "deq_jax, 2 devices, tolerance / 2",
)
_OWN = (*_SOLVERS, "deq_jax, Picard", "deq_jax, shrinking", "deq_jax, shrinking, tolerance / 3")
_OTHERS = (*PEERS, "jaxopt, Picard")
_OVERHEAD = "solve: overhead over the cell as"


def _targets(
    workload: str, case: str, *figures: tuple[str, float | None, Callable[[Record], Measured]]
) -> list[Target]:
    """Targets of one case, each by its name, its bound and what measures it."""
    return [Target(name, at_most, workload, case, measure) for name, at_most, measure in figures]


TARGETS = [
    *_targets(
        "step",
        "training step",
        ("step: deq_jax / tutorial", 0.5, ratio(_SOLVERS, "tutorial")),
        ("step: deq_jax / torchdeq", 0.45, ratio(_SOLVERS, "torchdeq")),
        ("step: deq_jax / jaxopt", 0.1, ratio(_SOLVERS, "jaxopt")),
    ),
    *_targets(
        "solve",
        "forward",
        ("solve: deq_jax / torchdeq", 0.9, ratio(_SOLVERS, "torchdeq")),
        ("solve: deq_jax / jaxopt", 0.45, ratio(_SOLVERS, "jaxopt")),
        (f"{_OVERHEAD} the library runs it", 1.15, beside("prepared cell", overhead)),
        (f"{_OVERHEAD} written", None, beside("cell", overhead)),
    ),
    *_targets(
        "dense",
        "forward",
        ("dense, forward: deq_jax / optimistix", 1.0, ratio(_OWN, "optimistix")),
    ),
    *_targets(
        "dense",
        "forward + gradient",
        ("dense, forward + gradient: deq_jax / jaxopt", 0.6, ratio(_OWN, "jaxopt")),
        (
            "dense, forward + gradient: deq_jax / jaxopt's Picard",
            None,
            ratio(_OWN, "jaxopt, Picard"),
        ),
    ),
    *_targets(
        "heterogeneous",
        "forward + gradient",
        (
            "heterogeneous: deq_jax / best of the others within the tolerance",
            0.35,
            ratio(_OWN, *_OTHERS, within=True),
        ),
    ),
    *_targets("nchw", "forward", ("nchw / nhwc", 1.3, ratio(["deq_jax, NCHW"], "deq_jax"))),
    *_targets(
        "shrinking",
        "forward + gradient",
        (
            "shrinking / not, Picard",
            0.4,
            ratio(["deq_jax, Picard, shrinking"], "deq_jax, Picard", as_accurate=False),
        ),
        (
            "shrinking / not, Anderson",
            None,
            ratio(["deq_jax, shrinking"], "deq_jax", as_accurate=False),
        ),
    ),
    *_targets(
        "preparation",
        "forward + gradient",
        ("products, prepared / not", None, beside("product", prepared_share)),
    ),
]


def targets_table(document: Document) -> str:
    """The targets; a missed one says so."""
    rows = []
    for target in TARGETS:
        measured = target.measured(document)
        bound = "-" if target.at_most is None else f"{target.at_most:.2f}"
        if isinstance(measured, str):
            rows.append([target.name, bound, "-", measured])
            continue
        value, source = measured
        verdict = ""
        if target.at_most is not None:
            verdict = "met; " if value <= target.at_most else "**missed**; "
        rows.append([target.name, bound, f"{value:.2f}", verdict + source])
    return markdown_table(["figure", "must be at most", "measured", ""], rows)


# ---- Workloads ----


def case_table(record: Record, *, equal_ridge: bool = False) -> str:
    """The rows of a case: those at equal ridge, or those that are not there for that alone."""
    rows = {
        name: row
        for name, row in record["rows"].items()
        if (name in EQUAL_RIDGE if equal_ridge else name not in ONLY_EQUAL_RIDGE)
    }
    forward = record["mode"] == "forward"
    products = any("product" in row.get("seconds", {}) for row in rows.values())
    columns = ["", "ms", "min - max", "evaluations", "largest residual", "median residual"]
    columns += ["cell, ms", "overhead"] if forward else ["gradient error"]
    columns += ["product, ms"] * products + ["compilation, s", "memory, MiB"]
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, f"failed: {row['failed']}", *["-"] * (len(columns) - 2)])
        else:
            lines.append([name, *_cells(row, record["tol"], forward, products)])
    return markdown_table(columns, lines)


def _cells(row: Row, tol: float, forward: bool, products: bool) -> list[str]:
    times = row["seconds"]["call"]
    largest = _scientific(row["residual_largest"])
    counts = [str(row[way]) for way in ("forward", "backward") if row[way] is not None]
    missed = largest != "-" and tol and not met(row, tol)
    cells = [
        milliseconds(seconds(row)) if times else "-",
        f"{milliseconds(min(times))} - {milliseconds(max(times))}" if len(times) > 1 else "-",
        " / ".join(counts) or "-",
        f"**{largest}**" if missed else largest,
        _scientific(row["residual_median"]),
    ]

    def each(kinds: Iterable[str], figure: Callable[[str], str]) -> str:
        return " / ".join(figure(kind) for kind in kinds if row["seconds"].get(kind)) or "-"

    def cost(kind: str) -> str:
        return milliseconds(seconds(row, kind))

    if forward:
        kinds = ("cell", "prepared cell")
        cells += [each(kinds, cost), each(kinds, lambda kind: f"{overhead(row, kind):.2f}")]
    else:
        cells.append(_scientific(row["gradient_error"]))
    if products:
        cells.append(each(("product", "prepared product"), cost))
    compilation = "-" if row["first"] is None else f"{max(0.0, row['first'] - seconds(row)):.1f}"
    memory = "-" if row["memory"] is None else f"{row['memory'] / 2**20:.0f}"
    return [*cells, compilation, memory]


def _scientific(value: float | None) -> str:
    """Two digits; a dash for what was not measured."""
    return "-" if value is None else f"{value:.1e}"


def series_table(axis: str, cases: dict[str, Record]) -> str:
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
    return markdown_table([axis, *names], lines)


def workload_text(name: str, part: Part) -> str:
    """The tables of a workload, how the implementations say they were set, and its origin."""
    cases = part["cases"]
    first = next(iter(cases.values()))
    limits = f"Tolerance {first['tol']:g}, at most {first['max_iter']} evaluations"
    if first["reference_residual"] is not None:
        limits += f"; residual of the reference {first['reference_residual']:.0e}"
    texts = [f"{limits}."]
    if name in AXES:
        texts.append(series_table(AXES[name], cases))
        texts.append(
            "Milliseconds, evaluations forward/backward in brackets; a star marks a residual above "
            "the tolerance."
        )
    else:
        for case, record in cases.items():
            texts += [f"*{case}*", case_table(record)]
        notes = [
            f"- {implementation}: {row['notes']}"
            for record in cases.values()
            for implementation, row in record["rows"].items()
            if "failed" not in row
        ]
        texts.append("\n".join(dict.fromkeys(notes)))
    return "\n\n".join([*texts, origin(part["context"])])


def render(document: Document) -> dict[str, str]:
    """All generated parts of the page."""
    known = {name: document[name] for name in WORKLOADS if name in document}
    parts = {name: workload_text(name, part) for name, part in known.items()}
    equal_ridge = [
        f"*{name}, {case}*\n\n{case_table(record, equal_ridge=True)}"
        for name, part in known.items()
        for case, record in part["cases"].items()
        if any(row in ONLY_EQUAL_RIDGE for row in record["rows"])
    ]
    return {"targets": targets_table(document), **parts, "equal ridge": "\n\n".join(equal_ridge)}


def draw(document: Document) -> dict[str, Figure]:
    """Cost as the work grows: milliseconds over size, a picture for each series."""
    return {
        f"benchmark_{name}": growth(axis, document[name]["cases"])
        for name, axis in AXES.items()
        if name in document
    }


def growth(axis: str, cases: dict[str, Record]) -> Figure:
    """A line for each implementation, both axes logarithmic; what failed leaves a gap."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(name for record in cases.values() for name in record["rows"]):
        points = [
            (record["size"], 1e3 * seconds(record["rows"][name]))
            for record in cases.values()
            if "failed" not in record["rows"].get(name, {"failed": ""})
        ]
        own = name.startswith("deq_jax")
        style: dict[str, Any] = {"linewidth": 2.2, "color": "black"} if own else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="milliseconds, forward and gradient")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    return figure


STUDY = Study("benchmarks", render, draw)
