"""Which ridge Anderson needs: evaluations on a slow symmetric map, over seeds and ridges.

The map is `A z + b` with eigenvalues evenly spaced from 0.1 to 0.99, n = 100, a random orthogonal
basis, b ~ N(0, 1), float64. Every seed is a sample of one batch.

    python -m experiments.ridge
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deq_jax import Anderson, Picard, Solver, solve_fixed_point
from experiments.convergence import TOLERANCES

TIGHT_TOLERANCES = (TOLERANCES[-1], 1e-6, 1e-8)


@dataclasses.dataclass(frozen=True)
class Config:
    """What to try.

    Attributes:
        seeds: number of random maps.
        history: window of Anderson.
        ridges: relative ridges.
    """

    seeds: int = 20
    history: int = 5
    ridges: tuple[float, ...] = (1e-8, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def maps(seeds: int) -> tuple[jax.Array, jax.Array]:
    """Matrices `[seeds, 100, 100]` and offsets `[seeds, 100]`."""
    matrices, offsets = [], []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        basis = np.linalg.qr(rng.normal(size=(100, 100)))[0]
        matrices.append(basis @ np.diag(np.linspace(0.1, 0.99, 100)) @ basis.T)
        offsets.append(rng.normal(size=100))
    return jnp.asarray(np.array(matrices)), jnp.asarray(np.array(offsets))


def affine(matrices: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    """One map a sample."""
    return jnp.einsum("bij,bj->bi", matrices, z) + x


def row(name: str, solver: Solver, matrices: jax.Array, offsets: jax.Array) -> str:
    """A table row: mean and largest count at each tolerance."""
    trace = np.asarray(solve_fixed_point(affine, matrices, offsets, solver=solver).stats.trace)
    cells = []
    for tol in TIGHT_TOLERANCES:
        met = trace <= tol
        counts = np.where(met.any(0), met.argmax(0) + 1, np.inf)
        cells.append(f"{counts.mean():.0f} ({counts.max():.0f})")
    return f"| {name} | " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table: mean over the seeds, and the largest in brackets."""
    config = tyro.cli(Config, description=__doc__)
    jax.config.update("jax_enable_x64", True)
    problem = maps(config.seeds)
    print("| evaluations to | " + " | ".join(f"{tol:g}" for tol in TIGHT_TOLERANCES) + " |")
    print("| --- |" + " --- |" * len(TIGHT_TOLERANCES))
    limits = {"tol": TIGHT_TOLERANCES[-1], "max_iter": 1500, "trace": True}
    print(row("Picard", Picard(**limits), *problem))
    for ridge in config.ridges:
        solver = Anderson(config.history, ridge=ridge, **limits)
        print(row(f"Anderson({config.history}), ridge {ridge:g}", solver, *problem), flush=True)


if __name__ == "__main__":
    main()
