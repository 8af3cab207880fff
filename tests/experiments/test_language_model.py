import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.train.checkpoints import Checkpoints
from experiments.train.language_config import PRESETS, parse
from experiments.train.logging import Reporter
from experiments.train.script import resume
from experiments.train.sequence_experiment import build_model
from flax import nnx

from experiments import language_model as script
from experiments.data.text import stream_steps, windows
from experiments.train.loop import Trainer
from experiments.train.runs import RunDirectory
from tests.experiments.test_resume import StopAfter

VERSE = "the quick brown fox jumps over the lazy dog.\nand the dog sleeps on.\n"

TINY = [
    "--length=8",
    "--batch-size=4",
    "--eval-batch-size=3",
    "--epochs=2",
    "--steps-per-epoch=3",
    "--eval-every=1",
    "--features=8",
    "--hidden-features=8",
    "--heads=2",
    "--tol=1e-3",
    "--max-iter=15",
    "--warmup-steps=2",
    "--no-progress",
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "verse.txt"
    order = np.random.default_rng(0).permutation(12)
    file.write_text("".join(VERSE[5 * n :] + VERSE[: 5 * n] for n in order))
    return file


def prepared(text, folder, *flags):
    folder.mkdir(exist_ok=True)
    return script.load(parse([*TINY, f"--text={text}", *flags]), RunDirectory(folder))


def losses_of(logits, targets):
    logits = np.float64(logits)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


def test_a_run_from_the_command_line(text, tmp_path, capsys):
    code = script.main([*TINY, f"--text={text}", "--level=words", f"--run-dir={tmp_path}"])
    output = capsys.readouterr().out.splitlines()
    assert code == 0
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["step"] for record in records] == [3, 6]
    last = records[-1]
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    assert output[-1].startswith(f"validation loss {last['validation_loss']:.4f} nats a token")
    assert last["forward_converged"] == 1
    assert (tmp_path / "vocabulary.json").is_file()
    for figure in ("curves", "residuals"):
        assert (tmp_path / f"{figure}.png").read_bytes().startswith(b"\x89PNG")

    # With another text the same folder is refused, and the same command has nothing to do.
    assert script.main([*TINY, "--level=words", "--text=b.txt", f"--run-dir={tmp_path}"]) == 2
    assert "--text was" in capsys.readouterr().err
    assert script.main([*TINY, "--level=words", f"--text={text}", f"--run-dir={tmp_path}"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == output[-1]


@pytest.mark.parametrize("level", ["characters", "words"])
def test_figures_are_those_of_the_whole_text(level, text, tmp_path):
    """Each token but the first is predicted once, from the windows written out here."""
    parts = prepared(text, tmp_path, f"--level={level}", "--model=weight_tied", "--depth=2")
    tokens, losses = parts.dataset.evaluation, []
    network = jax.jit(nnx.merge(parts.evaluation_definition, parts.state.params, {}))
    for start in range(0, len(tokens) - 1, 8):
        window = tokens[start : start + 9]
        losses += losses_of(network(window[None, :-1]), window[None, 1:]).ravel().tolist()
    assert len(losses) == len(tokens) - 1
    record = parts.task.evaluate(parts.state, lambda: False)
    mean = float(np.mean(losses))
    assert record["validation_loss"] == pytest.approx(mean, rel=1e-4)
    characters = len(text.read_text()) // 10
    bits = mean / math.log(2) * len(tokens) / characters
    assert record["validation_bits_per_character"] == pytest.approx(bits, rel=0.05)


@pytest.mark.parametrize("model", ["weight_tied", "deq"])
def test_memory_makes_segments_one_long_sequence(model, text, tmp_path):
    """Evaluated in segments of 8 with all before them in memory, or each row at once."""
    flags = [f"--model={model}", "--depth=3", "--segment-memory=64", "--eval-batch-size=2"]
    parts = prepared(text, tmp_path, *flags, "--tol=1e-5", "--max-iter=60")
    network = nnx.merge(parts.evaluation_definition, parts.state.params, {})
    batches = list(windows(parts.dataset.evaluation, length=8, count=2, contiguous=True))
    inputs, targets, counts = (np.concatenate(part, 1) for part in zip(*batches, strict=True))
    assert counts.sum() == len(parts.dataset.evaluation) - 1
    mean = losses_of(network(inputs), targets)[counts].mean()
    record = parts.task.evaluate(parts.state, lambda: False)
    assert record["validation_loss"] == pytest.approx(mean, rel=1e-4)
    # It matters: without memory each segment starts from nothing.
    first = losses_of(network(batches[1][0]), batches[1][1])
    assert np.abs(first - losses_of(network(inputs), targets)[:, 8:16]).max() > 1e-2


def test_training_with_memory_goes_through_the_streams(text, tmp_path):
    parts = prepared(text, tmp_path, "--segment-memory=8", "--steps-per-epoch=20")
    tokens = parts.dataset.train
    segments = stream_steps(len(tokens), length=8, count=4)
    assert 20 < segments < 40
    batches = [batch for epoch in (0, 1) for batch in parts.task.batches(epoch, 0)]
    for number, batch in enumerate(batches):
        start = number % segments * 8
        for row in range(4):
            expected = tokens[row * (len(tokens) // 4) + start :][:9]
            np.testing.assert_array_equal(batch.inputs[row], expected[:-1])
            np.testing.assert_array_equal(batch.targets[row], expected[1:])
        assert batch.first.tolist() == [number % segments == 0] * 4


def test_memory_is_that_of_the_batch_before_and_ends_with_the_stream(text, tmp_path):
    parts = prepared(text, tmp_path, "--segment-memory=12")
    assert parts.state.memory.state.shape == (4, 12, 8)
    one, two, *_ = parts.task.batches(0, 0)
    state, _ = parts.task.train_step(parts.state, one, 0)
    assert state.memory.length.tolist() == [8] * 4
    before = np.asarray(state.memory.state)
    np.testing.assert_array_equal(before[:, :4], 0)
    state, _ = parts.task.train_step(state, two, 1)
    assert state.memory.length.tolist() == [12] * 4
    np.testing.assert_array_equal(state.memory.state[:, :4], before[:, -4:])
    state, _ = parts.task.train_step(state, one._replace(first=np.arange(4) < 2), 2)
    assert state.memory.length.tolist() == [8, 8, 12, 12]


@pytest.mark.parametrize(
    "flags",
    [
        ("--segment-memory=8", "--dropout=0.2", "--attention-dropout=0.1", "--clip=0.5"),
        ("--cell=trellis", "--model=explicit", "--depth=1", "--segment-memory=1"),
    ],
)
def test_stopped_runs_end_with_the_same_bits(flags, text, tmp_path):
    """In one go, and stopped after each step and each evaluation."""
    parts = prepared(text, tmp_path / "data", *flags)
    initial = jax.device_get(parts.state)

    def train(folder, questions):
        folder.mkdir(exist_ok=True)
        fresh = dataclasses.replace(parts, state=jax.tree.map(jnp.array, initial))
        directory = RunDirectory(folder)
        with Checkpoints(directory.checkpoints) as checkpoints:
            stop = StopAfter(questions)
            trainer = Trainer(fresh.task, checkpoints, Reporter(directory), stop, 1e9, False)
            state, progress = resume(fresh, checkpoints)
            return trainer.run(state, progress), progress

    expected, whole = train(tmp_path / "whole", 10_000)
    batches = 1 + (len(parts.dataset.evaluation) - 2) // (3 * 8)
    state, sessions = None, 0
    while state is None:
        # As many questions as a whole evaluation, which starts over, and a step need.
        state, progress = train(tmp_path / "stopped", batches + 1)
        sessions += 1
    assert sessions > 2
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert [record["validation_loss"] for record in progress.history] == [
        record["validation_loss"] for record in whole.history
    ]


def test_two_devices_with_memory_are_as_one(text, tmp_path):
    flags = ["--segment-memory=8", "--eval-batch-size=2", "--tol=1e-4", "--solver=picard"]
    flags += ["--gradient=one_step", "--max-iter=40"]
    losses = []
    for count in (1, 2):
        parts = prepared(text, tmp_path, *flags, f"--devices={count}")
        state, found = parts.state, []
        for number, batch in enumerate(list(parts.task.batches(0, 0))):
            state, metrics = parts.task.train_step(state, batch, number)
            found.append(float(metrics["loss"]))
        record = parts.task.evaluate(state, lambda: False)
        losses.append([*found, record["validation_loss"]])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


def test_presets_fit_what_they_are_compared_with():
    """nanoGPT's figures: 0.8M parameters at context 64, 10.7M at context 256."""
    for name, most, length in (("cpu", 0.8e6, 64), ("accelerator", 10.7e6, 256)):
        config = PRESETS[name]
        assert config.length == length
        model = nnx.eval_shape(lambda config=config: build_model(config, 65))
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
        assert 0.5 * most < sum(sizes) <= most


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=absent.txt"], "absent.txt"),
        (["--length=5000"], "5000"),
        (["--evaluation-fraction=1.5"], "--evaluation-fraction must be above 0 and below 1"),
        (["--level=characters", "--vocabulary-size=5"], "--vocabulary-size"),
        (["--text=tiny_shakespeare", "--data-dir=absent"], "prepare_data tiny_shakespeare"),
    ],
)
def test_what_does_not_fit_is_named(flags, message, text, tmp_path, capsys):
    try:
        code = script.main([*TINY, f"--text={text}", f"--run-dir={tmp_path}", *flags])
    except SystemExit as stopped:
        code = stopped.code
    complaint = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint
