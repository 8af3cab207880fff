"""NewtonKrylov inside bounds and valid states, with other linear methods, and where I - J fails."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import GMRES, Implicit, NewtonKrylov, Status, deq_fixed_point, solve_fixed_point
from deq_jax.linear import MINRES, Auto, Dense

x64 = pytest.mark.usefixtures("x64")


def logarithm(params, z, x):
    """`z log z = x` as a fixed point; NaN below zero, where Newton's full step from far leads."""
    return z - z * jnp.log(z) + x


ROOTS = np.array([0.6, 1.5, 3.0])
X = (ROOTS * np.log(ROOTS))[:, None]
FAR = np.array([[0.36], [0.38], [40.0]])  # near 1 / e, where the slope of z log z vanishes


@x64
@pytest.mark.slow
def test_a_predicate_keeps_trials_where_f_has_a_value():
    x, start = jnp.asarray(X), jnp.asarray(FAR)
    plain = solve_fixed_point(logarithm, None, x, start, solver=NewtonKrylov(Dense())).stats
    seen = []

    def watched(params, z, x):
        jax.debug.callback(lambda z: seen.append(z.min()), z)
        return logarithm(params, z, x)

    floor = jnp.full(1, 1e-2)  # an array in the closure
    solver = NewtonKrylov(Dense(), tol=1e-12, max_iter=40, valid=lambda z: (z > floor).all(1))
    z, stats = jax.jit(lambda x: solve_fixed_point(watched, None, x, start, solver=solver))(x)
    jax.effects_barrier()
    assert (plain.status == Status.DIVERGED).any()
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(np.asarray(z * jnp.log(z)), X, rtol=1e-10)
    assert min(seen) > 1e-2


@x64
@pytest.mark.slow
def test_bounds_of_each_sample_choose_the_root():
    """Cubics `(z - a)(z - b)(z - c) = 0`, three roots each, and a box around one of them."""
    roots = np.array([[-1.0, 0.5, 2.0], [-1.0, 0.5, 2.0], [-2.0, 1.0, 3.0]])
    chosen = np.array([[-1.0], [0.5], [3.0]])

    def cubic(roots, z, x):
        return z - jnp.prod(z - roots, axis=1, keepdims=True) / 8

    seen = []

    def watched(roots, z, x):
        jax.debug.callback(lambda z: seen.append(z), z)
        return cubic(roots, z, x)

    lower, upper = chosen - 0.6, chosen + 0.6
    # The first start is near a critical point: Newton's full step leaves its box.
    start = jnp.asarray([[-0.42], [0.0], [2.5]])

    def solve(roots, lower, upper):
        solver = NewtonKrylov(Dense(), tol=1e-12, max_iter=40, lower=lower, upper=upper)
        return deq_fixed_point(watched, roots, None, start, solver=solver, return_stats=True)

    given = tuple(map(jnp.asarray, (roots, lower, upper)))
    z, stats = jax.jit(solve)(*given)
    jax.effects_barrier()
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(z, chosen, rtol=0, atol=1e-10)
    assert all((point >= lower).all() and (point <= upper).all() for point in seen)
    # The default policy solves the adjoint by the same solver, whose bounds are not those of u.
    gradient = jax.jit(jax.grad(lambda *given: 50 * solve(*given)[0].sum(), argnums=(0, 1)))(*given)
    expected = np.where(np.isclose(roots, chosen), 50.0, 0.0)
    np.testing.assert_allclose(gradient[0], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)


@x64
def test_a_start_outside_of_the_bounds_is_moved_inside():
    """And a number bounds all leaves of a state."""

    def f(params, z, x):
        return {"a": jnp.cos(z["a"]), "b": z["b"] / 2 + x}

    start = {"a": jnp.full((2, 1), 9.0), "b": jnp.full((2, 3), -7.0)}
    solver = NewtonKrylov(Auto(), tol=1e-10, lower=0.0, upper=1.0)
    z, stats = solve_fixed_point(f, None, jnp.asarray(0.25), start, solver=solver)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(z["a"], 0.7390851332151607, rtol=1e-9)
    np.testing.assert_allclose(z["b"], 0.5, rtol=1e-9)


@x64
def test_a_least_squares_step_where_the_krylov_method_finds_none():
    """I - J is a cyclic shift: GMRES stagnates for D - 1 products, least squares takes one step."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 8)))

    def f(params, z, x):
        return z - jnp.roll(jnp.sinh(z - x), 1, axis=1)

    start = x + 0.3
    solver = NewtonKrylov(GMRES(restart=4), tol=1e-10)
    z, stats = solve_fixed_point(f, None, x, start, solver=solver)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-9)
    assert stats.evaluations <= 8


@x64
@pytest.mark.slow
def test_dense_and_symmetric_methods_take_newtons_steps():
    weights = np.random.default_rng(1).normal(size=(6, 6)) * 0.2
    weights = jnp.asarray(weights + weights.T)
    x = jnp.asarray(np.random.default_rng(2).normal(size=(3, 6)))

    def f(weights, z, x):  # the gradient of a function of z: J is symmetric
        return jnp.tanh(z @ weights) @ weights + x

    def energy_gradient(z):
        return np.tanh(z @ np.asarray(weights)) @ np.asarray(weights) + np.asarray(x) - z

    trace = {}
    for krylov in (Dense(), MINRES()):
        solver = NewtonKrylov(krylov, forcing=1e-9, tol=1e-11, trace=True, max_iter=30)
        z, stats = solve_fixed_point(f, weights, x, solver=solver)
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        np.testing.assert_allclose(energy_gradient(np.asarray(z)), 0, atol=1e-9)
        trace[type(krylov)] = np.asarray(stats.trace)[:3]
        if isinstance(krylov, Dense):  # D products for each Jacobian; none in the last evaluation
            assert stats.products % 6 == 0
            assert stats.products <= 6 * (stats.evaluations - 1)
    np.testing.assert_allclose(trace[Dense], trace[MINRES], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lower": "0"}, "NewtonKrylov.lower must be a real number"),
        ({"upper": 1j}, "NewtonKrylov.upper must be a real number"),
        ({"lower": 1.0, "upper": 0.0}, "NewtonKrylov.lower must not be above upper"),
        ({"valid": 3}, "NewtonKrylov.valid must be a function of the state"),
        ({"lower": jnp.zeros((3, 7))}, "NewtonKrylov.lower must broadcast to the state"),
        ({"upper": [0.0, 1.0]}, "NewtonKrylov.upper must be a number or have the 1 leaves"),
        ({"valid": lambda z: z > 0}, "NewtonKrylov.valid must return a boolean for each sample"),
    ],
)
def test_bad_constraints_are_named(options, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        solve_fixed_point(
            lambda p, z, x: 0.5 * z + x, None, jnp.ones((3, 2)), solver=NewtonKrylov(**options)
        )
    assert error in str(raised.value)


@x64
@pytest.mark.slow
def test_the_unrolled_derivative_stays_inside_the_bounds_too():
    from deq_jax import Unrolled

    def loss(a, policy):
        solver = NewtonKrylov(Dense(), tol=1e-10, max_iter=12, lower=0.0, upper=2.0)
        x = jnp.ones((2, 1))
        return deq_fixed_point(
            lambda a, z, x: a * jnp.sin(z) + x, a, x, solver=solver, gradient=policy
        ).sum()

    exact = jax.grad(loss)(0.7, Implicit(Dense()))
    np.testing.assert_allclose(jax.grad(loss)(0.7, Unrolled()), exact, rtol=1e-6)
