"""Whether a function is still what it was, so that what was made from it can be used again.

A call outside of `jax.jit` must see every change of what f uses. `contents` describes all that f
holds besides its code. If two descriptions are equal, tracing f again would give the same program;
where a description cannot be given, f is traced again.
"""

import dataclasses
import enum
import functools
import types
from collections.abc import Hashable, Iterator, Mapping, MutableMapping
from typing import Any

import jax
import numpy as np

_Jitted = type(jax.jit(lambda: None))
_CONSTANTS = (
    types.CodeType,
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    np.dtype,
    enum.Enum,
)
_LIBRARIES = frozenset(
    {"builtins", "jax", "jaxlib", "numpy", "flax", "deq_jax", "math", "operator", "functools"}
)


def contents(value: Any) -> Hashable | None:
    """A description of what `value` holds, equal for equal contents.

    Returns:
        None if it holds an array, which may be large or change in place, or an object that this
        function cannot look into.
    """
    try:
        return tuple(_describe(value, {}))
    except _Unknown:
        return None


class Same:
    """Equal to itself and to nothing else, whatever the value compares like."""

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value


class _Unknown(Exception):
    """Something in the value cannot be described."""


def _describe(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[Hashable]:
    """The description of a value, where `seen` has the values so far by their addresses."""
    kind: Any = type(value)
    yield kind
    if isinstance(value, _CONSTANTS):
        yield repr(value) if isinstance(value, float | complex) else value
        return
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        raise _Unknown(type(value))
    if isinstance(value, types.ModuleType | types.BuiltinFunctionType | np.ufunc):
        yield value
        return
    if id(value) in seen:
        yield seen[id(value)][0]  # which of them it is
        return
    # The value too, so that no other one takes its address while the description is made.
    seen[id(value)] = len(seen), value
    if isinstance(value, types.FunctionType) and not _of_library(value):
        yield value
        parts = [value.__code__, value.__defaults__, value.__kwdefaults__, *_globals_of(value)]
        parts += [_cell(cell) for cell in value.__closure__ or ()]
    elif isinstance(value, type):
        yield value
        parts = [] if _of_library(value) else [*_attributes_of(value)]
    elif isinstance(value, property):
        parts = [value.fget]
    elif isinstance(value, staticmethod | classmethod):
        parts = [value.__func__]
    elif isinstance(value, types.FunctionType | _Jitted | jax.tree_util.PyTreeDef):
        # Functions of JAX itself do not change; of a function under `jit` JAX keeps the trace.
        yield value
        parts = []
    elif isinstance(value, types.MethodType):
        parts = [value.__func__, value.__self__]
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, tuple):
        parts = list(value)
    elif isinstance(value, Mapping | list):
        if isinstance(value, MutableMapping | list):  # by identity too: f may write into it
            yield Same(value)
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else list(value)
    elif dataclasses.is_dataclass(value) and _of_library(type(value)):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        parts = [tuple(part) if isinstance(part, list) else part for part in fields]
    elif hasattr(value, "__dict__") and not any("__slots__" in vars(c) for c in _classes(value)):
        if dataclasses.is_dataclass(value) and value.__hash__:  # equal by its fields
            attributes = [getattr(value, field.name) for field in dataclasses.fields(value)]
        else:  # by identity too: f may write into it
            yield Same(value)
            attributes = list(vars(value).items())
        parts = [*attributes, *_classes(value)]
    else:
        raise _Unknown(type(value))
    yield len(parts)
    for part in parts:
        yield from _describe(part, seen)


def _of_library(function: Any) -> bool:
    return (function.__module__ or "").partition(".")[0] in _LIBRARIES


def _classes(value: Any) -> list[type]:
    return list(type(value).__mro__[:-1])


def _attributes_of(cls: type) -> Iterator[Any]:
    """What a class defines, but for what Python and dataclasses put there."""
    for name, value in vars(cls).items():
        special = name.startswith("__") and name.endswith("__")
        if name == "_abc_impl":
            continue
        if name in ("__call__", "__init__", "__getattr__", "__getitem__") or not special:
            yield value


def _cell(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned
        return None


def _globals_of(function: types.FunctionType) -> Iterator[Any]:
    """The global variables and attributes of modules that the function's code names."""
    names, pending = {}, [function.__code__]
    while pending:
        code = pending.pop()
        names.update(dict.fromkeys(code.co_names))
        pending += [const for const in code.co_consts if isinstance(const, types.CodeType)]
    modules = []
    for name in names:
        if name in function.__globals__:
            value = function.__globals__[name]
            yield value
            if isinstance(value, types.ModuleType):
                modules.append(value)
    # `layers.net` in the code names both the module and its attribute.
    for module in modules:
        if module.__name__.partition(".")[0] not in _LIBRARIES:
            for name in names:
                if hasattr(module, name):
                    yield getattr(module, name)
