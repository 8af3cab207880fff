"""The training loop. It can be interrupted and resumed at any step."""

import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
from flax import nnx

from experiments.data import WHOLE, Batch, Part
from experiments.report.figures import draw_curves, draw_residuals
from experiments.report.measure import residual_traces
from experiments.train import metrics, processes
from experiments.train.config import TrainingConfig
from experiments.train.errors import NonFiniteError, RunMismatchError, Stopped
from experiments.train.metrics import Record, Totals
from experiments.train.processes import device_mesh, gathered, graceful_stop, place, place_batch
from experiments.train.reporter import Reporter, describe, environment
from experiments.train.runs import Checkpoints, RunFolder
from experiments.train.stability import evaluation_phase, training_phase
from experiments.train.step import (
    TrainState,
    definition_of,
    initial_memory,
    initial_state,
    make_evaluate_batch,
    make_train_step,
    network_inputs,
    split_model,
    state_shardings,
)

_LOOK_SECONDS = 0.25
"""How often the totals are copied from the device, to show them and to see a loss that is NaN."""

_ENOUGH_STEPS = 10
"""Steps of an epoch after which its figures say something."""

_TRACED = 64
"""Examples whose solves are drawn, at most."""


class Dataset(Protocol):
    """The data that `train` needs. Any class with these members fits.

    Attributes:
        evaluation_name: name of the split that is evaluated, such as `test`.
        white: value of a white pixel, for images; 1 for all else.
    """

    evaluation_name: str
    white: int

    def checksum(self) -> int:
        """A checksum. A run is resumed only if it is unchanged."""

    def describe(self) -> str:
        """What the data are, in a line."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in an epoch."""

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """A part of each batch of an epoch from number `start` on: a function of the arguments."""

    def evaluation_batches(
        self, batch_size: int, *, multiple_of: int = 1, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """A part of each batch; batches have one size, which `multiple_of` divides.

        The batches have each example exactly once.
        """

    def figures(self, record: Record) -> Record:
        """Figures to report that follow from those of an evaluation."""


@dataclasses.dataclass
class Progress:
    """Where a run is; with the state, all that is needed to go on.

    Attributes:
        epoch: epochs finished.
        position: steps taken in the current epoch.
        seconds: time spent on the current epoch so far.
        history: one record for each finished epoch.
        data: checksum of the data. A run with another checksum is refused.
    """

    epoch: int = 0
    position: int = 0
    seconds: float = 0.0
    history: list[Record] = dataclasses.field(default_factory=list)
    data: int = 0


def train(
    script: str,
    config: TrainingConfig,
    arguments: Sequence[str] | None,
    load: Callable[[Any, RunFolder], tuple[Dataset, Any]],
    folder: str,
) -> Record:
    """Trains, or resumes a training, in the folder of the run, and leaves its figures there.

    Args:
        script: name of the command in `experiments`.
        config: its settings.
        arguments: its command line, from which the settings were read; None for this process's.
        load: `load(config, run)` gives the data and the network, once the run's folder is open.
        folder: folder of the run in runs/ where the settings name none.

    Returns:
        The figures of the last epoch; `evaluation` names the evaluated split, `test` or
        `validation`.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    processes.start(config)
    device_mesh(config)
    run = RunFolder(config.run.dir or pathlib.Path("runs") / folder)
    words = sys.argv[1:] if arguments is None else arguments
    with run.open(script, config, words, environment(config)):
        if (result := run.read_result()) is not None:
            print(f"{run.path} is finished; --run.fresh starts over")
            return result
        dataset, model = load(config, run)
        print(describe(config, model, dataset.describe(), run), flush=True)
        model, history = fit(config, model, dataset, run)
        if processes.is_first():
            draw(config, model, dataset, run, history)
        result = {"evaluation": dataset.evaluation_name, **history[-1]}
        run.write_result(result)
        processes.wait_for_all("the run is finished")
        return result


def draw(
    config: TrainingConfig, model: Any, dataset: Dataset, run: RunFolder, history: list[Record]
) -> None:
    """Draws the figures of the epochs, and residuals of the trained network."""
    draw_curves(history, run.curves)
    if config.is_deq:
        batch = next(dataset.evaluation_batches(min(_TRACED, config.eval_batch_size)))
        inputs = network_inputs(batch, None, dataset.white)
        traces, tolerances = residual_traces(model, inputs, jax.numpy.asarray(batch.targets))
        draw_residuals(traces, run.residuals, tolerances=tolerances)


def fit(
    config: TrainingConfig, model: Any, dataset: Dataset, run: RunFolder
) -> tuple[Any, list[Record]]:
    """Trains a network, or resumes its training, to the last epoch.

    Args:
        config: the settings.
        model: the network as it was initialised, in training mode. With `config.is_deq` it has an
            equilibrium layer `core`.
        dataset: the data.
        run: the folder of the run, which is open.

    Returns:
        The trained network in evaluation mode, and one record for each epoch.

    Raises:
        Stopped: somebody asked to stop; all is saved.
        NonFiniteError: a loss or gradient was not finite. Nothing of it is saved.
        ExperimentError: something else that the user can put right.
    """
    # Each phase compiles its own step and evaluation, at first use.
    mesh, part = device_mesh(config), processes.own_part(device_mesh(config))
    shows = processes.is_first()
    steps_per_epoch = dataset.steps_per_epoch(config.batch_size)
    steps = config.epochs * steps_per_epoch
    tunes_at = (min(30, steps_per_epoch // 4), steps_per_epoch // 2)
    schedule, optimizer = config.optim.schedule(steps), config.optim.optimizer(steps)

    @functools.cache
    def compiled_step(phase):
        return make_train_step(config, model, optimizer, phase, mesh, dataset.white)

    @functools.cache
    def compiled_evaluation(phase):
        return make_evaluate_batch(config, model, phase, mesh, dataset.white)

    def evaluate(state: TrainState) -> Record | None:
        """The figures of the evaluation; None if it was stopped."""
        phase = evaluation_phase(config, int(state.step))
        memory = initial_memory(model, config.eval_batch_size)
        carry = metrics.zeros(forward=config.is_deq), memory
        carry = place(carry, shardings and (shardings.totals, shardings.memory))
        batches = dataset.evaluation_batches(
            config.eval_batch_size, multiple_of=config.data_shards, part=part
        )
        for batch in batches:
            if stop.requested():
                return None
            batch = place_batch(batch, mesh)
            carry = compiled_evaluation(phase)(carry, state.params, state.rest, batch)
        totals, name = jax.device_get(carry[0]), dataset.evaluation_name
        record = metrics.loss_record(totals, name)
        return record | dataset.figures(record) | metrics.solve_record(totals, f"{name}_")

    def save(seconds: float) -> None:
        look(state, progress)
        progress.seconds = seconds
        checkpoints.save(state, dataclasses.asdict(progress))

    with contextlib.ExitStack() as stack:
        # Where the run stands.
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))  # where a DEQ layer looks for the axis
        stop = stack.enter_context(graceful_stop())
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints))
        shardings = None if mesh is None else state_shardings(model, optimizer, mesh)
        state = place(initial_state(config, model, optimizer), shardings)
        progress = Progress(data=dataset.checksum())
        if (restored := checkpoints.restore(state)) is not None:
            state, progress = restored[0], Progress(**restored[1])
            print(f"going on in epoch {progress.epoch + 1} after step {progress.position}")
        if progress.data != dataset.checksum():
            raise RunMismatchError(
                "this run was trained on other data than there are now; start over with "
                "--run.fresh, or choose another --run.dir"
            )
        reporter = stack.enter_context(Reporter(config, run, progress.history))

        for epoch in range(progress.epoch, config.epochs):
            # The steps of an epoch.
            started = time.monotonic() - progress.seconds
            looked = time.monotonic()
            waited_for = None
            batches = dataset.train_batches(
                config.batch_size,
                seed=config.seed,
                epoch=epoch,
                start=progress.position,
                part=part,
            )
            with reporter.bar(epoch, steps_per_epoch, progress.position) as bar:
                for batch in batches:
                    if stop.requested():
                        break
                    step = epoch * steps_per_epoch + progress.position
                    phase = training_phase(config, step, steps) if config.stability else None
                    limits = phase and phase.limits
                    batch = place_batch(batch, mesh)
                    # Some layers have a step size that follows the weights.
                    if hasattr(model, "tune") and step % steps_per_epoch in tunes_at:
                        rest = tuned(model, state, batch, dataset.white)
                        state = state._replace(rest=place(rest, shardings and shardings.rest))
                    state, loss = compiled_step(phase)(state, batch, limits)
                    progress.position += 1
                    # Waiting for the step before keeps the device busy with this one, and keeps
                    # the host from queueing the whole epoch, after which nobody could stop it.
                    jax.block_until_ready(waited_for)
                    waited_for = loss
                    if shows and time.monotonic() - looked >= _LOOK_SECONDS:
                        # Several processes end together, at the next checkpoint.
                        alone = not processes.several()
                        totals = look(state, progress) if alone else jax.device_get(state.totals)
                        bar.show(progress.position, totals)
                        if progress.position >= _ENOUGH_STEPS:
                            reporter.advise(epoch, totals)
                        looked = time.monotonic()
                    if (step + 1) % config.run.save_every == 0:
                        save(time.monotonic() - started)
                else:
                    if progress.position != steps_per_epoch:
                        raise ValueError(
                            f"epoch {epoch + 1} had {progress.position} batches, but "
                            f"steps_per_epoch is {steps_per_epoch}"
                        )

            # Its figures.
            totals = look(state, progress)
            evaluated: Record | None = {}
            last = epoch + 1 == config.epochs
            if progress.position < steps_per_epoch:
                evaluated = None
            elif last or (epoch + 1) % config.eval_every == 0:
                evaluated = evaluate(state)
            if evaluated is None:
                save(time.monotonic() - started)
                checkpoints.wait()
                raise Stopped(
                    f"stopped in epoch {epoch + 1}, step {progress.position}, and saved; the same "
                    "command goes on from there",
                    stop.exit_code,
                )
            record: Record = {"epoch": epoch + 1, "step": int(state.step)}
            record |= metrics.loss_record(totals, "train") | evaluated
            record |= metrics.solve_record(totals)
            record["learning_rate"] = float(schedule(int(state.step) - 1))
            record["seconds"] = time.monotonic() - started
            reporter.advise(epoch, totals)

            # Save first, so that the files never show an epoch that the checkpoint lacks.
            progress = Progress(epoch + 1, 0, 0.0, [*progress.history, record], progress.data)
            empty = metrics.zeros(forward=config.is_deq, backward=config.reports_backward)
            state = state._replace(totals=place(empty, shardings and shardings.totals))
            save(0.0)
            checkpoints.wait()
            reporter.epoch(progress.history)

    whole = state._replace(params=gathered(state.params), rest=gathered(state.rest))
    return trained_model(config, model, whole), progress.history


def trained_model(config: TrainingConfig, model: Any, state: TrainState) -> Any:
    """The network with the values of a state, in evaluation mode."""
    definition = definition_of(model, evaluation_phase(config, 0), training=False)
    return nnx.merge(definition, state.params, state.rest, copy=True)


def tuned(model: Any, state: TrainState, batch: Batch, white: int) -> Any:
    """All values of the network but its parameters, after `model.tune` on a batch."""
    model = nnx.merge(nnx.graphdef(model), state.params, state.rest, copy=True)
    model.tune(network_inputs(batch, None, white))
    return split_model(model)[2]


def look(state: TrainState, progress: Progress) -> Totals:
    """Copies the totals of the epoch to the host.

    Raises:
        NonFiniteError: a loss or gradient was not finite.
    """
    totals = jax.device_get(state.totals)
    if totals["failed"] < metrics.NEVER:
        raise NonFiniteError(
            f"the loss or its gradient became NaN or infinite in epoch {progress.epoch + 1}, "
            f"step {int(totals['failed']) + 1}; try a smaller --optim.lr"
        )
    return totals
