"""Checks of options that several solvers and policies share."""

import math
from typing import Any


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_number(
    owner: object,
    name: str,
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> None:
    """Raises unless field `name` of `owner` is a finite number in the interval.

    Raises:
        TypeError: the field is not a Python number.
        ValueError: it is out of range; the message names the field, the value and the range.
    """
    value = getattr(owner, name)
    if not (_is_number(value, float) or _is_number(value, int)):
        raise TypeError(f"{type(owner).__name__}.{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and value > above and at_least <= value <= at_most):
        lower = f"> {above}" if above > -math.inf else f">= {at_least}"
        upper = f" and <= {at_most}" if at_most < math.inf else ""
        raise ValueError(
            f"{type(owner).__name__}.{name} must be finite, {lower}{upper}, got {value!r}"
        )


def check_count(owner: object, name: str) -> None:
    """Raises unless field `name` of `owner` is an integer of at least 1."""
    check_positive_integer(f"{type(owner).__name__}.{name}", getattr(owner, name))


def check_positive_integer(name: str, value: Any) -> None:
    """Raises unless the argument `name` is an integer of at least 1.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is below 1.
    """
    if not _is_number(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def check_flag(owner: object, name: str) -> None:
    """Raises unless field `name` of `owner` is a bool."""
    value = getattr(owner, name)
    if not isinstance(value, bool):
        raise TypeError(f"{type(owner).__name__}.{name} must be a bool, got {value!r}")


def check_stopping(solver: object) -> None:
    """Checks the fields every solver has: `tol`, `atol`, `max_iter`, `trace`."""
    check_number(solver, "tol", at_least=0.0)
    check_number(solver, "atol", at_least=0.0)
    check_count(solver, "max_iter")
    check_flag(solver, "trace")
