"""What every training script does: open the run, train or go on, draw, write the result."""

import dataclasses
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable
from typing import TypeVar

import jax
from flax import nnx

from deq_jax import Execution
from deq_jax.models.conv_deq import count_parameters
from experiments.report.curves import draw_curves, draw_residuals
from experiments.report.traces import residual_traces
from experiments.train import devices
from experiments.train.checkpoints import Checkpoints
from experiments.train.config import IRRELEVANT, TrainingConfig
from experiments.train.errors import ExperimentError, RunMismatchError
from experiments.train.experiment import Experiment
from experiments.train.logging import Reporter
from experiments.train.loop import Progress, Trainer
from experiments.train.runs import RunDirectory
from experiments.train.signals import GracefulStop
from experiments.train.totals import Record
from experiments.train.training import Batch, TrainState

AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


@dataclasses.dataclass(frozen=True)
class Script:
    """What one script adds to what all have in common.

    Attributes:
        name: its module in `experiments`; recorded with each run.
        prepare: `prepare(config, directory)` loads the data and builds the network, once the run's
            folder is open.
        describe: says in a line what the data are.
        traced: a few examples of the evaluation, as the network takes them, whose solves are drawn.
        summary: the last line: what the figures of a finished run say.
    """

    name: str
    prepare: Callable[[TrainingConfig, RunDirectory], Experiment]
    describe: Callable[[Experiment], str]
    traced: Callable[[Experiment], Batch]
    summary: Callable[[Record], str]

    def run(self, config: TrainingConfig, default_folder: str | None = None) -> int:
        """Trains, or goes on with training, until the end or a signal.

        Args:
            config: the settings.
            default_folder: folder of the run in `runs/` where the settings name none. None: that
                of the script's name.

        Returns:
            The exit code: 0, or 130 or 143 after a signal.

        Raises:
            ExperimentError: something the user can put right; the message says what.
        """
        mesh = devices.provide(config.devices)
        folder = self.name if default_folder is None else default_folder
        directory = RunDirectory(config.run_dir or pathlib.Path("runs") / folder)
        directory.open(
            dataclasses.asdict(config),
            irrelevant=IRRELEVANT,
            environment={
                "deq_jax": importlib.metadata.version("deq_jax"),
                "jax": jax.__version__,
                "python": platform.python_version(),
                "device": devices.description(mesh),
            },
            script=self.name,
            fresh=config.fresh,
        )
        result = directory.read_result()
        if result is not None:
            print(f"{directory.path} is finished; --fresh starts over")
            print(self.summary(result), flush=True)
            return 0
        experiment = self.prepare(config, directory)
        self._print_header(experiment, directory)
        reporter = Reporter(directory, tensorboard=config.tensorboard)
        with GracefulStop() as stop, Checkpoints(directory.checkpoints) as checkpoints:
            trainer = Trainer(
                experiment.task,
                checkpoints,
                reporter,
                stop,
                config.checkpoint_every_seconds,
                config.progress,
            )
            state, progress = resume(experiment, checkpoints)
            if progress.epoch or progress.position:
                print(f"going on in epoch {progress.epoch + 1} after step {progress.position}")
            state = trainer.run(state, progress)
            reporter.close()
            if state is None:
                print(
                    f"stopped in epoch {progress.epoch + 1}, step {progress.position}, and saved; "
                    "the same command goes on from there"
                )
                return stop.exit_code
        draw_curves(progress.history, directory.curves)
        if config.is_deq:
            self._draw_solver(experiment, state, directory.residuals)
        result = {"evaluation": experiment.dataset.evaluation_name, **progress.history[-1]}
        directory.write_result(result)
        print(self.summary(result), flush=True)
        return 0

    def _print_header(self, experiment: Experiment, directory: RunDirectory) -> None:
        """Prints what is trained, on what and where."""
        config = experiment.config
        print(f"data: {self.describe(experiment)}")
        print(f"model: {config.model}, {count_parameters(experiment.model):,} parameters")
        if config.is_deq:
            print(f"solver: {experiment.model.core.solver}")
            print(f"gradient: {experiment.model.core.gradient}")
            if config.execution() != Execution():
                print(f"execution: {config.execution()}")
        print(f"device: {devices.description(experiment.mesh)}")
        print(f"run: {directory.path}", flush=True)

    def _draw_solver(self, experiment: Experiment, state: TrainState, path: pathlib.Path) -> None:
        """Draws how the trained network's solves converge on a few examples."""
        model = nnx.merge(experiment.evaluation_definition, state.params, state.rest, copy=True)
        inputs, targets, _ = self.traced(experiment)
        traces, tolerances = residual_traces(model, inputs, jax.numpy.asarray(targets))
        draw_residuals(traces, path, tolerances=tolerances)


def resume(experiment: Experiment, checkpoints: Checkpoints) -> tuple[TrainState, Progress]:
    """The state of the newest checkpoint and where it stands, or those of the beginning.

    Raises:
        RunMismatchError: the checkpoint is from training on other data.
    """
    checksum = experiment.dataset.checksum()
    restored = checkpoints.restore(experiment.state)
    if restored is None:
        return experiment.state, Progress(data=checksum)
    state, progress = restored[0], Progress(**restored[1])
    if progress.data != checksum:
        raise RunMismatchError(
            "this run was trained on other data than --data-dir now holds; start over with --fresh "
            "or choose another --run-dir"
        )
    return state, progress


def exit_code(run: Callable[[AnyConfig], int], config: AnyConfig) -> int:
    """Runs a script and returns its exit code.

    0: finished; 1: the loss became non-finite; 2: a bad flag, missing data, or a run with other
    settings; 130 and 143: stopped by Ctrl-C or SIGTERM.
    """
    try:
        return run(config)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Before or after the training, where there is nothing to save.
        return 130
