"""Where images come from: what scikit-learn carries, and folders prepared by TensorFlow Datasets.

`digits` is 1,797 real handwritten digits of 8x8 pixels. `mnist` and `cifar10` are folders in the
array_record format, which are read without TensorFlow.
"""

import dataclasses
import io
import os
from typing import Any

import numpy as np
import tqdm

from experiments.common.prepared import default_data_dir as default_data_dir
from experiments.common.prepared import open_prepared
from experiments.common.splits import fixed_split

DIGITS_TEST_FRACTION = 0.2

_READ_AT_ONCE = 1000


@dataclasses.dataclass(frozen=True)
class Images:
    """Images and their labels.

    Attributes:
        images: `[N, H, W, C]` uint8.
        labels: `[N]` int32, classes counted from 0.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: np.ndarray) -> "Images":
        """The examples at `indices`, in that order."""
        return Images(self.images[indices], self.labels[indices])


class Digits:
    """The digits that scikit-learn carries; a stratified fifth of them is the test split."""

    num_classes = 10
    white = 16

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        everything = Images(
            digits.images.astype(np.uint8)[..., np.newaxis], digits.target.astype(np.int32)
        )
        count = round(DIGITS_TEST_FRACTION * len(everything))
        test, train = fixed_split(everything.labels, count)
        self._splits = {"train": everything.take(train), "test": everything.take(test)}

    def labels(self, split: str) -> np.ndarray:
        """Labels of all examples of a split, `[N]` int32."""
        return self._splits[split].labels

    def read(self, split: str, indices: np.ndarray | None) -> Images:
        """The examples at `indices` of a split, all of them for None."""
        everything = self._splits[split]
        return everything if indices is None else everything.take(indices)


class PreparedFolder:
    """An array_record folder of TensorFlow Datasets; decodes only the images that are asked for."""

    white = 255

    def __init__(self, name: str, data_dir: str | os.PathLike[str] | None, progress: bool) -> None:
        self._name = name
        self._progress = progress
        self._builder = open_prepared(name, data_dir, {"train", "test"})
        self._records: dict[str, list[Any]] = {}
        self.num_classes = int(self._builder.info.features["label"].num_classes)

    def labels(self, split: str) -> np.ndarray:
        """Labels of all examples of a split, `[N]` int32."""
        return np.array([record["label"] for record in self._read_records(split)], np.int32)

    def read(self, split: str, indices: np.ndarray | None) -> Images:
        """The examples at `indices` of a split, all of them for None."""
        records = self._read_records(split)
        positions = np.arange(len(records)) if indices is None else indices
        images = np.empty((len(positions), *self._builder.info.features["image"].shape), np.uint8)
        bar = tqdm.tqdm(
            positions,
            desc=f"decoding {self._name} {split}",
            unit=" images",
            leave=False,
            disable=not self._progress,
        )
        for row, position in enumerate(bar):
            images[row] = _decode(records[position]["image"]).reshape(images.shape[1:])
        return Images(images, self.labels(split)[positions])

    def _read_records(self, split: str) -> list[Any]:
        """All records of a split with their images still encoded, which is fast."""
        if split not in self._records:
            from tensorflow_datasets import decode

            source = self._builder.as_data_source(
                split=split, decoders={"image": decode.SkipDecoding()}
            )
            self._records[split] = [
                record
                for start in range(0, len(source), _READ_AT_ONCE)
                for record in source.__getitems__(
                    range(start, min(start + _READ_AT_ONCE, len(source)))
                )
            ]
        return self._records[split]


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))
