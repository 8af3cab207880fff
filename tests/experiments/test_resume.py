import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.train.checkpoints import Checkpoints
from experiments.train.image_experiment import prepare
from experiments.train.image_presets import parse
from experiments.train.logging import Reporter
from experiments.train.script import resume
from experiments.train.signals import GracefulStop

from experiments.data.images import load_dataset
from experiments.train.loop import Progress, Trainer
from experiments.train.runs import RunDirectory
from tests.conftest import CACHE
from tests.experiments.conftest import TINY

ROOT = Path(__file__).resolve().parents[2]
EPOCHS = 3
STEPS = 20
LIMIT = 120.0


def start(run_dir, *flags):
    """Starts the script as a user does."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONWARNINGS": "error",
        # JAX 0.10.0 takes what is in its own cache for code of another machine, and says so.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    # The settings of the tests' own process; a user has none.
    environment.pop("XLA_FLAGS")
    command = [sys.executable, "-m", "experiments.image_classification", *TINY]
    return subprocess.Popen(
        [*command, f"--epochs={EPOCHS}", f"--run-dir={run_dir}", *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, complaint = process.communicate(timeout=LIMIT)
    return process.returncode, output, complaint


def wait_until(condition, process):
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def newest(run_dir):
    numbers = [int(p.name) for p in (run_dir / "checkpoints").glob("*") if p.name.isdecimal()]
    return max(numbers, default=-1)


def restore(run_dir):
    """The newest checkpoint: `[(name, array)]` and the progress."""
    config = parse([*TINY, f"--epochs={EPOCHS}"])
    template = prepare(config, load_dataset("digits", train_examples=200)).state
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        state, progress = checkpoints.restore(template)
    return jax.tree_util.tree_leaves_with_path(state), progress


def records(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_killed_and_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, output, complaint = finish(start(whole))
    assert (code, complaint) == (0, "")

    # It saves after each step, so that the kill is likely to hit it while it writes.
    process = start(broken, "--checkpoint-every-seconds=0")
    wait_until(lambda: newest(broken) >= 6, process)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    _, progress = restore(broken)
    assert (progress["epoch"], progress["history"]) == (0, [])
    assert 0 < progress["position"] < STEPS

    # What a kill may leave behind in the middle of writing.
    (broken / "metrics.jsonl").write_text('{"epoch": 1, "st')
    process = start(broken)
    wait_until(lambda: len((broken / "metrics.jsonl").read_text().splitlines()) == 1, process)
    wait_until(lambda: (broken / "metrics.jsonl").read_text().endswith("\n"), process)
    process.send_signal(signal.SIGINT)
    code, interrupted, complaint = finish(process)
    assert code == 130
    assert "once more to stop without saving" in complaint
    assert "going on in epoch 1 after step " in interrupted
    assert "and saved" in interrupted.splitlines()[-1]

    code, resumed, complaint = finish(start(broken))
    assert (code, complaint) == (0, "")
    assert "going on in epoch " in resumed
    assert resumed.splitlines()[-1] == output.splitlines()[-1]
    assert [record["epoch"] for record in records(broken)] == [1, 2, 3]
    assert records(broken) == records(whole)
    (leaves, progress), (expected_leaves, expected) = restore(broken), restore(whole)
    assert (progress["epoch"], progress["data"]) == (EPOCHS, expected["data"])
    for (path, leaf), (expected_path, expected_leaf) in zip(leaves, expected_leaves, strict=True):
        assert path == expected_path
        assert np.asarray(leaf).tobytes() == np.asarray(expected_leaf).tobytes(), path


class StopAfter:
    """A stop that is requested at the n-th question."""

    def __init__(self, questions):
        self.left = questions

    def requested(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def train():
    """`train(folder, stop)` trains on from the newest checkpoint; returns the state or None."""
    with jax.numpy_dtype_promotion("standard"):
        config = parse([*TINY, "--train-examples=40", "--eval-batch-size=400"])
        experiment = prepare(config, load_dataset("digits", train_examples=40))
    initial = jax.device_get(experiment.state)

    def train(run_dir, stop):
        # One compiled step for all; the state is donated to it.
        fresh = dataclasses.replace(experiment, state=jax.tree.map(jnp.array, initial))
        directory = RunDirectory(run_dir)
        run_dir.mkdir(exist_ok=True)
        with Checkpoints(directory.checkpoints) as checkpoints:
            trainer = Trainer(fresh.task, checkpoints, Reporter(directory), stop, 1e9, False)
            state, progress = resume(fresh, checkpoints)
            return trainer.run(state, progress), progress

    return train


def test_stop_at_any_boundary_loses_nothing(train, tmp_path):
    """Stops at each question that the loop asks: between two steps, and before the evaluation."""
    expected, expected_progress = train(tmp_path / "whole", StopAfter(1000))
    positions, state = [], None
    while state is None:
        # The first question is answered with no, or it would never get on.
        state, progress = train(tmp_path / "stopped", StopAfter(1))
        positions.append((progress.epoch, progress.position))
        assert len(positions) <= 10
    first, second = [[(epoch, position) for position in range(5)] for epoch in (0, 1)]
    assert positions == [*first[1:], *second, (2, 0)]
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    for one, other in zip(progress.history, expected_progress.history, strict=True):
        assert one | {"seconds": 0} == other | {"seconds": 0}


def test_stop_saves_even_when_no_checkpoint_is_due(train, tmp_path):
    state, progress = train(tmp_path, StopAfter(2))
    assert state is None
    assert (progress.epoch, progress.position) == (0, 2)
    assert newest(tmp_path) == 0


def test_signals_are_noted_once_and_handlers_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with GracefulStop() as stop:
        assert not stop.requested()
        assert stop.exit_code == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        assert stop.exit_code == 143
        # The next one kills.
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_checkpoints_keep_the_last_two_bit_for_bit(tmp_path):
    state = {
        "weights": jnp.asarray([1e-45, -0.0, 3.0], jnp.float32),
        "half": jnp.asarray([1.5, -2.0], jnp.bfloat16),
        "key": jax.random.key(7),
        "count": jnp.asarray(5, jnp.int32),
    }
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state) is None
        for number in range(4):
            checkpoints.save(state, Progress(epoch=number, history=[{"loss": 0.1}]).__dict__)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    template = jax.tree.map(jnp.zeros_like, state | {"key": jnp.zeros(())})
    template["key"] = jax.random.key(0)
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore(template)
    assert Progress(**progress) == Progress(epoch=3, history=[{"loss": 0.1}])
    assert jnp.array_equal(jax.random.normal(restored["key"]), jax.random.normal(state["key"]))
    for name in ("weights", "half", "count"):
        assert restored[name].dtype == state[name].dtype
        assert np.asarray(restored[name]).tobytes() == np.asarray(state[name]).tobytes()


def test_half_written_checkpoint_is_passed_over(tmp_path):
    state = {"weights": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"epoch": 1})
    unfinished = tmp_path / "1.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state)[1] == {"epoch": 1}
        checkpoints.save(state, {"epoch": 2})
        assert checkpoints.restore(state)[1] == {"epoch": 2}
