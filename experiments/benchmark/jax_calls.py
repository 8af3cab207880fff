"""The cells in JAX, and the calls that are timed: for deq_jax and for the JAX peers."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from experiments.benchmark.problems import Arrays, Problem, cell_params

JaxArrays = dict[str, jax.Array]
Cell = Callable[[JaxArrays, jax.Array, JaxArrays], jax.Array]
Layer = Callable[..., tuple[jax.Array, Any]]
"""`(params, x) -> (z*, report)`, differentiable; the report holds the evaluations."""

LOOP = 10
"""Evaluations of the cell, or products with its Jacobian, in a call that measures their cost."""

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


def residual(params: JaxArrays, z: jax.Array, x: JaxArrays, layout: str = "NHWC") -> jax.Array:
    """`norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))`."""

    def norm(y: jax.Array, number: int) -> jax.Array:
        return group_norm(y, params[f"scale{number}"], params[f"bias{number}"], layout)

    y = norm(jax.nn.relu(convolve(z, params["kernel1"], layout)), 1)
    y = norm(x["x"] + convolve(y, params["kernel2"], layout), 2)
    return norm(jax.nn.relu(z + y), 3)


def residual_channels_first(params: JaxArrays, z: jax.Array, x: JaxArrays) -> jax.Array:
    """`residual` written in NCHW."""
    return residual(params, z, x, "NCHW")


def dense(params: JaxArrays, z: jax.Array, x: JaxArrays) -> jax.Array:
    """`tanh(W z + U x + b)`."""
    return jnp.tanh(z @ params["w"].T + x["x"] @ params["u"].T + params["b"])


def gains(params: JaxArrays, z: jax.Array, x: JaxArrays) -> jax.Array:
    """`x + gain * B φ(A z)`, `φ(v) = tanh(0.1 v) / 0.1`."""
    hidden = jnp.tanh(SLOPE * (z @ params["inner"])) / SLOPE
    return x["x"] + x["gain"] * (hidden @ params["outer"])


def transformer(params: JaxArrays, z: jax.Array, x: JaxArrays) -> jax.Array:
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


def low_rank(params: JaxArrays, z: jax.Array, x: JaxArrays) -> jax.Array:
    """`tanh(d * z + P Q z + x)`."""
    return jnp.tanh(params["diagonal"] * z + (z @ params["down"]) @ params["up"] + x["x"])


CELLS: dict[str, Cell] = {f.__name__: f for f in (residual, dense, gains, transformer, low_rank)}


def batch_norm(y: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    """BatchNorm in training mode, channels last."""
    return standardise(y, (0, 1, 2)) * scale + bias


def injection(params: JaxArrays, images: jax.Array) -> jax.Array:
    """What the network gives to its equation."""
    y = convolve(images, params["stem.kernel"]) + params["stem.bias"]
    return batch_norm(y, params["norm_in.scale"], params["norm_in.bias"])


def cross_entropy(params: JaxArrays, z: jax.Array, labels: jax.Array) -> jax.Array:
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


class Given(NamedTuple):
    """The arrays of a problem; arguments of whatever is compiled, never constants of it."""

    params: JaxArrays
    x: JaxArrays
    cotangent: jax.Array


def given(problem: Problem) -> Given:
    """The arrays of a problem, on the default device."""
    return jax.tree.map(jnp.asarray, Given(problem.params, problem.x, problem.cotangent))


def differentiate(layer: Layer, given: Given, network: bool, *more: Any) -> Any:
    """`z*`, gradients and the report; to be traced.

    Args:
        layer: `(params, x, *more) -> (z*, report)`.
        given: the arrays.
        network: differentiate the loss of the network around the layer, in its parameters; else
            the inner product with the cotangent, in params and x.
        *more: further arguments of the layer to differentiate in.
    """
    params, x, cotangent = given
    if not network:
        z, pullback, report = jax.vjp(layer, params, x, *more, has_aux=True)
        return z, pullback(cotangent), report

    def loss(params: Any, *more: Any) -> Any:
        injected = injection(params, x["images"])
        z, report = layer(cell_params(params), {"x": injected}, *more)
        return cross_entropy(params, z, x["labels"]), (z, report)

    gradient = jax.grad(loss, tuple(range(1 + len(more))), has_aux=True)
    (of_params, *of_more), (z, report) = gradient(params, *more)
    return z, (of_params, {}, *of_more), report


class JaxCalls:
    """The calls of one implementation of one problem.

    Subclasses add `backward_products`, the transposed products of the last call or None, and
    `notes`, how the implementation was set.

    Attributes:
        timed: functions to be timed; they wait for their results.
        divisors: how much of what is asked for is in a call, by the same names.

    Args:
        mode: `forward`, `gradient`, or `step` (a training step of the network).
        layer: the implementation.
        given: the arrays.
        jit: compile the call.
    """

    def __init__(self, mode: str, layer: Layer, given: Given, jit: bool = True):
        self.given = given
        self.divisors = {"call": 1}
        self.timed: dict[str, Callable[[], None]] = {"call": self._time_call}
        self._last: Any = None
        optimiser = optax.adam(1e-3)
        self._state = optimiser.init(given.params) if mode == "step" else None

        def call(given: Given, state: Any) -> Any:
            if mode == "forward":
                z, report = layer(given.params, given.x)
                return z, ({}, {}), report
            z, gradients, report = differentiate(layer, given, mode == "step")
            if mode == "gradient":
                return z, gradients, report
            updates, state = optimiser.update(gradients[0], state, given.params)
            return z, gradients, report, optax.apply_updates(given.params, updates), state

        self._call = jax.jit(call) if jit else call

    def _time_call(self) -> None:
        self._last = jax.block_until_ready(self._call(self.given, self._state))

    def time_loop(self, name: str, loop: Callable[[Any, Any], Any]) -> None:
        """Adds a timed function: `loop(params, x)`, which does something `LOOP` times."""
        compiled = jax.jit(loop)
        self.timed[name] = lambda: jax.block_until_ready(compiled(self.given.params, self.given.x))
        self.divisors[name] = LOOP

    def result(self) -> Arrays:
        """`z` and gradients of the last call."""
        z, gradients, *_ = self._last
        named = {
            f"gradient/{group}/{name}": np.asarray(g, np.float32)
            for group, tree in zip(("params", "x"), gradients, strict=True)
            for name, g in tree.items()
        }
        return {"z": np.asarray(z, np.float32), **named}

    def evaluations(self) -> int:
        """Evaluations of the last call."""
        return int(self._last[2])


def loop_of(f: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    """`f` applied `LOOP` times, in a loop."""
    return lax.fori_loop(0, LOOP, lambda _, z: f(z), z)
