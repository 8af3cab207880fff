"""Variational dropout: one mask for a whole solve.

Ordinary dropout draws a mask at each evaluation, and then f is another function each time: there is
no equilibrium. Here the mask is drawn from a key before the solve and is the same in every
iteration and in the backward pass; the next step draws another. With a key in `params` (or closed
over) that comes by itself: f draws the same mask each time, and since it depends on the key alone
it is computed once, ahead of the loop.

In Flax, `nnx.Dropout` and `nn.Dropout` inside a cell behave in this way (see the adapters);
`broadcast_axes` gives what they take as `broadcast_dims`.

Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
networks", 2016; Bai, Kolter and Koltun, "Deep equilibrium models", 2019, who found that it makes
equilibria harder to find.
"""

import math
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

DropoutKind = Literal["full", "channel", "token"]
"""What a mask drops: single entries; a whole channel of a sample, at all positions; or all
channels of a position. Attention weights `[B, heads, queries, keys]` take `full`."""


def broadcast_axes(kind: DropoutKind, ndim: int) -> tuple[int, ...]:
    """The axes along which a mask is the same, for values with `ndim` axes, `[B, ..., channels]`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(DropoutKind):
        raise ValueError(f"kind must be one of {get_args(DropoutKind)}, got {kind!r}")
    if kind == "channel":
        return tuple(range(1, ndim - 1))
    return (ndim - 1,) if kind == "token" else ()


def dropout_mask(
    key: jax.Array,
    rate: float,
    shape: tuple[int, ...],
    *,
    kind: DropoutKind = "full",
    dtype: Any = jnp.float32,
) -> jax.Array:
    """A random mask: 0 with probability `rate`, else `1 / (1 - rate)`; its mean is 1.

    Args:
        key: random key; the same key gives the same mask.
        rate: share that is dropped, in [0, 1]. At 1 the mask is 0 throughout.
        shape: shape of the values, `[B, ..., channels]`.
        kind: `full`, `channel` or `token`.
        dtype: of the mask.

    Returns:
        `[B, ..., channels]` with length 1 along the axes on which it is the same: `[B, 1, D]` and
        `[B, 1, 1, C]` for `channel`, `[B, L, 1]` for `token`.

    Raises:
        ValueError: `rate` is not in [0, 1], or `kind` is unknown.
    """
    if isinstance(rate, bool) or not isinstance(rate, float | int):
        raise TypeError(f"rate must be a number, got {rate!r}")
    if not (math.isfinite(rate) and 0 <= rate <= 1):
        raise ValueError(f"rate must be in [0, 1], got {rate!r}")
    same = broadcast_axes(kind, len(shape))
    shape = tuple(1 if axis in same else length for axis, length in enumerate(shape))
    if rate == 1:
        return jnp.zeros(shape, dtype)
    kept = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(kept, jnp.asarray(1 / (1 - rate), dtype), jnp.zeros((), dtype))
