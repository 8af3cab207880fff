"""PyTorch, eager, two threads, NCHW: the tutorial's layer, written from its formulas, and torchdeq.

Source: "Deep Implicit Layers", ch. 4.
"""

import dataclasses
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmark.problems import (
    Arrays,
    Problem,
    cell_params,
    to_channels_first,
    to_channels_last,
)
from experiments.benchmark.referee import whole_batch_tolerance

Tensors = dict[str, torch.Tensor]
Map = Callable[[torch.Tensor], torch.Tensor]

LOOP = 10
"""Evaluations of the cell in a call that measures its cost."""

GROUPS, HEADS, EPSILON, SLOPE = 8, 4, 1e-5, 0.1


def residual(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))`."""
    p = params

    def norm(y: torch.Tensor, number: int) -> torch.Tensor:
        return F.group_norm(y, GROUPS, p[f"scale{number}"], p[f"bias{number}"], EPSILON)

    y = norm(F.relu(F.conv2d(z, p["kernel1"], padding=1)), 1)
    y = norm(x["x"] + F.conv2d(y, p["kernel2"], padding=1), 2)
    return norm(F.relu(z + y), 3)


def once(cell: str, params: Tensors, x: Tensors) -> Tensors:
    """x, with what depends on it alone computed: PyTorch users take it out of the loop by hand."""
    return {"x": F.linear(x["x"], params["u"], params["b"])} if cell == "dense" else x


def dense(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`tanh(W z + U x + b)`, x holding `U x + b`."""
    return torch.tanh(F.linear(z, params["w"]) + x["x"])


def gains(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`x + gain * B φ(A z)`, `φ(v) = tanh(0.1 v) / 0.1`."""
    hidden = torch.tanh(SLOPE * (z @ params["inner"])) / SLOPE
    return x["x"] + x["gain"] * (hidden @ params["outer"])


def transformer(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`h = norm(z + x + attention(z))`, then `norm(h + feedforward(h))`."""
    p, width = params, z.shape[-1:]

    def heads(name: str) -> torch.Tensor:
        return (z @ p[name]).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"))
    attention = mixed.transpose(1, 2).flatten(-2) @ p["out"]
    h = F.layer_norm(z + x["x"] + attention, width, p["scale1"], p["bias1"], EPSILON)
    v = F.gelu(h @ p["up"] + p["up_bias"], approximate="tanh") @ p["down"] + p["down_bias"]
    return F.layer_norm(h + v, width, p["scale2"], p["bias2"], EPSILON)


def low_rank(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`tanh(d * z + P Q z + x)`."""
    return torch.tanh(params["diagonal"] * z + (z @ params["down"]) @ params["up"] + x["x"])


CELLS = {f.__name__: f for f in (residual, dense, gains, transformer, low_rank)}


def batch_norm(y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """BatchNorm in training mode."""
    return F.batch_norm(y, None, None, scale, bias, training=True, eps=EPSILON)


def injection(params: Tensors, images: torch.Tensor) -> torch.Tensor:
    """What the network gives to its equation."""
    y = F.conv2d(images, params["stem.kernel"], params["stem.bias"], padding=1)
    return batch_norm(y, params["norm_in.scale"], params["norm_in.bias"])


def cross_entropy(params: Tensors, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The network's loss, from the solution of its equation."""
    y = batch_norm(z, params["norm_out.scale"], params["norm_out.bias"])
    # The number of windows a side, from the size of the linear layer.
    side = int((params["head.weight"].shape[0] // y.shape[1]) ** 0.5)
    pooled = F.avg_pool2d(y, y.shape[2] // side)
    features = pooled.permute(0, 2, 3, 1).flatten(1)  # the linear layer's weights are for NHWC
    logits = features @ params["head.weight"] + params["head.bias"]
    return F.cross_entropy(logits, labels.long())


@dataclasses.dataclass
class TutorialLayer:
    """The tutorial's layer and its solver.

    Anderson on a window of m points per sample, with the stop on the whole batch. The backward pass
    solves `u = Jᵀu + y` by the same solver, in a hook on the solution.

    Attributes:
        tol: bound on `‖f(z) - z‖ / ‖f(z)‖`, norms of the whole batch.
        max_iter: most evaluations in a solve, and most products in a backward pass.
        relative: the ridge is in proportion to the mean of the Gram matrix's diagonal.
        ridge: added to the diagonal of the Gram matrix.
        history: m.
        evaluations: of the last forward solve.
        products: of the last backward solve.
    """

    tol: float
    max_iter: int
    relative: bool = False
    ridge: float = 1e-4
    history: int = 5
    evaluations: int = 0
    products: int = 0

    def anderson(self, f: Map, z: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The last point evaluated, and the evaluations.

        In every step `[[0, 1ᵀ], [1, G Gᵀ + λ I]] [ν; α] = [1; 0]`, then `z = Σ α_i f(z_i)`.
        """
        batch, shape = z.shape[0], z.shape
        points = z.new_zeros(batch, self.history, z[0].numel())
        values = torch.zeros_like(points)
        points[:, 0], values[:, 0] = z.flatten(1), f(z).flatten(1)
        points[:, 1] = values[:, 0]
        values[:, 1] = f(values[:, 0].view(shape)).flatten(1)
        system = z.new_zeros(batch, self.history + 1, self.history + 1)
        system[:, 0, 1:] = system[:, 1:, 0] = 1
        right = z.new_zeros(batch, self.history + 1, 1)
        right[:, 0] = 1
        for count in range(2, self.max_iter):
            n, slot = min(count, self.history), count % self.history
            g = values[:, :n] - points[:, :n]
            gram = torch.bmm(g, g.transpose(1, 2))
            system[:, 1 : n + 1, 1 : n + 1] = gram + self._ridge(gram)
            solution = torch.linalg.solve(system[:, : n + 1, : n + 1], right[:, : n + 1])
            points[:, slot] = torch.bmm(solution[:, 1:].transpose(1, 2), values[:, :n])[:, 0]
            values[:, slot] = f(points[:, slot].view(shape)).flatten(1)
            size = values[:, slot].norm()
            if (values[:, slot] - points[:, slot]).norm().item() < self.tol * size.item():
                break
        return points[:, slot].view(shape), count + 1

    def _ridge(self, gram: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        if not self.relative:
            return self.ridge * identity
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        return self.ridge * scale[:, None, None] * identity

    def solve(self, f: Map, z: torch.Tensor) -> torch.Tensor:
        """The solution, without a gradient."""
        with torch.no_grad():
            value, self.evaluations = self.anderson(f, z)
        return value

    def attach(self, f: Map, z: torch.Tensor) -> torch.Tensor:
        """The solution with its gradient: f on the tape once more, and a hook."""
        value = f(self.solve(f, z))
        at = value.detach().requires_grad_()
        again = f(at)

        def hook(y: torch.Tensor) -> torch.Tensor:
            def transposed(u: torch.Tensor) -> torch.Tensor:
                return torch.autograd.grad(again, at, u, retain_graph=True)[0] + y

            u, self.products = self.anderson(transposed, y)
            return u

        value.register_hook(hook)
        return value


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
        case: `mode`, `time_cell`, `every_sample` (see `whole_batch_tolerance`).
        reference: not looked at.
        options: `layer` (`tutorial` or `torchdeq`), `relative`.
    """

    def __init__(
        self, problem: Problem, case: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        del reference
        torch.set_num_threads(min(2, os.cpu_count() or 1))
        self.problem, self.mode, self.options = problem, case["mode"], options
        self.cell = CELLS[problem.cell]
        self.format = torch.contiguous_format
        self.layer = self._layer(problem.tol)
        self._place()
        if options["layer"] == "tutorial" and case["every_sample"]:
            self.layer = self._layer(self._tolerance())
        if problem.cotangent.ndim == 4:
            self._choose_format()
        self.timed: dict[str, Callable[[], None]] = {"call": self._call}
        self.divisors = {"call": 1, "cell": LOOP}
        if case["time_cell"]:
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

        return whole_batch_tolerance(self.problem, solve)

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
            x = once(self.problem.cell, self.params, self.x)
            self.z = self.layer.solve(lambda z: self.cell(self.params, z, x), self.start)
        self.gradients: dict[str, torch.Tensor] = {}

    def _gradient(self) -> None:
        x = once(self.problem.cell, self.params, self.x)
        self.z = self.layer.attach(lambda z: self.cell(self.params, z, x), self.start)
        leaves = {f"params/{name}": tensor for name, tensor in self.params.items()}
        leaves |= {f"x/{name}": tensor for name, tensor in self.x.items()}
        found = torch.autograd.grad(self.z, list(leaves.values()), self.cotangent)
        self.gradients = dict(zip(leaves, found, strict=True))

    def _step(self) -> None:
        """A step of Adam from the same parameters each time; they are put back afterwards."""
        before = {name: tensor.detach().clone() for name, tensor in self.params.items()}
        optimiser = torch.optim.Adam(self.params.values(), lr=1e-3)
        x = {"x": injection(self.params, self.x["images"])}
        inside = cell_params(self.params)
        self.z = self.layer.attach(lambda z: self.cell(inside, z, x), self.start)
        cross_entropy(self.params, self.z, self.x["labels"]).backward()
        optimiser.step()
        self.gradients = {f"params/{name}": t.grad for name, t in self.params.items()}
        with torch.no_grad():
            for name, tensor in self.params.items():
                tensor.copy_(before[name])
                tensor.grad = None

    def _cell_loop(self) -> None:
        with torch.no_grad():
            x = once(self.problem.cell, self.params, self.x)
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
