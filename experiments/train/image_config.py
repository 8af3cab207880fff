"""Settings of `experiments.image_classification`: the flags and their checks."""

import dataclasses
from typing import Literal

from experiments.data.images import DatasetName
from experiments.train.config import TrainingConfig


@dataclasses.dataclass(frozen=True)
class Config(TrainingConfig):
    """Train a deep equilibrium network, or one of its controls, to classify images.

    `--preset` chooses the data set and the defaults of all other flags. The same command again
    goes on with a run that was interrupted.

    Attributes:
        model: deq, or a control made of the same cell: weight_tied (the cell --depth times with the
            same weights) or explicit (--depth cells with weights of their own).
        preset: data set, and the defaults that go with it.
        data: other images than those of the preset: the name of a prepared data set, or a folder
            with a folder of image files for each class (or with two such, train and test).
        image_size: side to which the images of a folder are resized. None: they have one size.
        data_dir: folder of prepared data sets (mnist, cifar10). None: $TFDS_DATA_DIR or
            ~/tensorflow_datasets.
        train_examples: train on a stratified subset of this size, drawn by --seed. None: all.
        validation_fraction: hold out this share of the training examples and report on it instead
            of the test set; for choosing settings without looking at the test set.
        channels: channels of the state.
        inner_channels: channels inside the cell's branch.
        groups: groups of the cell's GroupNorms; divides both.
        pool: side of the average pool before the classifier; divides the image's.
        eval_examples: report on a stratified subset of this size, the same one in every run. None:
            all, or with --train-examples at most as many as are trained on.
    """

    model: Literal["deq", "weight_tied", "explicit"] = "deq"
    preset: DatasetName = "digits"
    data: str | None = None
    image_size: int | None = None
    data_dir: str | None = None
    train_examples: int | None = None
    validation_fraction: float = 0.0
    channels: int = 32
    inner_channels: int = 64
    groups: int = 8
    pool: int = 2
    eval_examples: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("channels", "inner_channels", "groups", "pool"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("train_examples", "eval_examples", "image_size"):
            self._check(name, lambda value: value >= 1, "at least 1")
        self._check("validation_fraction", lambda value: 0 <= value < 1, "at least 0 and below 1")
        for name in ("channels", "inner_channels"):
            self._check(
                name,
                lambda value: value % self.groups == 0,
                f"a multiple of --groups, {self.groups}",
            )

    @property
    def dataset(self) -> str:
        """Name of the data set, or its folder."""
        return self.preset if self.data is None else self.data

    def check_image(self, image_shape: tuple[int, int, int]) -> None:
        """Raises a UsageError unless the network fits images of `(H, W, C)`."""
        height, width, _ = image_shape
        allowed = f"a divisor of the sides of {self.dataset}'s {height}x{width} images"
        self._check("pool", lambda value: height % value == 0 == width % value, allowed)

    def network(self) -> dict[str, int | float]:
        """What all models have in common."""
        names = ("channels", "inner_channels", "groups", "pool", "kernel_std", "dropout")
        return {name: getattr(self, name) for name in names}
