"""`--devices`, `--precision` and `--shrink-to` of the image classification script."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.report.traces import residual_traces
from experiments.train.checkpoints import Checkpoints
from experiments.train.image_experiment import prepare
from experiments.train.image_presets import parse
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Execution
from experiments import image_classification as script
from experiments.data.images import load_dataset
from tests.conftest import CACHE
from tests.experiments.conftest import TINY
from tests.reference import relative_error


def experiment(*flags):
    config = parse([*TINY, "--train-examples=50", "--eval-batch-size=10", *flags])
    return prepare(config, load_dataset("digits", train_examples=50))


def evaluate(parts, state, count):
    """The script's evaluation, of so many examples."""
    dataset = parts.dataset
    evaluation = dataset.evaluation.take(np.arange(count))
    few = dataclasses.replace(dataset, evaluation=evaluation)
    return prepare(parts.config, few).task.evaluate(state, lambda: False)


@pytest.fixture(scope="module")
def one_and_two():
    """Experiment and state after two steps, on one device and on two."""
    with jax.numpy_dtype_promotion("standard"):
        trained = []
        for flags in ((), ("--devices=2",)):
            parts = experiment(*flags)
            state, losses = parts.state, []
            for batch in list(parts.task.batches(0, 0))[:2]:
                state, metrics = parts.task.train_step(state, batch, 0)
                losses.append(float(metrics["loss"]))
            trained.append((parts, state, losses))
        return trained


def test_two_devices_train_as_one_does(one_and_two):
    (_, single, single_losses), (parts, double, losses) = one_and_two
    np.testing.assert_allclose(losses, single_losses, rtol=1e-5)
    whole = NamedSharding(parts.mesh, P())
    assert all(leaf.sharding.is_equivalent_to(whole, leaf.ndim) for leaf in jax.tree.leaves(double))
    # Adam's first steps hardly depend on the size of a gradient, least of all where it is noise.
    assert relative_error(double.params, single.params) < 1e-3
    # Those of the whole batch, not of a device's part.
    assert relative_error(double.rest, single.rest) < 1e-3
    for name in ("batches", "examples", "correct", "failed_step"):
        assert getattr(double.totals, name) == getattr(single.totals, name)
    for solve in ("forward", "backward"):
        totals, expected = getattr(double.totals, solve), getattr(single.totals, solve)
        assert (totals.evaluations, totals.diverged) == (expected.evaluations, 0)
        assert abs(totals.converged - expected.converged) <= 1
        np.testing.assert_allclose(totals.residual, expected.residual, rtol=1e-2)


@pytest.mark.parametrize("count", [23, 7])
def test_two_devices_evaluate_each_example_once(one_and_two, count):
    """23 examples: the last batch is not full. 7: they are fewer than a batch, and odd."""
    (one, state, _), (two, _, _) = one_and_two
    expected = evaluate(one, state, count)
    got = evaluate(two, jax.device_put(state, NamedSharding(two.mesh, P())), count)
    assert got["test_accuracy"] == expected["test_accuracy"]
    assert got["test_accuracy"] * count == pytest.approx(round(got["test_accuracy"] * count))
    assert got == pytest.approx(expected, rel=1e-3)


def test_a_checkpoint_of_two_devices_goes_on_bit_for_bit(one_and_two, tmp_path):
    _, (parts, state, _) = one_and_two
    batch = next(parts.task.batches(1, 0))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        restored, _ = checkpoints.restore(state)
    kept = jax.tree.map(jnp.copy, state)
    ends = [parts.task.train_step(given, batch, 0)[0] for given in (kept, restored)]
    for one, other in zip(*map(jax.tree.leaves, ends), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def test_script_on_virtual_devices_of_its_own(tmp_path):
    """In a process without the tests' settings, as a user runs it."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONWARNINGS": "error"}
    environment.pop("XLA_FLAGS")
    flags = ["--devices=2", "--epochs=1", "--train-examples=20", f"--run-dir={tmp_path}"]
    command = [sys.executable, "-m", "experiments.image_classification", *TINY, *flags]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "device: 2 x cpu" in done.stdout
    assert "shard_axis='data'" in done.stdout
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["environment"]["device"] == "2 x cpu"

    # Rounding would be another one, so this is another run.
    (tmp_path / "result.json").unlink()
    flags[0] = "--devices=1"
    assert script.main([*TINY, *flags]) == 2


@pytest.mark.parametrize(
    "flags",
    [
        (["--model=weight_tied", "--depth=2"], ["--devices=2"]),
        (["--tol=0.01", "--max-iter=20"], ["--shrink-to=3"]),
        (["--tol=0.01", "--max-iter=20"], ["--shrink-to=2", "--devices=2"]),
    ],
    ids=str,
)
def test_losses_stay_the_same(flags):
    common, added = flags
    losses = []
    for more in ([], added):
        parts = experiment(*common, *more)
        _, metrics = parts.task.train_step(parts.state, next(parts.task.batches(0, 0)), 0)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices=5"], "--devices must be at most 4, the number of cpu devices here, got 5"),
        (["--devices=0"], "--devices must be at least 1, got 0"),
        (["--devices=4"], "--batch-size must be a multiple of --devices, 4, got 10"),
        (
            ["--devices=2", "--eval-batch-size=25"],
            "--eval-batch-size must be a multiple of --devices, 2, got 25",
        ),
        (["--precision=half"], "--precision"),
        (["--shrink-to=0"], "--shrink-to must be at least 1, got 0"),
        (["--shrink-to=2", "--gradient=unrolled"], "--shrink-to does not go with --gradient"),
        (
            ["--precision=mixed", "--model=explicit"],
            "--precision is for --model deq, got --model explicit",
        ),
    ],
)
def test_flags_that_do_not_fit(flags, message, tmp_path, capsys):
    try:
        code = script.main([*TINY, f"--run-dir={tmp_path}", "--eval-batch-size=20", *flags])
    except SystemExit as end:
        code = end.code
    complaint = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2
    assert message in complaint


def test_one_execution_for_all_flags():
    half = jnp.bfloat16
    cases = {
        (): Execution(),
        ("--devices=2",): Execution(shard_axis="data"),
        ("--precision=mixed", "--shrink-to=4"): Execution(shrink_to=4, cell_dtype=half),
        ("--precision=bfloat16",): Execution(cell_dtype=half, state_dtype=half),
    }
    for flags, execution in cases.items():
        assert parse(list(flags)).execution() == execution


@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_precision(precision):
    steps = {}
    for name in ("float32", precision):
        parts = experiment(f"--precision={name}")
        batch = next(parts.task.batches(0, 0))
        steps[name] = parts.task.train_step(parts.state, batch, 0)
    (expected, exact), (state, metrics) = steps.values()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert abs(metrics["loss"] - exact["loss"]) < 0.02 * exact["loss"]
    # Adam's state is the gradient, times 1 - b1.
    got, gradient = (leaf.optimizer_state[0].mu for leaf in (state, expected))
    assert 1e-5 < relative_error(got, gradient) < 0.3
    assert state.totals.forward.converged == 10

    images = jnp.asarray(np.float32(batch.inputs) / np.float32(16))
    traces, _ = residual_traces(parts.model, images, jnp.asarray(batch.targets))
    assert np.nanmin(traces["forward"], 0).max() <= 0.1
    assert np.nanmin(traces["backward"], 0).max() <= 0.5
