"""State inside the cell of a Flax layer: batch statistics, dropout masks, sown values."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Anderson
from tests.models.test_conv_deq import randomise, weights_of
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

SOLVER = Anderson(tol=1e-12, max_iter=100)
F64 = {"param_dtype": jnp.float64}


pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


class Normalised(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.norm = nnx.BatchNorm(3, momentum=0.9, epsilon=1e-5, **F64, rngs=rngs)
        self.norm.mean = nnx.BatchStat(jnp.zeros(3))
        self.norm.var = nnx.BatchStat(jnp.ones(3))
        self.linear = nnx.Linear(3, 3, use_bias=False, **F64, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(0.3 * self.linear(self.norm(z)) + x)


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, z, x, *, train=True):
        norm = nn.BatchNorm(not train, momentum=0.9, epsilon=1e-5, **F64, name="norm")
        return jnp.tanh(0.3 * nn.Dense(3, use_bias=False, **F64, name="linear")(norm(z)) + x)


def normalised(params, z, x, statistics=None):
    mean, variance = (z.mean(0), z.var(0)) if statistics is None else statistics
    z = (z - mean) / jnp.sqrt(variance + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.tanh(0.3 * (z @ params["linear"]["kernel"]) + x)


@pytest.mark.museum(
    "NNX, merge without copy: BatchNorm in a cell: TraceContextError, or statistics that count "
    "the iterations of the solver"
)
@pytest.mark.museum(
    "jaxopt's Linen example: the cell's variables went in as one parameter under vmap, so a "
    "BatchNorm was impossible"
)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.slow
def test_batch_norm_in_the_cell(train):
    # Statistics mix the samples, whose cotangents differ in size and of which one has none.
    x, cotangent = normal(6, 3), normal(6, 3, seed=2) * jnp.array([[0, 1, 1, 1e-3, 1, 9.0]]).T
    old = {"mean": normal(3, seed=3), "var": jnp.array([0.5, 1.0, 2.0])}
    layer = deq_jax.nnx.DEQ(randomise(Normalised(), kernel_scale=0.6), solver=SOLVER)
    layer.cell.norm.mean[...], layer.cell.norm.var[...] = old["mean"], old["var"]
    if not train:
        layer.eval()
    params = weights_of(layer.cell)
    definition, state, rest = nnx.split(layer, nnx.Param, ...)

    def nnx_loss(state, x):
        layer = nnx.merge(definition, state, rest, copy=True)
        z = layer(x)
        return jnp.vdot(cotangent, z), (z, nnx.to_pure_dict(nnx.state(layer, nnx.BatchStat)))

    def linen_loss(params, x):
        variables = {"params": {"cell": params}, "batch_stats": {"cell": {"norm": old}}}
        layer = deq_jax.linen.DEQ(LinenNormalised(), solver=SOLVER)
        z, changed = layer.apply(variables, x, train=train, mutable=["batch_stats"])
        return jnp.vdot(cotangent, z), (z, changed["batch_stats"])

    formula = lambda inputs, z: normalised(  # noqa: E731
        inputs[0], z, inputs[1], None if train else (old["mean"], old["var"])
    )
    z = newton_equilibrium(lambda z: formula((params, x), z), x)
    expected = implicit_gradient(formula, (params, x), z, cotangent)
    new = {name: np.asarray(value) for name, value in old.items()}
    if train:
        at_z = {"mean": np.asarray(z).mean(0), "var": np.asarray(z).var(0)}
        new = {name: 0.9 * new[name] + 0.1 * at_z[name] for name in new}
    for loss, start in ((nnx_loss, state), (linen_loss, params)):
        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (by_params, by_x), (value, statistics) = gradient(start, x)
        if loss is nnx_loss:
            by_params = nnx.to_pure_dict(by_params)["cell"]
        assert relative_error(value, z) < 1e-10
        assert relative_error((by_params, by_x), expected) < 1e-8
        assert relative_error(statistics["cell"]["norm"], new) < 1e-10


@pytest.mark.slow
def test_linen_keeps_statistics_it_may_not_change():
    layer, x = deq_jax.linen.DEQ(LinenNormalised(), solver=SOLVER), normal(6, 3)
    variables = layer.init(jax.random.key(0), x)
    trained, _ = layer.apply(variables, x, mutable=["batch_stats"])
    assert relative_error(layer.apply(variables, x, train=False), trained) > 1e-3
    # As any Linen layer: an update that would be lost is an error.
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        layer.apply(variables, x)


class Dropped(nnx.Module):
    def __init__(self):
        self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=0))

    def __call__(self, z, x):
        return x + 0.4 * self.dropout(z)


class LinenDropped(nn.Module):
    @nn.compact
    def __call__(self, z, x, *, train=True):
        return x + 0.4 * nn.Dropout(0.5, deterministic=not train)(z)


def linen_dropout(key):
    return lambda x, **options: deq_jax.linen.DEQ(LinenDropped(), solver=SOLVER).apply(
        {}, x, rngs={"dropout": jax.random.key(key)}, **options
    )


def solved_with_one_mask(layer, x):
    """Where `z = x + 0.4 m z / 0.5` kept its elements: there, z = 5 x, and z = x elsewhere."""
    z, pullback, stats = jax.vjp(lambda x: layer(x, return_stats=True), x, has_aux=True)
    assert stats.converged.all()
    gain = np.asarray(z / x)
    kept = gain > 3
    np.testing.assert_allclose(gain, np.where(kept, 5, 1), rtol=1e-9)
    np.testing.assert_allclose(pullback(jnp.ones_like(x))[0], gain, rtol=1e-9)
    assert 0.3 < kept.mean() < 0.7
    assert len({row.tobytes() for row in kept}) == len(kept)
    return kept


@pytest.mark.slow
@pytest.mark.museum(
    "NNX, merge without copy: Dropout in a cell: TraceContextError, cannot mutate RngCount from a"
    " different trace level"
)
def test_dropout_has_one_mask_a_call():
    x, layer = normal(5, 20), deq_jax.nnx.DEQ(Dropped(), solver=SOLVER)
    definition, state = nnx.split(layer)
    pure = lambda x, **options: nnx.merge(definition, state, copy=True)(x, **options)  # noqa: E731
    masks = [solved_with_one_mask(pure, x), solved_with_one_mask(linen_dropout(0), x)]
    np.testing.assert_array_equal(masks[0], solved_with_one_mask(pure, x))  # the same state

    calls = [np.asarray(layer(x) / x) > 3 for _ in range(3)]
    np.testing.assert_array_equal(calls[0], masks[0])
    assert (calls[0] != calls[1]).any()
    assert (calls[1] != calls[2]).any()
    assert (masks[1] != solved_with_one_mask(linen_dropout(1), x)).any()

    layer.eval()
    np.testing.assert_allclose(layer(x), x / 0.6, rtol=1e-9)
    np.testing.assert_allclose(linen_dropout(0)(x, train=False), x / 0.6, rtol=1e-9)


class LinenSown(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        self.sow("intermediates", "state", z)
        return jnp.tanh(0.5 * jnp.roll(z, 1, axis=1) + x)


@pytest.mark.museum(
    "jaxopt's Linen example: the cell's variables went in as one parameter under vmap, so a "
    "BatchNorm was impossible"
)
def test_sow_keeps_the_value_at_the_equilibrium():
    x, layer = normal(4, 3), deq_jax.linen.DEQ(LinenSown(), solver=SOLVER)
    z, changed = layer.apply({}, x, mutable=["intermediates"])
    (sown,) = changed["intermediates"]["cell"]["state"]
    np.testing.assert_array_equal(sown, z)


@pytest.mark.parametrize("way", ["nnx.jit", "nnx.grad", "nnx.jit of nnx.grad"])
@pytest.mark.slow
def test_nnx_transformations_with_state(way):
    x, cotangent = normal(6, 3), normal(6, 3, seed=2)
    layer = deq_jax.nnx.DEQ(randomise(Normalised(), kernel_scale=0.6), solver=SOLVER)
    params = weights_of(layer.cell)
    formula = lambda params, z: normalised(params, z, x)  # noqa: E731
    z = newton_equilibrium(lambda z: formula(params, z), x)

    def loss(layer, x) -> Any:
        return jnp.vdot(cotangent, layer(x))

    if way == "nnx.jit":
        assert relative_error(nnx.jit(lambda layer, x: layer(x))(layer, x), z) < 1e-10
    else:
        gradient = nnx.grad(loss)
        gradients = (gradient if way == "nnx.grad" else nnx.jit(gradient))(layer, x)
        expected = implicit_gradient(formula, params, z, cotangent)
        assert relative_error(nnx.to_pure_dict(gradients)["cell"], expected) < 1e-8
    np.testing.assert_allclose(layer.cell.norm.mean[...], 0.1 * np.asarray(z).mean(0), rtol=1e-9)
