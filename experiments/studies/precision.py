"""Which tolerance each precision can reach: residual floors of every solver, on three cells.

Each solver runs with a tolerance of 0 until its evaluations are used up, and returns the best
iterate z it saw. The residual is then computed anew: f at z in the dtype of the mode, and
`‖f(z) - z‖ / ‖f(z)‖` in float64. The error of z is that against the float64 equilibrium of the
float32 cell, and the error of the gradient that of a random linear function of the equilibrium,
with respect to params and x together, by Anderson forwards and backwards, run to the end as well.

    python -m experiments.studies.precision            # prints the tables
    python -m experiments.studies.precision --write    # and puts them into docs/precision.md
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_jax import (
    Anderson,
    Broyden,
    Execution,
    NewtonKrylov,
    Picard,
    Solver,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import ResNetCell
from deq_jax.precision import cast
from experiments.studies import tables as studies
from experiments.studies.tables import flat, markdown_head, markdown_row, relative_error

PyTree = Any

PAGE = studies.DOCS / "precision.md"
MARKER = "<!-- Below: written by `python -m experiments.studies.precision --write`. -->"

LEGEND = """In the columns of the solvers: the lowest relative
residual, the largest of the batch, and in brackets the evaluations until all samples were within
twice of theirs. The error of z is that of the best solver, that of the gradient is Anderson's."""

MODES = {
    "float32": Execution(),
    "mixed, float16": Execution(cell_dtype=jnp.float16),
    "mixed, bfloat16": Execution(cell_dtype=jnp.bfloat16),
    "all float16": Execution(cell_dtype=jnp.float16, state_dtype=jnp.float16),
    "all bfloat16": Execution(cell_dtype=jnp.bfloat16, state_dtype=jnp.bfloat16),
}
"""Mixed: f in half precision; state, history, residuals and weights in float32."""

SOLVERS: dict[str, Solver] = {
    "Picard": Picard(tol=0.0, max_iter=80, trace=True),
    "Anderson": Anderson(tol=0.0, max_iter=40, trace=True),
    "Broyden": Broyden(tol=0.0, max_iter=40, trace=True),
    "NewtonKrylov": NewtonKrylov(tol=0.0, max_iter=12, trace=True),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A cell in float32, and its exact answers.

    Attributes:
        title: heading of its table.
        f: the cell; its value has the dtype of its arguments.
        params: its parameters.
        x: the input, shaped like the state, `[B, ...]`.
        cotangent: what the equilibrium is multiplied with.
        z: the equilibrium in float64.
        gradient: that with respect to `(params, x)`, one flat float64 vector.
    """

    title: str
    f: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    params: PyTree
    x: jax.Array
    cotangent: jax.Array
    z: jax.Array
    gradient: np.ndarray


def gradient_of(
    f: Any, params: PyTree, x: jax.Array, cotangent: jax.Array, solver: Solver, mode: Execution
) -> np.ndarray:
    """The gradient of `⟨cotangent, z*⟩` with respect to params and x, one flat float64 vector."""

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        z = deq_fixed_point(f, params, x, solver=solver, execution=mode)
        return jnp.vdot(cotangent, z.astype(cotangent.dtype))

    return flat(jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x))


def exact(title: str, f: Any, params: PyTree, x: jax.Array, cotangent: jax.Array) -> Problem:
    """The problem in float32 with its answers by Anderson in float64."""
    params, x, cotangent = cast((params, x, cotangent), np.dtype(np.float32))
    wide = cast((params, x, cotangent), np.dtype(np.float64))
    solver = Anderson(tol=1e-12, max_iter=500)
    z, stats = solve_fixed_point(f, *wide[:2], solver=solver)
    if not stats.converged.all():
        raise RuntimeError(f"{title}: the float64 equilibrium was not found")
    gradient = gradient_of(f, *wide, solver, Execution())
    return Problem(title, f, params, x, cotangent, z, gradient)


def attention_cell(params: dict[str, jax.Array], z: jax.Array, x: jax.Array) -> jax.Array:
    """A post-norm transformer block with one head, `[B, T, D]`.

    As usual in half precision, softmax and normalisation are computed in at least float32.
    """
    wide = jnp.promote_types(z.dtype, jnp.float32)

    def norm(values: jax.Array) -> jax.Array:
        values = values.astype(wide)
        centred = values - values.mean(-1, keepdims=True)
        return (centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)).astype(z.dtype)

    query, key, value = (z @ params[name] for name in ("query", "key", "value"))
    scores = jnp.einsum("btd,bsd->bts", query, key).astype(wide) / np.sqrt(z.shape[-1])
    weights = jax.nn.softmax(scores).astype(z.dtype)
    hidden = norm(x + weights @ value)
    return norm(hidden + jax.nn.gelu(hidden @ params["up"]) @ params["down"])


def problems(seed: int) -> list[Problem]:
    """A dense cell, a convolutional residual cell and a transformer block."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> jax.Array:
        return jnp.asarray(scale * rng.normal(size=shape))

    weights = rng.normal(size=(64, 64))
    dense = exact(
        "Dense tanh cell, 64 wide, ‖W‖ = 0.9",
        lambda params, z, x: jnp.tanh(z @ params + x),
        jnp.asarray(0.9 * weights / np.linalg.norm(weights, 2)),
        normal(16, 64, scale=0.5),
        normal(16, 64),
    )

    cell = ResNetCell(8, 12, groups=4, rngs=nnx.Rngs(seed))
    definition, params = nnx.split(cell)
    params = jax.tree.map(lambda leaf: 2 * leaf if leaf.ndim == 4 else leaf, nnx.as_pure(params))
    convolutional = exact(
        "Residual convolution cell, 6x6x8",
        lambda params, z, x: nnx.merge(definition, params)(z, x),
        params,
        normal(4, 6, 6, 8),
        normal(4, 6, 6, 8),
    )

    shapes = dict.fromkeys(("query", "key", "value"), (32, 32))
    shapes |= {"up": (32, 64), "down": (64, 32)}
    transformer = exact(
        "Transformer block, 8 tokens of 32",
        attention_cell,
        {name: normal(*shape, scale=0.5 / shape[0] ** 0.5) for name, shape in shapes.items()},
        normal(8, 8, 32),
        normal(8, 8, 32),
    )
    return [dense, convolutional, transformer]


@dataclasses.dataclass(frozen=True)
class Floor:
    """Where one solver got in one mode.

    Attributes:
        residual: relative residual of the returned state, the largest of the batch.
        evaluations: until all samples were within twice the lowest residual they saw.
        error: of z, `‖z - z_exact‖ / ‖z_exact‖`.
    """

    residual: float
    evaluations: int
    error: float


def measure(problem: Problem, solver: Solver, mode: Execution) -> Floor:
    """Solves the problem once."""
    z, stats = solve_fixed_point(
        problem.f, problem.params, problem.x, solver=solver, execution=mode
    )
    dtype = mode.cell_dtype or np.dtype(np.float32)
    params, x, given = cast((problem.params, problem.x, z), dtype)
    flat_z, flat_fz, flat_exact = (
        np.asarray(values, np.float64).reshape(len(x), -1)
        for values in (z, jax.jit(problem.f)(params, given, x), problem.z)
    )
    residuals = np.linalg.norm(flat_fz - flat_z, axis=1) / np.linalg.norm(flat_fz, axis=1)
    trace = np.asarray(stats.trace)
    reached = trace <= 2 * np.nanmin(trace, axis=0)
    return Floor(
        residual=float(residuals.max()),
        evaluations=int(reached.argmax(0).max()) + 1,
        error=relative_error(flat_z, flat_exact),
    )


def table(problem: Problem) -> str:
    """The Markdown table of one problem; prints each line as it is measured."""
    lines = [
        f"## {problem.title}\n",
        markdown_head(["mode", *SOLVERS, "error of z", "error of the gradient"]),
    ]
    print("\n".join(lines))
    for name, mode in MODES.items():
        floors = [measure(problem, solver, mode) for solver in SOLVERS.values()]
        cells = [f"{floor.residual:.0e} ({floor.evaluations})" for floor in floors]
        gradient = gradient_of(
            problem.f, problem.params, problem.x, problem.cotangent, SOLVERS["Anderson"], mode
        )
        best = min(floor.error for floor in floors)
        cells += [f"{best:.0e}", f"{relative_error(gradient, problem.gradient):.0e}"]
        lines.append(markdown_row([name, *cells]))
        print(lines[-1], flush=True)
    print()
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; with `--write` puts them into the page, below what is written there."""
    config = studies.start(__doc__)
    tables = [table(problem) for problem in problems(config.seed)]
    if config.write:
        studies.write_below(PAGE, MARKER, [f"{studies.origin(config)}. {LEGEND}", *tables])


if __name__ == "__main__":
    main()
