"""What a diagnosis measures against independent numbers, and its figures."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.train.image_experiment import build_model
from experiments.train.image_presets import parse

from deq_jax import Anderson, Status
from experiments.data.images import load_dataset
from experiments.report import figures, measure
from experiments.report.examples import ImageExamples
from tests.experiments.conftest import TINY


def network(count, scale=1.0, **changes):
    """A network at its initialisation with the cell's kernels scaled, and `count` images."""
    config = dataclasses.replace(parse(TINY), **changes)
    dataset = load_dataset("digits", train_examples=200)
    model = build_model(config, dataset)
    model.eval()
    for convolution in (model.core.cell.conv1, model.core.cell.conv2):
        convolution.kernel[...] = scale * convolution.kernel[...]
    few = dataset.evaluation.take(np.arange(count))
    examples = ImageExamples(few.images, few.labels, white=16)
    return model, examples, jnp.asarray(np.float32(examples.inputs) / np.float32(16))


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
    assert solves.record() == {
        "forward_iterations": pytest.approx(5.6),
        "forward_residual_mean": pytest.approx(0.93 / 4),
        "forward_residual_worst": np.inf,
        "forward_converged": pytest.approx(0.4),
        "forward_diverged": 1,
    }


def test_backward_record():
    nan = np.nan
    trace = np.array([[1.0, 0.5, np.inf, nan], [0.1, 0.9, nan, nan], [nan, 0.3, nan, nan]])
    record = measure.backward_record(trace, 0.1)
    assert record == {
        "backward_residual_mean": pytest.approx(0.2),
        "backward_residual_worst": np.inf,
        "backward_converged": pytest.approx(1 / 4),
    }
    assert measure.backward_record(np.full((3, 2), nan), 0.1) == {}


@pytest.mark.parametrize("tools", [{}, {"normalization": "weight", "start": "learned"}])
def test_solves_and_budgets_are_those_of_direct_solves(tools):
    # 40 images are a full batch and one that has to be filled up.
    model, examples, pixels = network(40, scale=2.0, tol=0.01, max_iter=9, **tools)
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
    model, examples, _ = network(3, solver="newton_krylov")
    looked_at = measure.Network(model, examples)
    looked_at._all = lambda answer: solves_of([True, False, True])
    np.testing.assert_array_equal(looked_at.budgets((2, 25, 50)).budgets, [2, 6, 25])


def test_spectra_are_those_of_the_dense_jacobian():
    sizes = {"channels": 4, "inner_channels": 4}
    model, examples, pixels = network(5, scale=60.0, tol=1e-3, max_iter=100, **sizes)
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
