"""Independent references: the formulas in NumPy, and dense solves in float64."""

import jax
import jax.numpy as jnp
import numpy as np


def picard(f, z, *, damping=1.0, steps):
    """The points at which damped Picard evaluates f, for one sample."""
    points = [z]
    for _ in range(steps - 1):
        z = damping * f(z) + (1 - damping) * z
        points.append(z)
    return points


def anderson(f, z, *, history, mixing, ridge, steps):
    """The points at which Anderson acceleration evaluates f, for one sample `[D]`, real or complex.

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
        gram = (window_g.conj() @ window_g.T).real
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


def flatten(tree):
    """All leaves behind one another in one vector, in NumPy: JAX would compile each operation."""
    leaves = [np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves or [np.zeros(0)])


def unflatten_as(tree):
    """The inverse of `flatten` for trees of the form of `tree`; also of a traced vector."""
    leaves, structure = jax.tree.flatten(tree)
    shapes = [np.shape(leaf) for leaf in leaves]
    ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])

    def unflatten(flat):
        parts = [
            flat[end - np.prod(shape, dtype=int) : end].reshape(shape)
            for shape, end in zip(shapes, ends, strict=True)
        ]
        return jax.tree.unflatten(structure, parts)

    return unflatten


def flatten_traced(tree):
    """`flatten` inside of `jit`."""
    return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])


def newton_equilibrium(f, z, steps=50):
    """The solution of `z = f(z)` for any pytree, by dense Newton steps."""
    flat, unflatten = flatten(z), unflatten_as(z)

    def g(flat):
        return flatten_traced(f(unflatten(flat))) - flat

    value_and_jacobian = jax.jit(lambda flat: (g(flat), jax.jacfwd(g)(flat)))
    for _ in range(steps):
        value, jacobian = map(np.asarray, value_and_jacobian(flat))
        if np.linalg.norm(value) < 1e-14 * (1 + np.linalg.norm(flat)):
            break
        flat = flat - np.linalg.solve(jacobian, value)
    return jax.tree.map(jnp.asarray, unflatten(flat))


def implicit_gradient(f, inputs, z, cotangent):
    """`(∂z*/∂inputs)ᵀ cotangent` by a dense solve of the implicit function theorem.

    `f(inputs, z)`; `inputs`, `z` and `cotangent` are pytrees of float64 arrays; `z` solves the
    equation.
    """
    unflatten_z, unflatten_inputs = unflatten_as(z), unflatten_as(inputs)

    def flat_f(flat_inputs, flat_z):
        return flatten_traced(f(unflatten_inputs(flat_inputs), unflatten_z(flat_z)))

    flat_z = flatten(z)
    by_inputs, by_z = jax.jit(jax.jacrev(flat_f, argnums=(0, 1)))(flatten(inputs), flat_z)
    u = np.linalg.solve(np.eye(flat_z.size) - np.asarray(by_z).T, flatten(cotangent))
    return jax.tree.map(jnp.asarray, unflatten_inputs(np.asarray(by_inputs).T @ u))


def relative_error(a, b):
    """`‖a - b‖ / ‖b‖` over two pytrees."""
    a, b = (flatten(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), t)) for t in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)
