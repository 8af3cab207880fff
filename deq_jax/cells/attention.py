"""Causal attention of a segment on itself and on finished positions before it.

What the Transformer cell is made of, as far as it has no parameters: the input with its memory,
masks, relative and rotary positions, attention and norms in at least float32.

Positions are counted over memory and segment together: M finished ones, 0 to M - 1, and the L of
the segment behind them. Where keys are meant, K = M + L.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from deq_jax.checks import check_positive_integer
from deq_jax.tree import accumulation_dtype

Norm = Literal["layer", "rms"]
NORM_EPSILON = 1e-5


class Memory(NamedTuple):
    """Finished positions before a segment, the newest last: their equilibrium and input.

    Attributes:
        state: z* `[B, M, D]`. It is differentiated; a caller who wants no gradient through earlier
            segments applies `stop_gradient`.
        embedding: `[B, M, D]`, what the positions were solved for.
        length: int32 `[B]`, how many of the last positions are there, from 0 to M; those before
            them are never looked at. None for all.
    """

    state: jax.Array
    embedding: jax.Array
    length: jax.Array | None = None


class KeyValues(NamedTuple):
    """The same positions as a cell sees them: what decoding keeps. Positions are not applied yet.

    Attributes:
        key: `[B, M, heads, D / heads]`.
        value: likewise.
        length: as in `Memory`.
    """

    key: jax.Array
    value: jax.Array
    length: jax.Array | None = None


class SequenceInput(NamedTuple):
    """A segment of a sequence, and what came before it.

    Attributes:
        embedding: `[B, L, D]`.
        memory: finished positions, or their keys and values; None where there are none.
    """

    embedding: jax.Array
    memory: Memory | KeyValues | None = None


def as_sequence(x: SequenceInput | jax.Array) -> SequenceInput:
    """A plain embedding is a segment without memory."""
    return x if isinstance(x, SequenceInput) else SequenceInput(x)


AnyMemory = TypeVar("AnyMemory", Memory, KeyValues)


def extend_memory(memory: AnyMemory | None, newer: AnyMemory, size: int) -> AnyMemory:
    """The last `size` positions of `memory` and `newer` together.

    Its arrays have `size` positions always, the first of them unused where there are fewer, so
    code compiled for one step of a decoding loop serves for all. With a window of w positions
    `size = w - 1` loses nothing.

    Args:
        memory: what there was before; None for nothing.
        newer: positions that follow, all of them there: without a `length`.
        size: M of the result.

    Returns:
        A memory of the same kind, `[B, size, ...]`, with its `length`.

    Raises:
        ValueError: `size` is below 1, `newer` has a `length`, or the two are of different kinds.
    """
    check_positive_integer("size", size)
    if newer.length is not None:
        raise ValueError("newer must have no length: all its positions are there")
    if memory is not None and type(memory) is not type(newer):
        raise ValueError(
            f"memory and newer must be of one kind, got {type(memory).__name__} and "
            f"{type(newer).__name__}"
        )
    batch, count = newer[0].shape[:2]
    before = 0 if memory is None else memory[0].shape[1]
    known = jnp.asarray(before, jnp.int32)
    if memory is not None and memory.length is not None:
        known = memory.length.astype(jnp.int32)

    def join(old: jax.Array | None, new: jax.Array) -> jax.Array:
        padding = jnp.zeros((batch, max(0, size - before - count), *new.shape[2:]), new.dtype)
        parts = [padding, new] if old is None else [padding, old, new]
        return jnp.concatenate(parts, 1)[:, -size:]

    old = (None, None) if memory is None else memory[:2]
    length = jnp.broadcast_to(jnp.minimum(known + count, size), (batch,))
    return type(newer)(join(old[0], newer[0]), join(old[1], newer[1]), length)


def attention_mask(
    queries: int, keys: int, window: int | None = None, memory_length: jax.Array | None = None
) -> jax.Array:
    """Which keys each of the last `queries` of `keys` positions sees.

    Query i, at position `p = M + i`, sees the keys j with `j <= p`, with a window `j > p - window`
    (itself and the `window - 1` before it), and of the memory the last `memory_length`.

    Args:
        queries: L.
        keys: K = M + L.
        window: positions that are seen; None for all.
        memory_length: int `[B]`, as in `Memory`; None for all.

    Returns:
        Boolean `[1, L, K]`, or `[B, L, K]` with a `memory_length`.
    """
    before = keys - queries
    position = jnp.arange(keys, dtype=jnp.int32)
    distance = position[before:, None] - position
    mask = distance >= 0
    if window is not None:
        mask &= distance < window
    mask = mask[None]
    if memory_length is not None:
        there = position >= before - memory_length.astype(jnp.int32)[:, None]
        mask = mask & there[:, None]
    return mask


def sinusoids(length: int, features: int, dtype: Any) -> jax.Array:
    """Sinusoids of the distances `length - 1, ..., 0`, `[length, features]`.

    `sin(t ω_i)` in the first half of the features and `cos(t ω_i)` in the second, with
    `ω_i = 10000^(-2 i / features)`: the order of Transformer-XL.
    """
    angle = _angles(jnp.arange(length - 1, -1, -1, dtype=jnp.int32), features, dtype)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1).astype(dtype)


def _angles(position: jax.Array, features: int, dtype: Any) -> jax.Array:
    """`t 10000^(-2 i / features)`, `[..., features / 2]`, in at least float32.

    Half precision does not even hold the integers above 256.
    """
    wide = accumulation_dtype(dtype)
    exponent = jnp.arange(0, features, 2, dtype=jnp.int32).astype(wide) / features
    return position.astype(wide)[..., None] * jnp.asarray(1e4, wide) ** -exponent


def relative_shift(scores: jax.Array) -> jax.Array:
    """Scores by distance made scores by key.

    Args:
        scores: `[..., L, K]`; entry `[i, p]` belongs to the distance `K - 1 - p`.

    Returns:
        `[..., L, K]`; entry `[i, j]` is that of query i, at position `M + i`, for its distance
        `M + i - j` to key j. Where j lies in the future of i the entry means nothing.

    Source: Dai et al., "Transformer-XL", 2019, appendix B: one column of zeros in front, and the
    rows cut anew from the same numbers, each of them one entry later.
    """
    *batch, queries, keys = scores.shape
    # On a mesh with explicit axes JAX does not guess what a reshape does to the other axes.
    sharding = jax.typeof(scores).sharding
    sharding = sharding if any(sharding.spec) else None
    padded = jnp.pad(scores, [(0, 0)] * (scores.ndim - 1) + [(1, 0)])
    padded = jnp.reshape(padded, (*batch, keys + 1, queries), out_sharding=sharding)[..., 1:, :]
    return jnp.reshape(padded, (*batch, queries, keys), out_sharding=sharding)


def sequence_blocks(length: int) -> int:
    """Blocks that the queries of a segment are taken in: one for each of its shards.

    These are as many as the mesh in context has devices along its axis `sequence`; 1 without a
    mesh, without that axis, inside a `shard_map` over it, or where it does not divide the length.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = "sequence" in mesh.manual_axes
    count = 1 if manual else mesh.shape.get("sequence", 1)
    return 1 if length % count else count


def whole_sequence(keys: jax.Array) -> jax.Array:
    """Keys or values `[B, L, ...]`, gathered where XLA shards their positions.

    Each query sees all of them. Left to itself XLA would gather them again in each trip of a
    backward solve, where they do not change, and would put memory and segment together in shards,
    which sends both around, before it gathers both.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if sequence_blocks(keys.shape[1]) == 1 or "sequence" not in mesh.auto_axes:
        return keys
    any_other = [PartitionSpec.UNCONSTRAINED] * (keys.ndim - 2)
    spec = PartitionSpec(PartitionSpec.UNCONSTRAINED, None, *any_other)
    return jax.lax.with_sharding_constraint(keys, spec)


def block_positions(positions: jax.Array, queries: int, blocks: int) -> jax.Array:
    """Of each block of queries, r of the distances that it may have to the keys.

    The last query of block n, of L / N queries, has the distance `M + (n + 1) L / N - 1` to the
    first key: row n is r from there on, and zero behind the distance 0.

    Args:
        positions: r, `[K, ...]`, of the distances `K - 1, ..., 0`.
        queries: L.
        blocks: N, a divisor of L.

    Returns:
        `[N, K, ...]`.
    """
    keys, size = len(positions), queries // blocks
    padded = jnp.pad(positions, [(0, queries - size)] + [(0, 0)] * (positions.ndim - 1))
    starts = range(queries - size, -1, -size)
    return jnp.stack([padded[start : start + keys] for start in starts])


def relative_scores(query: jax.Array, positions: jax.Array) -> jax.Array:
    """`q_i·r_{i-j}`, `[B, heads, L, K]`, in float32 or wider.

    Queries are taken in blocks, so that `relative_shift` cuts rows anew within a block alone: over
    a sharded axis of queries it would gather all scores.

    Args:
        query: `[B, L, heads, d]`.
        positions: r of N blocks, `[B, N, K, heads, d]`, from `block_positions`.
    """
    wide = accumulation_dtype(query.dtype)
    batch, length, *channels = query.shape
    blocks, keys = positions.shape[1:3]
    query = query.reshape(batch, blocks, length // blocks, *channels)
    scores = jnp.einsum("bnlhd,bnkhd->bhnlk", query, positions, preferred_element_type=wide)
    return relative_shift(scores).reshape(batch, channels[0], length, keys)


def rotary_tables(length: int, features: int, dtype: Any) -> jax.Array:
    """Cosines and sines of the angles `t 10000^(-2 i / features)`, `[length, 2, features / 2]`."""
    angle = _angles(jnp.arange(length, dtype=jnp.int32), features, dtype)
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], -2).astype(dtype)


def rotate(x: jax.Array, tables: jax.Array) -> jax.Array:
    """Rotary positions: channels i and i + d/2 of each head turned by the position's i-th angle.

    The product of a query and a key turned in this way depends on the distance of their positions
    alone.

    Args:
        x: `[B, L, heads, d]`.
        tables: `[B, L, 2, d / 2]`, see `rotary_tables`.

    Source: Su et al., "RoFormer", 2021; the pairing of channels is that of GPT-NeoX and Llama.
    """
    cos, sin = tables[:, :, None, 0], tables[:, :, None, 1]
    first, second = jnp.split(x, 2, -1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    position_scores: jax.Array | None = None,
    dropout: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`softmax((q·k + position_scores) / √d) v` over the keys that the mask leaves.

    The softmax is taken in float32 or wider.

    Args:
        query: `[B, L, heads, d]`.
        key: `[B, K, heads, d]`.
        value: likewise.
        mask: boolean `[B, L, K]`; each query must see a key.
        position_scores: `[B, heads, L, K]`, what positions add to the products.
        dropout: applied to the weights `[B, heads, L, K]`, which are not normalised again.

    Returns:
        `[B, L, heads, d]` in the dtype of `value`.
    """
    wide = accumulation_dtype(query.dtype)
    # JAX's function takes its softmax in float32, whatever it is given, and in half precision it
    # asks for an implicit promotion.
    if position_scores is None and dropout is None and wide == jnp.float32:
        with jax.numpy_dtype_promotion("standard"):
            return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None])
    scores = jnp.einsum("blhd,bkhd->bhlk", query, key, preferred_element_type=wide)
    if position_scores is not None:
        scores = scores + position_scores
    scores = jnp.where(mask[:, None], scores / math.sqrt(query.shape[-1]), jnp.finfo(wide).min)
    weights = dropped(dropout, jax.nn.softmax(scores, -1))
    return jnp.einsum("bhlk,bkhd->blhd", weights.astype(value.dtype), value)


def normalise(y: jax.Array, kind: Norm) -> jax.Array:
    """`y / √(mean(y²) + ε)` over the last axis, ε = 1e-5; for `layer` y is centred before.

    Without scale and bias, in float32 or wider. (Flax's layers fail in float64 under strict dtype
    promotion.)
    """
    wide = y.astype(accumulation_dtype(y.dtype))
    if kind == "layer":
        wide = wide - wide.mean(-1, keepdims=True)
    square = jnp.mean(wide * wide, -1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + NORM_EPSILON)).astype(y.dtype)


def dropped(dropout: Callable[[jax.Array], jax.Array] | None, y: jax.Array) -> jax.Array:
    """`dropout(y)`, or y where there is none."""
    return y if dropout is None else dropout(y)


def check_sequence(name: str, a: jax.Array, width: int, length: int | None = None) -> None:
    """Raises a ValueError unless the argument `name` is `[B, length, width]`; None for any."""
    if a.ndim != 3 or a.shape[2] != width or (length is not None and a.shape[1] != length):
        steps = "L" if length is None else length
        raise ValueError(f"{name} must be [B, {steps}, {width}], got {list(a.shape)}")
