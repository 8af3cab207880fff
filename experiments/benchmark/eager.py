"""What an eager call of the layer costs over the same call under `jax.jit`.

python -m experiments.benchmark.eager
"""

import statistics

import jax
import jax.numpy as jnp

from deq_jax import deq_fixed_point
from experiments.benchmark.timing import interleaved, report
from experiments.studies.tables import machine


def cell(params: dict[str, jax.Array], z: jax.Array, x: jax.Array) -> jax.Array:
    """`tanh(W z + x + b)`."""
    return jnp.tanh(z @ params["w"].T + x + params["b"])


def main() -> None:
    """Prints the timings and the difference of the medians, values and gradients."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {"w": 0.04 * jax.random.normal(keys[0], (128, 128)), "b": jnp.zeros(128)}
    x = jax.random.normal(keys[1], (64, 128))

    def value(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return deq_fixed_point(cell, params, x)

    def gradient(params: dict[str, jax.Array], x: jax.Array) -> dict[str, jax.Array]:
        return jax.grad(lambda params: (value(params, x) * x).sum())(params)

    print(machine())
    for name, function in {"value": value, "gradient": gradient}.items():
        compiled = jax.jit(function)
        calls = {
            f"{name}, jitted": lambda compiled=compiled: compiled(params, x),
            f"{name}, eager": lambda function=function: function(params, x),
        }
        seconds = interleaved(calls, rounds=15, repeats=20)
        print(report(seconds, f"{name}, jitted"))
        jitted, eager = (statistics.median(times) for times in seconds.values())
        print(f"{name}: eager takes {1e3 * (eager - jitted):.3f} ms more")


if __name__ == "__main__":
    main()
