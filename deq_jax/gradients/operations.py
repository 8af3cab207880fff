"""A jaxpr as one flat list of operations over values, of which each can be run by itself.

Nested calls are inlined, values know whether they depend on captured arrays alone, and operations
whether they are worth doing once, ahead of a loop. Used by `gradients.prepared`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

_REMATERIALISED = frozenset({"remat", "remat2", "checkpoint"})
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})

_COLLECTIVES = frozenset(
    "psum psum_invariant pmax pmin ppermute all_gather all_gather_invariant all_to_all "  # noqa: SIM905
    "reduce_scatter pgather".split()
)

# Not worth an array of their own that each trip would read: elementwise operations, which the
# compiler fuses into what uses them, and operations that only spread out what they are given.
_CHEAP = frozenset(
    "add and broadcast_in_dim convert_element_type copy eq expand_dims ge gt iota le lt max min "  # noqa: SIM905
    "mul ne neg not or reshape select_n sign squeeze sub".split()
)


@dataclasses.dataclass(eq=False)
class Value:
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
    producer: "Operation | None" = None
    source_bytes: int = 0


@dataclasses.dataclass(eq=False)
class Operation:
    """One equation over values. `jaxpr` is the jaxpr it came from, for its debug information."""

    equation: Any
    jaxpr: Any
    inputs: list[Value]
    outputs: list[Value]
    rematerialised: bool
    hoistable: bool = False

    @property
    def name(self) -> str:
        """The primitive's name."""
        return self.equation.primitive.name


class Program(NamedTuple):
    """A flattened jaxpr.

    Attributes:
        inputs: values of its invars.
        operations: its equations and those of inlined calls, in order.
        outputs: what it returns.
    """

    inputs: list[Value]
    operations: list[Operation]
    outputs: list[Value]


def flatten(jaxpr: Any, constants: Sequence[Any]) -> Program:
    """Flattens `jaxpr`, whose first inputs are the arrays `constants`."""
    known = _constants(jaxpr, constants)
    inputs = [Value(known=False) for _ in _variables(jaxpr)[len(known) :]]
    operations: list[Operation] = []
    outputs = _inline(jaxpr, [*known, *inputs], operations, False)
    return Program(inputs, operations, outputs)


def _variables(jaxpr: Any) -> list[Any]:
    """Constvars and invars; where the one ends and the other begins depends on JAX's version."""
    return [*jaxpr.constvars, *jaxpr.invars]


def _constants(jaxpr: Any, arrays: Sequence[Any]) -> list[Value]:
    """Values of the first variables of `jaxpr`."""
    return [
        Value(known=True, constant=array, source_bytes=_bytes(variable.aval))
        for array, variable in zip(arrays, _variables(jaxpr), strict=False)
    ]


def _inline(
    jaxpr: Any,
    arguments: list[Value],
    operations: list[Operation],
    rematerialised: bool,
) -> list[Value]:
    """Appends the equations of `jaxpr` to `operations` and returns its outputs."""
    environment = dict(zip(_variables(jaxpr), arguments, strict=True))

    def value_of(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            return Value(known=True, constant=atom.val)
        return environment[atom]

    for equation in jaxpr.eqns:
        inputs = [value_of(atom) for atom in equation.invars]
        nested = _nested(equation)
        if nested is not None:
            inner, inner_constants = nested
            outputs = _inline(
                inner,
                [*_constants(inner, inner_constants), *inputs],
                operations,
                rematerialised or equation.primitive.name in _REMATERIALISED,
            )
        else:
            known = all(value.known for value in inputs) and not equation.effects
            operation = Operation(equation, jaxpr, inputs, [], rematerialised)
            size = sum(_bytes(variable.aval) for variable in equation.outvars)
            source = sum(value.source_bytes for value in inputs)
            cheap = operation.name in _CHEAP
            operation.hoistable = known and not rematerialised and not (cheap and size > source)
            outputs = [
                Value(
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
        if not contains(_body(params), "conv_general_dilated"):
            return None
    else:
        return None
    body = _body(params)
    if isinstance(body, core.ClosedJaxpr):
        return body.jaxpr, list(body.consts)
    return body, []


def _body(params: dict[str, Any]) -> Any:
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def contains(jaxpr: Any, primitive: str) -> bool:
    """Whether a primitive of this name occurs in the jaxpr or in those nested in it."""
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return any(
        equation.primitive.name == primitive
        or any(contains(inner, primitive) for inner in core.jaxprs_in_params(equation.params))
        for equation in jaxpr.eqns
    )


def mesh_axes(operations: Sequence[Operation]) -> tuple[str, ...]:
    """Names of the axes over which the operations, or jaxprs nested in them, communicate."""
    return tuple(sorted(set().union(*(_communicates(op.equation) for op in operations))))


def _communicates(equation: Any) -> set[str]:
    names: set[str] = set()
    if equation.primitive.name in _COLLECTIVES:
        axes = equation.params.get("axes", equation.params.get("axis_name", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        names.update(axis for axis in axes if isinstance(axis, str))
    for inner in core.jaxprs_in_params(equation.params):
        inner = inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner
        names.update(*(_communicates(nested) for nested in inner.eqns))
    return names


def evaluate(value: Value, values: dict[Value, Any]) -> None:
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
                run(top.producer, values)


def read(value: Value, values: dict[Value, Any]) -> Any:
    """The array of a value: computed, or a constant."""
    return values.get(value, value.constant)


def run(op: Operation, values: dict[Value, Any]) -> None:
    """Evaluates one equation, as a jaxpr of its own, so that JAX itself binds it."""
    variables = [v for v in op.equation.invars if not isinstance(v, core.Literal)]
    arguments = dict(
        zip(
            variables,
            (
                read(value, values)
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
