"""What the tests of the constructions share: layers, equilibria, weights, comparisons."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import Anderson, Picard
from tests.reference import newton_equilibrium

PICARD = Picard(tol=1e-12, max_iter=300)
ANDERSON = Anderson(tol=1e-11, max_iter=100)
EXACT = Picard(tol=0.0, max_iter=9)


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng([seed, *shape]).normal(size=shape))


def assert_close(got, expected, tolerance):
    """Leaf by leaf, so that a large one hides no small one."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * (1e-3 + np.abs(e).max()))


def weighted(out):
    """A loss in which every output counts differently, and its cotangent."""
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return (weights * out**2).sum(), 2 * weights * out


def value_and_gradients(function, params, x):
    def loss(params, x):
        out = function(params, x)
        return weighted(out)[0], out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return out, gradients


# Networks in layers, and the same applied one after the other.


def dense(params, h):
    return h @ params["kernel"] + params["bias"]


def dense_tanh(params, h):
    return jnp.tanh(dense(params, h))


def convolution(params, h, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jnp.tanh(
        jax.lax.conv_general_dilated(h, params, (stride, stride), "SAME", dimension_numbers=layout)
    )


def split(params, h):
    """A layer that hands on a pytree: a branch, and what skips it."""
    return {"branch": params * jnp.sin(h), "skip": h}


def join(params, h):
    return (h["branch"] + params["gain"] * h["skip"]).mean((1, 2)) @ params["head"]


def mlp():
    """Weights far from a contraction."""
    params = [
        {"kernel": normal(*shape, scale=3.0), "bias": normal(shape[1], seed=1)}
        for shape in itertools.pairwise((3, 5, 4, 2))
    ]
    return [dense_tanh, dense_tanh, dense], params, normal(4, 3, seed=2)


def conv_net():
    layers = [convolution, functools.partial(convolution, stride=2), split, join]
    head = {"gain": jnp.asarray(0.6), "head": normal(2, 3)}
    params = [normal(3, 3, 2, 3), normal(3, 3, 3, 2), jnp.asarray(1.7), head]
    return layers, params, normal(2, 5, 4, 2, seed=2)


def in_turn(layers, params, x):
    for layer, own in zip(layers, params, strict=True):
        x = layer(own, x)
    return x


# Stacked equilibria.


def lower(params, z, x):
    """Two leaves that feed each other."""
    return {
        "a": jnp.tanh(z["b"] @ params["ab"] + x["left"]),
        "b": jnp.sin(z["a"] @ params["ba"] + x["right"]),
    }


def upper(params, z, below):
    return jnp.tanh(z @ params[0] + below["a"] @ params[1] + below["b"][:, :2] @ params[2])


def top(params, z, below):
    return jnp.cos(params * z) + below


def stack():
    first = {"ab": normal(3, 2, scale=0.4), "ba": normal(2, 3, scale=0.4)}
    second = [normal(4, 4, scale=0.2), normal(2, 4, seed=1), normal(2, 4, seed=2)]
    x = {"left": normal(3, 2, seed=3), "right": normal(3, 3, seed=4)}
    starts = ({"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 3))}, jnp.zeros((3, 4)))
    below = newton_equilibrium(lambda z: lower(first, z, x), starts[0])
    above = newton_equilibrium(lambda z: upper(second, z, below), starts[1])
    return (first, second), x, starts, (below, above)


# Weight-tied networks.


def untied(widths, scale=1.5):
    return [
        (normal(*shape, scale=scale), normal(shape[1], seed=1))
        for shape in itertools.pairwise(widths)
    ]


def hidden_states(layers, activations, x):
    """All hidden states of the untied network."""
    states = []
    for (kernel, bias), activation in zip(layers, activations, strict=True):
        x = activation(x @ kernel + bias)
        states.append(x)
    return states
