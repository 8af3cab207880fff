"""Traps of Flax (0.12.8), NNX and Linen, that a fixed-point layer can fall into."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Anderson, Picard, deq_fixed_point
from tests.museum.catalogue import defect
from tests.museum.problems import normal, tanh_gradients, tanh_solution
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


class Dense(nnx.Module):
    """`tanh(z W + x)`."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(W))

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w[...] + x)


class LinenDense(nn.Module):
    """`tanh(z W + x)`."""

    @nn.compact
    def __call__(self, z, x):
        return jnp.tanh(z @ self.param("w", lambda _: jnp.asarray(W)) + x)


class Dropped(nnx.Module):
    def __init__(self, rate=0.5):
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(dropout=0))

    def __call__(self, z, x):
        return x + 0.4 * self.dropout(z)


class Normalised(nnx.Module):
    def __init__(self):
        options = {"use_bias": False, "use_scale": False, "param_dtype": jnp.float64}
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-5, **options, rngs=nnx.Rngs(0))
        self.norm.mean = nnx.BatchStat(jnp.zeros(4))
        self.norm.var = nnx.BatchStat(jnp.ones(4))

    def __call__(self, z, x):
        return jnp.tanh(0.4 * self.norm(z)) + x


def normalised(x, z):
    return jnp.tanh(0.4 * (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-5)) + x


@defect(
    "NNX, merge without copy",
    "Dropout in a cell: TraceContextError, cannot mutate RngCount from a different trace level",
    we="the cell is copied into the solve: values and gradients, with one mask for all of it",
)
def test_dropout_in_the_cell():
    x, layer = normal(5, 20), deq_jax.nnx.DEQ(Dropped(), solver=TIGHT)
    definition, state = nnx.split(layer)

    def solve(x):
        return nnx.merge(definition, state, copy=True)(x)

    def both(x):
        z, pullback = jax.vjp(solve, x)
        return z, pullback(jnp.ones_like(z))[0]

    z, gradient = jax.jit(both)(x)
    # z = x + 0.8 z where the mask keeps, z = x where it drops: a mask that changed from one
    # evaluation to the next would give neither 5 nor 1.
    gain = np.asarray(z / x)
    kept = gain > 3
    np.testing.assert_allclose(gain, np.where(kept, 5.0, 1.0), rtol=1e-9)
    np.testing.assert_allclose(gradient, gain, rtol=1e-9)
    assert 0.3 < kept.mean() < 0.7
    first, second = (np.asarray(layer(x) / x) > 3 for _ in range(2))
    np.testing.assert_array_equal(first, kept)
    assert (second != first).any()


@defect(
    "torchdeq T17 (torchdeq#13)",
    "a dropout rate of 1 divided by zero, and masks were always float32",
    we="rate 1 drops everything and keeps the state's dtype",
)
def test_dropping_everything():
    x = jnp.asarray(normal(2, 4), jnp.bfloat16)
    loss = lambda x: deq_jax.nnx.DEQ(Dropped(1.0), solver=Picard())(x).sum()  # noqa: E731
    z, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert gradient.dtype == z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(gradient), 1)
    np.testing.assert_array_equal(np.float32(z), np.float32(x.sum()))


@defect(
    "NNX, merge without copy",
    "BatchNorm in a cell: TraceContextError, or statistics that count the iterations of the solver",
    we="statistics are updated once a call, at z*; the gradient goes through those of the batch",
)
def test_batch_norm_in_the_cell():
    layer = deq_jax.nnx.DEQ(Normalised(), solver=Anderson(tol=1e-12, max_iter=100))
    x, y = normal(6, 4), normal(6, 4, seed=2)
    gradient = nnx.jit(nnx.grad(lambda layer, x: jnp.vdot(y, layer(x)), argnums=1))(layer, x)
    z = newton_equilibrium(lambda z: normalised(x, z), jnp.asarray(x))
    assert relative_error(gradient, implicit_gradient(normalised, x, z, y)) < 1e-9
    np.testing.assert_allclose(layer.cell.norm.mean[...], 0.1 * np.mean(z, 0), rtol=1e-9)
    np.testing.assert_allclose(layer.cell.norm.var[...], 0.9 + 0.1 * np.var(z, 0), rtol=1e-9)


@defect(
    "NNX, closing over self.cell",
    "a function that closes over the module inside a custom_vjp: UnexpectedTracerError on grad",
    we="a module may be closed over, or be the params, with the gradient of its parameters",
)
@pytest.mark.parametrize("way", ["closed over", "params", "layer"])
def test_modules_and_gradients(way):
    definition, state = nnx.split(Dense())

    def loss(state, x):
        cell = nnx.merge(definition, state)
        if way == "layer":
            return jnp.vdot(Y, deq_jax.nnx.DEQ(cell, solver=TIGHT)(x))
        f, params = lambda _, z, x: cell(z, x), None
        if way == "params":
            f, params = lambda cell, z, x: cell(z, x), cell
        return jnp.vdot(Y, deq_fixed_point(f, params, x, solver=TIGHT))

    by_state, by_x = jax.jit(jax.grad(loss, (0, 1)))(state, X)
    expected = tanh_gradients(W, X, Y)[1]
    assert relative_error((by_state["w"][...], by_x), expected) < 1e-11


@defect(
    "NNX, tree mode (FLIP 5310)",
    "code that leans on graph references breaks where nnx_graph_mode is off",
    we="split and merge only: the same values and gradients in both modes",
)
@pytest.mark.parametrize("graph", [True, False])
def test_graph_and_tree_mode(graph):
    old = flax.config.nnx_graph_mode, flax.config.nnx_graph_updates
    flax.config.update("nnx_graph_mode", graph)
    flax.config.update("nnx_graph_updates", graph)
    try:
        layer = deq_jax.nnx.DEQ(Dense(), solver=TIGHT)
        definition, state = nnx.split(layer)
        loss = lambda state: jnp.vdot(Y, nnx.merge(definition, state)(X))  # noqa: E731
        gradient = jax.jit(jax.grad(loss))(state)
        z = layer(X)
    finally:
        flax.config.update("nnx_graph_mode", old[0])
        flax.config.update("nnx_graph_updates", old[1])
    np.testing.assert_allclose(z, tanh_solution(W, X), rtol=0, atol=1e-11)
    assert relative_error(gradient["cell"]["w"][...], tanh_gradients(W, X, Y)[1][0]) < 1e-11


@defect(
    "Linen, self.param('cell', cell.init)",
    "NameInUseError where the attribute has that name; parameters of the cell nested as one param",
    we="parameters are the cell's own under params/cell, made by one call and no solve",
)
def test_linen_parameter_paths():
    layer = deq_jax.linen.DEQ(cell=LinenDense(), solver=TIGHT)
    z, variables = layer.init_with_output(jax.random.key(0), X)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"cell": {"w": (4, 4)}}}
    np.testing.assert_allclose(z, np.tanh(X), rtol=1e-12)
    twice = nn.Sequential([layer, deq_jax.linen.DEQ(cell=LinenDense(), solver=TIGHT)])
    z, variables = twice.init_with_output(jax.random.key(0), X)
    assert set(variables["params"]) == {"layers_0", "layers_1"}
    z = twice.apply(variables, X)
    np.testing.assert_allclose(z, tanh_solution(W, tanh_solution(W, X)), rtol=0, atol=1e-11)


@defect(
    "Linen, while_loop over a bound module",
    "the forward pass works and the reverse pass is a ValueError",
    we="the cell is unbound and applied as a pure function: exact gradients",
)
def test_linen_gradients():
    layer = deq_jax.linen.DEQ(cell=LinenDense(), solver=TIGHT)

    def loss(w, x):
        return jnp.vdot(Y, layer.apply({"params": {"cell": {"w": w}}}, x))

    gradients = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(-W), X)
    assert relative_error(gradients, tanh_gradients(-W, X, Y)[1]) < 1e-11


class LinenNormalised(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        options = {"use_bias": False, "use_scale": False, "param_dtype": jnp.float64}
        norm = nn.BatchNorm(False, momentum=0.9, epsilon=1e-5, **options, name="norm")
        self.sow("intermediates", "state", z)
        return jnp.tanh(0.4 * norm(z)) + x


@defect(
    "jaxopt's Linen example",
    "the cell's variables went in as one parameter under vmap, so a BatchNorm was impossible",
    we="collections are kept apart: statistics and sown values are those of one call at z*",
)
def test_linen_collections():
    layer = deq_jax.linen.DEQ(LinenNormalised(), solver=Anderson(tol=1e-12, max_iter=100))
    x, y = normal(6, 4), normal(6, 4, seed=2)
    old = {"cell": {"norm": {"mean": jnp.zeros(4), "var": jnp.ones(4)}}}

    def loss(x):
        mutable = ["batch_stats", "intermediates"]
        z, changed = layer.apply({"batch_stats": old}, x, mutable=mutable)
        return jnp.vdot(y, z), changed

    gradient, changed = jax.jit(jax.grad(loss, has_aux=True))(x)
    z = newton_equilibrium(lambda z: normalised(x, z), jnp.asarray(x))
    assert relative_error(gradient, implicit_gradient(normalised, x, z, y)) < 1e-9
    new = changed["batch_stats"]["cell"]["norm"]
    np.testing.assert_allclose(new["mean"], 0.1 * np.mean(z, 0), rtol=1e-9)
    np.testing.assert_allclose(new["var"], 0.9 + 0.1 * np.var(z, 0), rtol=1e-9)
    (sown,) = changed["intermediates"]["cell"]["state"]
    np.testing.assert_allclose(sown, z, rtol=0, atol=1e-10)
