"""Functions that mix the samples of a batch: true residuals, and right answers where CONVERGED.

All are given with `batched=True`, which stops each sample by itself. A sample that has stopped has
to go on when what it receives from others has changed.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, relative_error


def solvers(tol):
    return {
        "Picard": Picard(tol=tol, max_iter=3000),
        "Anderson": Anderson(tol=tol, max_iter=3000),
        "Broyden": Broyden(tol=tol, memory=40, max_iter=3000),
        "NewtonKrylov": NewtonKrylov(tol=tol, max_iter=3000),
    }


NAMES = list(solvers(1.0))


def path_graph(nodes=8):
    """The adjacency of a path, normalised: symmetric, of spectral radius 1."""
    adjacency = np.diag(np.ones(nodes - 1), 1) + np.diag(np.ones(nodes - 1), -1)
    root = np.sqrt(adjacency.sum(1))
    return adjacency / root[:, None] / root[None, :]


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


# Each problem: f in JAX, the same in NumPy, the params and x.


def line_graph():
    x = np.zeros((8, 3))
    x[0] = [1.0, -2.0, 0.5]

    def f(adjacency, z, x):
        return 0.9 * (adjacency @ z) + x

    return f, f, path_graph(), x


def scalar_line_graph():
    f, g, adjacency, _ = line_graph()
    x = np.zeros((8, 1))
    x[0] = 1.0
    return f, g, adjacency, x


def directed_line():
    """Node i hears node i - 1 only, so that news need eight trips to reach the end."""
    x = np.zeros((8, 2))
    x[0] = [1.0, -0.5]

    def f(adjacency, z, x):
        return 0.5 * (adjacency @ z) + x

    return f, f, np.diag(np.ones(7), -1), x


def batch_norm():
    """Batch normalisation in training mode: mean and variance over the batch."""

    def formula(tanh, sqrt):
        def f(w, z, x):
            h = z @ w + x
            centred = h - h.mean(0)
            return tanh(0.5 * centred / sqrt((centred**2).mean(0) + 1e-3))

        return f

    return formula(jnp.tanh, jnp.sqrt), formula(np.tanh, np.sqrt), normal(3, 3), 2 * normal(6, 3)


def attention():
    """Attention of the samples to each other."""

    def formula(module):
        def f(w, z, x):
            scores = (z @ w) @ z.T / np.sqrt(3).astype(z.dtype)
            weights = module.exp(scores - scores.max(1, keepdims=True))
            weights = weights / weights.sum(1, keepdims=True)
            return module.tanh(0.6 * (weights @ z) + x)

        return f

    x = normal(6, 3, seed=5)
    x[2:4] = 0  # these hear of anything only from the others
    return formula(jnp), formula(np), normal(3, 3, seed=4, scale=0.5), x


def coupled_mean():
    """Samples that meet in their mean, one of them at its own solution from the start."""

    def formula(tanh):
        def f(w, z, x):
            return tanh((z - 0.5 * z.mean(0)) @ w + x)

        return f

    x = normal(5, 3, seed=8)
    x[0] = 0
    return formula(jnp.tanh), formula(np.tanh), normal(3, 3, seed=9, scale=0.4), x


PROBLEMS = [line_graph, scalar_line_graph, directed_line, batch_norm, attention, coupled_mean]


def fixed_point(f, params, x):
    """The solution in NumPy and float64, by plain iteration."""
    z = np.zeros_like(x)
    for _ in range(3000):
        z = f(params, z, x)
    assert np.abs(f(params, z, x) - z).max() < 1e-13
    return z


def true_residuals(f, params, z, x):
    """Those of exactly this batch, each relative to the size of f; 0 where f(z) = z = 0."""
    z = np.asarray(z, np.float64)
    image = f(params, z, x)
    absolute, size = np.linalg.norm(image - z, axis=1), np.linalg.norm(image, axis=1)
    return np.where(absolute > 0, absolute / np.where(size > 0, size, 1e-300), 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", NAMES)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_batch_as_it_is_returned_is_the_solution(problem, solver):
    f, in_numpy, params, x = problem()
    tol = 1e-7
    z, stats = solve_fixed_point(
        f, jnp.asarray(params), jnp.asarray(x), solver=solvers(tol)[solver]
    )
    residuals = true_residuals(in_numpy, params, z, x)
    np.testing.assert_allclose(stats.residual, residuals, rtol=1e-6, atol=1e-15)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert (residuals <= tol * (1 + 1e-6)).all()
    # The condition of these equations is below 100.
    assert relative_error(z, fixed_point(in_numpy, params, x)) < 100 * tol


# Every problem and every solver, not each with each: the dtype changes nothing about their meeting.
@pytest.mark.parametrize(("problem", "solver"), [*zip(PROBLEMS, [*NAMES, *NAMES], strict=False)])
@pytest.mark.slow
def test_in_float32(problem, solver):
    f, in_numpy, params, x = problem()
    params, x = params.astype(np.float32), x.astype(np.float32)
    tol = 1e-4
    z, stats = solve_fixed_point(
        f, jnp.asarray(params), jnp.asarray(x), solver=solvers(tol)[solver]
    )
    params, x = params.astype(np.float64), x.astype(np.float64)
    residuals = true_residuals(in_numpy, params, z, x)
    np.testing.assert_allclose(stats.residual, residuals, rtol=1e-2, atol=1e-6)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert relative_error(z, fixed_point(in_numpy, params, x)) < 100 * tol


@pytest.mark.usefixtures("x64")
# Every problem with two solvers, every solver with three problems.
@pytest.mark.parametrize(
    ("problem", "solver"),
    [
        (problem, solver)
        for number, problem in enumerate(PROBLEMS)
        for solver in NAMES[number % 2 :: 2]
    ],
)
@pytest.mark.slow
def test_never_called_converged_above_the_tolerance(problem, solver):
    """However few evaluations are allowed, and however loose the tolerance."""
    f, in_numpy, params, x = problem()
    params, x = jnp.asarray(params), jnp.asarray(x)

    @jax.jit
    def solve(z0, tol):
        results = []
        for max_iter in (1, 2, 5, 12):
            method = type(solvers(1.0)[solver])(tol=tol, max_iter=max_iter)
            results.append(solve_fixed_point(f, params, x, z0, solver=method))
        return results

    starts = jnp.zeros_like(x), jnp.asarray(normal(*x.shape, seed=11))
    for z0, tol in itertools.product(starts, (1e-2, 1e-4)):
        for z, stats in solve(z0, jnp.asarray(tol)):
            residuals = true_residuals(in_numpy, np.asarray(params), z, np.asarray(x))
            converged = np.asarray(stats.status) == Status.CONVERGED
            assert (residuals[converged] <= tol * (1 + 1e-6)).all()
            finite = residuals < 1e10  # elsewhere f(z) is zero and z is not
            np.testing.assert_allclose(
                np.asarray(stats.residual)[finite], residuals[finite], rtol=1e-6, atol=1e-12
            )
            # The other way round too: what is at its tolerance is not called anything else.
            assert converged[residuals < tol * (1 - 1e-6)].all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("solver", NAMES)
def test_news_reach_samples_that_had_stopped(solver):
    """Nodes of the directed line stand still at first: all but one have residual zero."""
    f, _, params, x = directed_line()
    z, stats = solve_fixed_point(
        f, jnp.asarray(params), jnp.asarray(x), solver=solvers(1e-8)[solver]
    )
    expected = np.linalg.solve(np.eye(8) - 0.5 * params, x)
    assert np.abs(expected[1:]).min() > 1e-3
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert relative_error(z, expected) < 1e-6
    # f moves news by one node at each evaluation, whatever the solver does.
    assert stats.evaluations >= 8
    assert stats.iterations[7] >= 8


@pytest.mark.usefixtures("x64")
def test_the_evaluation_that_wakes_a_sample_is_counted_and_traced():
    """The last node stands still, at residual zero, until the last evaluation brings it news."""
    f, _, params, x = directed_line()
    solver = Picard(tol=1e-8, max_iter=8, trace=True)
    _, stats = solve_fixed_point(f, jnp.asarray(params), jnp.asarray(x), solver=solver)
    nan = np.nan
    np.testing.assert_array_equal(stats.trace[:, 7], [0, nan, nan, nan, nan, nan, nan, 1])
    assert stats.iterations[7] == 8
    assert stats.status[7] == Status.MAX_ITER


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("problem", [line_graph, batch_norm, attention])
@pytest.mark.slow
def test_as_one_equation_values_and_gradients_are_right(problem):
    """The control: with `batched=False` the batch is one equation, and the gradient is exact."""
    f, in_numpy, params, x = problem()
    params, x, y = jnp.asarray(params), jnp.asarray(x), jnp.asarray(normal(*x.shape, seed=7))

    def loss(params, x):
        z, stats = deq_fixed_point(
            f,
            params,
            x,
            solver=Anderson(tol=1e-12, max_iter=500),
            gradient=Implicit(GMRES(tol=1e-12, restart=40, max_iter=200)),
            batched=False,
            return_stats=True,
        )
        return jnp.vdot(y, z), (z, stats)

    gradients, (z, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    expected_z = fixed_point(in_numpy, np.asarray(params), np.asarray(x))
    assert stats.status == Status.CONVERGED
    assert relative_error(z, expected_z) < 1e-10
    expected = implicit_gradient(
        lambda inputs, z: f(inputs[0], z, inputs[1]), (params, x), jnp.asarray(expected_z), y
    )
    assert relative_error(gradients, expected) < 1e-9
