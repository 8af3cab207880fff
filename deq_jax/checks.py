"""Options: range checks of their fields, and options as pytrees.

Solvers and gradient policies are frozen dataclasses. A field that holds a Python number is part of
the program, as a static argument of `jax.jit` is. A field that holds a NumPy or JAX scalar, traced
or not, is data: the compiled program takes it as an input and serves every value of it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_args, overload

import jax
import jax.core
import numpy as np

T = TypeVar("T")

Real = float | np.floating[Any] | np.integer[Any] | jax.Array
"""A real scalar: a Python number is static, all others are data."""


@overload
def register_options(cls: type[T]) -> type[T]: ...


@overload
def register_options(*, data: tuple[str, ...]) -> Callable[[type[T]], type[T]]: ...


def register_options(cls: type[T] | None = None, *, data: tuple[str, ...] = ()) -> Any:
    """Makes a frozen dataclass a pytree whose leaves are the fields that hold data.

    A field with other options in it (the solver of `Implicit`, say) is a subtree. All else is
    static, except for the fields named in `data`, which are subtrees whatever they hold.
    Unflattening makes no range checks, because JAX unflattens with placeholders.
    """
    if cls is None:
        return functools.partial(_register_options, always=data)
    return _register_options(cls, data)


def _register_options(cls: type[T], always: tuple[str, ...]) -> type[T]:
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]

    def flatten(options: Any) -> tuple[list[Any], Any]:
        data, children, static = [], [], []
        for name in names:
            value = getattr(options, name)
            if name in always or _is_data(value):
                data.append(name)
                children.append(value)
            else:
                static.append((name, value))
        return children, (tuple(data), tuple(static))

    def flatten_with_keys(options: Any) -> tuple[list[Any], Any]:
        children, aux = flatten(options)
        keys = map(jax.tree_util.GetAttrKey, aux[0])
        return list(zip(keys, children, strict=True)), aux

    def unflatten(aux: Any, children: Any) -> Any:
        data, static = aux
        options = object.__new__(cls)
        for name, value in [*zip(data, children, strict=True), *static]:
            object.__setattr__(options, name, value)
        return options

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def _is_data(value: Any) -> bool:
    static = isinstance(value, bool | int | float | str | tuple | np.dtype) or value is None
    return not static or isinstance(value, np.generic)


def is_array(value: Any) -> bool:
    """Whether JAX takes the value as an array or a scalar."""
    if isinstance(value, np.generic | np.ndarray):
        return value.dtype.kind not in "USOmM"  # strings, objects, dates
    number = bool | int | float | complex
    return isinstance(value, jax.Array | number) or hasattr(value, "__jax_array__")


def is_exactly(value: Any, number: float) -> bool:
    """Whether an option is this very Python number, which is known while tracing."""
    return isinstance(value, int | float) and not isinstance(value, np.generic) and value == number


def in_dtype(value: Any, dtype: Any) -> Any:
    """An option for arithmetic with arrays of `dtype`: a Python number adapts by itself."""
    static = isinstance(value, int | float) and not isinstance(value, np.generic)
    return value if static else jax.numpy.asarray(value, dtype)


def _field(owner: object, name: str) -> tuple[str, Any]:
    return f"{type(owner).__name__}.{name}", getattr(owner, name)


def check_number(
    owner: object,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises unless field `name` of `owner` is in the interval; see `check_range`."""
    label, value = _field(owner, name)
    check_range(label, value, above=above, at_least=at_least, below=below, at_most=at_most)


def check_range(
    label: str,
    value: Any,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises unless the argument called `label` is a finite real number in the interval.

    A traced number is taken as it is, because its value is not known yet.

    Raises:
        TypeError: the value is neither a Python number nor a scalar of a real dtype.
        ValueError: it is out of range; the message names the argument, the value and the range.
    """
    if is_array(value) and np.shape(value) != ():
        raise TypeError(f"{label} must be a scalar, got an array of shape {np.shape(value)}")
    if isinstance(value, bool) or not is_array(value) or not _is_real(value):
        raise TypeError(f"{label} must be a number, got {value!r}")
    if isinstance(value, jax.core.Tracer):
        return
    number = float(value)
    if not (math.isfinite(number) and above < number < below and at_least <= number <= at_most):
        bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
        words = [f"{sign} {bound}" for sign, bound in bounds.items() if math.isfinite(bound)]
        interval = ", ".join(["finite", " and ".join(words)] if words else ["finite"])
        raise ValueError(f"{label} must be {interval}, got {value!r}")


def _is_real(value: Any) -> bool:
    dtype = jax.dtypes.result_type(value)
    return any(jax.numpy.issubdtype(dtype, kind) for kind in (np.floating, np.integer))


def check_count(owner: object, name: str) -> None:
    """Raises unless field `name` of `owner` is an integer of at least 1."""
    check_positive_integer(*_field(owner, name))


def check_positive_integer(name: str, value: Any) -> None:
    """Raises unless the argument `name` is an integer of at least 1.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_flag(owner: object, name: str) -> None:
    """Raises unless field `name` of `owner` is a bool."""
    check_bool(*_field(owner, name))


def check_bool(name: str, value: Any) -> None:
    """Raises a TypeError unless the argument `name` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {value!r}")


def check_choice(name: str, value: Any, kind: Any) -> None:
    """Raises a ValueError unless the argument `name` is one of the literals of `kind`."""
    if value not in get_args(kind):
        raise ValueError(f"{name} must be one of {get_args(kind)}, got {value!r}")


def check_stopping(solver: object) -> None:
    """Checks the fields every solver has: `tol`, `atol`, `max_iter`, `trace`."""
    check_number(solver, "tol", at_least=0.0)
    check_number(solver, "atol", at_least=0.0)
    check_count(solver, "max_iter")
    check_flag(solver, "trace")


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """The leaves of a pytree with a name for each, to put into a message."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield jax.tree_util.keystr(path) or "(the whole)", leaf


def check_same_form(begin: str, like: str, got: Any, expected: Any, remedy: str = "") -> None:
    """Raises unless two pytrees agree in structure, shapes and dtypes.

    Args:
        begin: begin of the message, such as "f must return".
        like: what `expected` is called there.
        got: the pytree to check.
        expected: a pytree of arrays or of their shapes and dtypes.
        remedy: end of the message about a dtype.

    Raises:
        ValueError: they differ; the message names the leaf, what came and what was expected.
    """
    structures: list[Any] = [jax.tree.structure(got), jax.tree.structure(expected)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"{begin} the structure of {like}: got {structures[0]}, expected {structures[1]}"
        )
    for (name, wanted), leaf in zip(named_leaves(expected), jax.tree.leaves(got), strict=True):
        if not is_array(leaf):
            raise ValueError(f"{begin} arrays: leaf {name} is {leaf!r}")
        if np.shape(leaf) != wanted.shape:
            raise ValueError(
                f"{begin} the shapes of {like}: leaf {name}: "
                f"got {np.shape(leaf)}, expected {wanted.shape}"
            )
        dtype = jax.numpy.result_type(leaf)
        if dtype != wanted.dtype:
            raise ValueError(
                f"{begin} the dtypes of {like}: leaf {name}: "
                f"got {dtype}, expected {wanted.dtype}{remedy}"
            )
