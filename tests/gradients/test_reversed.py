"""Backpropagation along a recomputed path, against backpropagation along a stored one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from deq_jax import (
    Anderson,
    BackwardProbe,
    Execution,
    Implicit,
    Reversed,
    Reversible,
    Status,
    Unrolled,
    deq_fixed_point,
)
from deq_jax.closure import close
from deq_jax.gradients.policy import GradientPolicy
from tests.reference import relative_error

WIDTH, BATCH = 6, 3


def cell(params, z, x):
    return jnp.tanh(z @ params["W"].T + x + params["b"])


@functools.cache
def problem():
    """Params, input and cotangent in float64; the norm of W is 0.9."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(WIDTH, WIDTH))
    params = {"W": 0.9 * w / np.linalg.norm(w, 2), "b": rng.normal(size=WIDTH)}
    return params, rng.normal(size=(BATCH, WIDTH)), rng.normal(size=(BATCH, WIDTH))


def single(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


@functools.partial(jax.jit, static_argnames=("solver", "policy"))
def gradient(params, x, y, probe=None, *, solver, policy):
    """By params, x and the probe, and z with its report."""

    def loss(params, x, probe):
        z, stats = deq_fixed_point(
            cell,
            params,
            x,
            solver=solver,
            gradient=policy,
            backward_probe=probe,
            return_stats=True,
        )
        return jnp.vdot(y, z), (z, stats)

    return jax.grad(loss, (0, 1, 2), has_aux=True)(params, x, probe)


@functools.cache
def along_the_pair(beta, evaluations):
    """The gradient through the paper's pair itself, in float64, by a stored scan.

    Each sample is returned as it was where its residual was lowest.
    """
    params, x, y = problem()

    def loss(params, x):
        def both(pair, _):
            first, second = pair
            first = (1 - beta) * first + beta * cell(params, second, x)
            after = (1 - beta) * second + beta * cell(params, first, x)
            return (first, after), (second, first)  # evaluated in this order

        start = jnp.zeros_like(x), jnp.zeros_like(x)
        _, (seconds, firsts) = lax.scan(both, start, length=evaluations // 2)
        points = jnp.stack([seconds, firsts], 1).reshape(evaluations, *x.shape)
        images = cell(params, points, x)
        norm = functools.partial(jnp.linalg.norm, axis=2)
        best = jnp.argmin(norm(images - points) / norm(images), axis=0)
        return jnp.vdot(y, points[best, jnp.arange(BATCH)])

    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, (params, x))
        return jax.device_get(jax.jit(jax.grad(loss, (0, 1)))(*arguments))


@pytest.mark.parametrize("beta", [0.5, 1638 / 2048])
@pytest.mark.parametrize("evaluations", [4, 16, pytest.param(64, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_gradient_is_that_of_all_iterates(beta, evaluations):
    """Float32 against float64: what is left is the rounding of f and of the sums."""
    params, x, y = single(problem())
    solver = Reversible(beta, tol=0.0, max_iter=evaluations)
    probe = BackwardProbe.zeros(BATCH)
    (*got, report), _ = gradient(params, x, y, probe, solver=solver, policy=Reversed())
    assert relative_error(got, list(along_the_pair(beta, evaluations))) < 1e-6
    # The very start was found again, but for what a single float loses in a few steps.
    assert report.residual.max() < (1e-5 if evaluations == 4 else 1e-6)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.iterations, evaluations)


def test_too_few_components_are_reported():
    params, x, y = single(problem())
    steep = params | {"W": 3 * params["W"]}
    probe = BackwardProbe.zeros(BATCH)
    solver = Reversible(0.5, tol=0.0, max_iter=64, components=2)
    (*_, report), _ = gradient(steep, x, y, probe, solver=solver, policy=Reversed())
    assert (report.residual > 1e-3).all()
    assert Status.CONVERGED not in report.status.tolist()


def compare(solver, **options):
    """Reversed and Unrolled in float64, from one `problem` changed by `options`."""
    arguments = jax.tree.map(jnp.asarray, problem())
    (*got, _), (z, stats) = gradient(*arguments, solver=solver, policy=Reversed())
    (*expected, _), (same, stats_too) = gradient(*arguments, solver=solver, policy=Unrolled())
    np.testing.assert_allclose(z, same, rtol=1e-14)
    np.testing.assert_array_equal(stats.iterations, stats_too.iterations)
    np.testing.assert_allclose(stats.residual, stats_too.residual, rtol=1e-6, atol=1e-15)
    assert relative_error(got, expected) < 1e-12
    return stats


@pytest.mark.slow
def test_the_start_is_exactly_where_it_was():
    """At zero ReLU has the derivative 0, a rounding error away from it 1."""
    params, x, y = single(problem())

    def loss(w, b, policy):
        def f(w, z, x):
            return jax.nn.relu(z @ w + b) + x

        options = {"solver": Reversible(0.8, tol=0.0, max_iter=8), "gradient": policy}
        return jnp.vdot(y, deq_fixed_point(f, w, x, **options))

    got, expected = (
        jax.jit(jax.grad(functools.partial(loss, policy=policy), (0, 1)))(params["W"], 0 * x[0])
        for policy in (Reversed(), Unrolled())
    )
    assert relative_error(got, expected) < 1e-6


@pytest.mark.slow
def test_half_precision():
    """Samples stop while the next point is within a few units of rounding of the last one."""
    params, x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), problem())
    solver, probe = Reversible(0.8, tol=2e-2, max_iter=15), BackwardProbe.zeros(BATCH)
    (*got, report), (z, stats) = gradient(params, x, y, probe, solver=solver, policy=Reversed())
    assert z.dtype == jnp.bfloat16
    assert (stats.iterations < 15).all()
    assert len(set(stats.iterations.tolist())) > 1
    np.testing.assert_array_equal(report.iterations, stats.iterations)
    assert report.residual.max() < 1e-6
    widened = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x, y))
    (*expected, _), _ = gradient(*widened, solver=solver, policy=Unrolled())
    assert relative_error(got, expected) < 0.03


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_each_sample_is_differentiated_where_it_stopped():
    stats = compare(Reversible(0.8, tol=3e-3, max_iter=30))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert len(set(stats.iterations.tolist())) > 1
    assert stats.trace is None


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_the_best_iterate_and_the_samples_on_the_way():
    """A map that expands: residuals rise again, at another evaluation for each sample."""
    turn = 1.3 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    x = jnp.array([[1.0, 0.5], [0.3, -0.2], [0.0, 0.02]])
    z0 = jnp.array([[0.0, 0.0], [3.0, 2.0], [0.1, 0.1]])
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2)))

    def loss(turn, x, policy):
        solver = Reversible(0.8, tol=0.0, max_iter=12, trace=True)
        z, stats, samples = deq_fixed_point(
            lambda turn, z, x: 2 * jnp.sin(z @ turn.T) + x,
            turn,
            x,
            z0,
            solver=solver,
            gradient=policy,
            sample_at=(2, 7),
            return_stats=True,
        )
        return jnp.vdot(weights, jnp.stack([z, *samples])), (z, samples, stats.trace)

    derivative = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    got, (*states, trace) = derivative(turn, x, Reversed())
    best = np.argmin(trace, axis=0) + 1
    assert (best < 12).all()
    assert len(set(best.tolist())) > 1
    expected, (*others, _) = derivative(turn, x, Unrolled())
    assert relative_error(states, others) < 1e-13
    assert relative_error(got, expected) < 1e-11


@pytest.mark.slow
def test_a_sample_that_is_not_finite_leaves_the_others_alone():
    params, x, y = single(problem())
    solver = Reversible(0.8, tol=1e-3, max_iter=15)
    spoilt = x.at[1].set(jnp.nan)
    probe = BackwardProbe.zeros(BATCH)
    (*got, report), (z, stats) = gradient(
        params, spoilt, y, probe, solver=solver, policy=Reversed()
    )
    assert stats.status.tolist() == [Status.CONVERGED, Status.DIVERGED, Status.CONVERGED]
    np.testing.assert_array_equal(z[1], 0)
    assert report.iterations[1] == 0
    (*expected, _), _ = gradient(params, x, y.at[1].set(0), solver=solver, policy=Reversed())
    by_x = np.asarray(got[1])
    np.testing.assert_allclose(by_x[[0, 2]], expected[1][np.array([0, 2])], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_pytrees_closures_one_equation_and_vmap():
    params, x, y = jax.tree.map(jnp.asarray, problem())
    solver = Reversible(0.5, tol=1e-3, max_iter=20)

    def loss(params, x, policy):
        def f(nothing, z, also):
            # It mixes the rows: one equation.
            a = cell(params, z["a"], x) - 0.1 * z["a"].mean(0)
            return {"a": a, "b": 0.3 * z["b"] * (1 + 1j) + 0.1 * a.sum().astype(z["b"].dtype)}

        z0 = {"a": jnp.zeros_like(x), "b": jnp.zeros(2, jnp.complex128)}
        options = {"solver": solver, "gradient": policy, "batched": False}
        z = deq_fixed_point(f, None, (), z0, **options)
        return jnp.vdot(y, z["a"]) + (z["b"].real + 2 * z["b"].imag).sum()

    inputs = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.8 * leaf]), (params, x))
    got, expected = (
        jax.jit(jax.vmap(jax.grad(functools.partial(loss, policy=policy), (0, 1))))(*inputs)
        for policy in (Reversed(), Unrolled())
    )
    assert relative_error(got, expected) < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_on_four_devices():
    params, x, y = jax.tree.map(jnp.asarray, problem())
    x, y = (jnp.concatenate([a, a[:1]]) for a in (x, y))

    def loss(params, x, execution):
        options = {"solver": Reversible(0.8, tol=1e-3), "gradient": Reversed()}
        return jnp.vdot(y, deq_fixed_point(cell, params, x, execution=execution, **options))

    derivative = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)
    expected = derivative(params, x, Execution())
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        got = derivative(params, x, Execution(shard_axis="data"))
    assert relative_error(jax.device_get(got), expected) < 1e-12


def test_what_it_cannot_do_is_an_error_that_says_what_to_do():
    params, x, _ = single(problem())
    assert isinstance(Reversed(), GradientPolicy)

    def loss(x, f=cell, policy=Reversed(), **options):  # noqa: B008
        options.setdefault("solver", Reversible(max_iter=4))
        return deq_fixed_point(f, params, x, gradient=policy, **options).sum()

    with pytest.raises(TypeError, match=r"solver=Reversible.*got Anderson"):
        loss(x, solver=Anderson())
    with pytest.raises(ValueError, match=r"too few components: 64 evaluations.*components=7"):
        loss(x, solver=Reversible(0.8, max_iter=64, components=2))
    with pytest.raises(ValueError, match=r"mix.*batched=False"):
        loss(x, lambda p, z, x: cell(p, z - z.mean(0), x))
    with pytest.raises(TypeError, match="first derivatives only"):
        jax.grad(lambda x: jax.grad(loss)(x).sum())(x)
    with pytest.raises(ValueError, match="shrink_to"):
        loss(x, execution=Execution(shrink_to=1))
    closed = close(cell, params, x, x)
    with pytest.raises(TypeError, match="take Implicit"):
        Reversed().attach(closed, None, solver=Reversible(), probe=None)
    Implicit().check(Reversible())
