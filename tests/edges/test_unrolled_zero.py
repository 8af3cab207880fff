"""`Unrolled` where a solver's own small systems are singular: finite and right gradients.

Where the solution is exactly zero, residuals become zero, or so small that their squares do, and a
history longer than the state has dependent residuals. The references are plain unrolled loops.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Anderson,
    Broyden,
    NewtonKrylov,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from tests.reference import relative_error

pytestmark = pytest.mark.slow

SOLVERS = {
    "Picard": Picard(tol=1e-12, max_iter=150),
    "Anderson": Anderson(tol=1e-12, max_iter=60),
    "Anderson without a ridge": Anderson(ridge=0.0, tol=1e-12, max_iter=60),
    "Anderson with one pair": Anderson(history=1, tol=1e-12, max_iter=150),
    "Broyden": Broyden(tol=1e-12, max_iter=40),
    "Broyden with a line search": Broyden(line_search=True, tol=1e-12, max_iter=60),
    "NewtonKrylov": NewtonKrylov(tol=1e-12, max_iter=20),
}

MAIN = ("Picard", "Anderson", "Broyden", "NewtonKrylov")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def cell(w, z, x):
    return jnp.tanh(z @ w + x)


def complex_normal(*shape, seed=0, scale=1.0):
    return jax.lax.complex(
        normal(*shape, seed=seed, scale=scale), normal(*shape, seed=seed + 100, scale=scale)
    )


def loop(f, params, x, z0=None):
    z0 = jnp.zeros_like(x) if z0 is None else z0
    return jax.lax.scan(lambda z, _: (f(params, z, x), None), z0, length=300)[0]


def gradients(equilibrium, y, params, x):
    """Of `Re <y, z>` by params and x."""

    def loss(params, x):
        return jnp.vdot(y, equilibrium(params, x)).real

    return jax.jit(jax.grad(loss, (0, 1)))(params, x)


@functools.cache
def compiled_loop(f):
    """The same of the plain loop, compiled once for each f, shape and dtype."""

    def loss(params, x, z0, y):
        return jnp.vdot(y, loop(f, params, x, z0)).real

    return jax.jit(jax.grad(loss, (0, 1)))


def loop_gradients(f, y, params, x, z0=None):
    return compiled_loop(f)(params, x, jnp.zeros_like(x) if z0 is None else z0, y)


def by_solver(f, solver, **options):
    return functools.partial(deq_fixed_point, f, solver=solver, gradient=Unrolled(), **options)


def with_a_zero(dtype, position):
    w, y = normal(6, 6, seed=1, scale=0.2), normal(4, 6, seed=2)
    x = normal(4, 6, seed=3).at[position].set(0)
    return w.astype(dtype), x.astype(dtype), y.astype(dtype)


def check_gradients(solver, w, x, y, z0, tolerance):
    def by_unrolling(w, x):
        return deq_fixed_point(cell, w, x, z0, solver=solver, gradient=Unrolled())

    by_w, by_x = gradients(by_unrolling, y, w, x)
    expected_w, expected_x = loop_gradients(cell, y, w, x, z0)
    assert np.isfinite(by_w).all()
    assert np.isfinite(by_x).all()
    assert relative_error(by_w, expected_w) < tolerance
    # By x only where x is not zero: a start that is the solution was computed without x.
    others = np.flatnonzero(np.abs(x).max(1) > 0)
    assert relative_error(by_x[others], expected_x[others]) < tolerance


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solution_of_zero_from_another_start(name):
    """In float32 the squares of residuals on the way to zero are zero themselves."""
    solver = dataclasses.replace(SOLVERS[name], tol=1e-6)
    w, x, y = with_a_zero(jnp.float32, 1)
    z0 = y if name == "Broyden" else jnp.ones_like(x)
    check_gradients(solver, w, x, y, z0, 1e-3)


@pytest.mark.parametrize("solver", [Anderson(), Broyden()], ids=lambda s: type(s).__name__)
def test_a_solution_of_zero_with_the_solvers_as_they_come(solver):
    w, x, y = with_a_zero(jnp.float32, 1)
    check_gradients(solver, w, x, y, jnp.ones_like(x), 2e-2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "start"),
    [("Picard", "zeros"), ("Anderson", "zeros"), ("Broyden", "ones"), ("NewtonKrylov", "zeros")],
)
def test_a_solution_of_zero_in_float64(name, start):
    w, x, y = with_a_zero(jnp.float64, 2)
    z0 = jnp.zeros_like(x) if start == "zeros" else jnp.ones_like(x)
    # The relative residual of a solution at zero falls only when the state underflows.
    check_gradients(dataclasses.replace(SOLVERS[name], atol=1e-14), w, x, y, z0, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MAIN)
def test_a_sample_that_starts_at_its_solution_stops_at_once(name):
    w, x, _ = with_a_zero(jnp.float64, 2)
    value, stats = deq_fixed_point(
        cell, w, x, solver=SOLVERS[name], gradient=Unrolled(), return_stats=True
    )
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert stats.iterations[2] == 1
    assert relative_error(value, loop(cell, w, x)) < 1e-10


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MAIN)
def test_all_inputs_are_zero(name):
    w, x = normal(6, 6, seed=1, scale=0.2), jnp.zeros((4, 6))
    by_w, by_x = gradients(by_solver(cell, SOLVERS[name]), normal(4, 6, seed=2), w, x)
    np.testing.assert_array_equal(by_w, 0)
    assert np.isfinite(by_x).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "dimension"),
    [("Anderson", 1), ("Anderson", 2), ("Broyden", 2), ("NewtonKrylov", 1)],
)
def test_a_history_longer_than_the_dimension_of_the_state(name, dimension):
    """Of five residuals in a plane, at least three depend on the others."""
    w, y = normal(dimension, dimension, seed=1, scale=0.4), normal(3, dimension, seed=2)
    x = normal(3, dimension, seed=3)
    got = gradients(by_solver(cell, SOLVERS[name]), y, w, x)
    assert relative_error(got, loop_gradients(cell, y, w, x)) < 1e-4


def shift(w, z, x):
    return w * jnp.concatenate([jnp.zeros_like(z[:, :1]), z[:, :-1]], axis=1) + x


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MAIN)
def test_an_exact_solution_reached_on_the_way(name):
    """A map of finite memory: its residual becomes exactly zero."""
    w, y = jnp.asarray(0.5), normal(3, 4, seed=2)
    x = normal(3, 4, seed=3)
    got = gradients(by_solver(shift, SOLVERS[name]), y, w, x)
    assert relative_error(got, loop_gradients(shift, y, w, x)) < 1e-4


def linear(w, z, x):
    return z @ w + x


def curved(w, z, x):
    return z @ w + 0.1 * z * z + x


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "f"),
    [
        ("Anderson", curved),
        ("Anderson without a ridge", linear),
        ("Broyden", curved),
    ],
)
def test_a_complex_state_of_rank_two(name, f):
    w = complex_normal(2, 2, seed=1, scale=0.3)
    x = complex_normal(3, 2, seed=3, scale=0.5)
    y = complex_normal(3, 2, seed=5)
    got = gradients(by_solver(f, SOLVERS[name]), y, w, x)
    expected = loop_gradients(f, y, w, x)
    # Without a ridge a window of dependent residuals makes the derivative a few digits worse.
    tolerance = 1e-3 if name == "Anderson without a ridge" else 1e-4
    assert relative_error(*jax.tree.map(as_real, (got, expected))) < tolerance


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["Anderson", "Broyden"])
def test_a_map_of_rank_two_on_a_complex_state_of_four(name):
    w = complex_normal(4, 2, seed=1, scale=0.3)
    w = w @ complex_normal(2, 4, seed=7, scale=0.4)
    x = complex_normal(3, 4, seed=3, scale=0.5)
    y = complex_normal(3, 4, seed=5)
    got = gradients(by_solver(linear, SOLVERS[name]), y, w, x)
    expected = loop_gradients(linear, y, w, x)
    assert relative_error(*jax.tree.map(as_real, (got, expected))) < 1e-4


def as_real(a):
    return jnp.stack([a.real, a.imag])
