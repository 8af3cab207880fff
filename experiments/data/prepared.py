"""Data sets that TensorFlow Datasets has prepared as array_record files, without TensorFlow."""

import io
import os
import pathlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from experiments.train.errors import DatasetNotFoundError, UsageError


def default_data_dir() -> pathlib.Path:
    """Where TensorFlow Datasets keeps its data: `$TFDS_DATA_DIR` or `~/tensorflow_datasets`."""
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def open_prepared(
    name: str, data_dir: str | os.PathLike[str] | None, splits_needed: Set[str]
) -> Any:
    """Opens the newest version of a prepared data set.

    Args:
        name: name of the data set.
        data_dir: folder of prepared data sets; None for `default_data_dir()`.
        splits_needed: splits that must be there.

    Returns:
        The `tfds.core.DatasetBuilder` of the folder, which can be read with `as_data_source`.

    Raises:
        DatasetNotFoundError: the data set is not there, not whole, or in a format that only
            TensorFlow reads; the message names the folder and the command that prepares it.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DatasetNotFoundError(
            f"{name} is read with tensorflow_datasets, which cannot be imported "
            f"({error}); install it with\n    pip install -e '.[experiments]'"
        ) from error
    data_dir = default_data_dir() if data_dir is None else pathlib.Path(data_dir)

    def not_found(problem: str) -> DatasetNotFoundError:
        return DatasetNotFoundError(
            f"cannot read {name}: {problem}. Name the folder that holds it with --data.dir, "
            "or prepare it (this downloads it and needs TensorFlow) with\n"
            "    pip install -e '.[prepare]'\n"
            f"    python -m experiments.prepare_data {name} --data-dir {data_dir}"
        )

    # The folder is opened by its path: `tfds.data_source` would download data that are missing.
    versions = [info.parent for info in data_dir.glob(f"{name}/*/dataset_info.json")]
    if not versions:
        raise not_found(f"there is no prepared data set in {data_dir / name}")
    folder = max(versions, key=_version)
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise not_found(
            f"{folder} is in the format {builder.info.file_format.value}, "
            "which cannot be read without TensorFlow"
        )
    splits = builder.info.splits
    files = [pathlib.Path(file) for split in splits.values() for file in split.filepaths]
    if splits_needed - set(splits) or not all(file.is_file() for file in files):
        raise not_found(f"{folder} is incomplete")
    return builder


def _version(folder: pathlib.Path) -> tuple[int, ...]:
    """The name of a version's folder in an order that puts 3.0.10 after 3.0.9."""
    return tuple(int(part) if part.isdecimal() else -1 for part in folder.name.split("."))


class PreparedImages:
    """A prepared data set with the features `image` and `label`; see `sources.Source`.

    Args:
        name: name of the data set.
        data_dir: folder of prepared data sets; None for `default_data_dir()`.

    Raises:
        DatasetNotFoundError: see `open_prepared`.
        UsageError: the data set has no 8-bit images of one size with a class each.
    """

    white = 255

    def __init__(self, name: str, data_dir: str | os.PathLike[str] | None) -> None:
        builder = open_prepared(name, data_dir, {"train", "test"})
        from tensorflow_datasets import decode

        features = builder.info.features
        fits = {"image", "label"} <= set(features) and None not in features["image"].shape
        if not fits or features["image"].np_dtype != np.uint8:
            raise UsageError(
                f"{name} cannot be read as 8-bit images of one size with a class each: its "
                f"features are {dict(features)}; a folder of image files by class can be, with "
                "--data.size"
            )
        self.num_classes = int(features["label"].num_classes)
        self.image_shape: tuple[int, int, int] = tuple(features["image"].shape)
        self._name = name
        self._splits = {split: builder.info.splits[split] for split in ("train", "test")}
        # The images stay encoded until they are asked for.
        self._records = {
            split: builder.as_data_source(split=split, decoders={"image": decode.SkipDecoding()})
            for split in self._splits
        }
        self.sizes: Mapping[str, int] = {
            split: len(records) for split, records in self._records.items()
        }

    def labels(self, split: str) -> np.ndarray:
        """See `sources.Source`. Reads all records of the split, as labels are stored in them."""
        labels = np.empty(self.sizes[split], np.int32)
        for start in range(0, len(labels), 1000):
            positions = np.arange(start, min(start + 1000, len(labels)))
            labels[positions] = [record["label"] for record in self._fetch(split, positions)]
        return labels

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `sources.Source`."""
        from PIL import Image

        images = np.empty((len(positions), *self.image_shape), np.uint8)
        labels = np.empty(len(positions), np.int32)
        for row, record in enumerate(self._fetch(split, positions)):
            with Image.open(io.BytesIO(record["image"])) as image:
                images[row] = np.asarray(image).reshape(self.image_shape)
            labels[row] = record["label"]
        return images, labels

    def fingerprint(self) -> Any:
        """See `sources.Source`: names, sizes in bytes and record counts of the files."""
        files = [
            (pathlib.Path(file).name, pathlib.Path(file).stat().st_size, count)
            for split in self._splits.values()
            for file, count in zip(split.filepaths, split.shard_lengths, strict=True)
        ]
        return [self._name, self.image_shape, files]

    def _fetch(self, split: str, positions: np.ndarray) -> Sequence[Any]:
        return self._records[split].__getitems__(positions.tolist())
