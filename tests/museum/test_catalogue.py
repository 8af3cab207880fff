"""The museum's catalogue: every test has a row, and the page shows the rows as they are."""

from pathlib import Path

import pytest

from tests.museum import generate


def test_the_page_is_up_to_date():
    assert generate.PATH.read_text(encoding="utf-8") == generate.page(), (
        "run python -m tests.museum.generate"
    )


def test_every_test_module_is_shown():
    files = {path.stem for path in Path(__file__).parent.glob("test_*.py")}
    assert files - {"test_catalogue"} == set(generate.MODULES)


@pytest.mark.parametrize("module", generate.modules(), ids=generate.MODULES)
def test_every_test_has_a_row(module):
    assert generate.tests(module)
    for name, test in generate.tests(module).items():
        assert hasattr(test, "row"), name
        for text in test.row:
            assert text == text.strip(), name
            assert text, name
            assert not set(text) & set("|\n"), name
        assert not test.row.wrong.endswith("."), name
        assert test.row.where in test.__doc__, name


def test_there_are_enough_rows_and_no_two_alike():
    rows = [row for row, _, _ in generate.rows()]
    names = [name for _, _, name in generate.rows()]
    assert len(rows) >= 45
    assert len({row.here for row in rows}) == len(rows)
    assert len(set(names)) == len(names)
