"""bfloat16 and float16 states: every solver and every gradient policy, against dense float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from tests.reference import newton_equilibrium, relative_error

TOL = 2e-2
BATCH, WIDTH = 3, 8
PICARD, ANDERSON, BROYDEN, NEWTON = (
    solver(tol=TOL) for solver in (Picard, Anderson, Broyden, NewtonKrylov)
)


def cell(params, z, x):
    """A state of two leaves; a contraction, since ‖W‖ = 0.7."""
    mixed = jnp.tanh(jnp.concatenate([z["a"], z["b"].reshape(-1, 6)], axis=1) @ params["w"].T)
    mixed = mixed + params["b"]
    return {"a": mixed[:, :2] + x["a"], "b": mixed[:, 2:].reshape(-1, 2, 3) + x["b"]}


def flat_cell(params, z, x):
    return jnp.tanh(z @ params["w"].T) + params["b"] + x


def split(z):
    return {"a": z[:, :2], "b": z[:, 2:].reshape(-1, 2, 3)}


def join(z):
    return np.concatenate(
        [np.asarray(leaf, np.float64).reshape(BATCH, -1) for leaf in (z["a"], z["b"])], axis=1
    )


def problem(dtype):
    """Parameters, input and cotangent: rounded to `dtype`, as float64."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    arrays = {
        "w": 0.7 * (basis @ np.diag(np.linspace(-0.8, 1, WIDTH)) @ basis.T),
        "b": 0.1 * rng.normal(size=WIDTH),
        "x": 0.3 * rng.normal(size=(BATCH, WIDTH)),
        "y": rng.normal(size=(BATCH, WIDTH)),
    }
    return {key: np.asarray(jnp.asarray(a, dtype), np.float64) for key, a in arrays.items()}


def jacobians(w, z):
    """∂f/∂z of each sample."""
    slope = 1 - np.tanh(z @ w.T) ** 2
    return slope[:, :, None] * w


def truncated(count):
    """`Σ_{t < count} (Jᵀ)ᵗ y`."""

    def u(w, z, y):
        total = term = y
        for _ in range(count - 1):
            term = np.einsum("bij,bi->bj", jacobians(w, z), term)
            total = total + term
        return total

    return u


def solved(w, z, y):
    """`(I - Jᵀ)⁻¹ y`."""
    systems = np.eye(WIDTH) - jacobians(w, z).transpose(0, 2, 1)
    return np.linalg.solve(systems, y[..., None])[..., 0]


def pulled_back(w, z, u):
    """The cotangents of params and x that a cotangent u of f's value leaves behind."""
    by_mixed = u * (1 - np.tanh(z @ w.T) ** 2)
    return {"w": by_mixed.T @ z, "b": u.sum(0), "x": u}


# Solver, policy, and the u that its gradient stands for; None where it is that of some steps.
CASES = [
    (PICARD, Implicit(), solved),
    (ANDERSON, Implicit(), solved),
    (BROYDEN, Implicit(), solved),
    (NEWTON, Implicit(), solved),
    (ANDERSON, Implicit(GMRES(tol=TOL)), solved),
    (ANDERSON, Implicit(BiCGStab(tol=TOL)), solved),
    (BROYDEN, Implicit(reuse=True), solved),
    (ANDERSON, OneStep(), truncated(1)),
    (ANDERSON, Neumann(3), truncated(3)),
    (ANDERSON, Phantom(4, 0.7), None),
    (PICARD, Unrolled(), None),
]


def through_steps(given, start, steps, damping):
    """The gradient of so many steps `z <- (1 - τ) z + τ f(z)` of each sample."""

    def loss(given, x):
        z = total = jnp.asarray(start)
        for k in range(steps.max() + 1):
            total = jnp.where((steps == k)[:, None], z, total)
            z = (1 - damping) * z + damping * flat_cell(given, z, x)
        return (total * given["y"]).sum()

    with jax.enable_x64(True):
        given = jax.tree.map(jnp.asarray, given)
        by_given, by_x = jax.device_get(jax.jit(jax.grad(loss, argnums=(0, 1)))(given, given["x"]))
    return {"w": by_given["w"], "b": by_given["b"], "x": by_x}


def name(value):
    if isinstance(value, Implicit):
        return f"Implicit {type(value.solver).__name__}{' reuse' * value.reuse}"
    return "" if value is None or callable(value) else type(value).__name__


@pytest.mark.museum("jaxopt J8: Anderson on a bfloat16 state was a TypeError")
@pytest.mark.museum(
    "optimistix O4: a bfloat16 state was a ValueError: the error in the loop's carry was float32"
)
@pytest.mark.museum(
    "JAX, carry dtypes: a bfloat16 state with float32 parameters: an error about the loop's carry"
)
# All in bfloat16; in float16 every solver, and one policy of each kind.
@pytest.mark.parametrize(
    ("solver", "policy", "u", "dtype"),
    [(*case, jnp.bfloat16) for case in CASES]
    + [(*CASES[i], jnp.float16) for i in (0, 1, 2, 3, 4, 8, 10)],
    ids=name,
)
@pytest.mark.slow
def test_forwards_and_backwards(dtype, solver, policy, u):
    given = problem(dtype)
    w, x, y = given["w"], given["x"], given["y"]
    with jax.enable_x64(True):
        exact = np.asarray(newton_equilibrium(lambda z: flat_cell(given, z, x), 0 * x))
    rounding = float(jnp.finfo(dtype).eps)

    arrays = {key: jnp.asarray(a, dtype) for key, a in given.items()}
    params, cotangent = {"w": arrays["w"], "b": arrays["b"]}, split(arrays["y"])

    def loss(params, x):
        z, stats = deq_fixed_point(
            cell, params, x, solver=solver, gradient=policy, return_stats=True
        )
        products = jax.tree.map(
            lambda z, y: (z.astype(jnp.float32) * y.astype(jnp.float32)).sum(), z, cotangent
        )
        return products["a"] + products["b"], (z, stats)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_params, by_x), (z, stats) = gradient(params, split(arrays["x"]))

    for leaf in jax.tree.leaves((z, by_params, by_x)):
        assert leaf.dtype == dtype
        assert np.isfinite(leaf.astype(jnp.float32)).all()
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert stats.residual.dtype == jnp.float32
    # f in half precision is off by a rounding of its value, of tanh and of the sum.
    reached = join(z)
    fz = np.tanh(reached @ w.T) + given["b"] + x
    residual = np.linalg.norm(fz - reached, axis=1) / np.linalg.norm(fz, axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=0, atol=2 * rounding)
    assert (residual <= TOL + 2 * rounding).all()
    # ‖(I - J)⁻¹‖ <= 1 / (1 - 0.7)
    assert relative_error(reached, exact) <= (TOL + 2 * rounding) / 0.3

    got = {"w": by_params["w"], "b": by_params["b"], "x": join(by_x)}
    if isinstance(policy, Unrolled):
        expected = through_steps(given, 0 * x, np.asarray(stats.iterations) - 1, 1.0)
    elif isinstance(policy, Phantom):
        steps = np.full(BATCH, policy.steps)
        expected = through_steps(given, reached, steps, policy.damping)
    else:
        z = exact if u is solved else reached
        expected = pulled_back(w, z, u(w, z, y))
    # TOL in z and in u, times ‖(I - J)⁻¹‖ <= 1 / 0.3 at worst, or rounding alone.
    bound = 3 * TOL if u is solved else 2 * rounding
    for key in expected:
        assert relative_error(np.asarray(got[key], np.float64), expected[key]) <= bound, key


def test_the_policies_can_be_told_apart():
    """The gradients they stand for differ by far more than the bounds above."""
    given = problem(jnp.bfloat16)
    w, x, y = given["w"], given["x"], given["y"]
    with jax.enable_x64(True):
        z = np.asarray(newton_equilibrium(lambda z: flat_cell(given, z, x), 0 * x))
    exact = pulled_back(w, z, solved(w, z, y))
    for u in (truncated(1), truncated(3)):
        assert relative_error(pulled_back(w, z, u(w, z, y)), exact) > 5 * TOL
