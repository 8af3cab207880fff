"""Error bars of a fit that is a fixed point: two peaks in a histogram, fitted by EM.

    python experiments/examples/science/fit_covariance.py

Counts n_k in bins around x_k come from two Gaussian peaks with the shares w and 1 - w. Expectation
maximisation repeats, with r_k the chance that a count in bin k is from the first peak,

    w = Σ n r / Σ n,   μ₁ = Σ n r x / Σ n r,   σ₁² = Σ n r (x - μ₁)² / Σ n r,   and 1 - r for μ₂, σ₂

Its fixed point is the fit of maximum likelihood θ*(n). Counts are independent and have the
variance n, so to first order the covariance of the fit is (the delta method)

    cov θ* = D diag(n) Dᵀ,   D = ∂θ*/∂n,

and D is the derivative of the fixed point by its data. No likelihood has to be written down.

Source: Dempster, Laird and Rubin, "Maximum likelihood from incomplete data via the EM algorithm",
1977; Oehlert, "A note on the delta method", 1992.
"""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from deq_jax import GMRES, Anderson, Implicit, deq_fixed_point

jax.config.update("jax_enable_x64", True)

BINS = jnp.linspace(-8.0, 9.0, 69)
START = {"share": jnp.array(0.5), "mean": jnp.array([-1.0, 2.0]), "variance": jnp.ones(2)}
SOLVER = Anderson(tol=1e-12, max_iter=300)


def densities(theta):
    """Of the two peaks, each times its share, `[2, bins]`."""
    share = jnp.stack([theta["share"], 1 - theta["share"]])
    variance = theta["variance"][:, None]
    bell = jnp.exp(-((BINS - theta["mean"][:, None]) ** 2) / (2 * variance))
    return share[:, None] * bell / jnp.sqrt(2 * jnp.pi * variance)


def em_step(_, theta, counts):
    peaks = densities(theta)
    weights = counts * peaks / peaks.sum(0)
    total = weights.sum(1)
    mean = weights @ BINS / total
    variance = (weights * (BINS - mean[:, None]) ** 2).sum(1) / total
    return {"share": total[0] / total.sum(), "mean": mean, "variance": variance}


def fit(counts):
    """θ* as a dict, for counts `[bins]`."""
    gradient = Implicit(GMRES(tol=1e-12))
    return deq_fixed_point(
        em_step, None, counts, START, solver=SOLVER, gradient=gradient, batched=False
    )


def covariance(counts):
    """Of mean₁, mean₂, share, variance₁, variance₂, `[5, 5]`."""
    slope = jax.jacrev(lambda counts: ravel_pytree(fit(counts))[0])(counts)
    return (slope * counts) @ slope.T


def expected_counts(events=4000.0):
    truth = {"share": jnp.array(0.4), "mean": jnp.array([-1.5, 2.0]), "variance": jnp.ones(2)}
    return events * densities(truth).sum(0) * (BINS[1] - BINS[0])


def main():
    counts = expected_counts()
    values, names = ravel_pytree(fit(counts))[0], ("μ₁", "μ₂", "w", "σ₁²", "σ₂²")
    matrix = covariance(counts)
    for name, value, error in zip(names, values, jnp.sqrt(jnp.diag(matrix)), strict=True):
        print(f"{name:4s}= {value:7.4f} ± {error:.4f}")
    return values, matrix


if __name__ == "__main__":
    main()
