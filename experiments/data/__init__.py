"""Reads images and texts: where they come from, splits, batches."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np


class Batch(NamedTuple):
    """Examples of one step, as they are kept in memory.

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
