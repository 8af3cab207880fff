"""The rows of the museum: what went wrong where, and what holds here."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One exhibit.

    Attributes:
        where: the library and the entry or issue.
        wrong: what went wrong there.
        here: what holds here, which the test checks.
    """

    where: str
    wrong: str
    here: str


def defect(where: str, wrong: str, *, we: str) -> Callable[[Any], Any]:
    """Attaches a row to a test and makes it the test's docstring."""

    def attach(test: Any) -> Any:
        test.row = Row(where, wrong, we)
        test.__doc__ = f"{where}: {wrong}."
        return test

    return attach
