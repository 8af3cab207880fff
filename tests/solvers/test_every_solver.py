"""What holds for every solver: exact gradients forwards and backwards, and the absolute tolerance.

The cell is built around its equilibrium: z* is chosen first, then the matrix, scaled so that the
Jacobian at z* has the spectral radius wanted, then the input for which `z* = f(z*)`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, relative_error

pytestmark = pytest.mark.usefixtures("x64")

TOL = 1e-10
PICARD = Picard(tol=TOL, max_iter=400)
FORWARD = [
    PICARD,
    Anderson(history=6, tol=TOL, max_iter=200),
    Broyden(tol=TOL, max_iter=100),
    NewtonKrylov(tol=TOL),
]
BACKWARD = [*FORWARD, GMRES(tol=TOL), BiCGStab(tol=TOL)]


def name(solver):
    return type(solver).__name__


def tanh_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T + x)


def split(z):
    return {"a": z[:, :1], "b": (z[:, 1:5].reshape(-1, 2, 2), z[:, 5:])}


def join(tree):
    return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1, 4), tree["b"][1]], axis=1)


def split_cell(matrix, z, x):
    return split(tanh_cell(matrix, join(z), join(x)))


def spectral_radii(matrix, z):
    """Of ∂f/∂z at z, one for each sample."""
    slope = 1 - np.asarray(z) ** 2
    return np.abs(np.linalg.eigvals(slope[:, :, None] * np.asarray(matrix))).max(1)


@functools.cache
def problem(radius):
    """Matrix, input, equilibrium, cotangent, and the dense gradient in matrix and input."""
    rng = np.random.default_rng(0)
    z, y = rng.uniform(-0.5, 0.5, (2, 6)), rng.normal(size=(2, 6))
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    matrix = basis @ np.diag(np.linspace(-1, 0.35, 6)) @ basis.T
    matrix *= radius / spectral_radii(matrix, z).max()
    x = np.arctanh(z) - z @ matrix.T
    matrix, x, z, y = map(jnp.asarray, (matrix, x, z, y))
    expected = implicit_gradient(
        lambda inputs, z: tanh_cell(inputs[0], z, inputs[1]), (matrix, x), z, y
    )
    return matrix, x, z, y, expected


@pytest.mark.slow
def test_the_problem_is_what_it_is_meant_to_be():
    for radius in (0.8, 1.5):
        matrix, x, z, _, _ = problem(radius)
        np.testing.assert_allclose(tanh_cell(matrix, z, x), z, rtol=0, atol=1e-14)
        np.testing.assert_allclose(spectral_radii(matrix, z).max(), radius, rtol=1e-12)
        assert spectral_radii(matrix, z).min() > 0.8 * radius
    picard = solve_fixed_point(tanh_cell, matrix, x, solver=PICARD).stats
    assert (picard.status != Status.CONVERGED).all()


# Every backward solver after Anderson; after the others their own and a Krylov method.
@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        *((FORWARD[1], backward) for backward in BACKWARD),
        *((forward, forward) for forward in FORWARD if forward != FORWARD[1]),
        (FORWARD[0], BACKWARD[4]),
        (FORWARD[2], BACKWARD[5]),
        (FORWARD[3], BACKWARD[4]),
    ],
    ids=name,
)
@pytest.mark.slow
def test_the_gradient_is_the_dense_one(forward, backward):
    matrix, x, z_star, y, expected = problem(0.8 if PICARD in (forward, backward) else 1.5)

    def loss(matrix, x, probe):
        z, stats = deq_fixed_point(
            tanh_cell,
            matrix,
            x,
            solver=forward,
            gradient=Implicit(backward),
            backward_probe=probe,
            return_stats=True,
        )
        return (z * y).sum(), (z, stats)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (*gradient, report), (z, stats) = gradient(matrix, x, BackwardProbe.zeros(2))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    assert (stats.residual <= TOL).all()
    assert (report.residual <= TOL).all()
    assert relative_error(z, z_star) < 1e-8
    for got, want in zip(gradient, expected, strict=True):
        assert relative_error(got, want) < 1e-8


@pytest.mark.parametrize(
    ("forward", "backward"),
    [*zip(FORWARD, FORWARD, strict=True), *zip(FORWARD[2:], BACKWARD[4:], strict=True)],
    ids=name,
)
@pytest.mark.slow
def test_the_gradient_of_a_state_in_leaves_is_the_dense_one(forward, backward):
    """Without a probe this time, which is another rule of differentiation."""
    matrix, x, z_star, y, expected = problem(0.8 if PICARD in (forward, backward) else 1.5)

    def loss(matrix, x):
        z = deq_fixed_point(
            split_cell, matrix, split(x), solver=forward, gradient=Implicit(backward)
        )
        return (join(z) * y).sum(), join(z)

    gradient, z = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(matrix, x)
    assert relative_error(z, z_star) < 1e-8
    for got, want in zip(gradient, expected, strict=True):
        assert relative_error(got, want) < 1e-8


@pytest.mark.parametrize("solver", FORWARD, ids=name)
def test_what_is_returned_meets_the_absolute_tolerance(solver):
    """f(z*) = 0, so that the relative residual grows while the absolute one falls."""

    def f(params, z, x):
        return 0.2 * z**2 - 0.5 * z

    atol = 1e-4
    settings = {"tol": 0.0, "atol": atol, "max_iter": 60, "trace": True}
    solver = type(solver)(**settings)
    z, stats = solve_fixed_point(f, None, None, jnp.ones((2, 3)), solver=solver)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    distance = np.linalg.norm(f(None, z, None) - z, axis=1)
    assert (distance <= atol).all()
    relative = distance / np.linalg.norm(f(None, z, None), axis=1)
    np.testing.assert_allclose(stats.residual, relative, rtol=1e-3)
    assert np.nanmin(stats.trace) < 0.99 * stats.residual.min()
