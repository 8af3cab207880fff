"""States sampled along the way, and the gradient policy of each, against explicit points."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from tests import reference
from tests.reference import relative_error

AT = (1, 3, 6, 35, 40)
SAMPLES = 4

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def cell(params, z, x):
    return jnp.tanh(z @ params.T + x)


def problem():
    """Samples of very different size: those in which the tanh is saturated stop at once."""
    matrix = normal(5, 5, scale=0.3)
    x = normal(SAMPLES, 5, seed=1) * jnp.array([0.5, 12.0, 1.0, 3.0])[:, None]
    return matrix, x


def evaluate(params, z, x):
    return np.tanh(np.asarray(z) @ np.asarray(params).T + np.asarray(x))


picard = functools.partial(reference.picard, damping=0.9)
anderson = functools.partial(reference.anderson, history=3, mixing=0.9, ridge=1e-4)

SOLVERS = {
    "Picard": (Picard(damping=0.9, tol=1e-2, max_iter=40), picard),
    "Anderson": (Anderson(history=3, mixing=0.9, tol=1e-3, max_iter=40), anderson),
}


def states(params, x, tol, points, numbers=AT):
    """For each sample its points at the evaluations `numbers`, or its last one; and the stops."""
    sampled, stops = [], []
    for one_x in np.asarray(x):
        f = functools.partial(evaluate, params, x=one_x)
        for stop in range(1, 41):
            visited = points(f, np.zeros(one_x.shape), steps=stop)
            if reference.relative_residual(f, visited[-1]) <= tol:
                break
        sampled.append([visited[min(number, stop) - 1] for number in (*numbers, stop)])
        stops.append(stop)
    return np.moveaxis(sampled, 1, 0), np.array(stops)


@pytest.mark.museum(
    "torchdeq T6: samples asked for at steps [5, 10] came from [4, 9], evaluations were "
    "miscounted, traces were padded with 1e8"
)
@pytest.mark.parametrize("name", SOLVERS)
def test_samples_are_the_points_evaluated_and_then_the_final_state(name):
    solver, points = SOLVERS[name]
    params, x = problem()
    expected, stops = states(params, x, solver.tol, points)
    assert 1 < stops.min() < 6  # one sample gives its final state at the sixth evaluation,
    assert 6 < stops.max() < 35  # and all of them do at the last two

    z, stats, samples = deq_fixed_point(
        cell, params, x, solver=solver, return_stats=True, sample_at=AT
    )
    np.testing.assert_array_equal(stats.iterations, stops)
    assert [sample.shape for sample in samples] == [z.shape] * 5
    for sample, points in zip((*samples, z), expected, strict=True):
        np.testing.assert_allclose(sample, points, rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(samples[3], z)
    np.testing.assert_array_equal(samples[2][stops < 6], z[stops < 6])


def test_samples_of_one_equation():
    params, x = problem()
    tol = 1e-2
    expected, stops = states(params, x[2:3], tol, picard)
    f = lambda params, z, x: cell(params, z["z"], x)  # noqa: E731
    z, samples = deq_fixed_point(
        lambda params, z, x: {"z": f(params, z, x)},
        params,
        x[2],
        {"z": jnp.zeros(5)},
        solver=Picard(damping=0.9, tol=tol),
        batched=False,
        sample_at=AT,
    )
    assert 3 < stops[0] < 35
    for state, points in zip((*samples, z), expected[:, 0], strict=True):
        np.testing.assert_allclose(state["z"], points, rtol=1e-12)


def test_samples_of_a_sample_that_diverges_and_of_one_that_never_converges():
    """Sample 0 doubles until f gives NaN at its third point, sample 1 goes to 1, sample 2 away."""
    x = jnp.array([[2.0], [0.5], [-1.25]])
    z0 = jnp.array([[1.0], [2.0], [1.0]])

    def f(_, z, x):
        return jnp.where(z < 3.9, x * z + jnp.where(x == 0.5, 0.5, 0.0), jnp.nan)

    solver = Picard(tol=0.0, max_iter=5)
    z, stats, samples = deq_fixed_point(
        f, None, x, z0, solver=solver, return_stats=True, sample_at=(2, 3, 4, 5)
    )
    assert stats.status.tolist() == [Status.DIVERGED, Status.MAX_ITER, Status.MAX_ITER]
    # All residuals of sample 0 are 1/2, so that its first point is its best.
    np.testing.assert_allclose(jnp.stack(samples)[:, 0, 0], [2, 1, 1, 1])
    np.testing.assert_allclose(jnp.stack(samples)[:, 1, 0], [1.5, 1.25, 1.125, 1.0625])
    # A sample is what was evaluated, not the best so far, which is the first point here.
    np.testing.assert_allclose(jnp.stack(samples)[:, 2, 0], [-1.25, 1.25**2, -(1.25**3), 1.25**4])
    np.testing.assert_allclose(z[:, 0], [1, 1.0625, 1])


# Gradients. `pulled` gives those of `Σ ⟨y_i, state_i⟩` over the samples and, last, the value.


def pulled(params, x, cotangents, **options):
    def loss(params, x):
        *value, samples = deq_fixed_point(cell, params, x, **options)
        every = (*samples, value[0])
        return sum(jnp.vdot(y, state) for y, state in zip(cotangents, every, strict=True)), every

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)


def at_one_state(params, x, z, y, policy):
    """Gradient of `⟨y, z⟩` as the policy has it at any z, solution or not: in NumPy."""
    by_x = []
    for one_x, one_z, one_y in zip(*map(np.asarray, (x, z, y)), strict=True):
        slope = 1 - evaluate(params, one_z, one_x) ** 2
        transposed = np.asarray(params).T * slope
        if isinstance(policy, Implicit):
            u = np.linalg.solve(np.eye(5) - transposed, one_y)
        else:
            one = policy.damping * transposed + (1 - policy.damping) * np.eye(5)
            powers = sum(np.linalg.matrix_power(one, t) for t in range(policy.terms))
            u = powers @ (policy.damping * one_y)
        by_x.append(slope * u)
    by_x = np.array(by_x)
    return by_x.T @ np.asarray(z), by_x


def phantom(params, x, z, y, policy):
    def loss(params, x):
        point = jax.lax.stop_gradient(z)
        for _ in range(policy.steps):
            point = policy.damping * cell(params, point, x) + (1 - policy.damping) * point
        return jnp.vdot(y, point)

    return jax.grad(loss, argnums=(0, 1))(params, x)


def expected_gradient(params, x, z, y, policy):
    if isinstance(policy, Phantom):
        return phantom(params, x, z, y, policy)
    if isinstance(policy, OneStep):
        policy = Neumann(1)
    return at_one_state(params, x, z, y, policy)


def one_hot(x, slots):
    """Cotangents for one state at a time, then for all."""
    y = [normal(*x.shape, seed=9 + i) for i in range(slots)]
    none = jnp.zeros_like(x)
    return [[y[i] if i == j else none for i in range(slots)] for j in range(slots)] + [y]


@pytest.mark.parametrize(
    ("gradient", "per_sample"),
    [
        (
            Implicit(Picard(tol=1e-14, max_iter=300)),
            (OneStep(), Neumann(3, 0.6), Phantom(3, 0.6), Neumann(2), Neumann(3)),
        ),
        (OneStep(), (Implicit(Picard(tol=1e-14, max_iter=300)), *[Phantom(2, 0.8)] * 4)),
    ],
    ids=["implicit at the end", "one step at the end"],
)
@pytest.mark.slow
def test_every_state_has_its_own_policy(gradient, per_sample):
    """The last sample and the value are the same state here, with two policies."""
    params, x = problem()
    solver, _ = SOLVERS["Picard"]
    options = {"solver": solver, "gradient": gradient, "sample_gradient": per_sample}
    run = jax.jit(functools.partial(pulled, sample_at=AT, **options))
    policies = (*per_sample, gradient)
    total = None
    for i, cotangents in enumerate(one_hot(x, 6)):
        got, every = run(params, x, cotangents)
        if i == 6:
            assert relative_error(got, total) < 1e-12
            break
        expected = expected_gradient(params, x, every[i], cotangents[i], policies[i])
        assert relative_error(got, expected) < 1e-11
        total = got if total is None else jax.tree.map(jnp.add, total, got)


@pytest.mark.slow
def test_one_policy_for_all_samples_and_the_default():
    params, x = problem()
    solver, _ = SOLVERS["Picard"]
    y = normal(SAMPLES, 5, seed=9)
    cotangents = [y, jnp.zeros_like(y), jnp.zeros_like(y)]
    for options, policy in (
        ({"gradient": Neumann(2)}, Neumann(2)),
        ({"gradient": Neumann(2), "sample_gradient": OneStep()}, OneStep()),
        ({"gradient": Neumann(2), "sample_gradient": [OneStep(), Neumann(3)]}, OneStep()),
    ):
        got, every = pulled(params, x, cotangents, solver=solver, sample_at=(2, 5), **options)
        assert relative_error(got, expected_gradient(params, x, every[0], y, policy)) < 1e-13


@pytest.mark.museum(
    "torchdeq T1: with sampled states and an early stop, the final state silently got the "
    "samples' one-step gradient instead of the implicit one"
)
@pytest.mark.parametrize("solver", [Anderson(tol=1e-10), Broyden(tol=1e-10)], ids=repr)
@pytest.mark.slow
def test_the_policy_of_the_value_stays_with_it_when_the_solver_stops_early(solver):
    """In torchdeq it goes to the first sample; the value keeps a gradient of one step."""
    params, x = problem()
    y = normal(SAMPLES, 5, seed=9)
    cotangents = [jnp.zeros_like(y)] * 3 + [y]
    options = {"gradient": Implicit(tol=1e-12), "sample_gradient": OneStep()}
    run = jax.jit(functools.partial(pulled, solver=solver, sample_at=(2, 30, 50), **options))
    got, every = run(params, x, cotangents)
    np.testing.assert_array_equal(every[1], every[3])  # it stopped before the 30th evaluation
    assert relative_error(got, at_one_state(params, x, every[3], y, Implicit())) < 1e-10
    assert relative_error(got, at_one_state(params, x, every[3], y, Neumann(1))) > 0.05


@pytest.mark.slow
def test_unrolled_samples_are_differentiated_through_their_evaluations():
    params, x = problem()
    solver = Picard(damping=0.9, tol=1e-2, max_iter=40)
    _, stops = states(params, x, solver.tol, picard)
    run = jax.jit(functools.partial(pulled, solver=solver, gradient=Unrolled(), sample_at=AT))

    def explicit(params, x, number):
        """Each sample after `number` evaluations, or after its own last one."""
        z, visited = jnp.zeros_like(x), []
        for _ in range(stops.max()):
            visited.append(z)
            z = 0.9 * cell(params, z, x) + 0.1 * z
        last = np.minimum(number, stops) - 1
        return jnp.stack([visited[k][i] for i, k in enumerate(last)])

    for number, cotangents in zip((*AT, 40), one_hot(x, 6)[:6], strict=True):
        y = sum(cotangents)
        got, _ = run(params, x, cotangents)
        loss = lambda *inputs: jnp.vdot(y, explicit(*inputs, number))  # noqa: E731
        expected = jax.grad(loss, argnums=(0, 1))(params, x)
        if number == 1:
            assert all((leaf == 0).all() for leaf in jax.tree.leaves((got, expected)))
        else:
            assert relative_error(got, expected) < 1e-12


# Transformations.

SMALL = {"solver": Picard(damping=0.9, tol=1e-2, max_iter=40), "sample_at": (2, 5, 30)}


def expected_small(params, x):
    """States and the gradient of the sum of all of them, with `OneStep` everywhere."""
    every, _ = states(params, x, 1e-2, picard, (2, 5, 30))
    ones = np.ones(x.shape)
    parts = [at_one_state(params, x, z, ones, Neumann(1)) for z in every]
    return every, [sum(part) for part in zip(*parts, strict=True)]


def sum_of_states(params, x):
    ones = [jnp.ones_like(x)] * 4
    return pulled(params, x, ones, gradient=OneStep(), **SMALL)


@pytest.mark.slow
def test_samples_under_vmap():
    params, x = problem()
    stacked = jnp.stack([params, 0.5 * params])
    got, every = jax.jit(jax.vmap(sum_of_states))(stacked, jnp.stack([x, x]))
    for i in range(2):
        expected_states, expected = expected_small(stacked[i], x)
        np.testing.assert_allclose(jnp.stack(every)[:, i], expected_states, rtol=1e-11)
        assert relative_error([leaf[i] for leaf in got], expected) < 1e-11


def test_samples_under_shard_map():
    params, x = problem()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("data")), "out_specs": ((P(), P("data")), P("data"))}
    got, every = jax.jit(jax.shard_map(sum_of_states, mesh=mesh, **specs))(params, x)
    expected_states, expected = expected_small(params, x)
    np.testing.assert_allclose(jnp.stack(every), expected_states, rtol=1e-11)
    assert relative_error(list(got), expected) < 1e-11


class Cell(nnx.Module):
    def __init__(self, matrix):
        self.matrix = nnx.Param(matrix)

    def __call__(self, z, x):
        return cell(self.matrix[...], z, x)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        return cell(self.param("matrix", nn.initializers.zeros, (5, 5), jnp.float64), z, x)


@pytest.mark.parametrize("flavour", ["nnx", "linen"])
def test_samples_of_the_layers(flavour):
    params, x = problem()
    sampling = {"sample_at": (2, 5, 30), "sample_gradient": OneStep()}
    options = {"solver": SMALL["solver"], "gradient": Neumann(2)}

    def layer(matrix, **more):
        if flavour == "nnx":
            return deq_jax.nnx.DEQ(Cell(matrix), **options)(x, **more)
        variables = {"params": {"cell": {"matrix": matrix}}}
        return deq_jax.linen.DEQ(LinenCell(), **options).apply(variables, x, **more)

    every, _ = states(params, x, 1e-2, picard, (2, 5, 30))
    z, stats, samples = layer(params, return_stats=True, **sampling)
    np.testing.assert_allclose(jnp.stack([*samples, z]), every, rtol=1e-11)
    assert stats.residual.shape == (SAMPLES,)
    y = normal(SAMPLES, 5, seed=9)
    for i, policy in ((1, Neumann(1)), (3, Neumann(2))):

        def loss(matrix):
            value, sampled = layer(matrix, **sampling)
            return jnp.vdot(y, (*sampled, value)[i])

        expected = at_one_state(params, x, every[i], y, policy)[0]
        assert relative_error(jax.jit(jax.grad(loss))(params), expected) < 1e-11


def test_linen_initialises_with_samples():
    layer = deq_jax.linen.DEQ(LinenCell())
    value, variables = layer.init_with_output(
        jax.random.key(0), problem()[1], return_stats=True, sample_at=(1, 2)
    )
    assert variables["params"]["cell"]["matrix"].shape == (5, 5)
    assert len(value) == 3
    assert len(value[2]) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_at": (3, 2)}, ValueError, "sample_at must be increasing"),
        ({"sample_at": (2, 2)}, ValueError, "sample_at must be increasing"),
        ({"sample_at": (0, 2)}, ValueError, "between 1 and max_iter = 50"),
        ({"sample_at": (2, 51)}, ValueError, "between 1 and max_iter = 50"),
        ({"sample_at": (2.0,)}, TypeError, "sample_at must hold integers"),
        ({"sample_at": (True,)}, TypeError, "sample_at must hold integers"),
        (
            {"sample_at": (1, 2), "sample_gradient": (OneStep(),)},
            ValueError,
            "one policy for each of the 2 samples, got 1",
        ),
        ({"sample_gradient": (OneStep(),)}, ValueError, "each of the 0 samples, got 1"),
        ({"sample_at": (1,), "sample_gradient": "one"}, TypeError, "sample_gradient must be a"),
        (
            {"sample_at": (1,), "sample_gradient": Unrolled()},
            TypeError,
            "sample_gradient=Unrolled.*gradient=Implicit",
        ),
        (
            {"sample_at": (1,), "sample_gradient": OneStep(), "gradient": Unrolled()},
            ValueError,
            "leave sample_gradient out",
        ),
        (
            {"sample_at": (4,), "gradient": Unrolled(steps=3)},
            ValueError,
            "between 1 and max_iter = 3",
        ),
    ],
)
def test_bad_requests_are_named(options, error, message):
    params, x = problem()
    with pytest.raises(error, match=message):
        deq_fixed_point(cell, params, x, **options)
