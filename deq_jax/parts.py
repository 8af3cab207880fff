"""An equation traced for fewer and fewer of its samples, so that finished ones can leave the loop.

f is traced once more for each size. z and x bring the samples and are gathered; `params` and what f
closes over are the same for all. Which captured array is which is settled here, because where the
smaller equations are used, in the rules of a derivative, f is no longer at hand.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from deq_jax import tree
from deq_jax.equation import (
    Captured,
    Origin,
    Part,
    Traced,
    checked_cell,
    trace,
    trace_equation,
)
from deq_jax.mixing import check_apart

PyTree = Any


def trace_in_parts(
    f: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    z: PyTree,
    *,
    shrink_to: int,
    cell_dtype: Any = None,
) -> tuple[Traced, Captured]:
    """`equation.trace_equation` of a batch, also for `ceil(B / 2)`, `ceil(B / 4)`, ... samples.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        x: likewise; every leaf has the batch on axis 0.
        z: likewise.
        shrink_to: the smallest size.
        cell_dtype: see `trace_equation`.

    Raises:
        ValueError: f returns something else than z; a leaf of x has no batch axis; f fails on
            fewer samples, or can be seen to mix samples.
    """
    batch = jax.tree.leaves(z)[0].shape[0]
    numbers = sizes(batch, shrink_to)
    x = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf), x)
    _check_batch(x, batch, shrink_to)
    if not numbers:
        return trace_equation(f, params, x, z, batched=True, cell_dtype=cell_dtype)
    cell = checked_cell(f, params, cell_dtype)

    def g(pair: tuple[PyTree, PyTree]) -> PyTree:
        return cell(*pair)

    varied = tree.vary_with(z, (params, x))
    traced, shared = trace(g, (varied, x))
    if varied is not z:  # see `trace_equation`
        varied = tree.vary_with(varied, shared)
        traced, shared = trace(g, (varied, x))
    inputs = jax.tree.leaves(x)
    equation, used = _capture_last(traced, [_is_variable(leaf) for leaf in inputs])
    known = traced.values(shared)
    captured = equation.captured([*known, *(inputs[i] for i in used)])
    positions = {id(value): Origin(position) for position, value in enumerate(known)}
    given = {i: Origin(len(known) + k, per_sample=True) for k, i in enumerate(used)}

    parts = []
    for size in numbers:
        where = f"Execution(shrink_to={shrink_to}): f on {size} of the {batch} samples"
        smaller, own = _trace_part(g, varied, x, size, where)
        check_apart(traced.jaxpr, smaller.jaxpr, shrink_to)
        part, used = _capture_last(smaller, [_is_variable(leaf) for leaf in inputs])
        origins = [_origin(value, positions, where) for value in smaller.values(own)]
        if not given.keys() >= set(used):
            raise ValueError(f"{where} uses leaves of x which it does not use on all samples")
        parts.append(Part(size, part, (*origins, *(given[i] for i in used))))
    return Traced(equation.jaxpr, equation.is_variable, equation.out_tree, tuple(parts)), captured


def sizes(batch: int, smallest: int) -> list[int]:
    """`ceil(batch / 2)`, `ceil(batch / 4)`, ..., `smallest`; none where `batch` is no larger."""
    found = []
    while batch > smallest:
        batch = max(math.ceil(batch / 2), smallest)
        found.append(batch)
    return found


def _trace_part(
    g: Callable[[PyTree], PyTree], z: PyTree, x: PyTree, size: int, where: str
) -> tuple[Traced, Captured]:
    """Traces g for `size` samples."""

    def gathered(z: PyTree, x: PyTree) -> tuple[PyTree, PyTree]:
        # By an index made from z, as in the loop, so that mesh axes vary as they will there.
        index = tree.zeros_per_sample(z)[:size].astype(jnp.int32)
        return tree.take((z, x), index)

    try:
        return trace(g, jax.eval_shape(gathered, z, x))
    except Exception as error:
        raise ValueError(
            f"{where} fails. It must treat each sample by itself, at any batch size; what belongs "
            "to a sample, like a mask `[B, ...]`, has to come in z or x, which are gathered, and "
            f"not in params or a closure. The error: {error}"
        ) from error


def _capture_last(traced: Traced, flags: list[bool]) -> tuple[Traced, list[int]]:
    """`traced` with its last arguments, one for each flag, captured; and which of them it uses."""
    jaxpr = traced.jaxpr
    first = len(jaxpr.invars) - len(flags)
    needed = {v for equation in jaxpr.eqns for v in equation.invars if isinstance(v, core.Var)}
    needed.update(v for v in jaxpr.outvars if isinstance(v, core.Var))
    used = [i for i in range(len(flags)) if jaxpr.invars[first + i] in needed]
    captured = len(traced.is_variable)
    invars = [
        *jaxpr.invars[:captured],
        *(jaxpr.invars[first + i] for i in used),
        *jaxpr.invars[captured:first],
    ]
    is_variable = (*traced.is_variable, *(flags[i] for i in used))
    return Traced(jaxpr.replace(invars=invars), is_variable, traced.out_tree), used


def _is_variable(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer) and jnp.issubdtype(value.dtype, jnp.inexact)


def _origin(value: Any, positions: dict[int, Origin], where: str) -> Origin:
    if id(value) in positions:
        return positions[id(value)]
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{where} uses an array {value.aval} which it does not use on all samples")
    return Origin(None, own=value)


def _check_batch(x: PyTree, batch: int, shrink_to: int) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if leaf.shape[:1] != (batch,):
            raise ValueError(
                f"Execution(shrink_to={shrink_to}) gathers samples of x, so every leaf of x must "
                f"have the batch on axis 0: leaf {jax.tree_util.keystr(path) or '(the whole)'}: "
                f"got shape {leaf.shape}, expected ({batch}, ...); what is the same for all "
                "samples belongs in params"
            )
