"""Small equations with solutions and gradients in NumPy, float64, shared by the museum's tests."""

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import Anderson, Broyden, NewtonKrylov, Picard

SOLVERS = {
    "picard": Picard,
    "anderson": Anderson,
    "broyden": Broyden,
    "newton": NewtonKrylov,
}


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def symmetric(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues."""
    basis = np.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def tanh_cell(w, z, x):
    """The cell of most tests, `[B, D]`."""
    return jnp.tanh(z @ w + x)


def tanh_solution(w, x):
    """The equilibrium of `tanh_cell` by Newton's method with dense matrices, each sample alone."""
    w, x = np.asarray(w, np.float64), np.asarray(x, np.float64)
    z = np.zeros_like(x)
    for i in range(len(x)):
        for _ in range(100):
            value = np.tanh(z[i] @ w + x[i])
            jacobian = (1 - value**2)[:, None] * w.T
            step = np.linalg.solve(np.eye(len(w)) - jacobian, value - z[i])
            z[i] += step
            if np.abs(step).max() < 1e-15:
                break
        assert np.abs(np.tanh(z[i] @ w + x[i]) - z[i]).max() < 1e-14
    return z


def tanh_adjoint(w, z, y):
    """u of `u = Jᵀ u + y` at z, by a dense solve for each sample."""
    w = np.asarray(w, np.float64)
    transposed = [w * (1 - row**2) for row in np.asarray(z, np.float64)]
    return np.stack(
        [np.linalg.solve(np.eye(len(w)) - a, b) for a, b in zip(transposed, y, strict=True)]
    )


def tanh_gradients(w, x, y):
    """The equilibrium, and `yᵀ ∂z*/∂(w, x)` by the implicit function theorem."""
    z = tanh_solution(w, x)
    s = (1 - z**2) * tanh_adjoint(w, z, np.asarray(y, np.float64))
    return z, (z.T @ s, s)


def picard_trace(f, z, steps):
    """Points and relative residuals of plain iteration, in NumPy."""
    points, residuals = [], []
    for _ in range(steps):
        fz = f(z)
        points.append(z)
        residuals.append(np.linalg.norm(fz - z) / np.linalg.norm(fz))
        z = fz
    return points, np.array(residuals)


def residual_of(f, z):
    """`‖f(z) - z‖ / ‖f(z)‖` of each sample, `[B]`, in float64."""
    fz, z = (np.asarray(a, np.float64).reshape(len(z), -1) for a in (f(z), z))
    return np.linalg.norm(fz - z, axis=1) / np.linalg.norm(fz, axis=1)


class Counter:
    """Counts how often a function runs on the device, by a callback."""

    def __init__(self, f):
        self.f = f
        self.calls = 0

    def __call__(self, *args):
        jax.debug.callback(self._count)
        return self.f(*args)

    def _count(self):
        self.calls += 1

    def read(self):
        jax.effects_barrier()
        return self.calls


def primitives(jaxpr):
    """Names of all primitives in a jaxpr, those of nested jaxprs among them, repeated."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from primitives(getattr(inner, "jaxpr", inner))
