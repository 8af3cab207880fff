import jax
import numpy as np
import pytest
from flax import nnx

from experiments import copy_memory as script
from experiments.copy_memory import PRESETS, CopyData, draw_sequences
from experiments.report.trained import read_run
from experiments.train.config import Stability
from experiments.train.sequences import build_model
from tests.experiments.training import Parts, records, run

TINY = [
    "--data.delay=3",
    "--data.shown=2",
    "--data.symbols=3",
    "--data.train=40",
    "--data.test=7",
    "--batch-size=8",
    "--eval-batch-size=5",
    "--epochs=2",
    "--network.features=8",
    "--network.hidden-features=8",
    "--cell.heads=2",
    "--solver.tol=0.1",
    "--solver.max-iter=6",
    "--optim.warmup=2",
    "--run.no-progress",
]


def test_the_task_by_its_description():
    """x_1 .. x_10, zeros, a 9 at position T + 10, counted from 1; answers at the end."""
    data = CopyData(delay=12)
    inputs = draw_sequences(200, data, np.random.default_rng(0))
    targets = script.CopyTask(data, inputs, inputs).targets(inputs)
    assert inputs.shape == targets.shape == (200, 32)
    for row, answer in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert row == [*row[:10], *[0] * 11, 9, *[0] * 10]
        assert answer == [*[0] * 22, *row[:10]]
        assert all(1 <= symbol <= 8 for symbol in row[:10])
    assert np.bincount(inputs[:, :10].ravel())[1:].min() > 200  # of 250 expected


def test_the_loss_without_memory():
    """Of an answer that is uniform over the symbols where one is asked for, and right elsewhere."""
    probabilities = np.ones(120)
    probabilities[110:] = 1 / 8
    expected = -np.log(probabilities).mean()
    assert script.without_memory(PRESETS["cpu"].data) == pytest.approx(expected)
    accelerator = script.without_memory(PRESETS["accelerator"].data)
    assert accelerator == pytest.approx(0.0495, abs=1e-4)


def test_batches_are_the_sequences_each_once():
    one, two = (Parts(script, *TINY, f"--seed={seed}").dataset for seed in (0, 1))
    assert not np.array_equal(one.train, two.train)
    np.testing.assert_array_equal(one.test, two.test)
    assert one.checksum() != two.checksum()
    batches = list(one.train_batches(8, seed=0, epoch=1))
    rows = np.concatenate([batch.inputs for batch in batches])
    assert sorted(rows.tolist()) == sorted(one.train.tolist())
    assert not np.array_equal(rows, one.train)
    (last,) = one.train_batches(8, seed=0, epoch=1, start=4)
    np.testing.assert_array_equal(last.inputs, batches[4].inputs)
    # 7 sequences in batches of 5: 3 of the last are filling; on two devices 6 and 6.
    for size, multiple_of in ((5, 1), (6, 2)):
        batches = list(one.evaluation_batches(5, multiple_of=multiple_of))
        assert {batch.inputs.shape for batch in batches} == {(size, 7)}
        counted = np.concatenate([batch.inputs[batch.counts[:, 0]] for batch in batches])
        np.testing.assert_array_equal(counted, one.test)


LEARNS = ["stability:off", "--data.train=3200", "--batch-size=16", "--epochs=3"]
LEARNS += ["--network.features=16", "--network.hidden-features=16", "--solver.tol=1e-2"]
LEARNS += ["--solver.max-iter=15", "--optim.lr=5e-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [LEARNS, ["--model=lstm"], ["--model=explicit", "--depth=2", "cell:trellis"]],
    ids=["deq", "lstm", "trellis"],
)
def test_networks_train_and_are_evaluated_over_all_positions(flags, tmp_path, without_figures):
    solved = flags is LEARNS
    common = [flag for flag in TINY if "cell.heads" not in flag or "cell:trellis" not in flags]
    ended = run(script, *common, *flags, f"--run.dir={tmp_path}")
    assert ended.code == 0
    found = records(tmp_path)
    assert [record["step"] for record in found] == ([200, 400, 600] if solved else [5, 10])
    assert ("forward_evaluations" in found[0]) == solved
    last = found[-1]["test_loss"]
    assert ended.lines[-1] == f"test loss {last:.2e}; without memory 3.14e-01"
    if solved:
        assert last < 0.314 / 10

    # The loss once more, from the logits of all sequences at once.
    trained = read_run(tmp_path)
    definition, state = nnx.split(trained.model)
    inputs = trained.dataset.test
    network = jax.jit(lambda state, tokens: nnx.merge(definition, state, copy=True)(tokens))
    logits = np.float64(network(state, inputs))
    targets = trained.dataset.targets(inputs)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    assert last == pytest.approx(losses.mean(), rel=2e-2 if solved else 1e-4)
    right = (logits.argmax(-1) == targets).mean()
    assert found[-1]["test_accuracy"] == pytest.approx(right)


def test_the_presets_have_about_14_thousand_parameters():
    for config in PRESETS.values():
        model = nnx.eval_shape(lambda config=config: build_model(config, 10))
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
        assert 13_000 < sum(sizes) < 15_000
        assert isinstance(config.stability, Stability)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=41"], "--data.train must be at least --batch-size, 41, got 40"),
        (["--cell.heads=3"], "features=8 must be a multiple of heads=3"),
        (["stability:on", "--stability.start=learned"], "--stability.start learned is for images"),
        (["--network.memory=3"], "--network.memory must be 0: each sequence is one segment"),
        (["--model=lstm", "--network.tied", "--network.hidden-features=9"], "features=9 to be"),
        (["--cell.kernel-size=3"], "--cell.kernel-size"),
        (["--network.remat"], "--network.remat is for the controls, not for --model deq"),
        (["--data.delay=0"], "--data.delay must be at least 1, got 0"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_named(flags, message, tmp_path):
    ended = run(script, *TINY, f"--run.dir={tmp_path}", *flags)
    assert ended.code == 2
    assert message in ended.complaint
    assert "Traceback" not in ended.errors
