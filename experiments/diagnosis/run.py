"""The run that is looked at: settings, data and the newest checkpoint."""

import dataclasses
import json
import pathlib
import shutil
import tempfile

from experiments.common.checkpoints import Checkpoints
from experiments.common.data import load_dataset
from experiments.common.errors import RunMismatchError, UsageError
from experiments.common.loop import Progress
from experiments.common.runs import RunDirectory
from experiments.image_config import Config
from experiments.image_experiment import Experiment, prepare


@dataclasses.dataclass(frozen=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        experiment: the network and its data; its state is the newest checkpoint's.
        progress: how far the training has come.
    """

    path: pathlib.Path
    experiment: Experiment
    progress: Progress


def read_config(path: pathlib.Path) -> Config:
    """The settings of the run in a folder, for one device.

    Raises:
        UsageError: there is no such run, or none that can be diagnosed; the message says why.
    """
    file = RunDirectory(path).config
    if not path.is_dir():
        raise UsageError(f"--run: there is no folder {path}")
    if not file.is_file():
        raise UsageError(f"--run: {path} holds no run, there is no config.json in it")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))["config"]
        unknown = settings.keys() - {field.name for field in dataclasses.fields(Config)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"--run: {file} is not that of a run of experiments.image_classification"
        ) from error
    if unknown or "preset" not in settings:
        raise UsageError(
            f"--run: {file} is not that of a run of experiments.image_classification, or of "
            f"another version; unknown settings: {', '.join(sorted(unknown)) or 'none'}"
        )
    # One device is enough here, and samples need not leave a solve early.
    config = Config(**{**settings, "devices": 1, "shrink_to": None})
    if not config.is_deq:
        raise UsageError(
            f"--run: {path} holds a control, --model {config.model}, which has no solver to "
            "diagnose; choose a run with --model deq"
        )
    return config


def read_run(path: pathlib.Path, data_dir: str | None = None) -> Run:
    """The newest checkpoint of a run, with its network and data.

    Raises:
        ExperimentError: there is no such run, checkpoint or data; the message says what is wrong.
    """
    config = read_config(path)
    saved = [one for one in RunDirectory(path).checkpoints.glob("*") if one.name.isdecimal()]
    if not saved:
        raise UsageError(f"--run: {path} has no checkpoint yet; train it first")
    dataset = load_dataset(
        config.preset,
        data_dir=config.data_dir if data_dir is None else data_dir,
        train_examples=config.train_examples,
        eval_examples=config.eval_examples,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
    )
    experiment = prepare(config, dataset)
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
    if progress.data != dataset.checksum():
        raise RunMismatchError(f"--run: {path} was trained on other data than --data-dir now holds")
    return Run(path, dataclasses.replace(experiment, state=state), progress)
