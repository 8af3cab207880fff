"""`lax.while_loop` in phases of fewer and fewer samples: those that have finished leave.

A phase runs on n samples until no more than the next smaller size are active. These are gathered
out of the carry, the next phase runs on them, and its results are written back to their places. All
sizes are static, so the loop is compiled once for each.

Known to be non-optimal: samples leave only at the given sizes, so up to half of a phase's samples
may have finished. A phase gathers a copy of its samples' share of the carry, all phases together
one more carry.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree

PyTree = Any
Body = Callable[[PyTree], PyTree]


class Phase(NamedTuple):
    """What runs on fewer samples: their static number n, and `at(index)` for the samples `[n]`."""

    size: int
    at: Callable[[jax.Array], Any]


def sizes(batch: int, smallest: int) -> tuple[int, ...]:
    """`ceil(batch / 2)`, `ceil(batch / 4)`, ..., `smallest`; none where `batch` is no larger."""
    found = []
    while batch > smallest:
        batch = max(math.ceil(batch / 2), smallest)
        found.append(batch)
    return tuple(found)


def while_shrinking(
    proceed: Callable[[PyTree], jax.Array],
    body: Body,
    start: PyTree,
    smaller: tuple[Phase, ...],
    axes: list[int | None],
) -> PyTree:
    """`lax.while_loop(proceed, body, start)`, of samples that are independent of each other.

    Args:
        proceed: as for `lax.while_loop`.
        body: likewise.
        start: likewise, with a field `active`, bool `[B]`; the result of a sample
            that is not active must not change any more.
        smaller: the body on some samples, for sizes that decrease.
        axes: the batch axis of each leaf of the carry; None for what the batch has in common.

    Returns:
        The last carry. What samples have in common is that of the last trip, whoever made it.
    """

    def run(body: Body, carry: PyTree, index: jax.Array | None, phase: int) -> PyTree:
        """The phases from `phase` on, on the samples `index` of the whole batch."""
        if phase == len(smaller):
            return lax.while_loop(proceed, body, carry)
        size, at = smaller[phase]

        def many(carry: PyTree) -> jax.Array:
            return proceed(carry) & (jnp.sum(carry.active) > size)

        def few(carry: PyTree) -> PyTree:
            chosen = jnp.argsort(~carry.active, stable=True)[:size]
            # JAX (0.10) takes what argsort returns for the same on all devices of a shard_map.
            chosen = tree.vary_over(chosen, tree.varying_axes(carry.active))
            among_all = chosen if index is None else tree.take(index, chosen)
            part = run(at(among_all), _gather(carry, chosen, axes), among_all, phase + 1)
            return _scatter(carry, part, chosen, axes)

        carry = lax.while_loop(many, body, carry)
        return lax.cond(proceed(carry), few, lambda carry: carry, carry)

    return run(body, start, None, 0)


def batch_axes(begin: Callable[..., PyTree], arguments: PyTree, size: int) -> list[int | None]:
    """The batch axis of each leaf of `begin(*arguments)`; None where there is none.

    Found by what changes if only `size` samples are given; `begin` is traced to see.

    Args:
        begin: a function of pytrees whose leaves have the batch on axis 0.
        arguments: the arguments of `begin`, for the whole batch.
        size: fewer samples than there are.

    Raises:
        ValueError: more than one axis of a leaf depends on the batch.
    """

    def at_size(arguments: PyTree) -> PyTree:
        return begin(*jax.tree.map(lambda leaf: leaf[:size], arguments))

    whole, part = (
        jax.tree_util.tree_leaves_with_path(jax.eval_shape(function, arguments))
        for function in (lambda arguments: begin(*arguments), at_size)
    )
    axes = []
    for (path, one), (_, other) in zip(whole, part, strict=True):
        differ = [i for i, n in enumerate(one.shape) if other.shape[i : i + 1] != (n,)]
        if len(differ) > 1 or one.ndim != other.ndim:
            raise ValueError(
                "to go on with some samples alone, at most one axis of what a solver keeps may be "
                f"the batch: leaf {jax.tree_util.keystr(path)} has shape {one.shape}, and "
                f"{other.shape} for {size} samples"
            )
        axes.append(differ[0] if differ else None)
    return axes


def _samples(leaf: jax.Array, index: jax.Array, axis: int) -> Any:
    return leaf.at[(slice(None),) * axis + (index,)]


def _gather(carry: PyTree, index: jax.Array, axes: list[int | None]) -> PyTree:
    """The carry of the samples `index`."""
    leaves, structure = jax.tree.flatten(carry)
    return jax.tree.unflatten(
        structure,
        (
            leaf
            if axis is None
            else _samples(leaf, index, axis).get(mode="promise_in_bounds", unique_indices=True)
            for leaf, axis in zip(leaves, axes, strict=True)
        ),
    )


def _scatter(carry: PyTree, part: PyTree, index: jax.Array, axes: list[int | None]) -> PyTree:
    """`carry` with `part` in the places of the samples `index`."""
    leaves, structure = jax.tree.flatten(carry)
    return jax.tree.unflatten(
        structure,
        (
            new
            if axis is None
            else _samples(leaf, index, axis).set(new, mode="promise_in_bounds", unique_indices=True)
            for leaf, new, axis in zip(leaves, jax.tree.leaves(part), axes, strict=True)
        ),
    )
