"""Sinkhorn potentials: entropic optimal transport, and its derivative by where the points are.

    python experiments/examples/science/sinkhorn.py

Transport mass a `[n]` at points x to mass b `[m]` at points y at the cost C_ij = |x_i - y_j|² and
with entropy ε. The plan is P_ij = exp((p_i + q_j - C_ij) / ε), and its potentials solve

    q_j = ε log b_j - ε log Σ_i exp((p_i - C_ij) / ε)
    p_i = ε log a_i - ε log Σ_j exp((q_j - C_ij) / ε)

The two together are a fixed point of p alone. A constant added to p and taken from q changes
nothing, so I - ∂f/∂p has no inverse until the constant is fixed: here p has mean 0. The derivative
of the regularised cost by x needs no derivative of p; it is 2 Σ_j P_ij (x_i - y_j). The transport
cost Σ P C has no such short cut; it is differentiated through the fixed point.

Source: Cuturi, "Sinkhorn distances: lightspeed computation of optimal transport", 2013.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import logsumexp

from deq_jax import Anderson, deq_fixed_point

jax.config.update("jax_enable_x64", True)

EPSILON, SOLVER = 0.1, Anderson(tol=1e-13, max_iter=500)


def squared_distances(x, y):
    """C `[n, m]`."""
    return ((x[:, None] - y[None]) ** 2).sum(-1)


def plan(x, y, a, b):
    """P `[n, m]`."""
    cost = squared_distances(x, y)

    def second(p, cost):
        return EPSILON * (jnp.log(b) - logsumexp((p[:, None] - cost) / EPSILON, axis=0))

    def f(_, p, cost):
        q = second(p, cost)
        p = EPSILON * (jnp.log(a) - logsumexp((q[None] - cost) / EPSILON, axis=1))
        return p - p.mean()

    p = deq_fixed_point(f, None, cost, jnp.zeros_like(a), solver=SOLVER, batched=False)
    return jnp.exp((p[:, None] + second(p, cost)[None] - cost) / EPSILON)


def transport_cost(x, y, a, b):
    return (plan(x, y, a, b) * squared_distances(x, y)).sum()


def regularised_cost(x, y, a, b):
    p = plan(x, y, a, b)
    return (p * (squared_distances(x, y) + EPSILON * (jnp.log(p) - 1))).sum()


def problem(n=8, m=6):
    """Points x `[n, 2]` and y `[m, 2]`, masses a and b."""
    draw = np.random.default_rng(0)
    x, y, a, b = (draw.random(shape) for shape in ((n, 2), (m, 2), n, m))
    return tuple(map(jnp.asarray, (x, y, a / a.sum(), b / b.sum())))


def main():
    x, y, a, b = problem()
    p = plan(x, y, a, b)
    marginals = float(jnp.abs(jnp.append(p.sum(1) - a, p.sum(0) - b)).max())
    envelope = 2 * (p[..., None] * (x[:, None] - y[None])).sum(1)
    error = float(jnp.abs(jax.grad(regularised_cost)(x, y, a, b) - envelope).max())
    print(f"transport cost {transport_cost(x, y, a, b):.6f}, error of marginals {marginals:.1e}")
    print(f"error of the regularised cost's gradient {error:.1e}")
    return marginals, error, jax.grad(transport_cost)(x, y, a, b)


if __name__ == "__main__":
    main()
