"""The float64 reference of a problem, in a process of its own: z* and the gradient.

The solution is that of a long solve; the referee measures its residual without JAX. The gradient
uses none of deq_jax: the cell's derivatives are JAX's, the transposed system is solved by SciPy's
GMRES.

    python -m experiments.benchmark.reference PROBLEM.npz REFERENCE.npz
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

from deq_jax import Anderson, solve_fixed_point
from experiments.benchmark import cells_jax
from experiments.benchmark.problems import Arrays, Problem, cell_params
from experiments.benchmark.referee import norms


def solve_transposed(pullback: Any, y: jax.Array) -> jax.Array:
    """`u = Jᵀ u + y` by GMRES, all samples as one system."""
    product = jax.jit(lambda pullback, u: u - pullback(u)[0])

    def matvec(u: np.ndarray) -> np.ndarray:
        return np.array(product(pullback, u.reshape(y.shape))).ravel()  # SciPy writes into it

    operator = LinearOperator((y.size, y.size), matvec, dtype=np.float64)
    u, _ = gmres(operator, np.asarray(y).ravel(), rtol=1e-10, restart=30, maxiter=40)
    return jnp.asarray(u.reshape(y.shape))


def equilibrium(problem: Problem, params: Any, x: Any) -> jax.Array:
    """z*, as exact as it can be had."""
    solver = Anderson(tol=1e-13, max_iter=2000)
    cell = cells_jax.CELLS[problem.cell]
    return solve_fixed_point(cell, params, x, jnp.zeros_like(x["x"]), solver=solver).value


def of_equation(problem: Problem, params: Any, x: Any) -> Arrays:
    """Reference of a plain equation: gradients of `vdot(cotangent, z*)` in params and x."""
    cell = cells_jax.CELLS[problem.cell]
    z, y = equilibrium(problem, params, x), jnp.asarray(problem.cotangent, jnp.float64)
    _, pullback = jax.vjp(lambda z: cell(params, z, x), z)
    u = solve_transposed(pullback, y)
    gradients = jax.vjp(lambda params, x: cell(params, z, x), params, x)[1](u)
    named = {
        f"{group}/{name}": g
        for group, tree in zip(("params", "x"), gradients, strict=True)
        for name, g in tree.items()
    }
    return _collect(problem, z, y, {"x": x}, params, named)


def of_network(problem: Problem, params: Any, x: Any) -> Arrays:
    """Reference of the network: gradients of the loss in all parameters."""
    cell = cells_jax.CELLS[problem.cell]
    inside = cell_params(params)
    injected, pull_injection = jax.vjp(lambda p: cells_jax.injection(p, x["images"]), params)
    z = equilibrium(problem, inside, {"x": injected})
    around, y = jax.grad(cells_jax.cross_entropy, (0, 1))(params, z, x["labels"])
    _, pullback = jax.vjp(lambda z: cell(inside, z, {"x": injected}), z)
    u = solve_transposed(pullback, y)
    _, pullback = jax.vjp(lambda p, injected: cell(p, z, {"x": injected}), inside, injected)
    of_cell, of_injection = pullback(u)
    (before,) = pull_injection(of_injection)
    total = {name: around[name] + before[name] for name in params}
    for name, gradient in of_cell.items():
        total[f"cell.{name}"] += gradient
    named = {f"params/{name}": gradient for name, gradient in total.items()}
    return _collect(problem, z, y, {"x": {"x": injected}}, inside, named)


def _collect(problem: Problem, z: Any, y: Any, x: Any, params: Any, gradients: Any) -> Arrays:
    fz = cells_jax.CELLS[problem.cell](params, z, x["x"])
    arrays = {
        "z": z,
        "size": norms(np.asarray(fz)),
        "cotangent_size": norms(np.asarray(y)),
        **{f"gradient/{name}": gradient for name, gradient in gradients.items()},
    }
    return {name: np.asarray(array) for name, array in arrays.items()}


def main() -> None:
    """Reads the problem and writes its reference."""
    problem = Problem.load(sys.argv[1])
    with jax.enable_x64(True):
        params, x = (
            {
                name: jnp.asarray(array, jnp.float64 if array.dtype.kind == "f" else None)
                for name, array in arrays.items()
            }
            for arrays in (problem.params, problem.x)
        )
        make = of_network if problem.network else of_equation
        np.savez(sys.argv[2], **make(problem, params, x))


if __name__ == "__main__":
    main()
