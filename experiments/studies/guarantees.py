"""A thousand random sets of weights against each guarantee of docs/guarantees.md.

Weights are drawn over several orders of magnitude and put into the family's set, as a training does
after each step. Each draw is an equation of its own. It is solved in float64 by the solver that is
certain to converge, from zeros, and the bound that the page states is compared with what happens.

    python -m experiments.studies.guarantees
    python -m experiments.studies.guarantees --write
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from deq_jax import Picard, Solution, SolveStats, Status, solve_fixed_point
from deq_jax.cells import ConcaveCell
from deq_jax.cells.graph import EIGNNCell, Graph, GraphInput, IGNNCell, MonotoneGraphCell
from deq_jax.cells.monotone import MonotoneConvCell, MonotoneDenseCell, MonotoneMultiTierCell
from deq_jax.cells.multiscale import Lipschitz, MultiscaleCell
from deq_jax.monotone import MonotoneDEQ
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

PyTree = Any

TOL = 1e-6
SOLVER = Picard(tol=TOL, max_iter=100_000)


class Outcome(NamedTuple):
    """What one draw came to.

    Attributes:
        stats: of its solve.
        excess: what was measured, divided by its bound: at most 1 if the guarantee holds.
    """

    stats: SolveStats
    excess: jax.Array


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of cells.

    Attributes:
        build: makes a cell from `param_dtype` and `rngs`.
        exponents: weights are normal numbers times ten to a power, drawn from this range.
        input_shape: of the input of one draw.
        outcome: `outcome(cell, x, key)`, traced; the key is for random states.
        words: what `excess` compares.
    """

    build: Callable[..., nnx.Module]
    exponents: tuple[float, float]
    input_shape: tuple[int, ...]
    outcome: Callable[[Any, jax.Array, jax.Array], Outcome]
    words: str


def _solve(cell: Any, c: PyTree, z0: PyTree, *, batched: bool = True) -> Solution:
    return solve_fixed_point(lambda _, z, c: cell(z, c), (), c, z0, solver=SOLVER, batched=batched)


def _ratio(f: Callable[[PyTree], PyTree], like: PyTree, key: jax.Array) -> jax.Array:
    """`‖f(z) - f(z')‖ / ‖z - z'‖` of two random states, in the Euclidean norm."""
    leaves, structure = jax.tree.flatten(like)
    keys = jax.random.split(key, 2 * len(leaves)).reshape(2, -1)
    a, b = (
        jax.tree.unflatten(
            structure,
            [
                jax.random.normal(k, leaf.shape, leaf.dtype)
                for k, leaf in zip(row, leaves, strict=True)
            ],
        )
        for row in keys
    )
    return _norm(_difference(f(a), f(b))) / _norm(_difference(a, b))


def _difference(a: PyTree, b: PyTree) -> PyTree:
    return jax.tree.map(jnp.subtract, a, b)


def _norm(a: PyTree) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(a)))


def _concave(cell: Any, x: jax.Array, key: jax.Array) -> Outcome:
    """After k steps from zero the residual is at most `r^k / (1 - r^k)`."""
    del key
    for leaf in jax.tree.leaves(nnx.state(cell, nnx.Param), is_leaf=_is_variable):
        leaf[...] = jnp.abs(leaf[...])
    c = cell.inject(x)
    solution = _solve(cell, c, jnp.zeros_like(c))
    most = jnp.ceil(jnp.log(TOL / (1 + TOL)) / jnp.log(cell.rate(c))) + 1
    taken = solution.stats.iterations.astype(most.dtype)
    return Outcome(solution.stats, (taken / most)[0])


def _monotone(cell: Any, x: jax.Array, key: jax.Array) -> Outcome:
    """`<v, (I - W) v> >= m ‖v‖²` for a random v."""
    layer = MonotoneDEQ(cell, solver=SOLVER)
    _, stats = layer(x, return_stats=True)
    leaves, structure = jax.tree.flatten(cell.inject(x))
    keys = jax.random.split(key, len(leaves))
    v = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    w = jax.tree.leaves(cell.multiply(jax.tree.unflatten(structure, v)))
    product = sum(jnp.sum(v * (v - w)) for v, w in zip(v, w, strict=True))
    return Outcome(stats, cell.m * _norm(v) ** 2 / product)


def _lipschitz(cell: Any, x: jax.Array, key: jax.Array) -> Outcome:
    size = x.shape[1:3]
    cell.constrain(size)
    zeros = cell.zeros(x)
    solution = _solve(cell, x, zeros)
    bound = cell.lipschitz_bound(size)
    excess = _ratio(lambda z: cell(z, x), zeros, key) / bound
    return Outcome(solution.stats, jnp.maximum(excess, bound))


_EDGES = np.array([[0, 1, 2, 3, 4, 0, 5], [1, 2, 3, 4, 5, 3, 6]])


def _graph(cell: Any, x: jax.Array, key: jax.Array, *, rate: str) -> Outcome:
    graph = Graph.from_edges(_EDGES, 7, dtype=jnp.float64)
    nnx.update(cell, cell.project(nnx.state(cell, nnx.Param)))
    given = GraphInput(graph, x)
    injection = cell.inject(given)
    solution = _solve(cell, injection, cell.zeros(given), batched=False)

    def f(z: jax.Array) -> jax.Array:
        return cell(z, injection)

    if rate == "kappa":  # contracts in another norm than the Euclidean one
        degrees = np.bincount(np.r_[_EDGES.ravel(), np.arange(7)], minlength=7)
        scale = 1 / np.sqrt(degrees)[:, None]
        a, b = jax.random.normal(key, (2, *x.shape), x.dtype)
        ratio = jnp.abs(scale * (f(a) - f(b))).max() / jnp.abs(scale * (a - b)).max()
        return Outcome(solution.stats, ratio / cell.kappa)
    bound = cell.gamma if rate == "gamma" else 1 - injection.step * cell.monotonicity
    return Outcome(solution.stats, _ratio(f, x, key) / bound)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _concave_family(activation: Any) -> Family:
    return Family(
        functools.partial(ConcaveCell, 6, activation=activation),
        (-5, 5),
        (1, 6),
        _concave,
        "evaluations to the most that `rate` allows",
    )


_STRONGLY = "m ‖v‖² to <v, (I - W) v>"
_DISTANCES = "distances of two images under f to the bound"
_LIPSCHITZ = f"{_DISTANCES}; or the bound itself, if larger"

FAMILIES: dict[str, Family] = {
    "monotone, dense": Family(
        functools.partial(MonotoneDenseCell, 4, 6, m=0.5), (-2, 1), (1, 4), _monotone, _STRONGLY
    ),
    "monotone, convolution": Family(
        functools.partial(MonotoneConvCell, (3, 2, 1), 3, m=0.5),
        (-2, 1),
        (1, 3, 2, 1),
        _monotone,
        _STRONGLY,
    ),
    "monotone, two resolutions": Family(
        functools.partial(MonotoneMultiTierCell, (4, 4, 1), (2, 3), m=0.5),
        (-2, 1),
        (1, 4, 4, 1),
        _monotone,
        _STRONGLY,
    ),
    "pcDEQ-1, tanh": _concave_family("tanh"),
    "pcDEQ-1, softsign": _concave_family("softsign"),
    "pcDEQ-1, relu6": _concave_family("relu6"),
    "pcDEQ-2": _concave_family("sigmoid"),
    "Lipschitz MDEQ": Family(
        functools.partial(MultiscaleCell, (2, 2), expansion=1, groups=1, lipschitz=Lipschitz()),
        (-3, 3),
        (1, 4, 4, 2),
        _lipschitz,
        _LIPSCHITZ,
    ),
    "IGNN": Family(
        functools.partial(IGNNCell, 4),
        (-5, 5),
        (7, 4),
        functools.partial(_graph, rate="kappa"),
        _DISTANCES,
    ),
    "EIGNN": Family(
        functools.partial(EIGNNCell, 4),
        (-5, 5),
        (7, 4),
        functools.partial(_graph, rate="gamma"),
        _DISTANCES,
    ),
    "monotone, graph": Family(
        functools.partial(MonotoneGraphCell, 4),
        (-2, 0.5),
        (7, 4),
        functools.partial(_graph, rate="monotonicity"),
        _DISTANCES,
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to study.

    Attributes:
        draws: random sets of weights of each family.
    """

    draws: int = 1000


def draw(family: Family, draws: int, seed: int = 0) -> Outcome:
    """What random weights of a family come to; each field has `draws` entries."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        cell = family.build(param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        definition, params, rest = nnx.split(cell, nnx.Param, ...)

        def weights(leaf: jax.Array) -> jax.Array:
            powers = rng.uniform(*family.exponents, (draws,) + (1,) * leaf.ndim)
            return jnp.asarray(10**powers * rng.normal(size=(draws, *leaf.shape)))

        @jax.jit
        @jax.vmap
        def solved(params: PyTree, x: jax.Array, key: jax.Array) -> Outcome:
            return family.outcome(nnx.merge(definition, params, rest, copy=True), x, key)

        x = jnp.asarray(rng.normal(size=(draws, *family.input_shape)))
        keys = jax.random.split(jax.random.key(seed), draws)
        return jax.device_get(solved(jax.tree.map(weights, params), x, keys))


def measure(config: Config) -> Part:
    """The figures of all families."""
    rows = {}
    for name, family in FAMILIES.items():
        stats, excess = draw(family, config.draws)
        converged = (stats.status == Status.CONVERGED).reshape(config.draws)
        rows[name] = {
            "converged": int(converged.sum()),
            "evaluations": [int(np.median(stats.iterations)), int(stats.iterations.max())],
            "excess": float(excess.max()),
            "exponents": list(family.exponents),
            "words": family.words,
        }
        print(name, rows[name], flush=True)
    return {"draws": config.draws, "rows": rows}


def render(document: Document) -> dict[str, str]:
    """The Markdown of each part."""
    return {name: _table(part) for name, part in document.items()}


def _table(part: Part) -> str:
    columns = ["family", "sizes of the weights", f"converged, of {part['draws']:,}"]
    columns += ["evaluations, median / most", "largest ratio that must be at most 1", "ratio of"]
    cells = [
        [
            name,
            "1e{:g} to 1e{:g}".format(*row["exponents"]),
            f"{row['converged']:,}",
            "{:,} / {:,}".format(*row["evaluations"]),
            f"{row['excess']:.3f}",
            row["words"],
        ]
        for name, row in part["rows"].items()
    ]
    return f"{markdown_table(columns, cells)}\n\n{origin(part['context'])}"


STUDY = Study("guarantees", render)


def main() -> None:
    """Measures and prints the table, see `Command`."""
    STUDY.run(tyro.cli(Config, description=__doc__), {"draws": measure})


if __name__ == "__main__":
    main()
