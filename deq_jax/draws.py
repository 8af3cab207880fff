"""Random numbers that f draws on a shard are those that it draws on one device.

On a shard f has fewer samples. From one key it would draw the same numbers on every shard, and
other numbers than on one device. Here each draw for the samples of a shard becomes the shard's rows
of the draw for the whole batch. Two traces of f show which draws these are, one for the shard and
one for as many samples as the whole batch has: a draw whose shape grows is made for each sample,
and all other draws are the same for all samples.

Known to be non-optimal: each shard draws the numbers of the whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import _compat, tree

PyTree = Any

_DRAWS = frozenset({"random_bits", "random_split", "random_gamma"})
"""Primitives that draw numbers or keys of a shape from keys: `[*shape of keys, *shape]`."""

_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
"""Primitives that call a jaxpr once and have no derivative rule of their own."""


def repeated(samples: PyTree, axes: tuple[str, ...]) -> PyTree:
    """The samples of one shard, repeated until they are as many as those of all shards."""
    return jax.tree.map(lambda leaf: jnp.concatenate([leaf] * _count(axes)), samples)


def as_on_one_device(
    function: Callable[..., PyTree], widen: Callable[..., tuple[Any, ...]], axes: tuple[str, ...]
) -> Callable[..., PyTree]:
    """`function` on a shard of the batch, with the random numbers of the whole batch.

    Args:
        function: a function of pytrees of arrays.
        widen: makes arguments of `function` for the whole batch out of those for a shard.
        axes: the mesh axes over which the batch is split.

    Returns:
        A function with the same arguments and results, to be called on a shard.

    Raises:
        ValueError: in the call: `function` draws numbers for each sample in a loop, a branch or a
            custom derivative, or makes other draws for the whole batch than for a shard.
    """

    def drawn(*args: PyTree) -> PyTree:
        jaxpr, captured, out_tree = _compat.trace(function, *args)
        shapes = draw_shapes(jaxpr)
        if not shapes:
            return function(*args)
        whole = draw_shapes(_compat.trace(lambda *args: function(*widen(*args)), *args)[0])
        if [len(shape) for shape in shapes] != [len(shape) for shape in whole]:
            raise ValueError(
                f"{_name(axes)}: f draws random numbers of the shapes {shapes} for a shard and "
                f"{whole} for the whole batch, so that a shard cannot take its part of them"
            )
        plan = [grown(shape, other) for shape, other in zip(shapes, whole, strict=True)]
        values = [*captured, *jax.tree.leaves(args)]
        return jax.tree.unflatten(out_tree, _evaluate(jaxpr, values, iter(plan), axes))

    return drawn


def shown(axes: tuple[str, ...]) -> str:
    """The axes as they were given, for messages: a name alone, or a tuple."""
    (first, *others) = axes
    return repr(axes if others else first)


def _name(axes: tuple[str, ...]) -> str:
    return f"Execution(shard_axis={shown(axes)})"


def _count(axes: tuple[str, ...]) -> int:
    return lax.axis_size(axes)


def draw_shapes(jaxpr: Any) -> list[tuple[int, ...]]:
    """The shapes that the draws of a jaxpr draw from each key, in order."""
    found = _compat.all_equations(jaxpr)
    return [_drawn_shape(equation) for equation in found if equation.primitive.name in _DRAWS]


def _drawn_shape(equation: Any) -> tuple[int, ...]:
    keys = equation.invars[0].aval.ndim
    return equation.outvars[0].aval.shape[keys:]


def grown(shape: tuple[int, ...], whole: tuple[int, ...]) -> int | None:
    """The axis of a draw that is the batch; None where there is none."""
    axes = [axis for axis, (n, other) in enumerate(zip(shape, whole, strict=True)) if n != other]
    return axes[0] if axes else None


def _evaluate(
    jaxpr: Any, values: Sequence[Any], plan: Iterator[int | None], axes: tuple[str, ...]
) -> list[Any]:
    """The outputs of a jaxpr whose draws are made as `plan` says, an axis or None for each."""
    known = dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, _compat.Literal) else known[atom]

    for equation in jaxpr.eqns:
        name, bodies = equation.primitive.name, _compat.nested(equation)
        given = [value(atom) for atom in equation.invars]
        draws = [next(plan) for body in bodies for _ in draw_shapes(body)]
        draws += [next(plan)] if name in _DRAWS else []
        drawn = any(axis is not None for axis in draws)
        # A shard's rows vary over the mesh axes, which a draw by a key in a closure did not.
        changed = any(map(_varies_more, given, equation.invars))
        if changed:
            given = tree.vary_over(given, tree.varying_axes(given))
        if drawn and not bodies:
            results = [_rows_of_draw(jaxpr, equation, given, draws[0], axes)]
        elif name == "pvary" and changed:
            results = given
        elif name in _CALLS and (drawn or changed):
            body, constants = _compat.opened(equation.params["jaxpr"])
            results = _evaluate(body, [*constants, *given], iter(draws), axes)
        elif bodies and (drawn or changed):
            raise ValueError(
                f"{_name(axes)}: f draws random numbers for each sample inside of a {name}, or "
                f"gives numbers drawn by a key that it closes over to a {name}, where a shard "
                "cannot take its part of them; draw before and pass the key in params, or pass a "
                "key for each sample in x"
            )
        else:
            results = _compat.bind(jaxpr, equation, given)
        known.update(zip(equation.outvars, results, strict=True))
    return [value(atom) for atom in jaxpr.outvars]


def _varies_more(value: Any, atom: Any) -> bool:
    return bool(_compat.varying_axes(value) - _compat.varying_axes_of(atom))


def _rows_of_draw(
    jaxpr: Any, equation: Any, given: Sequence[Any], axis: Any, axes: tuple[str, ...]
) -> Any:
    """The part of the whole batch's draw that belongs to this shard."""
    shape = list(_drawn_shape(equation))
    length = shape[axis]
    shape[axis] *= _count(axes)
    axis += equation.invars[0].aval.ndim
    if equation.primitive.name == "random_gamma":  # its shape is that of an argument
        key, alpha = given
        given = key, jnp.concatenate([alpha] * _count(axes), axis)
        (drawn,) = _compat.bind(jaxpr, equation, given)
    else:
        (drawn,) = _compat.bind(jaxpr, equation, given, shape=tuple(shape))
    return lax.dynamic_slice_in_dim(drawn, lax.axis_index(axes) * length, length, axis)
