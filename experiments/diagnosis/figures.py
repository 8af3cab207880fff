"""The figures of a diagnosis, one panel each, so that a narrow page can put them below another."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator, PercentFormatter

from deq_jax.plotting import plot_iterations, plot_residuals, plot_spectrum
from experiments.diagnosis.confidence import Confidence
from experiments.diagnosis.measure import Budgets, Solves, Spectra

Figures = dict[str, bytes]
"""PNG files by their names without `.png`."""

_EPOCHS = {
    "epochs_converged": ("share of samples that converge", "converged"),
    "epochs_residual": ("mean relative residual", "residual_mean"),
    "epochs_evaluations": ("evaluations of a sample", "iterations"),
}
_SOLVES = ("forward", "backward", "validation_forward", "test_forward")


def residuals(traces: Mapping[str, np.ndarray], tolerances: Mapping[str, float]) -> Figures:
    """Residual against evaluations, forward and, where there is one, backward."""
    figures = {}
    for name, trace in traces.items():
        figure, axes = _panel()
        # A sample whose first evaluation was not finite has nothing to draw.
        drawable = trace[:, np.isfinite(trace[0])]
        curves = {"median, best to worst": drawable} if drawable.size else {}
        left_out = trace.shape[1] - drawable.shape[1]
        title = f"{name} solve, {drawable.shape[1]} images" + f", not {left_out}" * (left_out > 0)
        plot_residuals(axes, curves, tol=tolerances.get(name) or None, title=title)
        figures[f"residuals_{name}"] = _png(figure)
    return figures


def evaluations(solves: Solves, max_iter: int) -> Figures:
    """How many images took how many evaluations."""
    figure, axes = _panel()
    plot_iterations(axes, solves.iterations, max_iter=max_iter, title="forward solve")
    return {"evaluations": _png(figure)}


def spectra(spectra: Spectra) -> Figures:
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
        title = f"the {name} image"
        plot_spectrum(axes, values, errors=spectra.errors[name], title=title)
        figures[f"spectrum_{name}"] = _png(figure)
    return figures


def budgets(budgets: Budgets, tol: float) -> Figures:
    """Accuracy, share of converged samples and residual against the budget."""
    figures = {}
    for name, curves, title in (
        (
            "budget_accuracy",
            {"accuracy": budgets.accuracy, "converged": budgets.converged},
            "accuracy and share of converged images",
        ),
        ("budget_residual", {"mean residual": budgets.residual}, "mean relative residual"),
    ):
        figure, axes = _panel()
        for label, values in curves.items():
            axes.plot(budgets.budgets, values, marker=".", label=label)
        axes.axvline(budgets.trained, color="0.4", ls=":", lw=1, label="as in the run")
        if name == "budget_residual":
            if tol > 0:
                axes.axhline(tol, color="0.4", ls="--", lw=1, label="tolerance")
            _logarithmic(axes, budgets.residual)
        else:
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xscale("log")
        ticks = budgets.budgets[np.insert(np.diff(np.log(budgets.budgets)) > 0.3, 0, True)]
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        _finish(axes, "evaluations, at most", "", title)
        figures[name] = _png(figure)
    return figures


def confidence(solves: Solves, confidence: Confidence) -> Figures:
    """Residuals of right and wrong answers and, given enough of both, the curves behind AUROC."""
    figures = {}
    finite = np.isfinite(solves.residual) & (solves.residual > 0)
    figure, axes = _panel()
    shown = solves.residual[finite]
    if shown.size:
        # Both kinds in the same bins, and as shares: there are far more of the one.
        low, high = np.log10([shown.min() / 1.01, shown.max() * 1.01])
        bins = np.logspace(low, high, 25)
        for chosen, label in ((solves.correct, "correct"), (~solves.correct, "wrong")):
            count = int((finite & chosen).sum())
            if count:
                axes.hist(
                    solves.residual[finite & chosen],
                    bins=bins,
                    weights=np.full(count, 1 / count),
                    alpha=0.6,
                    label=f"{label}, {count} images",
                )
        axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish(axes, "relative residual", "share of them", "residual of correct and wrong answers")
    figures["confidence_residual"] = _png(figure)
    if not confidence.auroc:
        return figures

    figure, axes = _panel()
    for name, score in confidence.scores.items():
        order = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")
        # Only behind the last of equal scores: a threshold cannot stand between them.
        ends = np.append(np.diff(score[order]) != 0, True)
        right = np.insert(np.cumsum(solves.correct[order])[ends], 0, 0)
        wrong = np.insert(np.cumsum(~solves.correct[order])[ends], 0, 0)
        label = f"{name}: {confidence.auroc[name]:.2f}"
        axes.plot(wrong / confidence.wrong, right / confidence.correct, label=label)
    axes.plot([0, 1], [0, 1], color="0.4", ls="--", lw=1)
    _finish(axes, "share of the wrong answers above", "of the correct ones", "ROC, with its area")
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


def thumbnail(image: np.ndarray, white: int) -> bytes:
    """A PNG of an image `[H, W, C]`, C 1 or 3, of values up to `white`."""
    shade = np.clip(image / white, 0, 1)
    buffer = io.BytesIO()
    flat = shade.repeat(3, axis=2) if shade.shape[2] == 1 else shade
    imsave(buffer, flat, format="png")
    return buffer.getvalue()


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
