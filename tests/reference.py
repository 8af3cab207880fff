"""Independent references: the formulas in NumPy, and dense solves in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def picard(f, z, *, damping=1.0, steps):
    """The points at which damped Picard evaluates f, for one sample."""
    points = [z]
    for _ in range(steps - 1):
        z = damping * f(z) + (1 - damping) * z
        points.append(z)
    return points


def anderson(f, z, *, history, mixing, ridge, steps):
    """The points at which Anderson acceleration evaluates f, for one sample `[D]`.

    From the minimisation itself, in its KKT form and with the whole window computed anew each
    step: no ring, no scaling, no increments.
    """
    points, residuals = [], []
    for _ in range(steps):
        points.append(z)
        residuals.append(f(z) - z)
        window_z = np.array(points[-history:])
        window_g = np.array(residuals[-history:])
        n = len(window_g)
        gram = window_g @ window_g.T
        kkt = np.zeros((n + 1, n + 1))
        kkt[0, 1:] = kkt[1:, 0] = 1
        kkt[1:, 1:] = gram + ridge * np.diag(np.diag(gram))
        alpha = np.linalg.solve(kkt, np.eye(n + 1)[0])[1:]
        plain = points[-1] + mixing * residuals[-1]
        z = alpha @ (window_z + mixing * window_g)
        if np.linalg.norm(z - points[-1]) < 0.01 * np.linalg.norm(residuals[-1]):
            z = plain
    return points


def relative_residual(f, z):
    """`‖f(z) - z‖ / ‖f(z)‖` of one sample, in float64."""
    fz = np.asarray(f(z), np.float64)
    return np.linalg.norm(fz - np.asarray(z, np.float64)) / np.linalg.norm(fz)


def newton_equilibrium(f, z, steps=50):
    """The solution of `z = f(z)` for any pytree, by dense Newton steps."""
    flat, unravel = ravel_pytree(z)

    def g(flat):
        return ravel_pytree(f(unravel(flat)))[0] - flat

    jacobian = jax.jit(jax.jacfwd(g))
    g = jax.jit(g)
    for _ in range(steps):
        value = np.asarray(g(flat))
        if np.linalg.norm(value) < 1e-14 * (1 + np.linalg.norm(flat)):
            break
        flat = flat - np.linalg.solve(np.asarray(jacobian(flat)), value)
    return unravel(jnp.asarray(flat))


def implicit_gradient(f, inputs, z, cotangent):
    """`(∂z*/∂inputs)ᵀ cotangent` by a dense solve of the implicit function theorem.

    `f(inputs, z)`; `inputs`, `z` and `cotangent` are pytrees of float64 arrays; `z` solves the
    equation.
    """
    flat_z, unravel_z = ravel_pytree(z)
    flat_inputs, unravel_inputs = ravel_pytree(inputs)

    def flat_f(flat_inputs, flat_z):
        return ravel_pytree(f(unravel_inputs(flat_inputs), unravel_z(flat_z)))[0]

    by_inputs, by_z = jax.jit(jax.jacrev(flat_f, argnums=(0, 1)))(flat_inputs, flat_z)
    y = np.asarray(ravel_pytree(cotangent)[0])
    u = np.linalg.solve(np.eye(flat_z.size) - np.asarray(by_z).T, y)
    return unravel_inputs(jnp.asarray(np.asarray(by_inputs).T @ u))


def relative_error(a, b):
    """`‖a - b‖ / ‖b‖` over two pytrees."""
    a, b = (np.asarray(ravel_pytree(tree)[0], np.float64) for tree in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
