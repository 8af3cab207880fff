"""Linear solvers of the backward pass: `Dense` against `GMRES` by size, ours against lineax's.

All contenders of a size run in turns in one process, and the medians of their processor times are
compared, so that other work on the machine falls on all of them alike. The cell is dense,
`tanh(z W + x)`, at its equilibrium; the adjoint system of a random cotangent is solved to 1e-5 in
float32. lineax is left out where it is not installed.

    python -m experiments.studies.linear
    python -m experiments.studies.linear --sizes 1 4 16 --batch 1000
"""

import dataclasses
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro

from deq_jax import Picard, solve_adjoint, solve_fixed_point
from deq_jax.linear import GMRES, BiCGStab, Dense

Solve = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is measured.

    Attributes:
        sizes: unknowns of a sample.
        batch: samples.
        rounds: turns of each contender.
        radius: spectral radius of the weights, about.
        tol: relative residual.
        peers: measure lineax too, where it is installed.
    """

    sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    batch: int = 64
    rounds: int = 15
    radius: float = 0.9
    tol: float = 1e-5
    peers: bool = True


def cell(weights: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    """`tanh(z W + x)`."""
    return jnp.tanh(z @ weights + x)


def ours(solver: Any) -> Solve:
    """The adjoint by a solver of this library."""

    def solve(weights: jax.Array, x: jax.Array, z: jax.Array, y: jax.Array) -> Any:
        return solve_adjoint(cell, weights, x, z, y, solver=solver)

    return solve


def lineax(make: Callable[[Any, float], Any], tol: float) -> Solve:
    """The adjoint by lineax, a sample at a time under `vmap`."""
    lx: Any = importlib.import_module("lineax")

    def solve(weights: jax.Array, x: jax.Array, z: jax.Array, y: jax.Array) -> Any:
        def one(x: jax.Array, z: jax.Array, y: jax.Array) -> Any:
            _, pullback = jax.vjp(lambda z: cell(weights, z, x), z)
            operator = lx.FunctionLinearOperator(lambda u: u - pullback(u)[0], jax.typeof(z))
            result = lx.linear_solve(operator, y, make(lx, tol), throw=False)
            return result.value, result.stats, result.result == lx.RESULTS.successful

        return jax.vmap(one)(x, z, y)

    return solve


def contenders(config: Config) -> dict[str, Solve]:
    """By name."""
    solvers = {
        "Dense": ours(Dense(config.tol)),
        "GMRES": ours(GMRES(tol=config.tol)),
        "BiCGStab": ours(BiCGStab(config.tol)),
    }
    if config.peers and importlib.util.find_spec("lineax"):
        solvers["lineax LU"] = lineax(
            lambda lx, _: lx.AutoLinearSolver(well_posed=True), config.tol
        )
        solvers["lineax GMRES"] = lineax(lambda lx, tol: lx.GMRES(rtol=tol, atol=0.0), config.tol)
        solvers["lineax BiCGStab"] = lineax(
            lambda lx, tol: lx.BiCGStab(rtol=tol, atol=0.0), config.tol
        )
    return solvers


def main(config: Config) -> None:
    """Prints a row of processor times in milliseconds for each size."""
    solvers = contenders(config)
    print(f"batch {config.batch}, medians of {config.rounds} rounds, ms of processor time")
    print("| unknowns | " + " | ".join(solvers) + " |\n" + "| --- " * (len(solvers) + 1) + "|")
    for size in config.sizes:
        keys = jax.random.split(jax.random.key(size), 3)
        weights = jax.random.normal(keys[0], (size, size)) * config.radius / jnp.sqrt(size)
        x, y = (jax.random.normal(key, (config.batch, size)) for key in keys[1:])
        solver = Picard(tol=1e-6, max_iter=500)
        z = solve_fixed_point(cell, weights, x, solver=solver).value
        compiled = {name: jax.jit(solve) for name, solve in solvers.items()}
        for solve in compiled.values():
            jax.block_until_ready(solve(weights, x, z, y))
        times: dict[str, list[float]] = {name: [] for name in solvers}
        for _ in range(config.rounds):
            for name, solve in compiled.items():
                start = time.process_time()
                jax.block_until_ready(solve(weights, x, z, y))
                times[name].append(1e3 * (time.process_time() - start))
        medians = (f"{statistics.median(row):.2f}" for row in times.values())
        print(f"| {size} | " + " | ".join(medians) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
