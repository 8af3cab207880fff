"""A grey atmosphere in radiative-convective equilibrium, and how it warms with its opacity.

    python experiments/examples/science/radiative_convective.py

The surface absorbs the sunlight S (in W/m²). Each of n layers absorbs the share ε of the infrared
light that passes, and shines σ ε T⁴ up and down. Where the temperature falls faster than Γ from
one level to the next, air rises and carries heat:

    up_{i+1} = (1 - ε) up_i + ε σ T_i⁴,   up_0 = σ T_s⁴;   down likewise from 0 at the top,
    c_i = K w log(1 + exp((T_below - T_i - Γ) / w))

In equilibrium nothing is heated: up - down + c is the same, S, at every level. Adding the heating
to T, in units of a conductance λ, makes it a fixed point, which Newton's method finds. Without
convection it is known: σ T_s⁴ = S (1 + n ε / (2 - ε)).

Source: Manabe and Strickler, "Thermal equilibrium of the atmosphere with a convective adjustment",
1964; Pierrehumbert, "Principles of Planetary Climate", 2010, chapter 4.
"""

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import GMRES, Implicit, NewtonKrylov, deq_fixed_point

jax.config.update("jax_enable_x64", True)

SIGMA = 5.670374e-8  # W / (m² K⁴)
LAPSE, WIDTH, CONDUCTANCE = 6.0, 0.5, 20.0  # Γ in K from level to level; w in K; λ in W/(m² K)
SOLVER = NewtonKrylov(krylov=GMRES(tol=1e-8), tol=1e-13, max_iter=60)
GRADIENT = Implicit(GMRES(tol=1e-12))


def heating(params, temperature):
    """What the surface (first) and the layers gain, `[1 + n]` in W/m²."""
    sunlight, emissivity, mixing = params
    shine = SIGMA * temperature**4

    def through(flux, layer):
        flux = (1 - emissivity) * flux + emissivity * layer
        return flux, flux

    above = lax.scan(through, shine[0], shine[1:])[1]
    below = lax.scan(through, jnp.zeros_like(shine[0]), shine[1:], reverse=True)[1]
    up = jnp.concatenate([shine[:1], above])
    down = jnp.append(below, 0.0)
    excess = temperature[:-1] - temperature[1:] - LAPSE
    convection = mixing * WIDTH * jax.nn.softplus(excess / WIDTH)
    upwards = up - down + jnp.append(convection, 0.0)  # at the bottom of each layer, and the top
    return jnp.concatenate([jnp.array([sunlight]), upwards[:-1]]) - upwards


def equilibrium(params, layers=12, return_stats=False):
    """Temperatures `[1 + layers]` in K of the surface and of the layers."""

    def f(params, temperature, _):
        return temperature + heating(params, temperature) / CONDUCTANCE

    start = jnp.linspace(290.0, 220.0, layers + 1)
    options = {"solver": SOLVER, "gradient": GRADIENT, "batched": False}
    return deq_fixed_point(f, params, None, start, return_stats=return_stats, **options)


def main():
    params = jnp.array([240.0, 0.2, 20.0])  # S, ε, K
    temperature, stats = equilibrium(params, return_stats=True)
    print("temperatures", " ".join(f"{t:.1f}" for t in temperature))
    print(f"after {stats.evaluations} evaluations and {stats.products} products")
    sensitivity = jax.grad(lambda params: equilibrium(params)[0])(params)
    print(f"surface by sunlight {sensitivity[0]:.4f} K/(W/m²), by ε {sensitivity[1]:.2f} K")
    still = equilibrium(params.at[2].set(0.0))
    exact = (params[0] * (1 + 12 * params[1] / (2 - params[1])) / SIGMA) ** 0.25
    print(f"without convection {still[0]:.6f} K, exact {exact:.6f} K")
    return temperature, sensitivity, float(still[0] - exact)


if __name__ == "__main__":
    main()
