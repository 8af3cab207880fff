"""What a run shows while it trains: a bar, a line an epoch, metrics.jsonl, curves, TensorBoard."""

import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from experiments.report.curves import draw_curves
from experiments.train.advice import Trouble, text
from experiments.train.errors import MissingExtraError
from experiments.train.runs import RunDirectory, write_atomically
from experiments.train.totals import Record, Totals

_REDRAW_SECONDS = 30.0

_BAR_SECONDS = 10.0
"""Between two refreshes of a bar that goes to a file, where each one is a line."""


class EpochBar:
    """Progress of one epoch with its running loss, accuracy and evaluations.

    Args:
        description: text before the bar.
        steps: steps in the epoch.
        done: steps already taken.
        shown: whether there is a bar at all.
    """

    def __init__(self, description: str, *, steps: int, done: int, shown: bool):
        self._bar = tqdm.tqdm(
            desc=description,
            total=steps,
            initial=done,
            unit="step",
            leave=False,
            disable=not shown,
            mininterval=0.1 if sys.stderr.isatty() else _BAR_SECONDS,
        )

    def show(self, done: int, totals: Totals) -> None:
        """Moves to `done` steps; `totals` are on the host."""
        texts = {name: f"{value:.3f}" for name, value in totals.record("train").items()}
        solver = totals.solver_record()
        for name in ("forward", "backward"):
            if f"{name}_evaluations" in solver:
                texts[name] = f"{solver[f'{name}_evaluations']:.1f}"
        self._bar.set_postfix(
            {name.removeprefix("train_"): text for name, text in texts.items()}, refresh=False
        )
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Takes the bar away."""
        self._bar.close()


class Reporter:
    """Reports the epochs of a run.

    The history passed in, which comes from the checkpoint, is the truth: files are rewritten from
    it, so that after a resumption they hold no epoch twice and none that was lost.

    Args:
        run: where the files go.
        tensorboard: write TensorBoard events as well.

    Raises:
        MissingExtraError: `tensorboard` without tensorboardX.
    """

    def __init__(self, run: RunDirectory, *, tensorboard: bool = False):
        self._run = run
        self._drawn = time.monotonic()
        self._explained: dict[str, int] = {}
        self._writer = _open_tensorboard(run) if tensorboard else None

    def start(self, history: Sequence[Record]) -> None:
        """Brings the files to the epochs done so far."""
        self._write_metrics(history)
        for record in history:
            self._write_events(record)

    def epoch(self, history: Sequence[Record]) -> None:
        """Reports the newest epoch, the last one of `history`."""
        self._write_metrics(history)
        self._write_events(history[-1])
        print(epoch_line(history[-1]), flush=True)
        if time.monotonic() - self._drawn > _REDRAW_SECONDS:
            draw_curves(history, self._run.curves)
            self._drawn = time.monotonic()

    def warn(self, epoch: int, troubles: Sequence[Trouble]) -> None:
        """Says what is wrong: with advice the first time, then in a line, once an epoch."""
        for trouble in troubles:
            last = self._explained.get(trouble.title)
            if last is None:
                tqdm.tqdm.write(text(trouble))
            elif last < epoch:
                tqdm.tqdm.write(f"warning: {trouble.title}: {trouble.evidence}")
            self._explained[trouble.title] = epoch

    def close(self) -> None:
        """Finishes the event file."""
        if self._writer is not None:
            self._writer.close()

    def _write_metrics(self, history: Sequence[Record]) -> None:
        lines = [json.dumps(_finite(record), allow_nan=False) + "\n" for record in history]
        write_atomically(self._run.metrics, "".join(lines))

    def _write_events(self, record: Record) -> None:
        if self._writer is None:
            return
        for name, value in record.items():
            if name not in ("epoch", "step"):
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


def _finite(record: Record) -> dict[str, float | int | None]:
    """The record with None for what JSON cannot hold."""
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


def _open_tensorboard(run: RunDirectory) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise MissingExtraError(
            f"--tensorboard needs tensorboardX, which cannot be imported ({error}); install it "
            "with\n    pip install -e '.[tensorboard]'"
        ) from error
    # Events are written anew from the history, as an earlier file may hold lost epochs.
    if run.tensorboard.exists():
        shutil.rmtree(run.tensorboard)
    return SummaryWriter(str(run.tensorboard))
