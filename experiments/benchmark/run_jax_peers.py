"""The JAX peers: the cell as it is written, on one device.

- jaxopt: Anderson and Picard, jitted, implicit gradients by its default, CG on the normal
  equations. Its stop is on the absolute residual of the whole batch; it is asked for
  `tol ‖f(z*)‖`, with the norm of the whole batch taken from the reference.
- optimistix: Picard, jitted, implicit gradients by lineax's GMRES. Its norms are given the sizes of
  the samples beforehand, from the reference, so that it stops when the residual of every sample is
  within the tolerance, forwards and backwards.

A peer is imported by the class that needs it, so that one can be missing.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.jax_calls import (
    CELLS,
    JaxCalls,
    Layer,
    cross_entropy,
    given,
    injection,
    loop_of,
)
from experiments.benchmark.problems import Arrays, Problem, cell_params
from experiments.benchmark.referee import whole_batch_tolerance

RESTART = 5
"""The fastest of 5, 10, 20 and 30 on `dense` and on `transformer`."""


class PeerCalls(JaxCalls):
    """The calls of a JAX peer.

    Args:
        problem: what is solved.
        case: `mode`, `time_cell`.
        layer: the implementation.
    """

    def __init__(self, problem: Problem, case: dict[str, Any], layer: Layer):
        self.mode, self.cell = case["mode"], CELLS[problem.cell]
        super().__init__(self.mode, layer, given(problem))
        if case["time_cell"]:
            self.time_loop(
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
            cotangent = jax.grad(cross_entropy, 1)(params, z, x["labels"])
            x = {"x": injection(params, x["images"])}
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


class JaxoptCalls(PeerCalls):
    """See `PeerCalls`.

    Args:
        problem: what is solved.
        case: `mode`, `time_cell`, and `every_sample` (see `whole_batch_tolerance`).
        reference: its `size` makes the tolerance absolute.
        options: `solver` (`picard`), `ridge`.
    """

    def __init__(
        self, problem: Problem, case: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            import jaxopt
        self.jaxopt = jaxopt
        self.problem, self.options = problem, options
        self.cell = CELLS[problem.cell]
        self.size = float(np.linalg.norm(reference["size"]))
        self.linear_solve = functools.partial(
            jaxopt.linear_solve.solve_normal_cg, tol=problem.tol, maxiter=problem.max_iter
        )
        arrays = given(problem)

        def solve(tol: float) -> np.ndarray:
            run = jax.jit(functools.partial(self.layer, tol=tol))
            return np.asarray(run(arrays.params, arrays.x)[0])

        every_sample = case["every_sample"]
        self.tol = whole_batch_tolerance(problem, solve) if every_sample else problem.tol
        super().__init__(problem, case, functools.partial(self.layer, tol=self.tol))

    def layer(self, params: Any, x: Any, *, tol: float) -> tuple[jax.Array, jax.Array]:
        """The solution and the evaluations.

        `init_state` evaluates f once more, for the auxiliary output; nothing uses the value, and
        the compiler leaves it out.
        """
        z, state = self._solver(tol).run(jnp.zeros_like(x["x"]), params, x)
        return z, state.iter_num

    def _solver(self, tol: float) -> Any:
        common = {
            "fixed_point_fun": lambda z, params, x: self.cell(params, z, x),
            "tol": tol * self.size,
            "maxiter": self.problem.max_iter,
            "implicit_diff_solve": self.linear_solve,
        }
        if self.options.get("solver") == "picard":
            return self.jaxopt.FixedPointIteration(**common)
        ridge = {"ridge": self.options["ridge"]} if "ridge" in self.options else {}
        return self.jaxopt.AndersonAcceleration(history_size=5, **ridge, **common)

    def backward_products(self) -> int | None:
        """Products of the linear solve, repeated with a counter in the product.

        The counter sees the products with the matrix. Each is followed by one with its transpose,
        and one with the transpose comes before them all, for the right-hand side.
        """
        if self.mode == "forward":
            return None
        return 2 * self.count_products(self.linear_solve) + 1

    def notes(self) -> str:
        """How it was set."""
        ridge = self.options.get("ridge", 1e-5)
        method = (
            "Picard" if self.options.get("solver") == "picard" else f"Anderson, ridge {ridge:g}"
        )
        return f"{method}, relative tolerance on the whole batch {self.tol:.2g}"


class OptimistixCalls(PeerCalls):
    """See `PeerCalls`.

    Args:
        problem: what is solved.
        case: `mode` and `time_cell`.
        reference: its `size` and `cotangent_size` make the norms relative.
        options: not looked at.
    """

    def __init__(
        self, problem: Problem, case: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        import lineax

        del options
        self.problem = problem
        self.norm, backward_norm = (
            _relative_norm(problem.tol * reference[name]) for name in ("size", "cotangent_size")
        )
        self.linear_solver = lineax.GMRES(rtol=0.0, atol=1.0, norm=backward_norm, restart=RESTART)
        super().__init__(problem, case, self.layer)

    def layer(self, params: Any, x: Any) -> tuple[jax.Array, jax.Array]:
        """The solution and the evaluations."""
        import optimistix

        solution = optimistix.fixed_point(
            lambda z, given: self.cell(given[0], z, given[1]),
            optimistix.FixedPointIteration(rtol=0.0, atol=1.0, norm=self.norm),
            jnp.zeros_like(x["x"]),
            (params, x),
            max_steps=self.problem.max_iter,
            adjoint=optimistix.ImplicitAdjoint(linear_solver=self.linear_solver),
            throw=False,
        )
        return solution.value, solution.stats["num_steps"]

    def backward_products(self) -> int | None:
        """Products of the linear solve, repeated with a counter in the product."""
        if self.mode == "forward":
            return None

        def solve(product: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
            import lineax

            operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: y))
            return lineax.linear_solve(operator, y, self.linear_solver, throw=False).value

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
