"""Coming from jaxopt: one layer and its gradient in both libraries.

    python experiments/examples/from_jaxopt.py

docs/from_jaxopt.md has each entry point and option of jaxopt beside ours.

jaxopt is not needed to run this: where it is installed, both answers are compared.
"""

import importlib.util

import jax
import jax.numpy as jnp

from deq_jax import Anderson, deq_fixed_point


def cell(params, z, x):
    return jnp.tanh(z @ params["w"] + x @ params["u"])


def by_deq_jax(params, x, z0):
    solver = Anderson(history=5, tol=1e-6, max_iter=100)
    return deq_fixed_point(cell, params, x, z0, solver=solver, batched=False)


def by_jaxopt(params, x, z0):
    import jaxopt  # abandoned in 2024; kept here for comparison only

    solver = jaxopt.AndersonAcceleration(
        lambda z, params, x: cell(params, z, x), history_size=5, tol=1e-6, maxiter=100, ridge=1e-6
    )
    return solver.run(z0, params, x).params


def main(width=16):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": 0.5 * jax.random.normal(keys[0], (width, width)) / width**0.5,
        "u": jax.random.normal(keys[1], (4, width)),
    }
    x, z0 = jax.random.normal(keys[2], (4,)), jnp.zeros(width)

    def loss_by(solve):
        return lambda params: (solve(params, x, z0) ** 2).sum()

    z, gradient = by_deq_jax(params, x, z0), jax.grad(loss_by(by_deq_jax))(params)
    print(f"residual of deq_jax's solution: {jnp.abs(cell(params, z, x) - z).max():.1e}")
    if importlib.util.find_spec("jaxopt") is None:
        print("jaxopt is not installed; nothing to compare with")
        return z, gradient, None
    theirs = jax.grad(loss_by(by_jaxopt))(params)
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), gradient, theirs)
    print(f"largest difference of the gradients: {max(differences.values()):.1e}")
    return z, gradient, differences


if __name__ == "__main__":
    main()
