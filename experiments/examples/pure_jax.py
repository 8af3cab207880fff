"""A physical fixed point without a network, and its derivatives of first and second order.

    python experiments/examples/pure_jax.py

Mean-field theory of a ferromagnet: the magnetisation m of each spin in a field h at temperature T,

    m_i = tanh((h_i + Σ_j J_ij m_j) / T)

J is the coupling, in units of energy; T and h are in the same unit. The susceptibility matrix
χ_ij = ∂m_i/∂h_j is the Jacobian of the solution. Differentiating the equation gives it in closed
form, χ = (T diag(1 / (1 - m²)) - J)⁻¹, which the script compares with.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import Anderson, deq_fixed_point

jax.config.update("jax_enable_x64", True)

SOLVER = Anderson(tol=1e-12, max_iter=200)


def ring(spins, strength=1.0):
    """Couplings `[spins, spins]` of a ring: each spin to its two neighbours."""
    eye = jnp.eye(spins)
    return strength / 2 * (jnp.roll(eye, 1, axis=0) + jnp.roll(eye, -1, axis=0))


def magnetisation(temperature, field, coupling):
    """The mean field `m` `[spins]`, a single equation and not a batch of them."""

    def f(params, m, field):
        temperature, coupling = params
        return jnp.tanh((field + coupling @ m) / temperature)

    # From full magnetisation, so that the ordered solution is found.
    start = jnp.ones_like(field)
    return deq_fixed_point(f, (temperature, coupling), field, start, solver=SOLVER, batched=False)


def main(spins=12):
    coupling, field = ring(spins), 0.1 * jnp.cos(jnp.arange(spins, dtype=float))
    temperature = jnp.asarray(1.5)

    m = magnetisation(temperature, field, coupling)
    print("magnetisation", np.round(m[:4], 4), "...")

    # Forward mode: one linear solve for each direction of the field.
    susceptibility = jax.jacfwd(magnetisation, argnums=1)(temperature, field, coupling)
    exact = jnp.linalg.inv(temperature * jnp.diag(1 / (1 - m**2)) - coupling)
    error = float(jnp.abs(susceptibility - exact).max() / jnp.abs(exact).max())
    print(f"susceptibility against the closed form: relative error {error:.1e}")

    # Reverse mode of the same, and a second derivative: how the total responds to field twice.
    def total(field):
        return magnetisation(temperature, field, coupling).sum()

    gradient = jax.grad(total)(field)
    curvature = jax.hessian(total)(field)
    print(f"gradient of the total against Σ_i χ_ij: {jnp.abs(gradient - exact.sum(0)).max():.1e}")
    print(f"asymmetry of the Hessian: {jnp.abs(curvature - curvature.T).max():.1e}")
    return error, float(jnp.abs(gradient - exact.sum(0)).max()), curvature


if __name__ == "__main__":
    main()
