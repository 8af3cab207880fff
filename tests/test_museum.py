"""docs/museum.md and the marks on the tests agree: every row has its tests, every mark its row."""

import ast
import functools
import re
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "museum.md"
HEAD = "| where | what went wrong | what holds here | tests |\n| --- | --- | --- | --- |\n"


class Row(NamedTuple):
    where: str
    wrong: str
    here: str
    tests: str

    @property
    def marks(self):
        """Text, file and name of every test that the row names."""
        links = re.findall(r"\[(\w+)\]\(\.\./tests/([\w/]+\.py)\)", self.tests)
        return {(f"{self.where}: {self.wrong}", path, name) for name, path in links}


def rows():
    table = PAGE.read_text(encoding="utf-8").split(HEAD)[1]
    return [Row(*line.strip("| ").split(" | ")) for line in table.splitlines()]


@functools.cache
def marks():
    """Text, file and name of every test that has the mark `museum`."""
    found = []
    for path in TESTS.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.museum":
                    (text,) = map(ast.literal_eval, mark.args)
                    found.append((text, path.relative_to(TESTS).as_posix(), node.name))
    return found


def test_the_rows_and_the_marks_agree():
    listed = set().union(*(row.marks for row in rows()))
    marked = marks()
    assert listed - set(marked) == set(), "rows of docs/museum.md whose tests lack the mark"
    assert set(marked) - listed == set(), "marks without a row in docs/museum.md"
    assert len(marked) == len(set(marked))


def test_every_row_is_whole_and_there_are_many():
    assert len(rows()) >= 90
    assert len({(row.where, row.wrong) for row in rows()}) == len(rows())
    for row in rows():
        assert row.marks, row
        assert row.tests.count("](") == len(row.marks), row
        for text in row[:3]:
            assert text.strip(), row
            assert not text.endswith("."), row


def test_every_test_of_the_museum_folder_is_marked():
    marked = {(path, name) for _, path, name in marks()}
    for path in (TESTS / "museum").glob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        tests = {(f"museum/{path.name}", name) for name in names if name.startswith("test_")}
        assert tests
        assert tests <= marked
