"""How fast Picard and Anderson converge on the tutorial's residual cell, forward and backward.

Plots the relative residual against evaluations at the cell's random initialisation and prints a
table. Writes `residuals.png`, `table.md` and `config.json` to the output folder.

    python -m experiments.studies.convergence
"""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from flax import nnx
from matplotlib.figure import Figure

from deq_jax import Anderson, Picard, Solver, solve_adjoint, solve_fixed_point
from deq_jax.cells import ResNetCell
from deq_jax.plotting import hold_after_stop, plot_residuals

TOLERANCES = (1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class Config:
    """The tutorial's setting by default.

    Attributes:
        channels: channels of the state.
        inner_channels: channels inside the cell's branch.
        size: height and width of the state.
        batch: samples.
        tol: relative residual at which a sample stops, forward and backward.
        max_iter: most evaluations.
        histories: window sizes of Anderson at mixing 1.
        mixings: mixings of Anderson at a history of 5.
        seed: of weights, inputs and cotangent.
        output: folder for the figure, the table and the configuration.
    """

    channels: int = 64
    inner_channels: int = 128
    size: int = 32
    batch: int = 10
    tol: float = 1e-4
    max_iter: int = 100
    histories: tuple[int, ...] = (2, 5, 10)
    mixings: tuple[float, ...] = (0.5, 2.0)
    seed: int = 0
    output: Path = Path("runs/convergence")


def solvers(config: Config) -> dict[str, Solver]:
    """The solvers to compare, by the name they have in the table."""
    limits = {"tol": config.tol, "max_iter": config.max_iter, "trace": True}
    chosen: dict[str, Solver] = {"Picard": Picard(**limits)}
    for history in config.histories:
        chosen[f"Anderson({history})"] = Anderson(history, **limits)
    for mixing in config.mixings:
        chosen[f"Anderson(5), mixing {mixing:g}"] = Anderson(5, mixing, **limits)
    return chosen


def problem(config: Config) -> tuple[Callable[..., Any], Any, jax.Array, jax.Array]:
    """The cell as a pure function, its parameters, an input and a cotangent, all N(0, 1)."""
    cell = ResNetCell(config.channels, config.inner_channels, rngs=nnx.Rngs(config.seed))
    definition, params = nnx.split(cell)

    def f(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.merge(definition, params)(z, x)

    keys = jax.random.split(jax.random.key(config.seed + 1))
    shape = (config.batch, config.size, config.size, config.channels)
    x, cotangent = (jax.random.normal(key, shape) for key in keys)
    return f, params, x, cotangent


def evaluations_until(trace: np.ndarray, tol: float) -> int | None:
    """Evaluations until every sample of a trace `[evaluations, B]` has met `tol`; None if not."""
    met = (np.minimum.accumulate(hold_after_stop(trace), axis=0) <= tol).all(axis=1)
    return int(met.argmax()) + 1 if met.any() else None


def run(config: Config) -> dict[str, dict[str, np.ndarray]]:
    """Residual traces `[max_iter, B]`, by direction and solver."""
    f, params, x, cotangent = problem(config)
    # One accurate equilibrium for all: backward solves are compared at the same point.
    exact = solve_fixed_point(f, params, x, solver=Anderson(tol=1e-6, max_iter=200)).value
    traces: dict[str, dict[str, np.ndarray]] = {"forward": {}, "backward": {}}
    for name, solver in solvers(config).items():
        started = time.perf_counter()
        forward = solve_fixed_point(f, params, x, solver=solver)
        backward = solve_adjoint(f, params, x, exact, cotangent, solver=solver)
        traces["forward"][name] = np.asarray(forward.stats.trace)
        traces["backward"][name] = np.asarray(backward.stats.trace)
        print(
            f"{name:24s} {int(forward.stats.evaluations):3d} evaluations forward, "
            f"{int(backward.stats.evaluations):3d} backward, "
            f"{time.perf_counter() - started:.1f} s with compilation",
            flush=True,
        )
    return traces


def table(traces: dict[str, dict[str, np.ndarray]]) -> str:
    """Markdown: evaluations until every sample has met each tolerance."""
    columns = [f"{direction} {tol:g}" for direction in traces for tol in TOLERANCES]
    lines = [
        "| evaluations to relative residual | " + " | ".join(columns) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for name in traces["forward"]:
        counts = [
            evaluations_until(by_solver[name], tol)
            for by_solver in traces.values()
            for tol in TOLERANCES
        ]
        cells = " | ".join("-" if count is None else str(count) for count in counts)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def figure(traces: dict[str, dict[str, np.ndarray]], tol: float) -> Figure:
    """The residual curves, forward beside backward."""
    drawing = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (direction, by_solver) in zip(
        drawing.subplots(1, 2, sharey=True), traces.items(), strict=True
    ):
        plot_residuals(axes, by_solver, tol=tol, title=direction)
    return drawing


def main() -> None:
    """Runs the comparison, prints the table, writes figure, table and configuration."""
    config = tyro.cli(Config, description=__doc__)
    traces = run(config)
    text = table(traces)
    config.output.mkdir(parents=True, exist_ok=True)
    figure(traces, config.tol).savefig(config.output / "residuals.png", dpi=120)
    (config.output / "table.md").write_text(text + "\n")
    settings = {name: str(value) for name, value in dataclasses.asdict(config).items()}
    (config.output / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    print()
    print(text)
    print(f"\nwritten to {config.output}/")


if __name__ == "__main__":
    main()
