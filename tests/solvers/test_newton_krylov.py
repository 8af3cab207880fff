"""Newton-Krylov: few evaluations, counted products, backtracking against the scalar method."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import GMRES, BiCGStab, NewtonKrylov, Picard, Status, solve_fixed_point
from deq_jax.solvers.newton_krylov import NewtonState
from tests.reference import newton, newton_equilibrium, relative_error

x64 = pytest.mark.usefixtures("x64")
KRYLOV = pytest.mark.parametrize("krylov", [GMRES(), BiCGStab()], ids=["GMRES", "BiCGStab"])


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def tanh_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T + x)


def arctan_cell(params, z, x):
    """`f(z) - z = arctan(x - z)`: Newton's full step overshoots from more than 1.39 away."""
    return z + jnp.arctan(x - z)


class Counter:
    """A cell that counts its evaluations and the products with its derivative."""

    def __init__(self, cell):
        self.evaluations, self.products = [], []

        @jax.custom_jvp
        def watched(v):
            jax.debug.callback(lambda: self.evaluations.append(None))
            return v

        @watched.defjvp
        def push(primals, tangents):
            (tangent,) = tangents
            jax.debug.callback(lambda _: self.products.append(None), tangent)
            return watched(*primals), tangent

        self.cell = lambda params, z, x: cell(params, watched(z), x)

    def counts(self):
        jax.effects_barrier()
        return len(self.evaluations), len(self.products)


@KRYLOV
@x64
def test_few_evaluations_all_counted(krylov):
    matrix, x = normal(10, 10, scale=0.25), normal(3, 10, seed=1)
    counter = Counter(tanh_cell)
    solver = NewtonKrylov(krylov, tol=1e-12, trace=True)
    z, stats = solve_fixed_point(counter.cell, matrix, x, solver=solver)
    evaluations, products = counter.counts()
    assert evaluations == stats.evaluations == stats.iterations.max() <= 8
    assert products == stats.products
    assert 2 * evaluations <= products <= 10 * evaluations
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    expected = newton_equilibrium(lambda z: tanh_cell(matrix, z, x), 0 * x)
    assert relative_error(z, expected) < 1e-11
    # Superlinear: the factor of each step is a good deal smaller than that of the one before.
    for sample in np.asarray(stats.trace).T:
        sample = sample[sample > 1e-10]  # not where `tol` ends the inner solve
        factors = sample[1:] / sample[:-1]
        assert len(factors) >= 3
        assert (factors[1:] < 0.5 * factors[:-1]).all()
    picard = solve_fixed_point(tanh_cell, matrix, x, solver=Picard(tol=1e-12, max_iter=300)).stats
    assert picard.evaluations > 3 * stats.evaluations


@KRYLOV
@x64
def test_spectral_radius_above_one(krylov):
    basis = np.linalg.qr(normal(8, 8))[0]
    matrix = jnp.asarray(basis @ np.diag(np.linspace(-1.7, 0.6, 8)) @ basis.T)
    x = normal(2, 8, seed=1, scale=0.2)
    z, stats = solve_fixed_point(tanh_cell, matrix, x, solver=NewtonKrylov(krylov, tol=1e-12))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert stats.evaluations <= 9
    expected = newton_equilibrium(lambda z: tanh_cell(matrix, z, x), 0 * x)
    assert relative_error(z, expected) < 1e-11
    slope = 1 - np.asarray(z) ** 2
    jacobians = slope[:, :, None] * np.asarray(matrix)
    assert (np.abs(np.linalg.eigvals(jacobians)).max(1) > 1.3).all()


@x64
@pytest.mark.slow
def test_backtracking_takes_the_scalar_methods_steps():
    """In one dimension the inner solve is exact after one product, so every trial is known."""
    x = jnp.asarray([[2.0], [2.0], [-3.0], [1.0]])
    start = x + jnp.asarray([[0.5], [3.0], [-20.0], [30.0]])
    counter = Counter(arctan_cell)
    solver = NewtonKrylov(tol=1e-12, max_iter=30, trace=True)
    z, stats = solve_fixed_point(counter.cell, None, x, start, solver=solver)
    evaluations, products = counter.counts()
    # Even a sixteenth of Newton's step is too long from 30 away: it takes plain steps first.
    np.testing.assert_array_equal(stats.status, [0, 0, 0, Status.MAX_ITER])
    np.testing.assert_allclose(z[:3], x[:3], rtol=0, atol=1e-11)
    solves = []
    for i in range(4):
        target = float(x[i, 0])
        residuals, steps = newton(
            lambda z, target=target: z + np.arctan(target - z),
            lambda z, target=target: 1 - 1 / (1 + (target - z) ** 2),
            float(start[i, 0]),
            residual=1e-12,
            max_iter=30,
        )
        assert stats.iterations[i] == len(residuals)
        trace = stats.trace[: len(residuals), i]
        np.testing.assert_allclose(trace, residuals, rtol=1e-5, atol=1e-13)
        solves.append(steps)
        if i > 0:  # the full step went too far at least once
            assert steps < len(residuals) - 1
    assert evaluations == stats.evaluations == 30
    assert products == stats.products <= sum(solves)


@x64
@pytest.mark.slow
def test_the_inner_solve_meets_its_forcing_term():
    """‖(I - J) s - g‖ <= η ‖g‖ with the dense J; η is `forcing` first, then falls."""
    matrix, x, z = normal(10, 10, scale=0.3), normal(3, 10, seed=1), normal(3, 10, seed=2)
    dense = np.asarray(matrix)

    class Product:
        mesh_axes, differentiable = (), False

        def __call__(self, v):
            return v @ matrix.T

    fz = z @ matrix.T + x
    g = np.asarray(fz - z)
    size = np.linalg.norm(g, axis=1)
    products = []
    for forcing, before in ((0.5, np.inf), (0.1, np.inf), (0.5, 3 * size), (0.5, 100 * size)):
        solver = NewtonKrylov(forcing=forcing, tol=1e-14)
        state = solver.init(z, z)._replace(size=jnp.zeros(3) + before)
        step = jax.jit(
            lambda state, solver=solver: solver.step(
                z, fz, state, product=Product(), active=jnp.array([True, True, False])
            )
        )
        proposal, after = step(state)
        assert isinstance(after, NewtonState)
        s = np.asarray(proposal - z)
        error = np.linalg.norm(s - s @ dense.T - g, axis=1)[:2] / size[:2]
        shrunk = np.where(np.isfinite(before), size / before, 1)
        eta = np.minimum(forcing, 0.9 * shrunk**2)[:2]
        assert (error <= eta * (1 + 1e-9)).all()
        assert (error > eta / 100).any()  # nothing is solved in vain
        products.append(int(after.products))
    assert products[0] < products[1] < products[3]


@pytest.mark.parametrize("max_iter", [1, 3])
def test_the_last_evaluation_has_no_inner_solve(max_iter):
    counter = Counter(tanh_cell)
    matrix, x = normal(6, 6).astype(jnp.float32), normal(2, 6, seed=1).astype(jnp.float32)
    solver = NewtonKrylov(GMRES(restart=2), tol=0.0, max_iter=max_iter)
    stats = solve_fixed_point(counter.cell, matrix, x, solver=solver).stats
    assert counter.counts() == (stats.evaluations, stats.products)
    assert stats.evaluations == max_iter
    assert stats.products == 2 * (max_iter - 1)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)


@pytest.mark.museum(
    "torchdeq T10: a sample's result moved by up to 7e-4 when a hard sample joined its batch"
)
@KRYLOV
@x64
@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch_mates(krylov):
    """Mates that are halved, that need more products, or are done at once."""
    matrix = normal(6, 6, scale=0.5)

    def f(gains, z, x):
        return z + jnp.arctan(x - z + gains[:, None] * jnp.tanh(z @ matrix.T))

    x = normal(4, 6, seed=1)
    start = x + normal(4, 6, seed=2) * jnp.asarray([1e-3, 0.5, 2.0, 4.0])[:, None]
    gains = jnp.asarray([0.0, 0.3, 0.5, 0.2])
    solver = NewtonKrylov(krylov, tol=1e-10, max_iter=60, trace=True)
    z, stats = solve_fixed_point(f, gains, x, start, solver=solver)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert len(set(np.asarray(stats.iterations).tolist())) >= 3
    for i in (0, 1, 3):
        alone, alone_stats = solve_fixed_point(
            f, gains[i : i + 1], x[i : i + 1], start[i : i + 1], solver=solver
        )
        np.testing.assert_allclose(z[i], alone[0], rtol=0, atol=1e-12)
        assert stats.iterations[i] == alone_stats.iterations[0]
        np.testing.assert_allclose(
            stats.trace[:, i], alone_stats.trace[:, 0], rtol=1e-5, atol=1e-13
        )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_sample_stays_alone(bad):
    matrix, x = normal(6, 6, scale=0.3), normal(3, 6, seed=1)
    x = x.astype(jnp.float32)

    def f(matrix, z, x):
        return jnp.tanh(z @ matrix.T) + x

    solver = NewtonKrylov(tol=1e-5)
    clean, clean_stats = solve_fixed_point(f, matrix, x, 0 * x, solver=solver)
    spoilt, stats = solve_fixed_point(f, matrix, x.at[1, 2].set(bad), 0 * x, solver=solver)
    np.testing.assert_array_equal(spoilt[::2], clean[::2])
    np.testing.assert_array_equal(stats.residual[::2], clean_stats.residual[::2])
    np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0])
    np.testing.assert_array_equal(spoilt[1], jnp.zeros(6))


@KRYLOV
@x64
def test_a_singular_start_is_left_by_a_plain_step(krylov):
    """`f(z) = z + (x - z²) / 4` has J = 1 at the default start: there is no Newton step."""
    x = jnp.asarray([[1.0], [4.0]])
    z, stats = solve_fixed_point(
        lambda p, z, x: z + (x - z**2) / 4, None, x, solver=NewtonKrylov(krylov, tol=1e-12)
    )
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(z, jnp.sqrt(x), rtol=1e-11)
    assert stats.evaluations <= 10


@x64
@pytest.mark.slow
def test_a_state_in_three_leaves_takes_the_arrays_steps():
    matrix, x = normal(12, 12, scale=0.3), normal(3, 12, seed=1)

    def split(z):
        return {"a": z[:, :2], "b": (z[:, 2:8].reshape(-1, 2, 3), z[:, 8:])}

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1, 6), tree["b"][1]], axis=1)

    solver = NewtonKrylov(tol=1e-10)
    array, array_stats = solve_fixed_point(tanh_cell, matrix, x, solver=solver)
    tree, tree_stats = solve_fixed_point(
        lambda matrix, z, x: split(tanh_cell(matrix, join(z), x)),
        matrix,
        x,
        split(0 * x),
        solver=solver,
    )
    np.testing.assert_array_equal(array_stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(array_stats.iterations, tree_stats.iterations)
    assert array_stats.products == tree_stats.products
    np.testing.assert_allclose(join(tree), array, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.slow
def test_complex_states():
    matrix, x = (
        jax.lax.complex(normal(*shape, seed=1), 0.3 * normal(*shape, seed=2))
        for shape in ((6, 6), (2, 6))
    )
    matrix = matrix * 0.1
    z, stats = solve_fixed_point(
        lambda m, z, x: jnp.sin(z) @ m.T + x, matrix, x, solver=NewtonKrylov(tol=1e-11)
    )
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(np.sin(z) @ np.asarray(matrix).T + x, z, rtol=0, atol=1e-9)
    assert stats.evaluations <= 9


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"krylov": NewtonKrylov()}, "NewtonKrylov.krylov must be a method for linear systems"),
        ({"krylov": GMRES}, "NewtonKrylov.krylov must be a method for linear systems"),
        ({"krylov": None}, "or Auto(), got None"),
        ({"forcing": 0.0}, "NewtonKrylov.forcing must be finite, > 0.0 and <= 0.999, got 0.0"),
        ({"forcing": 1.0}, "NewtonKrylov.forcing must be finite"),
        ({"forcing": "no"}, "NewtonKrylov.forcing must be a number, got 'no'"),
        ({"tol": -1.0}, "NewtonKrylov.tol must be finite, >= 0.0"),
        ({"max_iter": 0}, "NewtonKrylov.max_iter must be at least 1, got 0"),
        ({"trace": 0}, "NewtonKrylov.trace must be a bool, got 0"),
    ],
)
def test_bad_options_are_named(change, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        NewtonKrylov(**change)
    assert error in str(raised.value)
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(NewtonKrylov(), **change)
