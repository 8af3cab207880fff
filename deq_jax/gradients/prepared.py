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
from jax.extend import core

from deq_jax.equation import Captured, Traced

PyTree = Any

_REMATERIALISED = frozenset({"remat", "remat2", "checkpoint"})
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})

# Not worth an array of their own that each trip would read: elementwise operations, which the
# compiler fuses into what uses them, and operations that only spread out what they are given.
_CHEAP = frozenset(
    "add and broadcast_in_dim convert_element_type copy eq expand_dims ge gt iota le lt max min "  # noqa: SIM905
    "mul ne neg not or reshape select_n sign squeeze sub".split()
)


@dataclasses.dataclass(eq=False)
class _Value:
    """One array of the flattened program.

    Attributes:
        known: depends on the captured arrays alone.
        constant: its value where it is a literal or a constant of a nested jaxpr.
        producer: the operation that computes it; None for inputs and constants.
        source_bytes: bytes one trip reads for it if it is not stored: its own, or, where it is
            cheap to recompute, those of what it is computed from.
    """

    known: bool
    constant: Any = None
    producer: "_Operation | None" = None
    source_bytes: int = 0


@dataclasses.dataclass(eq=False)
class _Operation:
    """One equation over values. `jaxpr` is the jaxpr it came from, for its debug information."""

    equation: Any
    jaxpr: Any
    inputs: list[_Value]
    outputs: list[_Value]
    rematerialised: bool
    hoistable: bool = False

    @property
    def name(self) -> str:
        return self.equation.primitive.name


def prepare(traced: Traced, captured: Captured) -> Callable[[PyTree], PyTree]:
    """`z -> traced(captured, z)`, with the work that does not depend on z done here and now.

    Args:
        traced: the function of the state.
        captured: its captured arrays.

    Returns:
        The same function of z for use inside a loop, equal up to rounding. Not to be
        differentiated.
    """
    inputs = [_Value(known=False) for _ in traced.jaxpr.invars]
    constants = [
        _Value(known=True, constant=value, source_bytes=_bytes(variable.aval))
        for value, variable in zip(traced.values(captured), traced.jaxpr.constvars, strict=True)
    ]
    operations: list[_Operation] = []
    outputs = _flatten(traced.jaxpr, constants, inputs, operations, rematerialised=False)

    in_loop, stored = _split(operations, outputs)
    kernels = {op: op.inputs[1] for op in in_loop if _needs_new_kernel_layout(op)}
    before: dict[_Value, Any] = {}
    for value in [*stored, *kernels.values()]:
        _evaluate(value, before)
    ready = {op: _kernel_in_hwio(op, before[kernel]) for op, kernel in kernels.items()}
    stored_values = {value: before[value] for value in stored}

    def prepared(z: PyTree) -> PyTree:
        values = dict(stored_values)
        values.update(zip(inputs, jax.tree.leaves(z), strict=True))
        for op in in_loop:
            if op in ready:
                lhs, kernel = (_read(value, values) for value in op.inputs)
                values[op.outputs[0]] = _convolve(op, lhs, ready[op], kernel)
            else:
                _run(op, values)
        return traced.out_tree.unflatten([_read(value, values) for value in outputs])

    return prepared


def _flatten(
    jaxpr: Any,
    constants: list[_Value],
    arguments: list[_Value],
    operations: list[_Operation],
    rematerialised: bool,
) -> list[_Value]:
    """Appends the equations of `jaxpr` to `operations`, nested calls inlined; its outputs."""
    environment = dict(zip(jaxpr.constvars, constants, strict=True))
    environment.update(zip(jaxpr.invars, arguments, strict=True))

    def value_of(atom: Any) -> _Value:
        if isinstance(atom, core.Literal):
            return _Value(known=True, constant=atom.val)
        return environment[atom]

    for equation in jaxpr.eqns:
        inputs = [value_of(atom) for atom in equation.invars]
        nested = _nested(equation)
        if nested is not None:
            inner, inner_constants = nested
            outputs = _flatten(
                inner,
                [
                    _Value(known=True, constant=c, source_bytes=_bytes(v.aval))
                    for c, v in zip(inner_constants, inner.constvars, strict=True)
                ],
                inputs,
                operations,
                rematerialised or equation.primitive.name in _REMATERIALISED,
            )
        else:
            known = all(value.known for value in inputs) and not equation.effects
            operation = _Operation(equation, jaxpr, inputs, [], rematerialised)
            size = sum(_bytes(variable.aval) for variable in equation.outvars)
            source = sum(value.source_bytes for value in inputs)
            cheap = operation.name in _CHEAP
            operation.hoistable = known and not rematerialised and not (cheap and size > source)
            outputs = [
                _Value(
                    known,
                    producer=operation,
                    source_bytes=_bytes(variable.aval) if operation.hoistable else source,
                )
                for variable in equation.outvars
            ]
            operation.outputs = outputs
            operations.append(operation)
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [value_of(atom) for atom in jaxpr.outvars]


def _nested(equation: Any) -> tuple[Any, list[Any]] | None:
    """The jaxpr and constants to put in the place of a call; None to leave the equation alone."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        # A call that asks for shardings or compiler options of its own keeps them.
        plain = params.get("in_shardings", ()) + params.get("out_shardings", ())
        if params.get("compiler_options_kvs") or any(
            type(sharding).__name__ != "UnspecifiedValue" for sharding in plain
        ):
            return None
    elif name in _CUSTOM or name in _REMATERIALISED:
        if not _contains_convolution(_body(params)):
            return None
    else:
        return None
    body = _body(params)
    if isinstance(body, core.ClosedJaxpr):
        return body.jaxpr, list(body.consts)
    return body, []


def _body(params: dict[str, Any]) -> Any:
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def _contains_convolution(jaxpr: Any) -> bool:
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return any(
        equation.primitive.name == "conv_general_dilated"
        or any(_contains_convolution(inner) for inner in core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def _split(
    operations: list[_Operation], outputs: list[_Value]
) -> tuple[list[_Operation], list[_Value]]:
    """The operations each trip has to run, in order, and the known values stored for them."""
    wanted, stored, run = set(outputs), {}, []
    for op in reversed(operations):
        if not (op.equation.effects or wanted.intersection(op.outputs)):
            continue
        if op.hoistable:
            stored.update((value, None) for value in op.outputs if value in wanted)
            continue
        run.append(op)
        wanted.update(op.inputs)
    return run[::-1], list(stored)


def _evaluate(value: _Value, values: dict[_Value, Any]) -> None:
    """Computes a known value, and all it needs, into `values`."""
    pending = [value]
    while pending:
        top = pending[-1]
        if top in values:
            pending.pop()
        elif top.producer is None:
            values[top] = top.constant
        else:
            missing = [v for v in top.producer.inputs if v not in values]
            if missing:
                pending.extend(missing)
            else:
                _run(top.producer, values)


def _read(value: _Value, values: dict[_Value, Any]) -> Any:
    return values.get(value, value.constant)


def _run(op: _Operation, values: dict[_Value, Any]) -> None:
    """Evaluates one equation, as a jaxpr of its own, so that JAX itself binds it."""
    variables = [v for v in op.equation.invars if not isinstance(v, core.Literal)]
    arguments = dict(
        zip(
            variables,
            (
                _read(value, values)
                for value, atom in zip(op.inputs, op.equation.invars, strict=True)
                if not isinstance(atom, core.Literal)
            ),
            strict=True,
        )
    )
    alone = op.jaxpr.replace(
        constvars=[],
        invars=list(arguments),
        outvars=list(op.equation.outvars),
        eqns=[op.equation],
        effects=op.equation.effects,
    )
    results = core.jaxpr_as_fun(core.ClosedJaxpr(alone, []))(*arguments.values())
    values.update(zip(op.outputs, results, strict=True))


def _bytes(aval: Any) -> int:
    return int(np.prod(aval.shape)) * aval.dtype.itemsize


def _needs_new_kernel_layout(op: _Operation) -> bool:
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


def _kernel_in_hwio(op: _Operation, kernel: jax.Array) -> jax.Array:
    """The kernel, laid out `[*spatial, I, O]`; the barrier keeps the compiler from undoing it."""
    out, into, *spatial = op.equation.params["dimension_numbers"].rhs_spec
    return lax.optimization_barrier(lax.transpose(kernel, (*spatial, into, out)))


def _convolve(op: _Operation, lhs: jax.Array, ready: jax.Array, kernel: jax.Array) -> jax.Array:
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
        _run(op, values)
        return values[op.outputs[0]]

    return lax.platform_dependent(lhs, ready, kernel, cpu=channels_last, default=as_written)
