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


def plot_iterations(
    axes: "Axes",
    iterations: Any,
    *,
    max_iter: int | None = None,
    title: str | None = None,
) -> None:
    """Draws how many samples took how many evaluations: a bar for each number.

    Args:
        axes: matplotlib axes to draw on.
        iterations: `SolveStats.iterations`, `[B]`.
        max_iter: draws the budget as a dotted line.
        title: title of the axes.

    Raises:
        ValueError: `iterations` is not one-dimensional, is empty or holds no counts.
    """
    iterations = np.asarray(iterations)
    if iterations.ndim != 1 or iterations.size == 0:
        raise ValueError(f"iterations must be [B] with B >= 1, got shape {iterations.shape}")
    if not np.issubdtype(iterations.dtype, np.integer) or iterations.min() < 0:
        raise ValueError(f"iterations must be counts, got {iterations.dtype} values")
    numbers, samples = np.unique(iterations, return_counts=True)
    axes.bar(numbers, samples, width=0.9)
    median = np.median(iterations)
    axes.axvline(median, color="0.4", ls="--", lw=1, label=f"median {median:g}")
    if max_iter is not None:
        axes.axvline(max_iter, color="0.4", ls=":", lw=1, label=f"at most {max_iter}")
    axes.set_xlim(numbers.min() - 1.5, max(numbers.max(), max_iter or 0) + 1.5)
    axes.locator_params(axis="x", integer=True)
    axes.set_xlabel("evaluations")
    axes.set_ylabel("samples")
    axes.grid(alpha=0.25)
    if title is not None:
        axes.set_title(title)
    axes.legend()


def plot_spectrum(
    axes: "Axes",
    values: Any,
    *,
    errors: Any = None,
    rtol: float = 0.05,
    title: str | None = None,
) -> None:
    """Draws eigenvalues or Ritz values in the complex plane, with the unit circle.

    Args:
        axes: matplotlib axes to draw on.
        values: complex, of any shape, such as `Spectrum.values`; what is not finite is left out.
        errors: shaped like `values`, such as `Spectrum.errors`. Values whose error exceeds `rtol`
            times the largest modulus, which only outline the spectrum, are drawn hollow.
        rtol: see `errors`.
        title: title of the axes.

    Raises:
        ValueError: `errors` is not shaped like `values`.
    """
    values = np.asarray(values)
    errors = np.zeros(values.shape) if errors is None else np.asarray(errors)
    if errors.shape != values.shape:
        raise ValueError(f"errors must have the shape {values.shape}, got {errors.shape}")
    known = np.isfinite(values)
    values, errors = values[known], errors[known]
    angle = np.linspace(0, 2 * np.pi, 361)
    axes.plot(np.cos(angle), np.sin(angle), color="0.4", ls="--", lw=1, label="unit circle")
    # A NaN compares as false: an unknown error is not a small one.
    sharp = errors <= rtol * np.abs(values).max(initial=0)
    for chosen, face, label in ((sharp, "C0", "eigenvalues"), (~sharp, "none", "outline")):
        if chosen.any():
            points = values[chosen]
            axes.scatter(
                points.real, points.imag, s=18, facecolors=face, edgecolors="C0", label=label
            )
    axes.set_aspect("equal")
    axes.set_xlabel("real part")
    axes.set_ylabel("imaginary part")
    axes.grid(alpha=0.25)
    if title is not None:
        axes.set_title(title)
    axes.legend(loc="upper left", fontsize="small")
