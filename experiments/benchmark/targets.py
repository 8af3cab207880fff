"""The figures that are to be reached, computed from results."""

import dataclasses
from collections.abc import Callable
from typing import Any

from experiments.benchmark.figures import Record, fastest, overhead, seconds

OWN = (
    "deq_jax",
    "deq_jax, 2 devices",
    "deq_jax, tolerance / 2",
    "deq_jax, 2 devices, tolerance / 2",
    "deq_jax, Picard",
    "deq_jax, shrinking",
    "deq_jax, shrinking, tolerance / 3",
)
OTHERS = (
    "tutorial",
    "tutorial, relative ridge",
    "torchdeq",
    "jaxopt",
    "jaxopt, Picard",
    "optimistix",
)

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

    def measured(self, results: dict[str, Any]) -> Measured:
        """The figure, or why there is none."""
        try:
            return self.measure(results[self.workload]["cases"][self.case])
        except KeyError:
            return "not measured"


def ratio(
    own: tuple[str, ...],
    others: tuple[str, ...],
    *,
    within: bool = False,
    as_accurate: bool = True,
) -> Any:
    """Time of the fastest of `own` that met the tolerance over that of the fastest of `others`.

    Args:
        own: implementations.
        others: implementations.
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


def over_the_floor(name: str, cell: str) -> Any:
    """Overhead of an implementation over the cell's own cost."""

    def measure(record: Record) -> Measured:
        row = record["rows"][name]
        value = None if "failed" in row else overhead(row, cell)
        return "not measured" if value is None else (value, name)

    return measure


_SOLVERS = OWN[:4]
_FORWARD, _GRADIENT, _STEP = "forward", "forward + gradient", "training step"

TARGETS = (
    Target("step: deq_jax / tutorial", 0.5, "step", _STEP, ratio(_SOLVERS, ("tutorial",))),
    Target("step: deq_jax / torchdeq", 0.45, "step", _STEP, ratio(_SOLVERS, ("torchdeq",))),
    Target("step: deq_jax / jaxopt", 0.1, "step", _STEP, ratio(_SOLVERS, ("jaxopt",))),
    Target("solve: deq_jax / torchdeq", 0.9, "solve", _FORWARD, ratio(_SOLVERS, ("torchdeq",))),
    Target("solve: deq_jax / jaxopt", 0.45, "solve", _FORWARD, ratio(_SOLVERS, ("jaxopt",))),
    Target(
        "dense, forward: deq_jax / optimistix", 1.0, "dense", _FORWARD, ratio(OWN, ("optimistix",))
    ),
    Target(
        "dense, forward + gradient: deq_jax / jaxopt",
        0.6,
        "dense",
        _GRADIENT,
        ratio(OWN, ("jaxopt",)),
    ),
    Target(
        "dense, forward + gradient: deq_jax / jaxopt's Picard",
        None,
        "dense",
        _GRADIENT,
        ratio(OWN, ("jaxopt, Picard",)),
    ),
    Target(
        "heterogeneous: deq_jax / best of the others within the tolerance",
        0.35,
        "heterogeneous",
        _GRADIENT,
        ratio(OWN, OTHERS, within=True),
    ),
    Target(
        "solve: overhead over the cell as the library runs it",
        1.15,
        "solve",
        _FORWARD,
        over_the_floor("deq_jax", "prepared cell"),
    ),
    Target(
        "solve: overhead over the cell as written",
        None,
        "solve",
        _FORWARD,
        over_the_floor("deq_jax", "cell"),
    ),
    Target("nchw / nhwc", 1.3, "nchw", _FORWARD, ratio(("deq_jax, NCHW",), ("deq_jax",))),
    Target(
        "shrinking / not, Picard",
        0.4,
        "shrinking",
        _GRADIENT,
        ratio(("deq_jax, Picard, shrinking",), ("deq_jax, Picard",), as_accurate=False),
    ),
    Target(
        "shrinking / not, Anderson",
        None,
        "shrinking",
        _GRADIENT,
        ratio(("deq_jax, shrinking",), ("deq_jax",), as_accurate=False),
    ),
)
