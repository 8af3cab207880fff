"""Functions given as options: the arrays that they close over are leaves of a pytree.

A preconditioner or a predicate of valid states is a plain Python function, and the natural way to
write one is to close over arrays: `lambda z, v: v / diagonal`. Under `jit` and `grad` these arrays
are traced, and have to reach the solve as its other inputs do. `Captured` takes a function apart
into its code, which is static, and the arrays in its closure, its defaults, the arguments of a
`functools.partial` or the object of a bound method, which are leaves.

`closure.close` does the same for f by tracing it. That needs the shapes of f's arguments, which
are not yet known where options are made.
"""

import functools
import types
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax import kept

Rebuild = Callable[[Iterator[Any]], Any]


@jax.tree_util.register_pytree_node_class
class Captured:
    """A function whose captured arrays are leaves, without derivatives.

    Attributes:
        function: the function.
    """

    def __init__(self, function: Callable[..., Any]):
        given: Any = function
        taken = given.function if isinstance(given, Captured) else given
        self.function: Callable[..., Any] = taken

    def __call__(self, *args: Any) -> Any:
        """The function's value."""
        return self.function(*args)

    def __repr__(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Captured) and self.function == other.function

    def tree_flatten(self) -> tuple[list[Any], Any]:
        """The arrays, and how to put the function together from others."""
        arrays: list[Any] = []
        key, rebuild = _take_apart(self.function, arrays, frozenset())
        return arrays, _Skeleton(key, rebuild)

    @classmethod
    def tree_unflatten(cls, skeleton: Any, arrays: Any) -> "Captured":
        """The function with these arrays."""
        return cls(skeleton.rebuild(iter(arrays)))


class _Skeleton:
    """A function without its arrays; equal to another if both certainly do the same."""

    def __init__(self, key: Hashable | None, rebuild: Rebuild):
        self.key, self.rebuild = key, rebuild

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Skeleton) and self.key == other.key
        return self is other or (same and self.key is not None)


def _take_apart(
    value: Any, arrays: list[Any], seen: frozenset[int]
) -> tuple[Hashable | None, Rebuild]:
    """Appends the arrays in `value`; a key for all else, None if unknown, and the way back."""
    value = getattr(value, "__wrapped__", value) if isinstance(value, _JITTED) else value
    if isinstance(value, jax.Array):
        inexact = jnp.issubdtype(value.dtype, jnp.inexact)
        arrays.append(lax.stop_gradient(value) if inexact else value)
        return "array", next
    if isinstance(value, np.ndarray | np.generic):  # static, as the indices of a gather may be
        fixed = np.array(value)
        return (str(fixed.dtype), fixed.shape, fixed.tobytes()), lambda _: value
    if isinstance(value, functools.partial):
        parts, build = [value.func, value.args, value.keywords], _partial
    elif isinstance(value, types.MethodType):
        parts, build = [value.__func__, value.__self__], _method
    elif isinstance(value, types.FunctionType) and id(value) not in seen and _holds(value):
        seen |= {id(value)}
        cells = tuple(_contents(cell) for cell in value.__closure__ or ())
        parts = [cells, value.__defaults__, value.__kwdefaults__]
        build = functools.partial(_function, value)
    else:
        leaves, structure = jax.tree.flatten(value)
        if len(leaves) == 1 and leaves[0] is value:  # a function or an object, as it is
            return kept.contents(value), lambda _: value
        parts, build = leaves, functools.partial(_tree, structure)
    taken = [_take_apart(part, arrays, seen) for part in parts]
    keys = [key for key, _ in taken]

    def rebuild(given: Iterator[Any]) -> Any:
        return build([part(given) for _, part in taken])

    kind: Any = type(value)
    key = None if None in keys else (kind, _fixed(value, build), *keys)
    return key, rebuild


_JITTED = type(jax.jit(lambda: None))


def _fixed(value: Any, build: Any) -> Hashable:
    """What a value is besides its parts."""
    if isinstance(value, types.FunctionType):
        return kept.contents(_without_arrays(value))
    return build.args if isinstance(build, functools.partial) else None


_stripped: dict[Hashable, types.FunctionType] = {}


def _without_arrays(function: types.FunctionType) -> types.FunctionType:
    """The function with nothing in its closure, the same object for the same code."""
    key = function.__code__, id(function.__globals__)
    if key not in _stripped:
        cells = tuple(types.CellType(None) for _ in function.__closure__ or ())
        _stripped[key] = types.FunctionType(
            function.__code__, function.__globals__, function.__name__, None, cells
        )
    return _stripped[key]


def _holds(function: types.FunctionType) -> bool:
    return bool(function.__closure__ or function.__defaults__ or function.__kwdefaults__)


_EMPTY = object()


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return _EMPTY


def _partial(parts: list[Any]) -> Any:
    function, args, keywords = parts
    return functools.partial(function, *args, **keywords)


def _method(parts: list[Any]) -> Any:
    return types.MethodType(*parts)


def _function(like: types.FunctionType, parts: list[Any]) -> Any:
    contents, defaults, keyword_defaults = parts
    cells = tuple(types.CellType() if c is _EMPTY else types.CellType(c) for c in contents)
    new = types.FunctionType(like.__code__, like.__globals__, like.__name__, defaults, cells)
    new.__kwdefaults__ = keyword_defaults
    return new


def _tree(structure: Any, leaves: list[Any]) -> Any:
    return jax.tree.unflatten(structure, leaves)
