"""One cell after another, for the controls of equilibrium models, with rematerialisation."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

PyTree = Any


class SequenceCell(Protocol):
    """What the networks of this folder ask of a cell, an NNX module."""

    def zeros(self, x: Any, /) -> PyTree:
        """The zero state, to start from."""
        ...

    def inject(self, x: Any, /) -> PyTree:
        """What of the cell depends on its input alone."""
        ...

    def __call__(self, z: Any, injection: Any, /) -> PyTree:
        """One application."""
        ...


def apply_in_turn(
    cells: Sequence[SequenceCell],
    segment: Callable[[PyTree], PyTree],
    memories: Sequence[PyTree],
    keep: Callable[[SequenceCell, PyTree, PyTree], PyTree],
    *,
    remat: bool,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """Applies a cell once for each of `memories`, from the cell's zero state.

    Args:
        cells: one for all applications, or one for each, all of one make.
        segment: what a cell's `inject` takes, of one application's memory.
        memories: of each application; all None, or all of one shape.
        keep: what to return of an application, of `(cell, segment, state)` before it.
        remat: keep the state before each application alone for the backward pass.

    Returns:
        The last state, and what was kept of each application.
    """
    x, tied = segment(memories[0]), len(cells) == 1
    state = cells[0].zeros(x)
    # Without memory each application of one cell is given the same.
    shared = cells[0].inject(x) if tied and memories[0] is None else None
    if remat:
        return _scanned(cells, segment, memories, keep, state, shared)
    kept = []
    for index, memory in enumerate(memories):
        cell, x = cells[0 if tied else index], segment(memory)
        injection = cell.inject(x) if shared is None else shared
        kept.append(keep(cell, x, state))
        state = cell(state, injection)
    return state, tuple(kept)


def _scanned(
    cells: Sequence[SequenceCell],
    segment: Callable[[PyTree], PyTree],
    memories: Sequence[PyTree],
    keep: Callable[[SequenceCell, PyTree, PyTree], PyTree],
    state: PyTree,
    shared: PyTree,
) -> tuple[PyTree, tuple[PyTree, ...]]:
    """The same as a loop of the compiled program.

    In a program without a loop rematerialisation rests on barriers against common subexpressions,
    which XLA takes out on the CPU before it looks for these: nothing would be computed again there.
    For the loop, parameters of different cells are stacked, which is a copy of them.
    """
    tied = len(cells) == 1
    split = [nnx.split(cell, nnx.Param, ...) for cell in cells]
    definition, *states = split[0]
    params, rest = states

    @jax.checkpoint
    def body(carry: tuple[PyTree, PyTree], own: PyTree) -> tuple[PyTree, PyTree]:
        (state, rest), (values, memory) = carry, own
        values = (params, rest) if tied else values
        cell, x = nnx.merge(definition, *values, copy=True), segment(memory)
        injection = cell.inject(x) if shared is None else shared
        kept = keep(cell, x, state)
        state = cell(state, injection)
        after = nnx.state(cell, nnx.Not(nnx.Param))
        return ((state, after), (kept, None)) if tied else ((state, None), (kept, after))

    each = None if tied else _stack([tuple(values) for _, *values in split])
    start = state, rest if tied else None
    (state, after), (kept, each_after) = jax.lax.scan(
        body, start, (each, _stack(memories)), length=len(memories)
    )
    # What a cell has beside its parameters is that of its random streams.
    for index, cell in enumerate(cells):
        nnx.update(cell, after if tied else _entry(each_after, index))
    return state, tuple(_entry(kept, index) for index in range(len(memories)))


def _stack(trees: Sequence[PyTree]) -> PyTree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _entry(tree: PyTree, index: int) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[index], tree)
