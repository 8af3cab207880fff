"""The study that puts a DEQ-Transformer beside its controls, with tiny networks."""

import json
import statistics

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import language_model
from experiments.studies import controls
from experiments.studies.tables import Study
from experiments.train import loop
from experiments.train.config import Optim
from experiments.train.sequences import build_model

pytestmark = pytest.mark.slow

TINY = ("--network.features=8", "--network.hidden-features=8", "--data.length=8")
TINY += ("--data.steps-per-epoch=1", "--batch-size=4", "--eval-batch-size=4", "--optim.warmup=0")
TINY += ("--optim.final-lr=1e-9", "--data.evaluation=0.5", "--run.no-progress")
SOLVED = ("--cell.heads=2", "stability:off", "--solver.tol=0.1", "--solver.max-iter=6")
RATES = {f"lr {rate}": (f"--optim.lr={rate}",) for rate in ("1e-9", "0.03", "1e38")}
SEEDS = 2


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with the runs of a study, its page and its JSON; and how often it trained."""
    folder = tmp_path_factory.mktemp("controls")
    docs, text = folder / "docs", folder / "text.txt"
    docs.mkdir()
    text.write_text("".join(f"{n % 7} and {n * n % 11} is {n % 5};\n" for n in range(40)))
    begin, end = "<!-- begin controls/language: -->\n", "<!-- end controls/language -->\n"
    (docs / "page.md").write_text(f"Words.\n\n{begin}old\n{end}")
    tiny = (*TINY, f"--data.name={text}")
    networks = {
        "DEQ": controls.Network((*tiny, *SOLVED), {"preset": ()}),
        "LSTM, tuned": controls.Network(("--model=lstm", *tiny), RATES),
    }
    study = Study("controls", controls.render, docs=docs)
    trained, fit = [], loop.fit
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(loop, "fit", lambda *args: trained.append(args) or fit(*args))
        patch.setattr(controls, "NETWORKS", {"language": networks})
        patch.setattr(controls, "STUDY", study)
        patch.setattr(controls, "ROUNDS", 1)
        flags = [f"--runs={folder}", f"--seeds={SEEDS}", "--write"]
        patch.setattr("sys.argv", ["controls", "language", *flags])
        controls.main()
        first = len(trained)
        # Once more, but for the timing, which changes nothing that is kept.
        patch.setattr(controls, "_timer", lambda path, row: row.update(SIZES) or (lambda: [1.0]))
        patch.setattr("sys.argv", ["controls", "language", *flags[:2]])
        controls.main()
    return folder, first, len(trained) - first


SIZES = {"parameters": 1, "memory": 1}


def kept(folder):
    """The rows of the study's JSON."""
    return json.loads((folder / "docs" / "data" / "controls.json").read_text())["language"]["rows"]


def results(folder, name):
    """What the runs of a network came to, by the names of their folders; None for a failed one."""
    runs = sorted((folder / "language" / name).iterdir())
    files = {run.name: run / "result.json" for run in runs}
    return {run: json.loads(f.read_text()) if f.exists() else None for run, f in files.items()}


def test_figures_are_those_of_the_runs(measured):
    folder, _, _ = measured
    rows = kept(folder)
    deq, lstm = results(folder, "deq"), results(folder, "lstm-tuned")
    assert list(deq) == ["seed-0", "seed-1"]
    assert list(lstm) == ["lr-0.03", "lr-1e-9", "lr-1e38", "seed-0", "seed-1"]
    for row, runs in ((rows["DEQ"], deq), (rows["LSTM, tuned"], lstm)):
        finals = [runs[f"seed-{seed}"] for seed in range(SEEDS)]
        assert row["losses"] == [final["validation_loss"] for final in finals]
        assert len(set(row["losses"])) == SEEDS
        assert row["steps"] == 8
        assert len(row["seconds"]) == controls.STEPS
        assert min(row["seconds"]) > 0
        assert row["memory"] > 0
    solves = [deq[f"seed-{seed}"] for seed in range(SEEDS)]
    assert rows["DEQ"]["forward"] == [one["validation_forward_iterations"] for one in solves]
    assert rows["DEQ"]["backward"] == [one["backward_iterations"] for one in solves]
    assert "forward" not in rows["LSTM, tuned"]
    # An LSTM 8 wide: embedding, two products with four gates, their bias, and the head's bias.
    symbols = len(
        json.loads((folder / "language/deq/seed-0/vocabulary.json").read_text())["symbols"]
    )
    assert rows["LSTM, tuned"]["parameters"] == symbols * 8 + 2 * 8 * 32 + 32 + symbols


def test_the_trial_with_the_lowest_validation_loss_is_trained_with_every_seed(measured):
    folder, _, _ = measured
    row, runs = kept(folder)["LSTM, tuned"], results(folder, "lstm-tuned")
    # Hardly a step; a good one; one so large that the loss is no number.
    few, good = (runs[name]["validation_loss"] for name in ("lr-1e-9", "lr-0.03"))
    assert row["trials"] == {"lr 1e-9": few, "lr 0.03": good, "lr 1e38": None}
    assert good < few
    assert row["chosen"] == "lr 0.03"
    assert kept(folder)["DEQ"]["chosen"] is None

    def settings(run):
        return json.loads((folder / "language" / "lstm-tuned" / run / "config.json").read_text())

    # A trial is judged on a part of what the others are trained on.
    trial = settings("lr-0.03")["config"]
    assert (trial["data.validation"], trial["optim.lr"], trial["seed"]) == (0.1, 0.03, 0)
    for seed in range(SEEDS):
        final = settings(f"seed-{seed}")["config"]
        assert (final["data.validation"], final["optim.lr"], final["seed"]) == (0.0, 0.03, seed)
        same = set(final) - {"data.validation", "optim.lr", "seed", "run.dir"}
        assert [final[name] for name in same] == [trial[name] for name in same]


def test_nothing_is_trained_twice(measured):
    _, first, again = measured
    assert first == 3 + 2 * SEEDS
    assert again == 1  # the trial that diverged, from its last checkpoint on


def test_a_finished_run_with_other_settings_is_not_taken(measured, capsys):
    folder, _, _ = measured
    run = folder / "language" / "deq" / "seed-0"
    words = json.loads((run / "config.json").read_text())["arguments"]
    flags = [word for word in words if not word.startswith("--run.dir")]
    result = controls.train("language", run, flags, controls.Config())
    assert result == json.loads((run / "result.json").read_text())
    changed = [word.replace("--batch-size=4", "--batch-size=5") for word in flags]
    with pytest.raises(SystemExit) as stopped:
        controls.train("language", run, changed, controls.Config())
    assert stopped.value.code == 2
    assert "batch_size was 4, is now 5" in capsys.readouterr().err


def test_a_page_shows_what_is_kept(measured):
    folder, _, _ = measured
    text, rows = (folder / "docs" / "page.md").read_text(), kept(folder)
    assert text.startswith("Words.")
    assert "old" not in text
    table = text.split("\n\nLosses of the trials")[0].splitlines()
    shown = {line.split(" | ")[0]: line.strip("| ").split(" | ") for line in table}
    for name, row in rows.items():
        cells = shown[f"| {name}"]
        loss, _ = cells[1].split(" ± ")
        assert float(loss) == pytest.approx(statistics.mean(row["losses"]), rel=1e-3)
        assert cells[2:4] == [str(SEEDS), f"{row['parameters']:,}"]
        assert cells[-1] == row["date"]
    solves = [statistics.mean(rows["DEQ"][way]) for way in ("forward", "backward")]
    assert shown["| DEQ"][4] == "{:.1f} / {:.1f}".format(*solves)
    assert shown["| LSTM, tuned"][4] == "-"
    tried = rows["LSTM, tuned"]["trials"]
    words = f"lr 1e-9: {tried['lr 1e-9']:.4f}, lr 0.03: {tried['lr 0.03']:.4f}, lr 1e38: diverged"
    assert f"| LSTM, tuned | {words} |" in text


def test_losses_are_shown_with_the_deviation_of_a_sample():
    row = {"parameters": 12345, "steps": 600, "memory": 3 * 2**20, "seconds": [9.0, 0.2, 0.3]}
    row["date"] = "2026-11-30"
    rows = {
        "three": row | {"trials": {"a": 0.25}, "losses": [1.0, 2.0, 4.5]},
        "one": row | {"trials": {}, "losses": [0.123456], "forward": [3], "backward": [4.26]},
    }
    context = {"date": "", "machine": "", "revision": "", "versions": "", "command": ""}
    text = controls.render({"copy": {"rows": rows, "context": context}})["copy"]
    # Squares of -1.5, -0.5 and 2 are 6.5, of which half is 1.8 squared and a third 1.5 squared.
    assert "| three | 2.5 ± 2 | 3 | 12,345 | - | 0.300 | 3 MiB | 3.0 | 2026-11-30 |" in text
    assert "| one | 0.1235 | 1 | 12,345 | 3.0 / 4.3 | 0.300 | 3 MiB | 3.0 | 2026-11-30 |" in text
    assert "| three | a: 0.2500 |" in text
    assert "Losses are means and standard deviations over the seeds. <sub>" in text
    rows["one"]["date"] = "2026-12-01"
    text = controls.render({"copy": {"rows": rows, "context": context}})["copy"]
    assert "different days are not to be compared" in text


def test_only_some_networks_are_measured_and_the_other_rows_stay(monkeypatch, tmp_path):
    rows = {name: {"losses": [1.0]} for name in controls.NETWORKS["copy"]}
    study = Study("controls", controls.render, docs=tmp_path)
    study.keep("copy", {"rows": rows})
    monkeypatch.setattr(controls, "STUDY", study)
    monkeypatch.setattr(controls, "train", lambda *_: {"test_loss": 0.5, "step": 3})
    monkeypatch.setattr(controls, "_timer", lambda path, row: lambda: [1.0])
    config = controls.Config(networks=("GRU",), seeds=2)
    measured = controls.measure("copy", config)["rows"]
    assert list(measured) == list(controls.NETWORKS["copy"])
    assert measured["GRU"]["losses"] == [0.5, 0.5]
    assert measured["LSTM"] == {"losses": [1.0]}
    with pytest.raises(SystemExit, match=r"unknown networks \['RNN'\]; known are: DEQ, "):
        controls.measure("copy", controls.Config(networks=("RNN",)))


def settings_of_trials():
    """The settings of each trial of the part `language`, by network."""
    parse = language_model.parse_arguments
    return {
        name: [parse([*network.flags, *flags]) for flags in network.trials.values()]
        for name, network in controls.NETWORKS["language"].items()
    }


def test_networks_are_trained_alike():
    """All flags but those of the network and of its trials are the same."""
    settings = settings_of_trials()
    reference = settings["DEQ"][0]
    shared = ("data", "epochs", "batch_size", "eval_batch_size", "seed", "precision", "depth")
    for trials in settings.values():
        assert len(trials) == len(settings["DEQ"]) > 1
        assert len(set(trials)) == len(trials)
        for config in trials:
            for name in shared:
                assert getattr(config, name) == getattr(reference, name)
            for field in Optim.__dataclass_fields__:
                tuned = field == "lr"
                assert tuned or getattr(config.optim, field) == getattr(reference.optim, field)
            assert config.network.dropout == reference.network.dropout
    names = ("DEQ", "weight-tied, 8 times", "explicit, 8 blocks of equal width")
    assert len({(config.network, config.cell) for name in names for config in settings[name]}) == 1
    assert {config.model for config in settings["weight-tied, 8 times"]} == {"weight_tied"}
    assert {config.depth for config in settings["weight-tied, 8 times"]} == {8}


@pytest.mark.parametrize("part", ["copy", "language"])
def test_networks_of_equal_parameters_have_about_as_many(part):
    def size(flags):
        config = controls.SCRIPTS[part].parse_arguments(flags)
        model = nnx.eval_shape(lambda: build_model(config, SYMBOLS[part]))
        shapes = [leaf.shape for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves]
        return sum(int(np.prod(shape)) for shape in shapes)

    networks = controls.NETWORKS[part]
    sizes = {name: size(network.flags) for name, network in networks.items()}
    for name, found in sizes.items():
        unequal = part == "language" and name == "explicit, 8 blocks of equal width"
        assert (abs(found / sizes["DEQ"] - 1) < 0.05) != unequal, sizes


SYMBOLS = {"copy": 10, "language": 65}
"""Different tokens, of the text those of tiny_shakespeare."""


def test_the_learning_rate_rises_and_falls():
    schedule = Optim(lr=0.1, final_lr=0.02, warmup=10).schedule(50)
    rates = [float(schedule(step)) for step in range(51)]
    rise = [0.1 * (step + 1) / 11 for step in range(10)]
    fall = [0.02 + 0.04 * (1 + np.cos(np.pi * step / 40)) for step in range(41)]
    np.testing.assert_allclose(rates, rise + fall, rtol=1e-5)
