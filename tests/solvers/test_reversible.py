"""The reversible solver against the pair of the paper in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Implicit, Reversible, Status, deq_fixed_point, solve_fixed_point
from tests.reference import implicit_gradient, newton_equilibrium, relative_error


def cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T + x)


def problem(scale=0.3):
    rng = np.random.default_rng(0)
    return jnp.asarray(scale * rng.normal(size=(6, 6))), jnp.asarray(rng.normal(size=(3, 6)))


def pair(matrix, x, beta, steps):
    """The points of evaluation z_0, y_1, z_1, y_2, ... of one sample."""
    f = lambda z: np.tanh(matrix @ z + x)  # noqa: E731
    y = z = np.zeros(len(x))
    points = [z]
    while len(points) < steps:
        y = (1 - beta) * y + beta * f(z)
        z = (1 - beta) * z + beta * f(y)
        points += [y, z]
    return points[:steps]


@pytest.mark.parametrize("components", [1, 2])
@pytest.mark.usefixtures("x64")
def test_it_is_the_pair_of_the_paper(components):
    matrix, x = problem()
    solver = Reversible(0.75, components=components)  # 0.75 is a multiple of 2⁻¹¹
    z = 0 * x
    state, points = solver.init(z, z), []
    for _ in range(9):
        points.append(np.asarray(z))
        z, state = solver.step(z, cell(matrix, z, x), state)
    for i in range(3):
        expected = pair(np.asarray(matrix), np.asarray(x[i]), 0.75, 9)
        np.testing.assert_allclose([p[i] for p in points], expected, rtol=0, atol=1e-14)
    np.testing.assert_array_equal(state.steps, 9)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_it_solves_and_goes_with_other_policies():
    matrix, x = problem()
    y = jnp.asarray(np.random.default_rng(1).normal(size=x.shape))
    expected = newton_equilibrium(lambda z: cell(matrix, z, x), x)

    def loss(matrix, x):
        solver = Reversible(0.8, tol=1e-11, max_iter=200)
        options = {"solver": solver, "gradient": Implicit(Anderson(tol=1e-11))}
        z, stats = deq_fixed_point(cell, matrix, x, return_stats=True, **options)
        return (z * y).sum(), (z, stats)

    got, (z, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(matrix, x)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert relative_error(z, expected) < 1e-9
    dense = implicit_gradient(lambda p, z: cell(p[0], z, p[1]), (matrix, x), expected, y)
    assert relative_error(got, dense) < 1e-9


def test_a_sample_that_has_stopped_keeps_its_pair():
    """Its batch mates go on; one sample starts at the solution, one is not finite."""
    scale = jnp.asarray([[0.0], [0.9], [np.nan]], jnp.float32)
    x = jnp.ones((3, 2), jnp.float32)
    solution = solve_fixed_point(
        lambda scale, z, x: scale * z + x, scale, x, solver=Reversible(tol=1e-6, max_iter=100)
    )
    np.testing.assert_array_equal(
        solution.stats.status, [Status.CONVERGED, Status.MAX_ITER, Status.DIVERGED]
    )
    np.testing.assert_array_equal(solution.value[2], 0)


@pytest.mark.parametrize("components", [None, 3])
def test_half_precision_and_complex_states(components):
    solver = Reversible(tol=1e-2, max_iter=40, components=components)
    x = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.full((2, 2), 1 + 1j, jnp.complex64)}
    z, stats = solve_fixed_point(
        lambda p, z, x: {"a": z["a"] / 4 + x["a"], "b": z["b"] * 0.5j + x["b"]}, None, x,
        solver=solver,
    )  # fmt: skip
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert {name: leaf.dtype for name, leaf in z.items()} == {"a": "bfloat16", "b": "complex64"}
    np.testing.assert_allclose(z["a"].astype(jnp.float32), 4 / 3, rtol=2e-2)
    np.testing.assert_allclose(z["b"], (1 + 1j) / (1 - 0.5j), rtol=2e-2)


def test_components_are_as_many_as_the_evaluations_ask_for():
    for beta, most, dtype, expected in (
        (0.5, 4, "float32", 1),
        (0.5, 36, "float32", 2),
        (0.5, 37, "float32", 3),
        (0.8, 15, "float32", 2),
        (0.5, 26, "float64", 1),
    ):
        solver = Reversible(beta, max_iter=most)
        with jax.enable_x64(True):
            assert solver.components_in(jnp.dtype(dtype)) == expected
    with pytest.raises(ValueError, match=r"takes 9 components in float32.*reach for 8"):
        Reversible(0.8, max_iter=85).components_in(jnp.dtype("float32"))
    factors = [float(factor) for factor in Reversible(0.8).factors(jnp.float32)]
    np.testing.assert_array_equal(factors, [1638 / 2048, 410 / 2048])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"damping": 1}, "damping must be below 1"),
        ({"damping": 0.0}, "damping"),
        ({"components": 0}, "components"),
        ({"max_iter": 0}, "max_iter"),
    ],
)
def test_bad_options_name_the_field(options, named):
    with pytest.raises(ValueError, match=named):
        Reversible(**options)


def test_a_traced_damping():
    matrix, x = (a.astype(jnp.float32) for a in problem())

    def residual(damping, components):
        solver = Reversible(damping, components=components, tol=1e-5)
        return solve_fixed_point(cell, matrix, x, solver=solver).stats.residual

    residual = jax.jit(residual, static_argnums=1)
    assert residual(jnp.float32(0.8), 2).max() < 1e-5
    with pytest.raises(ValueError, match=r"components=None.*traced"):
        residual(jnp.float32(0.8), None)
