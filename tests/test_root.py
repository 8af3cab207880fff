"""`deq_root` against closed forms, SciPy and dense solves."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    Broyden,
    Execution,
    Implicit,
    NewtonKrylov,
    OneStep,
    Status,
    deq_fixed_point,
    deq_root,
)
from tests.reference import flatten, relative_error

pytestmark = pytest.mark.usefixtures("x64")

NEWTON = NewtonKrylov(tol=1e-12, max_iter=50)
EXACT = Implicit(GMRES(tol=1e-13))
BATCH, N = 4, 5
A = np.random.default_rng(0).normal(size=(N, N))
A = A @ A.T / N + 0.2 * np.eye(N)
X = np.random.default_rng(1).normal(size=(BATCH, N)) * np.array([0.1, 1, 3, 10])[:, None]


def F(params, z, x):
    """The gradient of a convex function of z, in the unit 1 / factor."""
    return params["factor"] * (z @ params["A"] + params["c"] * z**3 - x)


def params(factor=1.0):
    return {"factor": jnp.asarray(factor), "c": jnp.asarray(0.5), "A": jnp.asarray(A)}


def exact(x):
    """The root of one sample, by SciPy and a last step of Newton."""
    residual = lambda z: A @ z + 0.5 * z**3 - x  # noqa: E731
    slope = lambda z: A + np.diag(1.5 * z**2)  # noqa: E731
    z = scipy.optimize.root(residual, 0 * x, jac=slope, tol=1e-13).x
    return z - np.linalg.solve(slope(z), residual(z))


ROOTS = np.stack([exact(x) for x in X])
# dz = -(A + 3 c diag(z²))⁻¹ z³ dc, and the transposed product with cotangent 2 z.
SLOPES = [A + np.diag(1.5 * z**2) for z in ROOTS]
BY_C = -sum(2 * z @ np.linalg.solve(s, z**3) for z, s in zip(ROOTS, SLOPES, strict=True))
BY_X = np.stack([np.linalg.solve(s, 2 * z) for z, s in zip(ROOTS, SLOPES, strict=True)])


@functools.partial(jax.jit, static_argnames="solver")
def solve(params, x, solver):
    return deq_root(F, params, x, solver=solver, return_stats=True)


@functools.partial(jax.jit, static_argnames=("solver", "execution"))
def differentiate(params, x, solver=NEWTON, execution=Execution()):  # noqa: B008
    def loss(params, x):
        z = deq_root(F, params, x, solver=solver, gradient=EXACT, execution=execution)
        return (z**2).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


def check_gradient(value, gradients, factor=1.0):
    by_params, by_x = gradients
    np.testing.assert_allclose(value, (ROOTS**2).sum(), rtol=1e-8)
    np.testing.assert_allclose(by_params["c"], BY_C, rtol=1e-8)
    np.testing.assert_allclose(by_params["factor"] * factor, 0, atol=1e-8)
    np.testing.assert_allclose(by_x, BY_X, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "solver", [NEWTON, Broyden(tol=1e-12, max_iter=100)], ids=["newton", "broyden"]
)
def test_the_unit_and_the_sign_of_F_do_not_matter(solver):
    """At any factor the same steps and the same residuals; a power of two leaves every bit."""
    counts, residuals = [], []
    for factor in (1.0, -(2.0**-30), 2.0**30):
        z, stats = solve(params(factor), X, solver)
        assert stats.converged.all()
        np.testing.assert_allclose(z, ROOTS, rtol=1e-9)
        counts.append(stats.iterations.tolist())
        residuals.append(stats.residual.tolist())
    assert counts[0] == counts[1] == counts[2]
    assert residuals[0] == residuals[1] == residuals[2]


@pytest.mark.parametrize("factor", [1.0, -1e-9])
def test_gradient(factor):
    check_gradient(*differentiate(params(factor), X), factor)


@pytest.mark.slow
def test_all_modes_against_the_cube_root():
    """z = (x / p)^(1/3), with all derivatives in closed form."""
    x, z0 = jnp.array([[1.0], [8.0]]), jnp.ones((2, 1))
    root = lambda p: deq_root(  # noqa: E731
        lambda p, z, x: p * z**3 - x, p, x, z0, solver=NEWTON, gradient=EXACT
    ).sum()
    total = 3 * 2.0 ** (-1 / 3)  # at p = 2
    derivatives = (total, -total / 6, total / 9)
    np.testing.assert_allclose(jax.jvp(root, (2.0,), (1.0,)), derivatives[:2], rtol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.grad(root))(2.0), derivatives[1], rtol=1e-10)
    np.testing.assert_allclose(jax.jit(jax.hessian(root))(2.0), derivatives[2], rtol=1e-9)


@pytest.mark.slow
def test_for_a_fixed_point_it_is_deq_fixed_point():
    """F = z - g(z) with a small slope of g, in any unit: the steps are those of g."""
    g = lambda w, z, x: jnp.tanh(w * z) + x  # noqa: E731
    solver = Anderson(tol=1e-10)
    got, expected = (
        door(function, 0.2, X, solver=solver, return_stats=True)
        for door, function in (
            (deq_root, lambda w, z, x: 2.0**40 * (g(w, z, x) - z)),
            (deq_fixed_point, g),
        )
    )
    assert got[1].iterations.tolist() == expected[1].iterations.tolist()
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-13)


@pytest.mark.slow
def test_the_residual_estimates_the_error():
    """Within the condition number of F; it is ‖s F‖ / ‖z - s F‖ with a power of two s."""
    z, stats = solve(params(), X, NewtonKrylov(tol=1e-3, max_iter=50))
    errors = np.linalg.norm(z - ROOTS, axis=1) / np.linalg.norm(ROOTS, axis=1)
    assert (stats.residual <= 1e-3).all()
    assert (errors <= 1e-3 * np.linalg.cond(A)).all()
    value = np.asarray(F(params(), z, X))
    ratios = []
    for exponent in range(-8, 8):
        step = 2.0**exponent * value
        residual = np.linalg.norm(step, axis=1) / np.linalg.norm(z - step, axis=1)
        ratios.append(np.isclose(residual, stats.residual, rtol=1e-6))
    assert np.any(ratios, axis=0).all()


@pytest.mark.slow
def test_a_sample_does_not_depend_on_its_batch_mates():
    alone = solve(params(), X[2:3], NEWTON)
    among = solve(params(), X, NEWTON)
    assert alone[1].iterations[0] == among[1].iterations[2]
    np.testing.assert_allclose(alone[0][0], among[0][2], rtol=1e-12)
    bad = X.copy()
    bad[0] = np.nan
    with_bad = solve(params(), bad, NEWTON)
    assert with_bad[1].status.tolist() == [Status.DIVERGED, 0, 0, 0]
    np.testing.assert_allclose(with_bad[0][1:], ROOTS[1:], rtol=1e-9)


@pytest.mark.slow
def test_a_root_of_zero_needs_atol():
    F = lambda p, z, x: z + 0.1 * jnp.sin(z)  # noqa: E731
    z0 = jnp.ones((1, 3))
    for solver, converged in (
        (NewtonKrylov(tol=1e-6, atol=1e-9, max_iter=50), True),
        (Broyden(tol=1e-6, atol=1e-9, max_iter=3), False),
    ):
        z, stats = deq_root(F, None, None, z0, solver=solver, return_stats=True)
        assert stats.converged.all() == converged
        assert (np.linalg.norm(z) < 2e-9) == converged


@pytest.mark.slow
def test_one_system():
    """With `batched=False` a tree is one system, complex leaves included; scalars give a probe."""

    def F(p, z, x):
        return {
            "u": z["u"] ** 2 - p * z["v"].real,
            "v": z["v"] * (2 + 1j) - x - z["u"].astype(complex),
        }

    def loss(p, probe):
        z, stats = deq_root(
            F, p, 1.0 + 2j, z0, batched=False, solver=NEWTON, gradient=EXACT,
            return_stats=True, backward_probe=probe,
        )  # fmt: skip
        return z["u"] + (z["v"] * (1 - 2j)).real, (z, stats)

    z0 = {"u": jnp.ones(()), "v": jnp.ones((), complex)}
    (derivative, report), (z, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(
        3.0, BackwardProbe.zeros()
    )
    assert stats.converged
    assert report.status == 0
    assert np.abs(flatten(F(3.0, z, 1.0 + 2j))).max() < 1e-11
    u = complex(z["u"]).real  # v = (x + u) / (2 + i), and u² = p Re v
    v_u = 1 / (2 + 1j)
    u_p = ((1 + 2j + u) / (2 + 1j)).real / (2 * u - 3 * v_u.real)
    np.testing.assert_allclose(derivative, u_p * (1 + (v_u * (1 - 2j)).real), rtol=1e-8)


@pytest.mark.slow
def test_kinks_by_broyden():
    F = lambda p, z, x: jnp.maximum(z, 3 * z) - x  # noqa: E731
    x = jnp.array([[6.0, -2.0], [1.5, -0.1]])
    z, stats = deq_root(F, None, x, solver=Broyden(tol=1e-8), return_stats=True)
    assert stats.converged.all()
    np.testing.assert_allclose(z, jnp.where(x > 0, x / 3, x), rtol=1e-6)


@pytest.mark.slow
def test_one_step_of_the_root_form():
    """`OneStep` is -s ∂F/∂c, with a power of two s for each sample."""
    root = lambda c: deq_root(F, {**params(), "c": c}, X, solver=NEWTON, gradient=OneStep())  # noqa: E731
    by_c = jax.jvp(root, (0.5,), (1.0,))[1]
    scale = np.asarray(-by_c / ROOTS**3)
    assert np.ptp(scale, axis=1).max() < 1e-8
    np.testing.assert_allclose(np.log2(scale[:, 0]), np.round(np.log2(scale[:, 0])), atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "execution", [Execution(shrink_to=1), Execution(shard_axis="data")], ids=["shrink", "shard"]
)
def test_execution(execution):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        check_gradient(*differentiate(params(1e3), X, execution=execution))


@pytest.mark.slow
def test_collectives_within_a_shard():
    """F sums over the shards, which only the inside of the `shard_map` allows."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def F(p, z, x):
        return p * z - x + 0.1 * jax.lax.psum(z, "data")

    with jax.set_mesh(mesh):
        z = deq_root(F, 2.0, X, solver=Broyden(tol=1e-12), execution=Execution(shard_axis="data"))
    np.testing.assert_allclose(2 * z + 0.1 * z.sum(0), X, rtol=1e-9)


@pytest.mark.slow
def test_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("data",))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        value, gradients = differentiate(params(1e3), x)
    check_gradient(*jax.tree.map(np.asarray, (value, gradients)))


@pytest.mark.slow
def test_half_precision_cells():
    z, stats = deq_root(
        F,
        params(1e3),
        X,
        solver=NewtonKrylov(tol=0.02),
        execution=Execution(cell_dtype=jnp.bfloat16),
        return_stats=True,
    )
    assert z.dtype == jnp.float64
    assert stats.converged.all()
    assert relative_error(z, ROOTS) < 0.2


BAD = {
    "F is no function": (lambda: deq_root(3, None, X), TypeError, ["F must be", "3"]),
    "F returns fewer equations": (
        lambda: deq_root(lambda p, z, x: z[:, 1:], None, X),
        ValueError,
        ["F must return", r"\(4, 4\)", r"\(4, 5\)"],
    ),
    "F returns a pair": (
        lambda: deq_root(lambda p, z, x: (z, x), None, X),
        ValueError,
        ["F must return the structure of z"],
    ),
    "F returns float32": (
        lambda: deq_root(lambda p, z, x: z.astype(jnp.float32), None, X),
        ValueError,
        ["F must return", "float32", "float64", "cast what F returns"],
    ),
    "integers": (lambda: deq_root(F, params(), X.astype(int)), TypeError, ["int64", "z0"]),
    "no solver": (lambda: deq_root(F, params(), X, solver=GMRES()), TypeError, ["solver", "GMRES"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert re.search(word, str(raised.value)), (word, str(raised.value))
