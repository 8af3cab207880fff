"""PyTorch, eager, two threads, NCHW: the tutorial's layer and torchdeq."""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from experiments.benchmark import cells_torch
from experiments.benchmark.anderson_torch import TutorialLayer
from experiments.benchmark.problems import (
    Arrays,
    Problem,
    cell_params,
    to_channels_first,
    to_channels_last,
)
from experiments.benchmark.whole_batch import tolerance

LOOP = 10
"""Evaluations of the cell in a call that measures its cost."""


class TorchDEQLayer:
    """torchdeq with Anderson in both passes and implicit differentiation; its ridge is 1e-4.

    The window is not among its configuration's keys; it is set through solvers registered under
    names of our own, which count as well.

    Args:
        tol: bound on its relative residual, of every sample, forwards and backwards.
        max_iter: most evaluations in a solve, and most products in a backward pass.
    """

    def __init__(self, tol: float, max_iter: int):
        from torchdeq import get_deq
        from torchdeq.solver import get_solver, register_solver

        self.evaluations = self.products = 0
        anderson = get_solver("anderson")

        def forward(f: Any, x0: torch.Tensor, **settings: Any) -> Any:
            self.evaluations, counted = 0, self._counter(f, "evaluations")
            return anderson(counted, x0, m=5, **settings)

        def backward(f: Any, x0: torch.Tensor, **settings: Any) -> Any:
            self.products, counted = 0, self._counter(f, "products")
            return anderson(counted, x0, m=5, **settings)

        register_solver("forward", forward)
        register_solver("backward", backward)
        limits = {"max_iter": max_iter, "tol": tol, "stop_mode": "rel"}
        settings = {f"{way}_{key}": value for way in "fb" for key, value in limits.items()}
        self.deq = get_deq(f_solver="forward", b_solver="backward", ift=True, **settings)

    def _counter(self, f: Callable[..., Any], name: str) -> Callable[..., Any]:
        def counted(z: torch.Tensor) -> torch.Tensor:
            setattr(self, name, getattr(self, name) + 1)
            return f(z)

        return counted

    def solve(self, f: Callable[..., Any], z: torch.Tensor) -> torch.Tensor:
        """The solution, without a gradient."""
        with torch.no_grad():
            return self.deq.eval()(f, z)[0][0]

    def attach(self, f: Callable[..., Any], z: torch.Tensor) -> torch.Tensor:
        """The solution with its gradient."""
        return self.deq.train()(f, z)[0][-1]


class Calls:
    """The calls of a PyTorch implementation of one problem; see `JaxCalls`.

    Convolutions are tried in both memory formats, and the faster one is kept.

    Args:
        problem: what is solved.
        task: `mode`, `time_cell`, `every_sample` (see `whole_batch.tolerance`).
        reference: not looked at.
        options: `layer` (`tutorial` or `torchdeq`), `relative`.
    """

    def __init__(
        self, problem: Problem, task: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        del reference
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        self.problem, self.mode, self.options = problem, task["mode"], options
        self.cell = cells_torch.CELLS[problem.cell]
        self.format = torch.contiguous_format
        self.layer = self._layer(problem.tol)
        self._place()
        if options["layer"] == "tutorial" and task["every_sample"]:
            self.layer = self._layer(self._tolerance())
        if problem.cotangent.ndim == 4:
            self._choose_format()
        self.timed: dict[str, Callable[[], None]] = {"call": self._call}
        self.divisors = {"call": 1, "cell": LOOP}
        if task["time_cell"]:
            self.timed["cell"] = self._cell_loop

    def _layer(self, tol: float) -> Any:
        if self.options["layer"] == "torchdeq":
            return TorchDEQLayer(tol, self.problem.max_iter)
        relative = self.options.get("relative", False)
        return TutorialLayer(tol, self.problem.max_iter, relative)

    def _tolerance(self) -> float:
        def solve(tol: float) -> np.ndarray:
            self.layer = self._layer(tol)
            self._forward()
            return self.result()["z"]

        return tolerance(self.problem, solve, every_sample=True)

    def _place(self) -> None:
        """Tensors in the memory format, to be differentiated in where that is asked for."""
        differentiable = self.mode != "forward"

        def tensors(arrays: Arrays, differentiable: bool) -> dict[str, torch.Tensor]:
            placed = {}
            for name, array in arrays.items():
                tensor = torch.from_numpy(to_channels_first(name, array).copy())
                if tensor.ndim == 4:
                    tensor = tensor.contiguous(memory_format=self.format)
                wanted = differentiable and tensor.is_floating_point()
                placed[name] = tensor.requires_grad_(wanted)
            return placed

        self.params = tensors(self.problem.params, differentiable)
        self.x = tensors(self.problem.x, differentiable and self.mode != "step")
        self.cotangent = tensors({"y": self.problem.cotangent}, False)["y"]
        self.start = torch.zeros_like(self.cotangent)

    def _choose_format(self) -> None:
        """Takes the memory format whose fastest call of three is faster; they take turns."""
        seconds: dict[torch.memory_format, list[float]] = {}
        for _ in range(3):
            for self.format in (torch.contiguous_format, torch.channels_last):
                self._place()
                self._call()
                started = time.perf_counter()
                self._call()
                seconds.setdefault(self.format, []).append(time.perf_counter() - started)
        self.format = min(seconds, key=lambda memory_format: min(seconds[memory_format]))
        self._place()

    def _call(self) -> None:
        {"forward": self._forward, "gradient": self._gradient, "step": self._step}[self.mode]()

    def _forward(self) -> None:
        with torch.no_grad():
            x = cells_torch.once(self.problem.cell, self.params, self.x)
            self.z = self.layer.solve(lambda z: self.cell(self.params, z, x), self.start)
        self.gradients: dict[str, torch.Tensor] = {}

    def _gradient(self) -> None:
        x = cells_torch.once(self.problem.cell, self.params, self.x)
        self.z = self.layer.attach(lambda z: self.cell(self.params, z, x), self.start)
        leaves = {f"params/{name}": tensor for name, tensor in self.params.items()}
        leaves |= {f"x/{name}": tensor for name, tensor in self.x.items()}
        found = torch.autograd.grad(self.z, list(leaves.values()), self.cotangent)
        self.gradients = dict(zip(leaves, found, strict=True))

    def _step(self) -> None:
        """A step of Adam from the same parameters each time; they are put back afterwards."""
        before = {name: tensor.detach().clone() for name, tensor in self.params.items()}
        optimiser = torch.optim.Adam(self.params.values(), lr=1e-3)
        x = {"x": cells_torch.injection(self.params, self.x["images"])}
        inside = cell_params(self.params)
        self.z = self.layer.attach(lambda z: self.cell(inside, z, x), self.start)
        cells_torch.cross_entropy(self.params, self.z, self.x["labels"]).backward()
        optimiser.step()
        self.gradients = {f"params/{name}": t.grad for name, t in self.params.items()}
        with torch.no_grad():
            for name, tensor in self.params.items():
                tensor.copy_(before[name])
                tensor.grad = None

    def _cell_loop(self) -> None:
        with torch.no_grad():
            x = cells_torch.once(self.problem.cell, self.params, self.x)
            z = self.start
            for _ in range(LOOP):
                z = self.cell(self.params, z, x)

    def result(self) -> Arrays:
        """`z` and gradients of the last call, channels last."""
        arrays = {"z": self.z, **{f"gradient/{name}": g for name, g in self.gradients.items()}}
        return {
            name: to_channels_last(name, tensor.detach().numpy()) for name, tensor in arrays.items()
        }

    def evaluations(self) -> int:
        """Evaluations of the last forward solve."""
        return self.layer.evaluations

    def backward_products(self) -> int | None:
        """Transposed products of the last backward solve."""
        return None if self.mode == "forward" else self.layer.products

    def notes(self) -> str:
        """How it was set."""
        notes = f"Anderson(5), tolerance {self.problem.tol:g} of every sample"
        if self.options["layer"] == "tutorial":
            notes = f"Anderson(5), relative tolerance on the whole batch {self.layer.tol:.2g}"
        if self.problem.cotangent.ndim == 4:
            last = self.format == torch.channels_last
            notes += ", channels last" if last else ", channels first"
        return notes
