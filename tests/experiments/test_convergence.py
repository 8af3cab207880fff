"""The convergence figures, at a small size."""

import json
import sys

import numpy as np

from experiments.studies import convergence, ridge


def test_counts_are_read_off_the_trace():
    trace = np.array([[1.0, 1.0], [0.05, 0.2], [0.009, 0.02], [np.nan, 0.004]])
    assert convergence.evaluations_until(trace, 0.1) == 3
    assert convergence.evaluations_until(trace, 0.01) == 4
    assert convergence.evaluations_until(trace, 1e-3) is None


def test_the_script_compares_solvers_and_writes_its_files(tmp_path, monkeypatch, capsys):
    arguments = "--channels 16 --inner-channels 16 --size 8 --batch 2 --histories 5 --mixings 2.0"
    monkeypatch.setattr(sys, "argv", ["convergence", *arguments.split(), "--output", str(tmp_path)])
    convergence.main()
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in (tmp_path / "table.md").read_text().splitlines()[2:]
    }
    assert list(rows) == ["Picard", "Anderson(5)", "Anderson(5), mixing 2"]
    picard, anderson = ([int(count) for count in rows[name]] for name in ("Picard", "Anderson(5)"))
    # Looser before tighter, and acceleration at the tightest tolerance both ways.
    assert picard[:3] == sorted(picard[:3])
    assert 1.4 * anderson[2] <= picard[2]
    assert 1.4 * anderson[5] <= picard[5]
    assert (tmp_path / "residuals.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "config.json").read_text())["channels"] == "16"
    assert "Anderson(5)" in capsys.readouterr().out


def test_the_ridge_study_prints_both_tables(monkeypatch, capsys):
    monkeypatch.setattr(ridge, "KINDS", {"rotations 0.9": ridge.KINDS["rotations 0.9"]})
    monkeypatch.setattr(sys, "argv", ["ridge", "--seeds", "2", "--ridges", "1e-4"])
    ridge.main()
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "(" in line]
    picard, anderson, turning_picard, turning = (
        [float(cell.split("(")[0]) for cell in row[2:-1]] for row in rows
    )
    assert anderson == sorted(anderson)
    assert all(5 * ours < plain for ours, plain in zip(anderson, picard, strict=True))
    assert turning[0] < turning_picard[0]
