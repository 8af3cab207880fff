"""How fast Picard and Anderson converge, and which ridge Anderson needs.

Part `cell`: residuals of the tutorial's residual cell at its random initialisation, forward and
backward. Part `ridge`: evaluations over kinds of maps, seeds and ridges, in float64; n = 100,
b ~ N(0, 1), and every seed is a sample of one batch.

    python -m experiments.studies.convergence
    python -m experiments.studies.convergence cell --write
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from deq_jax import Anderson, Picard, Solver, solve_adjoint, solve_fixed_point
from deq_jax.cells import ResNetCell
from deq_jax.plotting import hold_after_stop, plot_residuals
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

CELL_TOLERANCES = (1e-2, 1e-3, 1e-4)
RIDGE_TOLERANCES = (1e-4, 1e-6, 1e-8)
WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """The tutorial's setting by default.

    Attributes:
        channels: channels of the state.
        inner_channels: channels inside the cell's branch.
        size: height and width of the state.
        batch: samples.
        max_iter: most evaluations.
        histories: window sizes of Anderson at mixing 1.
        mixings: mixings of Anderson at a history of 5.
        seed: of weights, inputs and cotangent.
        seeds: random maps of each kind, for the ridge.
        ridges: relative ridges of Anderson with a history of 5.
    """

    channels: int = 64
    inner_channels: int = 128
    size: int = 32
    batch: int = 10
    max_iter: int = 100
    histories: tuple[int, ...] = (2, 5, 10)
    mixings: tuple[float, ...] = (0.5, 2.0)
    seed: int = 0
    seeds: int = 20
    ridges: tuple[float, ...] = (1e-8, 1e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3)


def cell_problem(config: Config) -> tuple[Callable[..., Any], Any, jax.Array, jax.Array]:
    """The cell as a pure function, its parameters, an input and a cotangent, all N(0, 1)."""
    cell = ResNetCell(config.channels, config.inner_channels, rngs=nnx.Rngs(config.seed))
    definition, params = nnx.split(cell)

    def f(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.merge(definition, params)(z, x)

    keys = jax.random.split(jax.random.key(config.seed + 1))
    shape = (config.batch, config.size, config.size, config.channels)
    x, cotangent = (jax.random.normal(key, shape) for key in keys)
    return f, params, x, cotangent


def cell(config: Config) -> Part:
    """Residuals of the cell by solver, forward and backward."""
    limits = {"tol": CELL_TOLERANCES[-1], "max_iter": config.max_iter, "trace": True}
    solvers: dict[str, Solver] = {"Picard": Picard(**limits)}
    for history in config.histories:
        solvers[f"Anderson({history})"] = Anderson(history, **limits)
    for mixing in config.mixings:
        solvers[f"Anderson(5), mixing {mixing:g}"] = Anderson(5, mixing, **limits)

    f, params, x, cotangent = cell_problem(config)
    # One accurate equilibrium for all: backward solves are compared at the same point.
    exact = solve_fixed_point(f, params, x, solver=Anderson(tol=1e-6, max_iter=200)).value
    directions: Part = {"forward": {}, "backward": {}}
    for name, solver in solvers.items():
        forward = solve_fixed_point(f, params, x, solver=solver)
        backward = solve_adjoint(f, params, x, exact, cotangent, solver=solver)
        print(f"{name}: solved", flush=True)
        directions["forward"][name] = summary(np.asarray(forward.stats.trace))
        directions["backward"][name] = summary(np.asarray(backward.stats.trace))
    return directions


def summary(trace: np.ndarray) -> Part:
    """What is kept of a trace `[evaluations, B]`: counts, and the residuals of three samples."""
    held = hold_after_stop(trace)
    spread = {"smallest": held.min(1), "median": np.median(held, 1), "largest": held.max(1)}
    return {
        "evaluations": [evaluations_until(trace, tol) for tol in CELL_TOLERANCES],
        **{name: [float(f"{value:.3g}") for value in values] for name, values in spread.items()},
    }


def evaluations_until(trace: np.ndarray, tol: float) -> int | None:
    """Evaluations until every sample of a trace `[evaluations, B]` has met `tol`; None if not."""
    met = (np.minimum.accumulate(hold_after_stop(trace), axis=0) <= tol).all(axis=1)
    return int(met.argmax()) + 1 if met.any() else None


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


SLOW = "symmetric 0.1..0.99"
"""The kind of map that is solved to several tolerances; the others to the middle one."""

KINDS: dict[str, tuple[Callable[..., jax.Array], Callable[[np.random.Generator], np.ndarray]]] = {
    SLOW: (affine, lambda rng: symmetric(rng, 0.1, 0.99)),
    "symmetric -0.5..0.95": (affine, lambda rng: symmetric(rng, -0.5, 0.95)),
    "symmetric -1.5..0.9": (affine, lambda rng: symmetric(rng, -1.5, 0.9)),
    "nonsymmetric 0.9": (affine, lambda rng: nonsymmetric(rng, 0.9)),
    "rotations 0.9": (affine, lambda rng: rotations(rng, 0.9)),
    "nonnormal": (affine, nonnormal),
    "tanh, symmetric": (tanh_cell, lambda rng: symmetric(rng, -0.95, 0.95)),
    "tanh, nonsymmetric": (tanh_cell, lambda rng: nonsymmetric(rng, 0.95)),
}


def ridge(config: Config) -> Part:
    """For each kind of map and solver `[mean, largest]` of the evaluations, to each tolerance."""
    solvers: dict[str, Callable[..., Solver]] = {"Picard": Picard}
    for value in config.ridges:
        name = f"Anderson(5), ridge {value:g}" + " (default)" * (value == Anderson().ridge)
        solvers[name] = lambda value=value, **limits: Anderson(5, ridge=value, **limits)
    with jax.enable_x64(True):
        return {kind: _evaluations_of_kind(kind, solvers, config.seeds) for kind in KINDS}


def _evaluations_of_kind(
    kind: str, solvers: Mapping[str, Callable[..., Solver]], seeds: int
) -> Part:
    f, make = KINDS[kind]
    rngs = [np.random.default_rng(seed) for seed in range(seeds)]
    matrices, x = zip(*[(make(rng), rng.normal(size=WIDTH)) for rng in rngs], strict=True)
    tolerances = RIDGE_TOLERANCES if kind == SLOW else RIDGE_TOLERANCES[1:2]
    counts: Part = {}
    for name, make_solver in solvers.items():
        solver = make_solver(tol=tolerances[-1], max_iter=1500, trace=True)
        solution = solve_fixed_point(f, jnp.asarray(matrices), jnp.asarray(x), solver=solver)
        trace = np.asarray(solution.stats.trace)
        counts[name] = []
        for tol in tolerances:
            met = trace <= tol
            needed = met.argmax(0) + 1
            known = met.any(0).all()
            counts[name].append([float(needed.mean()), int(needed.max())] if known else None)
    print(f"{kind}: solved", flush=True)
    return counts


def render(document: Document) -> dict[str, str]:
    """The table of the cell, and the two of the ridges."""
    tables = {"cell": _cell_table, "ridge": _ridge_tables}
    return {
        name: "\n\n".join([*tables[name](part), origin(part["context"])])
        for name, part in document.items()
    }


def _cell_table(part: Part) -> list[str]:
    ways = ("forward", "backward")
    columns = [f"{way} {tol:g}" for way in ways for tol in CELL_TOLERANCES]
    rows = [
        [name, *(_or_dash(n) for way in ways for n in part[way][name]["evaluations"])]
        for name in part["forward"]
    ]
    return [markdown_table(["evaluations to relative residual", *columns], rows)]


def _or_dash(count: int | None) -> str:
    return "-" if count is None else str(count)


def _ridge_tables(part: Part) -> list[str]:
    kinds = {kind: counts for kind, counts in part.items() if kind in KINDS}
    slow = kinds.pop(SLOW, {})

    def cell(count: list[float] | None) -> str:
        return "-" if count is None else f"{count[0]:.0f} ({count[1]})"

    to_tolerances = [[name, *map(cell, counts)] for name, counts in slow.items()]
    of_kinds = [[name, *(cell(kinds[kind][name][0]) for kind in kinds)] for name in slow]
    return [
        markdown_table([SLOW, *(f"{tol:g}" for tol in RIDGE_TOLERANCES)], to_tolerances),
        markdown_table([f"to {RIDGE_TOLERANCES[1]:g}", *kinds], of_kinds),
    ]


def draw(document: Document) -> dict[str, Figure]:
    """The residual curves of the cell, forward beside backward."""
    if "cell" not in document:
        return {}
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, way in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward"), strict=True):
        curves = {
            # Of three samples the median is the middle one, and the band reaches to the others.
            name: np.array([curve["smallest"], curve["median"], curve["largest"]]).T
            for name, curve in document["cell"][way].items()
        }
        plot_residuals(axes, curves, tol=CELL_TOLERANCES[-1], title=way)
    return {"residuals": figure}


STUDY = Study("convergence", render, draw)
MEASURES = {"cell": cell, "ridge": ridge}


if __name__ == "__main__":
    STUDY.run(tyro.cli(Config, description=__doc__), MEASURES)
