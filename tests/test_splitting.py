"""Splittings and `MonotoneDEQ`: solutions, gradients, published recursions, guarantees."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deq_jax import (
    Anderson,
    BackwardProbe,
    Execution,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_adjoint,
)
from deq_jax.cells.monotone import MonotoneDenseCell
from deq_jax.cells.resnet import ResNetCell
from deq_jax.monotone import MonotoneDEQ, tune_alpha
from deq_jax.nnx import DEQ
from deq_jax.splitting import ForwardBackward, PeacemanRachford
from tests import monotone_reference as reference
from tests.cells import test_monotone as cells

EXACT = Picard(tol=1e-13, max_iter=5000)
NAMES = ["dense", "odd grid", "two tiers"]


class DenseOperator(NamedTuple):
    """The example in the docstring of `deq_jax.splitting`."""

    w: jax.Array

    def multiply(self, z):
        return z @ self.w.T

    def resolvent(self, alpha):
        return jnp.linalg.inv((1 + alpha) * jnp.eye(len(self.w)) - alpha * self.w)

    def apply_resolvent(self, resolvent, z):
        return z @ resolvent.T

    def activation(self, z):
        return jax.nn.relu(z)


def equilibrium(splitting, w, c, **options):
    def f(params, u, c):
        operator, resolvent = params
        return splitting.step(operator, resolvent, u, c)

    operator = DenseOperator(w)
    params = operator, splitting.prepare(operator)
    return splitting.solution(operator, deq_fixed_point(f, params, c, **options))


def random_w(rng, n=6, m=0.4):
    a, b = rng.normal(size=(2, n, n)) / np.sqrt(n)
    return reference.dense({"a": a, "b": b}, m)


def lipschitz_step(w, m=0.4):
    """A step size with which forward-backward iteration is certain to converge."""
    return m / np.linalg.norm(np.eye(len(w)) - w, 2) ** 2


@pytest.mark.parametrize("kind", ["PR", "DR", "FB"])
def test_plain_functions_have_the_solution_and_gradient_of_a_dense_solve(x64, kind):
    rng = np.random.default_rng(0)
    w, c, t = random_w(rng), rng.normal(size=(3, 6)), rng.normal(size=(3, 6))
    splitting = ForwardBackward(lipschitz_step(w)) if kind == "FB" else PeacemanRachford(0.6)
    solver = Picard(tol=1e-13, max_iter=5000, damping=0.5 if kind == "DR" else 1.0)

    @jax.jit
    def loss(w, c):
        z = equilibrium(splitting, w, c, solver=solver)
        return (t * z).sum(), z

    (_, z), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(w, c)
    expected = [reference.solve(w, row, np.ones(6, bool)) for row in c]
    np.testing.assert_allclose(z, expected, atol=1e-9)
    bars = [reference.cotangents(w, row, one) for row, one in zip(expected, t, strict=True)]
    np.testing.assert_allclose(gradients[0], sum(bar[1] for bar in bars), atol=1e-8)
    np.testing.assert_allclose(gradients[1], [bar[0] for bar in bars], atol=1e-8)


def numpy_equation(cell, x):
    """W, c of each sample and the entries that may be positive, in NumPy."""
    p = cells.parameters(cell)
    w = cells.matrix_of(p, cell)
    return w, constant_of(p, cell, x), free_of(cell)


def constant_of(p, cell, x):
    if isinstance(cell, MonotoneDenseCell):
        return x @ p["injection"]["kernel"] + p["injection"]["bias"]
    grid = getattr(cell, "grid", None) or cell.grids[0]
    rows = np.array([reference.inject(p, image, grid).reshape(-1) for image in x])
    return np.pad(rows, ((0, 0), (0, cells.size(cell) - rows.shape[1])))


def free_of(cell):
    if isinstance(cell, MonotoneDenseCell):
        return np.ones(cells.size(cell), bool)
    shape = cells.shapes(cell)
    several = shape if isinstance(shape[0], tuple) else (shape,)
    return np.concatenate([reference.inside(one[:2], one[2]) for one in several])


def inputs(cell, batch=3, seed=1):
    if isinstance(cell, MonotoneDenseCell):
        shape = (3,)
    else:
        grid = getattr(cell, "grid", None) or cell.grids[0]
        shape = (grid[0] - 2, grid[1] - 2, cell.input_kernel.shape[2])
    return np.random.default_rng(seed).normal(size=(batch, *shape))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_all_ways_lead_to_the_dense_solution(x64, name):
    cell = cells.cell_of(name)
    x = inputs(cell)
    w, c, free = numpy_equation(cell, x)
    expected = np.array([reference.solve(w, row, free) for row in c])
    step = lipschitz_step(w, cells.M)
    ways = {
        "PR": MonotoneDEQ(cell, splitting=PeacemanRachford(0.5), solver=EXACT),
        "FB": MonotoneDEQ(cell, splitting=ForwardBackward(step), solver=EXACT),
    }
    if name == "dense":
        ways["accelerated"] = MonotoneDEQ(cell, solver=Anderson(tol=1e-12, max_iter=500))
        ways["cell"] = DEQ(cell, solver=NewtonKrylov(tol=1e-12, max_iter=60))
    evaluations = {}
    for way, layer in ways.items():
        z, stats = jax.jit(lambda layer, x: layer(x, return_stats=True))(layer, x)
        assert stats.converged.all(), way
        np.testing.assert_allclose(cells.pack(z), expected, atol=1e-8, err_msg=way)
        evaluations[way] = int(stats.evaluations)
    assert evaluations["PR"] < evaluations["FB"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_gradients_are_those_of_the_implicit_function_theorem(x64, name):
    cell = cells.cell_of(name)
    layer = MonotoneDEQ(cell, splitting=PeacemanRachford(0.5), solver=EXACT)
    definition, params, rest = nnx.split(layer, nnx.Param, ...)
    x = inputs(cell, batch=2)
    t = np.random.default_rng(2).normal(size=(2, cells.size(cell)))

    @jax.jit
    def gradients(params, x):
        def loss(params, x):
            z = nnx.merge(definition, params, rest)(x)
            return (t * cells.pack(z)).sum()

        return jax.grad(loss, (0, 1))(params, x)

    found, x_bar = gradients(params, jnp.asarray(x))
    w, c, free = numpy_equation(cell, x)
    z = [reference.solve(w, row, free) for row in c]
    bars = [reference.cotangents(w, *pair) for pair in zip(z, t, strict=True)]
    c_bar, w_bar = np.array([bar[0] for bar in bars]), sum(bar[1] for bar in bars)

    def derivative(p, x):
        """The derivative along the imaginary parts of the parameters and the input."""
        c_dot, w_dot = constant_of(p, cell, x).imag, cells.matrix_of(p, cell).imag
        return (c_bar * c_dot).sum() + (w_bar * w_dot).sum()

    # Random directions through all parameters, and each scalar by itself.
    leaves, structure = jax.tree.flatten(cells.parameters(cell))
    slopes = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.to_pure_dict(found["cell"]))]
    rng = np.random.default_rng(3)
    for k, (leaf, slope) in enumerate(zip(leaves, slopes, strict=True)):
        for _ in range(3):
            direction = rng.normal(size=leaf.shape)
            moved = [one + 1e-30j * direction if j == k else one for j, one in enumerate(leaves)]
            expected = derivative(jax.tree.unflatten(structure, moved), x) * 1e30
            np.testing.assert_allclose((slope * direction).sum(), expected, rtol=1e-8, atol=1e-8)
    direction = rng.normal(size=x.shape)
    expected = derivative(cells.parameters(cell), x + 1e-30j * direction) * 1e30
    np.testing.assert_allclose((x_bar * direction).sum(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.slow
def test_iterations_are_the_published_ones_forwards_and_backwards(x64):
    rng, alpha, count = np.random.default_rng(4), 0.8, 4
    w, c, g = random_w(rng), rng.normal(size=6), rng.normal(size=6)
    v = np.linalg.inv(np.eye(6) + alpha * (np.eye(6) - w))
    z = u = np.zeros(6)
    for _ in range(count):
        half = 2 * z - u
        u = 2 * v @ (half + alpha * c) - half
        z = np.maximum(u, 0)
    splitting, operator = PeacemanRachford(alpha), DenseOperator(jnp.asarray(w))
    resolvent = splitting.prepare(operator)
    states = np.zeros((1, 6))
    for _ in range(count):
        states = splitting.step(operator, resolvent, states, c[None])
    np.testing.assert_allclose(splitting.solution(operator, states)[0], z, rtol=1e-10)

    j = (u > 0).astype(float)
    q = w_ = np.zeros(6)
    for _ in range(count):
        half = 2 * w_ - q
        q = 2 * v.T @ half - half
        w_ = j * (q + alpha * g)
    # The first published iteration arrives where ours starts, and ours returns what it evaluated.
    solver = Picard(tol=0, max_iter=count)

    def f(params, u, c):
        return splitting.step(*params, u, c)

    found = solve_adjoint(
        f, (operator, resolvent), c[None], u[None], (j * g)[None], solver=solver
    ).value[0]
    np.testing.assert_allclose(2 * alpha * found, 2 * w_ - q, rtol=1e-10)


@pytest.mark.parametrize("splitting", [PeacemanRachford, ForwardBackward])
@pytest.mark.parametrize("alpha", [0.01, 0.3, 1.0, 20.0])
def test_an_iteration_contracts_by_the_stated_factor(x64, splitting, alpha):
    rng = np.random.default_rng(5)
    w, c = random_w(rng), jnp.asarray(rng.normal(size=(6, 6)))
    operator = DenseOperator(jnp.asarray(w))
    length = np.linalg.norm(np.eye(6) - w, 2)
    if splitting is PeacemanRachford:
        rate = np.sqrt(1 - 4 * alpha * 0.4 / (1 + alpha * length) ** 2)
    else:
        c = c + 1e3  # keeps the activation open
        rate = np.sqrt(1 - 2 * alpha * 0.4 + alpha**2 * length**2)
    resolvent = splitting(alpha).prepare(operator)
    # Where u is positive w is u, and T is R, or I - α (I - W), with an offset.
    offset, columns = (
        splitting(alpha).step(operator, resolvent, u, c) for u in (0 * c, jnp.eye(6))
    )
    factor = np.linalg.norm(columns - offset, 2)
    assert 0.2 * rate < factor <= rate


def dense_layer(seed=0, features=32, scale=1.0, **options):
    dtype = jnp.zeros(()).dtype  # float64 where a test enables it
    cell = MonotoneDenseCell(8, features, param_dtype=dtype, rngs=nnx.Rngs(seed))
    state = nnx.state(cell, nnx.Param)
    nnx.update(cell, jax.tree.map(lambda leaf: scale * leaf, state))
    return MonotoneDEQ(cell, **options)


@functools.partial(jax.jit, static_argnums=0)
def solve_and_pull_back(definition, state, x):
    """z*, the report of the solve and that of the backward solve."""

    def loss(probe):
        layer = nnx.merge(definition, state)
        z, stats = layer(x, return_stats=True, backward_probe=probe)
        return (z**2).sum(), (z, stats)

    probe, (z, stats) = jax.grad(loss, has_aux=True)(BackwardProbe.zeros(len(x)))
    return z, stats, probe


@pytest.mark.slow
def test_the_backward_solve_is_about_as_fast_as_the_forward_one():
    layer = dense_layer(solver=Picard(tol=1e-5, max_iter=300))
    x = jax.random.normal(jax.random.key(1), (16, 8))
    _, stats, probe = solve_and_pull_back(*nnx.split(layer), x)
    assert stats.converged.all()
    assert (probe.status == int(Status.CONVERGED)).all()
    assert abs(int(probe.evaluations) - int(stats.evaluations)) <= 0.3 * int(stats.evaluations)


@pytest.mark.slow
def test_large_random_weights_converge(x64):
    solver = Picard(tol=1e-6, max_iter=20_000)
    x = jax.random.normal(jax.random.key(1), (4, 8))
    for seed in range(64):
        layer = dense_layer(seed, features=12, scale=10.0, solver=solver)
        _, stats, probe = solve_and_pull_back(*nnx.split(layer), x)
        assert stats.converged.all(), (seed, stats)
        assert (probe.status == int(Status.CONVERGED)).all(), (seed, probe)


@pytest.mark.slow
def test_samples_do_not_depend_on_their_batch():
    layer = dense_layer(solver=Picard(tol=1e-3, max_iter=300))
    call = jax.jit(lambda layer, x: layer(x, return_stats=True))
    x = jax.random.normal(jax.random.key(2), (3, 8))
    z, stats = call(layer, x)
    other, other_stats = call(layer, x.at[1].mul(1e4).at[2].set(jnp.nan))
    np.testing.assert_allclose(other[0], z[0], rtol=1e-6)
    assert other_stats.iterations[0] == stats.iterations[0]


@pytest.mark.slow
def test_a_new_step_size_compiles_nothing_and_changes_no_solution():
    layer = dense_layer(solver=Picard(tol=1e-6, max_iter=2000))
    x = jax.random.normal(jax.random.key(3), (4, 8))
    definition, state = nnx.split(layer)
    before, stats, _ = solve_and_pull_back(definition, state, x)
    compiled = solve_and_pull_back._cache_size()
    layer.alpha[...] = jnp.float32(0.05)
    z, slower, _ = solve_and_pull_back(*nnx.split(layer), x)
    assert solve_and_pull_back._cache_size() == compiled
    assert slower.evaluations > 2 * stats.evaluations
    np.testing.assert_allclose(z, before, atol=1e-4)


@pytest.mark.parametrize("splitting", [PeacemanRachford(), ForwardBackward()])
@pytest.mark.slow
def test_the_step_size_is_tuned(splitting):
    layer = dense_layer(scale=3.0, splitting=splitting, solver=Picard(tol=1e-4, max_iter=100))
    x = jax.random.normal(jax.random.key(4), (4, 8))
    search = tune_alpha(layer, x)
    assert [trial.alpha for trial in search.trials] == [0.5**k for k in range(len(search.trials))]
    assert search.alpha == float(layer.alpha[...])
    good = [trial for trial in search.trials if trial.converged]
    chosen = next(trial for trial in good if trial.alpha == search.alpha)
    assert chosen.evaluations == min(trial.evaluations for trial in good)
    assert int(layer(x, return_stats=True)[1].evaluations) == chosen.evaluations
    if isinstance(splitting, ForwardBackward):
        assert not search.trials[0].converged  # the first step sizes were too large
    last = search.trials[-1]
    assert not last.converged or last.evaluations > chosen.evaluations


def test_a_step_size_is_kept_if_none_converges():
    layer = dense_layer(splitting=PeacemanRachford(0.7), solver=Picard(tol=0, max_iter=3))
    search = tune_alpha(layer, jnp.ones((2, 8)), smallest=0.2)
    assert [trial.alpha for trial in search.trials] == [1.0, 0.5, 0.25]
    np.testing.assert_allclose((search.alpha, layer.alpha[...]), 0.7, rtol=1e-6)


def test_a_resolvent_at_hand_is_used():
    layer = dense_layer(solver=Picard(tol=1e-6, max_iter=200))
    x = jax.random.normal(jax.random.key(5), (3, 8))
    resolvent = layer.resolvent()
    np.testing.assert_allclose(layer(x, resolvent=resolvent), layer(x), atol=1e-6)
    wrong, stats = layer(x, resolvent=0.5 * resolvent, return_stats=True)
    assert stats.converged.all()
    assert np.abs(wrong - layer(x)).max() > 1e-2


@pytest.mark.slow
def test_starts_and_states_along_the_way_are_z():
    layer = dense_layer(solver=Picard(tol=1e-5, max_iter=200))
    x = jax.random.normal(jax.random.key(6), (3, 8))
    z, stats, (early,) = layer(x, return_stats=True, sample_at=(3,))
    assert (early >= 0).all()
    assert np.abs(early - z).max() > 1e-4
    again, from_solution = layer(x, z, return_stats=True)
    assert from_solution.evaluations < stats.evaluations // 3
    np.testing.assert_allclose(again, z, atol=1e-4)
    u = layer.state(z, x)
    f, params, c = layer.equation(x)
    np.testing.assert_allclose(f(params, u, c), u, atol=1e-3)
    # The Jacobian at z is the one at u.
    tangent = jax.random.normal(jax.random.key(7), u.shape)
    products = [jax.jvp(lambda u: f(params, u, c), (at,), (tangent,))[1] for at in (z, u)]
    np.testing.assert_allclose(*products, atol=1e-5)


@pytest.mark.slow
def test_vmap_over_step_sizes():
    layer = dense_layer(solver=Picard(tol=1e-6, max_iter=500))
    definition, alpha, rest = nnx.split(layer, nnx.PathContains("alpha"), ...)
    x = jax.random.normal(jax.random.key(8), (3, 8))
    several = jax.tree.map(lambda leaf: leaf * jnp.array([1.0, 0.3]), alpha)
    z = jax.vmap(lambda alpha: nnx.merge(definition, alpha, rest)(x))(several)
    np.testing.assert_allclose(z[0], z[1], atol=1e-4)


@pytest.mark.slow
def test_another_backward_solver():
    layer = dense_layer(solver=Picard(tol=1e-7, max_iter=500))
    accelerated = dense_layer(
        solver=Anderson(tol=1e-7), gradient=Implicit(Anderson(tol=1e-6, max_iter=50))
    )
    x = jax.random.normal(jax.random.key(9), (3, 8))
    gradient = jax.jit(lambda layer, x: jax.grad(lambda x: (layer(x) ** 2).sum())(x))
    np.testing.assert_allclose(gradient(accelerated, x), gradient(layer, x), atol=1e-4)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: PeacemanRachford(0.0), ValueError, "PeacemanRachford.alpha must be finite, > 0"),
        (lambda: ForwardBackward("1"), TypeError, "ForwardBackward.alpha must be a number"),
        (
            lambda: dense_layer(splitting=PeacemanRachford),
            TypeError,
            r"splitting must be PeacemanRachford\(...\)",
        ),
        (
            lambda: MonotoneDEQ(ResNetCell(8, 8, rngs=nnx.Rngs(0))),
            TypeError,
            "ResNetCell lacks inject, multiply, resolvent",
        ),
        (
            lambda: MonotoneDEQ(MonotoneDenseCell),
            TypeError,
            r"cell must be an instance, such as MonotoneDenseCell\(..., rngs=rngs\)",
        ),
        (
            lambda: setattr(dense_layer(), "alpha", 0.5),
            TypeError,
            r"write layer.alpha\[...\] = 0.5",
        ),
        (
            lambda: dense_layer()(jnp.ones(8)),
            ValueError,
            r"x must be \[B, in_features\] = \[B, 8\], got \[8\]",
        ),
    ],
)
def test_errors_say_what_is_wrong(build, kind, message):
    with pytest.raises(kind, match=message):
        build()


@pytest.mark.slow
def test_on_shards_and_in_half_precision():
    x = jax.random.normal(jax.random.key(10), (8, 8))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(definition, state, x):
        def loss(state):
            return (nnx.merge(definition, state)(x) ** 2).sum()

        return nnx.to_pure_dict(jax.grad(loss)(state)["cell"])

    def of(x, **execution):
        layer = dense_layer(solver=Picard(tol=1e-6), execution=Execution(**execution))
        return gradients(*nnx.split(layer), x)

    expected = of(x)
    with jax.set_mesh(mesh):
        found = of(sharded, shard_axis="data")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)
    # In half precision the tolerance is not reached.
    rough = of(x, cell_dtype=jnp.bfloat16)
    for leaf, exact in zip(jax.tree.leaves(rough), jax.tree.leaves(expected), strict=True):
        assert leaf.dtype == jnp.float32
        assert np.linalg.norm(leaf - exact) < 0.1 * np.linalg.norm(exact)
