"""Images in batches: whole in memory if they fit, else decoded on demand by Grain.

    dataset = load_images("cifar10", data_dir=DIR, validation_fraction=0.1)
    for batch in dataset.train_batches(128, seed=0, epoch=0):
        batch.inputs, batch.targets

A batch is a row of a plan, an array `[batches, B]` of positions that is written down before the
first image is read. Training resumes at batch k by leaving out the first k rows, and each of
several processes takes its own columns. Together they see the batches that one would see alone.
"""

import concurrent.futures
import dataclasses
import functools
import math
import os
import pathlib
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import tqdm

from experiments.data import WHOLE, Batch, Part, Source
from experiments.train.errors import DatasetNotFoundError, UsageError

_TEST_FRACTION = 0.2
_READ_AT_ONCE = 100

_SUBSET_STREAM = 1
_ORDER_STREAM = 2
"""Last words of the seeds below; without them two uses of one seed would draw the same numbers."""


def load_images(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    train_examples: int | None = None,
    eval_examples: int | None = None,
    validation_fraction: float = 0.0,
    seed: int = 0,
    progress: bool = False,
    in_memory_bytes: int = 2**31,
) -> "ImageDataset":
    """Opens a data set, and reads it into memory if it fits.

    Where the data have no test split, a stratified fifth of them, the same in every run, is held
    out for it.

    Args:
        name: `digits`, the name of a prepared data set, or a folder of images by class.
        data_dir: folder of prepared data sets, see `prepared.default_data_dir`.
        image_size: the side to which the images of a folder are resized.
        train_examples: train on a stratified subset of this size, drawn by `seed`; None for all.
        eval_examples: report on a stratified subset of this size, the same one in every run; None
            for all, or with `train_examples` for at most as many.
        validation_fraction: if positive, this share of the training split is held out, the same
            examples for each seed and subset, and is reported on in place of the test split.
        seed: seed of the subset.
        progress: show a progress bar while images are read.
        in_memory_bytes: the most that all images may take, decoded, to be held in memory.

    Raises:
        DatasetNotFoundError: the data set is not there; the message names the folder and the
            command that prepares it.
        UsageError: `train_examples` or `eval_examples` exceeds what there is.
    """
    source = open_source(name, data_dir, image_size, progress)
    labels = functools.cache(source.labels)
    train = np.arange(source.sizes["train"])
    if "test" in source.sizes:
        split, reported = "test", np.arange(source.sizes["test"])
    else:
        count = max(1, round(_TEST_FRACTION * len(train)))
        split, (reported, train) = "train", fixed_split(labels("train"), count)
    if validation_fraction > 0:
        count = max(1, round(validation_fraction * len(train)))
        held_out, rest = fixed_split(labels("train")[train], count)
        split, reported, train = "train", train[held_out], train[rest]
    if train_examples is not None and train_examples > len(train):
        raise UsageError(
            f"--data.train must be at most {len(train)}, the number of training examples of "
            f"{name}, got {train_examples}"
        )
    if train_examples is not None and train_examples < len(train):
        train = train[seeded_subset(labels("train")[train], train_examples, seed)]
    if eval_examples is None and train_examples is not None:
        eval_examples = min(train_examples, len(reported))
    if eval_examples is not None and eval_examples > len(reported):
        raise UsageError(
            f"--data.eval must be at most {len(reported)}, which is what there is to report "
            f"on, got {eval_examples}"
        )
    if eval_examples is not None and eval_examples < len(reported):
        reported = reported[fixed_split(labels(split)[reported], eval_examples)[0]]

    size = (len(train) + len(reported)) * math.prod(source.image_shape)
    short_name = pathlib.Path(name).name
    parts: list[Any] = []
    for part in (("train", train), (split, reported)):
        if size <= in_memory_bytes:
            description = f"reading {short_name}" if progress else None
            parts.append(_read_into_memory(source, *part, description))
        else:
            from experiments.data.streaming import OnDemand

            parts.append(OnDemand(source, *part))
    return ImageDataset(
        name=short_name,
        num_classes=source.num_classes,
        image_shape=source.image_shape,
        white=source.white,
        evaluation_name="validation" if validation_fraction > 0 else "test",
        _train=parts[0],
        _evaluation=parts[1],
    )


@dataclasses.dataclass(frozen=True)
class ImageDataset:
    """Images to train on, and images to report on.

    The batch sizes below are those of all processes together. A process reads its `Part` of the
    rows of every batch.

    Attributes:
        name: name of the data set.
        num_classes: number of classes.
        image_shape: `(H, W, C)`.
        white: the pixel value that becomes 1.0.
        evaluation_name: what is reported on, `test` or `validation`.
    """

    name: str
    num_classes: int
    image_shape: tuple[int, int, int]
    white: int
    evaluation_name: Literal["test", "validation"]
    _train: Any
    _evaluation: Any

    @property
    def train_size(self) -> int:
        """The number of images to train on."""
        return len(self._train)

    @property
    def evaluation_size(self) -> int:
        """The number of images to report on."""
        return len(self._evaluation)

    def describe(self) -> str:
        """What the images are, in a line."""
        height, width, colours = self.image_shape
        return (
            f"{self.name}, {self.train_size:,} training and {self.evaluation_size:,} "
            f"{self.evaluation_name} images of {height}x{width}x{colours}, "
            f"{self.num_classes} classes"
        )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Batches in an epoch.

        Raises:
            UsageError: there are fewer examples than in one batch.
        """
        if batch_size > self.train_size:
            raise UsageError(
                f"--batch-size must be at most the {self.train_size} training examples, "
                f"got {batch_size}"
            )
        return self.train_size // batch_size

    def figures(self, record: dict[str, Any]) -> dict[str, Any]:
        """Further figures to report; there are none."""
        del record
        return {}

    def checksum(self) -> int:
        """CRC-32 that tells whether a run is continued with the data that it was started with.

        For images in memory it covers all pixels and labels. For others it covers the numbers of
        the examples that were chosen and what names them without decoding one: of a folder, the
        path and size of every file; of a prepared data set, the name, size and number of records
        of every file. Files that are changed and keep their size go unnoticed. Times of
        modification do not count, so that a copy of the data is as good as the original.
        """
        return self._evaluation.checksum(self._train.checksum(0))

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """One epoch in an order that is a function of `seed` and `epoch` alone.

        An incomplete last batch is left out.

        Args:
            batch_size: examples in a batch.
            seed: seed of the order.
            epoch: number of the epoch.
            start: leave out this many batches at the beginning, without decoding them.
            part: read this part of each batch.

        Raises:
            UsageError: a batch has no such part.
        """
        steps = self.steps_per_epoch(batch_size)
        order = epoch_order(seed, epoch, self.train_size)[: steps * batch_size]
        plan = order.reshape(steps, batch_size)[start:]
        return _batches(self._train, plan, np.ones(plan.shape, bool), part)

    def evaluation_batches(
        self, batch_size: int, *, multiple_of: int = 1, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """All examples in order, each exactly once, in batches of one size.

        The last batch is filled up with examples of its own that do not count, so that one compiled
        function serves all batches. A sample's solve does not depend on the other samples of its
        batch, hence repeated ones do not change the number of evaluations that the batch takes.

        Args:
            batch_size: examples in a batch. If there are fewer examples in all, the batch is cut to
                their number, provided that it still is a multiple of `multiple_of`.
            multiple_of: the number of devices that share a batch.
            part: read this part of each batch.

        Raises:
            UsageError: a batch has no such part.
        """
        total = self.evaluation_size
        if total < batch_size and total % multiple_of == 0:
            batch_size = total
        starts = np.arange(0, total, batch_size)[:, np.newaxis]
        rows = np.arange(batch_size)
        present = np.minimum(batch_size, total - starts)
        return _batches(self._evaluation, starts + rows % present, rows < present, part)

    def evaluation_labels(self) -> np.ndarray:
        """The labels of the images to report on, `[N]` int32."""
        return self._evaluation.labels

    def evaluation_examples(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels at some positions of the images to report on."""
        return next(self._evaluation.examples(positions[np.newaxis]))


def _batches(split: Any, plan: np.ndarray, counts: np.ndarray, part: Part) -> Iterator[Batch]:
    """A part of each of the batches of a plan `[batches, B]` of positions in a split."""
    rows = part.rows(plan.shape[1])
    examples = zip(split.examples(plan[:, rows]), counts[:, rows], strict=True)
    return (Batch(images, labels, counted) for (images, labels), counted in examples)


@dataclasses.dataclass(frozen=True)
class _InMemory:
    """Images `[N, H, W, C]` uint8 and labels `[N]` int32."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def examples(self, plan: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The images and labels of each row of a plan."""
        return ((self.images[row], self.labels[row]) for row in plan)

    def checksum(self, before: int) -> int:
        """CRC-32 that continues `before`, see `ImageDataset.checksum`."""
        return zlib.crc32(self.labels, zlib.crc32(self.images, before))


def _read_into_memory(
    source: Source, split: str, positions: np.ndarray, description: str | None
) -> _InMemory:
    """Decodes the examples at `positions`; with a progress bar if there is a description."""
    images = np.empty((len(positions), *source.image_shape), np.uint8)
    labels = np.empty(len(positions), np.int32)

    def fill(start: int) -> None:
        block = slice(start, start + _READ_AT_ONCE)
        images[block], labels[block] = source.read(split, positions[block])

    starts = range(0, len(positions), _READ_AT_ONCE)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(fill, starts)
        disable = description is None
        for _ in tqdm.tqdm(done, description, len(starts), leave=False, disable=disable):
            pass
    return _InMemory(images, labels)


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
        from experiments.data.folders import ImageFolder

        return ImageFolder(folder, image_size, progress)
    if image_size is not None:
        raise UsageError(f"--data.size resizes a folder of images, but {name} is a data set")
    if name == "digits":
        return Digits()
    from experiments.data.prepared import PreparedImages

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


def stratified_split(
    labels: np.ndarray, count: int, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws `count` examples with each class in its share of the whole.

    Args:
        labels: `[N]` classes.
        count: how many to draw, 1 to N - 1.
        generator: source of the draw.

    Returns:
        Ascending indices of the drawn examples and of the rest.

    Raises:
        ValueError: `count` is out of its range.
    """
    if not 0 < count < len(labels):
        raise ValueError(f"count must be from 1 to {len(labels) - 1}, got {count}")
    classes, sizes = np.unique(labels, return_counts=True)
    # Largest remainder: rounded quotas that add up to exactly `count`.
    quotas = sizes * count / len(labels)
    counts = np.floor(quotas).astype(int)
    # A stable sort on rounded remainders: equal ones go to the lower class on every machine.
    by_remainder = np.argsort(-np.round(quotas - counts, 9), kind="stable")
    counts[by_remainder[: count - counts.sum()]] += 1
    chosen = np.zeros(len(labels), bool)
    for one, quota in zip(classes, counts, strict=True):
        chosen[generator.permutation(np.flatnonzero(labels == one))[:quota]] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def fixed_split(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The stratified split that holds out the same `count` examples whatever the seed of a run."""
    return stratified_split(labels, count, np.random.default_rng(0))


def seeded_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Ascending indices of a stratified subset of `count` examples, drawn by `seed`."""
    return stratified_split(labels, count, np.random.default_rng([seed, 0, _SUBSET_STREAM]))[0]


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of `size` training examples in one epoch, a function of the arguments alone."""
    return np.random.default_rng([seed, epoch, _ORDER_STREAM]).permutation(size)
