"""Traps of JAX itself (0.10.2) that a fixed-point layer can fall into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Anderson,
    BackwardProbe,
    NewtonKrylov,
    Picard,
    deq_fixed_point,
)
from tests.museum.problems import (
    normal,
    tanh_cell,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


def layer(w, x, **options):
    return deq_fixed_point(tanh_cell, w, x, **{"solver": TIGHT, **options})


def unrolled(w, x, steps=150):
    return jax.lax.scan(lambda z, _: (tanh_cell(w, z, x), None), 0 * x, length=steps)[0]


@pytest.mark.museum(
    "JAX, custom_vjp: a custom_vjp that closes over a tracer under differentiation: "
    "UnexpectedTracerError"
)
@pytest.mark.usefixtures("x64")
def test_a_closure_inside_a_scan():
    def total(solve, w, x):
        def advance(h, _):
            h = solve(lambda _, z, __: tanh_cell(w, z, x + 0.5 * h))
            return h, None

        return jnp.vdot(Y, jax.lax.scan(advance, 0 * x, length=3)[0])

    def ours(f):
        return deq_fixed_point(f, None, None, jnp.zeros((3, 4)), solver=TIGHT)

    def plain(f):
        return jax.lax.scan(lambda z, _: (f(0, z, 0), None), jnp.zeros((3, 4)), length=150)[0]

    got, expected = (
        jax.jit(jax.grad(lambda w, x, solve=solve: total(solve, w, x), (0, 1)))(W, X)
        for solve in (ours, plain)
    )
    assert relative_error(got, expected) < 1e-10


@pytest.mark.museum(
    "JAX, custom_vjp: a backward pass that nests a custom_vjp over a closure: reverse over "
    "reverse fails"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_reverse_over_reverse_of_a_closure():
    def ours(w, x):
        f = lambda _, z, x: tanh_cell(w, z, x)  # noqa: E731
        probe = BackwardProbe.zeros(3)  # which makes the rule a custom_vjp
        return deq_fixed_point(f, None, x, solver=TIGHT, backward_probe=probe)

    def second(solve):
        first = jax.grad(lambda w, x: jnp.vdot(Y, solve(w, x)), (0, 1))
        size = lambda w, x: sum(jnp.sum(jnp.sin(g)) for g in first(w, x))  # noqa: E731
        return jax.jit(jax.grad(size, (0, 1)))(W, X)

    assert relative_error(second(ours), second(unrolled)) < 1e-9


@pytest.mark.museum(
    "JAX, vmap of while_loop (jax#2586, #20628): a vmapped loop runs every lane to the slowest one"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_finished_lanes_are_left_alone():
    solver = Anderson(tol=1e-6, trace=True)
    gains, x = np.array([0.1, 0.3, 0.9]), normal(6, seed=1)

    def f(gain, z, x):
        return jnp.tanh(gain * jnp.roll(z, 1)) + x

    def solve(gain):
        options = {"solver": solver, "batched": False, "return_stats": True}
        return deq_fixed_point(f, gain, x, **options)

    z, stats = jax.vmap(solve)(gains)
    assert len(set(stats.iterations.tolist())) == 3
    for i, gain in enumerate(gains):
        alone, alone_stats = solve(gain)
        np.testing.assert_allclose(z[i], alone, rtol=0, atol=1e-14)
        assert stats.iterations[i] == alone_stats.iterations
        assert stats.evaluations[i] == alone_stats.evaluations
        np.testing.assert_array_equal(np.isnan(stats.trace[i]), np.isnan(alone_stats.trace))


@pytest.mark.museum(
    "JAX, carry dtypes: a weakly typed start makes a carry of another type than what the body "
    "returns"
)
def test_weakly_typed_starts():
    def f(_, z, x):
        return jnp.cos(z)

    def solve(start):
        return deq_fixed_point(f, None, None, start, batched=False, solver=Anderson(tol=1e-6))

    for start in (0.5, jnp.asarray(0.5), np.float32(0.5)):
        z = solve(start)
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(z, 0.7390851332151607, rtol=1e-5)


@pytest.mark.museum(
    "JAX, custom_root (jax#24295): integer auxiliary output of a solve under differentiation: "
    "TypeError about float0"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_integer_statistics_under_differentiation():
    def solve(w):
        return layer(w, X, return_stats=True, solver=NewtonKrylov(tol=1e-12))

    tangent = normal(4, 4, seed=5)
    (z, stats), (dz, dstats) = jax.jit(lambda w: jax.jvp(solve, (w,), (tangent,)))(W)
    expected = [tanh_solution(W + h * tangent, X) for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(dz, (expected[0] - expected[1]) / 2e-6, rtol=0, atol=1e-8)
    np.testing.assert_allclose(z, tanh_solution(W, X), rtol=0, atol=1e-11)
    assert stats.products.dtype == jnp.int32
    assert dstats.products.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(dstats.residual, 0)
