"""Trained networks: reading a run of any of the commands, its settings, data and checkpoint.

Nothing is written to the run's folder, in which a training may be going on.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import optax
from flax import nnx

from experiments import copy_memory, graph_classification, image_classification, language_model
from experiments.train.config import TrainingConfig
from experiments.train.errors import CheckpointError, RunMismatchError, UsageError
from experiments.train.loop import Dataset, Progress, trained_model
from experiments.train.runs import Checkpoints, RunFolder, differences, flat_settings
from experiments.train.step import TrainState, initial_state

SCRIPTS: dict[str, Any] = {
    "image_classification": image_classification,
    "language_model": language_model,
    "copy_memory": copy_memory,
    "graph_classification": graph_classification,
}
"""The commands that train; each has `parse_arguments` and `load`."""

Unfit = Callable[[str, Any], str]
"""From a run's command and settings to why it is of no use, to be read after `holds`; or empty."""


def _is_fit(script: str, config: Any) -> str:
    del script, config
    return ""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        script: name of the command that it is of.
        config: its settings, for one device.
        dataset: its data.
        model: the trained network, in evaluation mode.
        progress: how far the training has come.
    """

    path: pathlib.Path
    script: str
    config: Any
    dataset: Dataset
    model: Any
    progress: Progress


def read_config(path: pathlib.Path, unfit: Unfit = _is_fit) -> tuple[str, Any]:
    """The command and the settings of the run in a folder, for one device.

    Args:
        path: the folder.
        unfit: says why a run is of no use here.

    Raises:
        UsageError: there is no such run, or one of no use; the message says why.
    """
    file = RunFolder(path).config
    if not path.is_dir():
        raise UsageError(f"--run: there is no folder {path}")
    if not file.is_file():
        raise UsageError(f"--run: {path} holds no run, there is no config.json in it")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        script, words, settings = (document[key] for key in ("script", "arguments", "config"))
        command = SCRIPTS[script]
        config = command.parse_arguments(words)
    except (ValueError, KeyError, TypeError, SystemExit) as error:
        raise UsageError(
            f"--run: {file} is not that of a run of experiments.{' or '.join(SCRIPTS)}, or of "
            "another version"
        ) from error
    now = json.loads(json.dumps(flat_settings(config)))
    if differing := differences(settings, now):
        raise UsageError(
            f"--run: {path} is of a version with other defaults: {'; '.join(differing.values())}"
        )
    if why := unfit(script, config):
        raise UsageError(f"--run: {path} holds {why}")
    if isinstance(config, TrainingConfig):
        # One device is enough here, and samples need not leave a solve early.
        config = dataclasses.replace(config, devices=1, fsdp=1, tensor=1, shrink_to=None)
    return script, config


def read_run(path: pathlib.Path, data_dir: str | None = None, unfit: Unfit = _is_fit) -> Run:
    """The newest checkpoint of a run, with its network and data.

    Args:
        path: the run's folder.
        data_dir: folder of prepared data sets; None: that of the run.
        unfit: says why a run is of no use here.

    Raises:
        ExperimentError: there is no such run, checkpoint or data, or it is of no use; the message
            says what is wrong.
    """
    script, config = _readable(path, data_dir, unfit)
    if script != "graph_classification":
        return _read_training(path, script, config)[0]
    folder = RunFolder(path)
    dataset, model = graph_classification.load(config, folder)
    params, chosen = _restored(folder, nnx.state(model, nnx.Param))
    nnx.update(model, params)
    model.eval()
    history = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    progress = Progress(epoch=chosen["epoch"], history=history)
    return Run(path, script, config, dataset, model, progress)


def read_state(
    path: pathlib.Path, data_dir: str | None = None, unfit: Unfit = _is_fit
) -> tuple[Run, TrainState]:
    """`read_run`, and the state with which the training goes on.

    A run of graph_classification cannot go on and has no such state, so it cannot be read like
    this.
    """
    return _read_training(path, *_readable(path, data_dir, unfit))


def _read_training(path: pathlib.Path, script: str, config: Any) -> tuple[Run, TrainState]:
    folder = RunFolder(path)
    dataset, model = SCRIPTS[script].load(config, folder)
    optimizer: optax.GradientTransformation = config.optim.optimizer(2)
    state, saved = _restored(folder, initial_state(config, model, optimizer))
    progress = Progress(**saved)
    if progress.data != dataset.checksum():
        raise RunMismatchError(f"--run: {path} was trained on other data than there are now")
    trained = trained_model(config, model, state)
    return Run(path, script, config, dataset, trained, progress), state


def _readable(path: pathlib.Path, data_dir: str | None, unfit: Unfit) -> tuple[str, Any]:
    """The command and the settings of a run that has what is needed to read it."""
    script, config = read_config(path, unfit)
    folder = RunFolder(path)
    if not folder.has_checkpoint():
        raise UsageError(f"--run: {path} has no checkpoint yet; train it first")
    if script == "language_model" and not folder.vocabulary.is_file():
        # It would be built from the text as it is now, and written.
        raise UsageError(f"--run: {path} has lost its {folder.vocabulary.name}")
    if data_dir is not None and script != "copy_memory":
        data = dataclasses.replace(config.data, dir=data_dir)
        config = dataclasses.replace(config, data=data)
    return script, config


def _restored(folder: RunFolder, template: Any) -> tuple[Any, dict[str, Any]]:
    """The newest checkpoint of a run, and what was saved beside the arrays."""
    # A copy, since whoever opens the folder itself clears away what a training is writing to it.
    with tempfile.TemporaryDirectory() as copy:
        for checkpoint in folder.checkpoints.glob("*"):
            if checkpoint.name.isdecimal():
                shutil.copytree(checkpoint, pathlib.Path(copy, checkpoint.name))
        try:
            with Checkpoints(copy) as checkpoints:
                restored = checkpoints.restore(template)
        except CheckpointError as error:
            raise UsageError(f"--run: {folder.path}: {error}") from error
    assert restored is not None
    return restored
