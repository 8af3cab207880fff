"""The Bellman equation of a machine that wears out, and its derivatives by the costs.

    python experiments/examples/science/bellman.py

A bus engine has a mileage class s = 0, 1, ..., n - 1. Each month its owner keeps it, at the cost
c s, or replaces it, at the cost r, after which it is new. Both costs come with independent Gumbel
noise of scale 1. The value V(s) of owning an engine, with discount factor β, solves

    V(s) = log(exp u_keep(s) + exp u_replace),
    u_keep(s) = -c s + β Σ_s' P(s'|s) V(s'),   u_replace = -r + β Σ_s' P(s'|0) V(s')

P is the chance to move up by 0, 1 or 2 classes. Estimating the costs θ = (c, r) from the choices
that an owner made takes the derivative of V by θ. It is known in closed form: with the chances
π of keeping and P_π = π P + (1 - π) P(·|0) it is (I - β P_π)⁻¹ (-π s, -(1 - π)).

Source: Rust, "Optimal replacement of GMC bus engines", 1987; with numbers of our own.
"""

import jax
import jax.numpy as jnp

from deq_jax import GMRES, Anderson, Implicit, deq_fixed_point

jax.config.update("jax_enable_x64", True)

DISCOUNT = 0.95
MOVES = (0.35, 0.6, 0.05)
SOLVER = Anderson(tol=1e-13, max_iter=200)


def transitions(classes):
    """P `[s, s']`; the last class is never left by wear."""
    matrix = jnp.zeros((classes, classes))
    state = jnp.arange(classes)
    for step, chance in enumerate(MOVES):
        matrix = matrix.at[state, jnp.minimum(state + step, classes - 1)].add(chance)
    return matrix


def utilities(costs, value):
    """What keeping `[s]` and replacing, a number, are worth before the noise."""
    wear, replacement = costs
    matrix = transitions(len(value))
    keep = -wear * jnp.arange(len(value)) + DISCOUNT * matrix @ value
    return keep, -replacement + DISCOUNT * matrix[0] @ value


def solve(costs, classes=40):
    """V `[s]`: one equation, since the value of a class depends on that of others."""

    def bellman(costs, value, _):
        return jnp.logaddexp(*utilities(costs, value))

    start = jnp.zeros(classes)
    gradient = Implicit(GMRES(tol=1e-13))
    return deq_fixed_point(
        bellman, costs, None, start, solver=SOLVER, gradient=gradient, batched=False
    )


def main():
    costs = jnp.array([0.15, 5.0])
    value = solve(costs)
    keep, replace = utilities(costs, value)
    chance = jax.nn.sigmoid(keep - replace)
    print("chance to replace in class 0, 20, 39:", *(f"{1 - chance[s]:.4f}" for s in (0, 20, 39)))

    found = jax.jacrev(solve)(costs)
    matrix, mileage = transitions(len(value)), jnp.arange(len(value))
    followed = chance[:, None] * matrix + (1 - chance[:, None]) * matrix[0]
    exact = jnp.linalg.solve(
        jnp.eye(len(value)) - DISCOUNT * followed, -jnp.stack([chance * mileage, 1 - chance], 1)
    )
    error = float(jnp.abs(found - exact).max() / jnp.abs(exact).max())
    print(f"∂V(0)/∂(c, r) = {found[0]}, relative error of all classes {error:.1e}")
    return value, found, error


if __name__ == "__main__":
    main()
