"""optimistix: Picard, jitted, implicit gradients by lineax's GMRES.

Its norms are given the sizes of the samples beforehand (from the reference), so that it stops when
the residual of every sample is within the tolerance, forwards and backwards.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import optimistix

from experiments.benchmark.calls_jax import PeerCalls
from experiments.benchmark.problems import Arrays, Problem

RESTART = 5
"""The fastest of 5, 10, 20 and 30 on `dense` and on `transformer`."""


class Calls(PeerCalls):
    """See `PeerCalls`.

    Args:
        problem: what is solved.
        task: `mode` and `time_cell`.
        reference: its `size` and `cotangent_size` make the norms relative.
        options: not looked at.
    """

    def __init__(
        self, problem: Problem, task: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        del options
        self.problem = problem
        self.norms = [
            _relative_norm(problem.tol * reference[name]) for name in ("size", "cotangent_size")
        ]
        super().__init__(problem, task, self.layer)

    def layer(self, params: Any, x: Any) -> tuple[jax.Array, jax.Array]:
        """The solution and the evaluations."""
        solution = optimistix.fixed_point(
            lambda z, given: self.cell(given[0], z, given[1]),
            optimistix.FixedPointIteration(rtol=0.0, atol=1.0, norm=self.norms[0]),
            jnp.zeros_like(x["x"]),
            (params, x),
            max_steps=self.problem.max_iter,
            adjoint=optimistix.ImplicitAdjoint(linear_solver=self._linear_solver()),
            throw=False,
        )
        return solution.value, solution.stats["num_steps"]

    def _linear_solver(self) -> Any:
        return lineax.GMRES(rtol=0.0, atol=1.0, norm=self.norms[1], restart=RESTART)

    def backward_products(self) -> int | None:
        """Products of the linear solve, repeated with a counter in the product."""
        if self.mode == "forward":
            return None

        def solve(product: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
            operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: y))
            return lineax.linear_solve(operator, y, self._linear_solver(), throw=False).value

        return self.count_products(solve)

    def notes(self) -> str:
        """How it was set."""
        return f"Picard, adjoint GMRES({RESTART})"


def _relative_norm(bounds: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """The largest norm of a sample, each in units of its bound."""

    def norm(y: jax.Array) -> jax.Array:
        squares = (y * y).reshape(len(bounds), -1).sum(1)
        return jnp.max(jnp.sqrt(squares) / jnp.asarray(bounds, y.dtype))

    return norm
