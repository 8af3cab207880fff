"""A jaxpr as one flat list of equations: nested calls are put in their places."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from deq_jax import _compat

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "eval_jaxpr"})
_CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
_REMATERIALISED = frozenset({"remat", "remat2", "checkpoint"})


@dataclasses.dataclass(frozen=True)
class Operation:
    """An equation, and whether it stands under `jax.checkpoint`, to be computed in each trip."""

    equation: Any
    rematerialised: bool = False


@dataclasses.dataclass(frozen=True)
class Flat:
    """A flattened jaxpr.

    Attributes:
        jaxpr: where it comes from.
        invars: its inputs.
        operations: its equations and those of the calls in it, in order.
        outvars: its outputs.
    """

    jaxpr: Any
    invars: list[Any]
    operations: list[Operation]
    outvars: list[Any]


def flatten(jaxpr: Any, *, keep_rules: bool = False) -> Flat:
    """Inlines calls: `jit`, and `custom_jvp`, `custom_vjp`, `checkpoint` where they convolve.

    Control flow (`scan`, `while`, `cond`) is left as it is. With `keep_rules`, for a function that
    is going to be differentiated, `jit` alone is inlined.
    """
    variables = {variable: variable for variable in jaxpr.invars}
    operations = list(_inlined(jaxpr, variables, keep_rules))
    return Flat(jaxpr, list(jaxpr.invars), operations, _substituted(jaxpr.outvars, variables))


def inline(
    jaxpr: Any, arguments: Sequence[Any], *, keep_rules: bool = False
) -> tuple[list[Any], list[Any]]:
    """The equations of `jaxpr` on these atoms, flattened, and the atoms that it returns."""
    variables = dict(zip(jaxpr.invars, arguments, strict=True))
    operations = _inlined(jaxpr, variables, keep_rules)
    return [op.equation for op in operations], _substituted(jaxpr.outvars, variables)


def _inlined(
    jaxpr: Any, variables: dict[Any, Any], keep_rules: bool, rematerialised: bool = False
) -> Iterator[Operation]:
    """The equations of `jaxpr`; `variables` says what stands for its inputs and is filled up."""
    for equation in jaxpr.eqns:
        arguments = _substituted(equation.invars, variables)
        body, constants = _body_to_inline(equation, keep_rules)
        if body is None:
            # A name of its own for each output: one jaxpr may be inlined in several places.
            outputs = [
                variable
                if isinstance(variable, _compat.DropVar)
                else _compat.new_variable(variable)
                for variable in equation.outvars
            ]
            yield Operation(equation.replace(invars=arguments, outvars=outputs), rematerialised)
        else:
            inner = dict(zip(body.constvars, constants, strict=False))
            inner.update(zip(body.invars, arguments, strict=True))
            deeper = rematerialised or equation.primitive.name in _REMATERIALISED
            yield from _inlined(body, inner, keep_rules, deeper)
            outputs = _substituted(body.outvars, inner)
        variables.update(zip(equation.outvars, outputs, strict=True))


def _substituted(atoms: Sequence[Any], variables: dict[Any, Any]) -> list[Any]:
    return [atom if isinstance(atom, _compat.Literal) else variables[atom] for atom in atoms]


def _body_to_inline(equation: Any, keep_rules: bool) -> tuple[Any, list[Any]]:
    """The jaxpr to put in the place of a call; None to leave the equation alone."""
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        # A call that asks for shardings or compiler options of its own keeps them.
        plain = params.get("in_shardings", ()) + params.get("out_shardings", ())
        if params.get("compiler_options_kvs") or any(
            type(sharding).__name__ != "UnspecifiedValue" for sharding in plain
        ):
            return None, []
    elif name in _CUSTOM | _REMATERIALISED:
        if keep_rules or not any(
            _compat.contains(body, "conv_general_dilated") for body in _compat.nested(equation)
        ):
            return None, []
    else:
        return None, []
    body, constants = _compat.opened(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"])
    return (body, []) if not constants else (None, [])
