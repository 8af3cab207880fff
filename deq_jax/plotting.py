"""Pictures of what a solver did. Needs matplotlib (`pip install deq_jax[plot]`)."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_residuals(
    axes: "Axes",
    traces: Mapping[str, Any],
    *,
    tol: float | None = None,
    spread: bool = True,
    title: str | None = None,
) -> None:
    """Draws relative residuals against evaluations, one curve a trace, on a log axis.

    Args:
        axes: matplotlib axes to draw on.
        traces: label -> `SolveStats.trace`, `[evaluations, B]`, NaN after a sample's stop. The
            curve is the median over the samples; one that has stopped counts with its last
            residual.
        tol: draws the tolerance as a dashed line.
        spread: shades the band from the best to the worst sample.
        title: title of the axes.

    Raises:
        ValueError: a trace is not two-dimensional or is empty.
    """
    for label, trace in traces.items():
        held = hold_after_stop(trace)
        evaluations = np.arange(1, len(held) + 1)
        (line,) = axes.semilogy(evaluations, np.median(held, axis=1), label=label)
        if spread and held.shape[1] > 1:
            axes.fill_between(
                evaluations, held.min(1), held.max(1), color=line.get_color(), alpha=0.15, lw=0
            )
    if tol is not None:
        axes.axhline(tol, color="0.4", ls="--", lw=1)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("relative residual")
    axes.grid(alpha=0.25)
    if title is not None:
        axes.set_title(title)
    if traces:
        axes.legend()


def hold_after_stop(trace: Any) -> np.ndarray:
    """A trace cut behind its last evaluation, each sample held at its last residual.

    Args:
        trace: `[evaluations, B]`, NaN after a sample's stop.

    Returns:
        `[used, B]` without NaN, `used` the largest number of evaluations.

    Raises:
        ValueError: `trace` is not two-dimensional, or a sample has no residual.
    """
    trace = np.asarray(trace, np.float64)
    if trace.ndim != 2:
        raise ValueError(f"a trace must be [evaluations, B], got shape {trace.shape}")
    known = np.isfinite(trace)
    if trace.size == 0 or not known[0].all():
        raise ValueError("a trace must hold a finite first residual for every sample")
    rows = np.where(known, np.arange(len(trace))[:, None], 0)
    latest = np.maximum.accumulate(rows, axis=0)
    used = int(known.any(axis=1).nonzero()[0].max()) + 1
    return np.take_along_axis(trace, latest, axis=0)[:used]
