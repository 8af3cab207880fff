"""jaxopt: Anderson and Picard, jitted, implicit gradients by its default, normal CG.

Its stop is on the absolute residual of the whole batch; it is asked for `tol ‖f(z*)‖`, with the
norm of the whole batch taken from the reference.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    import jaxopt
    from jaxopt import linear_solve

from experiments.benchmark import cells_jax
from experiments.benchmark.calls_jax import PeerCalls, given
from experiments.benchmark.problems import Arrays, Problem
from experiments.benchmark.whole_batch import tolerance


class Calls(PeerCalls):
    """See `PeerCalls`.

    Args:
        problem: what is solved.
        task: `mode`, `time_cell`, and `every_sample` (see `whole_batch.tolerance`).
        reference: its `size` makes the tolerance absolute.
        options: `solver` (`picard`), `ridge`.
    """

    def __init__(
        self, problem: Problem, task: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        self.problem, self.options = problem, options
        self.cell = cells_jax.CELLS[problem.cell]
        self.size = float(np.linalg.norm(reference["size"]))
        arrays = given(problem)
        self.linear_solve = functools.partial(
            linear_solve.solve_normal_cg, tol=problem.tol, maxiter=problem.max_iter
        )

        def solve(tol: float) -> np.ndarray:
            run = jax.jit(functools.partial(self.layer, tol=tol))
            return np.asarray(run(arrays.params, arrays.x)[0])

        self.tol = tolerance(problem, solve, every_sample=task["every_sample"])
        super().__init__(problem, task, functools.partial(self.layer, tol=self.tol))

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
            return jaxopt.FixedPointIteration(**common)
        ridge = {"ridge": self.options["ridge"]} if "ridge" in self.options else {}
        return jaxopt.AndersonAcceleration(history_size=5, **ridge, **common)

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
