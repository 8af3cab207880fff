"""Runs with several processes on this machine, beside the same runs in one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from experiments import image_classification, language_model
from tests import xla
from tests.conftest import CACHE
from tests.experiments.training import checkpoint_numbers, command_line, records, run

ROOT = Path(__file__).resolve().parents[2]
CHEAP = ["solver:picard", "gradient:one_step", "--solver.tol=1e-9", "--solver.max-iter=4"]
CHEAP += ["--batch-size=12", "--epochs=2", "--run.no-progress", "--run.save-every=2"]
IMAGES = [*CHEAP, "--data.train=96", "--data.eval=40", "--eval-batch-size=12"]
# Adam gives a direction in which the gradient is nothing but rounding a step as long as any other.
IMAGES += [
    "--optim.lr=1e-5",
    "--network.channels=4",
    "--network.inner-channels=4",
    "--network.groups=2",
]
TEXT = [*CHEAP, "stability:off", "--data.length=8", "--data.steps-per-epoch=6"]
TEXT += ["--eval-batch-size=12", "--eval-every=1", "--network.memory=8", "--data.evaluation=0.4"]
TEXT += ["--network.features=8", "--network.hidden-features=8", "--cell.heads=2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n % 7} and {n * n % 11} is {n % 5}\n" for n in range(160)))
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """`alone(script, devices)`: the records of a run in one process; nothing happens to it."""
    found = {}

    def records_of(script, devices):
        if (script, devices) not in found:
            folder = tmp_path_factory.mktemp(f"{script}_{devices}")
            module = {"image_classification": image_classification}.get(script, language_model)
            with jax.numpy_dtype_promotion("standard"), pytest.MonkeyPatch.context() as patch:
                patch.setattr("experiments.train.loop.draw", lambda *arguments: None)
                ended = run(module, *flags_of(script, text, devices), f"--run.dir={folder}")
            assert ended.code == 0, ended.errors
            found[script, devices] = records(folder)
        return found[script, devices]

    return records_of


def flags_of(script, text, devices):
    flags = IMAGES if script == "image_classification" else [*TEXT, f"--data.name={text}"]
    return [*flags, f"--devices={devices}"]


class Pair:
    """Two processes that run the same commands; see one_of_several.py."""

    def __init__(self, commands, devices_each=1):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        environment = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(xla.DEVICES, ""),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes = []
        for index in range(2):
            whole = [f"--processes.coordinator=127.0.0.1:{port}", "--processes.count=2"]
            whole += [f"--processes.index={index}"]
            lines = [
                [script, command_line(*flags, *whole), pause] for script, flags, pause in commands
            ]
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.experiments.one_of_several", json.dumps(lines)],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_for_checkpoint(self, folder, number):
        """Until the run has a checkpoint with at least this number."""
        while max(checkpoint_numbers(folder), default=-1) < number:
            for process in self.processes:
                assert process.poll() is None, process.communicate()
            time.sleep(0.01)

    def ends(self, timeout=240):
        """The exit code, the output and the errors of both processes."""
        return [
            (process.returncode, *written)
            for process in self.processes
            for written in [process.communicate(timeout=timeout)]
        ]


@pytest.mark.slow
def test_two_processes_with_two_devices_each_train_as_one_does(tmp_path, text, alone):
    scripts = ("image_classification", "language_model")
    commands = [
        (script, [*flags_of(script, text, 4), f"--run.dir={tmp_path / script}"], 0)
        for script in scripts
    ]
    with Pair(commands) as pair:
        first, second = pair.ends()
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "device: 4 x cpu, 2 processes" in first[1]
    # Process 0 alone prints.
    assert "epoch   1" in first[1]
    assert "epoch" not in second[1]
    for script in scripts:
        got, expected = records(tmp_path / script), alone(script, 4)
        for one, other in zip(got, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-6)


@pytest.mark.slow
def test_stopped_and_killed_processes_go_on(tmp_path, text, alone):
    """SIGTERM to one of two, kill -9 of each of them, and the end in one process."""
    words, images = tmp_path / "words", tmp_path / "images"
    language = [*flags_of("language_model", text, 2), f"--run.dir={words}"]
    image = [*flags_of("image_classification", text, 2), f"--run.dir={images}"]

    with Pair([("language_model", language, 0.3)]) as pair:
        pair.wait_for_checkpoint(words, 0)
        pair.processes[1].send_signal(signal.SIGTERM)
        ends = pair.ends()
    assert [code for code, _, _ in ends] == [143, 143], ends
    # Both stopped at the same step.
    said = {re.search(r"stopped in epoch \d, step \d, and saved", end[2])[0] for end in ends}
    assert len(said) == 1
    assert said.pop() in ends[0][1]

    commands = [("language_model", language, 0), ("image_classification", image, 0.1)]
    for victim in (1, 0):
        with Pair(commands) as pair:
            pair.wait_for_checkpoint(images, 0 if victim == 1 else 2)
            pair.processes[victim].kill()
            ends = pair.ends(timeout=60)
        code, output, errors = ends[1 - victim]
        assert code == 3, ends
        assert "error: another process of this run has ended" in errors or "error: JAX" in errors
        assert "Traceback" not in errors
        if victim == 1:
            assert "going on in epoch" in output
            for got, expected in zip(records(words), alone("language_model", 2), strict=True):
                assert got == pytest.approx(expected, rel=1e-6)
        commands = commands[1:]

    # Another number of processes needs leave, and gives the same figures.
    ended = run(image_classification, *image)
    assert ended.code == 2
    assert "number of processes was 2, is now 1; --run.elastic goes on" in ended.complaint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.loop.draw", lambda *arguments: None)
        ended = run(image_classification, *image, "--run.elastic")
    assert ended.code == 0, ended.errors
    assert "note: number of processes was 2, is now 1" in ended.output
    expected = alone("image_classification", 2)
    for got, one in zip(records(images), expected, strict=True):
        assert got == pytest.approx(one, rel=1e-6)
