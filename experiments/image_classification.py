"""Trains a deep equilibrium network, or a control of it, to classify images.

    python -m experiments.image_classification --help
    python -m experiments.image_classification
    python -m experiments.image_classification cifar10 --data.dir DIR
    python -m experiments.image_classification --data.name FOLDER --data.size 32
    python -m experiments.image_classification solver:broyden --solver.memory 10 --optim.lr 2e-3

The first word is a preset: digits (the default), mnist or cifar10. The same command again resumes a
run that was interrupted. `--help` lists the settings, `--help-verbose` explains them, and
`solver:broyden --help` lists those of a choice.

The folder of the run gets `config.json`, `metrics.jsonl` (a line per epoch), `checkpoints/`,
`curves.png`, `residuals.png` (of `--model deq`), and at the end `result.json`.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Literal

from flax import nnx

from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from experiments.data.images import ImageDataset, load_images
from experiments.train.config import Count, Positive, Rate, Settings, TrainingConfig, group, parse
from experiments.train.errors import UsageError
from experiments.train.loop import train
from experiments.train.reporter import reports_errors
from experiments.train.runs import RunFolder

# ---------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class ImageData(Settings):
    """The images.

    Attributes:
        name: digits, a prepared data set such as mnist or cifar10, or a folder with a folder of
            image files for each class (or with two such, train and test).
        dir: folder of prepared data sets. None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        size: side to which the images of a folder are resized. With None, all images must have the
            same size.
        train: train on a stratified subset of this size, drawn by --seed. None: all.
        eval: report on a stratified subset of this size, the same one in every run. None: all, or
            with --data.train at most as many as are trained on.
        validation: hold out this share of the training examples and report on it instead of the
            test set, to choose settings without looking at the test set.
    """

    prefix = "data."

    name: str = "digits"
    dir: str | None = None
    size: Count | None = None
    train: Count | None = None
    eval: Count | None = None
    validation: Rate = 0.0


@dataclasses.dataclass(frozen=True)
class Network(Settings):
    """The network around the equilibrium, and its cell.

    Attributes:
        channels: channels of the state.
        inner_channels: channels inside the cell's branch.
        groups: groups of the cell's GroupNorms; divides both.
        pool: side of the average pool before the classifier; divides the image's sides.
        kernel_std: standard deviation of the cell's initial kernels.
        dropout: rate of variational dropout inside the cell, with one mask for each solve.
    """

    prefix = "network."

    channels: Count = 32
    inner_channels: Count = 64
    groups: Count = 8
    pool: Count = 2
    kernel_std: Positive = 0.01
    dropout: Rate = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "inner_channels"):
            if getattr(self, name) % self.groups:
                raise UsageError(
                    f"--network.{name.replace('_', '-')} must be a multiple of --network.groups, "
                    f"{self.groups}, got {getattr(self, name)}"
                )


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The settings.

    Attributes:
        model: deq, or a control made of the same cell: weight_tied (the cell --depth times with the
            same weights) or explicit (--depth cells with weights of their own).
        data: the images.
        network: the network.
    """

    model: Literal["deq", "weight_tied", "explicit"] = "deq"
    data: group(ImageData) = ImageData()
    network: group(Network) = Network()


PRESETS = {
    "digits": Config(),
    "mnist": Config(
        data=ImageData("mnist"),
        epochs=10,
        batch_size=100,
        eval_batch_size=200,
        network=Network(channels=32, inner_channels=48, pool=7),
    ),
    # The network and the training of the Deep Implicit Layers tutorial, chapter 4.
    "cifar10": Config(
        data=ImageData("cifar10"),
        epochs=50,
        batch_size=100,
        eval_batch_size=200,
        network=Network(channels=48, inner_channels=64, pool=8),
    ),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Reads a command line, see `parse`."""
    return parse(PRESETS, "image_classification", arguments, __doc__)


# ------------------------------------------------------------------------------- data and network


def load(config: Config, run: RunFolder) -> tuple[ImageDataset, nnx.Module]:
    """The images, and the network for them."""
    del run
    data = config.data
    dataset = load_images(
        data.name,
        data_dir=data.dir,
        image_size=data.size,
        train_examples=data.train,
        eval_examples=data.eval,
        validation_fraction=data.validation,
        seed=config.seed,
        progress=config.run.progress,
    )
    return dataset, build_model(config, dataset)


def build_model(
    config: Config, dataset: ImageDataset
) -> ConvDEQ | WeightTiedConvNet | ExplicitConvNet:
    """The network for a data set, initialised by the seed, in training mode."""
    options = dataclasses.asdict(config.network) | {
        "image_shape": dataset.image_shape,
        "num_classes": dataset.num_classes,
        # Dropout draws from a stream of its own; the initial weights are the same with and without.
        "rngs": nnx.Rngs(config.seed, dropout=config.seed + 1),
    }
    try:
        if config.model == "weight_tied":
            return WeightTiedConvNet(depth=config.depth, **options)
        if config.model == "explicit":
            return ExplicitConvNet(depth=config.depth, **options)
        learned = config.stability is not None and config.stability.start == "learned"
        return ConvDEQ(learned_start=learned, **config.layer(), **options)
    except ValueError as error:  # such as a pool that does not divide the image
        raise UsageError(f"--network does not fit {dataset.name}: {error}") from error


# --------------------------------------------------------------------------------------------- run


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    config = parse_arguments(arguments)
    folder = pathlib.Path(config.data.name).expanduser().resolve().name
    result = train("image_classification", config, arguments, load, folder)
    name = result["evaluation"]
    print(f"{name} accuracy {result[f'{name}_accuracy']:.3f}")


if __name__ == "__main__":
    sys.exit(main())
