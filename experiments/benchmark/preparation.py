"""What preparing the transposed product is worth on a residual cell of ordinary convolutions.

Times eight damped transposed products in a loop, with and without preparation, at the size of the
tutorial's training step, and checks that both give the same.

    python -m experiments.benchmark.preparation
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx

from deq_jax import Anderson, deq_fixed_point
from deq_jax.cells import ResNetCell
from deq_jax.closure import Closure
from deq_jax.passes import ready_for_loop
from experiments.benchmark.timing import interleaved, report
from experiments.studies.tables import machine


@dataclasses.dataclass(frozen=True)
class Config:
    """Size and length of the run.

    Attributes:
        channels: channels of the state.
        inner_channels: channels inside the cell's branch.
        size: height and width.
        batch: samples.
        products: transposed products a call.
        rounds: timed turns of each.
    """

    channels: int = 48
    inner_channels: int = 64
    size: int = 32
    batch: int = 32
    products: int = 8
    rounds: int = 5


def main() -> None:
    """Prints the timings, their ratio and the difference of the results."""
    config = tyro.cli(Config, description=__doc__)
    definition, params = nnx.split(
        ResNetCell(config.channels, config.inner_channels, rngs=nnx.Rngs(0))
    )
    shape = (config.batch, config.size, config.size, config.channels)
    x, y = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(1)))

    def f(params: Any, z: jax.Array, x: jax.Array) -> jax.Array:
        return nnx.merge(definition, params)(z, x)

    z = deq_fixed_point(f, params, x, solver=Anderson(tol=1e-2))

    def backward_loop(prepared: bool) -> Any:
        def run(params: Any, z: jax.Array) -> jax.Array:
            _, pullback = jax.vjp(lambda z: f(params, z, x), z)
            product = Closure.of(lambda u: pullback(u)[0], y)
            apply = ready_for_loop(product) if prepared else pullback
            leaf = jax.tree.leaves
            return jax.lax.fori_loop(
                0, config.products, lambda _, u: 0.5 * leaf(apply(u))[0] + y, y
            )

        return jax.jit(run)

    loops = {"unprepared": backward_loop(False), "prepared": backward_loop(True)}
    values = {name: loop(params, z) for name, loop in loops.items()}
    difference = jnp.linalg.norm(values["prepared"] - values["unprepared"])
    print(machine())
    print(f"{config.products} transposed products, {config}")
    calls = {name: (lambda loop=loop: loop(params, z)) for name, loop in loops.items()}
    print(report(interleaved(calls, rounds=config.rounds), "unprepared"))
    print(f"relative difference {difference / jnp.linalg.norm(values['unprepared']):.1e}")


if __name__ == "__main__":
    main()
