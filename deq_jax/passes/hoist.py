"""Work that does not depend on the state is taken out of a loop's body.

XLA does this by itself for a plain loop, but not out of the branch in which `solve` evaluates f on
the CPU, and not for kernels behind an `optimization_barrier`. On `tanh(z @ W + x @ U + b)` the
product `x @ U` is hoisted here; for convolutions their kernels, laid out as `passes.cpu` wants.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

from deq_jax import _compat
from deq_jax.closure import Closure
from deq_jax.passes.flatten import Flat, Operation

_CHEAP = frozenset(
    "add and broadcast_in_dim convert_element_type copy eq expand_dims ge gt iota le lt max min "  # noqa: SIM905
    "mul ne neg not or reshape select_n sign squeeze sub".split()
)
"""Elementwise operations, which the compiler fuses with the operations that use them, and
operations that only broadcast. A result that is larger than its inputs is not hoisted: reading it
in each trip would cost more than computing it."""


def hoist(f: Closure, flat: Flat) -> Closure:
    """`f`, given as `flat`, with all that its arrays determine computed here and now."""
    given = flat.invars[: len(f.arrays)]
    known, hoisted = _divide(given, flat.operations)
    # What the loop runs, and what has to be stored for it.
    inside = _needed([op for op in flat.operations if op not in hoisted], flat.outvars)
    used = _variables(atom for op in inside for atom in op.equation.invars)
    used.update(_variables(flat.outvars))
    made = {v: None for op in hoisted for v in op.equation.outvars if v in used}
    if not made and len(inside) == len(flat.operations) == len(flat.jaxpr.eqns):
        return f  # nothing is gained
    # What is computed before the loop.
    before = [op.equation for op in _needed(known, list(made))]
    stored = _compat.evaluate(
        _compat.with_equations(flat.jaxpr, given, before, list(made)), f.values()
    )
    kept = [(v, array) for v, array in zip(given, f.values(), strict=True) if v in used]
    variables = [*(v for v, _ in kept), *made]
    body = _compat.with_equations(
        flat.jaxpr,
        [*variables, *flat.invars[len(f.arrays) :]],
        [op.equation for op in inside],
        flat.outvars,
    )
    arrays = [*(array for _, array in kept), *stored]
    made_ready = Closure.around(arrays, body, f.program.out_tree)
    return dataclasses.replace(made_ready, takes_step=f.takes_step)


def _divide(
    given: list[Any], operations: list[Operation]
) -> tuple[list[Operation], dict[Operation, None]]:
    """The operations that depend on the variables `given` alone, and those worth doing once."""
    # For each known variable the bytes that a trip reads for it if it is not stored.
    source = {variable: _bytes(variable) for variable in given}
    known: list[Operation] = []
    hoisted: dict[Operation, None] = {}
    for op in operations:
        inputs = _variables(op.equation.invars)
        if op.equation.effects or not source.keys() >= inputs:
            continue
        known.append(op)
        read = sum(source[v] for v in inputs)
        size = sum(map(_bytes, op.equation.outvars))
        cheap = op.equation.primitive.name in _CHEAP
        worth = not op.rematerialised and not (cheap and size > read)
        if worth:
            hoisted[op] = None
        source.update((v, _bytes(v) if worth else read) for v in op.equation.outvars)
    return known, hoisted


def _needed(operations: list[Operation], wanted: list[Any]) -> list[Operation]:
    """The operations on which the variables `wanted` depend, and those with effects."""
    variables, found = _variables(wanted), []
    for op in reversed(operations):
        if op.equation.effects or variables.intersection(op.equation.outvars):
            found.append(op)
            variables.update(_variables(op.equation.invars))
    return found[::-1]


def _variables(atoms: Iterable[Any]) -> set[Any]:
    return {atom for atom in atoms if not isinstance(atom, _compat.Literal)}


def _bytes(variable: Any) -> int:
    """Size of an array; a symbolic dimension counts as one."""
    aval = variable.aval
    return math.prod(n for n in aval.shape if isinstance(n, int)) * aval.dtype.itemsize
