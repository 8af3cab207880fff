"""What one equilibrium can express, as code: networks and stacks of equilibria as a single cell.

They show theorems and make nothing faster; guide: `docs/constructions.md`. Batches are rows: states
are `[B, n]` and matrices `[in, out]`, as in Flax, so that the `W z` of the papers is `z @ W`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deq_jax.closure import Cell
from deq_jax.fixed_point import deq_fixed_point
from deq_jax.solve import Solver
from deq_jax.solvers.picard import Picard
from deq_jax.stats import SolveStats

PyTree = Any
Layer = Callable[[PyTree, PyTree], PyTree]
Activation = Callable[[jax.Array], jax.Array]


def stacked_layers(layers: Sequence[Layer]) -> "StackedLayers":
    """The feed-forward network `h_i = layer_i(p_i, h_{i-1})`, `h_0 = x`, as one equilibrium cell.

    The state is the tuple of all intermediate results:

        f((p_1, ..., p_L), (z_1, ..., z_L), x) = (layer_1(p_1, x), ..., layer_L(p_L, z_{L-1})).

    Its only equilibrium is z_i = h_i, the last entry being the output. ∂f/∂z has blocks below the
    diagonal alone: its L-th power is zero, and L applications reach the equilibrium whatever the
    weights. A solver evaluates f once more to see that, so `max_iter` must be L + 1 or more.

    Args:
        layers: functions `layer(params, h) -> h` of pytrees, finite at zero, where a search starts.
            With a batched solve axis 0 of all they return is the batch.

    Returns:
        The cell f, with a method `start(params, x)` that makes z0.

    Raises:
        ValueError, TypeError: there are no layers, or one is not callable.

    Source: "Deep Implicit Layers", ch. 4, "Power of the DEQ representation".
    """
    layers = tuple(layers)
    if not layers:
        raise ValueError("layers must hold at least one layer, got none")
    _check_callable(**{f"layers[{index}]": layer for index, layer in enumerate(layers)})
    return StackedLayers(layers)


@dataclasses.dataclass(frozen=True)
class StackedLayers:
    """The cell of `stacked_layers`; equal for equal layers, so that it is compiled once."""

    layers: tuple[Layer, ...]

    def __call__(self, params: Sequence[PyTree], z: tuple[PyTree, ...], x: PyTree) -> PyTree:
        """Each layer once, on the state before it; a ValueError if something does not chain."""
        _check_entries(len(self.layers), params=params, z=z)
        return tuple(self._apply(index, params, h) for index, h in enumerate((x, *z[:-1])))

    def start(self, params: Sequence[PyTree], x: PyTree) -> tuple[PyTree, ...]:
        """Zeros shaped like the state, which is not computed; errors as of a call."""
        _check_entries(len(self.layers), params=params)
        h, states = x, []
        for index in range(len(self.layers)):
            h = jax.eval_shape(functools.partial(self._apply, index), params, h)
            states.append(jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), h))
        return tuple(states)

    def _apply(self, index: int, params: Sequence[PyTree], h: PyTree) -> PyTree:
        try:
            return self.layers[index](params[index], h)
        except (TypeError, ValueError) as error:
            message = f"layers[{index}] cannot take its input, {jax.tree.map(jnp.shape, h)}"
            raise ValueError(f"{message}: {error}") from error


def compose(f: Cell, g: Cell) -> "Composed":
    """Two stacked equilibria, `z_1 = f(p_1, z_1, x)` and `z_2 = g(p_2, z_2, z_1)`, as one cell.

        h((p_1, p_2), (z_1, z_2), x) = (f(p_1, z_1, x), g(p_2, z_2, z_1))

    Its equilibria are those of the stack. The eigenvalues of ∂h/∂z, which is block triangular, are
    those of ∂f/∂z_1 and ∂g/∂z_2: plain iteration converges locally where it does for both.

    Args:
        f: the first cell, of any pytrees.
        g: the second, whose input is the whole state of f. Three: `compose(f, compose(g, h))`.

    Raises:
        TypeError: f or g is not callable.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019, universality of single-layer
    DEQs; "Deep Implicit Layers", ch. 4, "One (implicit) layer is all you need".
    """
    _check_callable(f=f, g=g)
    return Composed(f, g)


@dataclasses.dataclass(frozen=True)
class Composed:
    """The cell of `compose`; equal for equal f and g, so that it is compiled once."""

    f: Cell
    g: Cell

    def __call__(self, params: PyTree, z: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        """Both once; a ValueError if `params` or `z` is no pair."""
        _check_entries(2, params=params, z=z)
        return self.f(params[0], z[0], x), self.g(params[1], z[1], z[0])


class RecurrentParams(NamedTuple):
    """W `[n, n]`, with W_ji from unit j to unit i, U `[m, n]` and b `[n]`."""

    recurrent: jax.Array
    input: jax.Array
    bias: jax.Array


def weight_tied(
    layers: Sequence[tuple[jax.Array, jax.Array]], activations: Activation | Sequence[Activation]
) -> tuple[RecurrentParams, "WeightTied"]:
    """A network whose layers have weights of their own, as one that repeats a single layer.

    The network `h_i = act_i(h_{i-1} W_i + b_i)`, `h_0 = x`, of widths n_1, ..., n_L is

        z <- act(z W + x U + b),   W = [ 0 W_2  0  ... ]    U = [ W_1  0  ...  0 ]
                                       [ 0  0  W_3 ... ]    b = [ b_1 b_2 ... b_L ]
                                       [ 0  0   0  ... ]

    applied L times to a state of width N = n_1 + ... + n_L. W hands each block on to the next, so
    that after k applications to any finite start the blocks 1 to k are h_1, ..., h_k. Hence it is
    also a DEQ cell, for any weights: its only equilibrium is (h_1, ..., h_L), which plain iteration
    reaches in L evaluations, and one more to see it. N is linear in depth; of the `N² + n_0 N`
    entries of W and U all but those of the original kernels are zero.

    Args:
        layers: pairs of a kernel `[n_{i-1}, n_i]` and a bias `[n_i]`, all of one dtype.
        activations: an elementwise function, or one for each layer, which sees its block alone.

    Returns:
        `params, cell`: W, U and b, differentiable in `layers`, and the DEQ cell. Its z0 is
        `cell.start(x)`, the output is read off by `cell.output(z)`, its last block, and
        `cell.unrolled(params, x)` is the weight-tied network: that block after L applications.

    Raises:
        ValueError, TypeError: no layers; one that is no pair, does not fit the layer before or
            is of another dtype; not one callable activation a layer.

    Source: Bai, Kolter and Koltun, 2019, universality of weight-tied deep networks.
    """
    kernels, biases = zip(*_checked_layers(layers), strict=True)
    widths = tuple(kernel.shape[1] for kernel in kernels)
    activations = (activations,) * len(widths) if callable(activations) else activations
    _check_entries(len(widths), activations=activations)
    _check_callable(**{f"activations[{index}]": act for index, act in enumerate(activations)})
    n = sum(widths)
    recurrent, row, column = jnp.zeros((n, n), kernels[0].dtype), 0, widths[0]
    for kernel in kernels[1:]:
        recurrent = jax.lax.dynamic_update_slice(recurrent, kernel, (row, column))
        row, column = column, column + kernel.shape[1]
    first = jnp.pad(kernels[0], ((0, 0), (0, n - widths[0])))
    params = RecurrentParams(recurrent, first, jnp.concatenate(biases))
    return params, WeightTied(tuple(activations), widths)


@dataclasses.dataclass(frozen=True)
class WeightTied:
    """The cell of `weight_tied`: the activation and the width of each block of its state."""

    activations: tuple[Activation, ...]
    widths: tuple[int, ...]

    def __call__(self, params: RecurrentParams, z: jax.Array, x: jax.Array) -> jax.Array:
        """One application, `[B, N]`."""
        return self.activation(z @ params.recurrent + x @ params.input + params.bias)

    def activation(self, u: jax.Array) -> jax.Array:
        """act, on a net input `[B, N]`."""
        ends = [sum(self.widths[:index]) for index in range(1, len(self.widths))]
        blocks = zip(self.activations, jnp.split(u, ends, axis=-1), strict=True)
        return jnp.concatenate([activation(block) for activation, block in blocks], axis=-1)

    def unrolled(self, params: RecurrentParams, x: jax.Array) -> jax.Array:
        """The weight-tied network: the output after L applications to zeros."""
        z = self.start(x)
        for _ in self.widths:
            z = self(params, z, x)
        return self.output(z)

    def start(self, x: jax.Array) -> jax.Array:
        """Zeros `[B, N]`."""
        return jnp.zeros((*x.shape[:-1], sum(self.widths)), x.dtype)

    def output(self, z: jax.Array) -> jax.Array:
        """The last block of a state, `[B, n_L]`."""
        return z[..., -self.widths[-1] :]


class RecurrentGradient(NamedTuple):
    """By `params` (summed over the batch) and `x`; `error` e `[B, n]` and how it was reached."""

    params: RecurrentParams
    x: jax.Array
    error: jax.Array
    stats: SolveStats


def recurrent_backpropagation(
    params: RecurrentParams,
    x: jax.Array,
    z: jax.Array,
    cotangent: jax.Array,
    activation: Activation,
    *,
    solver: Solver = Picard(tol=1e-6, max_iter=1000),  # noqa: B008  (frozen)
) -> RecurrentGradient:
    """The gradient of a loss of the equilibrium `z = act(z W + x U + b)` by Almeida and Pineda.

    With u the net input at z and y = ∂loss/∂z, the error network has the same units and weights,
    linearised and turned round. At rest

        e_j = y_j + Σ_i W_ji act'(u_i) e_i,

    and what stands at the two ends of a weight, with δ_i = act'(u_i) e_i, is its gradient:

        ∂loss/∂W_ji = z_j δ_i,    ∂loss/∂U_ki = x_k δ_i,    ∂loss/∂b_i = δ_i.

    Errors flow by `de/dt = -e + y + δ Wᵀ`, of which `Picard(damping=τ)` makes Euler steps of length
    τ. Differs from the papers: Pineda adds the input outside of act; they have target minus output
    for y, and return changes. Only the scalar act is differentiated: a derivation of its own.

    Args:
        params: W `[n, n]`, U `[m, n]`, b `[n]`.
        x: the input, `[B, m]`.
        z: the equilibrium, `[B, n]`.
        cotangent: y, `[B, n]`; zero for units that are no outputs.
        activation: act, elementwise, with a forward derivative.
        solver: relaxes the error network, from zero, each sample by itself.

    Raises:
        ValueError: an array of another shape, which the message names.

    Source: Almeida, 1987; Pineda, 1987; titles in `docs/constructions.md`.
    """
    batch, m, n = jnp.shape(x)[:1], jnp.shape(x)[1:], jnp.shape(z)[1:]
    given = {**params._asdict(), "x": x, "z": z, "cotangent": cotangent}
    shapes = (n + n, m + n, n, batch + m[:1], batch + n[:1], batch + n)
    for name, expected in zip(given, shapes, strict=True):
        if jnp.shape(given[name]) != expected:
            raise ValueError(f"{name} must have shape {expected}, got {jnp.shape(given[name])}")
    u = z @ params.recurrent + x @ params.input + params.bias
    slope = jax.jvp(activation, (u,), (jnp.ones_like(u),))[1]
    network = (_send_back, params.recurrent, (slope, cotangent), jnp.zeros_like(cotangent))
    error, stats = deq_fixed_point(*network, solver=solver, return_stats=True)
    delta = slope * error
    gradient = RecurrentParams(z.T @ delta, x.T @ delta, delta.sum(axis=0))
    return RecurrentGradient(gradient, delta @ params.input.T, error, stats)


def _send_back(recurrent: jax.Array, error: jax.Array, given: tuple[Any, Any]) -> jax.Array:
    slope, cotangent = given
    return cotangent + (slope * error) @ recurrent.T


def _checked_layers(layers: Sequence[Any]) -> list[list[jax.Array]]:
    checked = [[jnp.asarray(leaf) for leaf in jax.tree.leaves(layer)] for layer in layers]
    if not checked:
        raise ValueError("layers must hold at least one pair (kernel, bias), got none")
    width = None
    for index, layer in enumerate(checked):
        shapes = [array.shape for array in layer]
        pair = len(shapes) == 2 and len(shapes[0]) == 2 and shapes[1] == shapes[0][1:]
        if not pair or width not in (None, shapes[0][0]):
            expected = f"a kernel [{width or 'in'}, out] and a bias [out]"
            raise ValueError(f"layers[{index}] must be {expected}, got shapes {shapes}")
        width = shapes[0][1]
    dtypes = sorted({str(array.dtype) for layer in checked for array in layer})
    if len(dtypes) > 1:
        raise ValueError(f"layers must be of one dtype, got {dtypes}")
    return checked


def _check_entries(count: int, **given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, tuple | list) or len(value) != count:
            raise ValueError(f"{name} must have {count} entries, got {jax.tree.structure(value)}")


def _check_callable(**given: Any) -> None:
    for name, value in given.items():
        if not callable(value):
            raise TypeError(f"{name} must be callable, got {type(value).__name__}")
