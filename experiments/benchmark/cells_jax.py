"""The cells and the network in JAX, as pure functions: for deq_jax and for the JAX peers."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

Arrays = dict[str, jax.Array]
Cell = Callable[[Arrays, jax.Array, Arrays], jax.Array]

GROUPS, HEADS, EPSILON, SLOPE = 8, 4, 1e-5, 0.1


def convolve(y: jax.Array, kernel: jax.Array, layout: str = "NHWC") -> jax.Array:
    """A convolution that keeps height and width; the kernel is HWIO, or OIHW for NCHW."""
    kernel_layout = {"NHWC": "HWIO", "NCHW": "OIHW"}[layout]
    return lax.conv_general_dilated(
        y, kernel, (1, 1), "SAME", dimension_numbers=(layout, kernel_layout, layout)
    )


def standardise(y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """To mean 0 and variance 1 over the axes, in one pass as Flax does it."""
    mean = y.mean(axes, keepdims=True)
    variance = (y * y).mean(axes, keepdims=True) - mean * mean
    return (y - mean) * lax.rsqrt(variance + EPSILON)


def group_norm(y: jax.Array, scale: jax.Array, bias: jax.Array, layout: str) -> jax.Array:
    """GroupNorm of NHWC or NCHW."""
    if layout == "NHWC":
        grouped, axes = y.reshape(*y.shape[:3], GROUPS, -1), (1, 2, 4)
    else:
        grouped, axes = y.reshape(y.shape[0], GROUPS, -1, *y.shape[2:]), (2, 3, 4)
        scale, bias = scale[:, None, None], bias[:, None, None]
    return standardise(grouped, axes).reshape(y.shape) * scale + bias


def residual(params: Arrays, z: jax.Array, x: Arrays, layout: str = "NHWC") -> jax.Array:
    """`norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))`."""

    def norm(y: jax.Array, number: int) -> jax.Array:
        return group_norm(y, params[f"scale{number}"], params[f"bias{number}"], layout)

    y = norm(jax.nn.relu(convolve(z, params["kernel1"], layout)), 1)
    y = norm(x["x"] + convolve(y, params["kernel2"], layout), 2)
    return norm(jax.nn.relu(z + y), 3)


def residual_channels_first(params: Arrays, z: jax.Array, x: Arrays) -> jax.Array:
    """`residual` written in NCHW."""
    return residual(params, z, x, "NCHW")


def dense(params: Arrays, z: jax.Array, x: Arrays) -> jax.Array:
    """`tanh(W z + U x + b)`."""
    return jnp.tanh(z @ params["w"].T + x["x"] @ params["u"].T + params["b"])


def gains(params: Arrays, z: jax.Array, x: Arrays) -> jax.Array:
    """`x + gain * B φ(A z)`, `φ(v) = tanh(0.1 v) / 0.1`."""
    hidden = jnp.tanh(SLOPE * (z @ params["inner"])) / SLOPE
    return x["x"] + x["gain"] * (hidden @ params["outer"])


def transformer(params: Arrays, z: jax.Array, x: Arrays) -> jax.Array:
    """`h = norm(z + x + attention(z))`, then `norm(h + feedforward(h))`."""
    p, width = params, z.shape[-1] // HEADS

    def heads(name: str) -> jax.Array:
        return (z @ p[name]).reshape(*z.shape[:2], HEADS, width)

    scores = jnp.einsum("bthd,bshd->bhts", heads("query"), heads("key")) / width**0.5
    mixed = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), heads("value"))
    attention = mixed.reshape(z.shape) @ p["out"]
    h = standardise(z + x["x"] + attention, (-1,)) * p["scale1"] + p["bias1"]
    v = jax.nn.gelu(h @ p["up"] + p["up_bias"]) @ p["down"] + p["down_bias"]
    return standardise(h + v, (-1,)) * p["scale2"] + p["bias2"]


def low_rank(params: Arrays, z: jax.Array, x: Arrays) -> jax.Array:
    """`tanh(d * z + P Q z + x)`."""
    return jnp.tanh(params["diagonal"] * z + (z @ params["down"]) @ params["up"] + x["x"])


CELLS: dict[str, Cell] = {f.__name__: f for f in (residual, dense, gains, transformer, low_rank)}


def batch_norm(y: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """BatchNorm in training mode, channels last."""
    return standardise(y, (0, 1, 2)) * scale + bias


def injection(params: Arrays, images: jax.Array) -> jax.Array:
    """What the network gives to its equation."""
    y = convolve(images, params["stem.kernel"]) + params["stem.bias"]
    return batch_norm(y, params["norm_in.scale"], params["norm_in.bias"])


def cross_entropy(params: Arrays, z: jax.Array, labels: jax.Array) -> jax.Array:
    """The network's loss, from the solution of its equation."""
    y = batch_norm(z, params["norm_out.scale"], params["norm_out.bias"])
    batch, height, width, channels = y.shape
    # The number of windows a side, from the size of the linear layer.
    side = int((params["head.weight"].shape[0] // channels) ** 0.5)
    windows = (batch, side, height // side, side, width // side, channels)
    features = y.reshape(windows).mean((2, 4)).reshape(batch, -1)
    logits = features @ params["head.weight"] + params["head.bias"]
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
    return -chosen.mean()
