"""The workloads: which problems, by which implementations, in which mode."""

import dataclasses
from collections.abc import Callable

import numpy as np

from experiments.benchmark import problems
from experiments.benchmark.problems import Problem

PEERS = ("tutorial", "tutorial, relative ridge", "torchdeq", "jaxopt", "optimistix")
EQUAL_RIDGE = (
    "deq_jax, absolute ridge",
    "deq_jax, absolute ridge, 2 devices",
    "tutorial",
    "torchdeq",
    "jaxopt, ridge 1e-4",
)
"""Implementations of Anderson with the same absolute ridge."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem and those who solve it.

    Attributes:
        problem: makes the problem.
        mode: `forward`, `gradient` (forward and gradient in params and x), or `step`.
        implementations: names.
        size: of a case in a series, what is on the horizontal axis.
        every_sample: implementations that stop on the whole batch are given a tolerance at which
            every sample meets that of the problem.
    """

    problem: Callable[[], Problem]
    mode: str
    implementations: tuple[str, ...]
    size: int | None = None
    every_sample: bool = False


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is said about a workload, and its cases.

    Attributes:
        text: what it is.
        cases: `quick` -> cases by name; quick ones are tiny.
        axis: of a series, what grows.
    """

    text: str
    cases: Callable[[bool], dict[str, Case]]
    axis: str | None = None


def _solve(quick: bool) -> dict[str, Case]:
    def problem() -> Problem:
        if quick:
            return problems.residual(batch=2, size=8, channels=8, inner=16)
        return problems.residual(batch=10, size=32, channels=64, inner=128)

    names = ("deq_jax", "deq_jax, 2 devices", *PEERS, *EQUAL_RIDGE)
    return {"forward": Case(problem, "forward", unique(names))}


def _step(quick: bool) -> dict[str, Case]:
    def problem() -> Problem:
        if quick:
            return problems.network(batch=4, size=8, channels=8, inner=16, pool=4)
        return problems.network(batch=32, size=32, channels=48, inner=64)

    own = ("deq_jax", "deq_jax, 2 devices")
    own += tuple(f"{name}, tolerance / 2" for name in own)
    names = (*own, *PEERS, *EQUAL_RIDGE)
    return {"training step": Case(problem, "step", unique(names))}


def _dense(quick: bool) -> dict[str, Case]:
    def problem() -> Problem:
        return problems.dense(batch=8, width=16) if quick else problems.dense(batch=64, width=128)

    own = ("deq_jax", "deq_jax, Picard", "deq_jax, 2 devices")
    names = unique((*own, *PEERS, "jaxopt, Picard", *EQUAL_RIDGE))
    return {
        "forward": Case(problem, "forward", names),
        "forward + gradient": Case(problem, "gradient", names),
    }


def _heterogeneous(quick: bool) -> dict[str, Case]:
    batch, width = (8, 16) if quick else (128, 512)

    def problem() -> Problem:
        return problems.gains(np.linspace(0.1, 0.98, batch), width=width)

    own = ("deq_jax", "deq_jax, 2 devices", "deq_jax, shrinking")
    own += ("deq_jax, shrinking, tolerance / 3",)
    names = unique((*own, *PEERS, "jaxopt, Picard", *EQUAL_RIDGE))
    return {"forward + gradient": Case(problem, "gradient", names, every_sample=True)}


def _transformer(quick: bool) -> dict[str, Case]:
    def problem() -> Problem:
        if quick:
            return problems.transformer(batch=2, tokens=4, width=16)
        return problems.transformer(batch=8, tokens=32, width=64)

    names = ("deq_jax", "deq_jax, 2 devices", *PEERS)
    return {"forward + gradient": Case(problem, "gradient", names)}


SERIES = ("deq_jax", "tutorial", "torchdeq", "jaxopt", "optimistix")


def _batch(quick: bool) -> dict[str, Case]:
    sizes, width = ((1, 2), 16) if quick else (tuple(2**power for power in range(10)), 256)

    def case(batch: int) -> Case:
        return Case(lambda: problems.dense(batch=batch, width=width), "gradient", SERIES, batch)

    return {f"batch {batch}": case(batch) for batch in sizes}


def _width(quick: bool) -> dict[str, Case]:
    sizes, batch = ((32, 64), 2) if quick else ((32, 128, 512, 2048, 8192, 32768), 32)

    def case(width: int) -> Case:
        return Case(lambda: problems.low_rank(batch=batch, width=width), "gradient", SERIES, width)

    return {f"width {width}": case(width) for width in sizes}


def _nchw(quick: bool) -> dict[str, Case]:
    (solve,) = _solve(quick).values()
    return {"forward": Case(solve.problem, "forward", ("deq_jax", "deq_jax, NCHW"))}


def _shrinking(quick: bool) -> dict[str, Case]:
    batch, width = (20, 16) if quick else (256, 1024)
    gain = np.where(np.arange(batch) < batch // 10, 0.9, 0.9**10)

    def problem() -> Problem:
        return problems.gains(gain, width=width)

    names = (
        "deq_jax, Picard",
        "deq_jax, Picard, shrinking",
        "deq_jax",
        "deq_jax, shrinking",
    )
    return {"forward + gradient": Case(problem, "gradient", names)}


def _precision(quick: bool) -> dict[str, Case]:
    names = ("deq_jax", "deq_jax, cell in bfloat16", "deq_jax, all in bfloat16")

    def residual() -> Problem:
        sizes = (
            {"batch": 2, "size": 8, "channels": 8, "inner": 16}
            if quick
            else {"batch": 10, "size": 32, "channels": 64, "inner": 128}
        )
        return problems.residual(**sizes, tol=0.0, max_iter=40)

    def dense() -> Problem:
        batch, width = (8, 16) if quick else (128, 512)
        return problems.dense(batch=batch, width=width, tol=0.0, max_iter=40)

    return {
        "convolutions": Case(residual, "forward", names),
        "dense": Case(dense, "forward", names),
    }


def unique(names: tuple[str, ...]) -> tuple[str, ...]:
    """Each name once, in order."""
    return tuple(dict.fromkeys(names))


WORKLOADS = {
    "solve": Workload(
        "The residual convolution cell of the Deep Implicit Layers tutorial: GroupNorm 8, 64 outer "
        "and 128 inner channels, batch 10, 32x32, kernels N(0, 0.01²), x ~ N(0, 1), z0 = 0.",
        _solve,
    ),
    "step": Workload(
        "One training step of the tutorial's network, optimiser included: convolution 3 -> 48, "
        "BatchNorm, the cell with 48/64 channels, BatchNorm, average pool 8, linear; batch 32 of "
        "random images 32x32 with random labels, cross entropy, Adam. Every timed step starts from "
        "the same parameters.",
        _step,
    ),
    "dense": Workload(
        "`tanh(W z + U x + b)`, 128 wide, batch 64, the spectral norm of W 0.9.", _dense
    ),
    "heterogeneous": Workload(
        "`x + g B φ(A z)`, φ nearly linear, B A symmetric with eigenvalues evenly spaced in "
        "[-1, 1], 512 wide, batch 128: the gain g of a sample, from 0.1 to 0.98 over the batch, is "
        "its rate of convergence. Implementations that stop on the whole batch have their "
        "tolerance halved until every sample is within the one asked for, where that is possible.",
        _heterogeneous,
    ),
    "transformer": Workload(
        "A transformer block, post-norm, with x added to the residual stream: 64 wide, 4 heads, "
        "32 tokens, batch 8.",
        _transformer,
    ),
    "batch": Workload(
        "The cell of `dense`, 256 wide, forward and gradient, at batch sizes from 1 to 512.",
        _batch,
        axis="batch size",
    ),
    "width": Workload(
        "`tanh(d * z + P Q z + x)` with P and Q of rank 8, so that work is in proportion to the "
        "width; batch 32, forward and gradient.",
        _width,
        axis="width of the state",
    ),
    "nchw": Workload("The cell of `solve` written in NCHW against the same in NHWC.", _nchw),
    "shrinking": Workload(
        "The map of `heterogeneous`, 1024 wide, batch 256: a tenth of the samples has gain 0.9, "
        "the others 0.9^10, so that Picard needs ten times the evaluations for the former.",
        _shrinking,
    ),
    "precision": Workload(
        "Tolerance 0 and 40 evaluations: how low the residual can be brought, and the time of it. "
        "The cells of `solve` and of `dense` (512 wide, batch 128). The residuals in the table are "
        "those of the returned state in the equation of the float32 weights; below it stand the "
        "solver's own, in the equation as it is rounded.",
        _precision,
    ),
}
