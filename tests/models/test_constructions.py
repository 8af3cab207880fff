"""The theorems: constructions against the networks they stand for, and against dense solves."""

import functools
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_jax import (
    Anderson,
    BackwardProbe,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.models.constructions import (
    RecurrentParams,
    compose,
    recurrent_backpropagation,
    stacked_layers,
    weight_tied,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.usefixtures("x64")

PICARD = Picard(tol=1e-12, max_iter=300)
ANDERSON = Anderson(tol=1e-11, max_iter=100)
EXACT = Picard(tol=0.0, max_iter=9)
backpropagate = jax.jit(recurrent_backpropagation, static_argnames=("activation", "solver"))
GUIDE = (Path(__file__).parents[2] / "docs" / "constructions.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng([seed, *shape]).normal(size=shape))


def assert_close(got, expected, tolerance):
    """Leaf by leaf, so that a large one hides no small one."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * (1e-3 + np.abs(e).max()))


def weighted(out):
    """A loss in which every output counts differently, and its cotangent."""
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape)
    return (weights * out**2).sum(), 2 * weights * out


def value_and_gradients(function, params, x):
    def loss(params, x):
        out = function(params, x)
        return weighted(out)[0], out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(params, x)
    return out, gradients


# Networks in layers, and the same applied one after the other.


def dense(params, h):
    return h @ params["kernel"] + params["bias"]


def dense_tanh(params, h):
    return jnp.tanh(dense(params, h))


def convolution(params, h, stride=1):
    layout = ("NHWC", "HWIO", "NHWC")
    return jnp.tanh(
        jax.lax.conv_general_dilated(h, params, (stride, stride), "SAME", dimension_numbers=layout)
    )


def split(params, h):
    """A layer that hands on a pytree: a branch, and what skips it."""
    return {"branch": params * jnp.sin(h), "skip": h}


def join(params, h):
    return (h["branch"] + params["gain"] * h["skip"]).mean((1, 2)) @ params["head"]


def mlp():
    """Weights far from a contraction."""
    params = [
        {"kernel": normal(*shape, scale=3.0), "bias": normal(shape[1], seed=1)}
        for shape in itertools.pairwise((3, 5, 4, 2))
    ]
    return [dense_tanh, dense_tanh, dense], params, normal(4, 3, seed=2)


def conv_net():
    layers = [convolution, functools.partial(convolution, stride=2), split, join]
    head = {"gain": jnp.asarray(0.6), "head": normal(2, 3)}
    params = [normal(3, 3, 2, 3), normal(3, 3, 3, 2), jnp.asarray(1.7), head]
    return layers, params, normal(2, 5, 4, 2, seed=2)


def in_turn(layers, params, x):
    for layer, own in zip(layers, params, strict=True):
        x = layer(own, x)
    return x


@pytest.mark.parametrize(
    ("network", "solver"), [(mlp, ANDERSON), (conv_net, PICARD)], ids=["mlp", "conv_net"]
)
def test_a_network_is_an_equilibrium(network, solver):
    layers, params, x = network()
    cell = stacked_layers(layers)

    def equilibrium(params, x):
        start, gradient = cell.start(params, x), Implicit(PICARD)
        return deq_fixed_point(cell, params, x, start, solver=solver, gradient=gradient)[-1]

    got = value_and_gradients(equilibrium, params, x)
    expected = value_and_gradients(functools.partial(in_turn, layers), params, x)
    assert_close(got, expected, 1e-8)


@pytest.mark.parametrize("solver", [Broyden(tol=1e-10), NewtonKrylov(tol=1e-10)])
def test_other_solvers_find_all_intermediate_results(solver):
    layers, params, x = mlp()
    cell = stacked_layers(layers)
    z = solve_fixed_point(cell, params, x, cell.start(params, x), solver=solver).value
    hidden = [in_turn(layers[:depth], params[:depth], x) for depth in (1, 2, 3)]
    assert_close(z, tuple(hidden), 1e-9)


@pytest.mark.parametrize("depth", [1, 3])
def test_a_network_takes_as_many_iterations_as_it_has_layers(depth):
    layers, params, x = mlp()
    layers, params = layers[:depth], params[:depth]
    cell, network = stacked_layers(layers), in_turn(layers, params, x)
    start = jax.tree.map(lambda z: z + 1, cell.start(params, x))

    def solve(probe):
        z, stats, samples = deq_fixed_point(
            cell, params, x, start, solver=EXACT, return_stats=True, backward_probe=probe,
            sample_at=(depth, depth + 1), sample_gradient=None,
        )  # fmt: skip
        return z[-1].sum(), (stats, samples)

    report, (stats, samples) = jax.jit(jax.grad(solve, has_aux=True))(BackwardProbe.zeros(4))
    # The state that is evaluated last has seen L applications, and does not change any more.
    np.testing.assert_array_equal(stats.iterations, depth + 1)
    np.testing.assert_array_equal(stats.residual, 0)
    assert relative_error(samples[1][-1], network) < 1e-14
    assert relative_error(samples[0][-1], network) > 1e-3
    # Backwards it is backpropagation, layer by layer.
    np.testing.assert_array_equal(report.residual, 0)
    np.testing.assert_array_equal(report.iterations, depth)


def test_the_jacobian_is_nilpotent():
    layers, params, x = mlp()
    cell = stacked_layers(layers)
    flat, unravel = ravel_pytree(jax.tree.map(lambda z: z[0] + 0.3, cell.start(params, x)))

    def flat_cell(flat):
        return ravel_pytree(cell(params, unravel(flat), x[0]))[0]

    jacobian = np.asarray(jax.jit(jax.jacfwd(flat_cell))(flat))
    assert np.linalg.norm(jacobian, 2) > 3
    assert np.linalg.norm(np.linalg.matrix_power(jacobian, 2)) > 1
    assert not np.linalg.matrix_power(jacobian, 3).any()


def test_vmap_over_weights():
    layers, params, x = mlp()
    cell = stacked_layers(layers)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.5 * leaf]), params)

    @jax.jit
    @jax.vmap
    def output(params):
        return deq_fixed_point(cell, params, x, cell.start(params, x), solver=PICARD)[-1]

    expected = [in_turn(layers, jax.tree.map(lambda a, i=i: a[i], several), x) for i in range(2)]
    assert_close(output(several), np.stack(expected), 1e-12)


def test_a_layer_that_is_not_finite_at_zero():
    layers = [lambda p, h: p * h, lambda p, h: h / jnp.linalg.norm(h, axis=-1, keepdims=True)]
    x, params, cell = normal(2, 3), [jnp.asarray(2.0), None], stacked_layers(layers)
    zeros = cell.start(params, x)
    spoilt = solve_fixed_point(cell, params, x, zeros, solver=PICARD)
    np.testing.assert_array_equal(spoilt.stats.status, Status.DIVERGED)
    fine = solve_fixed_point(cell, params, x, jax.tree.map(jnp.ones_like, zeros), solver=PICARD)
    assert_close(fine.value[-1], in_turn(layers, params, x), 1e-14)


# Stacked equilibria.


def lower(params, z, x):
    """Two leaves that feed each other."""
    return {
        "a": jnp.tanh(z["b"] @ params["ab"] + x["left"]),
        "b": jnp.sin(z["a"] @ params["ba"] + x["right"]),
    }


def upper(params, z, below):
    return jnp.tanh(z @ params[0] + below["a"] @ params[1] + below["b"][:, :2] @ params[2])


def top(params, z, below):
    return jnp.cos(params * z) + below


def stack():
    first = {"ab": normal(3, 2, scale=0.4), "ba": normal(2, 3, scale=0.4)}
    second = [normal(4, 4, scale=0.2), normal(2, 4, seed=1), normal(2, 4, seed=2)]
    x = {"left": normal(3, 2, seed=3), "right": normal(3, 3, seed=4)}
    starts = ({"a": jnp.zeros((3, 2)), "b": jnp.zeros((3, 3))}, jnp.zeros((3, 4)))
    below = newton_equilibrium(lambda z: lower(first, z, x), starts[0])
    above = newton_equilibrium(lambda z: upper(second, z, below), starts[1])
    return (first, second), x, starts, (below, above)


def test_two_equilibria_are_one():
    params, x, starts, (below, above) = stack()
    cell = compose(lower, upper)

    def one(params, x):
        gradient = Implicit(PICARD)
        return deq_fixed_point(cell, params, x, starts, solver=ANDERSON, gradient=gradient)[1]

    def two(params, x):
        below = deq_fixed_point(lower, params[0], x, starts[0], solver=PICARD)
        return deq_fixed_point(upper, params[1], below, starts[1], solver=PICARD)

    got = value_and_gradients(one, params, x)
    assert_close(got, value_and_gradients(two, params, x), 1e-8)
    # And by themselves: a dense solve for each, and the chain rule between them.
    of_second, of_below = implicit_gradient(
        lambda inputs, z: upper(inputs[0], z, inputs[1]),
        (params[1], below), above, weighted(above)[1],
    )  # fmt: skip
    of_first, of_x = implicit_gradient(
        lambda inputs, z: lower(inputs[0], z, inputs[1]), (params[0], x), below, of_below
    )
    assert_close(got, (above, ((of_first, of_second), of_x)), 1e-8)


def test_three_equilibria():
    params, x, starts, (_, above) = stack()
    third = jnp.asarray(0.4)
    z = solve_fixed_point(
        compose(lower, compose(upper, top)), (params[0], (params[1], third)), x,
        (starts[0], starts[1:] * 2), solver=PICARD,
    ).value  # fmt: skip
    assert_close(z[1][1], newton_equilibrium(lambda z: top(third, z, above), 0 * above), 1e-10)


def test_a_network_below_an_equilibrium():
    layers, params, x = mlp()
    network, factor = stacked_layers(layers), jnp.asarray(0.4)
    cell = compose(network, lambda params, z, state: top(params, z, state[-1]))
    start = (network.start(params, x), jnp.zeros((4, 2)))
    z = solve_fixed_point(cell, (params, factor), x, start, solver=PICARD).value
    output = in_turn(layers, params, x)
    assert_close(z[1], newton_equilibrium(lambda z: top(factor, z, output), start[1]), 1e-10)


def test_equal_constructions_are_compiled_once():
    assert len({compose(lower, upper), compose(lower, upper)}) == 1
    assert len({stacked_layers([dense]), stacked_layers((dense,)), stacked_layers([join])}) == 2
    cells = [weight_tied([(normal(2, 3, seed=seed), normal(3))], jnp.tanh)[1] for seed in (0, 1)]
    assert len(set(cells)) == 1


# Weight-tied networks.


def untied(widths, scale=1.5):
    return [
        (normal(*shape, scale=scale), normal(shape[1], seed=1))
        for shape in itertools.pairwise(widths)
    ]


def hidden_states(layers, activations, x):
    """All hidden states of the untied network."""
    states = []
    for (kernel, bias), activation in zip(layers, activations, strict=True):
        x = activation(x @ kernel + bias)
        states.append(x)
    return states


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


# Bad input.


def ones(*shape):
    return jnp.ones(shape)


PAIR = (np.ones((3, 2)), np.ones(2))
NARROW = (np.ones((3, 2)), np.ones(3))
SINGLE = (np.ones((3, 2)), np.ones(2, np.float32))
WRONG = {
    "layers must hold at least one layer, got none": lambda: stacked_layers([]),
    r"layers\[1\] must be callable, got int": lambda: stacked_layers([dense, 3]),
    "params must have 2 entries, got": lambda: stacked_layers([dense] * 2)([{}], (1, 2), 0),
    "z must have 1 entries, got": lambda: stacked_layers([dense])([{}], (1, 2), 0),
    r"layers\[1\] cannot take its input, \(5, 2\): ": lambda: stacked_layers(
        [lambda p, h: h @ p] * 2
    ).start([ones(3, 2)] * 2, ones(5, 3)),
    r"layers\[1\] cannot take its input, \(2, 3\): ": lambda: stacked_layers(
        [lambda p, h: h, lambda p, h: h @ ones(4, 4)]
    )([0, 0], (ones(2, 3), ones(2, 4)), ones(2, 3)),
    "g must be callable, got NoneType": lambda: compose(dense, None),
    "f must be callable, got int": lambda: compose(3, dense),
    r"params must have 2 entries, got PyTreeDef\(\{\}": lambda: compose(lower, upper)(
        {}, (1, 2), 3
    ),
    "z must have 2 entries": lambda: compose(lower, upper)((1, 2), [1], 3),
    "layers must hold at least one pair": lambda: weight_tied([], jnp.tanh),
    r"layers\[1\] must be a kernel \[2, out\] .* shapes \[\(3, 2\), \(2,\)\]": lambda: weight_tied(
        [PAIR, PAIR], jnp.tanh
    ),
    r"layers\[0\] must be a kernel \[in, out\] and a bias \[out\], got shapes \[\(3, 2\), \(3,": (
        lambda: weight_tied([NARROW], jnp.tanh)
    ),
    r"layers\[0\] must .* got shapes \[\(3, 2\)\]": lambda: weight_tied([PAIR[0]], jnp.tanh),
    r"one dtype, got \['float32', 'float64'\]": lambda: weight_tied([SINGLE], jnp.tanh),
    r"activations must have 1 entries": lambda: weight_tied([PAIR], [jnp.tanh] * 2),
    r"activations must have 1 entries, got PyTreeDef\(None": lambda: weight_tied([PAIR], None),
    r"activations\[0\] must be callable, got str": lambda: weight_tied([PAIR], ["tanh"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_bad_input(message):
    error = TypeError if "callable" in message else ValueError
    with pytest.raises(error, match=message):
        WRONG[message]()


@pytest.mark.parametrize("name", ["recurrent", "input", "bias", "x", "z", "cotangent"])
def test_bad_shapes_in_recurrent_backpropagation(name):
    shapes = {"recurrent": (5, 5), "input": (3, 5), "bias": (5,)}
    shapes |= {"x": (4, 3), "z": (4, 5), "cotangent": (4, 5)}
    arrays = {key: np.ones(shape)[: -1 if key == name else None] for key, shape in shapes.items()}
    params = RecurrentParams(*(arrays.pop(field) for field in RecurrentParams._fields))
    # A batch that is too short in x shows in z, which is compared with it.
    with pytest.raises(ValueError, match=f"^{'z' if name == 'x' else name} must have shape"):
        recurrent_backpropagation(params, activation=jnp.tanh, **arrays)


# The guide.


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("number", range(4))
def test_the_guide(number, capsys):
    with jax.enable_x64(False):
        exec(compile(BLOCKS[number], "docs/constructions.md", "exec"), {"__name__": "guide"})
    line = capsys.readouterr().out.splitlines()[0]
    differences = re.match(r"differences?:((?: \d\S*)+)", line)[1].split()
    assert len(differences) == (1, 2, 2, 1)[number]
    assert max(float(difference) for difference in differences) < 1e-3


def test_the_guide_shows_every_construction():
    shown = re.findall(r"constructions import (?:RecurrentParams, )?(\w+)", "".join(BLOCKS))
    names = ["stacked_layers", "weight_tied", "compose", "recurrent_backpropagation"]
    assert shown == names
    assert all(f"`{name}`" in GUIDE for name in names)
