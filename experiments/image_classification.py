"""Trains a deep equilibrium network, or one of its controls, on digits, MNIST or CIFAR-10.

    python -m experiments.image_classification --help
    python -m experiments.image_classification
    python -m experiments.image_classification --preset cifar10 --data-dir DIR

Leaves in the run's folder: `config.json`, `metrics.jsonl` (a line an epoch), `checkpoints/`,
`curves.png`, `residuals.png`, and when it is finished `result.json`.
"""

import dataclasses
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx

from deq_jax import Execution
from deq_jax.models.conv_deq import count_parameters
from experiments.common import devices, training
from experiments.common.checkpoints import Checkpoints
from experiments.common.data import load_dataset
from experiments.common.errors import ExperimentError, RunMismatchError
from experiments.common.figures import draw_curves, draw_residuals
from experiments.common.logging import Reporter
from experiments.common.loop import Progress, Trainer
from experiments.common.runs import RunDirectory
from experiments.common.signals import GracefulStop
from experiments.common.traces import residual_traces
from experiments.image_config import IRRELEVANT, Config
from experiments.image_experiment import Experiment, prepare
from experiments.image_presets import parse

_TRACED_IMAGES = 64


def draw_solver(experiment: Experiment, state: training.TrainState, path: pathlib.Path) -> None:
    """Draws how the trained network's solves converge on the first images of the evaluation."""
    examples = experiment.dataset.evaluation.take(
        np.arange(min(_TRACED_IMAGES, len(experiment.dataset.evaluation)))
    )
    model = nnx.merge(experiment.evaluation_definition, state.params, state.rest, copy=True)
    images = training.to_float(jax.numpy.asarray(examples.images), experiment.dataset.white)
    traces, tolerances = residual_traces(model, images, jax.numpy.asarray(examples.labels))
    draw_residuals(traces, path, tolerances=tolerances)


def run(config: Config) -> int:
    """Trains, or goes on with training, until the end or a signal.

    Returns:
        The exit code: 0, or 130 or 143 after a signal.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    mesh = devices.provide(config.devices)
    directory = RunDirectory(config.run_dir or pathlib.Path("runs") / config.preset)
    directory.open(
        dataclasses.asdict(config),
        irrelevant=IRRELEVANT,
        environment={
            "deq_jax": importlib.metadata.version("deq_jax"),
            "jax": jax.__version__,
            "python": platform.python_version(),
            "device": devices.description(mesh),
        },
        fresh=config.fresh,
    )
    result = directory.read_result()
    if result is not None:
        print(f"{directory.path} is finished; --fresh starts over")
        print_result(result)
        return 0
    dataset = load_dataset(
        config.preset,
        data_dir=config.data_dir,
        train_examples=config.train_examples,
        eval_examples=config.eval_examples,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        progress=config.progress,
    )
    experiment = prepare(config, dataset)
    print_header(experiment, directory)
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
                f"stopped in epoch {progress.epoch + 1}, step {progress.position}, and saved; the "
                "same command goes on from there"
            )
            return stop.exit_code
    draw_curves(progress.history, directory.curves)
    if config.is_deq:
        draw_solver(experiment, state, directory.residuals)
    result = {"evaluation": dataset.evaluation_name, **progress.history[-1]}
    directory.write_result(result)
    print_result(result)
    return 0


def resume(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[training.TrainState, Progress]:
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


def print_header(experiment: Experiment, directory: RunDirectory) -> None:
    """Prints what is trained, on what and where."""
    config, dataset = experiment.config, experiment.dataset
    height, width, colours = dataset.image_shape
    print(
        f"data: {dataset.name}, {len(dataset.train):,} training and {len(dataset.evaluation):,} "
        f"{dataset.evaluation_name} images of {height}x{width}x{colours}, "
        f"{dataset.num_classes} classes"
    )
    print(f"model: {config.model}, {count_parameters(experiment.model):,} parameters")
    if config.is_deq:
        print(f"solver: {experiment.model.core.solver}")
        print(f"gradient: {experiment.model.core.gradient}")
        if config.execution() != Execution():
            print(f"execution: {config.execution()}")
    print(f"device: {devices.description(experiment.mesh)}")
    print(f"run: {directory.path}", flush=True)


def print_result(result: dict[str, float | str]) -> None:
    """Prints the accuracy that a finished run came to, as the last line."""
    name = result["evaluation"]
    print(f"{name} accuracy {result[f'{name}_accuracy']:.3f}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` and returns the exit code.

    0: finished; 1: the loss became non-finite; 2: a bad flag, missing data, or a run with other
    settings; 130 and 143: stopped by Ctrl-C or SIGTERM.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    config = parse(arguments)
    try:
        return run(config)
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        # Before or after the training, where there is nothing to save.
        return 130


if __name__ == "__main__":
    sys.exit(main())
