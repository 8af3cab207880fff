"""Truncated backpropagation against plain JAX: a loop, `stop_gradient`, and k steps more."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_jax import (
    BackwardProbe,
    Control,
    NewtonKrylov,
    Picard,
    Status,
    Truncated,
    deq_fixed_point,
)

WEIGHTS = jax.random.normal(jax.random.key(0), (5, 5)) / 3
X = jax.random.normal(jax.random.key(1), (4, 5))


def cell(params, z, x):
    return jnp.tanh(z @ params + x)


def inputs(params):
    return X.astype(params.dtype)


def plain(params, steps, applications):
    """`applications` of the cell, of which the last `steps` have a gradient."""
    x = inputs(params)
    z = jnp.zeros_like(x)
    for i in range(applications):
        if i == applications - steps:
            z = lax.stop_gradient(z)
        z = cell(params, z, x)
    return z


def loss_of(z):
    return jnp.sum(z**3) + jnp.sum(z)


def loss(params, *, steps, applications, remat=False, solver=Picard, **options):
    solver = solver(tol=0.0, max_iter=applications)
    policy = Truncated(steps, remat=remat)
    x = inputs(params)
    return loss_of(deq_fixed_point(cell, params, x, solver=solver, gradient=policy, **options))


@pytest.mark.parametrize(
    ("steps", "applications", "remat"), [(1, 6, False), (3, 7, True), (6, 6, False)]
)
def test_bit_for_bit_the_gradient_of_the_last_steps(steps, applications, remat):
    with jax.enable_x64(True):
        params = np.asarray(WEIGHTS, np.float64)
        value = jax.jit(lambda p: loss(p, steps=steps, applications=applications, remat=remat))
        expected = jax.jit(lambda p: loss_of(plain(p, steps, applications)))
        # Newer releases of XLA join other operations in the two programs, and round them once less.
        rtol = 0 if jax.__version_info__ < (0, 11) else 1e-14
        np.testing.assert_allclose(value(params), expected(params), rtol=rtol)
        np.testing.assert_allclose(jax.grad(value)(params), jax.grad(expected)(params), rtol=rtol)


@pytest.mark.slow
def test_forward_mode_and_second_derivatives():
    with jax.enable_x64(True):
        params = np.asarray(WEIGHTS, np.float64)
        ours = lambda p: loss(p, steps=2, applications=5)  # noqa: E731
        theirs = lambda p: loss_of(plain(p, 2, 5))  # noqa: E731
        tangent = np.ones_like(params)
        got = jax.jvp(jax.grad(ours), (params,), (tangent,))[1]
        expected = jax.jvp(jax.grad(theirs), (params,), (tangent,))[1]
        np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.slow
def test_memory_does_not_depend_on_the_applications():
    def temporaries(applications, steps):
        step = jax.jit(jax.grad(lambda p: loss(p, steps=steps, applications=applications)))
        return step.lower(WEIGHTS).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(64, 3) == temporaries(8, 3)
    assert temporaries(64, 30) > temporaries(64, 3)


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_budget_ends_the_loop_and_keeps_the_last_steps(budget):
    with jax.enable_x64(True):
        params = np.asarray(WEIGHTS, np.float64)
        steps = 2

        @jax.jit
        def ours(params, budget):
            control = Control(budget=budget)
            return loss(params, steps=steps, applications=6, control=control)

        expected = jax.value_and_grad(lambda p: loss_of(plain(p, min(steps, budget), budget)))
        got = jax.value_and_grad(ours)(params, budget)
        for one, other in zip(got, expected(params), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-14)


def test_samples_that_had_stopped_make_the_last_steps_too():
    """The first sample starts at its equilibrium and stops at once; all take two more steps."""
    with jax.enable_x64(True):
        x = jnp.asarray(X, jnp.float64)
        params = jnp.asarray(WEIGHTS, jnp.float64)
        z0 = jnp.zeros_like(x).at[0].set(_iterated(params, x, 200)[0])
        policy, solver = Truncated(2), Picard(tol=1e-9, max_iter=40)

        def ours(params):
            z, stats = deq_fixed_point(
                cell, params, x, z0, solver=solver, gradient=policy, return_stats=True
            )
            return loss_of(z[:1]), stats

        def theirs(params):
            z = cell(params, cell(params, lax.stop_gradient(z0), x), x)
            return loss_of(z[:1])

        got, stats = jax.grad(ours, has_aux=True)(params)
        np.testing.assert_allclose(got, jax.grad(theirs)(params), rtol=1e-6)
        assert (stats.status == Status.CONVERGED).all()


def _iterated(params, x, applications):
    return lax.fori_loop(0, applications, lambda _, z: cell(params, z, x), jnp.zeros_like(x))


@pytest.mark.slow
def test_steps_of_another_solver_find_the_equilibrium_and_its_gradient():
    """With enough steps the truncation is small; the last steps go on from the solver's state."""
    with jax.enable_x64(True):
        params = np.asarray(WEIGHTS, np.float64) / 2
        got = jax.grad(lambda p: loss(p, steps=6, applications=9, solver=NewtonKrylov))(params)
        expected = jax.grad(lambda p: loss_of(_iterated(p, inputs(p), 60)))
        np.testing.assert_allclose(got, jax.jit(expected)(params), rtol=1e-3, atol=1e-6)


def test_a_sample_that_becomes_nan_says_so():
    def f(a, z, x):
        return jnp.where(x > 2, jnp.exp(z * 100), a * z + x)

    x = jnp.array([[1.0], [3.0]])
    solver = Picard(tol=0.0, max_iter=6)
    z, stats = deq_fixed_point(
        f, jnp.float32(0.5), x, solver=solver, gradient=Truncated(2), return_stats=True
    )
    assert list(stats.status) == [Status.MAX_ITER, Status.DIVERGED]
    assert np.isfinite(z).all()
    np.testing.assert_allclose(z[0], 2 * (1 - 0.5**6), rtol=1e-6)


def test_errors():
    with pytest.raises(ValueError, match=r"Truncated\.steps must be at least 1, got 0"):
        Truncated(0)
    with pytest.raises(ValueError, match=r"at most the solver's max_iter = 4, got 5"):
        deq_fixed_point(cell, WEIGHTS, X, solver=Picard(max_iter=4), gradient=Truncated(5))
    with pytest.raises(ValueError, match="no gradient for sample_at"):
        deq_fixed_point(cell, WEIGHTS, X, gradient=Truncated(2), sample_at=(3,))
    probe = BackwardProbe.zeros(4)
    with pytest.raises(ValueError, match="backward_probe reports a linear backward solve"):
        deq_fixed_point(cell, WEIGHTS, X, gradient=Truncated(2), backward_probe=probe)
