"""Tolerances for solvers that stop on the whole batch."""

from collections.abc import Callable, Iterator

import numpy as np

from experiments.benchmark.problems import Problem
from experiments.benchmark.referee import residuals

_HALVINGS = 8


def tolerance(
    problem: Problem, solve: Callable[[float], np.ndarray], *, every_sample: bool
) -> float:
    """The relative tolerance, on the whole batch, to ask for.

    Args:
        problem: what is solved.
        solve: relative tolerance -> z, channels last.
        every_sample: the largest tolerance, by halving, at which each sample's own residual is
            within the problem's; the problem's own if there is none. False: the problem's own.
    """
    if not every_sample:
        return problem.tol
    for tol in _halved(problem.tol):
        if residuals(problem, solve(tol)).max() <= problem.tol:
            return tol
    return problem.tol


def _halved(tol: float) -> Iterator[float]:
    return (tol / 2**power for power in range(_HALVINGS + 1))
