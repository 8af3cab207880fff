"""CG, MINRES, LSMR, Dense, Auto and GroupInverse against dense solves, with counted products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import LinearSolver, Status
from deq_jax.linear import CG, GMRES, LSMR, MINRES, Auto, BiCGStab, Dense, GroupInverse
from deq_jax.linear.dense import DENSE_UP_TO

x64 = pytest.mark.usefixtures("x64")
BATCH, N = 3, 8


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


Y = normal(BATCH, N, seed=1)
BASES = np.stack([np.linalg.qr(a)[0] for a in normal(BATCH, N, N)])


def symmetric(eigenvalues):
    """A, such that I - A is symmetric with these eigenvalues, in another basis for each sample."""
    return np.eye(N) - np.einsum("bij,j,bkj->bik", BASES, np.asarray(eigenvalues, float), BASES)


DEFINITE = symmetric(np.geomspace(0.1, 10, N))
INDEFINITE = symmetric([-3, -1, -0.4, 0.2, 0.5, 1, 2, 4])
GENERAL = normal(BATCH, N, N, seed=2) * 0.4 / np.sqrt(N) * np.arange(1, BATCH + 1)[:, None, None]
COMPLEX_Y = Y + 1j * normal(BATCH, N, seed=3)
HERMITIAN = 0.5 * (DEFINITE + 0.3j * (GENERAL - GENERAL.transpose(0, 2, 1)))


@functools.partial(jax.jit, static_argnums=0)
def _solve(solver, matrices, y):
    return solver.solve_linear(lambda u: jnp.einsum("bij,bj->bi", matrices, u), y)


def solve(solver, matrices, y=Y):
    u, stats = jax.device_get(_solve(solver, jnp.asarray(matrices), jnp.asarray(y)))
    assert stats.evaluations == stats.iterations.max()
    error = np.einsum("bij,bj->bi", matrices, u) + y - u
    residual = np.linalg.norm(error, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-5, atol=1e-13)
    assert ((stats.status == Status.CONVERGED) == (stats.residual <= solver.tol)).all()
    return u, stats


def dense(matrices, y=Y):
    pairs = zip(matrices, y, strict=True)
    return np.stack([np.linalg.solve(np.eye(len(b)) - a, b) for a, b in pairs])


@pytest.mark.parametrize(
    ("solver", "matrices", "y", "products"),
    [
        (CG(1e-9), DEFINITE, Y, N + 3),
        (CG(1e-9), HERMITIAN, COMPLEX_Y, 2 * N + 3),
        (MINRES(1e-9), DEFINITE, Y, N + 3),
        (MINRES(1e-9), INDEFINITE, Y, N + 3),
        (MINRES(1e-9), HERMITIAN, COMPLEX_Y, 2 * N + 3),
        (LSMR(1e-9), GENERAL, Y, 2 * N + 6),
        (LSMR(1e-9), (1 + 0.5j) * GENERAL, COMPLEX_Y, 4 * N + 6),
        (Dense(1e-9), GENERAL, Y, N + 1),
        (Dense(1e-9), (1 + 0.5j) * GENERAL, COMPLEX_Y, 2 * N + 1),
        (Dense(1e-9), GENERAL[:, :3, :3], Y[:, :3], 4),
        (Dense(1e-9), (1 + 0.5j) * GENERAL[:, :2, :2], COMPLEX_Y[:, :2], 5),
        (Dense(1e-9), INDEFINITE[:, :1, :1], Y[:, :1], 2),
        (GroupInverse(GMRES(tol=1e-9)), GENERAL, Y, 2 * N + 5),
    ],
)
@x64
def test_the_solution_is_the_dense_one(solver, matrices, y, products):
    assert isinstance(solver, LinearSolver)
    u, stats = solve(solver, matrices, y)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, dense(matrices, y), rtol=0, atol=1e-7)
    assert stats.evaluations <= products
    if isinstance(solver, Dense):
        np.testing.assert_array_equal(stats.evaluations, products)


@x64
def test_minres_has_the_smallest_residual_of_gmres_and_cg_the_smallest_error():
    """Over {y, (I - A) y, ...}: MINRES in the norm of the residual, CG in that of I - A."""
    k = 4
    mild = symmetric(np.geomspace(0.4, 2.5, N))  # CG's residual is below that of u = 0 at once
    for matrices, method in ((INDEFINITE, MINRES), (mild, CG)):
        u, stats = solve(method(1e-9, max_iter=k + 1), matrices)
        np.testing.assert_array_equal(stats.status, Status.MAX_ITER)
        for b in range(BATCH):
            system = np.eye(N) - matrices[b]
            powers = [np.linalg.matrix_power(system, j) @ Y[b] for j in range(k)]
            basis = np.linalg.qr(np.stack(powers, axis=1))[0]
            if method is MINRES:
                c = np.linalg.lstsq(system @ basis, Y[b], rcond=None)[0]
            else:
                c = np.linalg.solve(basis.T @ system @ basis, basis.T @ Y[b])
            np.testing.assert_allclose(u[b], basis @ c, rtol=1e-8, atol=1e-10)


@x64
def test_preconditioned_symmetric_methods():
    """A badly scaled diagonal behind a well-conditioned system."""
    scale = np.geomspace(1e-3, 1e3, N)
    system = np.eye(N) - 0.3 * symmetric(np.linspace(-1, 1, N))
    for signs, method in ((np.ones(N), CG), (np.resize([1, -1], N), MINRES)):
        middle = np.diag(signs) + 0.1 * (system - np.eye(N))
        matrices = np.eye(N) - np.sqrt(np.outer(scale, scale)) * middle

        def jacobi(z, v):
            return v / scale

        plain = solve(method(1e-9), matrices)[1]
        u, stats = solve(method(1e-9, preconditioner=jacobi), matrices)
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        np.testing.assert_allclose(u, dense(matrices), rtol=1e-5)
        assert 3 * stats.evaluations < 2 * plain.evaluations


@x64
def test_singular_systems():
    """The shortest least-squares solution, never called CONVERGED; and consistent systems are."""
    matrices = symmetric([0, 0.5, 0.8, 1, -1, 1.5, 2, 3])
    inverses = np.stack([np.linalg.pinv(np.eye(N) - a) for a in matrices])
    expected = np.einsum("bij,bj->bi", inverses, Y)
    left = np.einsum("bij,bj->bi", np.eye(N) - matrices, expected)
    for solver in (LSMR(1e-9), MINRES(1e-9), Dense(), GroupInverse(GMRES(tol=1e-9))):
        u, stats = _solve(solver, jnp.asarray(matrices), jnp.asarray(Y))
        if isinstance(solver, GroupInverse):  # symmetric: the same as the pseudo-inverse
            np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        else:
            np.testing.assert_array_equal(stats.status, Status.MAX_ITER)
        if isinstance(solver, LSMR | GroupInverse):
            np.testing.assert_allclose(u, expected, rtol=0, atol=1e-7)
            assert stats.evaluations < 40
        if isinstance(solver, LSMR | MINRES):
            smallest = np.linalg.norm(Y - left, axis=1) / np.linalg.norm(Y, axis=1)
            np.testing.assert_allclose(stats.residual, smallest, rtol=1e-6)
    u, stats = solve(LSMR(1e-9), matrices, left)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, expected, rtol=0, atol=1e-7)


@x64
def test_damped_least_squares():
    u, stats = _solve(LSMR(1e-9, damping=0.3), jnp.asarray(GENERAL), jnp.asarray(Y))
    for b in range(BATCH):
        stacked = np.vstack([np.eye(N) - GENERAL[b], 0.3 * np.eye(N)])
        expected = np.linalg.lstsq(stacked, np.append(Y[b], np.zeros(N)), rcond=None)[0]
        np.testing.assert_allclose(u[b], expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)


@x64
@pytest.mark.slow
def test_the_group_inverse_of_a_system_that_is_not_symmetric():
    """By its definition: u in the range with `(I - A) u` the part of y in the range."""
    rng = np.random.default_rng(4)
    basis = np.eye(N) + 0.3 * rng.normal(size=(BATCH, N, N))
    eigenvalues = np.array([0, 0, 0.5, 1, -1, 1.5, 2, 3])
    inverse = np.linalg.inv(basis)
    matrices = np.eye(N) - basis @ np.diag(eigenvalues) @ inverse
    inverted = np.where(eigenvalues == 0, 0, 1 / np.where(eigenvalues == 0, 1, eigenvalues))
    expected = np.einsum("bij,bj->bi", basis @ np.diag(inverted) @ inverse, Y)
    y = Y.copy()
    y[1] = basis[1, :, 0]  # in the null space: nothing to solve
    expected[1] = 0
    for solver in (GMRES(tol=1e-10), BiCGStab(tol=1e-10)):
        u, stats = _solve(GroupInverse(solver), jnp.asarray(matrices), jnp.asarray(y))
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        np.testing.assert_allclose(u, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", [CG(), MINRES(), LSMR(), Dense(), GroupInverse()])
def test_bad_samples_stay_alone_and_zero_costs_nothing(solver):
    """Also where nothing can be done: I - A = 0 leaves no NaN."""
    matrices, y = DEFINITE.astype(np.float32), Y.astype(np.float32)
    clean = _solve(solver, jnp.asarray(matrices), jnp.asarray(y))
    spoilt_y, spoilt = y.copy(), matrices.copy()
    spoilt_y[0, 3], spoilt[1, 2, 3] = np.nan, np.inf
    u, stats = _solve(solver, jnp.asarray(spoilt), jnp.asarray(spoilt_y))
    np.testing.assert_array_equal(stats.status, [Status.DIVERGED, Status.DIVERGED, 0])
    np.testing.assert_array_equal(u[2], clean.value[2])
    assert not np.isfinite(u[0]).all()  # no gradient of zero from a cotangent of NaN
    spoilt = np.stack([np.eye(N, dtype=np.float32), matrices[1], matrices[2]])
    spoilt_y = np.where(np.arange(BATCH)[:, None] == 1, np.float32(0), y)
    u, stats = _solve(solver, jnp.asarray(spoilt), jnp.asarray(spoilt_y))
    none = Status.CONVERGED if isinstance(solver, GroupInverse) else Status.MAX_ITER
    np.testing.assert_array_equal(stats.status, [none, 0, 0])
    assert np.isfinite(u).all()
    np.testing.assert_array_equal(u[1], 0)
    assert (int(stats.iterations[1]), float(stats.residual[1])) == (0, 0)
    np.testing.assert_allclose(u[2], clean.value[2], rtol=1e-6)


@x64
def test_a_matrix_that_needs_pivots():
    """Zeros on the diagonal, and entries of very different size."""
    systems = np.array(
        [[[0, 2, 1], [1, 0, 0], [3, 1e-12, 5]], [[1e-14, 1, 0], [1, 1, 1], [0, 1, 2]]]
    )
    u, stats = solve(Dense(1e-12), np.eye(3) - systems, Y[:2, :3])
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, dense(np.eye(3) - systems, Y[:2, :3]), rtol=1e-12)


def test_auto_goes_by_the_number_of_unknowns():
    small, large = jnp.zeros((2, DENSE_UP_TO)), jnp.zeros((2, DENSE_UP_TO + 1))
    assert Auto(tol=1e-3).choice(small) == Dense(1e-3)
    assert Auto(tol=1e-3).choice({"a": small, "b": small}) == GMRES(tol=1e-3)
    assert Auto(1e-3, 50).choice(large) == GMRES(tol=1e-3, max_iter=50)
    assert Auto(1e-3, 50, symmetric=True).choice(large) == MINRES(1e-3, 50)
    assert isinstance(Auto().choice(small.astype(jnp.complex64)), GMRES)  # counts twice


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: CG(max_iter=1), "CG.max_iter must be at least 2"),
        (lambda: MINRES(tol=-1.0), "MINRES.tol must be finite, >= 0.0"),
        (lambda: LSMR(max_iter=3), "LSMR.max_iter must be at least 4"),
        (lambda: LSMR(damping=-1.0), "LSMR.damping must be finite, >= 0.0"),
        (lambda: Dense(tol="no"), "Dense.tol must be a number"),
        (lambda: Auto(symmetric=1), "Auto.symmetric must be a bool"),
        (lambda: GroupInverse(LSMR()), "GroupInverse.solver must be GMRES, BiCGStab, CG or MINRES"),
        (lambda: GroupInverse(CG(preconditioner=max)), "must have no preconditioner"),
    ],
)
def test_bad_options_are_named(make, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        make()
    assert error in str(raised.value)
