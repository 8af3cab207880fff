"""The referee: residuals and gradient errors in float64 NumPy, from what implementations return.

Its renderings of the cells share no code with what is measured.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark.problems import Arrays, Problem, cell_params, under

GROUPS, HEADS, EPSILON, SLOPE = 8, 4, 1e-5, 0.1


def convolve(y: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """3x3 convolution that keeps height and width: NHWC by HWIO."""
    padded = np.pad(y, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], axis=(1, 2))
    return np.tensordot(windows, kernel, axes=([4, 5, 3], [0, 1, 2]))


def standardise(y: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """To mean 0 and variance 1 over the axes."""
    centred = y - y.mean(axes, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axes, keepdims=True) + EPSILON)


def group_norm(y: np.ndarray, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """GroupNorm of NHWC."""
    grouped = y.reshape(*y.shape[:3], GROUPS, -1)
    return standardise(grouped, (1, 2, 4)).reshape(y.shape) * scale + bias


def residual(params: Arrays, z: np.ndarray, x: Arrays) -> np.ndarray:
    """`norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))`."""
    p = params
    y = group_norm(np.maximum(convolve(z, p["kernel1"]), 0), p["scale1"], p["bias1"])
    y = group_norm(x["x"] + convolve(y, p["kernel2"]), p["scale2"], p["bias2"])
    return group_norm(np.maximum(z + y, 0), p["scale3"], p["bias3"])


def dense(params: Arrays, z: np.ndarray, x: Arrays) -> np.ndarray:
    """`tanh(W z + U x + b)`."""
    return np.tanh(z @ params["w"].T + x["x"] @ params["u"].T + params["b"])


def gains(params: Arrays, z: np.ndarray, x: Arrays) -> np.ndarray:
    """`x + gain * B φ(A z)`, `φ(v) = tanh(0.1 v) / 0.1`."""
    hidden = np.tanh(SLOPE * (z @ params["inner"])) / SLOPE
    return x["x"] + x["gain"] * (hidden @ params["outer"])


def transformer(params: Arrays, z: np.ndarray, x: Arrays) -> np.ndarray:
    """`h = norm(z + x + attention(z))`, then `norm(h + feedforward(h))`."""
    p = params
    tokens, width = z.shape[1:]

    def heads(name: str) -> np.ndarray:
        return (z @ p[name]).reshape(-1, tokens, HEADS, width // HEADS).transpose(0, 2, 1, 3)

    scores = heads("query") @ heads("key").transpose(0, 1, 3, 2) / np.sqrt(width // HEADS)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = (scores / scores.sum(-1, keepdims=True)) @ heads("value")
    attention = mixed.transpose(0, 2, 1, 3).reshape(z.shape) @ p["out"]
    h = standardise(z + x["x"] + attention, (-1,)) * p["scale1"] + p["bias1"]
    v = h @ p["up"] + p["up_bias"]
    v = 0.5 * v * (1 + np.tanh(np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
    v = v @ p["down"] + p["down_bias"]
    return standardise(h + v, (-1,)) * p["scale2"] + p["bias2"]


def low_rank(params: Arrays, z: np.ndarray, x: Arrays) -> np.ndarray:
    """`tanh(d * z + P Q z + x)`."""
    return np.tanh(params["diagonal"] * z + (z @ params["down"]) @ params["up"] + x["x"])


CELLS = {f.__name__: f for f in (residual, dense, gains, transformer, low_rank)}


def injection(params: Arrays, images: np.ndarray) -> np.ndarray:
    """What the network gives to its equation: convolution and BatchNorm, in training mode."""
    y = convolve(images, params["stem.kernel"]) + params["stem.bias"]
    return standardise(y, (0, 1, 2)) * params["norm_in.scale"] + params["norm_in.bias"]


def residuals(problem: Problem, z: np.ndarray) -> np.ndarray:
    """`[B]`, `‖f(z) - z‖ / ‖f(z)‖` of each sample."""
    params, x, z = _double(problem.params), _double(problem.x), z.astype(np.float64)
    if problem.network:
        x = {"x": injection(params, x["images"])}
        params = cell_params(params)
    fz = CELLS[problem.cell](params, z, x)
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


def norms(y: Any) -> np.ndarray:
    """`[B]`, the norm of each sample."""
    return np.linalg.norm(np.asarray(y).reshape(len(y), -1), axis=1)


def _double(arrays: Arrays) -> Arrays:
    return {
        name: array.astype(np.float64) if array.dtype.kind == "f" else array
        for name, array in arrays.items()
    }


def whole_batch_tolerance(problem: Problem, solve: Callable[[float], np.ndarray]) -> float:
    """The relative tolerance to ask of a solver that stops on the whole batch.

    It is the problem's own, halved until each sample's residual is within the problem's. If eight
    halvings do not achieve that, it is the problem's own.

    Args:
        problem: the problem.
        solve: relative tolerance -> z, channels last.
    """
    for tol in (problem.tol / 2**power for power in range(9)):
        if residuals(problem, solve(tol)).max() <= problem.tol:
            return tol
    return problem.tol
