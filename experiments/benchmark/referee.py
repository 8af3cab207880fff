"""The referee: residuals and gradient errors in float64 NumPy, from what implementations return."""

from typing import Any

import numpy as np

from experiments.benchmark import cells_numpy
from experiments.benchmark.problems import Arrays, Problem, cell_params, under


def residuals(problem: Problem, z: np.ndarray) -> np.ndarray:
    """`[B]`, `‖f(z) - z‖ / ‖f(z)‖` of each sample."""
    params, x, z = _double(problem.params), _double(problem.x), z.astype(np.float64)
    if problem.network:
        x = {"x": cells_numpy.injection(params, x["images"])}
        params = cell_params(params)
    fz = cells_numpy.CELLS[problem.cell](params, z, x)
    return norms(fz - z) / norms(fz)


def gradient_error(gradient: Arrays, reference: Arrays) -> float:
    """`‖g - g*‖ / ‖g*‖` over all of the arrays together."""
    if gradient.keys() != reference.keys():
        raise ValueError(f"gradients of {sorted(gradient)}, expected {sorted(reference)}")
    difference = sum(((gradient[name] - g) ** 2).sum() for name, g in reference.items())
    return float(np.sqrt(difference / sum((g**2).sum() for g in reference.values())))


def judge(problem: Problem, result: Arrays, reference: Arrays) -> dict[str, Any]:
    """Largest and median residual and, where there are gradients, their error.

    Args:
        problem: what was solved.
        result: `z` and `gradient/...` of an implementation.
        reference: the same in float64.
    """
    found = residuals(problem, result["z"])
    gradient = under("gradient", result)
    return {
        "residual_largest": float(found.max()),
        "residual_median": float(np.median(found)),
        "gradient_error": gradient_error(gradient, under("gradient", reference))
        if gradient
        else None,
    }


def norms(y: np.ndarray) -> np.ndarray:
    """`[B]`, the norm of each sample."""
    return np.linalg.norm(y.reshape(len(y), -1), axis=1)


def _double(arrays: Arrays) -> Arrays:
    return {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }
