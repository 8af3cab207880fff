"""How exact gradients and equilibria are: against the float64 reference, on small problems.

Part `gradients`: the error of every gradient policy with every solver in four dtypes, and its cost.
Forward and backward solves run to the tolerance of their dtype. The cost is counted in float32:
evaluations of f and Jacobian products forward, and products backward, of the slowest sample.

Part `precision`: the residual that each solver reaches with half precision inside. Each runs with a
tolerance of 0 until its evaluations are used up and returns the best iterate z. The residual is
computed anew: f at z in the dtype of the mode, and `‖f(z) - z‖ / ‖f(z)‖` in float64.

The gradient is that of a random linear function of the equilibrium, with respect to params and x
together; the error is `‖g - g_exact‖ / ‖g_exact‖`.

    python -m experiments.studies.accuracy                      # prints the tables
    python -m experiments.studies.accuracy precision --write    # and puts one into its page
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax.flatten_util import ravel_pytree

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Execution,
    GradientPolicy,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Solver,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import ResNetCell
from experiments.benchmark.referee import norms
from experiments.benchmark.reference import equilibrium, implicit_gradient
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

PyTree = Any
Cell = Callable[[PyTree, jax.Array, jax.Array], jax.Array]

TOLERANCES = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2, "float16": 2e-3}
"""Relative residual asked of the forward and of the backward solve in each dtype."""

SOLVERS: dict[str, Callable[[float], Solver]] = {
    "Picard": lambda tol: Picard(tol=tol, max_iter=200),
    "Anderson": lambda tol: Anderson(tol=tol, max_iter=200),
    "Broyden": lambda tol: Broyden(tol=tol, max_iter=100),
    "NewtonKrylov": lambda tol: NewtonKrylov(tol=tol, max_iter=40),
}

POLICIES: dict[str, Callable[[float], GradientPolicy]] = {
    "Implicit()": lambda tol: Implicit(),
    "Implicit(GMRES())": lambda tol: Implicit(GMRES(tol=tol)),
    "Implicit(BiCGStab())": lambda tol: Implicit(BiCGStab(tol=tol)),
    "Implicit(reuse=True)": lambda tol: Implicit(reuse=True),
    "Implicit(reuse=True, max_iter=1)": lambda tol: Implicit(reuse=True, max_iter=1),
    "OneStep()": lambda tol: OneStep(),
    "Neumann(5)": lambda tol: Neumann(5),
    "Phantom(5, 0.5)": lambda tol: Phantom(5, 0.5),
    "Unrolled()": lambda tol: Unrolled(),
}

MODES = {
    "float32": Execution(),
    "mixed, float16": Execution(cell_dtype=jnp.float16),
    "mixed, bfloat16": Execution(cell_dtype=jnp.bfloat16),
    "all float16": Execution(cell_dtype=jnp.float16, state_dtype=jnp.float16),
    "all bfloat16": Execution(cell_dtype=jnp.bfloat16, state_dtype=jnp.bfloat16),
}
"""Mixed: f in half precision; state, history, residuals and weights in float32."""

FLOOR_SOLVERS: dict[str, Solver] = {
    "Picard": Picard(tol=0.0, max_iter=80, trace=True),
    "Anderson": Anderson(tol=0.0, max_iter=40, trace=True),
    "Broyden": Broyden(tol=0.0, max_iter=40, trace=True),
    "NewtonKrylov": NewtonKrylov(tol=0.0, max_iter=12, trace=True),
}


FLOORS_LEGEND = """In the columns of the solvers: the lowest relative residual, the largest of the
batch, and in brackets the evaluations until all samples were within twice of theirs. The error of z
is that of the best solver, that of the gradient is Anderson's."""


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to measure.

    Attributes:
        seed: of weights, inputs and cotangents.
    """

    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Problem:
    """One equation in float64, and its exact answers.

    Attributes:
        f: the cell; its value has the dtype of its arguments.
        params: its parameters.
        x: the input, shaped like the state, `[B, ...]`.
        cotangent: what the equilibrium is multiplied with.
        z: the equilibrium.
        gradient: that with respect to `(params, x)`, one flat vector.
    """

    f: Cell
    params: PyTree
    x: jax.Array
    cotangent: jax.Array
    z: jax.Array
    gradient: np.ndarray


def solved(f: Cell, params: PyTree, x: jax.Array, cotangent: jax.Array) -> Problem:
    """The problem with the answers of the float64 reference."""

    def of_inputs(inputs: PyTree, z: jax.Array) -> jax.Array:
        params, x = inputs
        return f(params, z, x)

    z = equilibrium(of_inputs, (params, x), jnp.zeros_like(x))
    gradient = implicit_gradient(of_inputs, (params, x), z, cotangent)
    return Problem(f, params, x, cotangent, z, flat(gradient))


def flat(tree: PyTree) -> np.ndarray:
    """All leaves as one vector in float64."""
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def cast(tree: PyTree, dtype: Any) -> PyTree:
    """All leaves in a dtype."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """`‖values - expected‖ / ‖expected‖`."""
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def residual_cell(
    channels: int, inner: int, groups: int, scale: float, seed: int, dtype: Any
) -> tuple[Cell, PyTree]:
    """The tutorial's cell as a pure function, and its parameters, the kernels scaled."""
    cell = ResNetCell(channels, inner, groups=groups, param_dtype=dtype, rngs=nnx.Rngs(seed))
    definition, params = nnx.split(cell)
    params = nnx.as_pure(params)
    params = jax.tree.map(lambda leaf: scale * leaf if leaf.ndim == 4 else leaf, params)
    return lambda params, z, x: nnx.merge(definition, params)(z, x), params


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    """`N(0, scale²)`."""
    return jnp.asarray(scale * rng.normal(size=shape))


# ---- Part `gradients` ----


def gradient_problems(seed: int) -> dict[str, Problem]:
    """A smooth dense cell, a convolutional residual cell, and a map that Picard cannot solve."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=(32, 32))
    weights = jnp.asarray(weights / np.linalg.norm(weights, 2))
    smooth = solved(
        lambda params, z, x: jnp.tanh(z @ params["w"] + x @ params["u"]),
        {"w": weights, "u": normal(rng, 32, 32) / 6},
        normal(rng, 4, 32),
        normal(rng, 4, 32),
    )
    convolutional = solved(
        *residual_cell(4, 8, 2, 4.0, seed, jnp.float64),
        normal(rng, 2, 6, 6, 4),
        normal(rng, 2, 6, 6, 4),
    )
    # Negative eigenvalues down to -1.5 under a map that is nearly linear at its equilibrium.
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    expanding = solved(
        lambda params, z, x: (z - x) @ params + 0.1 * jnp.sin(z - x) ** 2 + x,
        jnp.asarray(basis @ np.diag(np.linspace(-1.5, 0.5, 24)) @ basis.T),
        normal(rng, 3, 24),
        normal(rng, 3, 24),
    )
    return {
        "Smooth dense cell": smooth,
        "Convolutional residual cell": convolutional,
        "A map with spectral radius 1.5 at its equilibrium": expanding,
    }


def gradients(config: Config) -> Part:
    """For each problem its spectral radius, and a row for each solver with each policy."""
    with jax.enable_x64(True):
        problems = gradient_problems(config.seed)
        return {
            "problems": {
                title: {"radius": spectral_radius(problem), "rows": rows_of(title, problem)}
                for title, problem in problems.items()
            }
        }


def spectral_radius(problem: Problem) -> float:
    """The largest modulus of an eigenvalue of ∂f/∂z at the equilibrium."""
    shape = problem.z.shape
    flat_f = lambda z: problem.f(problem.params, z.reshape(shape), problem.x).ravel()  # noqa: E731
    return float(np.abs(np.linalg.eigvals(jax.jacrev(flat_f)(problem.z.ravel()))).max())


def rows_of(title: str, problem: Problem) -> list[Part]:
    """For each solver and policy: errors in the dtypes of `TOLERANCES`, and the cost in float32."""
    rows = []
    for solver, make_solver in SOLVERS.items():
        for policy, make_policy in POLICIES.items():
            if "reuse" in policy and solver != "Broyden":
                continue
            found = {
                dtype: gradient_error(problem, make_solver(tol), make_policy(tol), dtype)
                for dtype, tol in TOLERANCES.items()
            }
            rows.append(
                {
                    "solver": solver,
                    "policy": policy,
                    "errors": [one["error"] for one in found.values()],
                    "solved": [one["solved"] for one in found.values()],
                    **{k: found["float32"][k] for k in ("evaluations", "products", "backward")},
                }
            )
            print(f"{title}: {solver} with {policy} done", flush=True)
    return rows


def gradient_error(problem: Problem, solver: Solver, policy: GradientPolicy, dtype: str) -> Part:
    """Runs the layer and its gradient once.

    Returns:
        `error` of the gradient; `solved`, whether every sample of the forward solve converged;
        its `evaluations` and `products`; products `backward`, None where nothing reports them.
    """
    reports = not isinstance(policy, Phantom | Unrolled)
    probe = BackwardProbe.zeros(len(problem.x)) if reports else None

    @jax.jit
    def run(params: PyTree, x: jax.Array, probe: BackwardProbe | None) -> tuple[Any, Any, Any]:
        def loss(params: PyTree, x: jax.Array, probe: BackwardProbe | None) -> Any:
            z, stats = deq_fixed_point(
                lambda params, z, x: problem.f(params, z, x).astype(dtype),
                params,
                x,
                solver=solver,
                gradient=policy,
                return_stats=True,
                backward_probe=probe,
            )
            return jnp.vdot(cast(problem.cotangent, dtype), z), stats

        gradients, stats = jax.grad(loss, argnums=(0, 1, 2) if reports else (0, 1), has_aux=True)(
            params, x, probe
        )
        return gradients[:2], stats, gradients[2] if reports else None

    gradient, stats, report = run(cast(problem.params, dtype), cast(problem.x, dtype), probe)
    return {
        "error": relative_error(flat(gradient), problem.gradient),
        "solved": bool((stats.status == Status.CONVERGED).all()),
        "evaluations": int(stats.evaluations),
        "products": 0 if stats.products is None else int(stats.products),
        "backward": None if report is None else int(report.evaluations),
    }


def render_gradients(part: Part) -> list[str]:
    """A table for each problem; in brackets the errors of what was not solved."""
    asked = ", ".join(f"{tol:g} in {dtype}" for dtype, tol in TOLERANCES.items())
    texts = [f"Relative residual asked of both solves: {asked}."]
    for title, problem in part["problems"].items():
        rows = []
        for row in problem["rows"]:
            errors = [
                f"{error:.0e}" if solved else f"({error:.0e})"
                for error, solved in zip(row["errors"], row["solved"], strict=True)
            ]
            products = f" + {row['products']} products" if row["products"] else ""
            backward = "-" if row["backward"] is None else str(row["backward"])
            counts = [f"{row['evaluations']}{products}", backward]
            rows.append([row["solver"], f"`{row['policy']}`", *errors, *counts])
        texts += [
            f"## {title}",
            f"Spectral radius of ∂f/∂z at the equilibrium: {problem['radius']:.2f}.",
            markdown_table(["solver", "policy", *TOLERANCES, "forward", "backward"], rows),
        ]
    return texts


# ---- Part `precision` ----


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


def precision_problems(seed: int) -> dict[str, Problem]:
    """A dense cell, a convolutional residual cell and a transformer block, of float32 weights."""
    rng = np.random.default_rng(seed)

    def rounded(f: Cell, params: PyTree, *arrays: jax.Array) -> Problem:
        params, x, cotangent = cast(cast((params, *arrays), jnp.float32), jnp.float64)
        return solved(f, params, x, cotangent)

    weights = rng.normal(size=(64, 64))
    weights = jnp.asarray(0.9 * weights / np.linalg.norm(weights, 2))
    dense = rounded(
        lambda params, z, x: jnp.tanh(z @ params + x),
        weights,
        normal(rng, 16, 64, scale=0.5),
        normal(rng, 16, 64),
    )
    convolutional = rounded(
        *residual_cell(8, 12, 4, 2.0, seed, jnp.float32),
        normal(rng, 4, 6, 6, 8),
        normal(rng, 4, 6, 6, 8),
    )
    shapes = dict.fromkeys(("query", "key", "value"), (32, 32)) | {"up": (32, 64), "down": (64, 32)}
    transformer = rounded(
        attention_cell,
        {name: normal(rng, *shape, scale=0.5 / shape[0] ** 0.5) for name, shape in shapes.items()},
        normal(rng, 8, 8, 32),
        normal(rng, 8, 8, 32),
    )
    return {
        "Dense tanh cell, 64 wide, ‖W‖ = 0.9": dense,
        "Residual convolution cell, 6x6x8": convolutional,
        "Transformer block, 8 tokens of 32": transformer,
    }


def precision(config: Config) -> Part:
    """For each problem and mode: residuals by solver, and the errors of z and of the gradient."""
    found: dict[str, dict[str, Part]] = {}
    with jax.enable_x64(True):
        for title, problem in precision_problems(config.seed).items():
            for name, mode in MODES.items():
                floors = {s: floor(problem, solver, mode) for s, solver in FLOOR_SOLVERS.items()}
                found.setdefault(title, {})[name] = {
                    "residuals": {s: one["residual"] for s, one in floors.items()},
                    "evaluations": {s: one["evaluations"] for s, one in floors.items()},
                    "error": min(one["error"] for one in floors.values()),
                    "gradient_error": mode_gradient_error(problem, mode),
                }
                print(f"{title}: {name} done", flush=True)
    return {"problems": found}


def floor(problem: Problem, solver: Solver, mode: Execution) -> Part:
    """Solves the problem once.

    Returns:
        The relative `residual` of the returned state, the largest of the batch; the `evaluations`
        until all samples were within twice the lowest residual they saw; the `error` of z.
    """
    params, x = cast((problem.params, problem.x), jnp.float32)
    z, stats = solve_fixed_point(problem.f, params, x, solver=solver, execution=mode)
    fz = jax.jit(problem.f)(*cast((params, z, x), mode.cell_dtype or jnp.float32))
    z, fz = np.asarray(z, np.float64), np.asarray(fz, np.float64)
    trace = np.asarray(stats.trace)
    reached = trace <= 2 * np.nanmin(trace, axis=0)
    return {
        "residual": float((norms(fz - z) / norms(fz)).max()),
        "evaluations": int(reached.argmax(0).max()) + 1,
        "error": relative_error(z.ravel(), flat(problem.z)),
    }


def mode_gradient_error(problem: Problem, mode: Execution) -> float:
    """The error of Anderson's gradient, forwards and backwards run to the end."""
    params, x, cotangent = cast((problem.params, problem.x, problem.cotangent), jnp.float32)

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        solver = FLOOR_SOLVERS["Anderson"]
        z = deq_fixed_point(problem.f, params, x, solver=solver, execution=mode)
        return jnp.vdot(cotangent, z.astype(cotangent.dtype))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    return relative_error(flat(gradient), problem.gradient)


def render_precision(part: Part) -> list[str]:
    """A table for each problem."""
    texts = [FLOORS_LEGEND]
    for title, modes in part["problems"].items():
        rows = [
            [
                name,
                *(f"{one['residuals'][s]:.0e} ({one['evaluations'][s]})" for s in FLOOR_SOLVERS),
                f"{one['error']:.0e}",
                f"{one['gradient_error']:.0e}",
            ]
            for name, one in modes.items()
        ]
        columns = ["mode", *FLOOR_SOLVERS, "error of z", "error of the gradient"]
        texts += [f"## {title}", markdown_table(columns, rows)]
    return texts


def render(document: Document) -> dict[str, str]:
    """The text of each part."""
    renders = {"gradients": render_gradients, "precision": render_precision}
    return {
        name: "\n\n".join([*renders[name](part), origin(part["context"])])
        for name, part in document.items()
    }


STUDY = Study("accuracy", render)
MEASURES = {"gradients": gradients, "precision": precision}


if __name__ == "__main__":
    STUDY.run(tyro.cli(Config, description=__doc__), MEASURES)
