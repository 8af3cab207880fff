"""The same gradient on one device and on two that share the batch.

    python experiments/examples/two_devices.py

On a machine without two accelerators the CPU plays two devices. Each device solves its own half
of the batch and stops by itself; gradients of the parameters are summed over the devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, Execution, deq_fixed_point


def f(params, z, x):
    return jnp.tanh(z @ params["w"] + x @ params["u"])


def loss(params, x, execution=Execution()):  # noqa: B008
    z0 = jnp.zeros((len(x), len(params["w"])), x.dtype)
    z, stats = deq_fixed_point(
        f, params, x, z0, solver=Anderson(tol=1e-6), return_stats=True, execution=execution
    )
    return (z**2).mean(), stats.iterations


def main(batch=64, width=32):
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "w": 0.8 * jax.random.normal(keys[0], (width, width)) / width**0.5,
        "u": jax.random.normal(keys[1], (8, width)),
    }
    x = jax.random.normal(keys[2], (batch, 8))

    gradient = jax.jit(jax.grad(loss, has_aux=True), static_argnames="execution")
    expected, _ = gradient(params, x)

    mesh = jax.make_mesh((2,), ("data",))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
        everywhere = jax.device_put(params, NamedSharding(mesh, P()))
        # Plain sharding: one loop, and the devices agree in each trip whether to go on.
        together, _ = gradient(everywhere, sharded)
        # A loop for each device, without any communication inside.
        apart, iterations = gradient(everywhere, sharded, execution=Execution(shard_axis="data"))

    errors = {}
    for name, got in (("one loop", together), ("a loop each", apart)):
        differences = jax.tree.map(
            lambda a, b: jnp.abs(a - b).max() / jnp.abs(b).max(), got, expected
        )
        errors[name] = max(map(float, jax.tree.leaves(differences)))
        print(f"{name}: relative difference from one device {errors[name]:.1e}")
    halves = iterations.reshape(2, -1).max(1)
    print(f"evaluations on each device: {halves.tolist()}")
    return errors


if __name__ == "__main__":
    main()
