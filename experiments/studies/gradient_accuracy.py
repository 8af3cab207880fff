"""How right and how dear each gradient is: solver by policy by dtype, on three problems.

The error is that of the gradient of a random linear function of the equilibrium, with respect to
params and x together, against a dense solve of the implicit function theorem in float64 at the
equilibrium found by dense Newton steps: `‖g - g_exact‖ / ‖g_exact‖`. Forward and backward solves
run to the tolerance of their dtype. The cost is counted in float32: evaluations of f and Jacobian
products forward, and products backward, of the slowest sample.

    python -m experiments.studies.gradient_accuracy       # prints the tables
    python -m experiments.studies.gradient_accuracy --write  # writes docs/gradients.md
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.flatten_util import ravel_pytree

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
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
)
from deq_jax.cells import ResNetCell
from experiments.studies import tables as studies
from experiments.studies.tables import flat, markdown_head, markdown_row, relative_error

PyTree = Any

PAGE = studies.DOCS / "gradients.md"
MARKER = "<!-- Below: written by `python -m experiments.studies.gradient_accuracy --write`. -->"

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


@dataclasses.dataclass(frozen=True)
class Problem:
    """One equation in float64, and what a gradient of it should be.

    Attributes:
        title: heading of its table.
        f: the cell.
        params: its parameters.
        x: the input.
        cotangent: what the equilibrium is multiplied with.
        exact: the gradient with respect to `(params, x)`, one flat vector.
        radius: largest spectral radius of a sample's ∂f/∂z at its equilibrium.
    """

    title: str
    f: Callable[[PyTree, jax.Array, jax.Array], jax.Array]
    params: PyTree
    x: jax.Array
    cotangent: jax.Array
    exact: np.ndarray
    radius: float


def dense_problem(title: str, f: Any, params: PyTree, x: jax.Array, cotangent: Any) -> Problem:
    """Solves the equation and its gradient by dense linear algebra in float64."""
    flat_inputs, unravel = ravel_pytree((params, x))

    def flat_f(flat_inputs: jax.Array, flat_z: jax.Array) -> jax.Array:
        params, x = unravel(flat_inputs)
        return f(params, flat_z.reshape(x.shape), x).ravel()

    by_z = jax.jit(jax.jacrev(flat_f, argnums=1))
    # Close enough for Newton; Anderson's own answer does not enter the result.
    solver = Anderson(tol=1e-6, max_iter=500)
    z = deq_fixed_point(f, params, x, solver=solver).ravel()
    identity = np.eye(z.size)
    for _ in range(10):
        residual = np.asarray(flat_f(flat_inputs, z) - z)
        z = z + np.linalg.solve(identity - np.asarray(by_z(flat_inputs, z)), residual)
    if np.linalg.norm(flat_f(flat_inputs, z) - z) > 1e-11 * np.linalg.norm(z):
        raise RuntimeError(f"{title}: Newton's method did not converge")
    jacobian = np.asarray(by_z(flat_inputs, z))
    u = np.linalg.solve(identity - jacobian.T, np.asarray(cotangent).ravel())
    _, pullback = jax.vjp(lambda flat_inputs: flat_f(flat_inputs, z), flat_inputs)
    radius = float(np.abs(np.linalg.eigvals(jacobian)).max())
    return Problem(title, f, params, x, cotangent, np.asarray(pullback(jnp.asarray(u))[0]), radius)


def problems(seed: int) -> list[Problem]:
    """A smooth dense cell, a convolutional residual cell, and a map that Picard cannot solve."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape))

    weights = rng.normal(size=(32, 32))
    smooth = dense_problem(
        "Smooth dense cell",
        lambda params, z, x: jnp.tanh(z @ params["w"] + x @ params["u"]),
        {"w": jnp.asarray(1.0 * weights / np.linalg.norm(weights, 2)), "u": normal(32, 32) / 6},
        normal(4, 32),
        normal(4, 32),
    )

    cell = ResNetCell(4, 8, groups=2, param_dtype=jnp.float64, rngs=nnx.Rngs(seed))
    definition, params = nnx.split(cell)
    params = jax.tree.map(lambda leaf: 4 * leaf if leaf.ndim == 4 else leaf, nnx.as_pure(params))
    convolutional = dense_problem(
        "Convolutional residual cell",
        lambda params, z, x: nnx.merge(definition, params)(z, x),
        params,
        normal(2, 6, 6, 4),
        normal(2, 6, 6, 4),
    )

    # Negative eigenvalues down to -1.5 under a map that is nearly linear at its equilibrium.
    basis = np.linalg.qr(rng.normal(size=(24, 24)))[0]
    matrix = basis @ np.diag(np.linspace(-1.5, 0.5, 24)) @ basis.T
    expanding = dense_problem(
        "A map with spectral radius 1.5 at its equilibrium",
        lambda params, z, x: (z - x) @ params + 0.1 * jnp.sin(z - x) ** 2 + x,
        jnp.asarray(matrix),
        normal(3, 24),
        normal(3, 24),
    )
    return [smooth, convolutional, expanding]


@dataclasses.dataclass(frozen=True)
class Result:
    """Of one solver with one policy in one dtype.

    Attributes:
        error: relative error of the gradient.
        solved: every sample of the forward solve converged.
        forward: evaluations and products of the forward solve.
        backward: products of the backward solve, from its own report; None where there is none.
    """

    error: float
    solved: bool
    forward: tuple[int, int]
    backward: int | None


def measure(problem: Problem, solver: Solver, policy: GradientPolicy, dtype: str) -> Result:
    """Runs the layer and its gradient once."""

    def cast(values: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), values)

    reports = not isinstance(policy, Phantom | Unrolled)
    probe = BackwardProbe.zeros(problem.x.shape[0]) if reports else None

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
            return jnp.vdot(cast(problem.cotangent), z), stats

        gradients, stats = jax.grad(loss, argnums=(0, 1, 2) if reports else (0, 1), has_aux=True)(
            params, x, probe
        )
        return gradients[:2], stats, gradients[2] if reports else None

    gradient, stats, report = run(cast(problem.params), cast(problem.x), probe)
    products = 0 if stats.products is None else int(stats.products)
    return Result(
        error=relative_error(flat(gradient), problem.exact),
        solved=bool((stats.status == Status.CONVERGED).all()),
        forward=(int(stats.evaluations), products),
        backward=None if report is None else int(report.evaluations),
    )


def table(problem: Problem) -> str:
    """The Markdown table of one problem."""
    lines = [
        f"## {problem.title}\n",
        f"Spectral radius of ∂f/∂z at the equilibrium: {problem.radius:.2f}.\n",
        markdown_head(["solver", "policy", *TOLERANCES, "forward", "backward"]),
    ]
    for solver_name, make_solver in SOLVERS.items():
        for policy_name, make_policy in POLICIES.items():
            if "reuse" in policy_name and solver_name != "Broyden":
                continue
            results = {
                dtype: measure(problem, make_solver(tol), make_policy(tol), dtype)
                for dtype, tol in TOLERANCES.items()
            }
            errors = [
                f"{result.error:.0e}" if result.solved else f"({result.error:.0e})"
                for result in results.values()
            ]
            evaluations, products = results["float32"].forward
            forward = f"{evaluations}" + (f" + {products} products" if products else "")
            backward = results["float32"].backward
            counts = [forward, "-" if backward is None else str(backward)]
            lines.append(markdown_row([solver_name, f"`{policy_name}`", *errors, *counts]))
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    """Prints the tables; with `--write` puts them into the page, below what is written there."""
    config = studies.start(__doc__)
    tolerances = ", ".join(f"{tol:g} in {dtype}" for dtype, tol in TOLERANCES.items())
    asked = f"Relative residual asked of both solves: {tolerances}."
    tables = [table(problem) for problem in problems(config.seed)]
    if config.write:
        studies.write_below(PAGE, MARKER, [f"{studies.origin(config)}. {asked}", *tables])


if __name__ == "__main__":
    main()
