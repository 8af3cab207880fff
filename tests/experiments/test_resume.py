"""Runs that are killed, stopped or damaged, and go on to the same bits as one that is not."""

import errno
import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import image_classification as script
from experiments.data.images import ImageDataset
from experiments.train import loop, runs
from experiments.train.errors import CheckpointError, RunInUseError
from experiments.train.loop import Progress, graceful_stop
from experiments.train.runs import Checkpoints, RunFolder
from tests.conftest import CACHE
from tests.experiments.conftest import TINY
from tests.experiments.training import (
    Parts,
    StopAfter,
    checkpoint_numbers,
    command_line,
    leaves,
    records,
    run,
)

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20

pytestmark = pytest.mark.usefixtures("without_figures")


@pytest.fixture(scope="module")
def parts():
    with jax.numpy_dtype_promotion("standard"):
        return Parts(script, *TINY)


@pytest.fixture
def ends_as(parts, image_run):
    """`ends_as(folder)` compares a run, bit for bit, with one that nothing happened to."""

    def compare(folder, image_run=image_run):
        assert records(folder) == records(image_run.folder)
        (state, progress), (expected, whole) = map(parts.restored, (folder, image_run.folder))
        assert (progress.epoch, progress.position, progress.data) == (2, 0, whole.data)
        assert leaves(state) == leaves(expected)

    return compare


@pytest.fixture
def unfinished(image_run, tmp_path):
    """A copy of the finished run with what it was after its first epoch, and after its second."""
    folder = tmp_path / "unfinished"
    shutil.copytree(image_run.folder, folder)
    (folder / "result.json").unlink()
    return folder


# ------------------------------------------------------------------------------ kills and stops


def start(folder, *flags):
    """Starts the command in a process of its own, which computes what the tests' process does."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "PYTHONWARNINGS": "error",
        # JAX 0.10.0 takes what is in its own cache for code of another machine, and says so.
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    words = command_line(*TINY, f"--run.dir={folder}", *flags)
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.image_classification", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
def test_a_killed_and_interrupted_run_ends_with_the_same_bits(tmp_path, parts, ends_as, image_run):
    # It saves after each step, so that the kill is likely to hit it while it writes.
    process = start(tmp_path, "--run.save-every=1")
    wait_until(lambda: max(checkpoint_numbers(tmp_path), default=0) >= 6, process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    _, progress = parts.restored(tmp_path)
    assert (progress.epoch, progress.history) == (0, [])
    assert 0 < progress.position < STEPS

    # What a kill may leave behind in the middle of writing.
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "st')
    process = start(tmp_path, "--run.save-every=1")
    newest = max(checkpoint_numbers(tmp_path))
    wait_until(lambda: max(checkpoint_numbers(tmp_path)) > newest, process)
    process.send_signal(signal.SIGINT)
    output, complaint = process.communicate()
    assert process.returncode == 130
    assert "once more to stop without saving" in complaint
    assert f"going on in epoch 1 after step {progress.position}" in output
    assert output.splitlines()[-1].startswith("stopped in epoch ")
    assert "and saved" in output.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()

    ended = run(script, *TINY, f"--run.dir={tmp_path}")
    assert (ended.code, ended.errors) == (0, "")
    assert "going on in epoch " in ended.output
    assert ended.lines[-1] == image_run.ended.lines[-1]
    ends_as(tmp_path)


@pytest.mark.slow
def test_a_stop_at_any_boundary_loses_nothing(tmp_path, parts, ends_as, monkeypatch):
    """Stops at each question that the loop asks: between two steps, and in the evaluation."""
    # 9 questions are a few steps, or the two batches of an evaluation and a few steps.
    monkeypatch.setattr(loop, "graceful_stop", lambda: StopAfter(9))
    positions = []
    while (ended := run(script, *TINY, f"--run.dir={tmp_path}")).code == 130:
        _, progress = parts.restored(tmp_path)
        positions.append((progress.epoch, progress.position))
        where = f"stopped in epoch {progress.epoch + 1}, step {progress.position}, and saved"
        assert where in ended.output
        assert len(positions) <= 10
    assert ended.code == 0
    # In an epoch of 20 steps: after 9, 18; in the other one 5 steps on, since the evaluation asks
    # twice and the last answer is no.
    assert positions == [(0, 9), (0, 18), (1, 5), (1, 14)]
    ends_as(tmp_path)


@pytest.mark.slow
def test_a_stop_before_the_evaluation_does_it_later(tmp_path, parts, monkeypatch):
    flags = [*TINY, "--epochs=1", "--data.train=20", "--data.eval=200", f"--run.dir={tmp_path}"]
    for questions, position in ((0, 0), (2, 2), (1, 2)):
        monkeypatch.setattr(loop, "graceful_stop", lambda questions=questions: StopAfter(questions))
        ended = run(script, *flags)
        assert ended.code == 130
        assert f"stopped in epoch 1, step {position}" in ended.output
    # What was not due was saved all the same.
    assert checkpoint_numbers(tmp_path) == [1, 2]
    monkeypatch.setattr(loop, "graceful_stop", lambda: StopAfter(2))
    assert run(script, *flags).code == 0
    assert [record["step"] for record in records(tmp_path)] == [2]


def test_signals_are_noted_once_and_handlers_restored():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with graceful_stop() as stop:
        assert not stop.requested()
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested()
        assert stop.exit_code == 143
        # The next one kills.
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


# --------------------------------------------------------------------------- damaged checkpoints


def truncate(checkpoint):
    """Cuts the largest file in half."""
    largest = max(checkpoint.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    os.truncate(largest, largest.stat().st_size // 2)


def garble(checkpoint):
    """Other bytes in every file of the arrays."""
    for path in (checkpoint / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(255 - byte for byte in path.read_bytes()))


def lose_arrays(checkpoint):
    shutil.rmtree(checkpoint / "state")


def lose_progress(checkpoint):
    shutil.rmtree(checkpoint / "progress")


@pytest.mark.parametrize("damage", [truncate, garble, lose_arrays, lose_progress])
@pytest.mark.slow
def test_the_checkpoint_before_a_damaged_one_is_used(damage, unfinished, ends_as, image_run):
    damage(unfinished / "checkpoints" / "1")
    ended = run(script, *TINY, f"--run.dir={unfinished}")
    assert (ended.code, ended.errors) == (0, "")
    (warning,) = (line for line in ended.lines if line.startswith("warning: "))
    assert f"checkpoint 1 in {unfinished / 'checkpoints'} cannot be read (" in warning
    assert warning.endswith("it is deleted, and checkpoint 0 is used")
    assert "going on in epoch 2 after step 0" in ended.output
    assert ended.lines[-1] == image_run.ended.lines[-1]
    ends_as(unfinished)


def test_no_checkpoint_that_can_be_read_is_an_error(unfinished):
    for number in ("0", "1"):
        truncate(unfinished / "checkpoints" / number)
    ended = run(script, *TINY, f"--run.dir={unfinished}")
    assert ended.code == 2
    assert f"no checkpoint in {unfinished / 'checkpoints'} can be read" in ended.complaint
    assert "checkpoint 1, failed with: " in ended.complaint
    # Nothing is deleted that somebody may still save.
    assert checkpoint_numbers(unfinished) == [0, 1]


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
            checkpoints.save(state, vars(Progress(epoch=number, history=[{"loss": 0.1}])))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    template = {name: jnp.zeros_like(leaf) for name, leaf in state.items() if name != "key"}
    template = {name: template.get(name, jax.random.key(0)) for name in state}
    with Checkpoints(tmp_path) as checkpoints:
        restored, progress = checkpoints.restore(template)
    assert Progress(**progress) == Progress(epoch=3, history=[{"loss": 0.1}])
    assert leaves(restored) == leaves(state)
    assert jnp.array_equal(jax.random.normal(restored["key"]), jax.random.normal(state["key"]))


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    state = {"weights": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"epoch": 1})
    unfinished = tmp_path / "1.orbax-checkpoint-tmp"
    (unfinished / "state").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(state)[1] == {"epoch": 1}
        checkpoints.save(state, {"epoch": 2})
        assert checkpoints.restore(state)[1] == {"epoch": 2}


# ----------------------------------------------------------------- the folder, and what it holds


def test_a_finished_run_prints_its_result_again(image_run, monkeypatch):
    """It needs no data for that; and what the result does not depend on may differ."""
    monkeypatch.setattr(script, "load_images", None)
    before = {path: path.read_bytes() for path in image_run.folder.rglob("*") if path.is_file()}
    flags = ["--run.save-every=5", "--data.dir=elsewhere", f"--run.dir={image_run.folder}"]
    ended = run(script, *TINY, *flags)
    assert (ended.code, ended.errors) == (0, "")
    assert ended.lines == [
        f"{image_run.folder} is finished; --run.fresh starts over",
        image_run.ended.lines[-1],
    ]
    for path, content in before.items():
        assert path.read_bytes() == content


def test_other_settings_are_refused_by_name(image_run):
    flags = ["solver:picard", "--epochs=3", "--solver.tol=0.2", f"--run.dir={image_run.folder}"]
    ended = run(script, *TINY, *flags)
    assert ended.code == 2
    assert "epochs was 2, is now 3; " in ended.complaint
    assert "solver was Anderson, is now Picard; " in ended.complaint
    assert "solver.tol was 0.1, is now 0.2. " in ended.complaint
    assert "network" not in ended.complaint
    for hint in ("Go on with its settings", "--run.fresh", "--run.dir"):
        assert hint in ended.complaint


def test_runs_of_another_command_or_version_are_refused(unfinished):
    from experiments import copy_memory

    ended = run(copy_memory, f"--run.dir={unfinished}")
    assert ended.code == 2
    assert "of experiments.image_classification, not of experiments.copy_memory" in ended.complaint
    (unfinished / "config.json").write_text('{"config": {"epochs": 2}}')
    ended = run(script, *TINY, f"--run.dir={unfinished}")
    assert ended.code == 2
    assert "holds a run of deq_jax 0.1; start over with --run.fresh" in ended.complaint


def test_other_data_are_refused(unfinished, monkeypatch):
    original = script.load_images

    def other_images(*arguments, **options):
        dataset = original(*arguments, **options)
        dataset._train.images[0, 0, 0, 0] ^= 1
        return dataset

    monkeypatch.setattr(script, "load_images", other_images)
    ended = run(script, *TINY, f"--run.dir={unfinished}")
    assert ended.code == 2
    assert "was trained on other data" in ended.complaint
    assert "--run.fresh" in ended.complaint


@pytest.mark.slow
def test_a_fresh_start_deletes_the_run_and_nothing_else(unfinished, ends_as):
    (unfinished / "notes.txt").write_text("mine")
    ended = run(script, *TINY, "--run.fresh", "--run.save-every=7", f"--run.dir={unfinished}")
    assert ended.code == 0
    assert "going on" not in ended.output
    assert '"run.save_every": 7' in (unfinished / "config.json").read_text()
    assert (unfinished / "notes.txt").read_text() == "mine"
    assert not (unfinished / "tensorboard").exists()
    # Saved after 7, 14, 20, 21, 28, 35 and 40 steps, from 0 on.
    assert checkpoint_numbers(unfinished) == [5, 6]
    ends_as(unfinished)


@pytest.mark.slow
def test_a_corrected_flag_does_not_meet_the_refused_one(tmp_path, ends_as):
    assert run(script, *TINY, "--batch-size=201", f"--run.dir={tmp_path}").code == 2
    assert run(script, *TINY, f"--run.dir={tmp_path}").code == 0
    ends_as(tmp_path)


def test_two_runs_in_one_folder(tmp_path):
    """The second one is told, and leaves the first one's files alone."""
    folder, config = RunFolder(tmp_path), script.parse_arguments(TINY)
    with folder.open("image_classification", config, TINY, {}):
        before = folder.config.read_text()
        ended = run(script, *TINY, "--run.fresh", f"--run.dir={tmp_path}")
        assert ended.code == 2
        assert f"another process is training in {tmp_path}; wait for it" in ended.complaint
        with pytest.raises(RunInUseError), folder.open("image_classification", config, TINY, {}):
            raise AssertionError("the folder was opened twice")
        assert folder.config.read_text() == before
    with folder.open("image_classification", config, TINY, {}):
        assert folder.config.read_text() == before


@pytest.mark.parametrize("settings", [None, '{"learning_rate": 0.1}'])
def test_a_folder_of_something_else_is_left_alone(tmp_path, settings):
    """Checkpoints of another program, with or without a config.json of its own."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "best.pt").write_text("years of work")
    if settings is not None:
        (tmp_path / "config.json").write_text(settings)
    before = {path: path.read_text() for path in tmp_path.rglob("*.*") if path.is_file()}
    for more in ([], ["--run.fresh"]):
        ended = run(script, *TINY, *more, f"--run.dir={tmp_path}")
        assert ended.code == 2
        assert f"{tmp_path} is no folder of a run, but has checkpoints" in ended.complaint
        assert {path: path.read_text() for path in before} == before


@pytest.mark.parametrize("promised", [19, 21])
@pytest.mark.slow
def test_an_epoch_of_another_length_than_promised_is_an_error(tmp_path, monkeypatch, promised):
    """Data of one's own whose `steps_per_epoch` is wrong; it has 20."""
    batches = ImageDataset.train_batches
    steps = ImageDataset.steps_per_epoch

    def with_right_length(self, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ImageDataset, "steps_per_epoch", steps)
            return batches(self, *arguments, **options)

    monkeypatch.setattr(ImageDataset, "steps_per_epoch", lambda self, size: promised)
    monkeypatch.setattr(ImageDataset, "train_batches", with_right_length)
    with pytest.raises(ValueError, match=f"had 20 batches, but steps_per_epoch is {promised}"):
        run(script, *TINY, f"--run.dir={tmp_path}")


# -------------------------------------------------------------- folders that cannot be written to


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("no folder")
    ended = run(script, *TINY, f"--run.dir={tmp_path / 'file' / 'run'}")
    assert ended.code == 2
    assert f"error: cannot write {tmp_path / 'file'}" in ended.complaint
    assert "Traceback" not in ended.errors


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.slow
def test_a_file_that_cannot_be_written(number, unfinished, ends_as, monkeypatch):
    """In the middle of a run: its metrics, once the second epoch is done and saved."""
    shutil.rmtree(unfinished / "checkpoints" / "1")
    original = runs.os.replace

    def replace(source, target):
        if len(Path(source).read_text().splitlines()) == 2:  # two epochs
            raise OSError(number, os.strerror(number), str(target))
        original(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", replace)
        ended = run(script, *TINY, f"--run.dir={unfinished}")
    assert ended.code == 2
    name = unfinished / "metrics.jsonl"
    assert f"error: cannot write {name}: {os.strerror(number)}. " in ended.complaint
    assert "the same command resumes from them" in ended.complaint
    assert len(records(unfinished)) == 1
    assert checkpoint_numbers(unfinished) == [0, 1]
    assert run(script, *TINY, f"--run.dir={unfinished}").code == 0
    ends_as(unfinished)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(unfinished, ends_as, monkeypatch):
    """A full disk, as Orbax meets it: here a limit on the size of a file."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # given back after the test
    shutil.rmtree(unfinished / "checkpoints" / "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        ended = run(script, *TINY, "--run.save-every=7", f"--run.dir={unfinished}")
        gc.collect()  # what Orbax leaves behind complains in this test, not in a later one
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert ended.code == 2
    message = f"error: cannot write a checkpoint to {unfinished / 'checkpoints'}: "
    assert message in ended.complaint
    assert "File too large" in ended.complaint
    assert "Earlier checkpoints are intact" in ended.complaint
    assert "Traceback" not in ended.errors
    assert checkpoint_numbers(unfinished) == [0]
    assert run(script, *TINY, f"--run.dir={unfinished}").code == 0
    ends_as(unfinished)


def test_checkpoints_after_one_that_failed(tmp_path, monkeypatch):
    """The one before is whole, and the next one can be written."""
    state = {"weights": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"epoch": 1})

        def fail(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints._manager, "save", fail)
            with pytest.raises(CheckpointError, match="No space left on device"):
                checkpoints.save(state, {"epoch": 2})
        assert checkpoints.restore(state)[1] == {"epoch": 1}
        checkpoints.save({"weights": jnp.zeros(3)}, {"epoch": 3})
        restored, progress = checkpoints.restore(state)
    assert progress == {"epoch": 3}
    np.testing.assert_array_equal(restored["weights"], np.zeros(3))


# ------------------------------------------------------------------------- the number of devices


@pytest.mark.slow
def test_another_number_of_devices_needs_leave(unfinished, image_run):
    """Which gives the same accuracy, and bits of its own."""
    shutil.rmtree(unfinished / "checkpoints" / "1")
    flags = [*TINY, f"--run.dir={unfinished}"]
    ended = run(script, *flags, "--devices=2")
    assert ended.code == 2
    assert "a run in which devices was 1, is now 2; --run.elastic goes on" in ended.complaint
    ended = run(script, *flags, "--devices=2", "--run.elastic", "--seed=1")
    assert ended.code == 2
    assert "seed was 0, is now 1" in ended.complaint

    ended = run(script, *flags, "--devices=2", "--run.elastic")
    assert ended.code == 0
    assert "note: devices was 1, is now 2: " in ended.output
    assert "going on in epoch 2 after step 0" in ended.output
    first, second = records(unfinished)
    expected = records(image_run.folder)
    assert first == expected[0]
    assert second == pytest.approx(expected[1], rel=0.02)
    # It is a run of two devices from here on.
    assert '"devices": 2' in (unfinished / "config.json").read_text()
    assert run(script, *flags, "--devices=2").lines[-1] == ended.lines[-1]
    assert run(script, *flags).code == 2
