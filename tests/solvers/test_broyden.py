"""Broyden against the dense form of its recursion in NumPy, its memory, guards and line search."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    BackwardProbe,
    Broyden,
    Implicit,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import broyden


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def symmetric(eigenvalues, seed=0):
    basis = np.linalg.qr(normal(len(eigenvalues), len(eigenvalues), seed=seed))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def linear(matrix, z, x):
    return z @ matrix.T + x


def tanh_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T) + x


def overshooting_cell(gain, z, x):
    """`f(z) - z = 4 arctan(gain (x - z))`: flat far from the equilibrium x and steep around it."""
    return z + 4 * jnp.arctan(gain * (x - z))


def visited(f, params, x, solver, count, z=None):
    """Points of evaluation, values of f there, and the states after each of them."""
    z = jnp.zeros_like(x) if z is None else z
    state = solver.init(z, jax.ShapeDtypeStruct(z.shape, z.dtype))
    points, values, states = [], [], []
    step = jax.jit(solver.step)
    for _ in range(count):
        fz = f(params, z, x)
        points.append(np.asarray(z))
        values.append(np.asarray(fz))
        z, state = step(z, fz, state)
        states.append(state)
    return points, values, states


def assert_follows(points, expected, sample, rtol=1e-9):
    for got, want in zip(points, expected, strict=True):
        error = np.linalg.norm(got[sample] - want)
        assert error <= rtol * np.linalg.norm(want)


@pytest.mark.museum(
    "locuslab/mdeq#5: Broyden's first step went the wrong way: z - g instead of z + g; jaxopt's "
    "default gamma = 1 is the same slip"
)
@pytest.mark.parametrize(("memory", "step_size"), [(None, 1.0), (None, 0.7), (3, 1.0), (1, 0.7)])
@pytest.mark.usefixtures("x64")
def test_every_step_is_the_recursions(memory, step_size):
    matrix, x = normal(12, 12, seed=1, scale=0.25), normal(2, 12, seed=2)
    solver = Broyden(memory=memory, step_size=step_size)
    points, *_ = visited(tanh_cell, jnp.asarray(matrix), jnp.asarray(x), solver, 13)
    for i in range(2):
        expected = broyden(
            lambda z, i=i: np.tanh(matrix @ z) + x[i],
            np.zeros(12),
            steps=13,
            memory=memory,
            step_size=step_size,
        )
        assert_follows(points, expected, i)


@pytest.mark.museum(
    "jaxopt J2: Broyden applied its low-rank product leaf by leaf: the secant condition failed by"
    " 0.1 to 0.3 on a split tree"
)
@pytest.mark.parametrize(("memory", "line_search"), [(None, False), (3, False), (3, True)])
@pytest.mark.usefixtures("x64")
def test_secant_condition_and_transpose(memory, line_search):
    """B Δg = Δz after every step, over all leaves at once; and Bᵀ is the transpose of B."""
    matrix, x = normal(12, 12, seed=1, scale=0.25), normal(2, 12, seed=2)
    solver = Broyden(memory=memory, line_search=line_search)
    points, values, states = visited(tanh_cell, jnp.asarray(matrix), jnp.asarray(x), solver, 9)
    residuals = [value - point for point, value in zip(points, values, strict=True)]

    @jax.jit
    def dense_forms(inverse, identity):
        apply = jax.vmap(lambda row: inverse.apply(jnp.tile(row, (2, 1))), out_axes=2)
        transposed = jax.vmap(
            lambda row: inverse.apply_transposed(jnp.tile(row, (2, 1))), out_axes=2
        )
        return apply(identity), transposed(identity)

    for k in range(1, 9):
        inverse = states[k].inverse
        change, g_change = points[k] - points[k - 1], residuals[k] - residuals[k - 1]
        held = (k - 1) % (memory or 100) + 1
        np.testing.assert_array_equal(np.asarray(inverse.filled).sum(1), held)
        dense, transposed = dense_forms(inverse, jnp.eye(12))
        np.testing.assert_allclose(dense, transposed.mT, rtol=0, atol=1e-13)
        error = np.einsum("bij,bj->bi", dense, g_change) - change
        assert np.linalg.norm(error) <= 1e-12 * np.linalg.norm(change)
        direction = -np.einsum("bij,bj->bi", dense, residuals[k])
        np.testing.assert_allclose(states[k].direction, direction, rtol=0, atol=1e-12)


@pytest.mark.museum(
    "jaxopt J2: Broyden applied its low-rank product leaf by leaf: the secant condition failed by"
    " 0.1 to 0.3 on a split tree"
)
@pytest.mark.museum("akbir/deq-jax, locuslab/deq#17: Broyden took states of three dimensions only")
@pytest.mark.usefixtures("x64")
def test_a_state_in_three_leaves_takes_the_arrays_steps():
    matrix, x = normal(12, 12, seed=1, scale=0.35), jnp.asarray(normal(3, 12, seed=2))
    matrix = jnp.asarray(matrix)

    def split(z):
        return {"a": z[:, :2], "b": (z[:, 2:8].reshape(-1, 2, 3), z[:, 8:])}

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1, 6), tree["b"][1]], axis=1)

    def tree_cell(matrix, z, x):
        return split(tanh_cell(matrix, join(z), x))

    solver = Broyden(memory=5, tol=1e-10, max_iter=60, trace=True)
    array, array_stats = solve_fixed_point(tanh_cell, matrix, x, solver=solver)
    tree, tree_stats = solve_fixed_point(tree_cell, matrix, x, split(0 * x), solver=solver)
    assert (array_stats.status == Status.CONVERGED).all()
    assert array_stats.evaluations > 8
    np.testing.assert_array_equal(array_stats.iterations, tree_stats.iterations)
    np.testing.assert_allclose(join(tree), array, rtol=0, atol=1e-12)
    np.testing.assert_allclose(tree_stats.trace, array_stats.trace, rtol=1e-6, atol=1e-14)


@pytest.mark.museum(
    "torchdeq T5: limited-memory Broyden overwrote columns that later ones were built on: NaN at "
    "L = 20, 10, 5"
)
@pytest.mark.parametrize(
    ("memory", "at_most"), [(None, 60), (20, 60), (10, 60), (5, 80), (2, 140), (1, 200)]
)
@pytest.mark.usefixtures("x64")
def test_a_short_memory_converges(memory, at_most):
    """Terms dropped one by one diverge here; an emptied memory costs some evaluations only."""
    matrix, x = symmetric(np.linspace(-0.5, 0.95, 64)), normal(4, 64, seed=1)
    solver = Broyden(memory=memory, tol=1e-8, max_iter=300)
    z, stats = solve_fixed_point(linear, jnp.asarray(matrix), jnp.asarray(x), solver=solver)
    assert (stats.status == Status.CONVERGED).all()
    assert stats.evaluations <= at_most  # Picard takes 324
    expected = np.linalg.solve(np.eye(64) - matrix, x.T).T
    # 1 / (1 - 0.95) times the residual bounds the error.
    error = np.linalg.norm(z - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert (error <= 20 * 1.01e-8).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_memory_longer_than_the_solve_is_the_full_one():
    matrix, x = normal(12, 12, seed=1, scale=0.25), jnp.asarray(normal(2, 12, seed=2))
    full, longer = (
        visited(tanh_cell, jnp.asarray(matrix), x, Broyden(memory, max_iter=20), 12)[0]
        for memory in (None, 30)
    )
    for a, b in zip(full, longer, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
@pytest.mark.usefixtures("x64")
def test_a_rescaled_problem_takes_the_same_steps(scale):
    matrix, x = symmetric(np.linspace(-0.5, 0.9, 20)), jnp.asarray(normal(3, 20, seed=1))
    solver = Broyden(tol=1e-8, max_iter=100)
    one = solve_fixed_point(linear, jnp.asarray(matrix), x, solver=solver)
    scaled = solve_fixed_point(linear, jnp.asarray(matrix), scale * x, solver=solver)
    np.testing.assert_array_equal(one.stats.iterations, scaled.stats.iterations)
    np.testing.assert_allclose(scaled.value, scale * one.value, rtol=1e-6)


def test_float32_on_the_slow_map():
    matrix = jnp.asarray(symmetric(np.linspace(0.1, 0.99, 100)), jnp.float32)
    x = jnp.asarray(normal(1, 100, seed=7), jnp.float32)
    _, stats = solve_fixed_point(linear, matrix, x, solver=Broyden(tol=1e-5, max_iter=500))
    assert stats.status[0] == Status.CONVERGED
    assert stats.evaluations <= 120  # 69 in float64; Picard takes about 680


@pytest.mark.museum("jaxopt J12: Broyden divided by a denominator that nothing kept from zero")
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_constant_f_and_a_constant_residual_leave_no_nan():
    x = jnp.asarray(normal(2, 5))
    # f(z) = c: the second evaluation is exact, and all changes after it vanish.
    solver = Broyden()
    points, _, states = visited(lambda p, z, x: x, None, x, solver, 6)
    for point in points[1:]:
        np.testing.assert_allclose(point, x, rtol=1e-15)
    assert np.isfinite(states[-1].inverse.left).all()
    # f(z) = z + c: Δg = 0 up to rounding, so there is nothing to learn and the step is Picard's.
    c = jnp.round(64 * x) / 64  # no rounding in z + c
    points, _, states = visited(lambda p, z, x: z + c, None, c, solver, 6)
    for k, point in enumerate(points):
        np.testing.assert_array_equal(point, k * c)
    assert not states[-1].inverse.filled.any()
    # One dimension: the equilibrium is met to the last bit, and the loop goes on regardless.
    z, stats = solve_fixed_point(
        lambda p, z, x: jnp.cos(z), None, jnp.zeros((2, 1)), solver=Broyden(tol=0.0, max_iter=40)
    )
    np.testing.assert_allclose(z, 0.7390851332151607, rtol=1e-15)
    assert (stats.status != Status.DIVERGED).all()


@pytest.mark.parametrize("memory", [None, 4])
@pytest.mark.usefixtures("x64")
def test_spectral_radius_above_one(memory):
    matrix, x = symmetric(np.linspace(-1.5, 0.7, 12)), normal(2, 12, seed=1)
    x, params = jnp.asarray(x), jnp.asarray(matrix)
    solver = Broyden(memory=memory, tol=1e-10, max_iter=300)
    z, stats = solve_fixed_point(linear, params, x, solver=solver)
    assert (stats.status == Status.CONVERGED).all()
    np.testing.assert_allclose(z, np.linalg.solve(np.eye(12) - matrix, x.T).T, atol=1e-8)
    picard = solve_fixed_point(linear, params, x, solver=Picard(tol=1e-10, max_iter=300)).stats
    assert (picard.status != Status.CONVERGED).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_line_search_takes_the_references_steps_and_decreases():
    """From far away the full step overshoots: it is halved until the residual decreases."""
    x = np.array([[2.0, 1.0, -1.0], [0.3, -0.2, 0.1]])
    gain = np.array([1.0, 2.0, 3.0])
    start = x + np.array([[0.5, 1.0, -0.2], [0.01, 0.01, -0.01]])
    solver = Broyden(line_search=True, tol=1e-10, max_iter=60, trace=True)
    given = (overshooting_cell, jnp.asarray(gain), jnp.asarray(x))
    points, *_ = visited(*given, solver, 12, jnp.asarray(start))
    for i in range(2):
        expected = broyden(
            lambda z, i=i: z + 4 * np.arctan(gain * (x[i] - z)),
            start[i],
            steps=12,
            line_search=True,
        )
        assert_follows(points, expected, i)
    z, stats = solve_fixed_point(*given, jnp.asarray(start), solver=solver)
    assert (stats.status == Status.CONVERGED).all()
    np.testing.assert_allclose(z, x, rtol=0, atol=1e-9)
    sizes = np.array(
        [np.linalg.norm(4 * np.arctan(gain * (x - point)), axis=1) for point in points]
    )
    # The first step overshoots, and what is accepted in its place is better than the start.
    assert (sizes[1] > sizes[0]).all()
    assert (sizes[2:7].min(0) < sizes[0]).all()


@pytest.mark.usefixtures("x64")
def test_line_search_helps_where_full_steps_wander():
    x = jnp.asarray(normal(4, 3, seed=3))
    gain = jnp.asarray([0.5, 1.0, 2.0])
    start = x + jnp.asarray(normal(4, 3, seed=4))
    full, searched = (
        solve_fixed_point(
            overshooting_cell,
            gain,
            x,
            start,
            solver=Broyden(line_search=line_search, tol=1e-8, max_iter=60),
        ).stats
        for line_search in (False, True)
    )
    assert (searched.status == Status.CONVERGED).all()
    assert searched.evaluations <= 16  # trials that were refused among them
    assert full.evaluations >= 20


@pytest.mark.museum(
    "torchdeq T10: a sample's result moved by up to 7e-4 when a hard sample joined its batch"
)
@pytest.mark.parametrize(
    "solver",
    [
        Broyden(tol=1e-8, max_iter=100, trace=True),
        Broyden(memory=3, tol=1e-8, max_iter=100, trace=True),
        Broyden(line_search=True, tol=1e-8, max_iter=100, trace=True),
    ],
    ids=["plain", "memory", "line search"],
)
@pytest.mark.usefixtures("x64")
def test_a_sample_does_not_depend_on_its_batch_mates(solver):
    """Mates that overshoot, restart, or are done at once."""
    x, start = jnp.asarray(normal(4, 3, seed=1)), jnp.asarray(normal(4, 3, seed=2))
    start = x + start * jnp.asarray([0.01, 0.3, 1.0, 3.0])[:, None]
    gains = jnp.asarray([0.05, 0.2, 0.5, 2.0])[:, None]
    z, stats = solve_fixed_point(overshooting_cell, gains, x, start, solver=solver)
    assert len(set(np.asarray(stats.iterations).tolist())) >= 3
    for i in range(4):
        alone, alone_stats = solve_fixed_point(
            overshooting_cell, gains[i : i + 1], x[i : i + 1], start[i : i + 1], solver=solver
        )
        np.testing.assert_allclose(z[i], alone[0], rtol=1e-12)
        assert stats.iterations[i] == alone_stats.iterations[0]
        np.testing.assert_allclose(
            stats.trace[:, i], alone_stats.trace[:, 0], rtol=1e-6, atol=1e-14
        )


@pytest.mark.parametrize(("bad", "line_search"), [(np.nan, False), (np.inf, True)])
def test_a_bad_sample_stays_alone(bad, line_search):
    matrix = jnp.asarray(normal(6, 6, scale=0.3), jnp.float32)
    x = jnp.asarray(normal(3, 6, seed=1), jnp.float32)
    solver = Broyden(memory=4, line_search=line_search, tol=1e-5)
    clean, clean_stats = solve_fixed_point(tanh_cell, matrix, x, solver=solver)
    spoilt, stats = solve_fixed_point(tanh_cell, matrix, x.at[1, 2].set(bad), 0 * x, solver=solver)
    np.testing.assert_array_equal(spoilt[::2], clean[::2])
    np.testing.assert_array_equal(stats.residual[::2], clean_stats.residual[::2])
    np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0])
    np.testing.assert_array_equal(spoilt[1], jnp.zeros(6))


@pytest.mark.parametrize(
    "solver", [Broyden(max_iter=9), Broyden(line_search=True), Broyden(max_iter=1)]
)
def test_evaluations_count_the_calls_of_f(solver):
    calls = []

    def f(gain, z, x):
        jax.debug.callback(lambda: calls.append(None))
        return overshooting_cell(gain, z, x)

    x = jnp.asarray(normal(3, 4), jnp.float32)
    stats = solve_fixed_point(f, jnp.float32(1.0), x, solver=solver).stats
    jax.effects_barrier()
    assert len(calls) == stats.evaluations == stats.iterations.max() <= solver.max_iter
    assert stats.products is None


@pytest.mark.usefixtures("x64", "standard_promotion")
def test_complex_states():
    matrix = normal(8, 8, scale=0.2) + 1j * normal(8, 8, seed=1, scale=0.2)
    x = normal(2, 8, seed=2) + 1j * normal(2, 8, seed=3)
    z, stats = solve_fixed_point(
        linear, jnp.asarray(matrix), jnp.asarray(x), solver=Broyden(tol=1e-10, max_iter=100)
    )
    assert (stats.status == Status.CONVERGED).all()
    np.testing.assert_allclose(z, np.linalg.solve(np.eye(8) - matrix, x.T).T, atol=1e-8)


STEP = jax.jit(Broyden().step)


def after_three_steps():
    """Point and value of the fourth evaluation, and the state before it."""
    matrix, x = jnp.asarray(normal(6, 6, scale=0.3)), jnp.asarray(normal(2, 6, seed=1))
    points, values, states = visited(tanh_cell, matrix, x, Broyden(), 4)
    return points[3], values[3], states[2]


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_residual_far_above_the_best_empties_that_samples_memory():
    """What is left is the pair of the jump, on -I."""
    z, fz, state = after_three_steps()
    healthy, _ = STEP(z, fz, state)
    jumped = fz + np.array([[1e5], [0.0]])
    proposal, after = STEP(z, jumped, state)
    np.testing.assert_array_equal(np.asarray(after.inverse.filled).sum(1), [1, 3])
    np.testing.assert_array_equal(proposal[1], healthy[1])
    change, g = z[0] - state.base[0], jumped[0] - z[0]
    g_change = g - state.residual[0]
    estimate = -np.eye(6) + np.outer(g_change + change, change) / (change @ change)
    np.testing.assert_allclose(proposal[0], z[0] - np.linalg.solve(estimate, g), rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_a_step_that_is_not_finite_gives_way_to_the_plain_one():
    z, fz, state = after_three_steps()
    healthy, _ = STEP(z, fz, state)
    left, right = (columns.at[0].mul(1e300) for columns in state.inverse[:2])
    broken = state._replace(inverse=state.inverse._replace(left=left, right=right))
    proposal, after = STEP(z, fz, broken)
    np.testing.assert_allclose(proposal[0], fz[0], rtol=1e-14)
    np.testing.assert_array_equal(np.asarray(after.inverse.filled).sum(1), [0, 3])
    np.testing.assert_array_equal(proposal[1], healthy[1])


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_estimate_of_a_stopped_sample_is_kept():
    """A mate that goes on must not empty it: with `reuse` the sample's gradient starts from it."""
    matrix, x = jnp.asarray(normal(8, 8, scale=0.2)), jnp.asarray(normal(2, 8, seed=1))
    gains = jnp.asarray([[0.3], [1.2]])
    solver = Broyden(memory=4, tol=1e-8, max_iter=60)
    policy = Implicit(reuse=True, max_iter=1)

    def gradient(x, gains):
        def loss(x, probe):
            z, stats = deq_fixed_point(
                lambda gains, z, x: jnp.tanh(gains * (z @ matrix.T)) + x,
                gains,
                x,
                solver=solver,
                gradient=policy,
                backward_probe=probe,
                return_stats=True,
            )
            return (z**2).sum(), stats

        return jax.grad(loss, argnums=(0, 1), has_aux=True)(x, BackwardProbe.zeros(len(x)))

    (together, report), stats = gradient(x, gains)
    assert stats.iterations[1] >= stats.iterations[0] + 4
    (alone, alone_report), _ = gradient(x[:1], gains[:1])
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-7)
    np.testing.assert_allclose(report.residual[0], alone_report.residual[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory": 0}, "Broyden.memory must be at least 1, got 0"),
        ({"memory": 2.0}, "Broyden.memory must be an integer, got 2.0"),
        ({"step_size": 0.0}, "Broyden.step_size must be finite, > 0.0, got 0.0"),
        ({"step_size": float("nan")}, "Broyden.step_size must be finite"),
        ({"line_search": 1}, "Broyden.line_search must be a bool, got 1"),
        ({"tol": -1.0}, "Broyden.tol must be finite, >= 0.0"),
        ({"max_iter": 0}, "Broyden.max_iter must be at least 1, got 0"),
        ({"atol": "0"}, "Broyden.atol must be a number, got '0'"),
        ({"trace": None}, "Broyden.trace must be a bool, got None"),
    ],
)
def test_bad_options_are_named(change, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        Broyden(**change)
    assert error in str(raised.value)
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(Broyden(), **change)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_bound_holds_steps_that_would_leave_the_solution_behind():
    """tanh is nearly flat far out: from there the secant leads ever further away."""

    def f(_, z, x):
        return z - jnp.tanh(z - x)

    z0 = jnp.linspace(0.5, 60, 24)[:, None]
    x, limits = 0 * z0, {"tol": 1e-14, "atol": 1e-9, "max_iter": 60}
    free = solve_fixed_point(f, None, x, z0, solver=Broyden(**limits)).stats
    assert (~free.converged).sum() > 5
    held = solve_fixed_point(f, None, x, z0, solver=Broyden(bound=3.0, **limits))
    np.testing.assert_array_equal(held.stats.status, Status.CONVERGED)
    np.testing.assert_allclose(held.value, 0, atol=1e-8)
    # The first step is Picard's, the next ones as long as the bound allows.
    solver, z, lengths = Broyden(bound=3.0), z0[6:7], []
    state = solver.init(z, z)
    for _ in range(4):
        before, g = z, f(None, z, x[:1]) - z
        z, state = solver.step(z, f(None, z, x[:1]), state)
        lengths.append(abs(float((z - before)[0, 0] / g[0, 0])))
    assert lengths == pytest.approx([1, 3, 3, 3])
    with pytest.raises(ValueError, match=r"Broyden.bound must be finite, > 0"):
        Broyden(bound=0.0)
