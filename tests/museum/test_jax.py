"""Traps of JAX itself (0.10.2) that a fixed-point layer can fall into."""

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
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
)
from tests.museum.catalogue import defect
from tests.museum.problems import (
    normal,
    tanh_adjoint,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


def layer(w, x, **options):
    return deq_fixed_point(tanh_cell, w, x, **{"solver": TIGHT, **options})


def unrolled(w, x, steps=150):
    return jax.lax.scan(lambda z, _: (tanh_cell(w, z, x), None), 0 * x, length=steps)[0]


@defect(
    "JAX, custom_vjp",
    "a custom_vjp that closes over a tracer under differentiation: UnexpectedTracerError",
    we="a closure over what a scan carries and differentiates works as in an unrolled loop",
)
@pytest.mark.usefixtures("x64")
def test_a_closure_inside_a_scan():
    def total(solve, w, x):
        def advance(h, _):
            h = solve(lambda _, z, __: tanh_cell(w, z, x + 0.5 * h))
            return h, None

        return jnp.vdot(Y, jax.lax.scan(advance, 0 * x, length=3)[0])

    def ours(f):
        return deq_fixed_point(f, None, None, jnp.zeros((3, 4)), solver=TIGHT)

    def plain(f):
        return jax.lax.scan(lambda z, _: (f(0, z, 0), None), jnp.zeros((3, 4)), length=150)[0]

    got, expected = (
        jax.jit(jax.grad(lambda w, x, solve=solve: total(solve, w, x), (0, 1)))(W, X)
        for solve in (ours, plain)
    )
    assert relative_error(got, expected) < 1e-10


@defect(
    "JAX, custom_vjp",
    "custom_vjp blocks jvp, and with it forward over reverse",
    we="forward over reverse gives the Hessian of an unrolled loop",
)
@pytest.mark.usefixtures("x64")
def test_mixed_modes():
    def hessian(solve, outer, inner):
        loss = lambda x: jnp.sum(solve(W[:2, :2], x[None]) ** 3)  # noqa: E731
        return jax.jit(outer(inner(loss)))(jnp.asarray(X[0, :2]))

    expected = hessian(unrolled, jax.jacrev, jax.jacrev)
    mixed = hessian(layer, jax.jacfwd, jax.jacrev)
    np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-10)


@defect(
    "JAX, custom_vjp",
    "a backward pass that nests a custom_vjp over a closure: reverse over reverse fails",
    we="a gradient of a gradient through a closure, with a probe",
)
@pytest.mark.usefixtures("x64")
def test_reverse_over_reverse_of_a_closure():
    def ours(w, x):
        f = lambda _, z, x: tanh_cell(w, z, x)  # noqa: E731
        probe = BackwardProbe.zeros(3)  # which makes the rule a custom_vjp
        return deq_fixed_point(f, None, x, solver=TIGHT, backward_probe=probe)

    def second(solve):
        first = jax.grad(lambda w, x: jnp.vdot(Y, solve(w, x)), (0, 1))
        size = lambda w, x: sum(jnp.sum(jnp.sin(g)) for g in first(w, x))  # noqa: E731
        return jax.jit(jax.grad(size, (0, 1)))(W, X)

    assert relative_error(second(ours), second(unrolled)) < 1e-9


@defect(
    "JAX, while_loop",
    "a while_loop cannot be differentiated in reverse",
    we="Unrolled runs the same steps in a loop that can: the gradient of a Python loop of as many",
)
@pytest.mark.usefixtures("x64")
def test_reverse_mode_through_the_steps():
    def loss(w):
        return jnp.vdot(Y, layer(w, X, solver=Picard(tol=0.0, max_iter=5), gradient=Unrolled()))

    def by_hand(w):
        z = jnp.zeros((3, 4))
        for _ in range(4):
            z = tanh_cell(w, z, X)
        return jnp.vdot(Y, z)

    assert relative_error(jax.jit(jax.grad(loss))(W), jax.jit(jax.grad(by_hand))(W)) < 1e-13


@defect(
    "JAX, vmap of while_loop (jax#2586, #20628)",
    "a vmapped loop runs every lane to the slowest one",
    we="a finished lane keeps its state, count and trace",
)
@pytest.mark.usefixtures("x64")
def test_finished_lanes_are_left_alone():
    solver = Anderson(tol=1e-6, trace=True)
    gains, x = np.array([0.1, 0.3, 0.9]), normal(6, seed=1)

    def f(gain, z, x):
        return jnp.tanh(gain * jnp.roll(z, 1)) + x

    def solve(gain):
        options = {"solver": solver, "batched": False, "return_stats": True}
        return deq_fixed_point(f, gain, x, **options)

    z, stats = jax.vmap(solve)(gains)
    assert len(set(stats.iterations.tolist())) == 3
    for i, gain in enumerate(gains):
        alone, alone_stats = solve(gain)
        np.testing.assert_allclose(z[i], alone, rtol=0, atol=1e-14)
        assert stats.iterations[i] == alone_stats.iterations
        assert stats.evaluations[i] == alone_stats.evaluations
        np.testing.assert_array_equal(np.isnan(stats.trace[i]), np.isnan(alone_stats.trace))


@defect(
    "JAX, carry dtypes",
    "a bfloat16 state with float32 parameters: an error about the loop's carry",
    we="a ValueError that names the leaf and both dtypes and says what to do; the cast then works",
)
def test_dtypes_of_the_carry():
    w, x = jnp.float32(W), jnp.float32(X)
    z0 = jnp.zeros((3, 4), jnp.bfloat16)

    def mixed(w, z, x):
        return jnp.tanh(z.astype(jnp.float32) @ w + x)

    with pytest.raises(ValueError, match="got float32, expected bfloat16; cast what f returns"):
        deq_fixed_point(mixed, w, x, z0)
    cast = lambda *args: mixed(*args).astype(jnp.bfloat16)  # noqa: E731
    z, gradient = jax.jit(
        jax.value_and_grad(
            lambda w: deq_fixed_point(cast, w, x, z0, solver=Picard(tol=1e-2)).astype(w.dtype).sum()
        )
    )(w)
    expected_z, (expected, _) = tanh_gradients(w, x, np.ones((3, 4)))
    assert gradient.dtype == jnp.float32
    np.testing.assert_allclose(z, expected_z.sum(), atol=0.1)
    assert relative_error(gradient, expected) < 0.05


@defect(
    "JAX, carry dtypes",
    "a weakly typed start makes a carry of another type than what the body returns",
    we="weak types are taken: a Python number is a state",
)
def test_weakly_typed_starts():
    def f(_, z, x):
        return jnp.cos(z)

    def solve(start):
        return deq_fixed_point(f, None, None, start, batched=False, solver=Anderson(tol=1e-6))

    for start in (0.5, jnp.asarray(0.5), np.float32(0.5)):
        z = solve(start)
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(z, 0.7390851332151607, rtol=1e-5)


def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


@defect(
    "JAX, shard_map (diffrax#735, #738)",
    "with its checks on, shard_map refuses carries made by jnp.zeros",
    we="carries are made from data: values and gradients under shard_map, started from zeros",
)
@pytest.mark.usefixtures("x64")
def test_shard_map_with_its_checks():
    solver = Anderson(tol=1e-12)
    x, y = normal(4, 4, seed=1), normal(4, 4, seed=2)

    def local(w, x, y):
        f = lambda w, x: jnp.vdot(  # noqa: E731
            y, deq_fixed_point(tanh_cell, w, x, jnp.zeros((1, 4)), solver=solver)
        )
        return jax.grad(f, (0, 1))(w, x)

    specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
    gradients = jax.jit(jax.shard_map(local, mesh=mesh(), **specs))(W, x, y)
    assert relative_error(gradients, tanh_gradients(W, x, y)[1]) < 1e-10


@defect(
    "JAX, sharded batches",
    "a test of the largest residual puts an all-reduce into each iteration of a sharded batch",
    we="sharded over the batch, jit gives the gradients of one device; under shard_map every "
    "device stops by itself",
)
@pytest.mark.usefixtures("x64")
def test_sharded_batches():
    x, y = normal(4, 4, seed=1), normal(4, 4, seed=2)
    sharded = jax.device_put((x, y), NamedSharding(mesh(), P("data")))
    gradient = jax.jit(jax.grad(lambda w, x, y: jnp.vdot(y, layer(w, x)), (0, 1)))
    w_bar, x_bar = gradient(W, *sharded)
    assert x_bar.sharding.is_equivalent_to(NamedSharding(mesh(), P("data")), 2)
    assert relative_error((w_bar, x_bar), tanh_gradients(W, x, y)[1]) < 1e-11

    def evaluations(gain):
        f = lambda gain, z, x: jnp.tanh(gain * z) + x  # noqa: E731
        return deq_fixed_point(f, gain, jnp.ones((1, 2)), return_stats=True)[1].evaluations[None]

    specs = {"in_specs": P("data"), "out_specs": P("data")}
    local = jax.shard_map(evaluations, mesh=mesh(), **specs)
    text = jax.jit(local).lower(np.ones(4)).as_text()
    assert "all_reduce" not in text
    assert len(set(jax.jit(local)(np.array([0.01, 0.3, 0.9, 1.0])).tolist())) > 1


@defect(
    "JAX, retracing",
    "a lambda made anew at every call is traced and compiled anew: 230 to 340 ms each",
    we="inside jit, or with a stable f, the second call traces nothing",
)
def test_the_second_call_traces_nothing():
    traces, w, x = [], np.float32(W), np.float32(X)

    def counted(w, z, x):
        traces.append(None)
        return tanh_cell(w, z, x)

    def fresh(w, x):
        return deq_fixed_point(lambda *args: counted(*args), w, x, solver=Picard())

    step = jax.jit(jax.grad(lambda w, x: fresh(w, x).sum()))
    step(w, x)
    before = len(traces)
    second = step(2 * w, x)
    assert len(traces) == before
    assert relative_error(second, tanh_gradients(2 * w, x, np.ones_like(x))[1][0]) < 1e-2
    deq_fixed_point(counted, w, x, solver=Picard())
    before = len(traces)  # not cleared: f holds the list, and would be traced anew
    np.testing.assert_allclose(
        deq_fixed_point(counted, -w, x, solver=Picard()), tanh_solution(-w, x), atol=1e-3
    )
    assert len(traces) == before


@defect(
    "JAX, custom_vjp",
    "a failure in the backward pass has nowhere to go",
    we="it leaves as the cotangent of a dummy input, under jit and vmap, without a callback",
)
@pytest.mark.usefixtures("x64")
def test_the_backward_report_under_vmap():
    w, x, y = normal(2, 4, 4, scale=0.3), normal(2, 3, 4, seed=1), normal(2, 3, 4, seed=2)
    policy = Implicit(Picard(tol=1e-4), max_iter=7)

    def loss(probe, w, x, y):
        return jnp.vdot(y, layer(w, x, gradient=policy, backward_probe=probe))

    probes = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), BackwardProbe.zeros(3))
    report = jax.jit(jax.vmap(jax.grad(loss)))(probes, w, x, y)
    for i in range(2):
        z = tanh_solution(w[i], x[i])
        u = y[i]
        residuals = []
        for _ in range(7):
            image = ((1 - z**2) * u) @ w[i].T + y[i]
            residuals.append(np.linalg.norm(image - u, axis=1) / np.linalg.norm(y[i], axis=1))
            u = image
        stops = [int(np.argmax([r[j] <= 1e-4 for r in residuals])) for j in range(3)]
        stops = [k if residuals[k][j] <= 1e-4 else 6 for j, k in enumerate(stops)]
        expected = [residuals[k][j] for j, k in enumerate(stops)]
        np.testing.assert_allclose(report.residual[i], expected, rtol=1e-4)
        np.testing.assert_array_equal(report.iterations[i], np.array(stops) + 1)
        np.testing.assert_array_equal(
            report.status[i] == Status.CONVERGED, report.residual[i] <= 1e-4
        )


@defect(
    "JAX, symbolic zeros",
    "the backward solve ran although only statistics, or nothing, depended on the parameters",
    we="no cotangent, no solve: the compiled gradient has the forward loop alone",
)
def test_no_backward_solve_for_nothing():
    w, x = np.float32(W), np.float32(X)

    def loops(loss):
        both = jax.jit(jax.value_and_grad(loss, (0, 1)))
        return both.lower(w, BackwardProbe.zeros(3)).as_text().count("stablehlo.while")

    def run(w, probe):
        return deq_fixed_point(
            tanh_cell, w, x, solver=Picard(), return_stats=True, backward_probe=probe
        )

    assert loops(lambda w, probe: run(w, probe)[0].sum()) == 2
    assert loops(lambda w, probe: run(w, probe)[1].residual.sum() + w.sum()) == 1
    fixed = lambda v, probe: (v * run(w, None)[0][0]).sum()  # noqa: E731
    assert loops(fixed) == 1


@defect(
    "jax.scipy.sparse.linalg (jax#15837, #6490, #4322)",
    "gmres takes the batch for one vector, and its report tells nothing but NaN",
    we="each sample has its own Krylov space, count, residual and status",
)
@pytest.mark.parametrize("kind", [GMRES, BiCGStab])
@pytest.mark.usefixtures("x64")
def test_krylov_methods_work_by_the_sample(kind):
    gains = np.array([[0.5] * 6, np.linspace(-0.9, 0.99, 6)])  # one and six dimensions needed
    y = normal(2, 6, seed=2)

    def adjoint(gains, y, **options):
        f = lambda gains, z, x: gains * z + x  # noqa: E731
        return solve_adjoint(f, gains, y, y, y, solver=kind(tol=1e-10, **options))

    u, stats = jax.jit(adjoint)(gains, y)
    np.testing.assert_allclose(u, y / (1 - gains), rtol=1e-7)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert stats.iterations[0] <= 3  # one direction, and the check
    assert 7 <= stats.iterations[1] <= 20
    u, stats = jax.jit(lambda *args: adjoint(*args, max_iter=5))(gains, y)
    np.testing.assert_array_equal(stats.status, [Status.CONVERGED, Status.MAX_ITER])
    residual = np.linalg.norm(gains * u + y - u, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-6, atol=1e-14)


@defect(
    "jax.scipy.sparse.linalg",
    "batched gmres cannot stop inside a restart: 23 products where 6 do",
    we="a cycle ends at the product that reaches the tolerance",
)
@pytest.mark.usefixtures("x64")
def test_gmres_stops_inside_a_restart():
    z = tanh_solution(W, X)
    adjoint = jax.jit(lambda z, y: solve_adjoint(tanh_cell, W, X, z, y, solver=GMRES(tol=1e-9)))
    u, stats = adjoint(z, Y)
    assert stats.evaluations <= 5  # four dimensions, and the check
    np.testing.assert_allclose(u, tanh_adjoint(W, z, Y), rtol=0, atol=1e-8)


@defect(
    "JAX, custom_root (jax#24295)",
    "integer auxiliary output of a solve under differentiation: TypeError about float0",
    we="statistics, integers among them, come out of jvp with float0 tangents",
)
@pytest.mark.usefixtures("x64")
def test_integer_statistics_under_differentiation():
    def solve(w):
        return layer(w, X, return_stats=True, solver=NewtonKrylov(tol=1e-12))

    tangent = normal(4, 4, seed=5)
    (z, stats), (dz, dstats) = jax.jit(lambda w: jax.jvp(solve, (w,), (tangent,)))(W)
    expected = [tanh_solution(W + h * tangent, X) for h in (1e-6, -1e-6)]
    np.testing.assert_allclose(dz, (expected[0] - expected[1]) / 2e-6, rtol=0, atol=1e-8)
    np.testing.assert_allclose(z, tanh_solution(W, X), rtol=0, atol=1e-11)
    assert stats.products.dtype == jnp.int32
    assert dstats.products.dtype == jax.dtypes.float0
    np.testing.assert_array_equal(dstats.residual, 0)


@defect(
    "JAX, custom_root (jax#10929)",
    "a leaf of the state that no differentiated input reaches: a bare AssertionError",
    we="such a leaf has no gradient, and the others theirs, forward and in reverse",
)
@pytest.mark.usefixtures("x64")
def test_a_leaf_without_a_gradient():
    def solve(w):
        f = lambda w, z, x: {"moves": tanh_cell(w, z["moves"], x), "rests": 0.5 * z["rests"] + 1}  # noqa: E731
        z0 = {"moves": jnp.zeros((3, 4)), "rests": jnp.zeros((3, 2))}
        return deq_fixed_point(f, w, X, z0, solver=TIGHT)

    def total(w):
        z = solve(w)
        return jnp.vdot(Y, z["moves"]) + z["rests"].sum()

    tangent = normal(4, 4, seed=5)
    exact = tanh_gradients(W, X, Y)[1][0]
    assert relative_error(jax.jit(jax.grad(total))(W), exact) < 1e-11
    _, moved = jax.jit(lambda w: jax.jvp(solve, (w,), (tangent,)))(W)
    np.testing.assert_allclose(jnp.vdot(Y, moved["moves"]), np.vdot(exact, tangent), rtol=1e-10)
    np.testing.assert_array_equal(moved["rests"], 0)


@defect(
    "JAX, closure_convert (jax#14760)",
    "random keys that a function closes over could not be hoisted out of it",
    we="keys and integers may be closed over, traced ones too",
)
@pytest.mark.usefixtures("x64")
def test_keys_that_are_closed_over():
    key = jax.random.key(3)

    def loss(w, key, order):
        def f(w, z, x):
            return tanh_cell(w, z, x + jax.random.normal(key, x.shape))[:, order]

        return jnp.vdot(Y, deq_fixed_point(f, w, X, solver=TIGHT))

    order = jnp.arange(4)
    got = jax.jit(jax.grad(loss))(W, key, order)
    noisy = X + np.asarray(jax.random.normal(key, X.shape))
    assert relative_error(got, tanh_gradients(W, noisy, Y)[1][0]) < 1e-11
