"""`--devices`, `--precision` and `--shrink-to`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from experiments import image_classification as script
from experiments.report.measure import residual_traces
from experiments.train.runs import Checkpoints
from tests.conftest import CACHE
from tests.experiments.conftest import TINY
from tests.experiments.training import Parts, command_line, leaves, run
from tests.reference import relative_error


@pytest.fixture(scope="module")
def one_and_two():
    """Parts, state after two steps and their losses, on one device and on two."""
    with jax.numpy_dtype_promotion("standard"):
        trained = []
        for count in (1, 2):
            parts = Parts(script, *TINY, f"--devices={count}")
            state, losses = parts.state, []
            for batch in list(parts.batches())[:2]:
                state, loss = parts.step(state, batch)
                losses.append(float(loss))
            trained.append((parts, state, losses))
        return trained


@pytest.mark.slow
def test_dropout_on_four_devices_is_that_on_one():
    losses = {}
    with jax.numpy_dtype_promotion("standard"):
        for count in (1, 4):
            options = (f"--devices={count}", "--network.dropout=0.5", "--batch-size=8")
            solver = ("--solver.tol=1e-6", "--solver.max-iter=60", "--eval-batch-size=8")
            parts = Parts(script, *TINY, *options, *solver)
            state, losses[count] = parts.state, []
            for batch in list(parts.batches())[:3]:
                state, loss = parts.step(state, batch)
                losses[count].append(float(loss))
    np.testing.assert_allclose(losses[4], losses[1], rtol=1e-6)


@pytest.mark.slow
def test_two_devices_train_as_one_does(one_and_two):
    (_, single, single_losses), (parts, double, losses) = one_and_two
    np.testing.assert_allclose(losses, single_losses, rtol=1e-5)
    whole = NamedSharding(parts.mesh, P())
    assert all(leaf.sharding.is_equivalent_to(whole, leaf.ndim) for leaf in jax.tree.leaves(double))
    # Adam's first steps hardly depend on the size of a gradient, least of all where it is noise.
    assert relative_error(double.params, single.params) < 1e-3
    # Those of the whole batch, not of a device's part.
    assert relative_error(double.rest, single.rest) < 1e-3
    totals, expected = double.totals, single.totals
    for name in ("predictions", "correct", "failed"):
        assert totals[name] == expected[name]
    for solve in ("forward", "backward"):
        for name in ("solves", "samples", "evaluations", "diverged"):
            assert totals[f"{solve}.{name}"] == expected[f"{solve}.{name}"]
        assert abs(totals[f"{solve}.converged"] - expected[f"{solve}.converged"]) <= 1
        residuals = totals[f"{solve}.residual"], expected[f"{solve}.residual"]
        np.testing.assert_allclose(*residuals, rtol=1e-2)


@pytest.mark.slow
def test_two_devices_evaluate_each_example_once(one_and_two):
    """23 examples: the last batch is not full. 7: they are fewer than a batch, and odd."""
    for count in (23, 7):
        flags = [f"--data.eval={count}", "--eval-batch-size=10"]
        got = []
        for (_, state, _), number in zip(one_and_two, (1, 2), strict=True):
            parts = Parts(script, *TINY, *flags, f"--devices={number}")
            batches = list(parts.dataset.evaluation_batches(10, multiple_of=number))
            assert sum(batch.counts.sum() for batch in batches) == count
            got.append(parts.evaluate(state, batches))
        assert got[1]["test_accuracy"] == got[0]["test_accuracy"]
        right = got[1]["test_accuracy"] * count
        assert right == pytest.approx(round(right), abs=1e-9)
        assert got[1] == pytest.approx(got[0], rel=1e-3)


@pytest.mark.slow
def test_a_checkpoint_of_two_devices_goes_on_bit_for_bit(one_and_two, tmp_path):
    _, (parts, state, _) = one_and_two
    batch = next(parts.batches(1))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        restored, _ = checkpoints.restore(state)
    ends = [parts.step(given, batch)[0] for given in (state, restored)]
    assert leaves(ends[0]) == leaves(ends[1])
    assert leaves(ends[0]) != leaves(state)


@pytest.mark.slow
def test_the_command_on_virtual_devices_of_its_own(tmp_path):
    """In a process without the tests' settings, as a user runs it."""
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(CACHE), "PYTHONWARNINGS": "error"}
    environment.pop("XLA_FLAGS")
    flags = ["--devices=2", "--epochs=1", "--data.train=20", f"--run.dir={tmp_path}"]
    words = command_line(*TINY, *flags)
    done = subprocess.run(
        [sys.executable, "-m", "experiments.image_classification", *words],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "device: 2 x cpu" in done.stdout
    assert "shard_axis='data'" in done.stdout
    document = json.loads((tmp_path / "config.json").read_text())
    assert document["environment"]["device"] == "2 x cpu"

    # Rounding would be another one, so this is another run.
    ended = run(script, *TINY, *flags, "--devices=1")
    assert ended.code == 2
    assert "devices was 2, is now 1; --run.elastic goes on with it" in ended.complaint


def test_more_devices_than_there_are(tmp_path):
    ended = run(script, *TINY, "--devices=5", "--eval-batch-size=20", f"--run.dir={tmp_path}")
    assert ended.code == 2
    assert "--devices must be at most 4, the number of cpu devices here, got 5" in ended.complaint


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (["--model=weight_tied", "--depth=2"], ["--devices=2"]),
        (["--solver.tol=0.01", "--solver.max-iter=20"], ["--shrink-to=3"]),
        (["--solver.tol=0.01", "--solver.max-iter=20"], ["--shrink-to=2", "--devices=2"]),
    ],
    ids=str,
)
def test_losses_stay_the_same(flags):
    common, added = flags
    losses = []
    for more in ([], added):
        parts = Parts(script, *TINY, *common, *more)
        losses.append(parts.step(parts.state, next(parts.batches()))[1])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.fixture(scope="module")
def first_step():
    """State and loss after a step in single precision."""
    with jax.numpy_dtype_promotion("standard"):
        parts = Parts(script, *TINY)
        return parts.step(parts.state, next(parts.batches()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["mixed", "bfloat16"])
def test_precision(precision, first_step):
    expected, exact = first_step
    parts = Parts(script, *TINY, f"--precision={precision}")
    batch = next(parts.batches())
    state, loss = parts.step(parts.state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    assert abs(loss - exact) < 0.02 * exact
    # Adam's state is the gradient, times 1 - b1.
    got, gradient = (optax.tree.get(found.optimizer_state, "mu") for found in (state, expected))
    assert 1e-5 < relative_error(got, gradient) < 0.3
    assert state.totals["forward.converged"] == 10

    images = jnp.asarray(np.float32(batch.inputs) / np.float32(16))
    traces, _ = residual_traces(parts.model, images, jnp.asarray(batch.targets))
    assert np.nanmin(traces["forward"], 0).max() <= 0.1
    assert np.nanmin(traces["backward"], 0).max() <= 0.5
