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


def broyden(f, z, *, steps, memory=None, step_size=1.0, line_search=False):
    """The points at which Broyden's good method evaluates f, for one sample `[D]`.

    From the definition: a dense estimate J of the Jacobian of `g = f(z) - z` that satisfies
    `J Δz = Δg` and changes least, and a dense solve with it at each step; no inverse, no factors.
    With `memory` updates made, the estimate goes back to -I before the next one.
    """
    identity = np.eye(z.size)
    estimate, updates, points = -identity, 0, [z]
    g = f(z) - z
    while len(points) < steps:
        direction, length = -np.linalg.solve(estimate, g), step_size
        while True:
            trial = z + length * direction
            points.append(trial)
            g_trial = f(trial) - trial
            decreased = np.linalg.norm(g_trial) <= (1 - 1e-4 * length) * np.linalg.norm(g)
            if not line_search or decreased or length <= step_size / 32:
                break
            length /= 2
        change, g_change = trial - z, g_trial - g
        if updates == memory:
            estimate, updates = -identity, 0
        error = g_change - estimate @ change
        estimate = estimate + np.outer(error, change) / (change @ change)
        z, g, updates = trial, g_trial, updates + 1
    return points[:steps]


def newton(f, derivative, z, *, residual, max_iter=100):
    """Residuals at which damped Newton evaluates f, for one number, and the linear solves.

    The step is halved until `|f(z) - z|` decreases; where a sixteenth of it does not do, the plain
    step `z <- f(z)` is taken. The search ends when the relative residual is at most `residual`.
    Returns a list of relative residuals and the number of Newton steps.
    """
    residuals, solves = [], 0

    def evaluate(z):
        g = f(z) - z
        residuals.append(abs(g) / abs(f(z)))
        return g, residuals[-1] <= residual or len(residuals) == max_iter

    g, done = evaluate(z)
    while not done:
        direction = g / (1 - derivative(z))
        solves += 1
        for length in (1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 0):
            trial = z + length * direction if length else z + g
            g_trial, done = evaluate(trial)
            if done or abs(g_trial) <= (1 - 1e-4 * length) * abs(g) or not length:
                break
        z, g = trial, g_trial
    return residuals, solves


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
