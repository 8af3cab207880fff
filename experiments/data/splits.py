"""Stratified splits and the order of examples, all reproducible from a seed."""

import numpy as np

_SPLIT_SEED = 0
"""Held-out examples are the same ones whatever the seed of a run, so that runs can be compared."""

_SUBSET_STREAM = 1
_ORDER_STREAM = 2
"""Last words of the seeds below; without them two uses of one seed would draw the same numbers."""


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
    drawn = np.concatenate(
        [
            generator.permutation(np.flatnonzero(labels == one))[:quota]
            for one, quota in zip(classes, counts, strict=True)
        ]
    )
    chosen = np.zeros(len(labels), bool)
    chosen[drawn] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


def fixed_split(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The one stratified split of `labels` that holds out `count` examples in every run.

    Returns:
        Ascending indices of the examples held out and of the rest.
    """
    return stratified_split(labels, count, np.random.default_rng(_SPLIT_SEED))


def seeded_subset(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Ascending indices of a stratified subset of `count` examples, drawn by `seed`."""
    return stratified_split(labels, count, np.random.default_rng([seed, 0, _SUBSET_STREAM]))[0]


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of the training examples in one epoch, `[size]`.

    A function of its arguments alone: training resumes at any position of any epoch without having
    drawn what came before.
    """
    return np.random.default_rng([seed, epoch, _ORDER_STREAM]).permutation(size)
