"""All figures: of the solves of a trained network, and of a run over its epochs.

The figures of a report have one panel each, so that a narrow page can put them below one another.
"""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deq_jax.plotting import plot_iterations, plot_residuals, plot_spectrum

# Only for annotations: a training draws its figures with this module, and needs none of these.
if TYPE_CHECKING:
    from experiments.report.examples import Words
    from experiments.report.measure import Budgets, RocCurve, Solves, Spectra

History = Sequence[Mapping[str, Any]]
"""The records of a run, one for each epoch."""

Figures = dict[str, Figure]
"""Figures by name; the name is also that of the PNG file."""

_RUN_PANELS = {
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
"""The panels of `curves.png`, and what each shows of a record."""

_REPORT_PANELS = {
    "epochs_converged": ("share of samples that converge", "converged"),
    "epochs_residual": ("mean relative residual", "residual_mean"),
    "epochs_evaluations": ("evaluations of a sample", "iterations"),
}
"""The figures of a report over the epochs: title, and end of the names in a record."""

_SOLVES = ("forward", "backward", "validation_forward", "test_forward")


def draw_curves(history: History, path: pathlib.Path) -> None:
    """Writes `path`, a PNG of `curves_figure`; writes nothing if there is nothing to draw."""
    figure = curves_figure(history)
    if figure is not None:
        _save(figure, path)


def draw_residuals(
    traces: Mapping[str, np.ndarray],
    path: pathlib.Path,
    *,
    tolerances: Mapping[str, float] | None = None,
) -> None:
    """Writes `path`, a PNG with the panels of `residual_figures` side by side."""
    figure, grid = _grid(1, len(traces))
    for axes, (name, trace) in zip(grid, traces.items(), strict=True):
        _plot_trace(axes, name, trace, (tolerances or {}).get(name), "samples")
    _save(figure, path)


def curves_figure(history: History) -> Figure | None:
    """What a run reported over its epochs.

    Panels without any data are left out. None if all are.
    """
    panels = {
        title: [name for name in names if any(name in record for record in history)]
        for title, names in _RUN_PANELS.items()
    }
    panels = {title: names for title, names in panels.items() if names}
    if not panels:
        return None
    columns = min(2, len(panels))
    figure, grid = _grid(-(-len(panels) // columns), columns)
    for axes, (title, names) in zip(grid, panels.items(), strict=False):
        labels = {name: name.replace("_", " ") for name in names}
        _plot_history(axes, history, labels, logarithmic=title == "relative residual")
        _finish(axes, "epoch", title)
    return figure


def residual_figures(
    traces: Mapping[str, np.ndarray], tolerances: Mapping[str, float], many: str
) -> Figures:
    """Residual against evaluations: the median of the samples, and the band they are in.

    Args:
        traces: for each solve, such as `forward`, residuals `[evaluations, B]`, NaN after a
            sample's stop.
        tolerances: for each solve, the tolerance, drawn as a line.
        many: what the samples are, such as `images`.
    """
    figures = {}
    for name, trace in traces.items():
        figure, axes = _panel()
        _plot_trace(axes, name, trace, tolerances.get(name), many)
        figures[f"residuals_{name}"] = figure
    return figures


def evaluation_figures(solves: "Solves", max_iter: int) -> Figures:
    """How many examples took how many evaluations."""
    figure, axes = _panel()
    plot_iterations(axes, solves.iterations, max_iter=max_iter, title="forward solve")
    return {"evaluations": figure}


def spectrum_figures(spectra: "Spectra", one: str) -> Figures:
    """Spectral radii, the same with their errors, and the Ritz values of some samples."""
    figures = {}
    known = spectra.known
    radius, converged = spectra.radius[known], spectra.converged[known]
    error = np.where(np.isfinite(spectra.error), spectra.error, 0)[known]
    figures["radius"], axes = _panel()
    if radius.size:
        axes.hist(radius, bins=12)
    axes.axvline(1, color="0.4", ls="--", lw=1)
    _finish(axes, "spectral radius", "samples", f"spectral radius, {radius.size} samples")

    figures["radius_errors"], axes = _panel()
    order = np.argsort(radius)
    for chosen, face, label in (
        (converged[order], "C0", "accurate"),
        (~converged[order], "none", "not accurate"),
    ):
        if chosen.any():
            place, rows = np.flatnonzero(chosen) + 1, order[chosen]
            style = {"fmt": "o", "ms": 4, "lw": 1, "color": "C0", "mfc": face}
            axes.errorbar(place, radius[rows], error[rows], label=label, **style)
    axes.axhline(1, color="0.4", ls="--", lw=1)
    _finish(axes, "samples, in this order", "spectral radius", "with estimates of the error")

    for name, values in spectra.values.items():
        figures[f"spectrum_{name}"], axes = _panel(width=4.0, height=3.8)
        plot_spectrum(axes, values, errors=spectra.errors[name], title=f"the {name} {one}")
    return figures


def budget_figures(budgets: "Budgets", tol: float, words: "Words") -> Figures:
    """Accuracy, share of converged samples, residual and maybe loss against the budget."""
    panels = {
        "accuracy": (
            {"accuracy": budgets.accuracy, "converged": budgets.converged},
            f"accuracy and share of converged {words.many}",
        ),
        "residual": ({"mean residual": budgets.residual}, "mean relative residual"),
    }
    if words.loss:
        panels["loss"] = {"loss": budgets.loss}, f"loss, {words.loss}"
    figures = {}
    for name, (curves, title) in panels.items():
        figures[f"budget_{name}"], axes = _panel()
        for label, values in curves.items():
            axes.plot(budgets.budgets, values, marker=".", label=label)
        axes.axvline(budgets.trained, color="0.4", ls=":", lw=1, label="as in the run")
        if name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        elif name == "residual":
            if tol > 0:
                axes.axhline(tol, color="0.4", ls="--", lw=1, label="tolerance")
            if (budgets.residual > 0).any():
                axes.set_yscale("log")
        axes.set_xscale("log")
        ticks = budgets.budgets[np.insert(np.diff(np.log(budgets.budgets)) > 0.3, 0, True)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        _finish(axes, "evaluations, at most", "", title)
    return figures


def confidence_figures(
    solves: "Solves", good: np.ndarray, curves: Mapping[str, "RocCurve"], words: "Words"
) -> Figures:
    """Residuals of good and of bad answers, and the ROC curves if there are any.

    Args:
        solves: the solves.
        good: `[N]` boolean, from `Examples.good`.
        curves: from `roc_curves`.
        words: how to speak of the examples.
    """
    figures = {}
    figures["confidence_residual"], axes = _panel()
    drawable = np.isfinite(solves.residual) & (solves.residual > 0)
    if drawable.any():
        shown = solves.residual[drawable]
        # Good and bad share the bins. Shares and not counts, since one kind may be far rarer.
        bins = np.geomspace(shown.min() / 1.01, shown.max() * 1.01, 25)
        for chosen, label in ((drawable & good, words.good), (drawable & ~good, words.bad)):
            if count := int(chosen.sum()):
                weights = np.full(count, 1 / count)
                label = f"{label}, {count} {words.many}"
                axes.hist(solves.residual[chosen], bins, weights=weights, alpha=0.6, label=label)
        axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    title = f"residual of {words.good} and {words.bad} {words.answers}"
    _finish(axes, "relative residual", "share of them", title)
    if curves:
        figures["confidence_roc"], axes = _panel()
        for name, curve in curves.items():
            axes.plot(curve.bad, curve.good, label=f"{name}: {curve.area:.2f}")
        axes.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1)
        across = f"share of the {words.bad} {words.answers} above"
        _finish(axes, across, f"of the {words.good} ones", "ROC, with its area")
    return figures


def epoch_figures(history: History) -> Figures:
    """The solves over the epochs of the training; figures without any data are left out."""
    figures = {}
    for name, (title, kind) in _REPORT_PANELS.items():
        figure, axes = _panel()
        labels = {f"{solve}_{kind}": solve.replace("_", " ") for solve in _SOLVES}
        _plot_history(axes, history, labels, logarithmic=kind == "residual_mean")
        if kind == "converged":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        _finish(axes, "epoch", "", title)
        if axes.lines:
            figures[name] = figure
    return figures


def png(figure: Figure) -> bytes:
    """A figure as a PNG."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def _save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG file that nobody sees half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(png(figure))
    os.replace(temporary, path)


def _panel(width: float = 5.0, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _grid(rows: int, columns: int) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(5.0 * columns, 3.5 * rows), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _plot_trace(axes: Axes, name: str, trace: np.ndarray, tol: float | None, many: str) -> None:
    # A sample whose first evaluation was not finite has no residual to draw.
    drawable = trace[:, np.isfinite(trace[0])]
    count = drawable.shape[1]
    title = f"{name} solve, {count} {many}"
    if count < trace.shape[1]:
        title += f", not {trace.shape[1] - count}"
    curves = {"median, best to worst": drawable} if count else {}
    plot_residuals(axes, curves, tol=tol or None, title=title)


def _plot_history(
    axes: Axes, history: History, labels: Mapping[str, str], *, logarithmic: bool
) -> None:
    """A curve for each figure of a record; values that cannot be drawn are left out."""
    for name, label in labels.items():
        points = [(record["epoch"], record.get(name)) for record in history]
        points = [
            (epoch, value)
            for epoch, value in points
            if value is not None and np.isfinite(value) and (value > 0 or not logarithmic)
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker=".", label=label)
    if logarithmic and axes.lines:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _finish(axes: Axes, across: str, up: str, title: str = "") -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
