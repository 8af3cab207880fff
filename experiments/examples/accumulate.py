"""A large batch in microbatches on two devices, whose gradients meet once a step.

    python experiments/examples/accumulate.py

The network has an equilibrium layer with a batch norm inside, whose statistics are those of a
microbatch on all devices. On a machine without two accelerators the CPU plays two devices.
"""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, Execution, accumulate_gradients
from deq_jax.nnx import DEQ


class Cell(nnx.Module):
    def __init__(self, width, *, rngs):
        self.norm = nnx.BatchNorm(width, axis_name="data", rngs=rngs)
        self.linear = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(0.5 * self.norm(self.linear(z)) + x)


class Network(nnx.Module):
    def __init__(self, features, width, *, rngs):
        self.embed = nnx.Linear(features, width, rngs=rngs)
        # Inside the shard_map of the accumulation each device solves by itself anyway.
        execution = Execution(shard_axis="data")
        cell = Cell(width, rngs=rngs)
        self.layer = DEQ(cell, solver=Anderson(tol=1e-5), execution=execution)
        self.head = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.layer(self.embed(x)))[:, 0]


def main(steps=40, batch=64, features=8, width=16, microbatches=4):
    network = Network(features, width, rngs=nnx.Rngs(0))
    definition, params, state = nnx.split(network, nnx.Param, ...)
    optimizer = optax.adam(1e-2)
    x = jax.random.normal(jax.random.key(0), (batch, features))
    data = {"x": x, "y": jnp.sin(x[:, 0]) * x[:, 1]}

    @jax.jit
    def train_step(params, state, moments, data):
        def loss(params, part, state):
            network = nnx.merge(definition, params, state, copy=True)
            error = ((network(part["x"]) - part["y"]) ** 2).mean()
            return error, nnx.state(network, nnx.Not(nnx.Param))

        gradient = accumulate_gradients(loss, microbatches, shard_axis="data", has_aux=True)
        (error, state), updates = gradient(params, data, state)
        updates, moments = optimizer.update(updates, moments)
        return optax.apply_updates(params, updates), state, moments, error

    mesh = jax.make_mesh((2,), ("data",))
    with jax.set_mesh(mesh):
        data = jax.device_put(data, NamedSharding(mesh, P("data")))
        moments = optimizer.init(params)
        for number in range(steps):
            params, state, moments, error = train_step(params, state, moments, data)
            if number % 10 == 0:
                print(f"step {number}: mean squared error {error:.4f}")
    print(f"step {steps}: mean squared error {error:.4f}")
    return float(error)


if __name__ == "__main__":
    main()
