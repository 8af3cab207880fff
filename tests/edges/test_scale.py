"""Equations at every scale that the dtype holds: same iterations, same answers, same gradients.

`s f(z / s)` with the input `s x` has the solution `s z*`. Where s is a power of two, products with
s are exact, and so nothing at all may change.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)

TOL = {"float32": 1e-5, "float64": 1e-10}
POWERS = {"float32": (-100, -60, -30, 30, 60, 100), "float64": (-660, -300, -40, 40, 300, 660)}
DECIMALS = {
    "float32": (1e-30, 1e-20, 1e-14, 1e-7, 1e7, 1e20, 1e30),
    "float64": (1e-200, 1e-100, 1e-14, 1e14, 1e100, 1e200),
}
SOLVERS = {
    "Picard": lambda tol: Picard(tol=tol, max_iter=400),
    "Anderson": lambda tol: Anderson(tol=tol, max_iter=100),
    "Broyden": lambda tol: Broyden(tol=tol, memory=12, max_iter=100),
    "NewtonKrylov": lambda tol: NewtonKrylov(tol=tol, max_iter=40),
}
BACKWARD = SOLVERS | {
    "GMRES": lambda tol: GMRES(tol=tol, max_iter=60),
    "BiCGStab": lambda tol: BiCGStab(tol=tol, max_iter=60),
}


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


MATRIX = normal(4, 4, seed=1, scale=0.3)
X = normal(3, 4, seed=2)


def linear(params, z, x):
    """`0.9 z + x`; the scale is that of x."""
    return 0.9 * z + x


def nonlinear(params, z, x):
    """`s tanh(W z / s + x / s)`."""
    matrix, s = params
    return s * jnp.tanh((z / s) @ matrix + x / s)


def solution(equation):
    """At scale 1, in NumPy and float64."""
    if equation is linear:
        return 10 * X
    z = np.zeros_like(X)
    for _ in range(500):
        z = np.tanh(z @ MATRIX + X)
    return z


def inputs(s, dtype):
    s = jnp.asarray(s, dtype)
    return (jnp.asarray(MATRIX, dtype), s), jnp.asarray(X, dtype) * s


@functools.cache
def compiled(equation, solver, dtype):
    """One compiled solve for all scales."""
    solver = SOLVERS[solver](TOL[dtype])
    return jax.jit(lambda params, x: solve_fixed_point(equation, params, x, solver=solver))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("equation", [linear, nonlinear])
def test_a_power_of_two_changes_nothing(equation, solver, dtype):
    solve = compiled(equation, solver, dtype)
    expected, expected_stats = solve(*inputs(1, dtype))
    np.testing.assert_array_equal(expected_stats.status, Status.CONVERGED)
    for power in POWERS[dtype]:
        s = float(np.ldexp(1.0, power))
        z, stats = solve(*inputs(s, dtype))
        np.testing.assert_array_equal(stats.iterations, expected_stats.iterations, f"2^{power}")
        np.testing.assert_array_equal(stats.status, expected_stats.status, f"2^{power}")
        rtol = 8 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(
            np.asarray(z, np.float64) / s, expected, rtol=rtol, err_msg=f"2^{power}"
        )
        np.testing.assert_allclose(stats.residual, expected_stats.residual, rtol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("equation", [linear, nonlinear])
def test_every_scale_is_solved(equation, solver, dtype):
    solve = compiled(equation, solver, dtype)
    _, one = solve(*inputs(1, dtype))
    for s in DECIMALS[dtype]:
        z, stats = solve(*inputs(s, dtype))
        np.testing.assert_array_equal(stats.status, Status.CONVERGED, f"scale {s}")
        assert (np.abs(stats.iterations - one.iterations) <= 1).all(), f"scale {s}"
        # The error of 0.9 z + x is at most ten times its residual, relative to z.
        np.testing.assert_allclose(
            np.asarray(z, np.float64) / s,
            solution(equation),
            rtol=0,
            atol=30 * TOL[dtype] * np.abs(solution(equation)).max(),
            err_msg=f"scale {s}",
        )
        image = np.asarray(equation(inputs(s, dtype)[0], z, inputs(s, dtype)[1]), np.float64) / s
        step = image - np.asarray(z, np.float64) / s
        true = np.linalg.norm(step, axis=1) / np.linalg.norm(image, axis=1)
        np.testing.assert_allclose(stats.residual, true, rtol=1e-2, atol=TOL[dtype] / 20)


@pytest.mark.parametrize("solver", SOLVERS)
def test_samples_of_different_scales_in_one_batch(solver, dtype):
    """Each sample has the iterations that it has alone at scale 1."""
    s = np.ldexp(1.0, [POWERS[dtype][0], 0, POWERS[dtype][-1]])
    row = jnp.asarray(np.tile(X[:1], (3, 1)), dtype)
    x = row * jnp.asarray(s, dtype)[:, None]
    z, stats = solve_fixed_point(linear, (), x, solver=SOLVERS[solver](TOL[dtype]))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert len(set(np.asarray(stats.iterations).tolist())) == 1
    got = np.asarray(z, np.float64) / s[:, None]
    np.testing.assert_allclose(got, np.tile(10 * X[:1], (3, 1)), rtol=30 * TOL[dtype])


@pytest.mark.parametrize("batched", [True, False])
def test_a_solution_of_zero_is_found_at_once(batched, dtype):
    """Nothing is divided by zero where f(z) and z vanish."""
    x = jnp.zeros((3, 4), dtype)
    z, stats = solve_fixed_point(linear, (), x, batched=batched)
    np.testing.assert_array_equal(z, np.zeros((3, 4)))
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(stats.residual, 0)
    np.testing.assert_array_equal(stats.evaluations, 1)


@functools.cache
def gradients(equation, backward, dtype):
    """A compiled gradient by x and the probe's report, for any scale and cotangent."""
    backward = None if backward is None else BACKWARD[backward](TOL[dtype])
    forward = Picard(tol=TOL[dtype], max_iter=400)

    def loss(x, probe, params, y):
        z = deq_fixed_point(
            equation,
            params,
            x,
            solver=forward,
            gradient=Implicit(backward),
            backward_probe=probe,
        )
        return (z * y).sum()

    gradient = jax.jit(jax.grad(loss, (0, 1)))
    return lambda params, x, y: gradient(x, BackwardProbe.zeros(3), params, y)


def expected_gradient(equation, y):
    """The gradient by x at scale 1, sample by sample, by dense solves."""
    if equation is linear:
        return 10 * y
    slope = 1 - solution(equation) ** 2
    rows = []
    for d, cotangent in zip(slope, y, strict=True):
        # z = tanh(z W + x): dz = D (Wᵀ dz + dx), so the gradient is D (I - W D)⁻¹ y.
        rows.append(d * np.linalg.solve(np.eye(4) - MATRIX @ np.diag(d), cotangent))
    return np.array(rows)


COTANGENT_SCALES = {
    "float32": [(1e-25, 1e10, 1.0), (1e-30, 1e30, 1e-10), (1e25, 1e-25, 1e28)],
    "float64": [(1e-25, 1e10, 1.0), (1e-200, 1e200, 1e-100), (1e180, 1e-180, 1e190)],
}


@pytest.mark.parametrize(
    ("equation", "backward"),
    [
        *((nonlinear, backward) for backward in [None, *BACKWARD]),
        *((linear, backward) for backward in [None, "GMRES", "BiCGStab"]),
    ],
)
@pytest.mark.slow
def test_cotangents_of_any_scale_in_one_batch(equation, backward, dtype):
    gradient = gradients(equation, backward, dtype)
    y = normal(3, 4, seed=7)
    one, one_report = gradient(*inputs(1, dtype), jnp.asarray(y, dtype))
    expected = expected_gradient(equation, y)
    tolerance = 100 * TOL[dtype]
    np.testing.assert_allclose(one, expected, rtol=tolerance, atol=tolerance)
    for scales in COTANGENT_SCALES[dtype]:
        scales = np.array(scales)[:, None]
        got, report = gradient(*inputs(1, dtype), jnp.asarray(y * scales, dtype))
        np.testing.assert_array_equal(report.status, Status.CONVERGED, str(scales[:, 0]))
        assert (np.abs(report.iterations - one_report.iterations) <= 1).all()
        got = np.asarray(got, np.float64) / scales
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backward", [None, "GMRES", "BiCGStab"])
@pytest.mark.parametrize("equation", [linear, nonlinear])
@pytest.mark.slow
def test_gradients_at_any_scale_of_the_state(equation, backward, dtype):
    gradient = gradients(equation, backward, dtype)
    y = normal(3, 4, seed=7)
    expected = expected_gradient(equation, y)
    for s in DECIMALS[dtype]:
        got, report = gradient(*inputs(s, dtype), jnp.asarray(y, dtype))
        np.testing.assert_array_equal(report.status, Status.CONVERGED, f"scale {s}")
        tolerance = 300 * TOL[dtype]
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("solver", BACKWARD)
def test_the_adjoint_at_any_scale_of_the_cotangent(solver, dtype):
    method = BACKWARD[solver](TOL[dtype])

    @jax.jit
    def adjoint(y):
        x = jnp.asarray(X, dtype)
        return solve_adjoint(linear, (), x, 10 * x, y, solver=method)

    y = normal(3, 4, seed=7)
    one = adjoint(jnp.asarray(y, dtype))
    for power in POWERS[dtype]:
        s = np.ldexp(1.0, power)
        u, stats = adjoint(jnp.asarray(y, dtype) * jnp.asarray(s, dtype))
        np.testing.assert_array_equal(stats.status, Status.CONVERGED, f"2^{power}")
        np.testing.assert_array_equal(stats.iterations, one.stats.iterations, f"2^{power}")
        np.testing.assert_allclose(np.asarray(u, np.float64) / s, 10 * y, rtol=30 * TOL[dtype])


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0])
def test_a_small_cotangent_is_not_solved_by_an_absolute_bound(size):
    """Gradients are proportional to cotangents, so the backward solve sees them at unit size."""
    matrix = jnp.asarray(0.9 * np.eye(4) + 0.02 * MATRIX, jnp.float32)
    solver = Picard(tol=0.0, atol=1e-3, max_iter=400)

    def loss(x):
        z = deq_fixed_point(
            lambda w, z, x: z @ w.T + x,
            matrix,
            x,
            solver=Picard(tol=1e-6, max_iter=400),
            gradient=Implicit(solver=solver),
        )
        return (size * z).sum()

    got = jax.grad(loss)(jnp.asarray(X, jnp.float32)) / size
    expected = np.linalg.solve(np.eye(4) - np.asarray(matrix, np.float64).T, np.ones(4))
    np.testing.assert_allclose(got, np.broadcast_to(expected, got.shape), rtol=5e-3)
