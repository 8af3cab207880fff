"""`Execution(shard_axis=...)` over four virtual devices: one loop a shard."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    Broyden,
    Execution,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell, ResNetCell
from deq_jax.stability import dropout_mask
from tests.reference import implicit_gradient, newton_equilibrium, relative_error
from tests.test_sharding import cell, dense, make_params, normal

SHARDED = Execution(shard_axis="data")
PICARD = Picard(tol=1e-13, max_iter=300)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((4,), ("data",), axis_types=(kind,))


def grid(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto, kind))


def inputs():
    """Shards that need different numbers of iterations."""
    x = normal(8, 3) * jnp.linspace(0.1, 3, 8)[:, None]
    return make_params(), x, normal(8, 3, seed=2)


def on(devices, *arrays):
    """The arrays, sharded on their first axis."""
    return jax.device_put(arrays, NamedSharding(devices, P("data")))


def loss(params, x, cotangent, execution=SHARDED, solver=PICARD, f=cell, **options):
    z = deq_fixed_point(f, params, x, solver=solver, execution=execution, **options)
    return jnp.vdot(cotangent, z)


def test_values_statistics_and_samples():
    params, x, cotangent = inputs()

    @functools.partial(jax.jit, static_argnums=2)
    def run(params, x, execution):
        solver = Anderson(tol=1e-12, trace=True)
        options = {"solver": solver, "return_stats": True, "sample_at": (2, 6)}
        return deq_fixed_point(cell, params, x, execution=execution, **options)

    with jax.set_mesh(mesh()):
        z, stats, samples = run(params, x, SHARDED)
    single_z, single, single_samples = run(params, x, Execution())
    assert relative_error(z, dense(params, x, cotangent)[0]) < 1e-11
    assert relative_error((z, samples), (single_z, single_samples)) < 1e-11
    # Near the tolerance rounding decides, and it depends on the shapes a device works on.
    assert np.abs(stats.iterations - single.iterations).max() <= 1
    assert len(set(np.asarray(stats.iterations).tolist())) > 1
    np.testing.assert_array_equal(stats.status, single.status)
    np.testing.assert_allclose(stats.trace[:4], single.trace[:4], rtol=1e-6)
    assert stats.evaluations == stats.iterations.max()
    per_sample = (z, stats.residual, stats.iterations, stats.status, *samples)
    assert {leaf.sharding.spec[0] for leaf in per_sample} == {"data"}
    assert stats.trace.sharding.spec == P(None, "data")


@pytest.mark.parametrize(
    ("given_by", "jitted"),
    [
        ("context", True),
        ("sharding", True),
        ("sharding", False),
        ("explicit context", True),
        ("explicit context", False),
    ],
)
def test_gradients(given_by, jitted):
    params, x, cotangent = inputs()
    expected = dense(params, x, cotangent)[1]
    gradient = jax.grad(loss, (0, 1))
    gradient = jax.jit(gradient) if jitted else gradient
    devices = mesh(AxisType.Explicit if "explicit" in given_by else AxisType.Auto)
    if "sharding" in given_by:
        got = gradient(params, *on(devices, x, cotangent))
    else:
        with jax.set_mesh(devices):
            got = gradient(params, x, cotangent)
    assert relative_error(jax.device_get(got), expected) < 1e-10
    assert got[1].sharding.is_equivalent_to(NamedSharding(devices, P("data")), 2)


POLICIES = {
    "Implicit": (Anderson(tol=1e-12), Implicit(), True),
    "GMRES": (PICARD, Implicit(GMRES(restart=3, tol=1e-12)), True),
    "SHINE": (Broyden(tol=1e-12), Implicit(reuse=True), True),
    "Newton": (NewtonKrylov(tol=1e-12), Implicit(), True),
    "OneStep": (PICARD, OneStep(), True),
    "Neumann": (PICARD, Neumann(4, 0.8), True),
    "Phantom": (PICARD, Phantom(4, 0.8), False),
    "Unrolled": (Picard(tol=1e-6, max_iter=40), Unrolled(), False),
}


# As arguments in every policy; closed over where a policy treats what f captures its own way.
@pytest.mark.parametrize(
    ("policy", "closes_over"),
    [
        *((policy, False) for policy in POLICIES),
        *((policy, True) for policy in ("Implicit", "Newton", "Neumann", "Phantom", "Unrolled")),
    ],
)
def test_every_policy(policy, closes_over):
    solver, gradient, reports = POLICIES[policy]
    params, x, cotangent = inputs()

    def value(params, x, probe, execution):
        f = (lambda _, z, x: cell(params, z, x)) if closes_over else cell
        z, stats = deq_fixed_point(
            f,
            () if closes_over else params,
            x,
            solver=solver,
            gradient=gradient,
            backward_probe=probe,
            execution=execution,
            return_stats=True,
        )
        return jnp.vdot(cotangent, z), stats

    derivative = jax.jit(jax.grad(value, (0, 1, 2), has_aux=True), static_argnums=3)
    probe = BackwardProbe.zeros(8) if reports else None
    with jax.set_mesh(mesh()):
        (*got, report), stats = derivative(params, x, probe, SHARDED)
    (*expected, single_report), single = derivative(params, x, probe, Execution())
    assert relative_error(got, expected) < 1e-9
    assert abs(stats.evaluations - single.evaluations) <= 1
    if stats.products is not None:
        assert 0 < stats.products <= single.products
    if reports:
        np.testing.assert_array_equal(report.status, single_report.status)
        assert np.abs(report.iterations - single_report.iterations).max() <= 1
        # The most that a shard needed, not their sum.
        counts = np.asarray(report.iterations)
        assert counts.max() <= report.evaluations <= single_report.evaluations + 1


def collectives_in_loops(compiled):
    """Lines of compiled HLO in which devices wait for each other, within the bodies of loops."""
    computations, name = {}, None
    for line in compiled.as_text().splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            name = header[1]
        computations.setdefault(name, []).append(line)
    whiles = re.findall(r"(?:body|condition)=%?([\w.\-]+)", compiled.as_text())
    assert whiles
    pending, seen, found = list(whiles), set(whiles), []
    waits = re.compile(r" (all-|collective-|reduce-scatter)")
    while pending:
        for line in computations[pending.pop()][1:]:
            if waits.search(line.split("metadata=")[0].split("to_apply=")[0]):
                found.append(line.strip()[:120])
            called = set(re.findall(r"%([\w.\-]+)", line)) & computations.keys() - seen
            seen |= called
            pending += called
    return found


@pytest.mark.museum(
    "JAX, sharded batches: a test of the largest residual puts an all-reduce into each iteration "
    "of a sharded batch"
)
@pytest.mark.parametrize("policy", ["Implicit", "GMRES", "Newton", "Phantom"])
def test_no_loop_has_a_collective(policy):
    solver, gradient, _ = POLICIES[policy]
    params, x, cotangent = inputs()
    devices = mesh()
    arguments = (jax.device_put(params, NamedSharding(devices, P())), *on(devices, x, cotangent))
    options = {"solver": solver, "gradient": gradient}

    def compiled(execution):
        function = functools.partial(loss, execution=execution, **options)
        with jax.set_mesh(devices):
            return jax.jit(jax.grad(function, (0, 1))).lower(*arguments).compile()

    sharded = compiled(SHARDED)
    assert "all-reduce" in sharded.as_text()  # the sum of the gradients of params
    assert collectives_in_loops(sharded) == []
    assert collectives_in_loops(compiled(Execution()))


def test_samples_leave_within_their_shard():
    params, x, cotangent = inputs()
    execution = Execution(shard_axis="data", shrink_to=1)
    gradient = jax.jit(jax.grad(functools.partial(loss, execution=execution), (0, 1)))
    with jax.set_mesh(mesh()):
        arguments = (params, *on(mesh(), x, cotangent))
        got = gradient(*arguments)
        assert collectives_in_loops(gradient.lower(*arguments).compile()) == []
    assert relative_error(got, dense(params, x, cotangent)[1]) < 1e-10


def test_other_axes_of_the_mesh_stay_automatic():
    params, x, cotangent = inputs()
    params, x, cotangent = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, 1))), (params, x, cotangent)
    )
    params = jax.tree.map(lambda a: jnp.pad(a, ((0, 1), (0, 0))), params)
    expected = dense(params, x, cotangent)[1]
    devices = grid()
    gradient = jax.jit(jax.grad(loss, (0, 1)))
    columns = jax.device_put(params, NamedSharding(devices, P(None, "model")))
    with jax.set_mesh(devices):
        assert relative_error(gradient(columns, *on(devices, x, cotangent)), expected) < 1e-10

        # Inside a shard_map over the other axis, and over this one, where there is nothing to do.
        specs = {"in_specs": P(), "out_specs": P(), "axis_names": {"model"}}
        by_model = jax.jit(jax.shard_map(gradient, **specs))
        assert relative_error(by_model(params, x, cotangent), expected) < 1e-10
        specs = {"in_specs": (P(), P("data"), P("data")), "out_specs": (P(), P("data"))}
        by_data = jax.jit(jax.shard_map(gradient, **specs))
        assert relative_error(by_data(params, x, cotangent), expected) < 1e-10


def test_transformations():
    params, x, cotangent = inputs()
    models = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
    inputs_of = jnp.stack([x, 0.3 * x])

    @functools.partial(jax.jit, static_argnums=0)
    def run(execution):
        gradient = jax.grad(functools.partial(loss, execution=execution), (0, 1))

        def curvature(params, x):
            return sum(jnp.sin(g).sum() for g in jax.tree.leaves(gradient(params, x, cotangent)))

        def twice(x):
            layer = jax.checkpoint(
                lambda z: deq_fixed_point(cell, params, z, solver=PICARD, execution=execution)
            )
            z, _ = lax.scan(lambda z, _: (layer(z), None), x, length=2)
            return jnp.vdot(cotangent, z)

        return (
            jax.vmap(gradient, (0, None, None))(models, x, cotangent),
            jax.vmap(gradient, (None, 0, None))(params, inputs_of, cotangent),
            jax.grad(curvature, (0, 1))(params, x),
            jax.grad(twice)(x),
        )

    with jax.set_mesh(mesh()):
        got = run(SHARDED)
    for one, expected in zip(got, run(Execution()), strict=True):
        assert relative_error(one, expected) < 1e-9


def test_f_that_communicates():
    _, x, cotangent = inputs()

    def centred(mean):
        return lambda gain, z, x: jnp.tanh(gain * (z - mean(z))) + x

    across = centred(lambda z: lax.pmean(z.mean(0), "data"))
    with jax.set_mesh(mesh()):
        got = jax.grad(loss, (0, 1))(jnp.float64(0.5), x, cotangent, f=across)
    whole = centred(lambda z: z.mean(0))
    z = newton_equilibrium(lambda z: whole(0.5, z, x), jnp.zeros_like(x))
    expected = implicit_gradient(
        lambda inputs, z: whole(inputs[0], z, inputs[1]), (jnp.float64(0.5), x), z, cotangent
    )
    assert relative_error(got, expected) < 1e-9


def test_leaves_of_any_kind():
    params, x, _ = inputs()
    sizes = set()

    def f(params, z, x):
        sizes.add((*x["index"].shape, *x["key"].shape, len(x["x"]), len(z)))
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(x["key"])
        own = jax.random.normal(jax.random.fold_in(params["key"], params["count"]), (3,))
        return cell(params, z, x["x"]) + 0.1 * (noise + own + x["index"][:, None].astype(float) / 8)

    params |= {"key": jax.random.key(1), "count": jnp.int32(2)}
    x = {"x": x, "index": jnp.arange(8), "key": jax.random.split(jax.random.key(0), 8)}
    z0 = jnp.zeros((8, 3))
    with jax.set_mesh(mesh()):
        z = solve_fixed_point(f, params, x, z0, solver=PICARD, execution=SHARDED).value
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(x["key"])
    own = jax.random.normal(jax.random.fold_in(params["key"], 2), (3,))
    added = 0.1 * (noise + own + x["index"][:, None].astype(float) / 8)
    assert relative_error(cell(params, z, x["x"]) + added, z) < 1e-12
    # Seen on a shard, and once with as many samples as there are, to see what it draws for each.
    assert sizes == {(2, 2, 2, 2), (8, 8, 8, 8)}


def test_random_numbers_are_those_of_one_device():
    """Masks for each sample, one mask for all, keys for each sample; from `params` or a closure."""
    params, x, cotangent = inputs()
    key = jax.random.key(3)

    raw = jax.random.key_data(key)

    def f(params, z, x):
        weights, key = params
        own, same, split = jax.random.split(key, 3)
        mask = dropout_mask(own, 0.5, z.shape, dtype=z.dtype)
        mask *= 1 + jax.random.uniform(same, (3,), z.dtype)
        keys = jax.random.split(split, len(z))
        mask *= 1 + jax.vmap(lambda key: jax.random.normal(key, (3,), z.dtype))(keys) / 9
        mask *= 1 + jax.random.gamma(jax.random.wrap_key_data(raw), 2.0, z.shape, z.dtype) / 9
        return cell(weights, z * mask / 4, x)

    def gradient(execution):
        return jax.jit(jax.grad(lambda params: loss((params, key), x, cotangent, execution, f=f)))

    expected = gradient(Execution())(params)
    with jax.set_mesh(mesh()):
        assert relative_error(gradient(SHARDED)(params), expected) < 1e-12
    with jax.set_mesh(grid()):
        both = Execution(shard_axis=("data", "model"))
        assert relative_error(gradient(both)(params), expected) < 1e-12


def test_random_numbers_that_a_shard_cannot_draw():
    params, x, cotangent = inputs()
    key = jax.random.key(3)

    def in_a_loop(params, z, x):
        z, _ = lax.scan(lambda z, k: (z * jax.random.uniform(k, z.shape), None), z, key[None])
        return cell(params, z, x)

    def for_each(params, z, x):
        noise = [jax.random.normal(jax.random.fold_in(key, i), 3) for i in range(len(z))]
        return cell(params, z, x + jnp.stack(noise))

    with jax.set_mesh(mesh()):
        with pytest.raises(ValueError, match="numbers for each sample inside of a scan"):
            loss(params, x, cotangent, f=in_a_loop)
        with pytest.raises(ValueError, match=r"for a shard and .* for the whole batch"):
            loss(params, x, cotangent, f=for_each)


@pytest.mark.usefixtures("standard_promotion")
def test_layers_drop_out_the_entries_that_they_do_on_one_device():
    images = jnp.float32(normal(8, 4, 4, 4))

    def build(execution):
        cell = ResNetCell(4, 4, groups=2, kernel_std=0.1, dropout=0.5, rngs=nnx.Rngs(0, dropout=1))
        layer = deq_jax.nnx.DEQ(cell, solver=Picard(tol=1e-6), execution=execution)
        layer.train()
        return layer

    with jax.set_mesh(mesh()):
        got = build(SHARDED)(images)
    assert relative_error(got, build(Execution())(images)) < 1e-5


def test_batch_over_two_axes():
    params, x, cotangent = inputs()
    expected = dense(params, x, cotangent)[1]
    execution = Execution(shard_axis=("data", "model"))
    devices = grid()
    over_both = NamedSharding(devices, P(("data", "model")))
    gradient = jax.jit(jax.grad(functools.partial(loss, execution=execution), (0, 1)))
    arguments = params, *jax.device_put((x, cotangent), over_both)
    with jax.set_mesh(devices):
        assert relative_error(gradient(*arguments), expected) < 1e-10
        assert collectives_in_loops(gradient.lower(*arguments).compile()) == []
        solve = jax.jit(lambda params, x: solve_fixed_point(cell, params, x, execution=execution))
        solution = solve(*arguments[:2])
        assert solution.value.sharding.is_equivalent_to(over_both, 2)
        # One axis is named, but both shard the batch.
        with pytest.warns(UserWarning, match=r"Write shard_axis=\('data', 'model'\)"):
            loss(*arguments, execution=SHARDED)


def test_samples_leave_on_a_mesh_with_another_axis():
    params, x, cotangent = inputs()
    execution = Execution(shard_axis="data", shrink_to=1)
    with jax.set_mesh(grid()):
        gradient = jax.jit(jax.grad(functools.partial(loss, execution=execution), (0, 1)))
        got = gradient(params, x, cotangent)
    assert relative_error(got, dense(params, x, cotangent)[1]) < 1e-10


def test_gradients_of_weights_are_summed_in_their_own_dtype():
    """256 + 1 + 1 + 1 is 256 in bfloat16."""
    x, y = jnp.ones((4, 1), jnp.float32), jnp.asarray([[256], [1], [1], [1]], jnp.float32)
    execution = Execution(shard_axis="data", cell_dtype=jnp.bfloat16)

    def total(gain):
        f = lambda gain, z, x: gain * x  # noqa: E731
        return jnp.vdot(y, deq_fixed_point(f, gain, x, gradient=OneStep(), execution=execution))

    with jax.set_mesh(mesh()):
        assert jax.jit(jax.grad(total))(jnp.float32(2)) == 259


def test_second_eager_call_does_not_trace_again():
    params, x, cotangent = inputs()
    traces = []

    def counted(params, z, x):
        traces.append(None)
        return cell(params, z, x)

    with jax.set_mesh(mesh()):
        for gradient in (loss, jax.grad(loss)):
            gradient(params, x, cotangent, f=counted)
            before = len(traces)
            gradient(params, x, cotangent, f=counted)
            # Inside a transformation f is looked at for closures, each time anew.
            assert len(traces) - before <= (0 if gradient is loss else 2)


def test_layers_are_those_without_shards():
    x = normal(8, 4).astype(jnp.float32)
    model = FeedForwardCell(4, 4, rngs=nnx.Rngs(0))

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, z, x):
            return nn.tanh(nn.Dense(4, kernel_init=nn.initializers.normal(0.1))(z) + x)

    def by_nnx(model, execution):
        layer = deq_jax.nnx.DEQ(model, solver=Picard(tol=1e-6), execution=execution)
        return (layer(x) ** 2).sum()

    def by_linen(variables, execution):
        layer = deq_jax.linen.DEQ(Cell(), solver=Picard(tol=1e-6), execution=execution)
        return (layer.apply(variables, x) ** 2).sum()

    variables = deq_jax.linen.DEQ(Cell()).init(jax.random.key(0), x)
    for gradient, values in ((nnx.grad(by_nnx), model), (jax.grad(by_linen), variables)):
        with jax.set_mesh(mesh()):
            got = gradient(values, SHARDED)
        assert relative_error(nnx.as_pure(got), nnx.as_pure(gradient(values, Execution()))) < 1e-5


def test_errors():
    params, x, cotangent = inputs()
    with pytest.raises(ValueError, match=r"shard_axis='data' is no axis .* jax.set_mesh\(mesh\)"):
        loss(params, x, cotangent)
    with jax.set_mesh(mesh()):
        with pytest.raises(ValueError, match=r"shard_axis='rows' is no axis .*\('data',\)"):
            loss(params, x, cotangent, Execution(shard_axis="rows"))
        with pytest.raises(
            ValueError, match="4 shards, which must divide the batch, got a batch of 6"
        ):
            loss(params, x[:6], cotangent[:6])
        with pytest.raises(ValueError, match="does not go with batched=False"):
            loss(params, x, cotangent, batched=False)
        with pytest.raises(ValueError, match=r"leaf \['gain'\]: got shape \(\), .*params"):
            loss(
                params, {"x": x, "gain": 1.0}, cotangent, z0=x, f=lambda p, z, x: cell(p, z, x["x"])
            )
        with pytest.raises(ValueError, match="f must return the shapes of z"):
            loss(params, x, cotangent, f=lambda p, z, x: z[:, :1])
        with pytest.raises(TypeError, match="forward-mode"):
            jax.jvp(lambda x: loss(params, x, cotangent), (x,), (x,))
    with (
        jax.set_mesh(grid(AxisType.Explicit)),
        pytest.raises(ValueError, match=r"\['model'\] are AxisType.Explicit"),
    ):
        loss(params, x, cotangent)
    with pytest.raises(
        TypeError, match=r"Execution\.shard_axis must be the name of a mesh axis or .*, got 0"
    ):
        Execution(shard_axis=0)
