"""What a `BackwardProbe` reports, against residuals computed from the gradient, and counts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
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

STAY = Picard(tol=0.0, max_iter=1)
"""Returns its start, at which the backward system then stands."""

SAMPLES = 4

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def cell(params, z, x):
    return jnp.tanh(z @ params.T + x)


products = []
"""One entry for each time the transpose of `counted` ran."""


@jax.custom_vjp
def counted(z):
    return z


def _count(_, cotangent):
    jax.debug.callback(lambda: products.append(1))
    return (cotangent,)


counted.defvjp(lambda z: (z, None), _count)


def counting_cell(params, z, x):
    return cell(params, counted(z), x)


def problem():
    """A point on which the samples' Jacobians differ: the tanh is more or less saturated."""
    params = normal(12, 12, scale=0.25)
    x = normal(SAMPLES, 12, seed=1) * jnp.array([0.1, 0.5, 1.0, 3.0])[:, None]
    return params, x, normal(SAMPLES, 12, seed=2), normal(SAMPLES, 12, seed=3, scale=1e-3)


def residual_of(x_bar, params, z, x, y):
    """`‖Jᵀ u + y - u‖ / ‖y‖` per sample, u taken from `x̄ = (∂f/∂x)ᵀ u`, in NumPy."""
    params, z, x, y = map(np.asarray, (params, z, x, y))
    slope = 1 - np.tanh(z @ params.T + x) ** 2
    u = np.asarray(x_bar) / slope
    return np.linalg.norm((slope * u) @ params + y - u, axis=-1) / np.linalg.norm(y, axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 5))
def probed(policy, params, x, z, y, f=cell):
    """x̄ and the report."""

    def loss(x, probe):
        options = {"solver": STAY, "gradient": policy, "backward_probe": probe}
        return jnp.vdot(y, deq_fixed_point(f, params, x, z, **options))

    return jax.grad(loss, argnums=(0, 1))(x, BackwardProbe.zeros(SAMPLES))


def counts(policy, *args):
    """x̄ and the report, and how many products the linear solve really computed."""
    jax.effects_barrier()
    products.clear()
    result = jax.block_until_ready(probed(policy, *args, counting_cell))
    jax.effects_barrier()
    # The last product of the backward pass, into x, does not go through the state.
    return result, len(products)


BACKWARD = {
    "Picard": (Picard(tol=1e-3), 3),
    "Anderson": (Anderson(tol=1e-3), 3),
    "Broyden": (Broyden(tol=1e-3), 3),
    "GMRES": (GMRES(tol=1e-3), 3),
    "GMRES, restarted": (GMRES(restart=3, tol=1e-3), 6),
    "BiCGStab": (BiCGStab(tol=1e-3), 3),
    "NewtonKrylov": (NewtonKrylov(tol=1e-3), 1),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_the_report_is_what_the_gradient_shows(name):
    solver, cap = BACKWARD[name]
    params, x, z, y = problem()
    (x_bar, report), count = counts(Implicit(solver), params, x, z, y)
    residual = residual_of(x_bar, params, z, x, y)
    np.testing.assert_allclose(report.residual, residual, rtol=1e-3)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    assert (residual <= 1e-3).all()
    assert residual.min() > 1e-9
    assert report.evaluations == count > cap
    assert report.iterations.max() <= count
    if name != "NewtonKrylov":  # few iterations, of several products
        assert report.iterations.min() < report.iterations.max()  # each sample its own

    # Where y is zero, u is too; nothing is computed for it, nor anything at all if it is all zero.
    (x_bar, report), _ = counts(Implicit(solver), params, x, z, y.at[1:3].set(0))
    np.testing.assert_array_equal(x_bar[1:3], 0)
    np.testing.assert_array_equal(report.residual[1:3], 0)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    assert (report.iterations[1:3] <= 1).all()
    (x_bar, report), count = counts(Implicit(solver), params, x, z, 0 * y)
    np.testing.assert_array_equal(x_bar, 0)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    assert all((field == 0).all() for field in report)
    assert count == 0


@pytest.mark.museum(
    "jaxopt J6 (google/jaxopt#466): normal CG capped at 3 steps gave a 21 % wrong gradient and no"
    " flag; a user got all zeros"
)
@pytest.mark.museum(
    "DEQ.jl: the adjoint took 10 linear steps and said nothing when they were too few"
)
@pytest.mark.parametrize("name", BACKWARD)
def test_a_capped_solve_says_so(name):
    solver, cap = BACKWARD[name]
    params, x, z, y = problem()
    policy = Implicit(solver, max_iter=cap)
    (x_bar, report), count = counts(policy, params, x, z, y)
    residual = residual_of(x_bar, params, z, x, y)
    np.testing.assert_allclose(report.residual, residual, rtol=1e-3)
    assert (residual > 1e-3).all()
    np.testing.assert_array_equal(report.status, Status.MAX_ITER)
    np.testing.assert_array_equal(report.iterations, cap)
    assert report.evaluations == count == cap


@pytest.mark.parametrize("policy", [OneStep(), Neumann(4), Neumann(3, 0.6)], ids=repr)
def test_policies_of_a_fixed_length_report_what_they_leave_out(policy):
    params, x, z, y = problem()
    (x_bar, report), count = counts(policy, params, x, z, y)
    np.testing.assert_allclose(report.residual, residual_of(x_bar, params, z, x, y), rtol=1e-6)
    np.testing.assert_array_equal(report.status, Status.MAX_ITER)
    terms = getattr(policy, "terms", 1)
    np.testing.assert_array_equal(report.iterations, terms - 1)
    assert report.evaluations == count == terms  # one of them for the report
    (x_bar, report), _ = counts(policy, params, x, z, y.at[0].set(0).at[1, 0].set(jnp.nan))
    np.testing.assert_array_equal(x_bar[0], 0)
    assert report.residual[0] == 0
    assert report.status.tolist() == [Status.CONVERGED, Status.DIVERGED, 1, 1]


@pytest.mark.parametrize("name", ["Picard", "GMRES"])
def test_a_cotangent_that_is_not_finite_is_reported_and_stays_with_its_sample(name):
    solver, _ = BACKWARD[name]
    params, x, z, y = problem()
    (clean, _), _ = counts(Implicit(solver), params, x, z, y)
    spoilt = y.at[2, 1].set(jnp.inf)
    (x_bar, report), _ = counts(Implicit(solver), params, x, z, spoilt)
    assert not np.isfinite(x_bar[2]).all()
    assert (x_bar[2] != 0).all()  # and no number of it becomes a gradient of zero
    np.testing.assert_array_equal(report.status, [0, 0, Status.DIVERGED, 0])
    others = jnp.array([0, 1, 3])
    # The scale that is taken out before the solve is not: equal up to rounding.
    np.testing.assert_allclose(x_bar[others], clean[others], rtol=1e-12)


@pytest.mark.museum("JAX, custom_vjp: a failure in the backward pass has nowhere to go")
@pytest.mark.slow
def test_under_vmap_over_params():
    params, x, z, y = problem()
    stacked = jnp.stack([params, 0.3 * params, 0 * params])
    run = jax.vmap(lambda params: probed(Implicit(GMRES(tol=1e-3)), params, x, z, y))
    x_bar, report = run(stacked)
    assert report.residual.shape == (3, SAMPLES)
    assert report.evaluations.shape == (3,)
    for i in range(2):
        residual = residual_of(x_bar[i], stacked[i], z, x, y)
        np.testing.assert_allclose(report.residual[i], residual, rtol=1e-3)
    assert report.evaluations[0] > report.evaluations[1] > report.evaluations[2]
    np.testing.assert_allclose(x_bar[2], y * (1 - jnp.tanh(x) ** 2), rtol=1e-10)


@pytest.mark.parametrize("solver", [GMRES(tol=1e-3), Anderson(tol=1e-3)], ids=["GMRES", "Anderson"])
def test_under_shard_map(solver):
    params, x, z, y = problem()

    def local(params, x, z, y):
        def loss(x, probe):
            options = {"solver": STAY, "gradient": Implicit(solver), "backward_probe": probe}
            return jnp.vdot(y, deq_fixed_point(cell, params, x, z, **options))

        probe = jax.lax.pcast(BackwardProbe.zeros(1), "data", to="varying")
        x_bar, report = jax.grad(loss, argnums=(0, 1))(x, probe)
        return x_bar, report._replace(evaluations=report.evaluations[None])

    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": P("data")}
    x_bar, report = jax.jit(jax.shard_map(local, mesh=mesh, **specs))(params, x, z, y)
    np.testing.assert_allclose(report.residual, residual_of(x_bar, params, z, x, y), rtol=1e-3)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.evaluations, report.iterations)  # each device its own
    assert len(set(report.evaluations.tolist())) > 1


@pytest.mark.slow
def test_two_solves_with_a_probe_each():
    params, x, z, y = problem()
    policy = Implicit(BiCGStab(tol=1e-3))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def run(x, probes):
        options = {"solver": STAY, "gradient": policy}
        first = deq_fixed_point(cell, params, x, z, backward_probe=probes[0], **options)
        second = deq_fixed_point(cell, params, x[:2], z[:2], backward_probe=probes[1], **options)
        return jnp.vdot(y, first) + 1e-3 * jnp.vdot(y[2:], second)

    _, reports = run(x, (BackwardProbe.zeros(SAMPLES), BackwardProbe.zeros(2)))
    assert reports[0].residual.shape == (SAMPLES,)
    assert reports[1].residual.shape == (2,)
    assert all((report.status == Status.CONVERGED).all() for report in reports)


# A loss on which the gradient does not depend.


POLICIES = {
    "Implicit": Implicit(),
    "GMRES": Implicit(GMRES()),
    "SHINE": Implicit(reuse=True),
    "Neumann": Neumann(3),
    "Phantom": Phantom(3),  # this one and the next take no probe
    "Unrolled": Unrolled(),
}


@pytest.mark.museum(
    "JAX, symbolic zeros: the backward solve ran although only statistics, or nothing, depended "
    "on the parameters"
)
@pytest.mark.parametrize(
    ("name", "with_probe"),
    [(name, False) for name in POLICIES] + [(name, True) for name in list(POLICIES)[:-2]],
)
def test_no_backward_loop_for_what_the_loss_does_not_depend_on(name, with_probe):
    policy = POLICIES[name]
    params, x, _, y = problem()

    def loss(uses, params, x, probe):
        z, stats = deq_fixed_point(
            cell,
            params,
            x,
            solver=Broyden(),
            gradient=policy,
            return_stats=True,
            backward_probe=probe,
        )
        return {
            "nothing": jnp.sum(x**2),
            "stats": jnp.sum(stats.residual) + jnp.sum(x**2),
            "z, stopped": jnp.vdot(y, jax.lax.stop_gradient(z)) + jnp.sum(x**2),
            "z": jnp.vdot(y, z),
        }[uses]

    def compiled_loops(uses):
        argnums = (0, 1, 2) if with_probe else (0, 1)
        run = jax.value_and_grad(functools.partial(loss, uses), argnums)
        probe = BackwardProbe.zeros(SAMPLES) if with_probe else None
        lowered = jax.jit(run).lower(params, x, probe)
        return lowered.as_text().count("stablehlo.while")

    assert compiled_loops("nothing") == 0
    if name == "Unrolled":  # its forward pass is a loop in a loop
        assert compiled_loops("stats") == compiled_loops("z, stopped") == 2
    else:
        assert compiled_loops("stats") == compiled_loops("z, stopped") == 1
    assert compiled_loops("z") > 1 + (name == "Unrolled")
