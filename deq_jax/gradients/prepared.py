"""A traced function made ready for a loop: all that is constant is taken out of its body.

Inside an XLA-CPU `while` loop a convolution is many times slower when its kernel does not lie in
memory as HWIO (jax#12868, open): the compiler may not change the layout of an array that is
carried into the loop. The input-gradient convolution which autodiff makes is of that kind, so every
ordinary convolution cell pays for it in its backward loop. The cure here needs nothing from the
cell: before the loop, evaluate what depends on the captured arrays alone (the flip of the kernel
among it) and lay each kernel out as HWIO behind an `optimization_barrier`; in the loop, run the
remaining equations, with the convolutions' dimension numbers set accordingly. The convolutions are
changed on the CPU only; compilers for accelerators recognise the usual form and choose layouts
themselves.

Equations are looked for in nested jaxprs too (`jit`, `custom_jvp`, `custom_vjp`, `checkpoint`),
not in control flow (`scan`, `while`, `cond`), which is left as it is. What stands under
`jax.checkpoint` stays in the loop, except for its kernels: it was put there to be recomputed
instead of stored.

The prepared function is for evaluation: differentiate the traced function instead.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from deq_jax.equation import Captured, Traced, trace
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
    """

    function: Callable[[PyTree], PyTree]
    mesh_axes: tuple[str, ...]
    source: tuple[Traced, Captured] | None = None
    differentiable: bool = False

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
    kernels = {op: op.inputs[1] for op in in_loop if _needs_new_kernel_layout(op)}
    before: dict[Value, Any] = {}
    for value in [*stored, *kernels.values()]:
        evaluate(value, before)
    ready = {op: _kernel_in_hwio(op, before[kernel]) for op, kernel in kernels.items()}
    stored_values = {value: before[value] for value in stored}

    def prepared(z: PyTree) -> PyTree:
        values = dict(stored_values)
        values.update(zip(program.inputs, jax.tree.leaves(z), strict=True))
        for op in in_loop:
            if op in ready:
                lhs, kernel = (read(value, values) for value in op.inputs)
                values[op.outputs[0]] = _convolve(op, lhs, ready[op], kernel)
            else:
                run(op, values)
        return traced.out_tree.unflatten([read(value, values) for value in program.outputs])

    return Prepared(prepared, mesh_axes(in_loop), (traced, captured))


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


def _needs_new_kernel_layout(op: Operation) -> bool:
    """A convolution by a known kernel, not in the form NHWC with HWIO already."""
    if op.name != "conv_general_dilated" or not op.inputs[1].known:
        return False
    params = op.equation.params
    return params["batch_group_count"] == 1 and params["dimension_numbers"] != _channels_last(
        op.equation.invars[0].aval.ndim
    )


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Dimension numbers of `[N, *spatial, C]` inputs and `[*spatial, I, O]` kernels."""
    spatial = tuple(range(1, ndim - 1))
    return lax.ConvDimensionNumbers(
        lhs_spec=(0, ndim - 1, *spatial),
        rhs_spec=(ndim - 1, ndim - 2, *range(ndim - 2)),
        out_spec=(0, ndim - 1, *spatial),
    )


def _kernel_in_hwio(op: Operation, kernel: jax.Array) -> jax.Array:
    """The kernel, laid out `[*spatial, I, O]`; the barrier keeps the compiler from undoing it."""
    out, into, *spatial = op.equation.params["dimension_numbers"].rhs_spec
    return lax.optimization_barrier(lax.transpose(kernel, (*spatial, into, out)))


def _convolve(op: Operation, lhs: jax.Array, ready: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of `op`: on the CPU channels last with the kernel made ready for it."""
    params = op.equation.params
    numbers = params["dimension_numbers"]

    def channels_last(lhs: jax.Array, ready: jax.Array, kernel: jax.Array) -> jax.Array:
        batch, channel, *spatial = numbers.lhs_spec
        out = lax.conv_general_dilated(
            lax.transpose(lhs, (batch, *spatial, channel)),
            ready,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=_channels_last(lhs.ndim),
            feature_group_count=params["feature_group_count"],
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )
        batch, channel, *spatial = numbers.out_spec
        return lax.transpose(out, tuple(np.argsort((batch, *spatial, channel))))

    def as_written(lhs: jax.Array, ready: jax.Array, kernel: jax.Array) -> jax.Array:
        values = dict(zip(op.inputs, (lhs, kernel), strict=True))
        run(op, values)
        return values[op.outputs[0]]

    return lax.platform_dependent(lhs, ready, kernel, cpu=channels_last, default=as_written)
