import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import language_model as script
from experiments.data.text import stream_steps, windows
from experiments.language_model import PRESETS
from experiments.report.trained import read_run
from experiments.train import loop
from experiments.train.sequences import build_model
from tests.experiments.training import Parts, StopAfter, leaves, records, run

VERSE = "the quick brown fox jumps over the lazy dog.\nand the dog sleeps on.\n"

TINY = [
    "--data.length=8",
    "--data.steps-per-epoch=3",
    "--batch-size=4",
    "--eval-batch-size=3",
    "--epochs=2",
    "--eval-every=1",
    "--network.features=8",
    "--network.hidden-features=8",
    "--cell.heads=2",
    "--solver.tol=1e-3",
    "--solver.max-iter=15",
    "--optim.warmup=2",
    "--run.no-progress",
]

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "verse.txt"
    order = np.random.default_rng(0).permutation(12)
    file.write_text("".join(VERSE[5 * n :] + VERSE[: 5 * n] for n in order))
    return file


@pytest.fixture
def parts(text, tmp_path):
    """`parts(flags)` of a run on the text."""
    return lambda *flags: Parts(script, *TINY, f"--data.name={text}", *flags, folder=tmp_path)


def compiled(model):
    """The network of a run, compiled, as a function of tokens alone."""
    definition, state = nnx.split(model)
    network = jax.jit(lambda state, tokens: nnx.merge(definition, state, copy=True)(tokens))
    return lambda tokens: network(state, tokens)


def losses_of(logits, targets):
    logits = np.float64(logits)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    return np.log(np.exp(logits).sum(-1)) - chosen


@pytest.mark.slow
def test_a_run_from_the_command_line(text, tmp_path):
    flags = [*TINY, "--data.level=words", f"--run.dir={tmp_path}"]
    ended = run(script, *flags, f"--data.name={text}")
    assert ended.code == 0
    found = records(tmp_path)
    assert [record["step"] for record in found] == [3, 6]
    last = found[-1]
    assert ended.lines[-1].startswith(f"validation loss {last['validation_loss']:.4f} nats a token")
    assert f"perplexity {last['validation_perplexity']:.2f}, " in ended.lines[-1]
    assert last["forward_converged"] == 1
    assert last["train_extra"] > 0  # the preset's penalty on the Jacobian
    assert (tmp_path / "vocabulary.json").is_file()

    # Each token but the first is predicted once: from the windows written out here.
    trained = read_run(tmp_path)
    dataset, network = trained.dataset, compiled(trained.model)
    tokens, losses = dataset.text.evaluation, []
    for start in range(0, len(tokens) - 1, 8):
        window = tokens[start : start + 9]
        padded = np.zeros(9, np.int32)
        padded[: len(window)] = window
        # A position does not depend on those behind it.
        logits = network(padded[None, :-1])[:, : len(window) - 1]
        losses += losses_of(logits, window[None, 1:]).ravel().tolist()
    assert len(losses) == len(tokens) - 1
    mean = float(np.mean(losses))
    assert last["validation_loss"] == pytest.approx(mean, rel=1e-3)
    assert last["validation_perplexity"] == pytest.approx(math.exp(last["validation_loss"]))
    per_token = len(text.read_text()) // 10 / len(tokens)
    bits = mean / math.log(2) / per_token
    assert last["validation_bits_per_character"] == pytest.approx(bits, rel=0.05)
    exact = last["validation_loss"] / math.log(2) / dataset.text.characters_per_token
    assert last["validation_bits_per_character"] == pytest.approx(exact)

    # With another text the same folder is refused, and the same command has nothing to do.
    refused = run(script, *flags, "--data.name=b.txt")
    assert refused.code == 2
    assert f"data.name was {text}, is now b.txt" in refused.complaint
    assert run(script, *flags, f"--data.name={text}").lines[-1] == ended.lines[-1]


def test_bits_per_character_of_characters(parts):
    """A character is a token, so that they are those of the loss."""
    bits = parts().dataset.figures({"validation_loss": math.log(8)})
    assert bits["validation_bits_per_character"] == pytest.approx(3)
    assert bits["validation_perplexity"] == pytest.approx(8)


@pytest.mark.parametrize("model", ["weight_tied", "deq"])
@pytest.mark.slow
def test_memory_makes_segments_one_long_sequence(model, parts):
    """Evaluated in segments of 8 with all before them in memory, or each row at once."""
    flags = [f"--model={model}", "--depth=3", "--network.memory=64", "--eval-batch-size=2"]
    found = parts(*flags, "--solver.tol=1e-5", "--solver.max-iter=60")
    evaluation = found.dataset.text.evaluation
    definition, state = found.definition(training=False), found.state
    network = compiled(nnx.merge(definition, state.params, state.rest))
    batches = list(windows(evaluation, length=8, count=2, contiguous=True))
    inputs, targets, counts = (np.concatenate(part, 1) for part in zip(*batches, strict=True))
    assert counts.sum() == len(evaluation) - 1
    whole = losses_of(network(inputs), targets)
    record = found.evaluate(state, found.dataset.evaluation_batches(2))
    assert record["validation_loss"] == pytest.approx(whole[counts].mean(), rel=1e-4)
    # It matters: without memory each segment starts from nothing.
    first = losses_of(network(batches[1][0]), batches[1][1])
    assert np.abs(first - whole[:, 8:16]).max() > 1e-2


MEMORY = ["--network.memory=12", "--network.dropout=0.2", "--cell.attention-dropout=0.1"]
MEMORY += ["--optim.clip=0.5"]


def test_training_with_memory_goes_through_the_streams(parts):
    found = parts(*MEMORY, "--data.steps-per-epoch=20")
    tokens = found.dataset.text.train
    segments = stream_steps(len(tokens), length=8, count=4)
    assert 20 < segments < 40
    batches = [batch for epoch in (0, 1) for batch in found.batches(epoch)]
    for number, batch in enumerate(batches):
        start = number % segments * 8
        for row in range(4):
            expected = tokens[row * (len(tokens) // 4) + start :][:9]
            np.testing.assert_array_equal(batch.inputs[row], expected[:-1])
            np.testing.assert_array_equal(batch.targets[row], expected[1:])
        assert batch.first.tolist() == [number % segments == 0] * 4
    later = list(found.batches(1, 3))
    assert len(later) == 17
    np.testing.assert_array_equal(later[0].inputs, batches[23].inputs)


@pytest.mark.slow
def test_memory_is_that_of_the_batch_before_and_ends_with_the_stream(parts):
    found = parts(*MEMORY)
    assert found.state.memory.state.shape == (4, 12, 8)
    one, two, *_ = found.batches()
    state, _ = found.step(found.state, one)
    assert state.memory.length.tolist() == [8] * 4
    before = np.asarray(state.memory.state)
    np.testing.assert_array_equal(before[:, :4], 0)
    assert (before[:, 4:] != 0).all()
    state, _ = found.step(state, two, 1)
    assert state.memory.length.tolist() == [12] * 4
    np.testing.assert_array_equal(state.memory.state[:, :4], before[:, -4:])
    state, _ = found.step(state, one._replace(first=np.arange(4) < 2), 2)
    assert state.memory.length.tolist() == [8, 8, 12, 12]


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [MEMORY, ["--model=explicit", "cell:trellis", "--depth=1", "--network.memory=1"]],
    ids=["transformer", "trellis"],
)
def test_stopped_runs_end_with_the_same_bits(flags, text, tmp_path, monkeypatch):
    """In one go, and stopped again and again, in the middle of epochs."""
    common = [flag for flag in TINY if "cell.heads" not in flag or "cell:trellis" not in flags]
    flags = [*common, *flags, f"--data.name={text}"]
    assert run(script, *flags, f"--run.dir={tmp_path / 'whole'}").code == 0
    evaluation = read_run(tmp_path / "whole").dataset.evaluation_batches(3)
    # As many questions as a whole evaluation, which starts over, and a step need.
    questions = len(list(evaluation)) + 1
    monkeypatch.setattr(loop, "graceful_stop", lambda: StopAfter(questions))
    codes = [130]
    while codes[-1] == 130:
        codes.append(run(script, *flags, f"--run.dir={tmp_path / 'stopped'}").code)
        assert len(codes) < 10
    assert codes[-1] == 0
    assert len(codes) > 3
    found = Parts(script, *flags, folder=tmp_path / "whole")
    (one, _), (other, _) = (found.restored(tmp_path / name) for name in ("whole", "stopped"))
    assert leaves(one) == leaves(other)
    assert records(tmp_path / "whole") == records(tmp_path / "stopped")


@pytest.mark.slow
def test_two_devices_with_memory_are_as_one(text, tmp_path):
    flags = ["solver:picard", "gradient:one-step", "--network.memory=8", "--eval-batch-size=2"]
    flags += ["--solver.tol=1e-4", "--solver.max-iter=40", "--epochs=1", f"--data.name={text}"]
    found = []
    for count in (1, 2):
        folder = tmp_path / str(count)
        ended = run(script, *TINY, *flags, f"--devices={count}", f"--run.dir={folder}")
        assert ended.code == 0
        found += records(folder)
    for name in ("train_loss", "train_extra", "validation_loss", "validation_accuracy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-3)


def test_presets_fit_what_they_are_compared_with():
    """nanoGPT's figures: 0.8M parameters at context 64, 10.7M at context 256."""
    for name, most, length in (("cpu", 0.8e6, 64), ("accelerator", 10.7e6, 256)):
        config = PRESETS[name]
        assert config.data.length == length
        model = nnx.eval_shape(lambda config=config: build_model(config, 65))
        sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
        assert 0.5 * most < sum(sizes) <= most


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.name=absent.txt"], "there is no text file absent.txt"),
        (["--data.length=5000"], "has no window of 5000"),
        (["--data.evaluation=1.5"], "--data.evaluation must be above 0 and below 1"),
        (["--data.level=characters", "--data.vocabulary=5"], "--data.vocabulary must be at least"),
        (["--data.name=tiny_shakespeare", "--data.dir=absent"], "prepare_data tiny_shakespeare"),
        (["--model=lstm", "--network.memory=3"], "--network.memory is not for --model lstm"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(flags, message, text, tmp_path):
    ended = run(script, *TINY, f"--data.name={text}", f"--run.dir={tmp_path}", *flags)
    assert ended.code == 2
    assert message in ended.complaint
    assert "Traceback" not in ended.errors
