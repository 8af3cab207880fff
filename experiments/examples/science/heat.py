"""A nonlinear heat equation in implicit time steps, and its derivatives by the conductivity.

    python experiments/examples/science/heat.py

A rod of length 1 has the temperature 1 at its left end and 0 at its right end. Its conductivity
grows with the temperature u, so that

    ∂u/∂t = ∂/∂x (κ(u) ∂u/∂x),   κ(u) = a + b u,   u = 0 at the start.

A step of backward Euler from u_old to u is a nonlinear equation. With κ taken from the last
iterate it becomes a tridiagonal system, whose solution is the fixed-point map:

    u_i - Δt/h² (κ_{i+1/2} (u_{i+1} - u_i) - κ_{i-1/2} (u_i - u_{i-1})) = u_old_i

`lax.scan` takes the steps, and reverse mode goes back through all of them. After a long time the
rod is at rest, and Kirchhoff's transform gives the exact solution: a u + b u² / 2 falls linearly.

Source: Patankar, "Numerical Heat Transfer and Fluid Flow", 1980, chapter 4.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import Anderson, deq_fixed_point

jax.config.update("jax_enable_x64", True)

SOLVER, LEFT, RIGHT = Anderson(tol=1e-13), 1.0, 0.0


def frozen_step(ratio, u, old, conductivity):
    """The step's solution `[n]` with the conductivity that `u` has; `ratio` is Δt/h²."""
    a, b = conductivity
    padded = jnp.concatenate([jnp.array([LEFT]), u, jnp.array([RIGHT])])
    between = ratio * (a + b * (padded[1:] + padded[:-1]) / 2)  # [n + 1]
    nothing = jnp.zeros(1)
    lower = jnp.concatenate([nothing, -between[1:-1]])
    upper = jnp.concatenate([-between[1:-1], nothing])
    right = old.at[0].add(between[0] * LEFT).at[-1].add(between[-1] * RIGHT)
    diagonal = 1 + between[:-1] + between[1:]
    return lax.linalg.tridiagonal_solve(lower, diagonal, upper, right[:, None])[:, 0]


def heat(conductivity, steps=10, dt=0.02, points=20):
    """The temperature `[points]` inside of the rod after so many steps."""
    ratio = dt * (points + 1) ** 2

    def f(conductivity, u, old):
        return frozen_step(ratio, u, old, conductivity)

    def step(old, _):
        return deq_fixed_point(f, conductivity, old, old, solver=SOLVER, batched=False), None

    return lax.scan(step, jnp.zeros(points), length=steps)[0]


def at_rest(conductivity, points=20):
    """The exact solution of a u + b u² / 2 = (a + b / 2) (1 - x)."""
    a, b = conductivity
    x = jnp.arange(1, points + 1) / (points + 1)
    return (jnp.sqrt(a**2 + 2 * b * (a + b / 2) * (1 - x)) - a) / b


def main():
    conductivity = jnp.array([0.3, 1.2])
    u = heat(conductivity)
    print("temperature after 0.2:", " ".join(f"{value:.4f}" for value in u[::4]))

    # How the temperature in the middle depends on a and b, back through ten solves.
    gradient = jax.grad(lambda c: heat(c)[10])(conductivity)
    print(f"∂u(middle)/∂(a, b) = {gradient}")

    error = float(jnp.abs(heat(conductivity, steps=3, dt=1e6) - at_rest(conductivity)).max())
    print(f"at rest, against the exact solution: {error:.1e}")
    return u, gradient, error


if __name__ == "__main__":
    main()
