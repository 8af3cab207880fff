"""`deq_fixed_point` over four virtual devices: `shard_map` with its checks on, and sharded jit."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
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
    SolveStats,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

SOLVERS = {
    "picard": Picard(tol=1e-13, max_iter=300, trace=True),
    "anderson": Anderson(tol=1e-13, max_iter=100, trace=True),
}
PER_SAMPLE = SolveStats(P("data"), P("data"), P("data"), None, P(None, "data"))

pytestmark = pytest.mark.usefixtures("x64")


def cell(params, z, x):
    return jnp.tanh(z @ params["W"] + x @ params["U"])


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


PARAMS_SCALE = {"W": 0.3, "U": 1.0}


def make_params(seed=0):
    return {name: s * normal(3, 3, seed=seed + i) for i, (name, s) in
            enumerate(PARAMS_SCALE.items())}  # fmt: skip


def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def over_batch(function, in_specs, out_specs):
    return jax.jit(jax.shard_map(function, mesh=mesh(), in_specs=in_specs, out_specs=out_specs))


def dense(params, x, cotangent):
    """Equilibrium and gradients with respect to params and x."""
    z = newton_equilibrium(lambda z: cell(params, z, x), jnp.zeros_like(x))
    gradients = implicit_gradient(
        lambda inputs, z: cell(inputs[0], z, inputs[1]), (params, x), z, cotangent
    )
    return z, gradients


@pytest.mark.museum(
    "JAX, sharded batches: a test of the largest residual puts an all-reduce into each iteration "
    "of a sharded batch"
)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.slow
def test_shard_map_values_and_stats(solver):
    params, x = make_params(), normal(8, 3) * jnp.linspace(0.1, 3, 8)[:, None]

    def solve(params, x):
        z, stats = deq_fixed_point(cell, params, x, solver=solver, return_stats=True)
        return z, stats._replace(evaluations=None), stats.evaluations[None]

    specs = (P(), P("data")), (P("data"), PER_SAMPLE, P("data"))
    z, stats, evaluations = over_batch(solve, *specs)(params, x)
    single_z, single, _ = jax.jit(solve)(params, x)
    assert relative_error(z, dense(params, x, x)[0]) < 1e-11
    assert relative_error(z, single_z) < 1e-13
    # Near the tolerance rounding decides, and it depends on the shapes a device works on.
    assert np.abs(stats.iterations - single.iterations).max() <= 1
    np.testing.assert_array_equal(stats.status, single.status)
    np.testing.assert_allclose(stats.trace[:5], single.trace[:5], rtol=1e-6, atol=1e-14)
    # Each device stops when its own samples have.
    np.testing.assert_array_equal(evaluations, stats.iterations.reshape(4, 2).max(1))
    assert len(set(evaluations.tolist())) > 1


@pytest.mark.museum(
    "JAX, shard_map (diffrax#735, #738): with its checks on, shard_map refuses carries made by "
    "jnp.zeros"
)
@pytest.mark.parametrize("grad", ["inside", "outside"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.slow
def test_shard_map_gradients(solver, grad):
    params, x, cotangent = make_params(), normal(8, 3), normal(8, 3, seed=2)
    in_specs = P(), P("data"), P("data")

    def loss(params, x, cotangent):
        return jnp.vdot(cotangent, deq_fixed_point(cell, params, x, solver=solver))

    if grad == "inside":
        # The params are the same on all devices, so jax.grad sums their gradient over the mesh.
        gradient = over_batch(jax.grad(loss, (0, 1)), in_specs, (P(), P("data")))
    else:
        local = over_batch(lambda *args: jax.lax.psum(loss(*args), "data"), in_specs, P())
        gradient = jax.jit(jax.grad(local, (0, 1)))
    expected = dense(params, x, cotangent)[1]
    assert relative_error(gradient(params, x, cotangent), expected) < 1e-10


def _start_from_zeros(params, x):
    return deq_fixed_point(cell, params, x, jnp.zeros(x.shape), solver=SOLVERS["anderson"])


def _closes_over_the_shard(params, x):
    def f(params, z, nothing):
        return cell(params, z, x)

    return deq_fixed_point(f, params, (), jnp.zeros(x.shape), solver=SOLVERS["picard"])


def _loop_inside_f(params, x):
    def f(params, z, x):
        # The inner carry must vary as the equation's state does, from the first trace on.
        return jax.lax.fori_loop(0, 1, lambda _, z: cell(params, z, x), z)

    return deq_fixed_point(f, params, x, jnp.zeros(x.shape), solver=SOLVERS["picard"])


def _part_of_the_state_replicated(params, x):
    def f(params, z, x):
        return (cell(params, z[0], x), 0.5 * z[1] + 1)

    z0 = jnp.zeros_like(x), jnp.ones(x.shape)
    return deq_fixed_point(f, params, x, z0, solver=SOLVERS["anderson"])[0]


def _one_equation_a_shard(params, x):
    return deq_fixed_point(cell, params, x, solver=SOLVERS["picard"], batched=False)


@pytest.mark.parametrize(
    "local",
    [
        _start_from_zeros,
        _closes_over_the_shard,
        _loop_inside_f,
        _part_of_the_state_replicated,
        _one_equation_a_shard,
    ],
)
@pytest.mark.slow
def test_shard_map_of_a_state_that_varies_less_than_f(local):
    params, x, cotangent = make_params(), normal(8, 3), normal(8, 3, seed=2)

    def loss(params, x):
        z = over_batch(local, (P(), P("data")), P("data"))(params, x)
        return jnp.vdot(cotangent, z), z

    gradients, z = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    expected_z, expected = dense(params, x, cotangent)
    # A sample that has stopped stands still while what the others add to the mean still moves.
    assert relative_error(z, expected_z) < 1e-10
    assert relative_error(gradients, expected) < 1e-9


@pytest.mark.slow
def test_shard_map_over_models():
    models, x, cotangent = [make_params(seed) for seed in range(4)], normal(2, 3), normal(2, 3)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)

    def local(stacked, x):
        params = jax.tree.map(lambda leaf: leaf[0], stacked)
        return deq_fixed_point(cell, params, x, solver=SOLVERS["anderson"])[None]

    def loss(stacked, x):
        z = over_batch(local, (P("data"), P()), P("data"))(stacked, x)
        return jnp.sum(cotangent * z)

    by_models, by_x = jax.jit(jax.grad(loss, (0, 1)))(stacked, x)
    expected = [dense(params, x, cotangent)[1] for params in models]
    for i, (by_params, _) in enumerate(expected):
        assert relative_error(jax.tree.map(lambda leaf: leaf[i], by_models), by_params) < 1e-10
    assert relative_error(by_x, sum(by_x for _, by_x in expected)) < 1e-10


@pytest.mark.slow
def test_shard_map_of_the_backward_solve():
    params, x, cotangent = make_params(), normal(8, 3), normal(8, 3, seed=2)
    solver = SOLVERS["anderson"]
    z = dense(params, x, cotangent)[0]

    def adjoint(params, x, z, cotangent):
        return solve_adjoint(cell, params, x, z, cotangent, solver=solver).value

    u = over_batch(adjoint, (P(), *[P("data")] * 3), P("data"))(params, x, z, cotangent)
    slope = 1 - np.asarray(z) ** 2
    for i in range(8):
        transposed = np.asarray(params["W"]) @ np.diag(slope[i])
        expected = np.linalg.solve(np.eye(3) - transposed, np.asarray(cotangent[i]))
        assert relative_error(u[i], expected) < 1e-11

    def probed(probe, params, x, cotangent):
        z = deq_fixed_point(cell, params, x, solver=solver, backward_probe=probe)
        return jnp.vdot(cotangent, z)

    probe = jax.tree.map(lambda leaf: jnp.stack([leaf] * 4), BackwardProbe.zeros(2))

    def report(probe, *args):
        mine = jax.tree.map(lambda leaf: leaf[0], probe)
        return jax.tree.map(lambda leaf: leaf[None], jax.grad(probed)(mine, *args))

    got = over_batch(report, (P("data"), P(), P("data"), P("data")), P("data"))(
        probe, params, x, cotangent
    )
    assert (got.residual <= solver.tol).all()
    np.testing.assert_array_equal(got.evaluations, got.iterations.max(1))


@pytest.mark.museum(
    "JAX, sharded batches: a test of the largest residual puts an all-reduce into each iteration "
    "of a sharded batch"
)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.slow
def test_jit_over_a_sharded_batch(solver):
    params, x, cotangent = make_params(), normal(8, 3), normal(8, 3, seed=2)
    devices = mesh()
    sharded = NamedSharding(devices, P("data"))
    replicated = jax.device_put(params, NamedSharding(devices, P()))

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, solver, cotangent):
        def loss(params, x):
            z, stats = deq_fixed_point(cell, params, x, solver=solver, return_stats=True)
            return jnp.vdot(cotangent, z), (z, stats)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    arguments = jax.device_put((x, cotangent), sharded)
    gradients, (z, stats) = run(replicated, arguments[0], solver, arguments[1])
    expected_z, expected = dense(params, x, cotangent)
    assert z.sharding.is_equivalent_to(sharded, z.ndim)
    # A sample that has stopped stands still while what the others add to the mean still moves.
    assert relative_error(z, expected_z) < 1e-10
    assert relative_error(gradients, expected) < 1e-9
    _, (_, single) = run(params, x, solver, cotangent)
    assert np.abs(stats.iterations - single.iterations).max() <= 1
    np.testing.assert_array_equal(stats.status, single.status)
    np.testing.assert_allclose(stats.trace[:5], single.trace[:5], rtol=1e-6, atol=1e-14)
    assert stats.evaluations == stats.iterations.max()


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.slow
def test_shard_map_of_an_f_that_communicates(solver):
    """Every device makes as many trips as the slowest, or an all-reduce would wait for ever."""
    x = normal(8, 3) * jnp.linspace(0.01, 3, 8)[:, None]
    weights = normal(8, 3, seed=2)

    def centred(mean):
        return lambda gain, z, x: jnp.tanh(gain * (z - mean(z))) + x

    def solve(gain, x):
        local = centred(lambda z: jax.lax.pmean(z.mean(0), "data"))
        return deq_fixed_point(local, gain, x, solver=solver)

    def total(gain, x):
        z = over_batch(solve, (P(), P("data")), P("data"))(gain, x)
        return (z * weights).sum(), z

    gradients, z = jax.grad(total, argnums=(0, 1), has_aux=True)(jnp.float64(0.5), x)
    whole = centred(lambda z: z.mean(0))
    expected_z = newton_equilibrium(lambda z: whole(0.5, z, x), jnp.zeros_like(x))
    expected = implicit_gradient(
        lambda inputs, z: whole(inputs[0], z, inputs[1]), (jnp.float64(0.5), x), expected_z, weights
    )
    # A sample that has stopped stands still while what the others add to the mean still moves.
    assert relative_error(z, expected_z) < 1e-10
    assert relative_error(gradients, expected) < 1e-9


@pytest.mark.parametrize(
    "policy", [Phantom(3), Unrolled()], ids=lambda policy: type(policy).__name__
)
@pytest.mark.slow
def test_shard_map_of_policies_that_differentiate_an_f_that_communicates(policy):
    params, x, weights = normal(3, 3) * 0.3, normal(8, 3), normal(8, 3, seed=2)
    x = x * jnp.linspace(0.01, 3, 8)[:, None]

    def total(params, x, weights, mean):
        f = lambda params, z, x: jnp.tanh((z - 0.5 * mean(z)) @ params + x)  # noqa: E731
        z = deq_fixed_point(f, params, x, solver=SOLVERS["picard"], gradient=policy)
        return jnp.vdot(weights, z)

    across = functools.partial(total, mean=lambda z: jax.lax.pmean(z.mean(0), "data"))
    specs = (P(), P("data"), P("data")), (P(), P("data"))
    got = over_batch(jax.grad(across, (0, 1)), *specs)(params, x, weights)
    whole = functools.partial(total, mean=lambda z: z.mean(0))
    expected = jax.jit(jax.grad(whole, (0, 1)))(params, x, weights)
    assert relative_error(got, expected) < 1e-9


@pytest.mark.parametrize("backward", [GMRES(tol=1e-13), Picard(tol=1e-13, max_iter=300)], ids=repr)
@pytest.mark.slow
def test_shard_map_second_derivatives_in_reverse_mode(backward):
    params, x, cotangent = make_params(), normal(8, 3), normal(8, 3, seed=2)

    def curvature(params, x, cotangent):
        def loss(x):
            options = {"solver": SOLVERS["picard"], "gradient": Implicit(backward)}
            return jnp.vdot(cotangent, deq_fixed_point(cell, params, x, **options))

        return jnp.sin(jax.grad(loss)(x)).sum()

    specs = (P(), P("data"), P("data")), P()
    sharded = over_batch(lambda *args: jax.lax.psum(curvature(*args), "data"), *specs)
    got = jax.jit(jax.grad(sharded, (0, 1)))(params, x, cotangent)

    def through_a_loop(params, x):
        def loss(x):
            z = jax.lax.fori_loop(0, 200, lambda _, z: cell(params, z, x), jnp.zeros_like(x))
            return jnp.vdot(cotangent, z)

        return jnp.sin(jax.grad(loss)(x)).sum()

    expected = jax.jit(jax.grad(through_a_loop, (0, 1)))(params, x)
    assert relative_error(got, expected) < 1e-9


STAY = Picard(tol=0.0, max_iter=1)  # returns its start
POLICIES = {
    "Picard": (STAY, Implicit(Picard(tol=1e-12, max_iter=300))),
    "Anderson": (STAY, Implicit(Anderson(tol=1e-12, max_iter=100))),
    "Broyden": (STAY, Implicit(Broyden(tol=1e-12))),
    "GMRES": (STAY, Implicit(GMRES(restart=2, tol=1e-12))),
    "BiCGStab": (STAY, Implicit(BiCGStab(tol=1e-12))),
    "NewtonKrylov": (STAY, Implicit(NewtonKrylov(tol=1e-12))),
    "SHINE": (Broyden(tol=1e-4), Implicit(reuse=True, tol=1e-12)),
    "OneStep": (STAY, OneStep()),
    "Neumann": (STAY, Neumann(4, 0.8)),
    "Phantom": (STAY, Phantom(4, 0.8)),
    "Unrolled": (Picard(tol=1e-6, max_iter=40), Unrolled()),
}
ALSO_BY_JIT = ("GMRES", "Phantom", "Unrolled")


def check_policies_on_eight_devices():
    """To be run in a process of its own: eight devices, and what waits for ever can be stopped."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    assert jax.device_count() == 8
    devices = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    # Devices differ by far in how many iterations they need, forwards and backwards.
    params, cotangent = make_params(), normal(16, 3, seed=2)
    x = normal(16, 3) * jnp.logspace(-1, 1, 16)[:, None]
    z = normal(16, 3, seed=3)

    for name, (solver, policy) in POLICIES.items():

        def loss(params, x, z, cotangent, solver=solver, policy=policy):
            value, stats = deq_fixed_point(
                cell, params, x, z, solver=solver, gradient=policy, return_stats=True
            )
            return jnp.vdot(cotangent, value), stats.iterations

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        expected, iterations = gradient(params, x, z, cotangent)
        specs = {"in_specs": (P(), *[P("data")] * 3), "out_specs": ((P(), P("data")), P("data"))}
        local = jax.shard_map(gradient, mesh=devices, **specs)
        got, local_iterations = jax.jit(local)(params, x, z, cotangent)
        assert relative_error(got, expected) < 1e-10, name
        np.testing.assert_array_equal(local_iterations, iterations, err_msg=name)
        if name == "Unrolled":
            assert len(set(np.asarray(iterations).reshape(8, 2).max(1).tolist())) > 3
        if name in ALSO_BY_JIT:
            sharded = jax.device_put((x, z, cotangent), NamedSharding(devices, P("data")))
            replicated = jax.device_put(params, NamedSharding(devices, P()))
            got, _ = gradient(replicated, *sharded)
            assert relative_error(got, expected) < 1e-10, name
        print(name, "agrees")


@pytest.mark.slow
def test_every_policy_on_eight_devices():
    code = "from tests.test_sharding import check_policies_on_eight_devices as c; c()"
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=8"),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    if cache := jax.config.jax_compilation_cache_dir:
        environment["JAX_COMPILATION_CACHE_DIR"] = cache
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("agrees") == len(POLICIES)
