"""Whether residual and evaluations tell what went well from what went wrong."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.report.results import Solves

ENOUGH = 10
"""Good ones, and bad ones, below which no AUROC is worth telling."""


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Whether the examples that went well can be told from the others.

    Attributes:
        good: `[N]` boolean: it went well, as `Examples.good` has it.
        scores: `[N]` each, larger for what should have gone well.
        auroc: of each score; empty where there are too few examples of a kind.
    """

    good: np.ndarray
    scores: Mapping[str, np.ndarray]
    auroc: Mapping[str, float]


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive has a larger score than a negative, ties counted half.

    Args:
        scores: `[N]`; NaN counts as the lowest.
        positive: `[N]` boolean, some true and some false.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    _, place, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    # Equal scores share the mean of their ranks, which start from 1.
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[place]
    count = int(positive.sum())
    surplus = ranks[positive].sum() - count * (count + 1) / 2
    return float(surplus / (count * (len(scores) - count)))


def confidence(solves: Solves, good: np.ndarray) -> Confidence:
    """How well residual, evaluations and softmax tell what went well from the rest.

    Args:
        solves: the solves.
        good: `[N]` boolean, from `Examples.good`.
    """
    scores = {
        "softmax maximum": solves.softmax.astype(float),
        "-residual": -solves.residual.astype(float),
        "-evaluations": -solves.iterations.astype(float),
    }
    enough = min(good.sum(), (~good).sum()) >= ENOUGH
    found = {name: auroc(score, good) for name, score in scores.items() if enough}
    return Confidence(good, scores, found)
