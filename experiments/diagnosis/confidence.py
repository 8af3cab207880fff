"""Whether residual and evaluations tell right answers from wrong ones."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.diagnosis.measure import Solves

ENOUGH = 10
"""Mistakes, and right answers, below which no AUROC is worth telling."""


@dataclasses.dataclass(frozen=True)
class Confidence:
    """Whether right answers can be told from wrong ones.

    Attributes:
        correct: right answers.
        wrong: wrong answers.
        scores: `[N]` each, larger for what should be right.
        auroc: of each score; empty where there are too few answers of a kind.
    """

    correct: int
    wrong: int
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


def confidence(solves: Solves) -> Confidence:
    """How well residual, evaluations and softmax tell right answers from wrong ones."""
    scores = {
        "softmax maximum": solves.softmax.astype(float),
        "-residual": -solves.residual.astype(float),
        "-evaluations": -solves.iterations.astype(float),
    }
    correct = int(solves.correct.sum())
    wrong = len(solves.labels) - correct
    enough = min(correct, wrong) >= ENOUGH
    found = {name: auroc(score, solves.correct) for name, score in scores.items() if enough}
    return Confidence(correct, wrong, scores, found)
