"""Where images come from: what scikit-learn carries, and folders prepared by TensorFlow Datasets.

`digits` is 1,797 real handwritten digits of 8x8 pixels. `mnist` and `cifar10` are folders in the
array_record format, which are read without TensorFlow.
"""

import dataclasses
import io
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from experiments.common.errors import DatasetNotFoundError
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


def default_data_dir() -> pathlib.Path:
    """Where TensorFlow Datasets keeps its data: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


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
        self._data_dir = default_data_dir() if data_dir is None else pathlib.Path(data_dir)
        self._builder = self._open()
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

    def _open(self) -> Any:
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DatasetNotFoundError(
                f"{self._name} is read with tensorflow_datasets, which cannot be imported "
                f"({error}); install it with\n    pip install -e '.[experiments]'"
            ) from error
        # The folder is opened by its path: `tfds.data_source` would start to download when the
        # data are missing.
        folders = [info.parent for info in self._data_dir.glob(f"{self._name}/*/dataset_info.json")]
        if not folders:
            raise self._not_found(f"there is no prepared data set in {self._data_dir / self._name}")
        folder = max(folders, key=lambda path: _version(path.name))
        builder = tfds.builder_from_directory(folder)
        if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
            raise self._not_found(
                f"{folder} is in the format {builder.info.file_format.value}, "
                "which cannot be read without TensorFlow"
            )
        absent = {"train", "test"} - set(builder.info.splits)
        files = [
            pathlib.Path(file) for split in builder.info.splits.values() for file in split.filepaths
        ]
        if absent or not all(file.is_file() for file in files):
            raise self._not_found(f"{folder} is incomplete")
        return builder

    def _not_found(self, problem: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(
            f"cannot read {self._name}: {problem}. Name the folder that holds it with --data-dir, "
            "or prepare it (this downloads it and needs TensorFlow) with\n"
            "    pip install -e '.[prepare]'\n"
            f"    python -m experiments.prepare_data {self._name} --data-dir {self._data_dir}"
        )


def _version(name: str) -> tuple[int, ...]:
    """The name of a version's folder in an order that puts 3.0.10 after 3.0.9."""
    return tuple(int(part) if part.isdecimal() else -1 for part in name.split("."))


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))
