"""The loop: per-sample stops, best iterates, statuses, counts, traces."""

from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Picard, Status, deq_fixed_point, solve_fixed_point, tree
from tests.reference import relative_residual

GAINS = np.array([0.1, 0.5, 0.9, 0.97], np.float32)
SOLVERS = [Picard(tol=1e-4, max_iter=400), Anderson(tol=1e-4, max_iter=400)]


def gains_cell(gains, z, x):
    """Each sample contracts at a rate of its own."""
    return jnp.tanh(gains[:, None] * jnp.roll(z, 1, axis=1)) + x


def inputs(batch, width=6, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, width)), jnp.float32)


@pytest.mark.museum(
    "torchdeq T19: no converged flag, no reason, no count; backward statistics only through a "
    "writer"
)
@pytest.mark.museum(
    "jaxopt J10: the state returned was one step past the one whose error was quoted"
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_residual_is_that_of_the_returned_iterate(solver):
    x = inputs(4)
    z, stats = deq_fixed_point(gains_cell, GAINS, x, solver=solver, return_stats=True)
    for i in range(4):
        expected = relative_residual(
            lambda z, i=i: gains_cell(GAINS[i : i + 1], z, x[i : i + 1]), z[i : i + 1]
        )
        np.testing.assert_allclose(stats.residual[i], expected, rtol=1e-2, atol=1e-7)
        assert expected <= 1.01e-4
    assert (stats.status == Status.CONVERGED).all()
    assert stats.converged.all()


@pytest.mark.museum(
    "torchdeq T10: a sample's result moved by up to 7e-4 when a hard sample joined its batch"
)
@pytest.mark.museum(
    "locuslab/deq#21: one residual for the whole batch: when it stopped depended on the batch size"
)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_batch_mates(solver):
    x = inputs(4)
    z, stats = deq_fixed_point(gains_cell, GAINS, x, solver=solver, return_stats=True)
    assert len(set(np.asarray(stats.iterations).tolist())) == 4
    for i in range(4):
        alone, alone_stats = deq_fixed_point(
            gains_cell, GAINS[i : i + 1], x[i : i + 1], solver=solver, return_stats=True
        )
        np.testing.assert_allclose(z[i], alone[0], rtol=0, atol=1e-6)
        assert stats.iterations[i] == alone_stats.iterations[0]
        np.testing.assert_allclose(stats.residual[i], alone_stats.residual[0], rtol=1e-2)


@pytest.mark.museum(
    "torchdeq T6: samples asked for at steps [5, 10] came from [4, 9], evaluations were "
    "miscounted, traces were padded with 1e8"
)
@pytest.mark.parametrize("solver", [Picard(max_iter=7), Anderson(max_iter=7), Picard(max_iter=1)])
@pytest.mark.parametrize("gain", [0.01, 0.99])
def test_evaluations_count_the_calls_of_f(solver, gain):
    calls = []

    def f(params, z, x):
        jax.debug.callback(lambda: calls.append(None))
        return params * jnp.roll(z, 1, axis=1) + x

    _, stats = deq_fixed_point(f, jnp.float32(gain), inputs(3), solver=solver, return_stats=True)
    jax.effects_barrier()
    assert len(calls) == stats.evaluations <= solver.max_iter
    assert stats.iterations.max() == stats.evaluations
    if gain > 0.9:
        assert stats.evaluations == solver.max_iter


@pytest.mark.museum(
    "torchdeq T3: multiplication with a mask let NaN and inf into the best state of a diverging "
    "sample"
)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_sample_stays_alone(solver, bad):
    x = inputs(4)
    clean, clean_stats = deq_fixed_point(gains_cell, GAINS, x, solver=solver, return_stats=True)
    spoilt, stats = deq_fixed_point(
        gains_cell, GAINS, x.at[1, 2].set(bad), solver=solver, return_stats=True
    )
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(spoilt[others], clean[others])
    np.testing.assert_array_equal(stats.residual[others], clean_stats.residual[others])
    np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0, 0])
    np.testing.assert_array_equal(spoilt[1], jnp.zeros(6))  # the start, its only finite iterate
    assert stats.residual[1] == np.inf
    assert stats.iterations[1] == 1


@pytest.mark.museum(
    "torchdeq T3: multiplication with a mask let NaN and inf into the best state of a diverging "
    "sample"
)
def test_a_sample_that_explodes_returns_its_best_finite_iterate():
    def f(params, z, x):
        # Halves the distance to 1 until z passes 0.9, then overflows.
        return jnp.where(z < 0.9, 0.5 * z + 0.5, jnp.inf)

    solver = Picard(tol=1e-6, trace=True)
    z, stats = deq_fixed_point(f, None, jnp.zeros((2, 3)), solver=solver, return_stats=True)
    np.testing.assert_allclose(z, 0.875)
    np.testing.assert_array_equal(stats.status, [Status.DIVERGED] * 2)
    np.testing.assert_allclose(stats.residual, (0.9375 - 0.875) / 0.9375, rtol=1e-6)
    np.testing.assert_array_equal(stats.iterations, [5, 5])


@pytest.mark.museum(
    "jaxopt J10: the state returned was one step past the one whose error was quoted"
)
def test_the_best_iterate_is_returned_when_the_last_one_is_worse():
    def f(params, z, x):
        # Rotation with growth: the residual is lowest where the rotation starts nearest to 0.
        return 1.5 * jnp.stack([-z[:, 1], z[:, 0]], axis=1) + x

    x = jnp.ones((1, 2))
    solver = Picard(max_iter=6, trace=True)
    z, stats = deq_fixed_point(f, None, x, solver=solver, return_stats=True)
    assert stats.status[0] == Status.MAX_ITER
    best = np.argmin(stats.trace[:, 0])
    assert best < 5
    assert stats.residual[0] == stats.trace[best, 0]
    np.testing.assert_allclose(
        relative_residual(lambda z: f(None, z, x), z), stats.residual[0], rtol=1e-5
    )


@pytest.mark.museum(
    "torchdeq T6: samples asked for at steps [5, 10] came from [4, 9], evaluations were "
    "miscounted, traces were padded with 1e8"
)
@pytest.mark.slow
def test_the_trace_holds_every_residual_until_each_samples_stop():
    solver = Anderson(tol=1e-4, max_iter=60, trace=True)
    _, stats = deq_fixed_point(gains_cell, GAINS, inputs(4), solver=solver, return_stats=True)
    assert stats.trace.shape == (60, 4)
    for i, iterations in enumerate(stats.iterations):
        assert np.isfinite(stats.trace[:iterations, i]).all()
        assert np.isnan(stats.trace[iterations:, i]).all()
        assert stats.trace[iterations - 1, i] <= 1e-4
        assert (stats.trace[: iterations - 1, i] > 1e-4).all()


def test_no_trace_unless_asked():
    _, stats = deq_fixed_point(gains_cell, GAINS, inputs(4), return_stats=True)
    assert stats.trace is None


def test_starting_at_the_solution_takes_one_evaluation():
    x = inputs(4)
    solver = Anderson(tol=1e-4, max_iter=400)
    z = deq_fixed_point(gains_cell, GAINS, x, solver=solver)
    again, stats = deq_fixed_point(gains_cell, GAINS, x, z, solver=solver, return_stats=True)
    np.testing.assert_array_equal(again, z)
    assert stats.evaluations == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_unbatched_is_one_equation(solver):
    x = {"a": inputs(3), "b": inputs(5, 2, seed=1)[0]}

    def f(params, z, x):
        mean = z["a"].mean()
        return {"a": 0.5 * jnp.tanh(z["a"]) + x["a"], "b": 0.3 * z["b"] + mean * x["b"]}

    z, stats = deq_fixed_point(f, None, x, solver=solver, batched=False, return_stats=True)
    assert stats.residual.shape == stats.iterations.shape == stats.status.shape == ()
    error = jax.tree.map(lambda a, b: np.sum((a - b) ** 2), f(None, z, x), z)
    size = jax.tree.map(lambda a: np.sum(a**2), f(None, z, x))
    residual = np.sqrt(error["a"] + error["b"]) / np.sqrt(size["a"] + size["b"])
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-2)
    assert residual <= 1e-4


def test_the_residual_spans_all_leaves_of_a_sample():
    x = {"a": inputs(4), "b": (inputs(4, 3, seed=1),)}

    def f(params, z, x):
        return {"a": 0.5 * z["a"] + x["a"], "b": (0.9 * z["b"][0] + x["b"][0],)}

    z, stats = deq_fixed_point(f, None, x, solver=Picard(max_iter=300), return_stats=True)
    fz = f(None, z, x)
    flat = [np.concatenate([t["a"], t["b"][0]], axis=1) for t in (fz, z)]
    expected = np.linalg.norm(flat[0] - flat[1], axis=1) / np.linalg.norm(flat[0], axis=1)
    np.testing.assert_allclose(stats.residual, expected, rtol=1e-2)


def test_atol_stops_too():
    x = inputs(4)
    _, stats = deq_fixed_point(
        gains_cell, GAINS, x, solver=Picard(tol=0.0, atol=1e-2, max_iter=400), return_stats=True
    )
    assert (stats.status == Status.CONVERGED).all()
    z, _ = solve_fixed_point(gains_cell, GAINS, x, solver=Picard(tol=0.0, atol=1e-2, max_iter=400))
    distance = np.linalg.norm(gains_cell(GAINS, z, x) - z, axis=1)
    assert (distance <= 1e-2).all()
    assert (distance > 1e-3).any()  # and it stopped there, not much later


def test_an_equilibrium_at_zero_can_be_found():
    """‖f(z)‖ vanishes with the residual; ε decides, long before the numbers underflow."""
    z0 = jnp.ones((2, 3))
    z, stats = deq_fixed_point(
        lambda p, z, x: 0.1 * z, None, z0, z0, solver=Picard(max_iter=50), return_stats=True
    )
    assert (stats.status == Status.CONVERGED).all()
    assert np.abs(z).max() < 1e-12


@pytest.mark.slow
def test_solve_fixed_point_has_the_same_answer_and_no_gradient():
    x = inputs(4)
    solution = solve_fixed_point(gains_cell, GAINS, x, solver=SOLVERS[1])
    value, stats = deq_fixed_point(gains_cell, GAINS, x, solver=SOLVERS[1], return_stats=True)
    chex.assert_trees_all_equal(tuple(solution), (value, stats))
    gradient = jax.grad(lambda x: solve_fixed_point(gains_cell, GAINS, x).value.sum())(x)
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.slow
def test_a_solver_of_the_users_own_runs_in_the_loop():
    class AitkenState(NamedTuple):
        z: jax.Array
        g: jax.Array
        first: jax.Array

    class Aitken:
        """Anderson with a window of two in closed form: a secant step along the last move."""

        tol, atol, max_iter, trace = 1e-5, 0.0, 100, True

        def init(self, z, fz):
            assert fz.shape == z.shape
            return AitkenState(z, 0 * z, tree.zeros_per_sample(z) == 0)

        def step(self, z, fz, state):
            g = fz - z
            difference = g - state.g
            size = tree.dot(difference, difference)
            gamma = tree.dot(difference, g) / jnp.where(size > 0, size, 1)
            secant = fz - gamma[:, None] * (z - state.z + difference)
            return tree.where(state.first, fz, secant), AitkenState(z, g, state.first & False)

    def f(slopes, z, x):
        return slopes * z + x

    slopes, x = jnp.linspace(0.2, 0.9, 6), inputs(4)
    z, stats = deq_fixed_point(f, slopes, x, solver=Aitken(), return_stats=True)
    assert (stats.status == Status.CONVERGED).all()
    np.testing.assert_allclose(z, x / (1 - slopes), rtol=1e-3)
    picard = deq_fixed_point(f, slopes, x, solver=Picard(tol=1e-5), return_stats=True)[1]
    assert int(stats.evaluations) < 0.6 * int(picard.evaluations)
    gradient = jax.grad(lambda x: deq_fixed_point(f, slopes, x, solver=Aitken()).sum())(x)
    np.testing.assert_allclose(gradient, jnp.ones_like(x) / (1 - slopes), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("solver", [Picard(tol=2e-2), Anderson(tol=2e-2)])
def test_half_precision_states(dtype, solver):
    x = inputs(4).astype(dtype)

    def f(params, z, x):
        return jnp.tanh(params * z) + x

    def loss(params, x):
        z, stats = deq_fixed_point(f, params, x, solver=solver, return_stats=True)
        return z.astype(jnp.float32).sum(), (z, stats)

    params = jnp.asarray(0.7, dtype)
    gradient, (z, stats) = jax.grad(loss, argnums=1, has_aux=True)(params, x)
    assert z.dtype == gradient.dtype == dtype
    assert stats.residual.dtype == jnp.float32
    assert (stats.status == Status.CONVERGED).all()
    # Elementwise, so the derivative is 1 / (1 - ∂f/∂z).
    slope = 0.7 / np.cosh(0.7 * np.asarray(z, np.float64)) ** 2
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 1 / (1 - slope), rtol=0.08)
