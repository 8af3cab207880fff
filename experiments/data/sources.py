"""Where images come from: scikit-learn, prepared data sets, folders of image files.

`open_source` chooses. A source knows how many images it has without decoding one, and decodes the
images that `read` is asked for.
"""

import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import tqdm

from experiments.data.prepared import PreparedImages
from experiments.train.errors import DatasetNotFoundError, UsageError


class Source(Protocol):
    """Labelled images that can be read in any order, from several threads at once.

    Attributes:
        sizes: the number of images in the split `train`, and in the split `test` if there is one.
        num_classes: number of classes.
        image_shape: `(H, W, C)`, the same for all images.
        white: the pixel value that becomes 1.0.
    """

    sizes: Mapping[str, int]
    num_classes: int
    image_shape: tuple[int, int, int]
    white: int

    def labels(self, split: str) -> np.ndarray:
        """The labels of a split, `[N]` int32, read without decoding images."""
        ...

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images `[n, H, W, C]` uint8 and labels `[n]` int32 at `positions` of a split."""
        ...

    def fingerprint(self) -> Any:
        """What tells these data from others without decoding them; JSON can hold it."""
        ...


def open_source(
    name: str, data_dir: str | os.PathLike[str] | None, image_size: int | None, progress: bool
) -> Source:
    """Opens the source that `name` stands for.

    Args:
        name: `digits`, the path of a folder, or the name of a data set in `data_dir`. The path may
            be that of a prepared data set or of a folder of images.
        data_dir: folder of prepared data sets; None for `prepared.default_data_dir()`.
        image_size: the side to which the images of a folder are resized.
        progress: show a progress bar while a folder of images is looked through.

    Raises:
        DatasetNotFoundError: there are no such data; the message names the folder.
        UsageError: `image_size` is given for images that have a size already.
    """
    folder = pathlib.Path(name).expanduser()
    # A folder `mnist` in the working directory is not the data set; `./mnist` names the folder.
    is_folder = folder.is_dir() and name not in ("digits", "mnist", "cifar10")
    is_prepared = is_folder and any(folder.glob("*/dataset_info.json"))
    if is_folder and not is_prepared:
        return ImageFolder(folder, image_size, progress)
    if image_size is not None:
        raise UsageError(f"--data.size resizes a folder of images, but {name} is a data set")
    if name == "digits":
        return Digits()
    if is_prepared:
        return PreparedImages(folder.resolve().name, folder.resolve().parent)
    if len(folder.parts) > 1:
        raise DatasetNotFoundError(f"there is no folder {folder}")
    return PreparedImages(name, data_dir)


class Digits:
    """The 1,797 handwritten digits of scikit-learn, 8x8 pixels; see `Source`."""

    num_classes = 10
    image_shape: tuple[int, int, int] = (8, 8, 1)
    white = 16

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        self._images = pixels.astype(np.uint8).reshape(-1, *self.image_shape)
        self._labels = labels.astype(np.int32)
        self.sizes: Mapping[str, int] = {"train": len(self._labels)}

    def labels(self, split: str) -> np.ndarray:
        """See `Source`."""
        return self._labels

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source`."""
        return self._images[positions], self._labels[positions]

    def fingerprint(self) -> Any:
        """See `Source`."""
        return ["digits", zlib.crc32(self._images), zlib.crc32(self._labels)]


class ImageFolder:
    """A folder of images: `<class>/<image>.png`, or `train/<class>/...` and `test/<class>/...`.

    Classes are numbered in the order of their names. The test folder may also be named `val` or
    `validation`. Images are grey if all files are, otherwise they have three colours.

    Args:
        folder: the folder.
        image_size: the side to which images are resized; None demands that all have one size.
        progress: show a progress bar while the heads of the files are read.

    Raises:
        DatasetNotFoundError: there are no images, fewer than two classes, or other classes in the
            test folder than in the training folder; or a file is no image.
        UsageError: images differ in size and `image_size` is None, or one has more than 8 bits.
    """

    white = 255

    def __init__(self, folder: pathlib.Path, image_size: int | None, progress: bool) -> None:
        self._folder, self._image_size = folder, image_size
        tests = [folder / name for name in ("test", "val", "validation")]
        tests = [path for path in tests if path.is_dir()]
        has_test = (folder / "train").is_dir() and bool(tests)
        classes, files, labels = _list_images(folder / "train" if has_test else folder)
        self._files, self._labels = {"train": files}, {"train": labels}
        if has_test:
            test_classes, self._files["test"], self._labels["test"] = _list_images(tests[0])
            if test_classes != classes:
                raise DatasetNotFoundError(
                    f"{tests[0]} has the classes {', '.join(test_classes)}, but "
                    f"{folder / 'train'} has {', '.join(classes)}"
                )
        self.sizes: Mapping[str, int] = {split: len(files) for split, files in self._files.items()}
        self.num_classes = len(classes)
        self.image_shape = self._check_heads(progress)

    def labels(self, split: str) -> np.ndarray:
        """See `Source`."""
        return self._labels[split]

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Source`.

        Raises:
            DatasetNotFoundError: a file cannot be decoded; the message names it.
        """
        images = np.empty((len(positions), *self.image_shape), np.uint8)
        for row, position in enumerate(positions):
            images[row] = self._decode(self._files[split][position]).reshape(self.image_shape)
        return images, self._labels[split][positions]

    def fingerprint(self) -> Any:
        """See `Source`: the path inside the folder and the size in bytes of every file."""
        files = [
            (file.relative_to(self._folder).as_posix(), file.stat().st_size)
            for split in self._files
            for file in self._files[split]
        ]
        return [self.image_shape, files]

    def _decode(self, file: pathlib.Path) -> np.ndarray:
        from PIL import Image

        try:
            with Image.open(file) as opened:
                image = opened.convert("L" if self.image_shape[2] == 1 else "RGB")
        except OSError as error:
            raise DatasetNotFoundError(f"cannot decode {file}: {error}") from error
        if self._image_size is not None:
            side = self._image_size
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def _check_heads(self, progress: bool) -> tuple[int, int, int]:
        """Reads the heads of all files, which say whether images are grey and of one size."""
        from PIL import Image

        files = [file for split in self._files.values() for file in split]
        description = f"looking through {self._folder.name}"
        modes, side = set(), self._image_size
        height, width = side, side
        for file in tqdm.tqdm(files, description, leave=False, disable=not progress):
            try:
                with Image.open(file) as image:
                    mode, sides = image.mode, (image.height, image.width)
            except OSError as error:
                raise DatasetNotFoundError(f"cannot decode {file}: {error}") from error
            if mode == "F" or mode.startswith("I"):
                raise UsageError(
                    f"{file} has more than 8 bits a pixel (mode {mode}), which would be cut off; "
                    "convert the images to 8 bits first"
                )
            modes.add(mode)
            if side is None and height is None:
                height, width = sides
            if side is None and sides != (height, width):
                raise UsageError(
                    f"images differ in size: {files[0]} is {height}x{width}, {file} is "
                    f"{sides[0]}x{sides[1]}; name the side to resize them to with --data.size"
                )
        return height, width, 1 if modes <= {"1", "L", "LA"} else 3


def _list_images(folder: pathlib.Path) -> tuple[list[str], list[pathlib.Path], np.ndarray]:
    """The names of the classes, the files of all images and their labels `[N]` int32."""
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir())
    files: list[pathlib.Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).iterdir() if p.suffix.lower() in suffixes)
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
