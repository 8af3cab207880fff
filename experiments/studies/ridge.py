"""Which ridge Anderson needs: evaluations over kinds of maps, seeds and ridges, in float64.

The first table is for `A z + b`, A symmetric with eigenvalues evenly spaced from 0.1 to 0.99, at
three tolerances; the second for maps of other kinds at one tolerance. n = 100, b ~ N(0, 1); every
seed is a sample of one batch.

    python -m experiments.studies.ridge
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from deq_jax import Anderson, Picard, Solver, solve_fixed_point
from experiments.studies.tables import markdown_head, markdown_row

TOLERANCES = (1e-4, 1e-6, 1e-8)
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Config:
    """What to try.

    Attributes:
        seeds: random maps of each kind.
        history: window of Anderson.
        ridges: relative ridges.
        tol: tolerance of the second table.
    """

    seeds: int = 20
    history: int = 5
    ridges: tuple[float, ...] = (1e-8, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)
    tol: float = 1e-6


def symmetric(rng: np.random.Generator, lowest: float, highest: float) -> np.ndarray:
    """Evenly spaced eigenvalues in a random orthogonal basis, `[n, n]`."""
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    return basis @ np.diag(np.linspace(lowest, highest, WIDTH)) @ basis.T


def nonsymmetric(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Normal entries, scaled to a spectral radius, `[n, n]`."""
    matrix = rng.normal(size=(WIDTH, WIDTH))
    return matrix * radius / np.abs(np.linalg.eigvals(matrix)).max()


def rotations(rng: np.random.Generator, radius: float) -> np.ndarray:
    """Blocks that turn by random angles and shrink by `radius`, `[n, n]`."""
    matrix = np.zeros((WIDTH, WIDTH))
    for i in range(0, WIDTH, 2):
        c, s = radius * np.array([np.cos(angle := rng.uniform(0.3, np.pi)), np.sin(angle)])
        matrix[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    return matrix


def nonnormal(rng: np.random.Generator) -> np.ndarray:
    """Triangular with eigenvalues in (-0.9, 0.9), `[n, n]`."""
    upper = np.triu(rng.normal(size=(WIDTH, WIDTH)), 1) * 0.1
    return upper + np.diag(rng.uniform(-0.9, 0.9, WIDTH))


def affine(matrices: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    """`A z + x`, one map a sample."""
    return jnp.einsum("bij,bj->bi", matrices, z) + x


def tanh_cell(matrices: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    """`tanh(A z + x)`, one map a sample."""
    return jnp.tanh(affine(matrices, z, x))


KINDS: dict[str, tuple[Callable[..., jax.Array], Callable[[np.random.Generator], np.ndarray]]] = {
    "symmetric -0.5..0.95": (affine, lambda rng: symmetric(rng, -0.5, 0.95)),
    "symmetric -1.5..0.9": (affine, lambda rng: symmetric(rng, -1.5, 0.9)),
    "nonsymmetric 0.9": (affine, lambda rng: nonsymmetric(rng, 0.9)),
    "rotations 0.9": (affine, lambda rng: rotations(rng, 0.9)),
    "nonnormal": (affine, nonnormal),
    "tanh, symmetric": (tanh_cell, lambda rng: symmetric(rng, -0.95, 0.95)),
    "tanh, nonsymmetric": (tanh_cell, lambda rng: nonsymmetric(rng, 0.95)),
}


def draw(
    make: Callable[[np.random.Generator], np.ndarray], seeds: int
) -> tuple[jax.Array, jax.Array]:
    """Matrices `[seeds, n, n]` and offsets `[seeds, n]`."""
    pairs = [
        (make(rng), rng.normal(size=WIDTH)) for rng in map(np.random.default_rng, range(seeds))
    ]
    return jnp.asarray([matrix for matrix, _ in pairs]), jnp.asarray([b for _, b in pairs])


def counts(f: Any, problem: tuple[jax.Array, jax.Array], solver: Solver) -> np.ndarray:
    """Evaluations until each tolerance, `[tolerances, seeds]`; infinite where not met."""
    trace = np.asarray(solve_fixed_point(f, *problem, solver=solver).stats.trace)
    met = [trace <= tol for tol in (*TOLERANCES[:-1], solver.tol)]
    return np.array([np.where(m.any(0), m.argmax(0) + 1, np.inf) for m in met])


def print_table(corner: str, columns: list[str], rows: dict[str, list[str]]) -> None:
    """Prints a Markdown table."""
    print(markdown_head([corner, *columns]))
    for name, cells in rows.items():
        print(markdown_row([name, *cells]))
    print(flush=True)


def cell(count: np.ndarray) -> str:
    """Mean over the seeds and, in brackets, the largest."""
    return "-" if np.isinf(count).any() else f"{count.mean():.0f} ({count.max():.0f})"


def main() -> None:
    """Prints both tables: mean over the seeds, and the largest in brackets."""
    config = tyro.cli(Config, description=__doc__)
    with jax.enable_x64(True):
        print_tables(config)


def print_tables(config: Config) -> None:
    """Prints the table over tolerances and the table over kinds of maps."""

    def solvers(tol: float) -> dict[str, Solver]:
        limits = {"tol": tol, "max_iter": 1500, "trace": True}
        return {"Picard": Picard(**limits)} | {
            f"Anderson({config.history}), ridge {ridge:g}": Anderson(
                config.history, ridge=ridge, **limits
            )
            for ridge in config.ridges
        }

    slow = draw(lambda rng: symmetric(rng, 0.1, 0.99), config.seeds)
    print_table(
        "symmetric 0.1..0.99",
        [f"{tol:g}" for tol in TOLERANCES],
        {
            name: [cell(count) for count in counts(affine, slow, solver)]
            for name, solver in solvers(TOLERANCES[-1]).items()
        },
    )
    problems = {name: (f, draw(make, config.seeds)) for name, (f, make) in KINDS.items()}
    print_table(
        f"to {config.tol:g}",
        list(problems),
        {
            name: [cell(counts(f, problem, solver)[-1]) for f, problem in problems.values()]
            for name, solver in solvers(config.tol).items()
        },
    )


if __name__ == "__main__":
    main()
