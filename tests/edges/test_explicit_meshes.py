"""Solves under `jax.set_mesh` with JAX's default explicit axes, against one device."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from tests import reference
from tests.reference import implicit_gradient, newton_equilibrium

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

BATCH, WIDTH = 8, 6
SOLVERS = {
    "Picard": Picard(tol=1e-8, max_iter=60),
    "Anderson": Anderson(tol=1e-8, max_iter=40),
    "Broyden": Broyden(tol=1e-8, memory=8, max_iter=40),
    "NewtonKrylov": NewtonKrylov(GMRES(restart=6), tol=1e-8),
}
POLICIES = {
    "Anderson": Implicit(Anderson(tol=1e-8, max_iter=40)),
    "GMRES": Implicit(GMRES(restart=6, tol=1e-8)),
    "BiCGStab": Implicit(BiCGStab(tol=1e-8)),
    "OneStep": OneStep(),
    "Neumann": Neumann(4),
    "Phantom": Phantom(4, 0.8),
    "Unrolled": Unrolled(),
}
# Every solver with one backward solver and unrolled; each backward solver and each policy that
# starts from z* alone, whose code does not depend on the solver, once.
COMBINATIONS = {
    f"{solver}-{policy}": (SOLVERS[solver], POLICIES[policy])
    for solver, policy in (
        ("Picard", "Anderson"),
        ("Anderson", "GMRES"),
        ("Broyden", "BiCGStab"),
        ("NewtonKrylov", "Anderson"),
        ("Picard", "OneStep"),
        ("Anderson", "Neumann"),
        ("Broyden", "Phantom"),
        *((solver, "Unrolled") for solver in SOLVERS),
    )
} | {"Broyden-reuse": (SOLVERS["Broyden"], Implicit(reuse=True))}
# For the layers every solver with its own implicit gradient, and one policy of each other kind.
LAYER_COMBINATIONS = {
    **{f"{name}-Implicit": (solver, Implicit()) for name, solver in SOLVERS.items()},
    **{f"Picard-{name}": (SOLVERS["Picard"], POLICIES[name]) for name in ("Neumann", "Unrolled")},
}


def cell(params, z, x):
    return jnp.tanh(z @ params["W"] + x @ params["U"])


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def make_params():
    return {
        "W": normal(WIDTH, WIDTH, seed=0, scale=0.25),
        "U": normal(WIDTH, WIDTH, seed=1, scale=0.5),
    }


def make_x():
    # Samples of different sizes, so that they stop after different numbers of evaluations.
    return normal(BATCH, WIDTH, seed=2) * jnp.linspace(0.2, 2, BATCH)[:, None]


def make_cotangent():
    return normal(BATCH, WIDTH, seed=3)


def default_mesh():
    """A mesh as JAX makes it today, with explicit axes."""
    return jax.make_mesh((4,), ("data",))


def put(mesh, tree, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def relative_error(got, expected):
    """That of the references, from arrays that are on no mesh any more."""
    return reference.relative_error(*jax.tree.map(np.asarray, (got, expected)))


def is_sharded_over_data(value):
    return jax.typeof(value).sharding.spec[0] == "data"


def check_equal(got, expected):
    """Two trees, leaf by leaf, to 1e-13 of the size of the leaf."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_error(a, b) < 1e-13


def check_reports(got, expected):
    np.testing.assert_array_equal(got.iterations, expected.iterations)
    np.testing.assert_array_equal(got.status, expected.status)
    np.testing.assert_array_equal(got.evaluations, expected.evaluations)
    # The residuals themselves are differences near the rounding error of the state.
    np.testing.assert_allclose(got.residual, expected.residual, rtol=1e-3, atol=1e-14)


@functools.cache
def dense():
    """Equilibrium and gradients by params and x, by dense Newton steps and a dense solve."""
    params, x = make_params(), make_x()
    z = newton_equilibrium(lambda z: cell(params, z, x), jnp.zeros_like(x))
    gradients = implicit_gradient(
        lambda inputs, z: cell(inputs[0], z, inputs[1]), (params, x), z, make_cotangent()
    )
    return z, gradients


def value_and_gradients(solver, policy, start=None, closes_over_x=False):
    """A jitted function of params, x, cotangent and probe; the probe only where there is one."""

    def loss(params, x, probe, cotangent):
        f, given = cell, x
        z0 = None if start is None else start()
        if closes_over_x:
            f, given, z0 = (lambda params, z, _: cell(params, z, x)), (), jnp.zeros_like(x)
        value, stats = deq_fixed_point(
            f,
            params,
            given,
            z0,
            solver=solver,
            gradient=policy,
            return_stats=True,
            backward_probe=probe,
        )
        return (cotangent * value).sum(), (value, stats)

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))


def run_on_both(function, probe=None):
    """The results under the default mesh of four devices, and on one device."""
    arguments = make_params(), make_x(), probe, make_cotangent()
    expected = function(*arguments)
    mesh = default_mesh()
    with jax.set_mesh(mesh):
        params, probe = put(mesh, (arguments[0], arguments[2]), P())
        x, cotangent = put(mesh, (arguments[1], arguments[3]), P("data"))
        got = function(params, x, probe, cotangent)
    return got, expected


@pytest.mark.parametrize("name", COMBINATIONS)
def test_every_solver_with_every_gradient(name):
    solver, policy = COMBINATIONS[name]
    implicit = isinstance(policy, Implicit)
    probe = BackwardProbe.zeros(BATCH) if implicit else None
    (gradients, (value, stats)), (one_gradients, (one_value, one_stats)) = run_on_both(
        value_and_gradients(solver, policy), probe
    )
    check_equal(value, one_value)
    check_equal(gradients[:2], one_gradients[:2])
    check_reports(stats, one_stats)
    assert is_sharded_over_data(value)
    assert is_sharded_over_data(gradients[1])
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert len(set(np.asarray(stats.iterations).tolist())) > 1
    z, expected = dense()
    assert relative_error(value, z) < 1e-6
    if implicit:
        check_reports(gradients[2], one_gradients[2])
        np.testing.assert_array_equal(gradients[2].status, Status.CONVERGED)
        assert relative_error(gradients[:2], expected) < 1e-6


@pytest.mark.parametrize("solver", ["Anderson", "NewtonKrylov"])
def test_start_made_inside_jit(solver):
    """Zeros made inside `jit` are on no mesh axis, but the batch of the solution is."""
    function = value_and_gradients(
        SOLVERS[solver], Implicit(), start=lambda: jnp.zeros((BATCH, WIDTH))
    )
    (gradients, (value, stats)), (one_gradients, (one_value, one_stats)) = run_on_both(function)
    check_equal((value, gradients[:2]), (one_value, one_gradients[:2]))
    check_reports(stats, one_stats)
    assert is_sharded_over_data(value)
    assert relative_error(gradients[:2], dense()[1]) < 1e-6


@pytest.mark.parametrize("solver", ["Anderson", "NewtonKrylov"])  # with f alone, and its jvp
def test_closure_over_a_sharded_input(solver):
    function = value_and_gradients(SOLVERS[solver], Implicit(), closes_over_x=True)
    (gradients, (value, stats)), (one_gradients, (one_value, one_stats)) = run_on_both(function)
    check_equal((value, gradients[:2]), (one_value, one_gradients[:2]))
    check_reports(stats, one_stats)
    assert is_sharded_over_data(value)
    assert relative_error(gradients[:2], dense()[1]) < 1e-6


@pytest.mark.parametrize(("solver", "closes_over_x"), [("Picard", True), ("Anderson", False)])
def test_eager_call(solver, closes_over_x):
    params, x = make_params(), make_x()
    mesh = default_mesh()
    with jax.set_mesh(mesh):
        params, x = put(mesh, params, P()), put(mesh, x, P("data"))
        if closes_over_x:
            f = lambda params, z, _: cell(params, z, x)  # noqa: E731
            value = deq_fixed_point(f, params, (), jnp.zeros_like(x), solver=SOLVERS[solver])
        else:
            value = deq_fixed_point(cell, params, x, solver=SOLVERS[solver])
    assert is_sharded_over_data(value)
    assert value.sharding.is_equivalent_to(NamedSharding(mesh, P("data")), 2)
    assert relative_error(value, dense()[0]) < 1e-6


@pytest.mark.parametrize("solver", ["Broyden"])
def test_mesh_with_a_second_axis(solver):
    function = value_and_gradients(SOLVERS[solver], Implicit())
    expected_gradients, (expected, expected_stats) = function(
        make_params(), make_x(), None, make_cotangent()
    )
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    with jax.set_mesh(mesh):
        params = put(mesh, make_params(), P())
        x, cotangent = put(mesh, (make_x(), make_cotangent()), P("data"))
        gradients, (value, stats) = function(params, x, None, cotangent)
    check_equal((value, gradients[:2]), (expected, expected_gradients[:2]))
    check_reports(stats, expected_stats)
    assert is_sharded_over_data(value)
    assert relative_error(gradients[:2], dense()[1]) < 1e-6


@pytest.mark.parametrize("solver", ["Picard", "Broyden"])
def test_one_equation_over_a_sharded_state(solver):
    """With `batched=False` nothing is a batch, but the state is sharded all the same."""

    @jax.jit
    def function(params, x, cotangent):
        def loss(params, x):
            value, stats = deq_fixed_point(
                cell, params, x, solver=SOLVERS[solver], batched=False, return_stats=True
            )
            return (cotangent * value).sum(), (value, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    arguments = make_params(), make_x(), make_cotangent()
    expected_gradients, (expected, expected_stats) = function(*arguments)
    mesh = default_mesh()
    with jax.set_mesh(mesh):
        x, cotangent = put(mesh, arguments[1:], P("data"))
        gradients, (value, stats) = function(put(mesh, arguments[0], P()), x, cotangent)
    check_equal((value, gradients), (expected, expected_gradients))
    check_reports(stats, expected_stats)
    assert is_sharded_over_data(value)
    assert relative_error(gradients, dense()[1]) < 1e-6


class NNXCell(nnx.Module):
    def __init__(self, params):
        self.W, self.U = nnx.Param(params["W"]), nnx.Param(params["U"])

    def __call__(self, z, x):
        return jnp.tanh(z @ self.W[...] + x @ self.U[...])


def nnx_layer(solver, policy):
    """Parameters of the layer, and what applies the layer to parameters and input."""
    layer = deq_jax.nnx.DEQ(NNXCell(make_params()), solver=solver, gradient=policy)
    definition, state = nnx.split(layer)

    def apply(state, x):
        return nnx.merge(definition, state)(x, return_stats=True)

    def by_name(state):
        return {name: nnx.to_pure_dict(state)["cell"][name] for name in ("W", "U")}

    return state, apply, by_name


class LinenCell(linen.Module):
    @linen.compact
    def __call__(self, z, x):
        params = make_params()
        matrices = {name: self.param(name, lambda _, a: a, params[name]) for name in params}
        return jnp.tanh(z @ matrices["W"] + x @ matrices["U"])


def linen_layer(solver, policy):
    layer = deq_jax.linen.DEQ(cell=LinenCell(), solver=solver, gradient=policy)
    variables = layer.init(jax.random.key(0), make_x())

    def apply(variables, x):
        return layer.apply(variables, x, return_stats=True)

    return variables, apply, lambda variables: variables["params"]["cell"]


# Each combination in one of the two layers, which differ in the tree of their parameters alone.
@pytest.mark.parametrize(
    ("make", "name"),
    [*zip(itertools.cycle([nnx_layer, linen_layer]), LAYER_COMBINATIONS, strict=False)],
)
def test_layers(make, name):
    state, apply, by_name = make(*LAYER_COMBINATIONS[name])

    @jax.jit
    def function(state, x, cotangent):
        def loss(state, x):
            value, stats = apply(state, x)
            return (cotangent * value).sum(), (value, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(state, x)

    x, cotangent = make_x(), make_cotangent()
    expected, (expected_value, expected_stats) = function(state, x, cotangent)
    mesh = default_mesh()
    with jax.set_mesh(mesh):
        sharded = put(mesh, (x, cotangent), P("data"))
        gradients, (value, stats) = function(put(mesh, state, P()), *sharded)
    check_equal((value, gradients), (expected_value, expected))
    check_reports(stats, expected_stats)
    assert is_sharded_over_data(value)
    z, exact = dense()
    assert relative_error(value, z) < 1e-6
    if isinstance(LAYER_COMBINATIONS[name][1], Implicit):
        assert relative_error((by_name(gradients[0]), gradients[1]), exact) < 1e-6
