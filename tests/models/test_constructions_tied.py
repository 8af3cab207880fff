"""The theorems: weight-tied networks and recurrent backpropagation, against dense solves."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Picard, Status, deq_fixed_point
from deq_jax.models.constructions import (
    RecurrentParams,
    recurrent_backpropagation,
    weight_tied,
)
from tests.models.constructions import (
    EXACT,
    PICARD,
    assert_close,
    hidden_states,
    normal,
    untied,
    weighted,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.usefixtures("x64")

backpropagate = jax.jit(recurrent_backpropagation, static_argnames=("activation", "solver"))


# Weight-tied networks.


@pytest.mark.parametrize(
    ("widths", "activation"),
    [
        ((3, 5, 2, 4), jnp.tanh),
        ((2, 6, 3), jax.nn.relu),
        ((4, 2, 5), jax.nn.sigmoid),
    ],
    ids=["tanh", "relu", "sigmoid"],
)
def test_a_weight_tied_network(widths, activation):
    layers, x = untied(widths), normal(3, widths[0], seed=2)

    def states(layers, x):
        return hidden_states(layers, [activation] * len(layers), x)

    def repeated(layers, x):
        params, cell = weight_tied(layers, activation)
        return cell.unrolled(params, x)

    def equilibrium(layers, x):
        params, cell = weight_tied(layers, activation)
        start = cell.start(x) - 2
        z, stats = deq_fixed_point(cell, params, x, start, solver=EXACT, return_stats=True)
        return cell.output(z), (z, stats)

    def loss(function, layers, x):
        out = function(layers, x)
        out, aux = out if isinstance(out, tuple) else (out, None)
        return weighted(out)[0], (out, aux)

    @jax.jit
    def run(layers, x):
        network = lambda layers, x: states(layers, x)[-1]  # noqa: E731
        of = lambda function: jax.value_and_grad(  # noqa: E731
            functools.partial(loss, function), argnums=(0, 1), has_aux=True
        )(layers, x)
        return of(network), of(repeated), of(equilibrium)

    ((_, (out, _)), gradients), *others = run(layers, x)
    for (_, (other_out, _)), other_gradients in others:
        assert_close((other_out, other_gradients), (out, gradients), 1e-12)
    z, stats = others[1][0][1][1]
    assert_close(z, np.concatenate(states(layers, x), axis=1), 1e-13)
    np.testing.assert_array_equal(stats.iterations, len(layers) + 1)
    np.testing.assert_array_equal(stats.residual, 0)


def test_activations_of_their_own_see_their_own_block():
    layers, x = untied((3, 4, 5, 2)), normal(3, 3, seed=2)
    activations = (jnp.tanh, jax.nn.softmax, lambda h: h)
    params, cell = weight_tied(layers, activations)
    states = hidden_states(layers, activations, x)
    assert_close(cell.unrolled(params, x), states[-1], 1e-14)
    z = jnp.concatenate(states, axis=1)
    assert_close(cell(params, z, x), z, 1e-14)


@pytest.mark.parametrize("depth", [1, 3])
def test_its_depth_is_equal_and_its_width_linear(depth):
    layers, x, width = untied((4,) * (depth + 1)), normal(2, 4, seed=5), 4 * depth
    calls = []
    activations = [lambda u, i=i: calls.append(i) or jnp.tanh(u) for i in range(depth)]
    params, cell = weight_tied(layers, activations)
    assert [leaf.shape for leaf in params] == [(width, width), (4, width), (width,)]
    assert [np.count_nonzero(leaf) for leaf in params] == [16 * (depth - 1), 16, width]
    # As many applications as layers, and no fewer.
    expected = hidden_states(layers, [jnp.tanh] * depth, x)
    assert_close(cell.unrolled(params, x), expected[-1], 1e-14)
    assert calls.count(depth - 1) == depth
    z = cell.start(x)
    for applied in range(depth):
        assert relative_error(cell.output(z), expected[-1]) > 1e-3
        z = cell(params, z, x)
        known = np.concatenate(expected[: applied + 1], axis=1)
        assert_close(z[:, : known.shape[1]], known, 1e-14)


def test_the_matrix_is_made_of_shifted_blocks():
    layers, zeros = untied((1, 2, 3, 1)), np.zeros
    (recurrent, inputs, bias), _ = weight_tied(layers, jnp.tanh)
    (first, a), (second, b), (third, c) = layers
    expected = np.block([
        [zeros((2, 2)), second, zeros((2, 1))],
        [zeros((3, 2)), zeros((3, 3)), third],
        [zeros((1, 2)), zeros((1, 3)), zeros((1, 1))],
    ])  # fmt: skip
    np.testing.assert_array_equal(recurrent, expected)
    np.testing.assert_array_equal(inputs, np.block([[first, zeros((1, 4))]]))
    np.testing.assert_array_equal(bias, np.concatenate([a, b, c]))


def test_training_the_tied_matrices_leaves_the_construction():
    layers, x = untied((3, 4, 2)), normal(3, 3, seed=2)
    params, cell = weight_tied(layers, jnp.tanh)
    gradient = jax.jit(jax.grad(lambda params: (cell.unrolled(params, x) ** 2).sum()))(params)
    assert np.abs(np.where(params.recurrent == 0, gradient.recurrent, 0)).max() > 1e-3


# Recurrent backpropagation.


def fully_connected(activation, params, z, x):
    return activation(z @ params.recurrent + x @ params.input + params.bias)


@functools.cache
def recurrent(activation=jnp.tanh, scale=1.0, unstable=False):
    """Params, input, equilibrium and cotangent."""
    w = -0.4 * (jnp.ones((5, 5)) + jnp.eye(5)) if unstable else normal(5, 5, scale=0.4)
    params = RecurrentParams(w, normal(3, 5, scale=scale), normal(5, scale=scale))
    x, y = normal(4, 3), normal(4, 5)
    cell = functools.partial(fully_connected, activation)
    return params, x, newton_equilibrium(lambda z: cell(params, z, x), 0 * y), y


def dense_gradients(activation, params, x, z, y):
    return implicit_gradient(
        lambda inputs, z: fully_connected(activation, inputs[0], z, inputs[1]), (params, x), z, y
    )


@pytest.mark.parametrize("activation", [jnp.tanh, jax.nn.relu], ids=["tanh", "relu"])
def test_recurrent_backpropagation_is_the_implicit_gradient(activation):
    params, x, z, y = recurrent(activation)
    got = backpropagate(params, x, z, y, activation, solver=PICARD)
    np.testing.assert_array_equal(got.stats.status, Status.CONVERGED)
    assert_close((got.params, got.x), dense_gradients(activation, params, x, z, y), 1e-10)


def test_it_is_the_gradient_of_the_layer():
    params, x, z, y = recurrent()
    cell = functools.partial(fully_connected, jnp.tanh)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def implicit(params, x):
        return (y * deq_fixed_point(cell, params, x, 0 * y, solver=PICARD)).sum()

    got = backpropagate(params, x, z, y, jnp.tanh, solver=PICARD)
    assert_close((got.params, got.x), implicit(params, x), 1e-10)


def test_the_error_network_is_that_of_the_papers():
    """Unit by unit and weight by weight, with the derivative of tanh by hand."""
    params, x, z, y = recurrent()
    got = backpropagate(params, x, z, y, jnp.tanh, solver=PICARD)
    w, z, y, e = (np.asarray(array) for array in (params.recurrent, z, y, got.error))
    slope = 1 - z**2
    for b, j in itertools.product(range(4), range(5)):
        back = sum(w[j, i] * slope[b, i] * e[b, i] for i in range(5))
        np.testing.assert_allclose(e[b, j], y[b, j] + back, rtol=1e-10, atol=1e-12)
    for j, i in itertools.product(range(5), range(5)):
        local = sum(z[b, j] * slope[b, i] * e[b, i] for b in range(4))
        np.testing.assert_allclose(got.params.recurrent[j, i], local, rtol=1e-10, atol=1e-14)


def test_errors_that_flow_settle_where_plain_iteration_does_not():
    # Eigenvalues of ∂f/∂z that are real and below -1: the flow is stable, the iteration is not.
    params, x, z, y = recurrent(jnp.sin, scale=0.1, unstable=True)
    assert not backpropagate(params, x, z, y, jnp.sin).stats.converged.any()
    euler = Picard(damping=0.4, tol=1e-12, max_iter=1000)
    got = backpropagate(params, x, z, y, jnp.sin, solver=euler)
    assert_close((got.params, got.x), dense_gradients(jnp.sin, params, x, z, y), 1e-9)


def test_in_a_feed_forward_network_it_is_backpropagation():
    layers, x, y = untied((3, 5, 4, 2)), normal(4, 3, seed=2), normal(4, 2, seed=3)
    params, cell = weight_tied(layers, jnp.tanh)
    states = hidden_states(layers, [jnp.tanh] * 3, x)
    z = jnp.concatenate(states, axis=1)
    cotangent = jnp.zeros_like(z).at[:, -2:].set(y)
    got = backpropagate(params, x, z, cotangent, cell.activation, solver=EXACT)
    np.testing.assert_array_equal(got.stats.iterations, 4)  # three layers, and one to see it
    delta, states = np.asarray(y), [np.asarray(state) for state in (x, *states)]
    blocks = {1: slice(0, 5), 2: slice(5, 9), 3: slice(9, 11)}
    for i in (3, 2, 1):
        delta = delta * (1 - states[i] ** 2)
        columns = blocks[i]
        kernels = got.params.recurrent[blocks[i - 1], columns] if i > 1 else got.params.input[:, :5]
        assert_close(kernels, states[i - 1].T @ delta, 1e-12)
        assert_close(got.params.bias[columns], delta.sum(axis=0), 1e-12)
        delta = delta @ np.asarray(layers[i - 1][0]).T
    assert_close(got.x, delta, 1e-12)


def test_recurrent_backpropagation_under_transformations():
    params, x, z, y = recurrent()
    rule = functools.partial(backpropagate, activation=jnp.tanh, solver=PICARD)
    alone = rule(params, x, z, y)
    both = jax.jit(jax.vmap(lambda y: rule(params, x, z, y).params))(jnp.stack([y, -2 * y]))
    assert_close(jax.tree.map(lambda leaf: leaf[0], both), alone.params, 1e-10)
    assert_close(both.recurrent[1], -2 * alone.params.recurrent, 1e-10)
    # One sample's NaN stays with it.
    spoilt = rule(params, x, z, y.at[1].set(jnp.nan))
    np.testing.assert_array_equal(spoilt.error[2:], alone.error[2:])
    np.testing.assert_array_equal(spoilt.stats.status, [0, Status.DIVERGED, 0, 0])
