"""SQUAREM and Wegstein against their formulas in NumPy, dense solves and Picard's evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    SQUAREM,
    Implicit,
    Picard,
    Status,
    Unrolled,
    Wegstein,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.usefixtures("x64")


def symmetric(eigenvalues):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues),) * 2))[0]
    return jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)


def linear(matrix, z, x):
    return z @ matrix.T + x


def own_entry(rate, z, x):
    """Each entry depends mostly on itself, with slopes from 0.9 downwards to -0.8."""
    return rate * jnp.sin(z) + 0.02 * z.sum(1, keepdims=True) + x


@functools.cache
def problem(name):
    rng = np.random.default_rng(1)
    if name == "slow":
        return linear, symmetric(np.linspace(0.1, 0.99, 20)), jnp.asarray(rng.normal(size=(3, 20)))
    rate = jnp.linspace(-0.8, 0.9, 8)
    return own_entry, rate, 0.3 * jnp.asarray(rng.normal(size=(3, 8)))


@pytest.mark.parametrize(
    ("solver", "name", "faster"),
    [(SQUAREM(tol=1e-8, max_iter=900), "slow", 5), (Wegstein(tol=1e-8, max_iter=900), "own", 2)],
    ids=["SQUAREM", "Wegstein"],
)
def test_right_and_faster_than_picard(solver, name, faster):
    f, params, x = problem(name)
    z, ours = solve_fixed_point(f, params, x, solver=solver)
    picard = solve_fixed_point(f, params, x, solver=Picard(tol=1e-8, max_iter=3000)).stats
    np.testing.assert_array_equal(ours.status, Status.CONVERGED)
    np.testing.assert_array_equal(picard.status, Status.CONVERGED)
    assert faster * ours.evaluations < picard.evaluations
    expected = newton_equilibrium(lambda z: f(params, z, x), z)
    if name == "slow":
        expected = np.linalg.solve(np.eye(20) - np.asarray(params), np.asarray(x).T).T
    assert relative_error(z, expected) < 1e-6


@pytest.mark.parametrize("solver", [SQUAREM(tol=1e-10), Wegstein(tol=1e-10)], ids=str)
@pytest.mark.parametrize("policy", [Implicit(GMRES(tol=1e-12)), Unrolled()], ids=str)
@pytest.mark.slow
def test_gradients(solver, policy):
    f, params, x = problem("own")
    y = jnp.asarray(np.random.default_rng(2).normal(size=x.shape))

    def loss(params, x):
        z = deq_fixed_point(f, params, x, solver=solver, gradient=policy)
        return jnp.vdot(y, z), z

    got, z = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    dense = implicit_gradient(lambda p, z: f(p[0], z, p[1]), (params, x), z, y)
    assert relative_error(got, dense) < (1e-8 if isinstance(policy, Implicit) else 1e-3)


def evaluated(solver, f, z, steps):
    """The points at which a solver evaluates f, `[steps, B, D]`, and its last state."""
    step = jax.jit(lambda z, state: solver.step(z, f(z), state))
    state, points = solver.init(z, z), []
    for _ in range(steps):
        points.append(np.asarray(z))
        z, state = step(z, state)
    return np.stack(points), state


def squarem(f, z, steps):
    """One sample, with the bound on a that grows when it is met, and steps that are taken back."""
    points, bound, limit, taken_back = [], 4.0, np.inf, 0
    norm = np.linalg.norm
    while len(points) < steps:
        points.append(z)
        r = f(z) - z
        if norm(r) > 10 * limit:
            z, bound, limit = plain, max(bound / 4, 1), np.inf  # noqa: F821
            taken_back += 1
            continue
        middle = f(z)
        points.append(middle)
        plain = f(middle)
        limit = norm(plain - middle)
        v = plain - middle - r
        a = np.clip(norm(r) / norm(v), 1, bound)
        bound *= 4 if a == bound else 1
        z = z + 2 * a * r + a**2 * v
    return points[:steps], taken_back


@pytest.mark.parametrize("kind", ["slow", "wild"])
def test_squarem_is_its_formula(kind):
    if kind == "slow":
        matrix, x = np.asarray(symmetric(np.linspace(0.1, 0.95, 6))), np.ones((2, 6))
        f = lambda z, x: z @ matrix.T + x  # noqa: E731
    else:  # it overshoots the solution x, and behind it the residual is large
        x = np.array([[-30.0], [-200.0]])
        f = lambda z, x: z + jnp.where(z > x, -0.5, 20.0) * jnp.sqrt(jnp.abs(z - x))  # noqa: E731
    points, state = evaluated(SQUAREM(), lambda z: f(z, x), jnp.zeros(x.shape), 18)
    for i in (0, 1):
        expected, taken_back = squarem(
            lambda z, i=i: np.asarray(f(z, x[i])), np.zeros(x.shape[1]), 18
        )
        np.testing.assert_allclose(points[:, i], expected, rtol=1e-9, atol=1e-9)
        assert (taken_back > 0) == (kind == "wild")
    assert (state.bound > 4).all() or kind == "wild"


def wegstein(f, z, steps, lower, upper):
    points, before = [], None
    for _ in range(steps):
        points.append(z)
        image, q = f(z), np.zeros_like(z)
        size = np.linalg.norm(image - z)
        if before is not None and size <= 10 * before[2]:
            slope = (image - before[1]) / (z - before[0])
            q = np.clip(slope / (slope - 1), lower, upper)
        before, z = (z, image, size), q * z + (1 - q) * image
    return points


@pytest.mark.parametrize(("lower", "upper"), [(-5.0, 0.5), (-1.0, 0.0)])
def test_wegstein_is_its_formula(lower, upper):
    _, rate, x = problem("own")
    solver = Wegstein(lower, upper)
    points, _ = evaluated(solver, lambda z: own_entry(rate, z, x), jnp.zeros(x.shape), 7)
    for i in range(3):
        f = lambda z, i=i: np.asarray(own_entry(rate, z[None], x[i : i + 1])[0])  # noqa: E731
        expected = wegstein(f, np.zeros(8), 7, lower, upper)
        np.testing.assert_allclose(points[:, i], expected, rtol=1e-8, atol=1e-10)


def test_one_equation_in_one_number_is_the_secant_method():
    z, stats = solve_fixed_point(
        lambda _, z, x: jnp.cos(z) * x, None, jnp.asarray([[1.0]]), solver=Wegstein(tol=1e-13)
    )
    np.testing.assert_allclose(z, 0.7390851332151607, rtol=1e-12)
    assert stats.evaluations < 9


@pytest.mark.slow
def test_half_precision_complex_states_and_zeros():
    x = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.full((2, 2), 1 + 1j, jnp.complex64)}
    x["c"] = jnp.zeros((2, 1), jnp.float32)  # an entry that never moves
    for solver in (SQUAREM(tol=2e-2), Wegstein(tol=2e-2)):
        z, stats = solve_fixed_point(
            lambda p, z, x: jax.tree.map(lambda z, x: z / 2 + x, z, x), None, x, solver=solver
        )
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        for name, leaf in z.items():
            assert leaf.dtype == x[name].dtype
            np.testing.assert_allclose(
                np.asarray(leaf, complex), 2 * np.asarray(x[name], complex), rtol=5e-2
            )


@pytest.mark.parametrize(
    ("options", "named"),
    [({"lower": 0.5}, "lower"), ({"upper": 1}, "upper"), ({"upper": -1.0}, "upper")],
)
def test_bad_options_name_the_field(options, named):
    with pytest.raises(ValueError, match=f"Wegstein.{named}"):
        Wegstein(**options)
