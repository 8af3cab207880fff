"""Kepler's equation: where a planet stands in its orbit, and how that depends on the orbit.

    python experiments/examples/science/kepler.py

The eccentric anomaly E of a body follows from its mean anomaly M, which grows linearly in time,
and from the eccentricity e of its orbit. Angles are in radians.

    E = M + e sin E

Each body is a sample of the batch and an equation of its own. The derivatives of the solution are
known in closed form, and the script compares with them:

    ∂E/∂M = 1 / (1 - e cos E),   ∂E/∂e = sin E / (1 - e cos E),   ∂²E/∂M² = -e sin E (∂E/∂M)³

Source: Danby, "Fundamentals of Celestial Mechanics", 1988, section 6.6, also for the start.
"""

import jax
import jax.numpy as jnp

from deq_jax import Anderson, deq_fixed_point

jax.config.update("jax_enable_x64", True)

SOLVER = Anderson(tol=1e-14, max_iter=60)
ECCENTRICITIES = {"Earth": 0.0167, "Mercury": 0.2056, "Pluto": 0.2488, "Halley": 0.9671}


def eccentric_anomaly(eccentricity, mean_anomaly, return_stats=False):
    """E `[B]` for eccentricities and mean anomalies `[B]`."""

    def f(eccentricity, anomaly, mean_anomaly):
        return mean_anomaly + eccentricity * jnp.sin(anomaly)

    start = mean_anomaly + 0.85 * eccentricity * jnp.sign(jnp.sin(mean_anomaly))
    return deq_fixed_point(
        f, eccentricity, mean_anomaly, start, solver=SOLVER, return_stats=return_stats
    )


def main(mean_anomaly=0.3):
    eccentricity = jnp.asarray(list(ECCENTRICITIES.values()))
    mean = jnp.full_like(eccentricity, mean_anomaly)

    anomaly, stats = eccentric_anomaly(eccentricity, mean, return_stats=True)
    for name, e, value, count in zip(
        ECCENTRICITIES, eccentricity, anomaly, stats.iterations, strict=True
    ):
        print(f"{name:8s} e = {e:.4f}  E = {value:.12f}  after {count} evaluations")

    # Samples are independent, so the sum over the batch has the derivatives of each of them.
    def total(eccentricity, mean):
        return eccentric_anomaly(eccentricity, mean).sum()

    by_eccentricity, by_mean = jax.grad(total, argnums=(0, 1))(eccentricity, mean)
    ones = jnp.ones_like(mean)
    curvature = jax.jvp(lambda m: jax.grad(total, argnums=1)(eccentricity, m), (mean,), (ones,))[1]

    slope = 1 / (1 - eccentricity * jnp.cos(anomaly))
    exact = (slope, jnp.sin(anomaly) * slope, -eccentricity * jnp.sin(anomaly) * slope**3)
    found = (by_mean, by_eccentricity, curvature)
    errors = [float(jnp.abs(a / b - 1).max()) for a, b in zip(found, exact, strict=True)]
    print("relative errors of ∂E/∂M, ∂E/∂e, ∂²E/∂M²:", *(f"{error:.1e}" for error in errors))
    return anomaly, found, errors


if __name__ == "__main__":
    main()
