"""What deq_jax and the JAX peers have in common: a layer becomes the calls that are timed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmark import cells_jax
from experiments.benchmark.problems import Arrays, Problem, cell_params

Layer = Callable[..., tuple[jax.Array, Any]]
"""`(params, x) -> (z*, report)`, differentiable; the report holds the evaluations."""

LOOP = 10
"""Evaluations of the cell in a call that measures its cost."""


class Given(NamedTuple):
    """The arrays of a problem; arguments of whatever is compiled, never constants of it."""

    params: dict[str, jax.Array]
    x: dict[str, jax.Array]
    cotangent: jax.Array


def given(problem: Problem) -> Given:
    """The arrays of a problem, on the default device."""
    return jax.tree.map(jnp.asarray, Given(problem.params, problem.x, problem.cotangent))


def differentiate(layer: Layer, given: Given, network: bool, *more: Any) -> Any:
    """`z*`, gradients and the report; to be traced.

    Args:
        layer: `(params, x, *more) -> (z*, report)`.
        given: the arrays.
        network: differentiate the loss of the network around the layer, in its parameters; else
            the inner product with the cotangent, in params and x.
        *more: further arguments of the layer to differentiate in.
    """
    params, x, cotangent = given
    if not network:
        z, pullback, report = jax.vjp(layer, params, x, *more, has_aux=True)
        return z, pullback(cotangent), report

    def loss(params: Any, *more: Any) -> Any:
        injected = cells_jax.injection(params, x["images"])
        z, report = layer(cell_params(params), {"x": injected}, *more)
        return cells_jax.cross_entropy(params, z, x["labels"]), (z, report)

    gradient = jax.grad(loss, tuple(range(1 + len(more))), has_aux=True)
    (of_params, *of_more), (z, report) = gradient(params, *more)
    return z, (of_params, {}, *of_more), report


class JaxCalls:
    """The calls of one implementation of one problem.

    Attributes:
        timed: functions to be timed; they wait for their results.
        divisors: how much of what is asked for is in a call, by the same names.

    Args:
        mode: `forward`, `gradient`, or `step` (a training step of the network).
        layer: the implementation.
        given: the arrays.
    """

    def __init__(self, mode: str, layer: Layer, given: Given):
        self.given = given
        self.divisors = {"call": 1}
        self.timed: dict[str, Callable[[], None]] = {"call": self._call}
        self._last: Any = None
        optimiser = optax.adam(1e-3)
        self._state = optimiser.init(given.params) if mode == "step" else None

        def call(given: Given, state: Any) -> Any:
            if mode == "forward":
                z, report = layer(given.params, given.x)
                return z, ({}, {}), report
            z, gradients, report = differentiate(layer, given, mode == "step")
            if mode == "gradient":
                return z, gradients, report
            updates, state = optimiser.update(gradients[0], state, given.params)
            return z, gradients, report, optax.apply_updates(given.params, updates), state

        self._compiled = jax.jit(call)

    def _call(self) -> None:
        self._last = jax.block_until_ready(self._compiled(self.given, self._state))

    def time_cell(self, name: str, loop: Callable[[Any, Any], Any]) -> None:
        """Adds a timed function: `loop(params, x)`, which evaluates the cell `LOOP` times."""
        compiled = jax.jit(loop)
        self.timed[name] = lambda: jax.block_until_ready(compiled(self.given.params, self.given.x))
        self.divisors[name] = LOOP

    def result(self) -> Arrays:
        """`z` and gradients of the last call."""
        z, gradients, *_ = self._last
        named = {
            f"gradient/{group}/{name}": np.asarray(g, np.float32)
            for group, tree in zip(("params", "x"), gradients, strict=True)
            for name, g in tree.items()
        }
        return {"z": np.asarray(z, np.float32), **named}

    def evaluations(self) -> int:
        """Evaluations of the last call."""
        return int(self._last[2])


class PeerCalls(JaxCalls):
    """The calls of a JAX peer: the cell as it is written, on one device.

    Args:
        problem: what is solved.
        task: `mode`, `time_cell`.
        layer: the implementation.
    """

    def __init__(self, problem: Problem, task: dict[str, Any], layer: Layer):
        self.mode, self.cell = task["mode"], cells_jax.CELLS[problem.cell]
        super().__init__(self.mode, layer, given(problem))
        if task["time_cell"]:
            self.time_cell(
                "cell",
                lambda params, x: loop_of(
                    lambda z: self.cell(params, z, x), jnp.zeros_like(x["x"])
                ),
            )

    def count_products(self, solve: Callable[[Any, jax.Array], jax.Array]) -> int:
        """Calls of its matrix in a linear solve like that of the backward pass.

        Args:
            solve: solves `A u = y`, given `u -> A u` and y; A is `(J - I)ᵀ` at the last solution.
        """
        z, (params, x, cotangent) = self._last[0], self.given
        if self.mode == "step":
            cotangent = jax.grad(cells_jax.cross_entropy, 1)(params, z, x["labels"])
            x = {"x": cells_jax.injection(params, x["images"])}
            params = cell_params(params)
        _, pullback = jax.vjp(lambda z: self.cell(params, z, x) - z, z)
        calls = 0

        def count(_: Any) -> None:
            nonlocal calls
            calls += 1

        def product(u: jax.Array) -> jax.Array:
            jax.debug.callback(count, u.ravel()[0])
            return pullback(u)[0]

        jax.block_until_ready(solve(product, -cotangent))
        jax.effects_barrier()
        return calls


def loop_of(f: Callable[[jax.Array], jax.Array], z: jax.Array) -> jax.Array:
    """`f` applied `LOOP` times, in a loop."""
    return jax.lax.fori_loop(0, LOOP, lambda _, z: f(z), z)
