"""Roots in a bracket, each sample by itself, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import BackwardProbe, Chandrupatla, Picard, Status, deq_fixed_point, solve_fixed_point

pytestmark = pytest.mark.usefixtures("x64")


def as_fixed_point(g):
    return lambda params, z, x: z + g(z, x)


def chandrupatla(g, lower, upper, steps):
    """The points after both ends, in the words of the paper: one sample, Python floats."""
    x1, x2 = lower, upper
    g1, g2, three, points, t = g(x1), g(x2), None, [], 0.5
    for _ in range(steps):
        x = x1 + t * (x2 - x1)
        points.append(x)
        value = g(x)
        if (value > 0) == (g1 > 0):
            three = x1, g1
        else:
            three = x2, g2
            x2, g2 = x1, g1
        x1, g1 = x, value
        x3, g3 = three
        xi, phi = (x1 - x2) / (x3 - x2), (g1 - g2) / (g3 - g2)
        t = 0.5
        if phi**2 < xi and (1 - phi) ** 2 < 1 - xi:
            t = g1 / (g2 - g1) * g3 / (g2 - g3)
            t += (x3 - x1) / (x2 - x1) * g1 / (g3 - g1) * g2 / (g3 - g2)
        least = np.finfo(float).eps * max(abs(x1), abs(x2)) / abs(x2 - x1)
        t = min(max(t, min(least, 0.5)), 1 - min(least, 0.5))
    return points


@pytest.mark.slow
def test_it_is_the_method_of_the_paper():
    """A steep and a flat equation, and one with a kink; each sample has its own bracket."""
    shift = jnp.asarray([0.3, 2.0, -1.0])

    def g(z, x):
        return jnp.where(x > 1, (z - x) ** 3, jnp.exp(z) - jnp.exp(x)) + 0.01 * jnp.abs(z - x)

    lower, upper = jnp.asarray([-4.0, 0.0, -3.0]), jnp.asarray([5.0, 3.0, 4.0])
    solver = Chandrupatla(lower, upper)
    step = jax.jit(lambda z, state: solver.step(z, z + g(z, shift), state))
    z = jnp.full(3, 100.0)  # outside
    state, points = solver.init(z, z), []
    for _ in range(14):
        points.append(np.asarray(z))
        z, state = step(z, state)
    np.testing.assert_array_equal(points[1], lower)
    np.testing.assert_array_equal(points[2], upper)
    for i in range(3):
        of_one = lambda z, i=i: float(g(jnp.asarray(z), shift[i]))  # noqa: E731
        expected = chandrupatla(of_one, float(lower[i]), float(upper[i]), 11)
        np.testing.assert_allclose([p[i] for p in points[3:]], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_solves_where_picard_fails_and_has_a_gradient():
    """Cube roots by z + x - z³, whose slope at the root is below -1."""
    x = jnp.asarray([[1.0], [8.0], [27.0], [0.5]])
    f = as_fixed_point(lambda z, x: x - z**3)
    solver = Chandrupatla(0.0, 10.0, tol=1e-12)

    def loss(x, probe):
        z, stats = deq_fixed_point(
            f, None, x, solver=solver, return_stats=True, backward_probe=probe
        )
        return -z.sum(), (z, stats)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (got, report), (z, stats) = gradient(x, BackwardProbe.zeros(4))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    np.testing.assert_allclose(z, np.cbrt(x), rtol=1e-11)
    np.testing.assert_allclose(got, -1 / (3 * np.cbrt(x) ** 2), rtol=1e-9)
    assert stats.evaluations < 25
    picard = solve_fixed_point(f, None, x, solver=Picard()).stats
    assert not picard.converged[1:3].any()


def test_a_bracket_without_a_change_of_sign_is_not_called_solved():
    """z² + x: two roots inside, none, and two beside each other, which the search finds."""
    x = jnp.asarray([-1.0, 1.0, -0.0625])
    f = as_fixed_point(lambda z, x: z**2 + x)
    solver = Chandrupatla(-3.0, 4.0, tol=1e-8, max_iter=80)
    z, stats = solve_fixed_point(f, None, x, 3.5 + 0 * x, solver=solver)
    assert stats.status.tolist() == [Status.CONVERGED, Status.MAX_ITER, Status.CONVERGED]
    np.testing.assert_allclose(np.abs(z)[np.array([0, 2])], [1.0, 0.25], rtol=1e-6)
    assert abs(z[1]) < 3.5  # the best that was seen
    np.testing.assert_allclose(stats.residual[1], (z[1] ** 2 + 1) / (z[1] + z[1] ** 2 + 1))


def test_a_start_inside_narrows_the_bracket():
    x = jnp.asarray([2.0, -2.0])
    f = as_fixed_point(lambda z, x: x - z)
    counts = [
        solve_fixed_point(f, None, x, start, solver=Chandrupatla(-1e6, 1e6, tol=1e-6)).stats
        for start in (x + 0.5, jnp.full(2, -2e6))
    ]
    assert counts[0].converged.all()
    assert counts[0].evaluations <= counts[1].evaluations


@pytest.mark.parametrize(
    ("ends", "error", "named"),
    [
        ((1.0, 1.0), ValueError, "lower must be below"),
        (([0.0], 1.0), TypeError, "Chandrupatla.lower must be a real number"),
        ((0.0, 1j), TypeError, "Chandrupatla.upper must be a real number"),
        ((0.0, jnp.ones(5)), ValueError, "upper must be a number or of shape"),
    ],
)
def test_bad_brackets(ends, error, named):
    with pytest.raises(error, match=named):
        solve_fixed_point(lambda _, z, x: z, None, jnp.ones(2), solver=Chandrupatla(*ends))


def test_a_state_of_two_numbers_is_an_error():
    with pytest.raises(ValueError, match="2 real numbers a sample"):
        solve_fixed_point(lambda _, z, x: z, None, jnp.ones((3, 2)), solver=Chandrupatla(0.0, 1.0))
