"""The solver of the guide `docs/own_solver.md`, taken from the guide as it stands."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    BackwardProbe,
    Implicit,
    Picard,
    Solver,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

GUIDE = (Path(__file__).parents[2] / "docs" / "own_solver.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names():
    """What the guide's code leaves behind."""
    (block,) = BLOCKS
    names = {"__name__": "own_solver"}
    exec(compile(block, "docs/own_solver.md", "exec"), names)
    return names


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def symmetric(eigenvalues):
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(len(eigenvalues),) * 2))[0]
    return basis @ np.diag(eigenvalues) @ basis.T


def linear(matrix, z, x):
    return z @ matrix.T + x


def tanh_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T + x)


@pytest.mark.slow
def test_the_guides_code_prints_what_it_says(capsys):
    (block,) = BLOCKS
    names = {"__name__": "own_solver"}
    exec(compile(block, "docs/own_solver.md", "exec"), names)
    printed = capsys.readouterr().out
    iterations = [
        np.array(re.findall(r"\d+", line), int)
        for line in re.findall(r"iterations: \[(.*?)\]", printed)
    ]
    assert (2 * iterations[1] < iterations[0]).all()
    assert printed.count("True") == 8
    # z = r M z + x: dz/dr = (I - r M)⁻¹ M z.
    x = np.asarray(names["x"], np.float64).T
    identity = np.eye(32)
    mean = identity / 2 + (np.roll(identity, 1, axis=0) + np.roll(identity, -1, axis=0)) / 4
    system = np.eye(32) - np.float64(names["rate"]) * mean
    z = np.linalg.solve(system, x)
    derivative = 2 * (z * np.linalg.solve(system, mean @ z)).mean()
    (got,) = re.findall(r"derivative by the rate: (\S+)", printed)
    np.testing.assert_allclose(float(got), derivative, rtol=2e-2)


def test_it_is_a_solver(names):
    solver = names["Squarem"]()
    assert isinstance(solver, Solver)
    assert hash(solver) == hash(names["Squarem"]())


@pytest.mark.usefixtures("x64")
def test_it_is_squarem(names):
    """The points of evaluation against the formula in NumPy."""
    matrix, x = normal(6, 6, scale=0.3), normal(2, 6, seed=1)
    solver = names["Squarem"]()
    z = 0 * x
    state, points = solver.init(z, z), []
    for _ in range(9):
        points.append(np.asarray(z))
        z, state = solver.step(z, tanh_cell(matrix, z, x), state)
    matrix = np.asarray(matrix)
    for i in range(2):
        f = lambda z, i=i: np.tanh(matrix @ z + np.asarray(x[i]))  # noqa: E731
        z = np.zeros(6)
        for k in range(0, 8, 2):
            np.testing.assert_allclose(points[k][i], z, rtol=0, atol=1e-12)
            np.testing.assert_allclose(points[k + 1][i], f(z), rtol=0, atol=1e-12)
            r = f(z) - z
            v = f(f(z)) - f(z) - r
            a = max(1, np.linalg.norm(r) / np.linalg.norm(v))
            z = z + 2 * a * r + a**2 * v


@pytest.mark.usefixtures("x64")
def test_it_beats_picard_on_the_slow_map(names):
    matrix, x = symmetric(np.linspace(0.1, 0.99, 60)), normal(3, 60, seed=1)
    solvers = [names["Squarem"](tol=1e-6, max_iter=2000), Picard(tol=1e-6, max_iter=2000)]
    (z, ours), (_, picard) = (
        solve_fixed_point(linear, jnp.asarray(matrix), x, solver=solver) for solver in solvers
    )
    np.testing.assert_array_equal(ours.status, Status.CONVERGED)
    np.testing.assert_array_equal(picard.status, Status.CONVERGED)
    assert 3 * ours.evaluations < picard.evaluations
    expected = np.linalg.solve(np.eye(60) - matrix, x.T).T
    assert relative_error(z, expected) < 100 * 1e-6


@pytest.mark.parametrize("policy", [Implicit(), Implicit(GMRES(tol=1e-10))])
@pytest.mark.usefixtures("x64")
def test_its_gradient_is_the_dense_one(names, policy):
    matrix, x, y = normal(6, 6, scale=0.3), normal(2, 6, seed=1), normal(2, 6, seed=2)
    solver = names["Squarem"](tol=1e-10, max_iter=500)

    def loss(matrix, x, probe):
        z, stats = deq_fixed_point(
            tanh_cell,
            matrix,
            x,
            solver=solver,
            gradient=policy,
            backward_probe=probe,
            return_stats=True,
        )
        return (z * y).sum(), stats

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    (*gradient, report), stats = gradient(matrix, x, BackwardProbe.zeros(2))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    z = newton_equilibrium(lambda z: tanh_cell(matrix, z, x), 0 * x)
    expected = implicit_gradient(
        lambda inputs, z: tanh_cell(inputs[0], z, inputs[1]), (matrix, x), z, y
    )
    assert relative_error(gradient, list(expected)) < 1e-8


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_a_bad_sample_and_a_state_in_leaves(names):
    matrix, x = normal(6, 6, scale=0.3), normal(3, 6, seed=1)
    solver = names["Squarem"](tol=1e-8, max_iter=300)
    clean, clean_stats = solve_fixed_point(linear, matrix, x, 0 * x, solver=solver)
    spoilt, stats = solve_fixed_point(linear, matrix, x.at[1, 2].set(jnp.nan), 0 * x, solver=solver)
    np.testing.assert_array_equal(spoilt[::2], clean[::2])
    np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0])

    def in_leaves(matrix, z, x):
        fz = linear(matrix, jnp.concatenate(z, axis=1), x)
        return [fz[:, :2], fz[:, 2:]]

    leaves, leaf_stats = solve_fixed_point(
        in_leaves, matrix, x, [0 * x[:, :2], 0 * x[:, 2:]], solver=solver
    )
    np.testing.assert_allclose(jnp.concatenate(leaves, axis=1), clean, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(leaf_stats.iterations, clean_stats.iterations)
