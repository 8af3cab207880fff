"""The memory study, at a small size: flat, linear, in between; its table and figure."""

import sys

import pytest
import tyro

from experiments.studies import memory
from experiments.studies.tables import Study

pytestmark = pytest.mark.slow

DEPTHS = (2, 4, 8)
TINY = ["--depths", *map(str, DEPTHS), "--width=16", "--heads=2", "--length=32", "--batch=4"]
STATE = 4 * 32 * 16 * 4
"""Bytes of one state."""


@pytest.fixture(scope="module")
def part():
    """The language models, measured small; the equilibria at a budget of 20 as well."""
    return memory.language(tyro.cli(memory.Config, args=[*TINY, "--budgets", "20"]))


def test_an_equilibrium_is_flat(part):
    for name in ("DEQ, Anderson", "DEQ, Picard"):
        sizes = part["temporaries"][name]
        assert len(sizes) == 4
        assert min(sizes) > STATE  # it is measured
        assert max(sizes) <= 1.05 * min(sizes)


@pytest.mark.parametrize("name", ["weight-tied", "explicit"])
def test_unrolled_is_linear(part, name):
    few, more, many = part["temporaries"][name]
    assert many - more == pytest.approx(2 * (more - few), rel=0.15)
    assert many > 2 * few
    assert many > 1.5 * part["temporaries"]["DEQ, Anderson"][2]


def test_rematerialisation_is_in_between(part):
    few, more, many = part["temporaries"]["weight-tied, remat"]
    assert many - more == pytest.approx(2 * (more - few), rel=0.15)
    assert more - few == pytest.approx(2 * STATE, rel=0.5)  # a state each, and no more
    assert many < part["temporaries"]["weight-tied"][2] / 2


def test_the_table_shows_peaks_where_they_are_known_and_dashes_where_nothing_was_measured():
    mib = 2**20
    part = {
        "depths": [4, 8, 200],
        "temporaries": {"DEQ": [mib, mib, mib], "explicit": [mib, 2 * mib]},
        "peaks": {"DEQ": [3 * mib, 4 * mib, 4 * mib]},
    }
    assert memory.table(part).splitlines()[2:] == [
        "| DEQ | 1.0 | 1.0 | 1.0 | 0.00 |",
        "| DEQ: peak of the process so far | 3.0 | 4.0 | 4.0 |  |",
        "| explicit | 1.0 | 2.0 | - | 0.25 |",
    ]
    assert memory.ratios(part) == "At depth 4, over DEQ: explicit 1.0."


def test_what_is_measured_is_kept_printed_rendered_and_drawn(tmp_path, monkeypatch, capsys, part):
    docs = tmp_path / "docs"
    docs.mkdir()
    page = docs / "memory.md"
    page.write_text(
        "Words.\n\n<!-- begin memory/language: -->\nold\n<!-- end memory/language -->\n"
    )
    study = Study("memory", memory.render, memory.draw, docs)
    monkeypatch.setattr(sys, "argv", ["memory", "language", "--write", *TINY])
    study.run(tyro.cli(memory.Config), {"language": lambda config: part})
    kept = study.load()["language"]
    assert kept["temporaries"] == part["temporaries"]
    assert kept["context"]["command"].startswith("python -m experiments.studies.memory language")
    text, printed = page.read_text(), capsys.readouterr().out
    assert text.startswith(
        "Words.\n\n<!-- begin memory/language: -->\n\n### Language model, width 16"
    )
    assert "old" not in text
    for name, sizes in part["temporaries"].items():
        row = f"| {name} | {sizes[0] / 2**20:.1f} | "
        assert row in text
        assert row in printed
    assert (docs / "figures" / "memory.png").read_bytes().startswith(b"\x89PNG")
    lines = memory.draw(study.load())["memory"].axes[0].lines
    drawn = {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}
    assert drawn.keys() == part["temporaries"].keys()
    for name, sizes in part["temporaries"].items():
        assert drawn[name] == ([2, 4, 8, 20][: len(sizes)], [size / 2**20 for size in sizes])

    # Rendered once more from the JSON, with nothing measured.
    page.write_text(text.replace("| explicit |", "| something else |"))
    study.run(memory.Config(render=True), {})
    assert page.read_text() == text


def test_an_unknown_part_is_named():
    with pytest.raises(SystemExit, match=r"'text'; known are: language, images"):
        memory.STUDY.run(memory.Config(parts=("text",)), memory.MEASURES)
