"""The folder of a run: its files, its settings, its checkpoints, and what may be continued."""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from experiments.train import processes
from experiments.train.errors import (
    CheckpointError,
    RunInUseError,
    RunMismatchError,
    UsageError,
)

PyTree = Any

_AFTERMATH = (
    "Event loop is closed",
    "Encountered error while reading array index",
    "was never awaited",
)
"""What tensorstore's futures and Orbax's coroutines, which outlive the event loop of a read or a
write that failed, complain of at any time until the process ends."""

_IRRELEVANT = ("run", "processes", "data.dir")
"""A run may be resumed with other values of these settings, on which its result does not depend.
What `data.dir` holds is compared by its checksum, and the number of processes by what it was."""

_ELASTIC = ("devices", "fsdp", "tensor", "number of processes")
"""With other values of these settings a run may go on if `--run.elastic` allows it."""


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file that is never seen half-written; only in process 0."""
    if not processes.is_first():
        return
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def flat_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """The settings by the names that their flags have: `optim.lr`, `solver`, `solver.history`.

    The value of a choice is the name of its class; functions, which no flag sets, are left out.
    """
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            settings[name] = type(value).__name__
            settings |= flat_settings(value, f"{name}.")
        elif not callable(value):
            settings[name] = value
    return settings


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; created by `open`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.curves = self.path / "curves.png"
        self.residuals = self.path / "residuals.png"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    @contextlib.contextmanager
    def open(
        self, script: str, config: Any, arguments: Sequence[str], environment: Mapping[str, Any]
    ) -> Iterator[None]:
        """Starts a run here, or checks that the one here has the same settings; then holds it.

        With several processes, process 0 does so while the others wait.

        Args:
            script: name of the command in `experiments`.
            config: its settings.
            arguments: its command line, with which the settings are made again.
            environment: recorded next to the settings of a new run; need not agree.

        Raises:
            RunMismatchError: the run here is of another command or has other settings; the message
                names them.
            RunInUseError: another run has this folder open.
            UsageError: not all processes see this folder.
        """
        with contextlib.ExitStack() as stack:
            if processes.is_first():
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(self._locked())
                if config.run.fresh:
                    self._delete()
                self._check(script, config, arguments, environment)
            processes.wait_for_all("the folder of the run is open")
            if not self.config.exists():
                raise UsageError(
                    f"--run.dir must be on a file system that all processes share; there is no "
                    f"{self.config} here, which process 0 has written"
                )
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / ".lock", "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInUseError(
                    f"another process is training in {self.path}; wait for it, or choose another "
                    "folder with --run.dir"
                ) from None
            yield  # the lock goes when the file is closed, also when the process is killed

    def _check(
        self, script: str, config: Any, arguments: Sequence[str], environment: Mapping[str, Any]
    ) -> None:
        settings = json.loads(json.dumps(flat_settings(config)))
        document = {
            "script": script,
            "arguments": list(arguments),
            "config": settings,
            "environment": dict(environment),
            "processes": jax.process_count() if processes.several() else 1,
        }
        text = json.dumps(document, indent=2) + "\n"
        if not self.has_checkpoint():
            # Nothing was trained here yet. After a refused flag is corrected, the refused settings
            # are not compared.
            self._delete()
            write_atomically(self.config, text)
            return
        earlier = json.loads(self.config.read_text(encoding="utf-8"))
        if "arguments" not in earlier:
            raise RunMismatchError(
                f"{self.path} holds a run of deq_jax 0.1; start over with --run.fresh, or "
                "choose another --run.dir"
            )
        if earlier["script"] != script:
            raise RunMismatchError(
                f"{self.path} holds a run of experiments.{earlier['script']}, not of "
                f"experiments.{script}. Start over with --run.fresh, or choose another --run.dir"
            )
        number = {"number of processes": earlier.get("processes", 1)}
        now = {"number of processes": document["processes"]}
        differing = differences(earlier["config"] | number, settings | now)
        moved = ", ".join(differing[name] for name in _ELASTIC if name in differing)
        if config.run.elastic and moved:
            differing = {name: text for name, text in differing.items() if name not in _ELASTIC}
            print(f"note: {moved}: sums are rounded differently from here on")
            if not differing:
                write_atomically(self.config, text)
        elif moved and all(name in _ELASTIC for name in differing):
            raise RunMismatchError(
                f"{self.path} holds a run in which {moved}; --run.elastic goes on with it all the "
                "same, to the same accuracy but not to the same bits"
            )
        if differing:
            raise RunMismatchError(
                f"{self.path} holds a run with other settings: {'; '.join(differing.values())}. "
                "Go on with its settings, start over with --run.fresh, or choose another --run.dir"
            )

    def has_checkpoint(self) -> bool:
        """Whether something was trained here."""
        return self.config.exists() and any(
            folder.name.isdecimal() for folder in self.checkpoints.glob("*")
        )

    def read_result(self) -> dict[str, Any] | None:
        """What a finished run came to; None for a run that is not finished."""
        if not self.result.exists():
            return None
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        write_atomically(self.result, json.dumps(result, indent=2) + "\n")

    def _is_ours(self) -> bool:
        """Whether this is the folder of a run: it has settings, and they name a command."""
        try:
            return "script" in json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False

    def _delete(self) -> None:
        own = (self.metrics, self.curves, self.residuals, self.vocabulary, self.result)
        if not self._is_ours():
            foreign = [
                path.name for path in (*own, self.checkpoints, self.tensorboard, self.config)
            ]
            if present := [name for name in foreign if (self.path / name).exists()]:
                raise RunMismatchError(
                    f"{self.path} is no folder of a run, but has {', '.join(present)}, which a run "
                    "would overwrite; choose another folder with --run.dir"
                )
            return
        # The result goes first, as it would mark the run as finished. The settings go last, so that
        # an interrupted deletion still shows which run it was.
        self.result.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.metrics, self.curves, self.residuals, self.vocabulary, self.config):
            file.unlink(missing_ok=True)


def differences(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """In which settings two runs differ, in words, by the settings' names."""
    return {
        name: f"{name} was {earlier.get(name, 'absent')}, is now {now.get(name, 'absent')}"
        for name in sorted(earlier.keys() | now.keys())
        if earlier.get(name, "absent") != now.get(name, "absent")
        and not any(name == other or name.startswith(f"{other}.") for other in _IRRELEVANT)
    }


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """No: `processes.Stop` asks JAX, which takes each question for the step of this process."""
        del step
        return False


class Checkpoints:
    """The newest checkpoints of one run.

    A checkpoint appears under its name only once all of it is written, so that a process killed
    while it writes leaves the one before as the newest. They are numbered in the order of writing:
    the state between the last step of an epoch and the evaluation, and the one after it, have the
    same step but are not the same.

    Arrays come back bit for bit, on as many devices and processes as then there are. All processes
    save and restore together, and each writes what its devices hold.

    Args:
        directory: folder for the checkpoints, created if it is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        folder = pathlib.Path(directory).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True, create=False
        )
        if processes.several():
            # Named, the processes wait for each other with a timeout, and not by a collective.
            options.multiprocessing_options.active_processes = set(range(jax.process_count()))
        self._silence = contextlib.ExitStack()
        self._fails = self._silence.enter_context(_orbax_silent())
        self._manager = _Manager(folder, options=options)
        newest = self._manager.latest_step()
        self._next = 0 if newest is None else newest + 1

    def save(self, state: PyTree, progress: dict[str, Any]) -> None:
        """Copies a state and writes it in the background; a second call waits for the first.

        The state's buffers may be donated at once: a CPU's buffer that is still being read is not
        used again.

        Args:
            state: pytree of arrays.
            progress: anything that JSON can hold.

        Raises:
            CheckpointError: it, or the one before it, could not be written.
        """
        with self._errors_in_words():
            self._manager.save(
                self._next,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
                ),
            )
        self._next += 1

    def wait(self) -> None:
        """Waits until what was saved is on disk.

        Raises:
            CheckpointError: it could not be written; those before it are whole.
        """
        with self._errors_in_words():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _errors_in_words(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            self._fails()
            if lost := processes.lost_process(error):
                raise lost from error
            raise CheckpointError(
                f"cannot write a checkpoint to {self._manager.directory}: {_first_line(error)}. "
                "Earlier checkpoints are intact; the same command resumes from the newest of them"
            ) from error

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint, or, with a warning, the one before if it is damaged.

        Args:
            template: a pytree like the one saved; its arrays give shapes, dtypes and shardings.

        Returns:
            The state and its progress, or None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or their arrays are not
                those of `template`.
        """
        failures: list[tuple[int, Exception]] = []
        for number in sorted(self._manager.all_steps(), reverse=True):
            restored = None
            try:
                restored = self._restore(number, template)
            # Orbax and tensorstore raise errors of many classes for damaged files.
            except Exception as error:
                self._fails()
                if lost := processes.lost_process(error):
                    raise lost from error
                failures.append((number, error))
            if not processes.all_say(restored is not None):
                if restored is not None:
                    failures.append((number, OSError("another process cannot read its part")))
                continue
            for damaged, error in failures:
                print(
                    f"warning: checkpoint {damaged} in {self._manager.directory} cannot be read "
                    f"({_first_line(error)}); it is deleted, and checkpoint {number} is used",
                    flush=True,
                )
                self._manager.delete(damaged)
            return restored
        if failures:
            number, error = failures[0]
            raise CheckpointError(
                f"no checkpoint in {self._manager.directory} can be read with these settings; the "
                f"newest, checkpoint {number}, failed with: {_first_line(error)}"
            ) from error
        return None

    def _restore(self, number: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        restored = self._manager.restore(
            number,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
            ),
        )
        return restored.state, restored.progress

    def close(self) -> None:
        """Waits for what is being written, and releases what Orbax holds.

        Raises:
            CheckpointError: it could not be written.
        """
        with self._silence, self._errors_in_words():
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # Closing waits for the other processes, which an error may have parted from this one.
        if kind is None or not processes.several():
            self.close()


@contextlib.contextmanager
def _orbax_silent() -> Iterator[Callable[[], None]]:
    """Keeps Orbax and tensorstore from printing a traceback in each thread that meets an error.

    The error is raised as well, at the latest by the next save, and turned into one message. Yields
    a function to call then: what complains later of the same error is kept silent too.
    """
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    failed = []

    def without_aftermath(unraisable: Any) -> None:
        if not any(words in str(unraisable.exc_value) for words in _AFTERMATH):
            hook(unraisable)

    logger.addFilter(_refuse)
    sys.unraisablehook = without_aftermath
    try:
        yield lambda: failed.append(True)
    finally:
        logger.removeFilter(_refuse)
        if failed:
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        else:
            sys.unraisablehook = hook


def _refuse(record: logging.LogRecord) -> bool:
    del record
    return False


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition("\n")[0]
    if len(line) > 200:  # tensorstore names paths first, and the reason last
        line = f"{line[:60]} ... {line[-135:]}"
    return f"{type(error).__name__}: {line}"
