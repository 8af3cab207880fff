"""The figures of a diagnosis, one panel each, so that a narrow page can put them below another."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deq_jax.plotting import plot_iterations, plot_residuals, plot_spectrum
from experiments.report.confidence import Confidence
from experiments.report.examples import Words
from experiments.report.results import Budgets, Solves, Spectra

Figures = dict[str, bytes]
"""PNG files by their names without `.png`."""

_EPOCHS = {
    "epochs_converged": ("share of samples that converge", "converged"),
    "epochs_residual": ("mean relative residual", "residual_mean"),
    "epochs_evaluations": ("evaluations of a sample", "iterations"),
}
_SOLVES = ("forward", "backward", "validation_forward", "test_forward")


def residuals(
    traces: Mapping[str, np.ndarray], tolerances: Mapping[str, float], words: Words
) -> Figures:
    """Residual against evaluations, forward and, where there is one, backward."""
    figures = {}
    for name, trace in traces.items():
        figure, axes = _panel()
        # A sample whose first evaluation was not finite has nothing to draw.
        drawable = trace[:, np.isfinite(trace[0])]
        curves = {"median, best to worst": drawable} if drawable.size else {}
        left_out = trace.shape[1] - drawable.shape[1]
        title = f"{name} solve, {drawable.shape[1]} {words.many}"
        title += f", not {left_out}" * (left_out > 0)
        plot_residuals(axes, curves, tol=tolerances.get(name) or None, title=title)
        figures[f"residuals_{name}"] = _png(figure)
    return figures


def evaluations(solves: Solves, max_iter: int) -> Figures:
    """How many examples took how many evaluations."""
    figure, axes = _panel()
    plot_iterations(axes, solves.iterations, max_iter=max_iter, title="forward solve")
    return {"evaluations": _png(figure)}


def spectra(spectra: Spectra, words: Words) -> Figures:
    """Spectral radii with their errors, and Ritz values of some samples."""
    figures = {}
    known = np.isfinite(spectra.radius)
    radius, converged = spectra.radius[known], spectra.converged[known]
    error = np.where(np.isfinite(spectra.error), spectra.error, 0)[known]
    figure, axes = _panel()
    if radius.size:
        axes.hist(radius, bins=12)
    axes.axvline(1, color="0.4", ls="--", lw=1)
    _finish(axes, "spectral radius", "samples", f"spectral radius, {radius.size} samples")
    figures["radius"] = _png(figure)

    figure, axes = _panel()
    order = np.argsort(radius)
    for chosen, face, label in (
        (converged[order], "C0", "accurate"),
        (~converged[order], "none", "not accurate"),
    ):
        if chosen.any():
            rows = order[chosen]
            axes.errorbar(
                np.flatnonzero(chosen) + 1,
                radius[rows],
                error[rows],
                fmt="o",
                ms=4,
                lw=1,
                color="C0",
                mfc=face,
                label=label,
            )
    axes.axhline(1, color="0.4", ls="--", lw=1)
    _finish(axes, "samples, in this order", "spectral radius", "with estimates of the error")
    figures["radius_errors"] = _png(figure)

    for name, values in spectra.values.items():
        figure, axes = _panel(width=4.0, height=3.8)
        title = f"the {name} {words.one}"
        plot_spectrum(axes, values, errors=spectra.errors[name], title=title)
        figures[f"spectrum_{name}"] = _png(figure)
    return figures


def budgets(budgets: Budgets, tol: float, words: Words) -> Figures:
    """Accuracy, share of converged samples, residual and maybe loss against the budget."""
    figures = {}
    panels = {
        "accuracy": (
            {"accuracy": budgets.accuracy, "converged": budgets.converged},
            f"accuracy and share of converged {words.many}",
        ),
        "residual": ({"mean residual": budgets.residual}, "mean relative residual"),
    }
    if words.loss:
        panels["loss"] = {"loss": budgets.loss}, f"loss, {words.loss}"
    for name, (curves, title) in panels.items():
        figure, axes = _panel()
        for label, values in curves.items():
            axes.plot(budgets.budgets, values, marker=".", label=label)
        axes.axvline(budgets.trained, color="0.4", ls=":", lw=1, label="as in the run")
        if name == "residual":
            if tol > 0:
                axes.axhline(tol, color="0.4", ls="--", lw=1, label="tolerance")
            _logarithmic(axes, budgets.residual)
        elif name == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xscale("log")
        ticks = budgets.budgets[np.insert(np.diff(np.log(budgets.budgets)) > 0.3, 0, True)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        _finish(axes, "evaluations, at most", "", title)
        figures[f"budget_{name}"] = _png(figure)
    return figures


def confidence(solves: Solves, confidence: Confidence, words: Words) -> Figures:
    """Residuals of good and bad ones and, given enough of both, the curves behind AUROC."""
    figures = {}
    good = confidence.good
    finite = np.isfinite(solves.residual) & (solves.residual > 0)
    figure, axes = _panel()
    shown = solves.residual[finite]
    if shown.size:
        # Both kinds in the same bins, and as shares: there are far more of the one.
        low, high = np.log10([shown.min() / 1.01, shown.max() * 1.01])
        bins = np.logspace(low, high, 25)
        for chosen, label in ((good, words.good), (~good, words.bad)):
            count = int((finite & chosen).sum())
            if count:
                axes.hist(
                    solves.residual[finite & chosen],
                    bins=bins,
                    weights=np.full(count, 1 / count),
                    alpha=0.6,
                    label=f"{label}, {count} {words.many}",
                )
        axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    title = f"residual of {words.good} and {words.bad} {words.answers}"
    _finish(axes, "relative residual", "share of them", title)
    figures["confidence_residual"] = _png(figure)
    if not confidence.auroc:
        return figures

    figure, axes = _panel()
    for name, score in confidence.scores.items():
        order = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
        # Only behind the last of equal scores: a threshold cannot stand between them.
        ends = np.append(np.diff(score[order]) != 0, True)
        well = np.insert(np.cumsum(good[order])[ends], 0, 0)
        badly = np.insert(np.cumsum(~good[order])[ends], 0, 0)
        label = f"{name}: {confidence.auroc[name]:.2f}"
        axes.plot(badly / badly[-1], well / well[-1], label=label)
    axes.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1)
    across = f"share of the {words.bad} {words.answers} above"
    _finish(axes, across, f"of the {words.good} ones", "ROC, with its area")
    figures["confidence_roc"] = _png(figure)
    return figures


def epochs(history: Sequence[Mapping[str, Any]]) -> Figures:
    """Figures of the solves over the epochs of the training."""
    figures = {}
    for name, (title, kind) in _EPOCHS.items():
        figure, axes = _panel()
        for solve in _SOLVES:
            key = f"{solve}_{kind}"
            points = [(r["epoch"], r[key]) for r in history if _is_number(r.get(key))]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=solve.replace("_", " "))
        if not axes.lines:
            continue
        if kind == "residual_mean":
            _logarithmic(axes, [value for line in axes.lines for value in line.get_ydata()])
        elif kind == "converged":
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes, "epoch", "", title)
        figures[name] = _png(figure)
    return figures


def _panel(width: float = 5.0, height: float = 3.5) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _finish(axes: Axes, across: str, up: str, title: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.set_title(title)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def _logarithmic(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic axis, unless it would have nothing to show."""
    if any(value > 0 for value in values):
        axes.set_yscale("log")


def _is_number(value: Any) -> bool:
    return value is not None and bool(np.isfinite(value))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
