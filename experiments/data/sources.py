"""Where images come from: scikit-learn, folders prepared by TensorFlow Datasets, folders of images.

`digits` is 1,797 real handwritten digits of 8x8 pixels. `mnist` and `cifar10` are folders in the
array_record format, which are read without TensorFlow. A folder of one's own holds a folder of
image files for each class.
"""

import dataclasses
import io
import os
import pathlib
from typing import Any

import numpy as np
import tqdm

from experiments.data.prepared import default_data_dir as default_data_dir
from experiments.data.prepared import open_prepared
from experiments.data.splits import fixed_split
from experiments.train.errors import DatasetNotFoundError, UsageError

TEST_FRACTION = 0.2

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
        count = round(TEST_FRACTION * len(everything))
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
        features = self._builder.info.features
        if not {"image", "label"} <= set(features) or None in features["image"].shape:
            raise UsageError(
                f"{name} cannot be read as images of one size with a class each: its features are "
                f"{dict(features)}; a folder of image files by class can be, with --image-size"
            )
        self.num_classes = int(features["label"].num_classes)

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


_DATASETS = frozenset({"digits", "mnist", "cifar10"})
"""Names that are never taken for a folder of the working directory; `./mnist` is one."""

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
_TEST_FOLDERS = ("test", "val", "validation")


class ImageFolder:
    """A folder of images: `<class>/<image>.png`, or `train/<class>/...` and `test/<class>/...`.

    Classes are numbered in the order of their names. Without a folder `test` (or `val`), a
    stratified fifth of the images, the same in every run, is the test split. Images are grey if
    all files are, otherwise they have three colours. They are decoded when they are asked for.

    Args:
        folder: the folder.
        image_size: side to which images are resized; None demands that all have one size.
        progress: show a progress bar while images are decoded.

    Raises:
        DatasetNotFoundError: there are no images, fewer than two classes, or other classes in the
            test folder than in the training folder.
    """

    white = 255

    def __init__(self, folder: pathlib.Path, image_size: int | None, progress: bool) -> None:
        self._folder, self._size, self._progress = folder, image_size, progress
        held_out = [folder / name for name in _TEST_FOLDERS if (folder / name).is_dir()]
        if (folder / "train").is_dir() and held_out:
            classes, files, labels = _list_images(folder / "train")
            test_classes, test_files, test_labels = _list_images(held_out[0])
            if test_classes != classes:
                raise DatasetNotFoundError(
                    f"{held_out[0]} has the classes {', '.join(test_classes)}, but "
                    f"{folder / 'train'} has {', '.join(classes)}"
                )
            self._splits = {"train": (files, labels), "test": (test_files, test_labels)}
        else:
            classes, files, labels = _list_images(folder)
            test, train = fixed_split(labels, max(1, round(TEST_FRACTION * len(labels))))
            self._splits = {
                name: ([files[i] for i in chosen], labels[chosen])
                for name, chosen in (("train", train), ("test", test))
            }
        self.classes, self.num_classes = classes, len(classes)
        self._grey = all(_is_grey(file) for files, _ in self._splits.values() for file in files)

    def labels(self, split: str) -> np.ndarray:
        """Labels of all examples of a split, `[N]` int32."""
        return self._splits[split][1]

    def read(self, split: str, indices: np.ndarray | None) -> Images:
        """The examples at `indices` of a split, all of them for None.

        Raises:
            UsageError: images differ in size, and no `image_size` was given; names two of them.
                Or the pixels of one have more than 8 bits; names it.
            DatasetNotFoundError: a file cannot be decoded; names it.
        """
        files, labels = self._splits[split]
        indices = np.arange(len(files)) if indices is None else indices
        bar = tqdm.tqdm(
            [files[i] for i in indices],
            desc=f"decoding {self._folder.name} {split}",
            unit=" images",
            leave=False,
            disable=not self._progress,
        )
        images: list[np.ndarray] = []
        for file in bar:
            image = self._read_file(file)
            if images and image.shape != images[0].shape:
                raise UsageError(
                    f"images differ in size: {files[indices[0]]} is {_sides(images[0])}, {file} is "
                    f"{_sides(image)}; name the side to resize them to with --image-size"
                )
            images.append(image)
        return Images(np.stack(images), labels[indices])

    def _read_file(self, file: pathlib.Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as image:
                if image.mode == "F" or image.mode.startswith("I"):
                    raise UsageError(
                        f"{file} has more than 8 bits a pixel (mode {image.mode}), which would be "
                        "cut off; convert the images to 8 bits first"
                    )
                image = image.convert("L" if self._grey else "RGB")
                if self._size is not None:
                    image = image.resize((self._size, self._size), Image.Resampling.BILINEAR)
                pixels = np.asarray(image)
        except OSError as error:
            raise DatasetNotFoundError(f"cannot decode {file}: {error}") from error
        return pixels[..., np.newaxis] if self._grey else pixels


def _sides(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _is_grey(file: pathlib.Path) -> bool:
    """Whether a file says that it has no colours; reads its head only."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.mode in ("1", "L", "LA")
    except OSError as error:
        raise DatasetNotFoundError(f"cannot decode {file}: {error}") from error


def _list_images(folder: pathlib.Path) -> tuple[list[str], list[pathlib.Path], np.ndarray]:
    """The names of the classes, the files of all images and their labels `[N]` int32."""
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files: list[pathlib.Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in _SUFFIXES)
        if not found:
            raise DatasetNotFoundError(f"there are no images in {folder / name}")
        files += found
        labels += [label] * len(found)
    if len(classes) < 2:
        raise DatasetNotFoundError(
            f"{folder} must hold a folder of images for each of at least two classes, it holds "
            f"the folders: {', '.join(classes) or 'none'}"
        )
    return classes, files, np.array(labels, np.int32)


def open_source(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    image_size: int | None,
    progress: bool,
) -> Digits | PreparedFolder | ImageFolder:
    """The source of a name: `digits`, a folder of images by class, or a prepared data set.

    Args:
        name: `digits`, the path of a folder, or the name of a data set in `data_dir`.
        data_dir: folder of prepared data sets, see `default_data_dir`.
        image_size: see `ImageFolder`.
        progress: show a progress bar while images are decoded.

    Raises:
        DatasetNotFoundError: there is no such data.
        UsageError: `image_size` is given for images that have a size already.
    """
    folder = pathlib.Path(name).expanduser()
    own = folder.is_dir() and name not in _DATASETS
    prepared = own and any(folder.glob("*/dataset_info.json"))
    if own and not prepared:
        return ImageFolder(folder, image_size, progress)
    if image_size is not None:
        raise UsageError(f"--image-size resizes a folder of images, but {name} is a data set")
    if name == "digits":
        return Digits()
    if not own and len(folder.parts) > 1:
        raise DatasetNotFoundError(f"there is no folder {folder}")
    if own:  # `<data_dir>/<name>`, as TensorFlow Datasets lays it out
        data_dir, name = folder.resolve().parent, folder.resolve().name
    return PreparedFolder(name, data_dir, progress)


def _decode(encoded: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(encoded)))
