"""The memory study, at a small size: flat, linear, in between; its table and figure."""

import sys

import jax.numpy as jnp
import pytest

from experiments.studies import memory

DEPTHS = (2, 4, 8)
TINY = ["--depths", *map(str, DEPTHS), "--width=16", "--heads=2", "--length=32", "--batch=4"]


@pytest.fixture(scope="module")
def costs():
    models = memory.language_models(memory.Config(width=16, heads=2))
    del models["DEQ, Picard"]  # to compile fewer
    return memory.measure(models, jnp.zeros((4, 32), jnp.int32), DEPTHS)


def of(costs, name):
    return [costs[name][depth].temporaries for depth in DEPTHS]


def test_an_equilibrium_is_flat(costs):
    few, more, many = of(costs, "DEQ, Anderson")
    assert few > 4 * 32 * 16 * 4  # more than one state: it is measured
    assert max(few, more, many) <= 1.05 * min(few, more, many)


@pytest.mark.parametrize("name", ["weight-tied", "explicit"])
def test_unrolled_is_linear(costs, name):
    few, more, many = of(costs, name)
    assert many - more == pytest.approx(2 * (more - few), rel=0.15)
    assert many > 2 * few
    assert many > 1.5 * costs["DEQ, Anderson"][8].temporaries


def test_rematerialisation_is_in_between(costs):
    few, more, many = of(costs, "weight-tied, remat")
    assert many - more == pytest.approx(2 * (more - few), rel=0.15)
    state = 4 * 32 * 16 * 4
    assert more - few == pytest.approx(2 * state, rel=0.5)  # a state each, and no more
    assert many < of(costs, "weight-tied")[2] / 2


def test_peaks_are_shown_where_they_are_known():
    cost = {4: memory.Cost(2**20, 3 * 2**20), 8: memory.Cost(2**21, 2**22)}
    rows = memory.table({"DEQ": cost}, (4, 8)).splitlines()[2:]
    assert rows[0] == "| DEQ | 1.0 | 2.0 | 0.25 |"
    assert rows[1] == "| DEQ: peak of the process so far | 3.0 | 4.0 |  |"


def test_table_and_figure_are_written(tmp_path, monkeypatch, capsys, costs):
    monkeypatch.setattr(memory, "measure", lambda *_: costs)
    page, figure = tmp_path / "memory.md", tmp_path / "figures" / "memory.png"
    page.write_text(f"Words.\n\n{memory.MARKER}\n\nold\n", encoding="utf-8")
    files = ["--write", f"--page={page}", f"--figure={figure}"]
    monkeypatch.setattr(sys, "argv", ["memory", *TINY, "--images=0", *files])
    memory.main()
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"Words.\n\n{memory.MARKER}\n\n")
    assert "old" not in text
    printed = capsys.readouterr().out
    for name in costs:
        assert f"\n| {name} | " in text
        assert f"\n| {name} | " in printed
    assert "At depth 8, over DEQ, Anderson: " in text
    assert figure.stat().st_size > 10_000
