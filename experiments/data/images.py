"""Image data sets, whole in memory as uint8, and splits of them that never change."""

import dataclasses
import os
import pathlib
import zlib
from typing import Literal

import numpy as np

from experiments.data.sources import Images, open_source
from experiments.data.splits import fixed_split, seeded_subset
from experiments.train.errors import UsageError

DatasetName = Literal["digits", "mnist", "cifar10"]


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """A training split and the split that is reported on.

    Attributes:
        name: name of the data set.
        train: examples to train on.
        evaluation: examples to report on.
        evaluation_name: what they are, `test` or `validation`.
        num_classes: number of classes.
        white: pixel value that becomes 1.0.
    """

    name: str
    train: Images
    evaluation: Images
    evaluation_name: Literal["test", "validation"]
    num_classes: int
    white: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """`(H, W, C)`."""
        height, width, channels = self.train.images.shape[1:]
        return height, width, channels

    def checksum(self) -> int:
        """CRC-32 of all images and labels."""
        checksum = 0
        for examples in (self.train, self.evaluation):
            for array in (examples.images, examples.labels):
                checksum = zlib.crc32(np.ascontiguousarray(array), checksum)
        return checksum


def load_dataset(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    train_examples: int | None = None,
    eval_examples: int | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> ImageDataset:
    """Reads a data set.

    Args:
        name: `digits`, the name of a prepared data set, or a folder of images by class.
        data_dir: folder of prepared data sets, see `sources.default_data_dir`; `digits` needs none.
        image_size: side to which the images of a folder are resized.
        train_examples: train on a stratified subset of this size, drawn by `seed`; None for all.
        eval_examples: report on a stratified subset of this size, the same one in every run; None
            for all, or with `train_examples` for at most as many.
        validation_fraction: if positive, this share of the training split is held out, the same
            examples for each seed and subset, and is reported on in place of the test split.
        seed: seed of the subset.
        progress: show a progress bar while images are decoded.

    Raises:
        DatasetNotFoundError: the data set is not there; the message names the folder and the
            command that prepares it.
        UsageError: `train_examples` or `eval_examples` exceeds what there is.
    """
    source = open_source(name, data_dir, image_size, progress)
    labels = source.labels("train")
    train = np.arange(len(labels))
    validation = None
    if validation_fraction > 0:
        held_out = max(1, round(validation_fraction * len(labels)))
        validation, train = fixed_split(labels, held_out)
    if train_examples is not None and train_examples > len(train):
        raise UsageError(
            f"--train-examples must be at most {len(train)}, which is what {name} has to train on, "
            f"got {train_examples}"
        )
    if train_examples is not None and train_examples < len(train):
        train = train[seeded_subset(labels[train], train_examples, seed)]
    split = "test" if validation is None else "train"
    held_out_labels = source.labels(split)
    reported = np.arange(len(held_out_labels)) if validation is None else validation
    if eval_examples is None and train_examples is not None:
        eval_examples = min(train_examples, len(reported))
    if eval_examples is not None and eval_examples > len(reported):
        raise UsageError(
            f"--eval-examples must be at most {len(reported)}, which is what there is to report "
            f"on, got {eval_examples}"
        )
    if eval_examples is not None and eval_examples < len(reported):
        reported = reported[fixed_split(held_out_labels[reported], eval_examples)[0]]
    return ImageDataset(
        name=pathlib.Path(name).name,
        train=source.read("train", train),
        evaluation=source.read(split, reported),
        evaluation_name="test" if validation is None else "validation",
        num_classes=source.num_classes,
        white=source.white,
    )
