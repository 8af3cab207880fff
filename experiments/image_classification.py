"""Trains a deep equilibrium network, or a control of it, to classify images.

    python -m experiments.image_classification --help
    python -m experiments.image_classification
    python -m experiments.image_classification cifar10 --data.dir DIR
    python -m experiments.image_classification --data.name FOLDER --data.size 32
    python -m experiments.image_classification solver:broyden --solver.memory 10 --optim.lr 2e-3

The first word is a preset: digits (the default), mnist, cifar10, or a published network with its
published training: mdeq, resdeq, mondeq_dense, mondeq_conv, pcdeq1_dense or
pcdeq1. The same command again resumes a
run that was interrupted. `--help` lists the settings, `--help-verbose` explains them, and
`solver:broyden --help` lists those of a choice.

The folder of the run gets `config.json`, `metrics.jsonl` (a line per epoch), `checkpoints/`,
`curves.png`, `residuals.png` (of `--model deq`), and at the end `result.json`.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx

from deq_jax import Broyden, Implicit, Picard, Reversed, Reversible
from deq_jax.models.classifier import EquilibriumClassifier
from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from deq_jax.models.mdeq import LARGE, LIPSCHITZ, MDEQ, TINY
from deq_jax.models.mondeq import PUBLISHED, MonDEQ
from deq_jax.models.pcdeq import PcDEQ
from deq_jax.models.resdeq import SMALL, ResDEQ
from experiments.data.images import ImageDataset, load_images
from experiments.train.config import (
    Count,
    Optim,
    Positive,
    Rate,
    Settings,
    Stability,
    TrainingConfig,
    group,
    parse,
)
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
    """The network of the models deq, weight_tied and explicit; the others have published sizes.

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


def _mondeq(form: str, *, image_shape: tuple[int, int, int], **options: Any) -> MonDEQ:
    """The published network for images of so many colours."""
    name = f"{'mnist' if image_shape[-1] == 1 else 'cifar10'}-{form}"
    if name not in PUBLISHED:
        raise ValueError(f"{form} was published for other images than those of shape {image_shape}")
    return MonDEQ(**PUBLISHED[name] | {"image_shape": image_shape} | options)


FAMILIES: dict[str, Callable[..., EquilibriumClassifier]] = {
    "mdeq": functools.partial(MDEQ, **TINY),
    "mdeq_large": functools.partial(MDEQ, **LARGE),
    "lipschitz_mdeq": functools.partial(MDEQ, **LIPSCHITZ),
    "resdeq": functools.partial(ResDEQ, **SMALL),
    "resdeq_large": ResDEQ,
    "mondeq_dense": functools.partial(_mondeq, "dense"),
    "mondeq_conv": functools.partial(_mondeq, "conv"),
    "mondeq_multitier": functools.partial(_mondeq, "multitier"),
    "mondeq_conv_large": functools.partial(_mondeq, "conv-large"),
    "mondeq_multitier_large": functools.partial(_mondeq, "multitier-large"),
    "pcdeq1": functools.partial(PcDEQ, activation="tanh"),
    "pcdeq1_dense": functools.partial(PcDEQ, activation="tanh", form="dense"),
    "pcdeq2": functools.partial(PcDEQ, activation="sigmoid"),
    "pcdeq2_dense": functools.partial(PcDEQ, activation="sigmoid", form="dense"),
}
"""Other families of equilibrium networks, in their published sizes. Each entry takes `image_shape`,
`num_classes`, `solver`, `gradient`, `execution` and `rngs`; add yours here."""


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """The settings.

    Attributes:
        model: deq; a control made of the same cell, weight_tied (the cell --depth times with the
            same weights) or explicit (--depth cells with weights of their own); or a network of
            another family, see docs/families.md: mdeq, mdeq_large, lipschitz_mdeq, resdeq,
            resdeq_large, mondeq_dense, mondeq_conv, mondeq_multitier, mondeq_conv_large,
            mondeq_multitier_large, pcdeq1, pcdeq1_dense, pcdeq2 or pcdeq2_dense.
        data: the images.
        network: the network.
    """

    model: str = "deq"
    data: group(ImageData) = ImageData()
    network: group(Network) = Network()

    def __post_init__(self) -> None:
        if self.model not in (known := ("deq", "weight_tied", "explicit", *FAMILIES)):
            raise UsageError(f"--model must be one of {', '.join(known)}; got {self.model}")
        super().__post_init__()
        tools = self.stability
        if self.model not in FAMILIES or tools is None:
            return
        if tools.normalization is not None or tools.start == "learned":
            raise UsageError(
                f"--model {self.model} has its own normalization and start; choose "
                "stability.normalization:none and --stability.start zeros, cell or mixed"
            )
        if self.model.startswith("resdeq") and tools.correction_states > 1:
            raise UsageError(
                "--stability.correction-states must be 1 with --model resdeq, whose four solves "
                f"have no states in common, got {tools.correction_states}"
            )


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


_MONDEQ = Config(
    data=ImageData("mnist"),
    epochs=40,
    batch_size=128,
    eval_batch_size=400,
    solver=Picard(tol=1e-2, max_iter=300),
    optim=Optim(drops=(0.25, 0.5, 0.75)),
)
_PCDEQ = Config(
    data=ImageData("mnist"),
    epochs=40,
    batch_size=64,
    eval_batch_size=200,
    solver=Picard(tol=1e-4, max_iter=200),
    optim=Optim(lr=5e-4, weight_decay=1.5e-2, drops=(0.75,)),
)
_MDEQ = Config(
    data=ImageData("cifar10"),
    model="mdeq",
    epochs=50,
    batch_size=128,
    eval_batch_size=200,
    solver=Broyden(tol=1e-3, max_iter=18),
    gradient=Implicit(max_iter=20),
    optim=Optim(weight_decay=2.5e-6),
    stability=Stability(pretrain_steps=3000, pretrain_depth=10),
)
_RESDEQ = Config(
    data=ImageData("cifar10"),
    model="resdeq",
    epochs=100,
    batch_size=64,
    eval_batch_size=200,
    solver=Reversible(damping=0.8, tol=1e-6, max_iter=8),
    gradient=Reversed(),
    optim=Optim(lr=3e-4),
)
# Networks of other families, each with its published training.
PRESETS |= {
    "mdeq": _MDEQ,
    "resdeq": _RESDEQ,
    "mondeq_dense": dataclasses.replace(_MONDEQ, model="mondeq_dense"),
    "mondeq_conv": dataclasses.replace(_MONDEQ, model="mondeq_conv"),
    "pcdeq1_dense": dataclasses.replace(_PCDEQ, model="pcdeq1_dense"),
    "pcdeq1": dataclasses.replace(_PCDEQ, model="pcdeq1"),
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
) -> EquilibriumClassifier | WeightTiedConvNet | ExplicitConvNet:
    """The network for a data set, initialised by the seed, in training mode."""
    options = {
        "image_shape": dataset.image_shape,
        "num_classes": dataset.num_classes,
        # Dropout draws from a stream of its own; the initial weights are the same with and without.
        "rngs": nnx.Rngs(config.seed, dropout=config.seed + 1),
    }
    layer = config.layer()
    try:
        if config.model in FAMILIES:
            if config.network not in [preset.network for preset in PRESETS.values()]:
                raise UsageError(f"--network.* has no effect on --model {config.model}")
            del layer["normalization"]
            return FAMILIES[config.model](**layer, **options)
        options |= dataclasses.asdict(config.network)
        if config.model == "weight_tied":
            return WeightTiedConvNet(depth=config.depth, **options)
        if config.model == "explicit":
            return ExplicitConvNet(depth=config.depth, **options)
        learned = config.stability is not None and config.stability.start == "learned"
        return ConvDEQ(learned_start=learned, **layer, **options)
    except ValueError as error:  # such as a pool that does not divide the image
        what = f"--model {config.model}" if config.model in FAMILIES else "--network"
        raise UsageError(f"{what} does not fit {dataset.name}: {error}") from error


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
