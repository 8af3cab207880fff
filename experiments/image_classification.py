"""Trains a deep equilibrium network, or a control of it, on digits, MNIST, CIFAR-10 or own images.

    python -m experiments.image_classification --help
    python -m experiments.image_classification
    python -m experiments.image_classification --preset cifar10 --data-dir DIR
    python -m experiments.image_classification --data FOLDER --image-size 32

Leaves in the run's folder: `config.json`, `metrics.jsonl` (a line an epoch), `checkpoints/`,
`curves.png`, `residuals.png`, and when it is finished `result.json`.
"""

import pathlib
import sys
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from experiments.data.images import load_dataset
from experiments.train.experiment import Experiment
from experiments.train.image_config import Config
from experiments.train.image_experiment import prepare, to_float
from experiments.train.image_presets import parse
from experiments.train.runs import RunDirectory
from experiments.train.script import Script, exit_code
from experiments.train.totals import Record
from experiments.train.training import Batch

_TRACED_IMAGES = 64


def run(config: Config) -> int:
    """Trains, or goes on with training, until the end or a signal; see `Script.run`."""
    script = Script("image_classification", load, _describe, _traced, _summary)
    return script.run(config, pathlib.Path(config.dataset).name)


def load(config: Config, directory: RunDirectory) -> Experiment:
    """The images and all that is trained on them."""
    dataset = load_dataset(
        config.dataset,
        data_dir=config.data_dir,
        image_size=config.image_size,
        train_examples=config.train_examples,
        eval_examples=config.eval_examples,
        validation_fraction=config.validation_fraction,
        seed=config.seed,
        progress=config.progress,
    )
    return prepare(config, dataset)


def _describe(experiment: Experiment) -> str:
    dataset = experiment.dataset
    height, width, colours = dataset.image_shape
    return (
        f"{dataset.name}, {len(dataset.train):,} training and {len(dataset.evaluation):,} "
        f"{dataset.evaluation_name} images of {height}x{width}x{colours}, "
        f"{dataset.num_classes} classes"
    )


def _traced(experiment: Experiment) -> Batch:
    dataset = experiment.dataset
    taken = dataset.evaluation.take(np.arange(min(_TRACED_IMAGES, len(dataset.evaluation))))
    return Batch(to_float(jnp.asarray(taken.images), dataset.white), taken.labels)


def _summary(result: Record) -> str:
    name = result["evaluation"]
    return f"{name} accuracy {result[f'{name}_accuracy']:.3f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` and returns the exit code, see `script.exit_code`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    return exit_code(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
