"""Temporary memory of a training gradient: flat in iterations, growing with depth in the control.

Compiles the gradient of the tutorial's network for several iteration limits, and that of the
weight-tied control for several depths, and asks the compiler what each needs. Nothing is run.

    python -m experiments.benchmark.memory
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from deq_jax import Anderson
from deq_jax.models.conv_deq import ConvDEQ, WeightTiedConvNet
from experiments.studies.tables import machine


@dataclasses.dataclass(frozen=True)
class Config:
    """What to compile.

    Attributes:
        batch: images of 32x32x3.
        limits: iteration limits of the solver, forward and backward.
        depths: applications of the cell in the control.
    """

    batch: int = 32
    limits: tuple[int, ...] = (10, 50, 200)
    depths: tuple[int, ...] = (5, 10, 20)


def temporary_bytes(model: nnx.Module, batch: int) -> int:
    """`temp_size_in_bytes` of the compiled gradient of a sum of squared logits."""
    definition, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: Any, images: jax.Array) -> jax.Array:
        return (nnx.merge(definition, params, rest, copy=True)(images) ** 2).sum()

    images = jnp.zeros((batch, 32, 32, 3))
    compiled = jax.jit(jax.grad(loss)).lower(params, images).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main() -> None:
    """Prints a Markdown table."""
    config = tyro.cli(Config, description=__doc__)
    print(f"{machine()}; batch {config.batch}\n")
    print("| network | temporary memory, MiB |\n| --- | --- |")
    for limit in config.limits:
        model = ConvDEQ(solver=Anderson(tol=1e-2, max_iter=limit), rngs=nnx.Rngs(0))
        size = temporary_bytes(model, config.batch) / 2**20
        print(f"| DEQ, at most {limit} evaluations | {size:.1f} |", flush=True)
    for depth in config.depths:
        model = WeightTiedConvNet(depth=depth, rngs=nnx.Rngs(0))
        size = temporary_bytes(model, config.batch) / 2**20
        print(f"| weight-tied, {depth} applications | {size:.1f} |", flush=True)


if __name__ == "__main__":
    main()
