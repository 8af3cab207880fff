"""What is measured: the implementations, and the workloads that each of them runs.

docs/benchmarks.md describes the workloads and how the implementations are set.
"""

import dataclasses
import functools
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from experiments.benchmark import problems
from experiments.benchmark.problems import Problem

RIDGE = 1e-4
"""The ridge of the tutorial and of torchdeq; that of all in the table at equal ridge."""

INSTALL = {
    "torch": "pip install -r requirements-peers.txt",
    "torchdeq": "pip install --no-deps torchdeq==0.1.0",
    "jaxopt": "pip install -r requirements-peers.txt",
    "optimistix": "pip install -r requirements-peers.txt",
}
"""How to install what an implementation may require."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row of a table.

    Attributes:
        module: module of this package.
        calls: the class in it that runs this implementation.
        options: for that class.
        requires: packages that have to be installed.
    """

    module: str
    calls: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Variables that its process needs."""
        devices = self.options.get("devices")
        if devices is None:
            return {}
        return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def _deq_jax(**options: Any) -> Implementation:
    return Implementation("run_deq_jax", "Calls", options)


def _torch(layer: str, *requires: str, **options: Any) -> Implementation:
    return Implementation("run_torch", "Calls", {"layer": layer, **options}, ("torch", *requires))


def _jaxopt(**options: Any) -> Implementation:
    return Implementation("run_jax_peers", "JaxoptCalls", options, ("jaxopt",))


IMPLEMENTATIONS = {
    "deq_jax": _deq_jax(),
    "deq_jax, 2 devices": _deq_jax(devices=2),
    "deq_jax, tolerance / 2": _deq_jax(stricter=2),
    "deq_jax, 2 devices, tolerance / 2": _deq_jax(devices=2, stricter=2),
    "deq_jax, Picard": _deq_jax(solver="picard"),
    "deq_jax, shrinking": _deq_jax(shrink_to=8),
    "deq_jax, shrinking, tolerance / 3": _deq_jax(shrink_to=8, stricter=3),
    "deq_jax, Picard, shrinking": _deq_jax(solver="picard", shrink_to=8),
    "deq_jax, NCHW": _deq_jax(layout="NCHW"),
    "deq_jax, cell in bfloat16": _deq_jax(cell_dtype="bfloat16"),
    "deq_jax, all in bfloat16": _deq_jax(dtype="bfloat16"),
    "deq_jax, eager": _deq_jax(jit=False),
    "deq_jax, absolute ridge": _deq_jax(ridge=RIDGE),
    "deq_jax, absolute ridge, 2 devices": _deq_jax(ridge=RIDGE, devices=2),
    "tutorial": _torch("tutorial"),
    "tutorial, relative ridge": _torch("tutorial", relative=True),
    "torchdeq": _torch("torchdeq", "torchdeq"),
    "jaxopt": _jaxopt(),
    "jaxopt, ridge 1e-4": _jaxopt(ridge=RIDGE),
    "jaxopt, Picard": _jaxopt(solver="picard"),
    "optimistix": Implementation("run_jax_peers", "OptimistixCalls", {}, ("optimistix",)),
}

PEERS = ("tutorial", "tutorial, relative ridge", "torchdeq", "jaxopt", "optimistix")
SERIES = ("deq_jax", "tutorial", "torchdeq", "jaxopt", "optimistix")
EQUAL_RIDGE = (
    "deq_jax, absolute ridge",
    "deq_jax, absolute ridge, 2 devices",
    "tutorial",
    "torchdeq",
    "jaxopt, ridge 1e-4",
)
"""Implementations of Anderson with the same absolute ridge."""


def missing(names: Iterable[str]) -> dict[str, list[str]]:
    """Packages that are not installed, and the implementations that need each."""
    absent: dict[str, list[str]] = {}
    for name in names:
        for package in IMPLEMENTATIONS[name].requires:
            if importlib.util.find_spec(package) is None:
                absent.setdefault(package, []).append(name)
    return absent


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem and those who solve it.

    Attributes:
        problem: makes the problem.
        mode: `forward`, `gradient` (forward and gradient in params and x), or `step` (a training
            step).
        implementations: names; one that comes twice runs once.
        size: of a case in a series, what is on the horizontal axis.
        every_sample: implementations that stop on the whole batch are given a tolerance at which
            every sample meets that of the problem.
        time_products: deq_jax's transposed products are timed as well, prepared and not.
    """

    problem: Callable[[], Problem]
    mode: str
    implementations: tuple[str, ...]
    size: int | None = None
    every_sample: bool = False
    time_products: bool = False

    def settings(self) -> dict[str, Any]:
        """What the `Calls` of an implementation are told."""
        return {
            "mode": self.mode,
            "every_sample": self.every_sample,
            "time_cell": self.mode == "forward",
            "time_products": self.time_products,
        }


Cases = dict[str, Case]


def _residual(
    quick: bool, *sizes: int, tol: float = 1e-4, max_iter: int = 50
) -> Callable[[], Problem]:
    batch, size, channels, inner = (2, 8, 8, 16) if quick else sizes or (10, 32, 64, 128)
    sizes_of = {"batch": batch, "size": size, "channels": channels, "inner": inner}
    return functools.partial(problems.residual, **sizes_of, tol=tol, max_iter=max_iter)


def _dense(quick: bool, batch: int, width: int, **limits: Any) -> Callable[[], Problem]:
    sizes = {"batch": 8, "width": 16} if quick else {"batch": batch, "width": width}
    return functools.partial(problems.dense, **sizes, **limits)


def solve(quick: bool) -> Cases:
    """The tutorial's residual cell, forward."""
    names = ("deq_jax", "deq_jax, 2 devices", *PEERS, *EQUAL_RIDGE)
    return {"forward": Case(_residual(quick), "forward", names)}


def step(quick: bool) -> Cases:
    """One training step of the tutorial's network."""
    tiny = {"batch": 4, "size": 8, "channels": 8, "inner": 16, "pool": 4}
    sizes = tiny if quick else {"batch": 32, "size": 32, "channels": 48, "inner": 64}
    own = ("deq_jax", "deq_jax, 2 devices")
    own += tuple(f"{name}, tolerance / 2" for name in own)
    problem = functools.partial(problems.network, **sizes)
    return {"training step": Case(problem, "step", (*own, *PEERS, *EQUAL_RIDGE))}


def dense(quick: bool) -> Cases:
    """A small dense cell: all overhead."""
    problem = _dense(quick, 64, 128)
    own = ("deq_jax", "deq_jax, Picard", "deq_jax, 2 devices")
    names = (*own, *PEERS, "jaxopt, Picard", *EQUAL_RIDGE)
    return {
        "forward": Case(problem, "forward", names),
        "forward + gradient": Case(problem, "gradient", names),
    }


def heterogeneous(quick: bool) -> Cases:
    """Samples that converge at different rates."""
    batch, width = (8, 16) if quick else (128, 512)
    problem = functools.partial(problems.gains, np.linspace(0.1, 0.98, batch), width=width)
    own = ("deq_jax", "deq_jax, 2 devices", "deq_jax, shrinking")
    own += ("deq_jax, shrinking, tolerance / 3",)
    names = (*own, *PEERS, "jaxopt, Picard", *EQUAL_RIDGE)
    return {"forward + gradient": Case(problem, "gradient", names, every_sample=True)}


def transformer(quick: bool) -> Cases:
    """A transformer block."""
    tiny = {"batch": 2, "tokens": 4, "width": 16}
    sizes = tiny if quick else {"batch": 8, "tokens": 32, "width": 64}
    problem = functools.partial(problems.transformer, **sizes)
    names = ("deq_jax", "deq_jax, 2 devices", *PEERS)
    return {"forward + gradient": Case(problem, "gradient", names)}


def batch(quick: bool) -> Cases:
    """A dense cell at growing batch sizes."""
    sizes, width = ((1, 2), 16) if quick else (tuple(2**power for power in range(10)), 256)
    return {
        f"batch {size}": Case(
            functools.partial(problems.dense, batch=size, width=width), "gradient", SERIES, size
        )
        for size in sizes
    }


def width(quick: bool) -> Cases:
    """A cell of low rank at growing widths."""
    sizes, batch = ((32, 64), 2) if quick else ((32, 128, 512, 2048, 8192, 32768), 32)
    return {
        f"width {size}": Case(
            functools.partial(problems.low_rank, batch=batch, width=size), "gradient", SERIES, size
        )
        for size in sizes
    }


def nchw(quick: bool) -> Cases:
    """The cell of `solve` in both layouts."""
    return {"forward": Case(_residual(quick), "forward", ("deq_jax", "deq_jax, NCHW"))}


def shrinking(quick: bool) -> Cases:
    """A tenth of the samples needs ten times the evaluations."""
    batch, width = (20, 16) if quick else (256, 1024)
    gain = np.where(np.arange(batch) < batch // 10, 0.9, 0.9**10)
    problem = functools.partial(problems.gains, gain, width=width)
    own = ("deq_jax, Picard", "deq_jax, Picard, shrinking", "deq_jax", "deq_jax, shrinking")
    return {"forward + gradient": Case(problem, "gradient", own)}


def precision(quick: bool) -> Cases:
    """How low the residual can be brought in half precision."""
    names = ("deq_jax", "deq_jax, cell in bfloat16", "deq_jax, all in bfloat16")
    limits = {"tol": 0.0, "max_iter": 40}
    return {
        "convolutions": Case(_residual(quick, **limits), "forward", names),
        "dense": Case(_dense(quick, 128, 512, **limits), "forward", names),
    }


def eager(quick: bool) -> Cases:
    """The cell of `dense`, without `jax.jit` around the call."""
    problem, names = _dense(quick, 64, 128), ("deq_jax", "deq_jax, eager")
    return {
        "forward": Case(problem, "forward", names),
        "forward + gradient": Case(problem, "gradient", names),
    }


def preparation(quick: bool) -> Cases:
    """Transposed products of the cell of `step`, prepared for the backward loop and not."""
    problem = _residual(quick, 32, 32, 48, 64)
    return {"forward + gradient": Case(problem, "gradient", ("deq_jax",), time_products=True)}


_MAKERS = (solve, step, dense, heterogeneous, transformer, batch, width, nchw, shrinking)
_MAKERS += (precision, eager, preparation)

WORKLOADS: dict[str, Callable[[bool], Cases]] = {make.__name__: make for make in _MAKERS}
"""`quick` -> the cases by name; quick ones are tiny."""

AXES = {"batch": "batch size", "width": "width of the state"}
"""What grows in the workloads that are a series of sizes."""
