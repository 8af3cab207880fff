"""Flax layers where they are used: on shards, in scans, checkpoints, accumulation and pipelines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Execution, Picard
from tests.reference import relative_error

F64 = {"param_dtype": jnp.float64}
SOLVER = Picard(tol=1e-15, max_iter=150)
SHARDED = Execution(shard_axis="data")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("x64", "standard_promotion"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning"),
]


def mesh(*shape, names=("data", "model"), kind=AxisType.Auto):
    shape = shape or (4,)
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(kind,) * len(shape))


def normal(*shape, seed=0, scale=1.0):
    return scale * jnp.asarray(np.random.default_rng(seed).normal(size=shape))


class Cell(nnx.Module):
    """With a batch norm, a dropout, a counter and things sown.

    With 2 features and 2 samples a shard no shape tells what is a sample and what a statistic.
    """

    def __init__(self, axis_name=None, features=2, dropout=0.0):
        rngs = nnx.Rngs(0, dropout=1)
        self.norm = nnx.BatchNorm(features, momentum=0.9, axis_name=axis_name, **F64, rngs=rngs)
        self.norm.mean = nnx.BatchStat(0.3 * jnp.ones(features))
        self.norm.var = nnx.BatchStat(jnp.ones(features))
        self.linear = nnx.Linear(features, features, **F64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.most = nnx.BatchStat(jnp.int32(0))

    def __call__(self, z, x):
        z = self.dropout(self.norm(z))
        self.sow(nnx.Intermediate, "activation", z)
        self.sow(nnx.Intermediate, "mean", z.mean(0))
        self.sow(nnx.Intermediate, "layers", jnp.stack([z, 2 * z]))
        self.most.set_value(jnp.maximum(self.most.get_value(), (100 * jnp.abs(z).max()).astype(int)))
        return jnp.tanh(0.3 * self.linear(z) + x)


class LinenCell(nn.Module):
    axis_name: str | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, z, x):
        norm = nn.BatchNorm(False, momentum=0.9, axis_name=self.axis_name, **F64)
        z = nn.Dropout(self.dropout, deterministic=False)(norm(z))
        self.sow("intermediates", "activation", z)
        self.sow("intermediates", "mean", z.mean(0))
        return jnp.tanh(0.3 * nn.Dense(z.shape[-1], **F64)(z) + x)


def nnx_gradient(cell, execution, inject=False):
    """A function of x: value and gradients of a loss, and all state of the layer behind it."""
    layer = deq_jax.nnx.DEQ(cell, solver=SOLVER, execution=execution)
    definition, params, rest = nnx.split(layer, nnx.Param, ...)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x, cotangent):
        layer = nnx.merge(definition, params, rest, copy=True)
        z = layer(x)
        state = nnx.to_pure_dict(nnx.state(layer, nnx.Not(nnx.Param)))
        return jnp.vdot(cotangent, z), (z, jax.tree.map(raw, state))

    return functools.partial(jax.jit(loss), params)


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def linen_gradient(cell, execution):
    layer = deq_jax.linen.DEQ(cell, solver=SOLVER, execution=execution)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(2)}, inputs()[0])

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x, cotangent):
        rngs = {"dropout": jax.random.key(1)}
        changed = ["batch_stats", "intermediates"]
        both = {**variables, "params": params}
        z, written = layer.apply(both, x, mutable=changed, rngs=rngs)
        return jnp.vdot(cotangent, z), (z, {name: written[name]["cell"] for name in changed})

    return functools.partial(jax.jit(loss), variables["params"])


def inputs():
    """Samples and cotangents of different sizes, so that a shard's mean is not that of all."""
    x, cotangent = normal(8, 2), normal(8, 2, seed=2)
    return x * jnp.linspace(0.2, 2, 8)[:, None], cotangent * jnp.linspace(1, 0, 8)[:, None]


def sharded(devices, *arrays):
    return jax.device_put(arrays, NamedSharding(devices, P("data")))


@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_batch_norm_over_shards_is_that_of_the_whole_batch(flax):
    """With a dropout, whose mask in the last call is that of the solve."""
    gradient, cell = (nnx_gradient, Cell) if flax == "nnx" else (linen_gradient, LinenCell)
    expected = gradient(cell(dropout=0.5), Execution())(*inputs())
    with jax.set_mesh(mesh()):
        got = gradient(cell("data", dropout=0.5), SHARDED)(*sharded(mesh(), *inputs()))
    assert relative_error(jax.device_get(got), expected) < 1e-12
    activation = got[0][1][1]["cell" if flax == "nnx" else "intermediates"]["activation"]
    assert activation[0].sharding.spec[0] == "data"
