"""Fixed-point correction: weights, sampled states, and the gradient of the whole loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Phantom, Picard, deq_fixed_point
from deq_jax.stability import corrected_loss, correction_weights, evenly_spaced


def test_weights_and_samples():
    np.testing.assert_allclose(correction_weights(4, 0.8), [0.512, 0.64, 0.8, 1])
    assert correction_weights(3, 0) == (0, 0, 1)
    assert evenly_spaced(10, 4) == (2, 4, 6)
    assert evenly_spaced(12, 1) == ()
    assert evenly_spaced(3, 3) == (1, 2)


def test_the_loss_is_the_weighted_sum_over_the_trajectory():
    """Plain iteration in NumPy gives the states; their losses are summed by hand."""
    rng = np.random.default_rng(0)
    w = (0.3 * rng.normal(size=(4, 4))).astype(np.float32)
    x, target = rng.normal(size=(2, 3, 4)).astype(np.float32)

    def f(w, z, x):
        return jnp.tanh(z @ w + x)

    def loss_of(z):
        return ((z - target) ** 2).sum()

    z, samples = deq_fixed_point(
        f, w, x, solver=Picard(tol=0.0, max_iter=8), sample_at=evenly_spaced(8, 4)
    )
    states = [np.zeros((3, 4))]
    for _ in range(7):
        states.append(np.tanh(states[-1] @ w + x))
    expected = sum(
        weight * ((states[index] - target) ** 2).sum()
        for weight, index in zip((0.125, 0.25, 0.5, 1), (1, 3, 5, 7), strict=True)
    )
    np.testing.assert_allclose(corrected_loss(loss_of, (*samples, z), 0.5), expected, rtol=1e-5)


@pytest.mark.slow
def test_gradients_flow_through_every_state(x64):
    """Against the sum of the gradients of each state's loss with one phantom step, unrolled."""
    rng = np.random.default_rng(0)
    w, x = jnp.asarray(0.3 * rng.normal(size=(4, 4))), jnp.asarray(rng.normal(size=(3, 4)))

    def f(w, z, x):
        return jnp.tanh(z @ w + x)

    def loss(w):
        z, samples = deq_fixed_point(
            f,
            w,
            x,
            solver=Anderson(tol=1e-12, max_iter=40),
            gradient=Phantom(1, 1.0),
            sample_at=(2, 4),
        )
        return corrected_loss(lambda z: (z**3).sum(), (*samples, z), 0.5), (samples, z)

    gradient, (samples, z) = jax.grad(loss, has_aux=True)(w)
    expected = np.zeros((4, 4))
    for weight, state in zip((0.25, 0.5, 1), (*samples, z), strict=True):
        slope = 1 - np.tanh(state @ w + x) ** 2
        expected += weight * np.asarray(state).T @ (3 * np.asarray(state) ** 2 * slope)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: evenly_spaced(3, 4), "states must be at most max_iter=3"),
        (lambda: evenly_spaced(3, 0), "states must be at least 1"),
        (lambda: correction_weights(3, 1.5), "gamma"),
        (lambda: corrected_loss(jnp.sum, ()), "got none"),
    ],
)
def test_bad_arguments_are_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
