"""What a diagnosis measures against independent numbers, and its figures."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Status
from deq_jax.stability import Severity
from experiments.data.images import load_images
from experiments.image_classification import build_model, parse_arguments
from experiments.report import figures, measure, subject
from experiments.report.examples import ImageExamples
from experiments.train.loop import Progress
from tests.experiments.conftest import TINY

digits = functools.cache(load_images)


def network(count, *flags, scale=1.0):
    """A network at its initialisation with the cell's kernels scaled, and `count` images.

    The flags come in the place of those of TINY with the same names.
    """
    names = {flag.partition("=")[0] for flag in flags}
    kept = [flag for flag in TINY if flag.partition("=")[0] not in names]
    dataset = digits("digits", train_examples=200)
    model = build_model(parse_arguments([*flags, *kept]), dataset)
    model.eval()
    for convolution in (model.core.cell.conv1, model.core.cell.conv2):
        convolution.kernel[...] = scale * convolution.kernel[...]
    images, labels = dataset.evaluation_examples(np.arange(count))
    examples = ImageExamples(images, labels, white=16)
    return model, examples, jnp.asarray(np.float32(images) / np.float32(16))


def solves_of(correct, residual=None):
    count = len(correct)
    residual = np.linspace(0.001, 0.1, count) if residual is None else np.asarray(residual)
    return measure.Solves(
        labels=np.ones(count, int),
        predicted=np.asarray(correct, int),
        softmax=np.linspace(1.0, 0.5, count),
        loss=np.linspace(0.5, 1.0, count),
        residual=residual,
        iterations=np.arange(1, count + 1),
        status=np.where(np.isfinite(residual), Status.CONVERGED, Status.DIVERGED),
    )


@pytest.mark.parametrize("seed", range(5))
def test_area_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 30).astype(float)
    scores[:3] = -np.inf, np.inf, np.nan
    good = rng.permutation(np.arange(30) < 18)
    compared = np.where(np.isnan(scores), -np.inf, scores)
    above, below = compared[good][:, None], compared[~good][None, :]
    expected = ((above > below) + 0.5 * (above == below)).mean()
    curve = measure.roc_curves(solves_of(good, -scores), good)["-residual"]
    assert curve.area == pytest.approx(expected, abs=1e-12)
    # Each point of the curve is that of a threshold between two scores.
    points = {(0.0, 0.0)}
    points |= {((below >= one).mean(), (above >= one).mean()) for one in compared}
    assert set(zip(curve.bad, curve.good, strict=True)) <= points


def test_roc_curves_need_enough_of_both_kinds():
    def areas(*correct):
        solves = solves_of(np.concatenate(correct))
        return {name: one.area for name, one in measure.roc_curves(solves, solves.correct).items()}

    # The residuals ascend, so that all right answers have a lower one than all wrong ones.
    yes, no = np.ones(30, bool), np.zeros(30, bool)
    best = {"softmax maximum": 1.0, "-residual": 1.0, "-evaluations": 1.0}
    assert areas(yes, no[:10]) == best
    assert areas(no[:10], yes)["-residual"] == 0.0
    assert areas(yes, no[:9]) == {}
    assert areas(no, yes[:9]) == {}


def test_order_of_the_images():
    solves = measure.Solves(
        labels=np.zeros(5, int),
        predicted=np.zeros(5, int),
        softmax=np.ones(5),
        loss=np.ones(5),
        residual=np.array([0.01, np.inf, 0.5, 0.02, 0.4]),
        iterations=np.array([4, 2, 9, 4, 9]),
        status=np.array([0, 2, 1, 0, 1]),
    )
    np.testing.assert_array_equal(solves.hardest_first(), [1, 2, 4, 3, 0])
    assert figures_of(solves.summary()) == {
        "samples": 5,
        "converged": pytest.approx(0.4),
        "diverged": 1,
        "residual_mean": pytest.approx(0.93 / 4),
        "residual_worst": np.inf,
        "iterations": pytest.approx(5.6),
    }


def figures_of(summary):
    """The figures of a summary that are known."""
    found = dataclasses.asdict(summary)
    return {name: value for name, value in found.items() if not np.isnan(value)}


def test_summary_of_backward_solves():
    nan = np.nan
    trace = np.array([[1.0, 0.5, np.inf, nan], [0.1, 0.9, nan, nan], [nan, 0.3, nan, nan]])
    assert figures_of(measure.backward_summary(trace, 0.1)) == {
        "samples": 4,
        "converged": pytest.approx(1 / 4),
        "diverged": 2,
        "residual_mean": pytest.approx(0.2),
        "residual_worst": np.inf,
    }
    assert figures_of(measure.backward_summary(np.full((3, 2), nan), 0.1)) == {
        "samples": 2,
        "converged": 0,
        "diverged": 2,
        "residual_worst": np.inf,
    }


def test_findings_about_every_kind_of_figure():
    """The backward solves are those of the newest epoch where they have no trace."""
    config = parse_arguments([*TINY, "backward:gmres"])
    bad = {"backward_converged": 0.1, "backward_residual_mean": 0.3, "backward_diverged": None}
    history = [{"epoch": 6, "backward_converged": 1.0}, {"epoch": 7} | bad]
    core = types.SimpleNamespace(solver=dataclasses.replace(config.solver, max_iter=40))
    model = types.SimpleNamespace(core=core)  # whose budget in evaluation is another
    run = types.SimpleNamespace(config=config, model=model, progress=Progress(history=history))
    failed = solves_of([True] * 30, np.full(30, np.inf))
    fine = solves_of([True] * 30)
    spectra = measure.Spectra(np.full(3, 2.0), np.zeros(3), np.ones(3, bool), {}, {}, {})
    known = np.array([2, 6])
    falling = measure.Budgets(known, np.array([0.9, 0.5]), known, known, known, trained=2)

    def found(solves, traces, history=history):
        run.progress.history = history
        return subject.findings(run, solves, traces, spectra, falling)

    titles = ["Gradients are inexact", "The cell does not contract"]
    titles += ["Accuracy falls when the solver goes on"]
    untraced = found(fine, {})
    assert [one.title for one in untraced] == titles
    assert untraced[0].evidence.startswith("In epoch 7 of the training: 10.0% of the backward ")
    assert "GMRES" not in "".join(untraced[0].advice)  # it is in use
    assert untraced[2].evidence.startswith("Accuracy is 90.0% with at most 2 evaluations and 50.0%")
    assert [one.title for one in found(fine, {}, [])] == titles[1:]
    few = dataclasses.replace(fine, status=np.full(30, Status.MAX_ITER))
    assert "above 40" in str(found(few, {})[0])
    traced = found(failed, {"backward": np.full((6, 4), np.nan)})
    assert [one.title for one in traced if one.severity == Severity.ERROR] == [
        "Some forward solves became NaN or infinite",
        "Some backward solves became NaN or infinite",
    ]
    assert [one.title for one in traced][-2:] == titles[1:]


LIMITS = ["--solver.tol=0.01", "--solver.max-iter=9"]
TOOLS = ["stability:on", "stability.normalization:weight", "--stability.start=learned"]


@pytest.mark.slow
@pytest.mark.parametrize("tools", [[], TOOLS], ids=["plain", "tools"])
def test_solves_and_budgets_are_those_of_direct_solves(tools):
    # 40 images are a full batch and one that has to be filled up.
    model, examples, pixels = network(40, *LIMITS, *tools, scale=2.0)
    looked_at = measure.Network(model, examples)
    logits, stats = model(pixels, return_stats=True)
    solves = looked_at.solves()
    assert 0 < solves.converged.sum() < 40 or tools
    assert len(set(solves.iterations)) > 1
    np.testing.assert_array_equal(solves.labels, examples.targets)
    np.testing.assert_array_equal(solves.iterations, stats.iterations)
    np.testing.assert_array_equal(solves.status, stats.status)
    np.testing.assert_allclose(solves.residual, stats.residual, rtol=1e-3)
    exponentials = np.exp(np.float64(logits))
    shares = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_array_equal(solves.predicted, shares.argmax(1))
    np.testing.assert_allclose(solves.softmax, shares.max(1), rtol=1e-4)
    true = shares[np.arange(40), examples.targets]
    np.testing.assert_allclose(solves.loss, -np.log(true), rtol=1e-4)

    budgets = looked_at.budgets((2, 12))
    np.testing.assert_array_equal(budgets.budgets, [2, 9, 12])
    assert budgets.trained == 9
    for row, budget in enumerate(budgets.budgets):
        model.core.solver = Anderson(tol=0.0, max_iter=int(budget))
        logits, stats = model(pixels, return_stats=True)
        assert int(stats.evaluations) == budget
        residual = np.float64(stats.residual)
        right = np.asarray(logits).argmax(1) == examples.targets
        assert budgets.accuracy[row] == right.mean()
        assert budgets.converged[row] == (residual <= 0.01).mean()
        np.testing.assert_allclose(budgets.residual[row], residual.mean(), rtol=1e-3)


def test_newton_is_not_tried_with_budgets_that_take_forever():
    model, examples, _ = network(3, "solver:newton")
    looked_at = measure.Network(model, examples)
    looked_at._all = lambda answer: solves_of([True, False, True])
    np.testing.assert_array_equal(looked_at.budgets((2, 25, 50)).budgets, [2, 6, 25])


@pytest.mark.slow
def test_spectra_are_those_of_the_dense_jacobian():
    flags = ["--network.channels=4", "--network.inner-channels=4"]
    flags += ["--solver.tol=1e-3", "--solver.max-iter=100"]
    model, examples, pixels = network(5, *flags, scale=60.0)
    looked_at = measure.Network(model, examples)
    order = np.array([3, 1, 4, 0, 2])
    spectra = looked_at.spectra(order, count=3)
    assert spectra.looked_at == {"slowest": 3, "median": 4, "fastest": 2}
    assert spectra.converged.all()
    injection = model.injection(pixels)
    z = model.core(injection)
    flat = z[0].size

    @jax.jit
    @jax.jacfwd
    def jacobian(v, x):
        return model.core.cell(v.reshape(1, *z.shape[1:]), x[None]).ravel()

    for row, (name, index) in enumerate(spectra.looked_at.items()):
        dense = np.float64(jacobian(z[index].ravel(), injection[index]))
        assert dense.shape == (flat, flat)
        eigenvalues = np.linalg.eigvals(dense)
        expected = np.abs(eigenvalues).max()
        assert expected > 0.2
        assert spectra.radius[row] == pytest.approx(expected, rel=0.02)
        assert abs(spectra.radius[row] - expected) <= 2 * spectra.error[row] + 1e-3
        # What is said to be sharp is an eigenvalue.
        values, errors = spectra.values[name], spectra.errors[name]
        sharp = errors < 1e-3 * expected
        assert sharp.any()
        distance = np.abs(values[sharp][:, None] - eigenvalues[None]).min(1)
        assert distance.max() < 0.02 * expected


@pytest.mark.slow
def test_a_network_that_is_not_finite():
    model, examples, _ = network(3, scale=np.nan)
    looked_at = measure.Network(model, examples)
    solves = looked_at.solves()
    # The first evaluation is at zero, whose residual needs the kernels, too.
    assert (solves.status == Status.DIVERGED).all()
    spectra = looked_at.spectra(solves.hardest_first())
    budgets = looked_at.budgets((2,))
    assert np.isnan(spectra.radius).all()
    assert np.isnan(budgets.residual).all()

    # The figures say that there is nothing to draw.
    words = examples.words
    traces = {"forward": np.full((6, 3), np.nan)}
    (axes,) = figures.residual_figures(traces, {"forward": 0.1}, "images")["residuals_forward"].axes
    assert axes.get_title() == "forward solve, 0 images, not 3"
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.1, 0.1]]  # the tolerance
    drawn = figures.spectrum_figures(spectra, "image")
    assert list(drawn)[:2] == ["radius", "radius_errors"]
    (axes,) = drawn["radius"].axes
    assert axes.get_title() == "spectral radius, 0 samples"
    assert not axes.patches
    (axes,) = figures.budget_figures(budgets, 0.1, words)["budget_residual"].axes
    assert axes.get_yscale() == "linear"
    drawn = figures.confidence_figures(solves, examples.good(solves), {}, words)
    assert list(drawn) == ["confidence_residual"]
    assert not drawn["confidence_residual"].axes[0].patches


def test_figures_show_the_numbers():
    residual = np.append(np.geomspace(1e-3, 0.1, 29), np.inf)
    solves = solves_of([True] * 18 + [False] * 12, residual)
    (axes,) = figures.evaluation_figures(solves, 40)["evaluations"].axes
    assert [bar.get_height() for bar in axes.patches] == [1] * 30
    words = ImageExamples.words
    curves = measure.roc_curves(solves, solves.correct)
    drawn = figures.confidence_figures(solves, solves.correct, curves, words)
    assert list(drawn) == ["confidence_residual", "confidence_roc"]
    (axes,) = drawn["confidence_residual"].axes
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["correct, 18 images", "wrong, 11 images"]  # one has no finite residual
    for bars in axes.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(1)
    (axes,) = drawn["confidence_roc"].axes
    *drawn_curves, diagonal = axes.lines
    assert list(diagonal.get_xdata()) == [0, 1]
    for line, (name, curve) in zip(drawn_curves, curves.items(), strict=True):
        np.testing.assert_array_equal(line.get_xydata().T, [curve.bad, curve.good])
        assert line.get_label() == f"{name}: {curve.area:.2f}"

    tried = np.array([1, 2, 3])
    budgets = measure.Budgets(tried, tried / 4, tried + 1.0, tried / 5, 0.1**tried, trained=2)
    drawn = figures.budget_figures(budgets, 0.01, words._replace(loss="nats"))
    shown = {
        line.get_label(): list(line.get_ydata())
        for figure in drawn.values()
        for line in figure.axes[0].lines
    }
    for label, values in (
        ("accuracy", budgets.accuracy),
        ("converged", budgets.converged),
        ("mean residual", budgets.residual),
        ("loss", budgets.loss),
        ("tolerance", [0.01, 0.01]),
    ):
        assert shown[label] == list(values)

    spectra = measure.Spectra(
        radius=np.array([0.9, np.nan, 0.5]),
        error=np.array([0.1, np.nan, np.inf]),
        converged=np.array([True, False, False]),
        looked_at={"slowest": 0},
        values={"slowest": np.array([0.5 + 0.5j, np.nan])},
        errors={"slowest": np.array([0.0, np.nan])},
    )
    drawn = figures.spectrum_figures(spectra, "image")
    assert list(drawn) == ["radius", "radius_errors", "spectrum_slowest"]
    assert sum(bar.get_height() for bar in drawn["radius"].axes[0].patches) == 2
    # In ascending order, so that the inaccurate one comes first.
    points = {
        bars.get_label(): bars[0].get_xydata() for bars in drawn["radius_errors"].axes[0].containers
    }
    np.testing.assert_array_equal(points["accurate"], [[2, 0.9]])
    np.testing.assert_array_equal(points["not accurate"], [[1, 0.5]])
