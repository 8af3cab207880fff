"""Trained networks: reading a run of any of the scripts, its settings, data and newest checkpoint.

Nothing is written to the run's folder, in which a training may be going on.
"""

import dataclasses
import json
import pathlib
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from flax import nnx

from experiments import copy_memory, image_classification, language_model
from experiments.train.checkpoints import Checkpoints
from experiments.train.config import TrainingConfig
from experiments.train.errors import RunMismatchError, UsageError
from experiments.train.experiment import Experiment
from experiments.train.loop import Progress
from experiments.train.runs import RunDirectory

SCRIPTS: dict[str, Any] = {
    "image_classification": image_classification,
    "language_model": language_model,
    "copy_memory": copy_memory,
}
"""The scripts that train; each has a `Config` and `load(config, directory) -> Experiment`."""

_OLDEST = "image_classification"
"""Script of the runs from before scripts were recorded."""

_WITH_VOCABULARY = ("language_model",)

Unfit = Callable[[str, TrainingConfig], str]
"""From a run's script and settings to why it is of no use, to be read after `holds`; or empty."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        script: name of the script that it is of.
        experiment: the network and its data; its state is the newest checkpoint's.
        progress: how far the training has come.
    """

    path: pathlib.Path
    script: str
    experiment: Experiment
    progress: Progress

    def model(self) -> Any:
        """The trained network, in evaluation mode."""
        state = self.experiment.state
        definition = self.experiment.evaluation_definition
        return nnx.merge(definition, state.params, state.rest, copy=True)


def read_config(
    path: pathlib.Path, unfit: Unfit = lambda script, config: ""
) -> tuple[str, TrainingConfig]:
    """The script and the settings of the run in a folder, for one device.

    Args:
        path: the folder.
        unfit: says why a run is of no use here.

    Raises:
        UsageError: there is no such run, or one of no use; the message says why.
    """
    file = RunDirectory(path).config
    if not path.is_dir():
        raise UsageError(f"--run: there is no folder {path}")
    if not file.is_file():
        raise UsageError(f"--run: {path} holds no run, there is no config.json in it")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        script, settings = document.get("script", _OLDEST), dict(document["config"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--run: {file} is not that of a run of experiments.{' or '.join(SCRIPTS)}"
        ) from error
    if script not in SCRIPTS:
        raise UsageError(
            f"--run: {path} holds a run of a script that is not known here, {script}; known are "
            f"{', '.join(SCRIPTS)}"
        )
    kind = SCRIPTS[script].Config
    unknown = settings.keys() - {field.name for field in dataclasses.fields(kind)}
    if unknown or "preset" not in settings:
        raise UsageError(
            f"--run: {file} is not that of a run of experiments.{script}, or of another version; "
            f"unknown settings: {', '.join(sorted(unknown)) or 'none'}"
        )
    # One device is enough here, and samples need not leave a solve early.
    config = kind(**{**settings, "devices": 1, "shrink_to": None})
    if why := unfit(script, config):
        raise UsageError(f"--run: {path} holds {why}")
    return script, config


def read_run(
    path: pathlib.Path,
    data_dir: str | None = None,
    unfit: Unfit = lambda script, config: "",
) -> Run:
    """The newest checkpoint of a run, with its network and data.

    Args:
        path: the run's folder.
        data_dir: folder of prepared data sets; None: that of the run.
        unfit: says why a run is of no use here.

    Raises:
        ExperimentError: there is no such run, checkpoint or data, or it is of no use; the message
            says what is wrong.
    """
    script, config = read_config(path, unfit)
    directory = RunDirectory(path)
    saved = [one for one in directory.checkpoints.glob("*") if one.name.isdecimal()]
    if not saved:
        raise UsageError(f"--run: {path} has no checkpoint yet; train it first")
    if script in _WITH_VOCABULARY and not directory.vocabulary.is_file():
        # It would be built from the text as it is now, and written.
        raise UsageError(f"--run: {path} has lost its {directory.vocabulary.name}")
    if data_dir is not None and hasattr(config, "data_dir"):
        config = dataclasses.replace(config, data_dir=data_dir)
    experiment = SCRIPTS[script].load(config, directory)
    newest = max(saved, key=lambda folder: int(folder.name))
    # A copy, since whoever opens the folder itself clears away what a training is writing to it.
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(newest, pathlib.Path(folder, newest.name))
        try:
            with Checkpoints(folder) as checkpoints:
                state, progress = checkpoints.restore(experiment.state)
        except (ValueError, KeyError) as error:
            raise UsageError(
                f"--run: the checkpoint {newest} does not fit the settings in config.json, or is "
                f"from another version: {error}"
            ) from error
    progress = Progress(**progress)
    if progress.data != experiment.dataset.checksum():
        raise RunMismatchError(f"--run: {path} was trained on other data than --data-dir now holds")
    return Run(path, script, dataclasses.replace(experiment, state=state), progress)
