"""Opens folders prepared by TensorFlow Datasets in the array_record format, without TensorFlow."""

import os
import pathlib
from collections.abc import Set
from typing import Any

from experiments.train.errors import DatasetNotFoundError, UsageError

_TEXT_SPLITS = ("train", "validation", "test")


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
        splits_needed: splits that must be there. The files of all its splits must be.

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
    # The folder is opened by its path: `tfds.data_source` would start to download when the data
    # are missing.
    folders = [info.parent for info in data_dir.glob(f"{name}/*/dataset_info.json")]
    if not folders:
        raise _not_found(name, data_dir, f"there is no prepared data set in {data_dir / name}")
    folder = max(folders, key=lambda path: _version(path.name))
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        raise _not_found(
            name,
            data_dir,
            f"{folder} is in the format {builder.info.file_format.value}, "
            "which cannot be read without TensorFlow",
        )
    absent = splits_needed - set(builder.info.splits)
    files = [
        pathlib.Path(file) for split in builder.info.splits.values() for file in split.filepaths
    ]
    if absent or not all(file.is_file() for file in files):
        raise _not_found(name, data_dir, f"{folder} is incomplete")
    return builder


def read_prepared_text(name: str, data_dir: str | os.PathLike[str] | None) -> str:
    """The splits train, validation and test of a prepared data set of texts.

    They are joined in this order, those of them that there are: directly where each is one example,
    else with a newline after each example.

    Raises:
        DatasetNotFoundError: see `open_prepared`.
        UsageError: there is not one text feature and no other; the message names all.
    """
    builder = open_prepared(name, data_dir, {"train"})
    from tensorflow_datasets import features

    kinds = builder.info.features
    if len(kinds) != 1 or not all(isinstance(kinds[key], features.Text) for key in kinds):
        # A single text among others may be no more than a name: the images of CIFAR-10 have one.
        raise UsageError(
            f"{name} cannot be read as a text: one text feature and no other is needed, it has "
            f"{', '.join(sorted(kinds))}"
        )
    [key] = kinds
    parts = []
    for split in _TEXT_SPLITS:
        if split in builder.info.splits:
            source = builder.as_data_source(split=split)
            parts.append([source[i][key].decode("utf-8") for i in range(len(source))])
    end = "" if all(len(part) == 1 for part in parts) else "\n"
    return "".join(text + end for part in parts for text in part)


def _not_found(name: str, data_dir: pathlib.Path, problem: str) -> DatasetNotFoundError:
    return DatasetNotFoundError(
        f"cannot read {name}: {problem}. Name the folder that holds it with --data-dir, "
        "or prepare it (this downloads it and needs TensorFlow) with\n"
        "    pip install -e '.[prepare]'\n"
        f"    python -m experiments.prepare_data {name} --data-dir {data_dir}"
    )


def _version(name: str) -> tuple[int, ...]:
    """The name of a version's folder in an order that puts 3.0.10 after 3.0.9."""
    return tuple(int(part) if part.isdecimal() else -1 for part in name.split("."))
