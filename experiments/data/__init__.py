"""Reads images and texts: where they come from, splits, batches."""

from typing import NamedTuple

import numpy as np


class Batch(NamedTuple):
    """Examples of one step, as they are kept in memory.

    Attributes:
        inputs: `[B, ...]`: images `[B, H, W, C]` uint8, or tokens `[B, L]` int32.
        targets: `[B]` int32 classes, or `[B, L]` where each position is to predict one.
        counts: boolean, of the targets' shape: False for what fills up the last batch of an
            evaluation, whose predictions do not count.
        first: boolean `[B]`: the sequence begins here, and what is in memory is of another. None
            where nothing is carried from batch to batch.
    """

    inputs: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    first: np.ndarray | None = None
