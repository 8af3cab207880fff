"""Writes docs/museum.md from the rows of the museum's tests: `python -m tests.museum.generate`."""

import importlib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.museum.catalogue import Row

MODULES = (
    "test_torchdeq",
    "test_stability",
    "test_jaxopt",
    "test_optimistix",
    "test_locuslab",
    "test_jax",
    "test_flax",
)

PATH = Path(__file__).parents[2] / "docs" / "museum.md"

HEAD = """\
# The museum

Defects found in other libraries, and traps of JAX and Flax, each with a small test that would fail
if deq_jax had it too. `tests/museum/` holds the tests; this page is made from them by
`python -m tests.museum.generate`. T1 to T22, J1 to J12 and O1 to O7 are our own numbers, from
reading and running torchdeq@4f6bd5f, jaxopt 0.8.5, and optimistix 0.1.0 with lineax 0.1.1; their
figures were measured on 2 CPU cores. `name#1` is an issue of that project. Later versions may have
mended some.

| where | what went wrong | what holds here | test |
| --- | --- | --- | --- |
"""


def modules() -> list[types.ModuleType]:
    """The museum's test modules, in the order of the page."""
    return [importlib.import_module(f"tests.museum.{name}") for name in MODULES]


def tests(module: types.ModuleType) -> dict[str, Any]:
    """The test functions defined in a module, in their order."""
    return {
        name: value
        for name, value in vars(module).items()
        if name.startswith("test_") and isinstance(value, types.FunctionType)
    }


def rows() -> Iterator[tuple[Row, str, str]]:
    """Row, module and name of every test that has a row."""
    for module in modules():
        for name, test in tests(module).items():
            if hasattr(test, "row"):
                yield test.row, module.__name__.rpartition(".")[2], name


def page() -> str:
    """The text of docs/museum.md."""
    lines = [
        f"| {row.where} | {row.wrong} | {row.here} | [{name}](../tests/museum/{module}.py) |\n"
        for row, module, name in rows()
    ]
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    print(f"{PATH}: {len(list(rows()))} rows")
