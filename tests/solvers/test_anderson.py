"""Anderson against its formula in NumPy, and the properties that other libraries' lack."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Picard, Status, deq_fixed_point, solve_fixed_point
from tests.reference import anderson, picard


def orthogonal(rng, n):
    return np.linalg.qr(rng.normal(size=(n, n)))[0]


def symmetric(eigenvalues, seed=0):
    basis = orthogonal(np.random.default_rng(seed), len(eigenvalues))
    return basis @ np.diag(eigenvalues) @ basis.T


def linear(matrix, z, x):
    return z @ matrix.T + x


def tanh_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T) + x


def points_evaluated(f, params, x, solver, count):
    """The points at which the solver evaluates f, in order."""
    z, points = jnp.zeros_like(x), []
    state = solver.init(z, jax.ShapeDtypeStruct(z.shape, z.dtype))
    step = jax.jit(solver.step)
    for _ in range(count):
        points.append(np.asarray(z))
        z, state = step(z, f(params, z, x), state)
    return points


@pytest.mark.museum("jaxopt J9: Anderson did not accelerate for the first history_size steps")
@pytest.mark.parametrize("mixing", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("history", [1, 2, 5])
@pytest.mark.usefixtures("x64")
def test_every_step_is_the_formulas(history, mixing):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(12, 12)) * 0.25
    x = rng.normal(size=(2, 12))
    solver = Anderson(history=history, mixing=mixing, ridge=1e-7)
    points = points_evaluated(tanh_cell, jnp.asarray(matrix), jnp.asarray(x), solver, 9)
    for i in range(2):
        expected = anderson(
            lambda z, i=i: np.tanh(matrix @ z) + x[i],
            np.zeros(12),
            history=history,
            mixing=mixing,
            ridge=1e-7,
            steps=9,
        )
        for got, want in zip(points, expected, strict=True):
            np.testing.assert_allclose(got[i], want, rtol=0, atol=1e-9)


@pytest.mark.museum(
    "FixedPointAcceleration.jl#13: the damping of plain iteration was silently without effect"
)
@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.usefixtures("x64")
def test_every_picard_step_is_the_formulas(damping):
    rng = np.random.default_rng(1)
    matrix = rng.normal(size=(12, 12)) * 0.25
    x = rng.normal(size=(1, 12))
    solver = Picard(damping=damping)
    points = points_evaluated(tanh_cell, jnp.asarray(matrix), jnp.asarray(x), solver, 6)
    expected = picard(lambda z: np.tanh(matrix @ z) + x[0], np.zeros(12), damping=damping, steps=6)
    np.testing.assert_allclose([point[0] for point in points], expected, rtol=1e-13)


@pytest.mark.museum(
    "torchdeq T4: an absolute Anderson ridge of 1e-4 kept a relative 1e-5 out of reach in 200 "
    "steps at scale 1"
)
@pytest.mark.museum(
    "jaxopt J1: with its absolute ridge Anderson took 1007 / 2383 / 3759 steps to 1e-4 / 1e-6 / "
    "1e-8 where Picard took 794 / 1253 / 1711"
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.usefixtures("x64")
def test_counts_on_the_slow_symmetric_map(scale):
    matrix = jnp.asarray(symmetric(np.linspace(0.1, 0.99, 100)))
    x = scale * jnp.asarray(np.random.default_rng(7).normal(size=(1, 100)))
    for tol, at_most in ((1e-4, 65), (1e-6, 140), (1e-8, 220)):
        _, stats = solve_fixed_point(linear, matrix, x, solver=Anderson(tol=tol, max_iter=500))
        assert stats.status[0] == Status.CONVERGED
        assert stats.evaluations <= at_most
        unscaled = solve_fixed_point(
            linear, matrix, x / scale, solver=Anderson(tol=tol, max_iter=500)
        ).stats
        assert stats.evaluations == unscaled.evaluations


@pytest.mark.museum(
    "jaxopt J1: with its absolute ridge Anderson took 1007 / 2383 / 3759 steps to 1e-4 / 1e-6 / "
    "1e-8 where Picard took 794 / 1253 / 1711"
)
@pytest.mark.parametrize("history", [2, 5, 10])
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_never_behind_picard(history):
    """At every tolerance: an absolute ridge falls behind as soon as residuals are small."""
    rng = np.random.default_rng(3)
    nonsymmetric = rng.normal(size=(80, 80))
    nonsymmetric *= 0.9 / np.abs(np.linalg.eigvals(nonsymmetric)).max()
    cases = [
        (linear, symmetric(np.linspace(-0.5, 0.95, 64))),
        (linear, nonsymmetric),
        (tanh_cell, nonsymmetric),
        (tanh_cell, symmetric(np.linspace(-0.9, 0.9, 64))),
    ]
    for f, matrix in cases:
        x = jnp.asarray(rng.normal(size=(3, len(matrix))))
        traces = [
            solve_fixed_point(f, jnp.asarray(matrix), x, solver=solver).stats.trace
            for solver in (
                Anderson(history=history, tol=1e-9, max_iter=900, trace=True),
                Picard(tol=1e-9, max_iter=900, trace=True),
            )
        ]
        for tol in (1e-2, 1e-4, 1e-6, 1e-9):
            # Evaluations until each sample has met the tolerance once.
            ours, plain = ((trace <= tol).argmax(0) + 1 for trace in traces)
            assert np.nanmin(traces[1], axis=0).max() <= tol
            assert np.nanmin(traces[0], axis=0).max() <= tol
            assert (ours <= plain).all()


@pytest.mark.slow
def test_float32_keeps_accelerating():
    matrix = jnp.asarray(symmetric(np.linspace(0.1, 0.99, 100)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(7).normal(size=(1, 100)), jnp.float32)
    _, stats = solve_fixed_point(linear, matrix, x, solver=Anderson(tol=1e-5, max_iter=500))
    assert stats.status[0] == Status.CONVERGED
    assert stats.evaluations <= 110  # Picard takes about 680


@pytest.mark.parametrize("radius", [1.0, 1.3])
@pytest.mark.usefixtures("x64")
def test_solves_where_picard_diverges(radius):
    angles = np.linspace(0.5, 2.5, 4)
    blocks = [radius * np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]]) for a in angles]
    matrix = np.zeros((8, 8))
    for i, block in enumerate(blocks):
        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = block
    x = np.random.default_rng(0).normal(size=(1, 8))
    z, stats = solve_fixed_point(
        linear, jnp.asarray(matrix), jnp.asarray(x), solver=Anderson(10, tol=1e-9, max_iter=300)
    )
    assert stats.status[0] == Status.CONVERGED
    np.testing.assert_allclose(z[0], np.linalg.solve(np.eye(8) - matrix, x[0]), atol=1e-6)
    picard_stats = solve_fixed_point(
        linear, jnp.asarray(matrix), jnp.asarray(x), solver=Picard(tol=1e-9, max_iter=300)
    ).stats
    assert picard_stats.status[0] != Status.CONVERGED


@pytest.mark.museum(
    "locuslab/deq#20: a singular system in Anderson's window crashed the run: singular U"
)
@pytest.mark.usefixtures("x64")
def test_a_singular_window_restarts():
    """In one dimension all residuals are parallel: every window of two or more is singular."""
    z, stats = solve_fixed_point(
        lambda p, z, x: jnp.cos(z), None, jnp.zeros((3, 1)), solver=Anderson(ridge=0.0, tol=1e-12)
    )
    assert (stats.status == Status.CONVERGED).all()
    np.testing.assert_allclose(z, 0.7390851332151607, atol=1e-11)
    assert stats.evaluations <= 12  # Picard takes 70


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_strongly_damped_mixing_does_not_freeze():
    """Damped Anderson can stand still where there is no fixed point; the plain step moves on."""
    matrix = jnp.asarray(symmetric(np.linspace(-0.5, 0.8, 30)))
    x = jnp.asarray(np.random.default_rng(2).normal(size=(4, 30)))
    for mixing in (0.005, 0.05):
        _, stats = solve_fixed_point(
            linear, matrix, x, solver=Anderson(5, mixing, tol=1e-6, max_iter=5000)
        )
        assert (stats.status == Status.CONVERGED).all()


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_complex_states():
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=(8, 8)) + 1j * rng.normal(size=(8, 8))) * 0.15
    x = rng.normal(size=(2, 8)) + 1j * rng.normal(size=(2, 8))
    z, stats = deq_fixed_point(
        linear,
        jnp.asarray(matrix),
        jnp.asarray(x),
        solver=Anderson(tol=1e-10, max_iter=100),
        return_stats=True,
    )
    np.testing.assert_allclose(z, np.linalg.solve(np.eye(8) - matrix, x.T).T, atol=1e-8)
    assert stats.residual.dtype == jnp.float64
    # A pair of real numbers for each complex one: products are real, with weights that are.
    solver = Anderson(history=3, ridge=1e-7)
    points = points_evaluated(linear, jnp.asarray(matrix), jnp.asarray(x), solver, 9)
    for i in range(2):
        expected = anderson(
            lambda z, i=i: matrix @ z + x[i],
            np.zeros(8, complex),
            history=3,
            mixing=1.0,
            ridge=1e-7,
            steps=9,
        )
        np.testing.assert_allclose([point[i] for point in points], expected, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_tree_is_solved_as_the_array_of_its_leaves():
    rng = np.random.default_rng(4)
    matrix = jnp.asarray(rng.normal(size=(12, 12)) * 0.25)
    x = jnp.asarray(rng.normal(size=(3, 12)))

    def split(z):
        return {"a": z[:, :2], "b": (z[:, 2:8].reshape(-1, 2, 3), z[:, 8:])}

    def join(tree):
        return jnp.concatenate([tree["a"], tree["b"][0].reshape(-1, 6), tree["b"][1]], axis=1)

    solver = Anderson(tol=1e-10, max_iter=60)
    array, array_stats = solve_fixed_point(tanh_cell, matrix, x, solver=solver)
    tree, tree_stats = solve_fixed_point(
        lambda p, z, x: split(tanh_cell(p, join(z), x)), matrix, x, split(0 * x), solver=solver
    )
    np.testing.assert_allclose(join(tree), array, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(array_stats.iterations, tree_stats.iterations)


@pytest.mark.parametrize(
    ("solver", "change", "error"),
    [
        (Anderson, {"history": 0}, "Anderson.history must be at least 1, got 0"),
        (Anderson, {"history": 2.0}, "Anderson.history must be an integer, got 2.0"),
        (Anderson, {"mixing": 0.0}, "Anderson.mixing must be finite, > 0.0, got 0.0"),
        (Anderson, {"mixing": float("nan")}, "Anderson.mixing must be finite"),
        (Anderson, {"ridge": -1e-9}, "Anderson.ridge must be finite, >= 0.0, got -1e-09"),
        (Anderson, {"tol": -1.0}, "Anderson.tol must be finite, >= 0.0"),
        (Anderson, {"tol": "1e-3"}, "Anderson.tol must be a number, got '1e-3'"),
        (Anderson, {"max_iter": True}, "Anderson.max_iter must be an integer, got True"),
        (Anderson, {"trace": 1}, "Anderson.trace must be a bool, got 1"),
        (Picard, {"damping": 0.0}, "Picard.damping must be finite, > 0.0 and <= 1.0, got 0.0"),
        (Picard, {"damping": 1.5}, "Picard.damping must be finite"),
        (Picard, {"max_iter": 0}, "Picard.max_iter must be at least 1, got 0"),
        (Picard, {"atol": float("inf")}, "Picard.atol must be finite"),
    ],
)
def test_bad_options_are_named(solver, change, error):
    with pytest.raises((ValueError, TypeError)) as raised:
        solver(**change)
    assert error in str(raised.value)
    with pytest.raises((ValueError, TypeError)):
        dataclasses.replace(solver(), **change)


def test_unknown_options_are_refused_and_solvers_hash():
    with pytest.raises(TypeError, match="memory"):
        Anderson(memory=3)
    assert hash(Anderson()) == hash(Anderson())
    assert Anderson() == Anderson(history=5, mixing=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Anderson().tol = 1.0


def window_of_three(solver):
    """State, point and value before the third step, as a run would have them."""
    rng = np.random.default_rng(5)
    f = lambda z: 0.5 * jnp.tanh(z) + x  # noqa: E731
    x = jnp.asarray(rng.normal(size=(2, 6)), jnp.float32)
    z = jnp.zeros_like(x)
    state = solver.init(z, z)
    for _ in range(2):
        z, state = solver.step(z, f(z), state)
    return z, f(z), state


@pytest.mark.slow
def test_a_window_that_cannot_be_factorised_restarts_with_its_newest_pair():
    """The Gram matrix of sample 0 is made indefinite, as rounding could; sample 1 goes on."""
    solver = Anderson(history=3)
    z, fz, state = window_of_three(solver)
    healthy, healthy_state = solver.step(z, fz, state)
    broken = state._replace(gram=state.gram.at[0, 1, 0].mul(1e4).at[1, 0, 0].mul(1e4))
    proposal, after = solver.step(z, fz, broken)
    np.testing.assert_array_equal(proposal[0], fz[0])
    np.testing.assert_array_equal(after.filled[:, 0], [False, False, True])
    np.testing.assert_array_equal(proposal[1], healthy[1])
    np.testing.assert_array_equal(after.filled[:, 1], [True, True, True])
    assert (healthy[0] != fz[0]).any()
    assert healthy_state.filled.all()


def test_a_residual_far_above_the_best_restarts_the_window():
    solver = Anderson(history=3)
    z, fz, state = window_of_three(solver)
    jumped = z + jnp.float32(1e5)
    proposal, after = solver.step(jumped, jumped + 100 * (fz - z) + 1e5, state)
    np.testing.assert_array_equal(after.filled.T, [[False, False, True]] * 2)
    np.testing.assert_allclose(proposal, jumped + 100 * (fz - z) + 1e5, rtol=1e-6)


@pytest.mark.parametrize("mixing", [1.0, 0.3])
@pytest.mark.slow
def test_a_proposal_that_hardly_moves_gives_way_to_the_plain_step(mixing):
    """The window holds a far smaller residual whose target is z itself: its minimiser is z."""
    solver = Anderson(history=2, mixing=mixing)
    z, g = jnp.zeros((1, 4)), jnp.array([[0.0, 1.0, 0.0, 0.0]])
    state = solver.init(z, z)
    small = jnp.array([[1e-3, 0.0, 0.0, 0.0]])
    _, state = solver.step(z - mixing * small, z - mixing * small + small, state)
    proposal, after = solver.step(z, z + g, state)
    np.testing.assert_allclose(proposal, z + mixing * g, rtol=1e-6)
    assert after.filled.all()


@pytest.mark.parametrize(("dtype", "window"), [(jnp.float32, 2), (jnp.complex64, 3)])
@pytest.mark.slow
def test_a_sample_of_one_number_has_no_more_points_than_it_can_tell_apart(dtype, window):
    """Two secants of one unknown are dependent: a longer history is that of `window` points."""
    x = jnp.linspace(-2, 2, 9).astype(dtype)[:, None]
    state = Anderson(history=5).init(x, x)
    assert state.gram.shape == (window, window, 9)
    solve = lambda history: solve_fixed_point(  # noqa: E731
        lambda gain, z, x: x + gain * jnp.sin(z),
        jnp.asarray(0.8, dtype),
        x,
        solver=Anderson(history=history, tol=1e-5),
    )
    (z, stats), (expected, others) = solve(5), solve(window)
    np.testing.assert_array_equal(z, expected)
    np.testing.assert_array_equal(stats.iterations, others.iterations)
    assert stats.converged.all()
    # The secant method is of order 1.6; five points mixed by a ridge took more.
    assert stats.iterations.max() <= 9
