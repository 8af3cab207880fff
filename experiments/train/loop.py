"""The training loop: epochs of steps that can be interrupted and gone on with at any step."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import jax
import optax

from experiments.train.advice import Trouble
from experiments.train.checkpoints import Checkpoints
from experiments.train.errors import NonFiniteError
from experiments.train.logging import EpochBar, Reporter
from experiments.train.signals import GracefulStop
from experiments.train.totals import Record, Totals
from experiments.train.training import Batch, NumberedTrainStep, StopRequested, TrainState

_LOOK_SECONDS = 0.25
"""How often the loop waits for the device, to show where it is and whether the loss is finite."""

_ENOUGH_STEPS = 10
"""Steps of an epoch after which its figures say something."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        epochs: number of epochs.
        steps_per_epoch: steps in each of them.
        batches: `batches(epoch, position)` yields the batches of an epoch from `position` on.
        train_step: `train_step(state, batch, number)` takes the step with that number, from 0.
        evaluate: `evaluate(state, stop)` gives figures to report, or None if `stop()` became true.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        schedule: learning rate at a step.
        troubles: what a record of an epoch, or of the first steps of one, shows to be wrong.
    """

    epochs: int
    steps_per_epoch: int
    batches: Callable[[int, int], Iterator[Batch]]
    train_step: NumberedTrainStep
    evaluate: Callable[[TrainState, StopRequested], Record | None]
    evaluate_every: int
    schedule: optax.Schedule
    troubles: Callable[[Record], list[Trouble]] = lambda record: []


@dataclasses.dataclass
class Progress:
    """Where a run is; with the state, all that is needed to go on.

    Attributes:
        epoch: epochs finished.
        position: steps taken in the current epoch.
        seconds: time spent on the current epoch so far.
        history: one record for each finished epoch.
        data: checksum of the data; with others the run would not be the same.
    """

    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    history: list[Record] = dataclasses.field(default_factory=list)
    data: int = 0


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Trains, reports and saves.

    Attributes:
        task: what is trained.
        checkpoints: where to save.
        reporter: what to show.
        stop: says when somebody asks to stop.
        checkpoint_seconds: save this often besides each epoch's end; 0 for after each step.
        show_bar: show a progress bar.
    """

    task: Task
    checkpoints: Checkpoints
    reporter: Reporter
    stop: GracefulStop
    checkpoint_seconds: float
    show_bar: bool

    def run(self, state: TrainState, progress: Progress) -> TrainState | None:
        """Trains from `progress` to the last epoch.

        Args:
            state: the state there; used up.
            progress: updated in place.

        Returns:
            The trained state, or None if it was asked to stop; then all is saved.

        Raises:
            NonFiniteError: a loss or gradient was not finite. Nothing of it is saved.
        """
        self.reporter.start(progress.history)
        while progress.epoch < self.task.epochs:
            started = time.monotonic() - progress.seconds
            state = self._train_epoch(state, progress, started)
            record = self._finish_epoch(state, progress, started)
            if record is None:
                self._save(state, progress, started)
                return None
            progress.history.append(record)
            progress.epoch, progress.position, progress.seconds = progress.epoch + 1, 0, 0.0
            state = state._replace(totals=_cleared(state.totals))
            # First the checkpoint, then the files: what they show is never ahead of it.
            self._save(state, progress, time.monotonic())
            self.reporter.epoch(progress.history)
        return state

    def _train_epoch(self, state: TrainState, progress: Progress, started: float) -> TrainState:
        """Takes the remaining steps of the epoch, or as many as there is leave for."""
        bar = EpochBar(
            f"epoch {progress.epoch + 1}/{self.task.epochs}",
            steps=self.task.steps_per_epoch,
            done=progress.position,
            shown=self.show_bar,
        )
        warned = False
        looked = saved = time.monotonic()
        previous = None
        try:
            for batch in self.task.batches(progress.epoch, progress.position):
                if self.stop.requested():
                    break
                number = progress.epoch * self.task.steps_per_epoch + progress.position
                state, metrics = self.task.train_step(state, batch, number)
                progress.position += 1
                # Waiting for the step before keeps the device busy with this one, and keeps the
                # host from queueing the whole epoch, after which nobody could stop it.
                jax.block_until_ready(previous)
                previous = metrics
                now = time.monotonic()
                if now - looked >= _LOOK_SECONDS:
                    totals = self._look(state, progress)
                    bar.show(progress.position, totals)
                    if not warned and progress.position >= _ENOUGH_STEPS:
                        warned = self._warn(totals.solver_record(), progress)
                    looked = time.monotonic()
                if now - saved >= self.checkpoint_seconds:
                    self._save(state, progress, started)
                    saved = time.monotonic()
        finally:
            bar.close()
        return state

    def _finish_epoch(self, state: TrainState, progress: Progress, started: float) -> Record | None:
        """The record of a finished epoch; None if it is not finished because of a stop."""
        totals = self._look(state, progress)
        if progress.position < self.task.steps_per_epoch:
            return None
        epoch, step = progress.epoch + 1, int(state.step)
        record: Record = {"epoch": epoch, "step": step} | totals.record("train")
        if epoch % self.task.evaluate_every == 0 or epoch == self.task.epochs:
            evaluated = self.task.evaluate(state, self.stop.requested)
            if evaluated is None:
                return None
            record |= evaluated
        record |= totals.solver_record()
        record["learning_rate"] = float(self.task.schedule(step - 1))
        record["seconds"] = time.monotonic() - started
        self._warn(record, progress)
        return record

    def _warn(self, record: Record, progress: Progress) -> bool:
        """Says what is wrong in words; whether something is."""
        troubles = self.task.troubles(record)
        self.reporter.warn(progress.epoch + 1, troubles)
        return bool(troubles)

    def _save(self, state: TrainState, progress: Progress, started: float) -> None:
        self._look(state, progress)
        progress.seconds = time.monotonic() - started
        self.checkpoints.save(state, dataclasses.asdict(progress))

    def _look(self, state: TrainState, progress: Progress) -> Totals:
        """The epoch's totals so far, on the host, if all is well."""
        totals = jax.device_get(state.totals)
        if totals.failed_step >= 0:
            raise NonFiniteError(
                f"the loss or its gradient became NaN or infinite in epoch {progress.epoch + 1}, "
                f"step {int(totals.failed_step) + 1}; try a smaller --learning-rate"
            )
        return totals


def _cleared(totals: Totals) -> Totals:
    return Totals.zeros(solves=totals.forward is not None, gradients=totals.backward is not None)
