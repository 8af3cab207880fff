import json

import numpy as np
import pytest
from experiments.train.checkpoints import Checkpoints
from experiments.train.copy_config import PRESETS, parse
from experiments.train.experiment import Experiment
from experiments.train.sequence_experiment import build_model
from flax import nnx

from experiments import copy_memory as script
from experiments.train.runs import RunDirectory

TINY = [
    "--delay=3",
    "--shown=2",
    "--symbols=3",
    "--train-examples=40",
    "--test-examples=7",
    "--batch-size=8",
    "--eval-batch-size=5",
    "--epochs=2",
    "--features=8",
    "--hidden-features=8",
    "--heads=2",
    "--tol=0.1",
    "--max-iter=6",
    "--warmup-steps=2",
    "--no-progress",
]


def prepared(*flags: str) -> Experiment:
    return script.load(parse([*TINY, *flags]), RunDirectory("nowhere"))


def run(tmp_path, *flags):
    code = script.main([*TINY, f"--run-dir={tmp_path}", *flags])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    return code, [json.loads(line) for line in lines]


def test_the_task_by_its_description():
    """x_1 .. x_10, zeros, a 9 at position T + 10, counted from 1; answers at the end."""
    generator = np.random.default_rng(0)
    drawn = script.sequences(200, delay=12, shown=10, symbols=8, generator=generator)
    assert drawn.inputs.shape == drawn.targets.shape == (200, 32)
    for row, answer in zip(drawn.inputs.tolist(), drawn.targets.tolist(), strict=True):
        assert row == [*row[:10], *[0] * 11, 9, *[0] * 10]
        assert answer == [*[0] * 22, *row[:10]]
        assert all(1 <= symbol <= 8 for symbol in row[:10])
    assert np.bincount(drawn.inputs[:, :10].ravel())[1:].min() > 200  # of 250 expected


def test_the_loss_without_memory():
    """Of an answer that is uniform over the symbols where one is asked for, and right elsewhere."""
    config = PRESETS["cpu"]
    probabilities = np.ones(120)
    probabilities[110:] = 1 / 8
    assert script.without_memory(config) == pytest.approx(-np.log(probabilities).mean())
    assert script.without_memory(PRESETS["accelerator"]) == pytest.approx(0.0495, abs=1e-4)


def test_data_depend_on_the_seed_but_test_sequences_do_not():
    one, two = (prepared(f"--seed={seed}").dataset for seed in (0, 1))
    assert not np.array_equal(one.train.inputs, two.train.inputs)
    np.testing.assert_array_equal(one.evaluation.inputs, two.evaluation.inputs)
    assert one.checksum() != two.checksum()


LEARNS = ["--train-examples=3200", "--batch-size=16", "--epochs=3", "--features=16"]
LEARNS += ["--hidden-features=16", "--tol=1e-2", "--max-iter=15", "--learning-rate=5e-3"]
LEARNS += ["--jacobian-weight=0", "--jacobian-probability=1"]


@pytest.mark.parametrize(
    "flags", [LEARNS, ["--model=lstm"], ["--model=explicit", "--depth=2", "--cell=trellis"]]
)
def test_networks_train_and_are_evaluated_over_all_positions(flags, tmp_path, capsys):
    code, records = run(tmp_path, *flags)
    assert code == 0
    solved = flags is LEARNS
    assert [record["step"] for record in records] == ([200, 400, 600] if solved else [5, 10])
    assert ("forward_evaluations" in records[0]) == solved
    last = records[-1]["test_loss"]
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == f"test loss {last:.2e}; without memory 3.14e-01"
    if solved:
        assert last < 0.314 / 10

    # The loss once more, from the logits: 7 sequences in batches of 5, so 3 are filling.
    parts = prepared(*flags)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(parts.state)
    network = nnx.merge(parts.evaluation_definition, state.params, state.rest, copy=True)
    sequences = parts.dataset.evaluation
    logits = np.float64(network(sequences.inputs))
    chosen = np.take_along_axis(logits, sequences.targets[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    assert last == pytest.approx(losses.mean(), rel=2e-2 if solved else 1e-4)
    right = (logits.argmax(-1) == sequences.targets).mean()
    assert records[-1]["test_accuracy"] == pytest.approx(right)


def test_the_presets_have_about_14_thousand_parameters():
    for config in PRESETS.values():
        model = build_model(config, 10)
        sizes = [leaf.size for leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves]
        assert 13_000 < sum(sizes) < 15_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=41"], "--train-examples must be at least --batch-size, 41, got 40"),
        (["--heads=3"], "features=8 must be a multiple of heads=3"),
        (["--start=learned"], "--start learned is for images"),
        (["--segment-memory=3"], "--segment-memory must be 0: each sequence is one segment"),
        (["--model=lstm", "--tied", "--hidden-features=9"], "hidden_features=9 to be features=8"),
        (["--kernel-size=3"], "--kernel-size is not for --cell transformer"),
        (["--cell=trellis", "--norm=rms"], "--norm is not for --cell trellis"),
        (["--model=gru", "--window=3"], "--window is not for --model gru"),
        (["--remat"], "--remat is for the controls, got --model deq"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message, tmp_path, capsys):
    try:
        code = script.main([*TINY, f"--run-dir={tmp_path}", *flags])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
