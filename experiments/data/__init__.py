"""Reads images and texts: where they come from, splits, batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from experiments.train.errors import UsageError


class Batch(NamedTuple):
    """Examples of one step, or a part of them, as they are kept in memory.

    Attributes:
        inputs: `[B, ...]`: images `[B, H, W, C]` uint8, or tokens `[B, L]` int32.
        targets: `[B]` int32 classes, or `[B, L]` where each position is to predict one.
        counts: boolean, of the targets' shape: False for what fills up the last batch of an
            evaluation, whose predictions do not count.
        first: boolean `[B]`: True where a new sequence begins, so that its memory is cleared. None
            where nothing is carried from batch to batch.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    first: np.ndarray | None = None


class Part(NamedTuple):
    """One of several equal parts of every batch: the rows that one process reads.

    Attributes:
        index: number of the part, from 0.
        count: number of parts.
    """

    index: int = 0
    count: int = 1

    def rows(self, size: int) -> slice:
        """Its rows of a batch of `size` examples.

        Raises:
            UsageError: a batch cannot be divided like that.
        """
        if size % self.count:
            raise UsageError(
                f"a batch of {size} examples cannot be shared equally by {self.count} processes; "
                f"choose a batch size that is a multiple of {self.count}"
            )
        share = size // self.count
        return slice(self.index * share, (self.index + 1) * share)


WHOLE = Part()
"""All rows, for a process that is alone."""


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

    def read(self, split: str, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The images `[n, H, W, C]` uint8 and labels `[n]` int32 at `positions` of a split."""

    def fingerprint(self) -> Any:
        """What tells these data from others without decoding them; JSON can hold it."""
