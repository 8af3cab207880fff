"""The theorems: networks in layers and stacked equilibria, against what they stand for."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from deq_jax import (
    BackwardProbe,
    Broyden,
    Implicit,
    NewtonKrylov,
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
from tests.models.constructions import (
    ANDERSON,
    EXACT,
    PICARD,
    assert_close,
    conv_net,
    dense,
    in_turn,
    join,
    lower,
    mlp,
    normal,
    stack,
    top,
    upper,
    value_and_gradients,
    weighted,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.usefixtures("x64")

GUIDE = (Path(__file__).parents[2] / "docs" / "constructions.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("network", "solver"), [(mlp, ANDERSON), (conv_net, PICARD)], ids=["mlp", "conv_net"]
)
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.slow
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
