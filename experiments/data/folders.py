"""Folders of image files, one folder for each class."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import tqdm

from experiments.train.errors import DatasetNotFoundError, UsageError


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
        """See `data.Source`."""
        return self._labels[split]

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `data.Source`.

        Raises:
            DatasetNotFoundError: a file cannot be decoded; the message names it.
        """
        images = np.empty((len(positions), *self.image_shape), np.uint8)
        for row, position in enumerate(positions):
            images[row] = self._decode(self._files[split][position]).reshape(self.image_shape)
        return images, self._labels[split][positions]

    def fingerprint(self) -> Any:
        """See `data.Source`: the path inside the folder and the size in bytes of every file."""
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
