"""`Control`, aux and step numbers over four devices, in every way a batch can be sharded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, Control, Execution, Implicit, Picard, Truncated, deq_fixed_point

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

W = np.random.default_rng(0).normal(size=(3, 3)) / 3
X = np.random.default_rng(1).normal(size=(8, 3)) * np.linspace(0.1, 2, 8)[:, None]
WEIGHTS = np.array([1.0, 2.0, 0.5])


def f(w, z, x, step):
    """Scaled by the number of the evaluation, in ever smaller steps."""
    fz = jnp.tanh(z @ w + x) * (1 - 0.01 / (step[:, None].astype(z.dtype) + 1) ** 4)
    return fz, {"norm": jnp.sum(fz**2, 1)}


def solve(w, x, weights, *, execution=Execution(), gradient=Implicit(), **options):  # noqa: B008
    control = Control(
        norm=lambda z: jnp.sqrt(jnp.sum(weights * z**2, 1)),
        stop=lambda z, fz, aux: aux["norm"] < 0.02,
        budget=np.int32(30),
        **options,
    )
    return deq_fixed_point(
        f, w, x, solver=Anderson(tol=1e-9, max_iter=40), gradient=gradient, has_aux=True,
        pass_step=True, return_stats=True, control=control, execution=execution,
    )  # fmt: skip


def loss(w, x, weights, **options):
    z, stats, aux = solve(w, x, weights, **options)
    return jnp.sum(z**3) + jnp.sum(aux["norm"] ** 2), (z, stats.iterations, stats.step, aux)


def gradient(**options):
    return jax.jit(jax.value_and_grad(functools.partial(loss, **options), has_aux=True))


@functools.cache
def single():
    return gradient()(W, X, WEIGHTS)


def check(got):
    jax.tree.map(
        lambda got, wanted: np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12),
        got,
        single(),
    )


def test_stops_differ_between_samples():
    (_, (_, iterations, _, _)), _ = single()
    assert len(set(iterations.tolist())) > 2
    assert iterations.min() == 1  # by the user's own test


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_sharded_batch(kind, every):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        check(gradient(execution=Execution(check_every=every))(W, x, WEIGHTS))


def test_one_loop_a_shard():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, P("data")))
        check(gradient(execution=Execution(shard_axis="data"))(W, x, WEIGHTS))


@pytest.mark.parametrize("gradient", [Implicit(), Truncated(3)])
def test_inside_shard_map(gradient):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    truncated = isinstance(gradient, Truncated)
    solver = Picard(tol=0.0, max_iter=9) if truncated else Anderson(tol=1e-9)

    def whole(w, x):
        options = {"solver": solver, "gradient": gradient, "pass_step": True, "has_aux": True}
        z, aux = deq_fixed_point(f, w, x, control=Control(norm="max"), **options)
        return jnp.sum(z**3) + jnp.sum(aux["norm"] ** 2)

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    def mapped(w, x):
        return jax.lax.psum(whole(w, x), "data")

    got = jax.jit(jax.value_and_grad(mapped))(W, X)
    expected = jax.jit(jax.value_and_grad(whole))(W, X)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_under_vmap():
    """Two batches with weights of their own."""
    weights = np.stack([WEIGHTS, WEIGHTS[::-1]])
    got = jax.jit(jax.vmap(jax.grad(loss, has_aux=True), (None, None, 0)))(W, X, weights)
    one = jax.jit(jax.grad(loss, has_aux=True))
    for i in range(2):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(one(W, X, weights[i])), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-9, atol=1e-12)


def test_a_fold_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    fold = (lambda total, z, fz, aux: total + jnp.sum(fz**2), 0.0)
    options = {"solver": Picard(tol=0.0, max_iter=5), "return_stats": True}

    def run(x):
        cell = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
        return deq_fixed_point(cell, W, x, control=Control(fold=fold), **options)[1].fold

    with jax.set_mesh(mesh):
        got = jax.jit(run)(jax.device_put(X, NamedSharding(mesh, P("data"))))
    np.testing.assert_allclose(got, jax.jit(run)(X), rtol=1e-12)
    with pytest.raises(ValueError, match=r"does not go with Control\(fold=\.\.\.\)"):
        solve(W, X, WEIGHTS, fold=fold, execution=Execution(shard_axis="data"))
