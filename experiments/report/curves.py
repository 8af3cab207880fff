"""Figures of a run: curves over its epochs, and how its solver converges."""

import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from deq_jax.plotting import plot_residuals
from experiments.train.metrics import Record

_PANELS = {
    "loss": ("train_loss", "validation_loss", "test_loss"),
    "accuracy": ("train_accuracy", "validation_accuracy", "test_accuracy"),
    "evaluations in a solve": (
        "forward_evaluations",
        "backward_evaluations",
        "validation_forward_evaluations",
        "test_forward_evaluations",
    ),
    "relative residual": (
        "forward_residual_mean",
        "forward_residual_worst",
        "backward_residual_mean",
        "backward_residual_worst",
    ),
}

_LOGARITHMIC = ("relative residual",)


def draw_curves(history: Sequence[Record], path: pathlib.Path) -> None:
    """Draws what a run reported over its epochs; panels without any data are left out.

    Args:
        history: one record for each epoch.
        path: the PNG file to write.
    """
    panels = {
        title: [name for name in names if any(name in record for record in history)]
        for title, names in _PANELS.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.4 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, names) in zip(grid.flat, panels.items(), strict=False):
        for name in names:
            points = [(r["epoch"], r[name]) for r in history if _drawable(r.get(name), title)]
            if points:
                epochs, values = zip(*points, strict=True)
                axes.plot(epochs, values, marker=".", label=name.replace("_", " "))
        if title in _LOGARITHMIC and axes.lines:
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    _save(figure, path)


def draw_residuals(
    traces: Mapping[str, np.ndarray],
    path: pathlib.Path,
    *,
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """Draws residual against evaluations: the median of the samples, and the band they are in.

    Args:
        traces: for each solve, such as `forward`, residuals `[iterations, B]`, NaN after a
            sample's stop.
        path: the PNG file to write.
        tolerances: for each solve, the tolerance, drawn as a line.
    """
    figure = Figure(figsize=(5.0 * len(traces), 3.6), layout="constrained")
    grid = figure.subplots(1, len(traces), squeeze=False)
    for axes, (name, trace) in zip(grid.flat, traces.items(), strict=True):
        # A sample whose first evaluation was not finite has nothing to draw.
        drawable = trace[:, np.isfinite(trace[0])]
        title = f"{name} solve, {trace.shape[1]} samples"
        curves = {"median, best to worst": drawable} if drawable.size else {}
        tolerance = (tolerances or {}).get(name)
        plot_residuals(axes, curves, tol=tolerance or None, title=title)
    _save(figure, path)


def _drawable(value: float | None, title: str) -> bool:
    return value is not None and np.isfinite(value) and (title not in _LOGARITHMIC or value > 0)


def _save(figure: Figure, path: pathlib.Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    os.replace(temporary, path)
