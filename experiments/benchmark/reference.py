"""The float64 reference of all experiments: an equilibrium and its gradient.

The equilibrium is that of a long solve, and its residual is checked. The gradient uses none of
deq_jax: the products with the Jacobian are JAX's, and SciPy's GMRES solves the transposed system

    (I - ∂f/∂z)ᵀ u = cotangent,    gradient = (∂f/∂inputs)ᵀ u,

for all samples at once.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy.sparse.linalg import LinearOperator, gmres

from deq_jax import Anderson, solve_fixed_point
from experiments.benchmark.jax_calls import CELLS, cross_entropy, injection
from experiments.benchmark.problems import Arrays, Problem, cell_params
from experiments.benchmark.referee import norms

PyTree = Any
Map = Callable[[PyTree, jax.Array], jax.Array]
"""`f(inputs, z)`, with float64 inputs and a state `[B, ...]`."""


def equilibrium(f: Map, inputs: PyTree, z0: jax.Array) -> jax.Array:
    """The solution of `z = f(inputs, z)`, to a relative residual of 1e-12 in every sample.

    Raises:
        RuntimeError: the residual of some sample is larger.
    """
    solver = Anderson(tol=1e-13, max_iter=2000)
    z = solve_fixed_point(lambda inputs, z, _: f(inputs, z), inputs, z0, z0, solver=solver).value
    fz = np.asarray(f(inputs, z), np.float64)
    residual = norms(fz - np.asarray(z)) / norms(fz)
    if not residual.max() <= 1e-12:
        raise RuntimeError(f"the reference was not found: its residual is {residual.max():.1e}")
    return z


def implicit_gradient(f: Map, inputs: PyTree, z: jax.Array, cotangent: Any) -> PyTree:
    """The gradient of `vdot(cotangent, z)` with respect to `inputs`, to 1e-12.

    Args:
        f: see `Map`.
        inputs: all that is differentiated in.
        z: the equilibrium.
        cotangent: shaped like z.

    Raises:
        RuntimeError: GMRES did not converge.
    """
    _, pullback = jax.vjp(f, inputs, z)
    product = jax.jit(lambda pullback, u: u - pullback(u)[1])

    def matvec(u: np.ndarray) -> np.ndarray:
        return np.array(product(pullback, u.reshape(z.shape))).ravel()  # SciPy writes into it

    operator = LinearOperator((z.size, z.size), matvec, dtype=np.float64)
    right = np.asarray(cotangent, np.float64).ravel()
    u, failed = gmres(operator, right, rtol=1e-12, restart=50, maxiter=40)
    if failed:
        raise RuntimeError("the transposed system of the reference was not solved")
    return pullback(jnp.asarray(u.reshape(z.shape)))[0]


def reference_of(problem: Problem) -> Arrays:
    """The reference of a problem of the benchmark, in float64.

    Returns:
        `z`, the sizes of `f(z)` and of the cotangent of each sample, and `gradient/...`: in params
        and x, or for a network in all of its parameters.
    """
    cell = CELLS[problem.cell]
    with jax.enable_x64(True):
        params, x = ({k: _double(a) for k, a in d.items()} for d in (problem.params, problem.x))

        def equation(inputs: PyTree, z: jax.Array) -> jax.Array:
            params, x = inputs
            if problem.network:
                return cell(cell_params(params), z, {"x": injection(params, x["images"])})
            return cell(params, z, x)

        def network(params: PyTree, z: jax.Array) -> jax.Array:
            return equation((params, x), z)

        z0 = jnp.zeros(problem.cotangent.shape, jnp.float64)
        z = equilibrium(equation, (params, x), z0)
        if problem.network:
            around, y = jax.grad(cross_entropy, (0, 1))(params, z, x["labels"])
            through = implicit_gradient(network, params, z, y)
            groups = {"params": {name: around[name] + through[name] for name in params}}
        else:
            y = _double(problem.cotangent)
            of_params, of_x = implicit_gradient(equation, (params, x), z, y)
            groups = {"params": of_params, "x": of_x}
        arrays = {"z": z, "size": norms(equation((params, x), z)), "cotangent_size": norms(y)}
        for group, gradients in groups.items():
            arrays |= {f"gradient/{group}/{name}": g for name, g in gradients.items()}
        return {name: np.asarray(array) for name, array in arrays.items()}


def _double(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.float64 if array.dtype.kind == "f" else None)
