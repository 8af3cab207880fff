"""GMRES and BiCGStab against dense solves, sample by sample, with counted products."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import GMRES, BiCGStab, LinearSolver, Status, solve_adjoint

BOTH = pytest.mark.parametrize("method", [GMRES, BiCGStab])
x64 = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def multiply(matrices, u):
    return jnp.einsum("bij,bj->bi", matrices, u)


CALLS = []


@functools.partial(jax.jit, static_argnums=0)
def _solve(solver, matrices, y, start):
    def product(u):
        jax.debug.callback(lambda: CALLS.append(None))
        return multiply(matrices, u)

    return solver.solve_linear(product, y, start)


def solve(solver, matrices, y, start=None):
    """`u = A u + y` for each sample; checks that `evaluations` is the number of products."""
    CALLS.clear()
    solution = jax.device_get(_solve(solver, jnp.asarray(matrices), jnp.asarray(y), start))
    jax.effects_barrier()
    assert len(CALLS) == solution.stats.evaluations == solution.stats.iterations.max()
    assert solution.stats.evaluations <= solver.max_iter
    return solution


def dense(matrices, y):
    identity = np.eye(matrices.shape[-1])
    return np.stack([np.linalg.solve(identity - a, b) for a, b in zip(matrices, y, strict=True)])


def true_residual(matrices, y, u):
    wide = np.complex128 if np.iscomplexobj(y) else np.float64
    matrices, y, u = (np.asarray(a, wide) for a in (matrices, y, u))
    error = np.einsum("bij,bj->bi", matrices, u) + y - u
    return np.linalg.norm(error, axis=1) / np.linalg.norm(y, axis=1)


def nonsymmetric(batch=3, n=12, seed=0):
    """Matrices of spectral radius about 0.4, 0.8, 1.2, ...: not one alike."""
    radii = 0.4 * np.arange(1, batch + 1)
    return normal(batch, n, n, seed=seed) * radii[:, None, None] / np.sqrt(n)


def with_spectrum(eigenvalues, n=12, seed=0):
    """A non-symmetric matrix with these eigenvalues, each as often as needed."""
    basis = np.eye(n) + normal(n, n, seed=seed, scale=0.3 / np.sqrt(n))
    return basis @ np.diag(np.resize(eigenvalues, n)) @ np.linalg.inv(basis)


def test_they_are_linear_solvers():
    assert isinstance(GMRES(), LinearSolver)
    assert isinstance(BiCGStab(), LinearSolver)
    assert hash(GMRES()) == hash(GMRES(20, 1e-4, 100))


@BOTH
@pytest.mark.parametrize("tol", [1e-3, 1e-8])
@x64
def test_the_solution_is_the_dense_one_and_the_residual_the_true_one(method, tol):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    assert (np.abs(np.linalg.eigvals(matrices)).max(1) > 1).any()
    expected = dense(matrices, y)
    # ‖error‖ <= ‖(I - A)⁻¹‖ tol ‖y‖
    bound = [np.linalg.norm(np.linalg.inv(np.eye(12) - a), 2) for a in matrices]
    bound = np.array(bound) * np.linalg.norm(y, axis=1) * tol
    starts = (None,) if tol > 1e-8 else (None, normal(3, 12, seed=2))
    for start in starts:
        u, stats = solve(method(tol=tol), matrices, y, start)
        residual = true_residual(matrices, y, u)
        assert (residual <= tol).all()
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        np.testing.assert_allclose(stats.residual, residual, rtol=1e-6, atol=1e-14)
        assert (np.linalg.norm(u - expected, axis=1) <= bound + 1e-13).all()


@pytest.mark.museum(
    "jax.scipy.sparse.linalg (jax#15837, #6490, #4322): gmres takes the batch for one vector, and"
    " its report tells nothing but NaN"
)
@BOTH
@x64
def test_a_capped_solve_says_so(method):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    u, stats = solve(method(tol=1e-8, max_iter=5), matrices, y)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)
    np.testing.assert_array_equal(stats.iterations, 5)
    np.testing.assert_allclose(stats.residual, true_residual(matrices, y, u), rtol=1e-9)
    assert (stats.residual < 1).all()
    assert (stats.residual > 1e-8).all()


def smallest_residual(matrix, y, k):
    """Over {y, A y, ..., Aᵏ⁻¹ y}, by a dense least-squares problem."""
    powers = [np.linalg.matrix_power(matrix, j) @ y for j in range(k)]
    basis = np.linalg.qr(np.stack(powers, axis=1))[0]
    operator = (np.eye(len(y)) - matrix) @ basis
    c = np.linalg.lstsq(operator, y, rcond=None)[0]
    return np.linalg.norm(y - operator @ c) / np.linalg.norm(y)


@x64
def test_gmres_has_the_smallest_residual_over_its_space():
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    for k in (1, 4):
        # One product more measures the residual.
        stats = solve(GMRES(tol=1e-8, max_iter=k + 1), matrices, y).stats
        expected = [smallest_residual(*sample, k) for sample in zip(matrices, y, strict=True)]
        np.testing.assert_allclose(stats.residual, expected, rtol=1e-9)


@pytest.mark.museum(
    "jax.scipy.sparse.linalg: batched gmres cannot stop inside a restart: 23 products where 6 do"
)
@x64
def test_gmres_stops_at_the_first_product_that_meets_the_tolerance():
    """Each sample at its own, in the middle of a cycle."""
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    stats = solve(GMRES(tol=1e-3), matrices, y).stats
    for i in range(3):
        residuals = [smallest_residual(matrices[i], y[i], k) for k in range(1, 13)]
        needed = np.argmax(np.array(residuals) <= 1e-3) + 1
        assert stats.iterations[i] == needed + 1
    assert stats.iterations[0] < 10 < stats.iterations[2]


@pytest.mark.parametrize(
    ("solver", "products"), [(GMRES(tol=1e-8), (3, 7, 13)), (BiCGStab(tol=1e-8), (5, 13, 27))]
)
@x64
def test_a_cycle_ends_where_the_tolerance_is_met(solver, products):
    """k distinct eigenvalues take k steps, and one product to see it: no cycle is filled up."""
    spectra = [[0.5, -0.4], [0.7, 0.4, 0.2, -0.2, -0.4, -0.7], np.linspace(-0.7, 0.8, 12)]
    matrices = np.stack([with_spectrum(values, seed=i) for i, values in enumerate(spectra)])
    y = normal(3, 12, seed=1)
    u, stats = solve(solver, matrices, y)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert (stats.iterations <= np.array(products)).all()
    assert stats.iterations[0] == products[0]
    np.testing.assert_allclose(u, dense(matrices, y), rtol=0, atol=1e-6)


@pytest.mark.museum(
    "locuslab/deq#21: one residual for the whole batch: when it stopped depended on the batch size"
)
@pytest.mark.museum(
    "jax.scipy.sparse.linalg (jax#15837, #6490, #4322): gmres takes the batch for one vector, and"
    " its report tells nothing but NaN"
)
@BOTH
@x64
def test_a_sample_does_not_depend_on_its_batch_mates(method):
    """A mate that needs many more products, in cycles of its own."""
    easy = with_spectrum(np.linspace(-0.3, 0.4, 12))
    hard = with_spectrum(np.linspace(-3, 0.999, 12), seed=1)
    matrices, y = np.stack([easy, hard, 0.5 * easy]), normal(3, 12, seed=1)
    options = {"restart": 5} if method is GMRES else {}
    solver = method(tol=1e-8, max_iter=40, **options)
    u, stats = solve(solver, matrices, y)
    assert stats.iterations[1] >= stats.iterations[0] + 8
    for i in range(3):
        alone, alone_stats = solve(solver, matrices[i : i + 1], y[i : i + 1])
        np.testing.assert_allclose(u[i], alone[0], rtol=0, atol=1e-12 * np.abs(u[i]).max())
        assert stats.iterations[i] == alone_stats.iterations[0]
        assert stats.status[i] == alone_stats.status[0]
        # Of two numbers near rounding only the size is the same.
        np.testing.assert_allclose(
            stats.residual[i], alone_stats.residual[0], rtol=1e-3, atol=1e-13
        )


@BOTH
@x64
def test_a_zero_right_hand_side_takes_nothing(method):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    y[1] = 0
    for start in (None, np.ones_like(y)):  # a start does not matter then
        u, stats = solve(method(tol=1e-8), matrices, y, start)
        np.testing.assert_array_equal(u[1], 0)
        assert stats.iterations[1] == stats.residual[1] == 0
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        assert (stats.iterations[::2] > 3).all()
    u, stats = solve(method(tol=1e-8), matrices, 0 * y)
    np.testing.assert_array_equal(u, 0)
    assert stats.evaluations == 0
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)


@BOTH
@x64
def test_a_start_at_the_solution_is_returned_after_one_product(method):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    start = dense(matrices, y)
    u, stats = solve(method(tol=1e-8), matrices, y, start)
    np.testing.assert_array_equal(u, start)
    np.testing.assert_array_equal(stats.iterations, 1)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)


@BOTH
@x64
def test_spaces_that_end_at_once(method):
    y = normal(3, 12, seed=1)
    y[1] = 3 * np.eye(12)[4]  # an eigenvector
    matrices = np.stack([np.zeros((12, 12)), np.diag(np.linspace(-0.7, 0.9, 12)), 2 * np.eye(12)])
    u, stats = solve(method(tol=1e-8), matrices, y)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, dense(matrices, y), rtol=0, atol=1e-13)
    assert (stats.iterations <= 3).all()


@BOTH
@x64
def test_systems_without_a_solution_leave_no_nan(method):
    y = normal(3, 12, seed=1)
    singular = np.eye(12) - np.diag(np.arange(12.0))
    matrices = np.stack([np.eye(12), singular, 0.5 * np.eye(12)])  # I - A = 0 for the first
    u, stats = solve(method(tol=1e-8), matrices, y)
    np.testing.assert_array_equal(stats.status[::2], [Status.MAX_ITER, 0])
    # Where the second u has grown so that y is lost beside it, its residual may be below any tol.
    assert stats.status[1] == Status.MAX_ITER or np.abs(u[1]).max() > 1e14
    assert np.isfinite(u).all()
    np.testing.assert_allclose(stats.residual, true_residual(matrices, y, u), rtol=1e-6)
    assert stats.residual[0] == 1
    assert stats.residual[1] <= 1


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@x64
def test_a_bad_sample_stays_alone(method, bad):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)
    clean, clean_stats = solve(method(tol=1e-8), matrices, y)
    spoilt_y, spoilt_matrices = y.copy(), matrices.copy()
    spoilt_y[1, 3] = spoilt_matrices[1, 2, 3] = bad
    for given in ((matrices, spoilt_y), (spoilt_matrices, y)):
        u, stats = solve(method(tol=1e-8), *given)
        np.testing.assert_array_equal(u[::2], clean[::2])
        np.testing.assert_array_equal(stats.residual[::2], clean_stats.residual[::2])
        np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0])
        # No gradient of zero from a cotangent that is not finite.
        assert np.isfinite(u[1]).all() == np.isfinite(given[1][1]).all()


@x64
def test_restarts_converge_on_a_mild_problem_and_take_longer():
    matrices, y = with_spectrum(np.linspace(-0.6, 0.8, 12))[None], normal(1, 12, seed=1)
    u, stats = solve(GMRES(restart=5, tol=1e-8, max_iter=40), matrices, y)
    assert stats.status[0] == Status.CONVERGED
    assert 14 <= stats.evaluations < 40  # without restarts 13 at most
    np.testing.assert_allclose(u, dense(matrices, y), atol=1e-6)


@BOTH
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_complex_states(method):
    matrices = nonsymmetric() + 1j * nonsymmetric(seed=5)
    matrices *= 0.5
    y = normal(3, 12, seed=1) + 1j * normal(3, 12, seed=2)
    u, stats = solve(method(tol=1e-8), matrices, y)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, dense(matrices, y), atol=1e-7)
    np.testing.assert_allclose(stats.residual, true_residual(matrices, y, u), rtol=1e-5, atol=1e-14)
    assert stats.residual.dtype == jnp.float64


@BOTH
@x64
def test_a_tree_is_solved_as_the_array_of_its_leaves(method):
    matrices, y = nonsymmetric(), normal(3, 12, seed=1)

    def split(u):
        return {"a": u[:, :2], "b": (u[:, 2:8].reshape(-1, 2, 3), u[:, 8:])}

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1, 6), tree["b"][1]], axis=1)

    solver = method(tol=1e-8)
    array, array_stats = solve(solver, matrices, y)
    tree, tree_stats = jax.jit(
        lambda y: solver.solve_linear(lambda u: split(multiply(matrices, join(u))), y)
    )(split(jnp.asarray(y)))
    np.testing.assert_allclose(join(tree), array, rtol=1e-6)
    np.testing.assert_array_equal(tree_stats.iterations, array_stats.iterations)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_reports_the_residual_of_what_it_returns(method, dtype):
    """Rounding u to half precision is part of the residual, which keeps 1e-4 out of reach.

    The matrices hold a power of two in every row: A u is exact, and u alone is rounded.
    """
    rng = np.random.default_rng(0)
    powers = np.resize([0.5, -0.25, 0.5, -0.5, 0.125, -0.5], 12)
    matrices = np.stack([np.diag(powers)[:, rng.permutation(12)] for _ in range(3)])
    y = jnp.asarray(normal(3, 12, seed=1), dtype)
    u, stats = solve(method(tol=1e-4, max_iter=30), jnp.asarray(matrices, dtype), y)
    assert u.dtype == dtype
    assert stats.residual.dtype == jnp.float32
    residual = true_residual(matrices, y, u)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-4)
    assert (residual <= float(jnp.finfo(dtype).eps)).all()
    expected = np.where(residual <= 1e-4, Status.CONVERGED, Status.MAX_ITER)
    np.testing.assert_array_equal(stats.status, expected)


@pytest.mark.parametrize("solver", [GMRES(4, 1e-5), BiCGStab(1e-5)])
def test_float32(solver):
    matrices, y = nonsymmetric() * 0.7, normal(3, 12, seed=1)
    given = np.asarray(matrices, np.float32), np.asarray(y, np.float32)
    u, stats = solve(solver, *given)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(stats.residual, true_residual(*given, u), rtol=0, atol=5e-7)


@pytest.mark.museum(
    "locuslab/mdeq#8: the sign of the backward equation was unclear: Jᵀu + y = 0 or u = Jᵀu + y"
)
@BOTH
@x64
def test_the_adjoint_of_a_nonlinear_cell(method):
    """`u = Jᵀ u + y` at a point with another J for each sample; the products of f are counted."""
    matrix, z, y = normal(8, 8, scale=0.6), normal(3, 8, seed=1), normal(3, 8, seed=2)
    calls = []

    @jax.custom_vjp
    def watched(v):
        return v

    def backward(_, cotangent):
        jax.debug.callback(lambda: calls.append(None))
        return (cotangent,)

    watched.defvjp(lambda v: (v, None), backward)

    def f(matrix, z, x):
        return jnp.tanh(watched(z) @ matrix.T)

    solver = method(tol=1e-9)
    given = (jnp.asarray(a) for a in (matrix, z, y))
    u, stats = jax.jit(lambda m, z, y: solve_adjoint(f, m, None, z, y, solver=solver))(*given)
    jax.effects_barrier()
    assert len(calls) == stats.evaluations
    slope = 1 - np.tanh(z @ matrix.T) ** 2
    transposed = np.stack([(s[:, None] * matrix).T for s in slope])
    np.testing.assert_allclose(u, dense(transposed, y), atol=1e-7)
    residual = true_residual(transposed, y, u)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-5, atol=1e-14)
    assert (residual <= 1e-9).all()


@pytest.mark.parametrize(
    ("method", "change", "error"),
    [
        (GMRES, {"restart": 0}, "GMRES.restart must be at least 1, got 0"),
        (GMRES, {"restart": 2.5}, "GMRES.restart must be an integer, got 2.5"),
        (GMRES, {"tol": -1.0}, "GMRES.tol must be finite, >= 0.0"),
        (GMRES, {"max_iter": 1}, "GMRES.max_iter must be at least 2"),
        (GMRES, {"max_iter": 0}, "GMRES.max_iter must be at least 1, got 0"),
        (BiCGStab, {"tol": float("nan")}, "BiCGStab.tol must be finite"),
        (BiCGStab, {"max_iter": 2}, "BiCGStab.max_iter must be at least 3"),
        (BiCGStab, {"max_iter": "9"}, "BiCGStab.max_iter must be an integer, got '9'"),
    ],
)
def test_bad_options_are_named(method, change, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        method(**change)
    assert error in str(raised.value)


@BOTH
@pytest.mark.parametrize("wide", [False, True])
def test_complex_states_under_strict_promotion(method, wide):
    with jax.enable_x64(wide):
        y = jnp.asarray([[1.0 + 1j, 2.0]], jnp.complex128 if wide else jnp.complex64)
        u, _ = jax.jit(lambda y: method().solve_linear(lambda u: y.dtype.type(0.5j) * u, y))(y)
        np.testing.assert_allclose(u, y / (1 - 0.5j), rtol=1e-4)
