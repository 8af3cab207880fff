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
from deq_jax import Picard, deq_fixed_point
from tests.museum.problems import normal, tanh_gradients, tanh_solution
from tests.reference import relative_error

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


@pytest.mark.museum(
    "torchdeq T17 (torchdeq#13): a dropout rate of 1 divided by zero, and masks were always float32"
)
def test_dropping_everything():
    x = jnp.asarray(normal(2, 4), jnp.bfloat16)
    loss = lambda x: deq_jax.nnx.DEQ(Dropped(1.0), solver=Picard())(x).sum()  # noqa: E731
    z, gradient = jax.jit(jax.value_and_grad(loss))(x)
    assert gradient.dtype == z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(gradient), 1)
    np.testing.assert_array_equal(np.float32(z), np.float32(x.sum()))


@pytest.mark.museum(
    "NNX, closing over self.cell: a function that closes over the module inside a custom_vjp: "
    "UnexpectedTracerError on grad"
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


@pytest.mark.museum(
    "NNX, tree mode (FLIP 5310): code that leans on graph references breaks where nnx_graph_mode "
    "is off"
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


@pytest.mark.museum(
    "Linen, self.param('cell', cell.init): NameInUseError where the attribute has that name; "
    "parameters of the cell nested as one param"
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
