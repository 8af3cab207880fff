"""The study that puts a DEQ-Transformer beside its controls, with tiny networks."""

import json

import numpy as np
import pytest

from experiments.studies import controls
from experiments.train import language_config, training
from tests.experiments.test_copy_memory import TINY


def test_the_table_is_that_of_the_runs(tmp_path, monkeypatch, capsys):
    tiny = {name: (*TINY, "--depth=1", *flags) for name, flags in _FEW.items()}
    monkeypatch.setitem(controls.CONTROLS, "copy", tiny)
    monkeypatch.setattr(controls, "ROUNDS", 1)
    page = tmp_path / "page.md"
    page.write_text(f"# Words\n\n{controls.MARKER}\n\nold\n")
    monkeypatch.setattr(controls, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["controls", "copy", f"--runs={tmp_path}", "--write"])
    controls.main()
    text = page.read_text()
    assert text.startswith("# Words")
    assert "old" not in text
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == list(_FEW)
    for row, folder in zip(rows[2:], ("copy-DEQ", "copy-one-block"), strict=True):
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert float(row[1]) == pytest.approx(last["test_loss"], rel=1e-3)
        assert float(row[4]) > 0
    assert rows[2][3].startswith(f"{last_of(tmp_path)['test_forward_iterations']:.1f} / ")
    assert rows[3][3] == "-"

    # Once more: nothing is trained again.
    capsys.readouterr()
    controls.main()
    assert capsys.readouterr().out.count("is finished") == 2


_FEW = {"DEQ": (), "one block": ("--model=explicit",)}


def last_of(folder):
    return json.loads((folder / "copy-DEQ" / "metrics.jsonl").read_text().splitlines()[-1])


def test_controls_are_trained_as_the_network_is():
    """All flags but those of the network itself and of its equilibrium are the same."""
    settings = [language_config.parse(list(f)) for f in controls.CONTROLS["language"].values()]
    assert settings[0].jacobian_weight > 0
    names = ("epochs", "steps_per_epoch", "batch_size", "length", "learning_rate", "warmup_steps")
    names += ("final_learning_rate", "clip", "weight_decay", "beta2", "dropout", "seed")
    for one in settings[1:]:
        assert [getattr(one, name) for name in names] == [
            getattr(settings[0], name) for name in names
        ]
        assert one.jacobian_weight == 0


def test_the_learning_rate_rises_and_falls():
    schedule = training.cosine_schedule(0.1, 0.02, 50, warmup=10)
    rates = [float(schedule(step)) for step in range(51)]
    rise = [0.1 * (step + 1) / 11 for step in range(10)]
    fall = [0.02 + 0.04 * (1 + np.cos(np.pi * step / 40)) for step in range(41)]
    np.testing.assert_allclose(rates, rise + fall, rtol=1e-5)
