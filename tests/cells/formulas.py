"""Convolutional layers in NumPy, analytic in all their arguments, and dense implicit gradients.

A derivative is that of a complex step, `Im f(a + i h v) / h`, which is exact to rounding. ReLU
looks at the real part. All else is analytic.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

STEP = 1e-30


def relu(y):
    return np.where(y.real > 0, y, 0)


def conv(x, kernel, stride=1):
    """`[B, H, W, in]` and `[k, k, in, out]`, padded by `k // 2` on all sides."""
    size, (height, width) = len(kernel), x.shape[1:3]
    half = size // 2
    x = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    return sum(
        x[:, i : i + height : stride, j : j + width : stride] @ kernel[i, j]
        for i in range(size)
        for j in range(size)
    )


def group_norm(x, weights, groups, mean_only=False):
    batch, height, width, channels = x.shape
    y = x.reshape(batch, height, width, groups, channels // groups)
    y = y - y.mean((1, 2, 4), keepdims=True)
    if not mean_only:
        y = y / np.sqrt((y**2).mean((1, 2, 4), keepdims=True) + 1e-5)
    y = y.reshape(x.shape)
    return y * weights["scale"] + weights["bias"] if weights else y


def batch_norm(x, weights, statistics=None):
    """With the given statistics, or those of the batch."""
    if statistics is None:
        mean = x.mean((0, 1, 2))
        variance = ((x - mean) ** 2).mean((0, 1, 2))
    else:
        mean, variance = statistics["mean"], statistics["var"]
    y = (x - mean) / np.sqrt(variance + 1e-5)
    return y * weights["scale"] + weights["bias"] if weights else y


def randomise(model, rng, kernel_scale=1.0):
    """Gives every param a random value: kernels N(0, kernel_scale² / fan_in), scales near 1.

    The model may be one of `nnx.eval_shape`, which costs no compilation.
    """

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if leaf.ndim > 1:
            fan_in = leaf.size / leaf.shape[-1]
            return jnp.asarray(kernel_scale * rng.normal(size=leaf.shape) / fan_in**0.5, leaf.dtype)
        centre = 0.0 if "bias" in name else 1.0
        return jnp.asarray(centre + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, nnx.Param)))
    return model


def weights_of(model, kind=nnx.Param):
    """Its variables of a kind as nested dictionaries of NumPy arrays."""
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, kind)))


def flat(state):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in state])


def unflat(vector, like):
    splits = np.cumsum([leaf.size for leaf in like])[:-1]
    return tuple(
        part.reshape(leaf.shape) for part, leaf in zip(np.split(vector, splits), like, strict=True)
    )


def derivative(f, at, direction):
    """The derivative of `f(tree)`, a tuple of arrays, in a direction, as one vector."""
    step = jax.tree.map(lambda a, v: a + 1j * STEP * v, at, direction)
    return flat(f(step)).imag / STEP


def implicit(f, weights, z, x, cotangent, directions):
    """z* by Newton's method, and derivatives of `<cotangent, z*>` by the implicit function theorem.

    Args:
        f: `f(weights, z, x)`, z a tuple of arrays.
        weights: nested dictionaries of arrays.
        z: a start.
        x: an array.
        cotangent: like z.
        directions: of the weights.

    Returns:
        z*, the derivative by x, and the derivatives in the directions.
    """
    size = flat(z).size

    def jacobian(z):
        units = (unflat(unit, z) for unit in np.eye(size))
        return np.stack([derivative(lambda z: f(weights, z, x), z, unit) for unit in units], 1)

    for _ in range(60):
        residual = flat(f(weights, z, x)) - flat(z)
        if np.abs(residual).max() < 1e-13:
            break
        z = unflat(flat(z) + np.linalg.solve(np.eye(size) - jacobian(z), residual), z)
    assert np.abs(residual).max() < 1e-12
    u = np.linalg.solve((np.eye(size) - jacobian(z)).T, flat(cotangent))
    units = (unit.reshape(x.shape) for unit in np.eye(x.size))
    by_x = [u @ derivative(lambda x: f(weights, z, x), x, unit) for unit in units]
    by_weights = [u @ derivative(lambda w: f(w, z, x), weights, v) for v in directions]
    return z, np.reshape(by_x, x.shape), np.array(by_weights)
