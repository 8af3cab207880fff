"""Linear systems of the backward pass that are singular: not called CONVERGED where they are wrong.

The reactions A <-> B <-> C conserve mass, so `z = z + 0.2 z Kᵀ` has a line of solutions, the start
picks one of them by its mass, and `I - J` is singular. The exact equilibrium is
`m (a, b, c) / (a + b + c)` with a = 1, b = k1 / k2, c = b k3 / k4.
"""

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
)
from deq_jax.linear import LSMR, Dense, GroupInverse
from tests.reference import relative_error

SAMPLES = 6
RATES = np.random.default_rng(0).uniform(0.2, 1.2, size=(SAMPLES, 4))
MASSES = np.random.default_rng(1).uniform(0, 2, size=(SAMPLES, 3))
WEIGHTS = np.random.default_rng(2).normal(size=(SAMPLES, 3))


def reactions(rates, z, x):
    """`z + 0.2 z Kᵀ`; each sample has rates of its own."""
    k1, k2, k3, k4 = jnp.moveaxis(rates, -1, 0)
    a, b, c = jnp.moveaxis(z, -1, 0)
    forth, back = k1 * a - k2 * b, k3 * b - k4 * c
    return z + jnp.asarray(0.2, z.dtype) * jnp.stack([-forth, forth - back, back], axis=-1)


def exact_equilibrium(rates, masses):
    k1, k2, k3, k4 = rates.T
    b = k1 / k2
    c = b * k3 / k4
    shares = np.stack([np.ones_like(b), b, c], axis=1) / (1 + b + c)[:, None]
    return masses.sum(1)[:, None] * shares


def exact_gradient(rates):
    """`[SAMPLES, 4]`, of the weighted sum: central differences of the exact formula."""
    gradient = []
    for i in range(4):
        step = 1e-5 * np.eye(4)[i]
        above, below = (exact_equilibrium(rates + d, MASSES) for d in (step, -step))
        gradient.append((WEIGHTS * (above - below)).sum(1) / 2e-5)
    return np.stack(gradient, axis=1)


def backward_solvers(tol):
    return {
        "GMRES": GMRES(tol=tol),
        "GMRES(2)": GMRES(tol=tol, restart=2),
        "BiCGStab": BiCGStab(tol=tol),
        "Broyden": Broyden(tol=tol),
        "NewtonKrylov": NewtonKrylov(tol=tol),
        "NewtonKrylov(BiCGStab)": NewtonKrylov(BiCGStab(), tol=tol),
        "Anderson": Anderson(tol=tol),
        "Picard": Picard(tol=tol, max_iter=200),
        "LSMR": LSMR(tol=tol),
        "Dense": Dense(tol=tol),
    }


DIRECT = ("LSMR", "Dense")
NAMES = [name for name in backward_solvers(1.0) if name not in DIRECT]


def gradient_and_report(forward, policy, dtype, batched=True):
    rates = jnp.asarray(RATES, dtype)

    def loss(rates, probe):
        masses = jnp.asarray(MASSES, dtype)
        z, stats = deq_fixed_point(
            reactions,
            rates,
            masses,
            masses,
            solver=forward,
            gradient=policy,
            backward_probe=probe,
            batched=batched,
            return_stats=True,
        )
        return (z * jnp.asarray(WEIGHTS, dtype)).sum(), (z, stats)

    probe = BackwardProbe.zeros(SAMPLES if batched else None)
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(rates, probe)


def check(gradient, report, rtol):
    """No sample whose gradient is wrong is called CONVERGED."""
    expected = exact_gradient(RATES)
    error = np.linalg.norm(gradient - expected, axis=1) / np.linalg.norm(expected, axis=1)
    claimed = np.broadcast_to(np.asarray(report.status) == Status.CONVERGED, error.shape)
    if not report.status.ndim:
        error = np.full_like(error, error.max())
    assert (error[claimed] < rtol).all(), f"CONVERGED with a gradient off by {error[claimed]}"


@pytest.mark.museum(
    "optimistix O2 (lineax#117, #243): a linear solve that failed in the backward pass raised "
    "even with throw=False"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "batched"),
    [
        *((name, True) for name in (*NAMES, *DIRECT)),
        *((name, False) for name in ("GMRES", "BiCGStab", "Broyden")),
    ],
)
def test_no_backward_solver_claims_a_wrong_gradient(name, batched):
    policy = Implicit(backward_solvers(1e-8)[name])
    forward = Picard(tol=1e-13, max_iter=2000)
    (gradient, report), (z, stats) = gradient_and_report(forward, policy, jnp.float64, batched)
    assert (np.asarray(stats.status) == Status.CONVERGED).all()
    assert relative_error(z, exact_equilibrium(RATES, MASSES)) < 1e-10
    check(gradient, report, 1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_in_float32(name):
    policy = Implicit(backward_solvers(1e-4)[name])
    forward = Picard(tol=1e-6, max_iter=2000)
    (gradient, report), (z, _) = gradient_and_report(forward, policy, jnp.float32)
    assert relative_error(z, exact_equilibrium(RATES, MASSES)) < 1e-4
    check(gradient, report, 1e-2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    "forward",
    [Anderson(tol=1e-10), Broyden(tol=1e-10), NewtonKrylov(tol=1e-10)],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.slow
def test_the_forward_solver_as_backward_solver(forward):
    """The default policy, `Implicit()`, with each solver."""
    (gradient, report), (z, stats) = gradient_and_report(forward, Implicit(), jnp.float64)
    assert (np.asarray(stats.status) == Status.CONVERGED).all()
    assert relative_error(z, exact_equilibrium(RATES, MASSES)) < 1e-6
    check(gradient, report, 1e-4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NAMES)
def test_the_adjoint_by_itself(name):
    """`-0.2 Kᵀ u = y` has no solution unless y is orthogonal to the equilibrium."""
    z = exact_equilibrium(RATES, MASSES)
    rates, masses = jnp.asarray(RATES), jnp.asarray(MASSES)
    assert np.abs((WEIGHTS * z).sum(1)).min() > 0.01
    u, stats = solve_adjoint(
        reactions,
        rates,
        masses,
        jnp.asarray(z),
        jnp.asarray(WEIGHTS),
        solver=backward_solvers(1e-8)[name],
    )
    del u
    assert (np.asarray(stats.status) != Status.CONVERGED).all()


EXACT = Implicit(GroupInverse(GMRES(tol=1e-10)))


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_group_inverse_has_the_exact_gradient():
    forward = Picard(tol=1e-13, max_iter=2000)
    (gradient, report), _ = gradient_and_report(forward, EXACT, jnp.float64)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    np.testing.assert_allclose(gradient, exact_gradient(RATES), rtol=1e-6)
    assert report.evaluations <= 8


@pytest.mark.slow
def test_the_group_inverse_forwards_and_in_float32():
    expected = exact_gradient(RATES)
    with jax.enable_x64(True):

        def loss(rates):
            masses = jnp.asarray(MASSES)
            forward = Picard(tol=1e-13, max_iter=2000)
            z = deq_fixed_point(reactions, rates, masses, masses, solver=forward, gradient=EXACT)
            return (z * WEIGHTS).sum()

        rates = jnp.asarray(RATES)
        tangent = jax.jit(lambda r: jax.jvp(loss, (r,), (jnp.ones_like(r),)))(rates)[1]
        np.testing.assert_allclose(tangent, expected.sum(), rtol=1e-6)
    (gradient, report), _ = gradient_and_report(
        Picard(tol=1e-6, max_iter=2000), Implicit(GroupInverse()), jnp.float32
    )
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    np.testing.assert_allclose(gradient, expected, rtol=1e-3)


SLOW = ("Picard", "GMRES(2)")  # would need many thousands of products
REGULAR = {"float64": (np.array([0.5, 0.99, 1 - 1e-4]), 1e-8), "float32": ([0.5, 0.9, 0.998], 1e-4)}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
@pytest.mark.slow
def test_a_regular_system_with_a_large_solution_is_converged(name, dtype):
    """Gains of 500 and 10,000 are far below 1 / √eps: nothing is wrong with these."""
    slopes, tol = REGULAR[dtype]
    with jax.enable_x64(dtype == "float64"):
        slopes = jnp.asarray(slopes, dtype)

        def loss(x, probe):
            z = deq_fixed_point(
                lambda slopes, z, x: slopes * z + x,
                slopes,
                x,
                solver=NewtonKrylov(tol=tol),
                gradient=Implicit(backward_solvers(tol)[name]),
                backward_probe=probe,
            )
            return (z * jnp.asarray(WEIGHTS, dtype)).sum()

        x = jnp.asarray(MASSES + 0.5, dtype)
        gradient, report = jax.jit(jax.grad(loss, (0, 1)))(x, BackwardProbe.zeros(SAMPLES))
        np.testing.assert_array_equal(report.status, Status.CONVERGED)
        assert (report.residual <= tol).all()
        expected = WEIGHTS / (1 - np.asarray(slopes, np.float64))
        # The condition of the system is the largest gain.
        gain = 1 / (1 - float(slopes.max()))
        np.testing.assert_allclose(gradient, expected, rtol=10 * gain * tol)
