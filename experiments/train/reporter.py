"""What a run shows: a header, a bar, a line an epoch, findings, files, and its exit code."""

import errno
import functools
import importlib.metadata
import json
import math
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tqdm

from deq_jax import Execution, diagnose
from deq_jax.models.conv_deq import count_parameters
from deq_jax.stability import Limits
from experiments.report.figures import draw_curves
from experiments.train import metrics, processes
from experiments.train.config import Stability, TrainingConfig
from experiments.train.errors import ExperimentError, MissingExtraError, Stopped
from experiments.train.metrics import Record, Totals
from experiments.train.runs import RunFolder, flat_settings, write_atomically

_REDRAW_SECONDS = 30.0
_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a full disk
_NOT_WRITABLE += (errno.EROFS, errno.EACCES, errno.EPERM)  # forbidden
_NOT_WRITABLE += (errno.ENOTDIR, errno.EEXIST)  # no folder
_BAR_SECONDS = 10.0
"""Between two refreshes of a bar that goes to a file, where each one is a line."""


class EpochBar(tqdm.tqdm):
    """Progress of one epoch with its running loss, accuracy and evaluations."""

    def show(self, done: int, totals: Totals) -> None:
        """Moves to `done` steps; `totals` are on the host."""
        shown = {
            name.removeprefix("train_"): f"{value:.3f}"
            for name, value in metrics.loss_record(totals, "train").items()
        }
        for name, value in metrics.solve_record(totals).items():
            if name.endswith("_evaluations"):
                shown[name.removesuffix("_evaluations")] = f"{value:.1f}"
        self.set_postfix(shown, refresh=False)
        self.update(done - self.n)


class Reporter:
    """Reports the epochs of a run, in process 0.

    The history, which comes from the checkpoint, is the truth: files are rewritten from it, so that
    after a resumption they hold no epoch twice and none that was lost.

    Args:
        config: the settings.
        run: where the files go.
        history: the epochs done so far.

    Raises:
        MissingExtraError: TensorBoard events are asked for and tensorboardX is not installed.
    """

    def __init__(self, config: TrainingConfig, run: RunFolder, history: Sequence[Record]):
        self._config, self._run = config, run
        self._drawn = time.monotonic()
        self._explained: dict[str, int] = {}
        writes = config.run.tensorboard and processes.is_first()
        self._writer = _open_tensorboard(run) if writes else None
        self._write_metrics(history)
        for record in history:
            self._write_events(record)

    def bar(self, epoch: int, steps: int, done: int) -> EpochBar:
        """The progress bar of an epoch, counted from 0, of which so many steps are done."""
        return EpochBar(
            desc=f"epoch {epoch + 1}/{self._config.epochs}",
            total=steps,
            initial=done,
            unit="step",
            leave=False,
            disable=not (self._config.run.progress and processes.is_first()),
            mininterval=0.1 if sys.stderr.isatty() else _BAR_SECONDS,
        )

    def epoch(self, history: Sequence[Record]) -> None:
        """Reports the newest epoch, the last one of `history`."""
        self._write_metrics(history)
        self._write_events(history[-1])
        print(epoch_line(history[-1]), flush=True)
        if processes.is_first() and time.monotonic() - self._drawn > _REDRAW_SECONDS:
            draw_curves(history, self._run.curves)
            self._drawn = time.monotonic()

    def advise(self, epoch: int, totals: Totals) -> None:
        """Prints findings about the solves: with advice at first, then one line per epoch."""
        forward = metrics.solve_summary(totals, "forward")
        if forward is None:
            return
        findings = diagnose(
            forward,
            metrics.solve_summary(totals, "backward"),
            solver=self._config.solver,
            gradient=self._config.gradient_policy(),
            limits=Limits(converged=self._config.run.warn_below),
        )
        for finding in findings:
            last = self._explained.get(finding.title)
            if last is None:
                tqdm.tqdm.write(str(finding))
            elif last < epoch:
                tqdm.tqdm.write(
                    f"{finding.severity.name.lower()}: {finding.title}: {finding.evidence}"
                )
            self._explained[finding.title] = epoch

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write_metrics(self, history: Sequence[Record]) -> None:
        lines = []
        for record in history:
            # JSON has no NaN and no infinity.
            finite = {name: v if math.isfinite(v) else None for name, v in record.items()}
            lines.append(json.dumps(finite, allow_nan=False) + "\n")
        write_atomically(self._run.metrics, "".join(lines))

    def _write_events(self, record: Record) -> None:
        for name, value in record.items():
            if self._writer is not None and name not in ("epoch", "step"):
                self._writer.add_scalar(name, value, record["step"])


def epoch_line(record: Record) -> str:
    """One line of text for one epoch."""
    parts = [f"epoch {record['epoch']:3d}"]
    for split in ("train", "validation", "test"):
        if f"{split}_loss" in record:
            loss, accuracy = record[f"{split}_loss"], record[f"{split}_accuracy"]
            extra = f" + {record[f'{split}_extra']:.4f}" if f"{split}_extra" in record else ""
            parts.append(f"{split} loss {loss:.4f}{extra} accuracy {accuracy:.4f}")
            if f"{split}_bits_per_character" in record:
                parts[-1] += f" bits a character {record[f'{split}_bits_per_character']:.3f}"
    for solve in ("forward", "backward"):
        if f"{solve}_evaluations" in record:
            parts.append(
                f"{solve} {record[f'{solve}_evaluations']:.1f} evaluations, "
                f"{record[f'{solve}_converged']:.1%} converged, "
                f"worst residual {record[f'{solve}_residual_worst']:.1e}"
            )
            if record[f"{solve}_diverged"]:
                parts[-1] += f", {record[f'{solve}_diverged']} DIVERGED"
    parts.append(f"{record['seconds']:.1f} s")
    return " | ".join(parts)


def reports_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Makes of `main` a command that prints errors which the user can put right.

    The command returns its exit code:

    | code | meaning |
    | --- | --- |
    | 0 | finished |
    | 1 | the loss became NaN or infinite |
    | 2 | a bad flag, missing data, or a folder that holds another run or cannot be written |
    | 3 | another process of the run has ended, or does not answer |
    | 130, 143 | stopped by Ctrl-C, or by SIGTERM |

    One of several processes that meets an error ends at once and does not wait for the others,
    which then end with 3.
    """

    @functools.wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        try:
            main(arguments)
            return 0
        except Stopped as stopped:
            print(stopped)
            return stopped.exit_code
        except KeyboardInterrupt:  # before or after the training, where there is nothing to save
            code = 130
        except Exception as error:
            found = processes.lost_process(error) or _in_words(error)
            if found is None and not processes.several():
                raise
            print(f"error: {found}" if found else traceback.format_exc(), file=sys.stderr)
            code = found.exit_code if found else 1
        if processes.several():
            processes.leave(code)
        return code

    return command


def _in_words(error: Exception) -> ExperimentError | None:
    """What the user can put right about an error; None for an error of the program."""
    if isinstance(error, ExperimentError):
        return error
    if not isinstance(error, OSError) or error.errno not in _NOT_WRITABLE:
        return None
    return ExperimentError(
        f"cannot write {error.filename or 'to the folder of the run'}: {error.strerror}. Earlier "
        "checkpoints are intact; the same command resumes from them"
    )


def describe(config: TrainingConfig, model: Any, data: str, run: RunFolder) -> str:
    """What is trained, on what and where."""
    lines = [
        f"data: {data}",
        f"model: {config.model}, {count_parameters(model):,} parameters",
    ]
    if config.is_deq:
        layer = config.layer()
        lines += [f"solver: {layer['solver']}", f"gradient: {layer['gradient']}"]
        if layer["execution"] != Execution():
            lines.append(f"execution: {layer['execution']}")
        if changed := described_stability(config):
            lines.append(f"stability: {changed}")
    else:
        lines.append("a control has no solver: solver, gradient, backward and stability are unused")
    return "\n".join([*lines, f"device: {device_name(config)}", f"run: {run.path}"])


def described_stability(config: TrainingConfig) -> str:
    """The stability tools that are in use, in a line."""
    tools, none = flat_settings(config.stability or Stability()), flat_settings(Stability())
    return ", ".join(f"{name} {v}" for name, v in tools.items() if none.get(name) != v)


def device_name(config: TrainingConfig) -> str:
    """What the training runs on, in words."""
    device = jax.devices()[0]
    name = device.platform
    if device.device_kind != device.platform:
        name += f" ({device.device_kind})"
    if config.devices > 1:
        name = f"{config.devices} x {name}"
    for axis, size in (("fsdp", config.fsdp), ("tensor", config.tensor)):
        if size > 1:
            name += f", {axis} {size}"
    return f"{name}, {jax.process_count()} processes" if processes.several() else name


def environment(config: TrainingConfig) -> dict[str, str]:
    """The versions and the device, which are recorded with a run."""
    return {
        "deq_jax": importlib.metadata.version("deq_jax"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device_name(config),
    }


def _open_tensorboard(run: RunFolder) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"--run.tensorboard needs tensorboardX, which cannot be imported ({error}); install it "
            "with\n    pip install -e '.[tensorboard]'"
        ) from error
    # Events are written anew from the history, as an earlier file may hold lost epochs.
    if run.tensorboard.exists():
        shutil.rmtree(run.tensorboard)
    return SummaryWriter(str(run.tensorboard))
