"""Preconditioners: fewer products, the same solution, the true residual, and traced arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.captured import Captured

pytestmark = pytest.mark.usefixtures("x64")

BATCH, N = 3, 40
RNG = np.random.default_rng(0)
# 1 - diagonal runs from 1e-4 to 30: an ill-conditioned diagonal problem, lightly coupled.
DIAGONAL = 1 - np.geomspace(1e-4, 30, N)
COUPLING = RNG.normal(size=(N, N)) * 1e-3 * np.sqrt(np.outer(1 - DIAGONAL, 1 - DIAGONAL))
X = RNG.normal(size=(BATCH, N))
Y = RNG.normal(size=(BATCH, N))
SOLUTION = np.linalg.solve(np.eye(N) - np.diag(DIAGONAL) - COUPLING, X.T).T
EXACT = np.linalg.solve((np.eye(N) - np.diag(DIAGONAL) - COUPLING).T, Y.T).T


def cell(params, z, x):
    diagonal, coupling = params
    return z * diagonal + z @ coupling.T + x


def gradient_and_report(make_policy, diagonal=DIAGONAL):
    """∂ Σ Y z* / ∂x, which is u itself."""

    def loss(x, diagonal, probe):
        solver = NewtonKrylov(GMRES(restart=N, max_iter=N), tol=1e-12)
        z = deq_fixed_point(
            cell,
            (diagonal, jnp.asarray(COUPLING)),
            x,
            jnp.asarray(SOLUTION),
            solver=solver,
            gradient=make_policy(diagonal),
            backward_probe=probe,
        )
        return (z * Y).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    return gradient(jnp.asarray(X), jnp.asarray(diagonal), BackwardProbe.zeros(BATCH))


def nearly_inverse(diagonal):
    return lambda z, v: v / (1 - diagonal)


def inverse(diagonal):
    """Not its own transpose, so that one that is forgotten costs many products."""
    dense = np.linalg.inv(np.eye(N) - np.diag(DIAGONAL) - COUPLING)
    return lambda z, v: v @ jnp.asarray(dense).T


def check(gradient, rtol=1e-5):
    np.testing.assert_array_equal(gradient[2].status, Status.CONVERGED)
    np.testing.assert_allclose(gradient[0], EXACT, rtol=rtol)
    np.testing.assert_allclose(gradient[1], (EXACT * SOLUTION).sum(0), rtol=rtol)


@pytest.mark.parametrize(
    "solver", [GMRES(N, 1e-9, 400), BiCGStab(1e-9, 400)], ids=lambda solver: type(solver).__name__
)
@pytest.mark.slow
def test_a_third_of_the_products_on_an_ill_conditioned_diagonal_problem(solver):
    """And the gradient goes to the params that the preconditioner closes over, not through it."""
    plain = gradient_and_report(lambda _: Implicit(solver))
    better = gradient_and_report(lambda d: Implicit(solver, preconditioner=nearly_inverse(d)))
    check(better)
    assert 3 * better[2].evaluations <= plain[2].evaluations


@pytest.mark.parametrize(
    "solver", [GMRES(N, 1e-9, 400), Anderson(tol=1e-9)], ids=lambda solver: type(solver).__name__
)
@pytest.mark.slow
def test_it_is_transposed_in_krylov_methods_and_solvers_of_fixed_points(solver):
    """The exact inverse, transposed, leaves nothing to iterate."""
    gradient = gradient_and_report(lambda d: Implicit(solver, preconditioner=inverse(d)))
    check(gradient)
    assert (gradient[2].residual <= 1e-9).all()
    assert gradient[2].evaluations <= 4


@pytest.mark.slow
def test_a_useless_preconditioner_is_no_lie():
    """The residual that is reported is that of u, whatever the preconditioner is."""
    policy = Implicit(Picard(tol=1e-9, max_iter=30), preconditioner=lambda z, v: 0.01 * v)
    gradient, _, report = gradient_and_report(lambda _: policy)
    system = np.eye(N) - np.diag(DIAGONAL) - COUPLING
    residual = np.linalg.norm(gradient @ system - Y, axis=1) / np.linalg.norm(Y, axis=1)
    np.testing.assert_allclose(report.residual, residual, rtol=1e-5)
    np.testing.assert_array_equal(report.status, Status.MAX_ITER)


def smooth(params, z, x):
    return params * jnp.tanh(z) + 0.02 * jnp.roll(z, 1, -1) + x


@pytest.mark.slow
def test_one_that_depends_on_the_state_serves_newton_and_all_derivatives():
    """J is known only where the solver is; a Hessian differentiates twice through the solve."""
    params, x = jnp.linspace(-8.0, 0.9, 6), jnp.asarray(X[:2, :6])

    def solution(params):
        def nearly_inverse(z, v):
            return v / (1 - params / jnp.cosh(z) ** 2)

        krylov = GMRES(tol=1e-11, preconditioner=nearly_inverse)
        solver = NewtonKrylov(krylov, tol=1e-12)
        return deq_fixed_point(smooth, params, x, solver=solver, return_stats=True)

    z, stats = solution(params)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(smooth(params, z, x), z, rtol=0, atol=1e-10)
    plain = solve_fixed_point(smooth, params, x, solver=NewtonKrylov(tol=1e-12)).stats
    assert int(stats.products) < 0.7 * int(plain.products)

    def loss(params):
        return (solution(params)[0] ** 2).sum()

    direction = jnp.asarray(Y[0, :6])
    gradient, second = jax.jit(lambda p: jax.jvp(jax.grad(loss), (p,), (direction,)))(params)
    step = 1e-5 * direction
    values = [jax.jit(loss)(params + s) for s in (step, -step)]
    np.testing.assert_allclose(gradient @ direction, (values[0] - values[1]) / 2e-5, rtol=1e-6)
    around = [jax.jit(jax.grad(loss))(params + s) for s in (step, -step)]
    np.testing.assert_allclose(second, (around[0] - around[1]) / 2e-5, rtol=1e-5, atol=1e-6)


def test_a_function_is_compiled_once_for_other_arrays():
    """Captured arrays are leaves, whether in a closure, a default, a partial or under `jit`."""
    traces = []

    @jax.jit
    def run(captured, v):
        traces.append(None)
        return captured(None, v)

    def divide(by, factor=2):
        scale = {"by": by}

        def function(z, v, shift=by):
            return factor * v / scale["by"] + shift

        return Captured(function)

    v = jnp.ones(3)
    for by in (2.0, 4.0):
        np.testing.assert_allclose(run(divide(jnp.full(3, by)), v), 2 / by + by)
    assert len(traces) == 1
    np.testing.assert_allclose(run(divide(jnp.full(3, 2.0), 3), v), 3.5)
    np.testing.assert_allclose(run(Captured(divide(v, 3).function), v), 4)
    compiled = Captured(jax.jit(lambda z, v: v * by))
    assert len(jax.tree.leaves(divide(v))) == 2
    assert jax.tree.leaves(compiled) == []  # a Python number is static
    np.testing.assert_allclose(jax.grad(lambda a: run(divide(a), v).sum())(v), 0)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: GMRES(preconditioner=3), "GMRES.preconditioner must be a function M(z, v)"),
        (lambda: Implicit(preconditioner="ilu"), "Implicit.preconditioner must be a function"),
        (
            lambda: Implicit(GMRES(preconditioner=max), preconditioner=max),
            "Implicit.preconditioner and the preconditioner of Implicit.solver are both set",
        ),
        (lambda: Implicit(reuse=True, preconditioner=max), "leave preconditioner out"),
        (
            lambda: gradient_and_report(lambda _: Implicit(preconditioner=lambda z, v: v[:1])),
            "preconditioner must return the shapes of v: leaf (the whole): got (1, 40)",
        ),
    ],
)
def test_bad_preconditioners_are_named(make, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert error in str(raised.value)
