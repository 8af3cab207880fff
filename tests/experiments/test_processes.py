"""Runs with several processes on this machine, beside the same runs in one process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import types
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import copy_memory, image_classification, language_model
from experiments.data import Part
from experiments.train import processes
from experiments.train.errors import LostProcessError, UsageError
from experiments.train.runs import Checkpoints
from tests import xla
from tests.conftest import CACHE
from tests.experiments.training import (
    Parts,
    checkpoint_numbers,
    command_line,
    leaves,
    records,
    run,
)

SCRIPTS = ("image_classification", "language_model")
ROOT = Path(__file__).resolve().parents[2]
CHEAP = ["solver:picard", "gradient:one_step", "--solver.tol=1e-9", "--solver.max-iter=4"]
CHEAP += ["--batch-size=12", "--epochs=2", "--run.no-progress", "--run.save-every=2"]
IMAGES = [*CHEAP, "--data.train=96", "--data.eval=40", "--eval-batch-size=12"]
IMAGES += ["--network.channels=4", "--network.inner-channels=4", "--network.groups=2"]
TEXT = [*CHEAP, "stability:off", "--data.length=8", "--data.steps-per-epoch=6"]
TEXT += ["--eval-batch-size=12", "--eval-every=1", "--network.memory=8", "--data.evaluation=0.4"]
TEXT += ["--network.features=8", "--network.hidden-features=8", "--cell.heads=4"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n % 7} and {n * n % 11} is {n % 5}\n" for n in range(160)))
    return path


@pytest.fixture(scope="module")
def alone(text, tmp_path_factory):
    """`alone[script]`: the records of a run in one process; nothing happens to it.

    Gloo adds up in this process too. Sums over four devices are rounded otherwise without it, and
    where a gradient is nothing but rounding, Adam makes a step of it that is as long as any other.
    """
    folder = tmp_path_factory.mktemp("alone")
    commands = [
        (name, [*flags_of(name, text), f"--run.dir={folder / name}"], 0) for name in SCRIPTS
    ]
    with Processes(commands, count=1) as process:
        ends = process.ends()
    assert ends[0][0] == 0, ends
    return {name: records(folder / name) for name in SCRIPTS}


def flags_of(script, text):
    """Over four devices: both axes that split the parameters reach across two processes."""
    if script == "image_classification":
        return [*IMAGES, "--devices=4", "--fsdp=4"]
    return [*TEXT, f"--data.name={text}", "--devices=4", "--tensor=4"]


class Processes:
    """Processes that run the same commands; see one_of_several.py."""

    def __init__(self, commands, count=2):
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        environment = os.environ | {
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(xla.DEVICES, ""),
            "JAX_COMPILATION_CACHE_DIR": str(CACHE),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes = []
        for index in range(count):
            whole = [f"--processes.coordinator=127.0.0.1:{port}", f"--processes.count={count}"]
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
        """The exit code, the output and the errors of each process."""
        return [
            (process.returncode, *written)
            for process in self.processes
            for written in [process.communicate(timeout=timeout)]
        ]


@pytest.mark.slow
def test_two_processes_with_two_devices_each_train_as_one_does(tmp_path, text, alone):
    flags = [*flags_of("image_classification", text), f"--run.dir={tmp_path}"]
    with Processes([("image_classification", flags, 0)]) as pair:
        first, second = pair.ends()
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert "device: 4 x cpu, fsdp 4, 2 processes" in first[1]
    # Process 0 alone prints.
    assert "epoch   1" in first[1]
    assert "epoch" not in second[1]
    for got, expected in zip(records(tmp_path), alone["image_classification"], strict=True):
        assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_stopped_and_killed_processes_go_on(tmp_path, text, alone):
    """SIGTERM to one of two, kill -9 of each of them, and the end in one process."""
    words, images = tmp_path / "words", tmp_path / "images"
    language = [*flags_of("language_model", text), f"--run.dir={words}"]
    image = [*flags_of("image_classification", text), f"--run.dir={images}"]

    with Processes([("language_model", language, 0.5)]) as pair:
        pair.wait_for_checkpoint(words, 1)
        pair.processes[1].send_signal(signal.SIGTERM)
        ends = pair.ends()
    assert [code for code, _, _ in ends] == [143, 143], ends
    # Both stopped at the same step.
    said = {re.search(r"stopped in epoch \d, step \d, and saved", end[2])[0] for end in ends}
    assert len(said) == 1
    assert said.pop() in ends[0][1]

    commands = [("language_model", language, 0), ("image_classification", image, 0.1)]
    for victim in (1, 0):
        with Processes(commands) as pair:
            pair.wait_for_checkpoint(images, 0 if victim == 1 else 2)
            pair.processes[victim].kill()
            ends = pair.ends(timeout=60)
        code, output, errors = ends[1 - victim]
        assert code == 3, ends
        assert "error: another process of this run has ended" in errors or "error: JAX" in errors
        assert "Traceback" not in errors
        if victim == 1:
            assert "going on in epoch" in output
            assert "device: 4 x cpu, tensor 4, 2 processes" in output
            for got, expected in zip(records(words), alone["language_model"], strict=True):
                assert got == pytest.approx(expected, rel=1e-6)
        commands = commands[1:]

    # Another number of processes needs leave, and rounds otherwise.
    ended = run(image_classification, *image)
    assert ended.code == 2
    assert "number of processes was 2, is now 1; --run.elastic goes on" in ended.complaint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.loop.draw", lambda *arguments: None)
        ended = run(image_classification, *image, "--run.elastic")
    assert ended.code == 0, ended.errors
    assert "note: number of processes was 2, is now 1" in ended.output
    for got, one in zip(records(images), alone["image_classification"], strict=True):
        assert got == pytest.approx(one, rel=1e-2)


# ------------------------------------------------------------------ checkpoints on fewer devices


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_goes_on_with_fewer(tmp_path):
    four = Parts(image_classification, *IMAGES, "--devices=4", "--fsdp=2")
    first, second = list(four.batches())[:2]
    state, _ = four.step(four.state, first)
    for held in (state.params, state.optimizer_state):
        assert any("fsdp" in leaf.sharding.spec for leaf in jax.tree.leaves(held))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {})
        # The background still reads the state while the next step uses it up.
        _, expected = four.step(state, second, 1)
    for devices in (2, 1):
        parts = Parts(image_classification, *IMAGES, f"--devices={devices}")
        with Checkpoints(tmp_path) as checkpoints:
            restored, _ = checkpoints.restore(parts.state)
        assert leaves(restored) == leaves(state)
        assert len(restored.step.sharding.device_set) == devices
        _, loss = parts.step(restored, second, 1)
        assert float(loss) == pytest.approx(float(expected), rel=1e-6)


# -------------------------------------------------------------------------- the same batches


def checksum(batches, size):
    """CRC-32 of the arrays of each batch, put together from its parts."""
    found = 0
    for parts in zip(*batches, strict=True):
        for rows in zip(*parts, strict=True):
            if rows[0] is not None:
                array = np.concatenate(rows)
                assert len(array) == size
                found = zlib.crc32(np.ascontiguousarray(array), found)
    return found


@pytest.mark.parametrize("kind", ["images", "text", "memory", "copy"])
def test_the_same_batches_for_any_number_of_processes(kind, text, tmp_path):
    script, flags = {
        "images": (image_classification, IMAGES),
        "text": (language_model, [*TEXT, f"--data.name={text}", "--network.memory=0"]),
        "memory": (language_model, [*TEXT, f"--data.name={text}"]),
        "copy": (copy_memory, ["--data.train=100", "--data.test=50", "--data.delay=9"]),
    }[kind]
    config = script.parse_arguments(command_line(*flags, "--batch-size=12"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "build_model", lambda *arguments: None)
        folder = types.SimpleNamespace(vocabulary=tmp_path / "vocabulary.json")
        dataset, _ = script.load(config, folder)

    def checksums(count):
        """Of an epoch of two seeds, and of the evaluation, read by so many processes."""
        parts = [Part(index, count) for index in range(count)]
        for seed in (0, 1):
            options = {"seed": seed, "epoch": 1, "start": 1}
            yield checksum([dataset.train_batches(12, **options, part=p) for p in parts], 12)
        yield checksum([dataset.evaluation_batches(12, part=p) for p in parts], 12)

    alone = list(checksums(1))
    for count in (2, 3, 4, 6, 12):
        assert list(checksums(count)) == alone
    # Streams go through the text in its order.
    assert (alone[0] == alone[1]) == (kind == "memory")
    with pytest.raises(UsageError, match="12 examples cannot be shared equally by 5 processes"):
        next(iter(dataset.train_batches(12, seed=0, epoch=0, part=Part(0, 5))))


@pytest.mark.parametrize(
    ("shape", "owners", "expected"),
    [
        ((4, 1, 1), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ((1, 4, 1), [0, 1, 2, 3], {0: (0, 4), 3: (3, 4)}),
        ((2, 1, 2), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        # The axis `tensor` goes across processes.
        ((1, 1, 2), [0, 1], {0: (0, 1), 1: (0, 1)}),
        ((2, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], {1: (0, 2), 2: (1, 2)}),
    ],
    ids=str,
)
def test_the_part_that_a_process_reads(shape, owners, expected, monkeypatch):
    devices = np.array([types.SimpleNamespace(process_index=owner) for owner in owners])
    axes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    mesh = types.SimpleNamespace(devices=devices.reshape(shape), shape=axes)
    for index, part in expected.items():
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        assert processes.own_part(mesh) == part


# ------------------------------------------------------------------------------- start and end


@pytest.mark.parametrize(
    ("variables", "tasks"),
    [
        ({}, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 4),
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}, 2),
        # A batch script, and one task of a larger job.
        ({"SLURM_NTASKS": "2"}, 1),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, 1),
    ],
    ids=str,
)
def test_tasks_of_a_scheduler(variables, tasks, monkeypatch):
    for name in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NODELIST", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes._scheduled_tasks() == tasks


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--processes.count=2"], "--processes.count needs --processes.coordinator HOST:PORT"),
        (["--processes.coordinator=auto"], "jax.distributed cannot start: "),
        (
            ["--processes.coordinator=a:1", "--processes.count=2", "--processes.index=0"],
            "--devices must be a multiple of the number of processes, 2, got 1",
        ),
    ],
    ids=str,
)
def test_processes_that_cannot_start(flags, said, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_abort_in_words", lambda message: None)
    ended = run(image_classification, *flags, f"--run.dir={tmp_path}")
    assert ended.code == 2
    assert said in ended.complaint
    assert not list(tmp_path.iterdir())


def test_errors_of_a_lost_process(monkeypatch):
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [::1]:6057\nmore")
    assert processes.lost_process(gloo) is None  # a process that is alone loses none
    monkeypatch.setattr(processes, "several", lambda: True)
    lost = processes.lost_process(gloo)
    assert isinstance(lost, LostProcessError)
    assert "Connection closed by peer [::1]:6057). Start all of them again" in str(lost)
    assert processes.lost_process(lost) is lost
    assert processes.lost_process(ValueError("shapes differ")) is None
