"""What rounding does to the gradient of `Reversed()`, whose iterates are computed again backwards.

The gradient of a random linear function of the returned iterate by params and x, for a dense cell
with float32 weights, against backpropagation through the stored pair of the paper in float64. The
state is kept in one, two or as many float32 numbers as `Reversible` takes by itself, or in float64.

    python -m experiments.studies.reversible
    python -m experiments.studies.reversible --write
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax

from deq_jax import BackwardProbe, Execution, Reversed, Reversible, deq_fixed_point
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

PyTree = Any

STATES = {
    "one float32": {"components": 1},
    "two float32": {"components": 2},
    "as many float32 as needed": {"components": None},
    "float64": {"components": 1, "wide": True},
}


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to measure.

    Attributes:
        width: of the cell `tanh(W z + x + b)`.
        batch: samples.
        norm: spectral norm of W.
        dampings: β.
        evaluations: evaluations of f, all of which are used.
    """

    width: int = 64
    batch: int = 8
    norm: float = 0.9
    dampings: tuple[float, ...] = (0.5, 0.8)
    evaluations: tuple[int, ...] = (4, 16, 64)


def cell(params: PyTree, z: jax.Array, x: jax.Array) -> jax.Array:
    """A dense cell."""
    return jnp.tanh(z @ params["W"].T + x + params["b"])


def problem(config: Config) -> tuple[PyTree, np.ndarray, np.ndarray]:
    """Params, input and cotangent, numbers of float32 in float64."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(config.width, config.width))
    params = {"W": config.norm * w / np.linalg.norm(w, 2), "b": rng.normal(size=config.width)}
    x, y = rng.normal(size=(2, config.batch, config.width))
    return jax.tree.map(lambda a: np.float64(np.float32(a)), (params, x, y))


def stored(beta: float, evaluations: int, params: PyTree, x: Any, y: Any) -> PyTree:
    """The gradient through the pair itself, of each sample where its residual was lowest."""

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        def both(pair: Any, _: None) -> Any:
            first, second = pair
            first = (1 - beta) * first + beta * cell(params, second, x)
            after = (1 - beta) * second + beta * cell(params, first, x)
            return (first, after), (second, first)

        start = jnp.zeros_like(x), jnp.zeros_like(x)
        _, (seconds, firsts) = lax.scan(both, start, length=evaluations // 2)
        points = jnp.stack([seconds, firsts], 1).reshape(evaluations, *x.shape)
        images = cell(params, points, x)
        norm = functools.partial(jnp.linalg.norm, axis=2)
        best = jnp.argmin(norm(images - points) / norm(images), axis=0)
        return jnp.vdot(y, points[best, jnp.arange(len(x))])

    return jax.jit(jax.grad(loss, (0, 1)))(params, x)


def recomputed(
    solver: Reversible, wide: bool, params: PyTree, x: Any, y: Any
) -> tuple[PyTree, float]:
    """The gradient of `Reversed()`, and how far from the start the way back ended."""
    params, x = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (params, x))
    dtypes = {"state_dtype": jnp.float64, "cell_dtype": jnp.float32} if wide else {}

    def loss(params: PyTree, x: jax.Array, probe: BackwardProbe) -> jax.Array:
        z = deq_fixed_point(
            cell,
            params,
            x,
            solver=solver,
            gradient=Reversed(),
            backward_probe=probe,
            execution=Execution(**dtypes),
        )
        return jnp.vdot(jnp.asarray(y, z.dtype), z)

    probe = BackwardProbe.zeros(len(x))
    *gradient, report = jax.jit(jax.grad(loss, (0, 1, 2)))(params, x, probe)
    return gradient, float(report.residual.max())


def rounding(config: Config) -> Part:
    """Errors of the gradients and of the starts."""
    rows = []
    with jax.enable_x64(True):
        arguments = problem(config)
        for damping in config.dampings:
            for count in config.evaluations:
                made = functools.partial(Reversible, damping, tol=0.0, max_iter=count)
                beta = float(made().factors(jnp.float64)[0])
                expected = jax.tree.leaves(stored(beta, count, *arguments))
                row: dict[str, Any] = {"damping": damping, "evaluations": count}
                for name, options in STATES.items():
                    solver = made(components=options["components"])
                    needed = solver.components_in(jnp.float32)
                    try:
                        got, start = recomputed(solver, "wide" in options, *arguments)
                    except ValueError:  # refused: it is sure to be lost
                        row[name] = None
                        continue
                    pairs = zip(jax.tree.leaves(got), expected, strict=True)
                    error = sum(((np.float64(a) - b) ** 2).sum() for a, b in pairs)
                    size = sum((np.asarray(b) ** 2).sum() for b in expected)
                    row[name] = [float(np.sqrt(error / size)), start, needed]
                rows.append(row)
                print(row, flush=True)
    return {"rows": rows, "norm": config.norm, "width": config.width}


def render(document: Document) -> dict[str, str]:
    """The table, by the name of its part."""
    return {name: table(part) for name, part in document.items()}


def table(part: Part) -> str:
    """A row for each damping and number of evaluations."""

    def shown(name: str, row: dict[str, Any]) -> str:
        if row[name] is None:
            return "refused"
        error, start, needed = row[name]
        many = f", {needed} of them" if "needed" in name else ""
        return f"{error:.0e} ({start:.0e}{many})"

    rows = [
        [f"{row['damping']}", str(row["evaluations"]), *(shown(name, row) for name in STATES)]
        for row in part["rows"]
    ]
    columns = ["β", "evaluations", *STATES]
    return f"{markdown_table(columns, rows)}\n\n{origin(part['context'])}"


STUDY = Study("reversible", render)
MEASURES = {"rounding": rounding}


if __name__ == "__main__":
    STUDY.run(tyro.cli(Config, description=__doc__), MEASURES)
