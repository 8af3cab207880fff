"""A traced function made ready for a loop: all that is constant is taken out of its body.

What depends on the captured arrays alone is evaluated before the loop, once; the loop runs the
remaining equations. On the CPU some of these are done in another way than XLA would do them
(`gradients.cpu`): inside an XLA-CPU `while` loop the input-gradient convolution that autodiff
makes is many times slower than the same product prepared before it. That needs nothing from the
cell. Compilers for accelerators choose layouts and algorithms themselves and are left alone.

Equations are looked for in nested jaxprs too (`jit`, `custom_jvp`, `custom_vjp`, `checkpoint`),
not in control flow (`scan`, `while`, `cond`), which is left as it is. What stands under
`jax.checkpoint` stays in the loop, except for its kernels: it was put there to be recomputed
instead of stored.

The prepared function is for evaluation: differentiate the traced function instead.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from deq_jax.equation import Captured, Part, Traced, trace
from deq_jax.gradients.cpu import Replacement, replacement
from deq_jax.gradients.operations import (
    Operation,
    Program,
    Value,
    evaluate,
    flatten,
    mesh_axes,
    read,
    run,
)
from deq_jax.solvers.shrinking import Smaller

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A function of the state, ready for a loop.

    Attributes:
        function: the function.
        mesh_axes: names of the axes over which it communicates; a loop around it has to make as
            many trips on every device along them.
        source: the traced function and its captured arrays, where it was made from them.
        differentiable: it may be differentiated, because nothing was done to it.
        smaller: the function on some of the samples, for sizes that decrease; see `iterate`.
    """

    function: Callable[[PyTree], PyTree]
    mesh_axes: tuple[str, ...]
    source: tuple[Traced, Captured] | None = None
    differentiable: bool = False
    smaller: tuple[Smaller, ...] = ()

    def __call__(self, z: PyTree) -> PyTree:
        """The function at z."""
        return self.function(z)

    def linearize(self, z: PyTree) -> tuple[PyTree, "Prepared"]:
        """The function at z, and its derivative there, made ready for a loop in its turn."""
        traced, captured = self.source
        fz, push = jax.linearize(lambda z: traced(captured, z), z)
        return fz, prepare(*trace(push, z))


def prepare(traced: Traced, captured: Captured) -> Prepared:
    """`z -> traced(captured, z)`, with the work that does not depend on z done here and now.

    Args:
        traced: the function of the state.
        captured: its captured arrays.

    Returns:
        The same function of z for use inside a loop, equal up to rounding. Not to be
        differentiated.
    """
    program = flatten(traced.jaxpr, traced.values(captured))
    in_loop, stored = _split(program)
    replaced = {op: other for op in in_loop if (other := replacement(op)) is not None}
    known = [op.inputs[i] for op, other in replaced.items() for i in other.known]
    before: dict[Value, Any] = {}
    for value in [*stored, *known]:
        evaluate(value, before)
    ready = {
        op: other.before(*(before[op.inputs[i]] for i in other.known))
        for op, other in replaced.items()
    }
    stored_values = {value: before[value] for value in stored}

    def prepared(z: PyTree) -> PyTree:
        values = dict(stored_values)
        values.update(zip(program.inputs, jax.tree.leaves(z), strict=True))
        for op in in_loop:
            if op in replaced:
                values[op.outputs[0]] = _on_cpu(op, values, replaced[op], ready[op])
            else:
                run(op, values)
        return traced.out_tree.unflatten([read(value, values) for value in program.outputs])

    smaller = tuple(
        Smaller(part.size, functools.partial(_prepare_part, part, traced.values(captured)))
        for part in traced.smaller
    )
    return Prepared(prepared, mesh_axes(in_loop), (traced, captured), smaller=smaller)


def _prepare_part(part: Part, values: list[jax.Array], index: jax.Array) -> Prepared:
    return prepare(part.traced, part.captured(values, index))


def communicates(traced: Traced, captured: Captured) -> tuple[str, ...]:
    """Names of the axes over which the function communicates."""
    return mesh_axes(flatten(traced.jaxpr, traced.values(captured)).operations)


def _split(program: Program) -> tuple[list[Operation], list[Value]]:
    """The operations each trip has to run, in order, and the known values stored for them."""
    wanted, stored, in_loop = set(program.outputs), {}, []
    for op in reversed(program.operations):
        if not (op.equation.effects or wanted.intersection(op.outputs)):
            continue
        if op.hoistable:
            stored.update((value, None) for value in op.outputs if value in wanted)
            continue
        in_loop.append(op)
        wanted.update(op.inputs)
    return in_loop[::-1], list(stored)


def _on_cpu(
    op: Operation, values: dict[Value, Any], other: Replacement, ready: jax.Array | None
) -> jax.Array:
    """The operation, done the other way on the CPU and as it was written elsewhere."""
    inputs = [read(value, values) for value in op.inputs]

    def as_written(inputs: list[jax.Array], ready: jax.Array | None) -> jax.Array:
        values = dict(zip(op.inputs, inputs, strict=True))
        run(op, values)
        return values[op.outputs[0]]

    def replaced(inputs: list[jax.Array], ready: jax.Array | None) -> jax.Array:
        return other(inputs[0], ready)

    return lax.platform_dependent(inputs, ready, cpu=replaced, default=as_written)
