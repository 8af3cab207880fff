"""Flax layers where they are used: on shards, in scans, checkpoints, accumulation and pipelines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import BackwardProbe, Execution, Implicit, Picard, Unrolled, deq_fixed_point
from deq_jax.accumulation import accumulate_gradients
from deq_jax.sharding import call_on_shards, find_mesh
from experiments.studies.collectives import program
from tests import reference

F64 = {"param_dtype": jnp.float64}
SOLVER = Picard(tol=1e-15, max_iter=150)
SHARDED = Execution(shard_axis="data")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("x64", "standard_promotion"),
    pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning"),
]


def relative_error(got, expected):
    """The largest of any leaf: random keys are large numbers, and gradients may be small ones."""
    errors = jax.tree.map(
        lambda a, b: reference.relative_error(a, b) if np.any(b) else np.abs(a).max(),
        jax.device_get(got),
        jax.device_get(expected),
    )
    return max(jax.tree.leaves(errors))


def mesh(*shape, names=("data", "model"), kind=AxisType.Auto):
    shape = shape or (4,)
    return jax.make_mesh(shape, names[: len(shape)], axis_types=(kind,) * len(shape))


def normal(*shape, seed=0, scale=1.0):
    return scale * jnp.asarray(np.random.default_rng(seed).normal(size=shape))


class Cell(nnx.Module):
    """With a batch norm, a dropout, a maximum and, if it `sows`, values sown.

    With 2 features and 2 samples a shard no shape tells what is a sample and what a statistic.
    """

    def __init__(self, axis_name=None, dropout=0.0, sows=False, rngs=None):
        rngs = rngs or nnx.Rngs(0, dropout=1)
        self.norm = nnx.BatchNorm(2, momentum=0.9, axis_name=axis_name, **F64, rngs=rngs)
        self.norm.mean = nnx.BatchStat(0.3 * jnp.ones(2))
        self.norm.var = nnx.BatchStat(jnp.ones(2))
        self.linear = nnx.Linear(2, 2, **F64, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.most = nnx.BatchStat(jnp.int32(0))
        self.sows = sows

    def __call__(self, z, x):
        z = self.dropout(self.norm(z))
        most = jnp.int32(100 * jnp.abs(z).max())
        self.most.set_value(jnp.maximum(self.most.get_value(), most))
        if self.sows:
            self.sow(nnx.Intermediate, "activation", z)
            self.sow(nnx.Intermediate, "mean", z.mean(0))
            self.sow(nnx.Intermediate, "layers", jnp.stack([z, 2 * z]))
        return jnp.tanh(0.3 * self.linear(z) + x)


class LinenCell(nn.Module):
    axis_name: str | None = None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, z, x):
        norm = nn.BatchNorm(False, momentum=0.9, axis_name=self.axis_name, **F64)
        z = nn.Dropout(self.dropout, deterministic=False)(norm(z))
        self.sow("intermediates", "activation", z)
        self.sow("intermediates", "mean", z.mean(0))
        return jnp.tanh(0.3 * nn.Dense(z.shape[-1], **F64)(z) + x)


SowingCell = functools.partial(Cell, sows=True)


def nnx_gradient(cell, execution):
    """A function of x: value and gradients of a loss, and all state of the layer behind it."""
    layer = deq_jax.nnx.DEQ(cell, solver=SOLVER, execution=execution)
    definition, params, rest = nnx.split(layer, nnx.Param, ...)

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x, cotangent):
        layer = nnx.merge(definition, params, rest, copy=True)
        z = layer(x)
        state = nnx.to_pure_dict(nnx.state(layer, nnx.Not(nnx.Param)))
        return (cotangent * z).sum(), (z, jax.tree.map(raw, state))

    return functools.partial(jax.jit(loss), params)


def raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def linen_gradient(cell, execution):
    layer = deq_jax.linen.DEQ(cell, solver=SOLVER, execution=execution)
    variables = layer.init({"params": jax.random.key(0), "dropout": jax.random.key(2)}, inputs()[0])

    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, x, cotangent):
        rngs = {"dropout": jax.random.key(1)}
        changed = ["batch_stats", "intermediates"]
        both = {**variables, "params": params}
        z, written = layer.apply(both, x, mutable=changed, rngs=rngs)
        return (cotangent * z).sum(), (z, {name: written[name]["cell"] for name in changed})

    return functools.partial(jax.jit(loss), variables["params"])


def inputs():
    """Samples and cotangents of different sizes, so that a shard's mean is not that of all."""
    x, cotangent = normal(8, 2), normal(8, 2, seed=2)
    return x * jnp.linspace(0.2, 2, 8)[:, None], cotangent * jnp.linspace(1, 0, 8)[:, None]


def sharded(devices, *arrays):
    return jax.device_put(arrays, NamedSharding(devices, P("data")))


@pytest.mark.parametrize(
    ("flax", "kind"), [("nnx", AxisType.Explicit), ("linen", AxisType.Auto)], ids=["nnx", "linen"]
)
def test_batch_norm_over_shards_is_that_of_the_whole_batch(flax, kind):
    """With a dropout, whose mask in the last call is that of the solve."""
    gradient, cell = (nnx_gradient, SowingCell) if flax == "nnx" else (linen_gradient, LinenCell)
    expected = gradient(cell(dropout=0.5), Execution())(*inputs())
    devices = mesh(kind=kind)
    with jax.set_mesh(devices):
        got = gradient(cell("data", dropout=0.5), SHARDED)(*sharded(devices, *inputs()))
    assert relative_error(got, expected) < 1e-12
    activation = got[0][1][1]["cell" if flax == "nnx" else "intermediates"]["activation"]
    assert activation[0].sharding.spec[0] == "data"


class LinenDropped(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        dropped = nn.Dropout(0.5, deterministic=False)(z)
        self.sow("intermediates", "kept", dropped != 0)
        return x + 0.4 * dropped


def test_linen_sows_with_the_mask_of_the_solve():
    """Where an element is kept z = x + 0.8 z, and z = x elsewhere."""
    layer, (x, _) = deq_jax.linen.DEQ(LinenDropped(), solver=SOLVER), inputs()
    rngs = {"dropout": jax.random.key(0)}
    z, written = layer.apply({}, x, mutable=["intermediates"], rngs=rngs)
    (kept,) = written["intermediates"]["cell"]["kept"]
    np.testing.assert_array_equal(kept, np.asarray(z / x) > 3)
    assert 0 < kept.sum() < kept.size


def test_what_shards_return_is_put_together():
    """A carry that starts from what all share, and is mixed with the samples, varies by shard."""
    shared, z = (jnp.float64(3), jax.random.key(0)), normal(8, 2)

    def function(shared, z):
        start, key = shared
        carry, _ = lax.scan(lambda carry, _: (carry + z.sum(), None), start, length=2)
        return {
            "passed on": start,
            "mean": carry,
            "largest": jnp.int32(100 * z.max()),
            "any": z.max() > 1,
            "everywhere": lax.psum(z.sum(), "data"),
            "key": jax.random.fold_in(key, 1),
            "columns": z.T,
        }

    with jax.set_mesh(mesh()):
        found, axes = find_mesh(("data",), z, z, True)
        got = call_on_shards(function, shared, (z,), axes, found)
    assert got["passed on"] is shared[0]
    got["key"] = jax.random.key_data(got["key"])
    expected = {
        "passed on": 3.0,
        "mean": 3 + 2 * z.sum() / 4,
        "largest": int(100 * z.max()),
        "any": True,
        "everywhere": z.sum(),
        "key": jax.random.key_data(jax.random.fold_in(shared[1], 1)),
        "columns": z.T,
    }
    assert relative_error(got, expected) < 1e-12
    assert got["columns"].sharding.spec == P(None, "data")


def layers(axis_name, execution, count=3):
    """Layers with parameters of their own, which are on axis 0 of the leaves."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def create(rngs):
        return deq_jax.nnx.DEQ(Cell(axis_name, 0.5, rngs=rngs), solver=SOLVER, execution=execution)

    return nnx.split(create(nnx.Rngs(3, dropout=4)), nnx.Param, ...)


def numbers(state):
    return jax.tree.map(raw, nnx.to_pure_dict(state))


def test_nnx_scan_over_layers():
    x, cotangent = inputs()
    definition, params, rest = layers("data", SHARDED)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    @nnx.remat
    def forward(layer, x):
        return layer(x)

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(params, x):
        stack = nnx.merge(definition, params, rest, copy=True)
        z = forward(stack, x)
        return jnp.vdot(cotangent, z), (z, numbers(nnx.state(stack, nnx.Not(nnx.Param))))

    plain, same_params, same_rest = layers(None, Execution())

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def one_by_one(params, x):
        states = []
        for i in range(3):
            state = jax.tree.map(lambda leaf: leaf[i], (params, same_rest))
            layer = nnx.merge(plain, *state, copy=True)
            x = layer(x)
            states.append(numbers(nnx.state(layer, nnx.Not(nnx.Param))))
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        return jnp.vdot(cotangent, x), (x, stacked)

    with jax.set_mesh(mesh()):
        got = jax.jit(gradient)(params, *sharded(mesh(), x))
    expected = jax.jit(one_by_one)(same_params, x)
    assert relative_error(got, expected) < 1e-12


class Block(nn.Module):
    axis_name: str | None = None
    execution: Execution = Execution()

    @nn.compact
    def __call__(self, x, _):
        layer = deq_jax.linen.DEQ(
            LinenCell(self.axis_name), solver=SOLVER, execution=self.execution
        )
        return layer(x), None


def test_linen_scan_over_layers():
    x, cotangent = inputs()
    axes = {"params": 0, "batch_stats": 0}
    scanned = nn.scan(nn.remat(Block), axes, split_rngs={"params": True}, length=3)
    variables = scanned().init(jax.random.key(0), x, None)

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradient(variables, x):
        (z, _), written = scanned("data", SHARDED).apply(
            variables, x, None, mutable=["batch_stats"]
        )
        return jnp.vdot(cotangent, z), (z, written)

    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def one_by_one(variables, x):
        written = []
        for i in range(3):
            own = jax.tree.map(lambda leaf: leaf[i], variables)
            (x, _), new = Block().apply(own, x, None, mutable=["batch_stats"])
            written.append(new)
        return jnp.vdot(cotangent, x), (x, jax.tree.map(lambda *all: jnp.stack(all), *written))

    with jax.set_mesh(mesh()):
        got = jax.jit(gradient)(variables, *sharded(mesh(), x))
    expected = jax.jit(one_by_one)(variables, x)
    assert relative_error(got, expected) < 1e-12


def named(params, z, x):
    hidden = checkpoint_name(jnp.tanh(z @ params["in"]), "hidden")
    return jnp.sin(hidden @ params["out"]) + x


@pytest.mark.parametrize("gradient", [Implicit(), Unrolled()])
def test_a_policy_of_checkpoint_sees_the_names_in_f(gradient, capsys):
    params = {"in": normal(2, 7, scale=0.3), "out": normal(7, 2, seed=1, scale=0.3)}
    x, cotangent = inputs()

    def loss(params, x):
        z = deq_fixed_point(named, params, x, solver=Picard(1.0, 1e-12, 20), gradient=gradient)
        return jnp.vdot(cotangent, z)

    def saving(*names):
        policy = jax.checkpoint_policies.save_only_these_names(*names)
        return jax.checkpoint(loss, policy=policy)

    def saved(function):
        print_saved_residuals(function, params, x)
        return capsys.readouterr().out

    assert "8,7]" in saved(saving("hidden"))
    assert "8,7]" not in saved(saving("something else"))
    got = jax.jit(jax.grad(saving("hidden"), (0, 1)))(params, x)
    assert relative_error(got, jax.grad(loss, (0, 1))(params, x)) < 1e-12


@pytest.mark.parametrize("probed", [False, True])
def test_a_checkpoint_that_saves_the_equilibrium_does_not_solve_again(probed):
    params = {"in": normal(2, 7, scale=0.3), "out": normal(7, 2, seed=1, scale=0.3)}
    x, cotangent = inputs()
    probe = BackwardProbe.zeros(len(x)) if probed else None

    def loss(params, x):
        z = deq_fixed_point(named, params, x, solver=Picard(1.0, 1e-12, 60), backward_probe=probe)
        return jnp.vdot(cotangent, jnp.sin(z))

    def loops(function):
        jaxpr = jax.make_jaxpr(jax.value_and_grad(function))(params, x)
        return str(jaxpr).count(" while[")

    policy = jax.checkpoint_policies.save_only_these_names("equilibrium")
    saving = jax.checkpoint(loss, policy=policy)
    assert loops(saving) == loops(loss) < loops(jax.checkpoint(loss))
    got = jax.jit(jax.grad(saving, (0, 1)))(params, x)
    assert relative_error(got, jax.grad(loss, (0, 1))(params, x)) < 1e-12


def test_a_pipeline_of_layers():
    """Each stage has a layer and sends what it finds to the next; 4 microbatches, in 5 steps."""
    x, cotangent = normal(16, 2), normal(16, 2, seed=2)
    definition, params, rest = nnx.split(
        nnx.vmap(lambda rngs: deq_jax.nnx.DEQ(Plain(rngs), solver=SOLVER))(nnx.Rngs(0).split(2)),
        nnx.Param,
        ...,
    )

    def layer(params, rest, x):
        return nnx.merge(definition, params, rest, copy=True)(x)

    def stage(params, rest, x, cotangent):
        params, rest = jax.tree.map(lambda leaf: leaf[0], (params, rest))
        number = lax.axis_index("stage")
        x = x.reshape(4, -1, 2)

        def step(received, time):
            own = jnp.where(number == 0, x[jnp.minimum(time, 3)], received)
            z = layer(params, rest, own)
            return lax.ppermute(z, "stage", [(0, 1)]), z

        start = lax.pcast(jnp.zeros_like(x[0]), "stage", to="varying")
        _, z = lax.scan(step, start, jnp.arange(5))
        value = jnp.vdot(cotangent, z[1:].reshape(-1, 2))
        return lax.psum(jnp.where(number == 1, value, 0), ("stage", "data"))

    devices = mesh(2, 2, names=("stage", "data"))
    specs = P("stage"), P("stage"), P("data"), P("data")
    pipeline = jax.shard_map(stage, mesh=devices, in_specs=specs, out_specs=P())

    def in_turn(params, rest, x, cotangent):
        for i in range(2):
            x = layer(*jax.tree.map(lambda leaf: leaf[i], (params, rest)), x)
        return jnp.vdot(cotangent, x)

    got, expected = (
        jax.jit(jax.value_and_grad(function, (0, 2)))(params, rest, x, cotangent)
        for function in (pipeline, in_turn)
    )
    assert relative_error(got, expected) < 1e-12


class Plain(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(2, 2, **F64, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(0.5 * self.linear(z) + x)


def squares(params, batch):
    """The mean of a loss over the samples, and an accuracy."""
    z0 = jnp.zeros((len(batch["x"]), 2))
    z = deq_fixed_point(linear_and_tanh, params, batch["x"], z0, solver=SOLVER, execution=SHARDED)
    error = (z @ params["out"] - batch["y"]) ** 2
    return error.mean(), {"small": (error < 1).mean(dtype=float)}


def linear_and_tanh(params, z, x):
    return jnp.tanh(z @ params["w"] + x @ params["u"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gradients_are_accumulated_with_one_all_reduce(kind):
    params = {"w": normal(2, 2, scale=0.3), "u": normal(3, 2, seed=1), "out": normal(2, seed=2)}
    batch = {"x": normal(16, 3, seed=3), "y": normal(16, seed=4)}
    one_device = functools.partial(jax.value_and_grad(squares, has_aux=True), params)
    with jax.set_mesh(mesh(kind=kind)):  # of a batch that is not sharded
        expected = jax.device_get(jax.jit(one_device)(batch))
        accumulated = accumulate_gradients(squares, 4, shard_axis="data", has_aux=True)
        everywhere = jax.device_put(params, NamedSharding(mesh(kind=kind), P()))
        batch = sharded(mesh(kind=kind), batch)[0]
        compiled = jax.jit(accumulated).lower(everywhere, batch).compile()
        got = compiled(everywhere, batch)
    assert relative_error(got, expected) < 1e-12
    sent = program(compiled.as_text())
    assert [collective.kind for collective in sent.collectives] == ["all-reduce"]
    assert [list(loop.everywhere()) for loop in sent.inner] == [[]]


def test_accumulation_with_batch_norm_over_shards():
    """A microbatch is the same part of each shard's samples, and so are its statistics."""
    x, cotangent = normal(16, 2), normal(16, 2, seed=2)
    batch = {"x": x, "cotangent": cotangent}

    def function(axis_name, execution):
        layer = deq_jax.nnx.DEQ(Cell(axis_name), solver=SOLVER, execution=execution)
        definition, params, rest = nnx.split(layer, nnx.Param, ...)

        def loss(params, batch, rest):
            layer = nnx.merge(definition, params, rest, copy=True)
            value = (batch["cotangent"] * layer(batch["x"])).mean()
            return value, nnx.to_pure_dict(nnx.state(layer.cell.norm, nnx.BatchStat))

        return loss, params, rest

    loss, params, rest = function("data", SHARDED)
    with jax.set_mesh(mesh()):
        accumulated = accumulate_gradients(loss, 2, shard_axis="data", has_aux=True)
        got = jax.device_get(jax.jit(accumulated)(params, sharded(mesh(), batch)[0], rest))
    loss, params, rest = function(None, Execution())
    order = np.arange(16).reshape(4, 2, 2).swapaxes(0, 1).reshape(2, 8)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    parts = [gradient(params, jax.tree.map(lambda a: a[part], batch), rest) for part in order]
    assert relative_error(got, jax.tree.map(lambda a, b: (a + b) / 2, *parts)) < 1e-12


def test_accumulation_names_what_is_wrong():
    params, x = jnp.ones(2), normal(8, 2)
    with pytest.raises(TypeError, match="loss must be a function"):
        accumulate_gradients(3, 2)
    for microbatches in (0, 2.0, True):
        with pytest.raises(ValueError, match="microbatches must be a positive integer"):
            accumulate_gradients(jnp.vdot, microbatches)
    with pytest.raises(ValueError, match=r"3 microbatches must divide .* shape \(8, 2\)"):
        accumulate_gradients(lambda params, x: (x * params).mean(), 3)(params, x)
    counts = lambda params, x: ((x * params).mean(), {"count": jnp.int32(1)})  # noqa: E731
    with pytest.raises(TypeError, match=r"leaf .*count.* has dtype int"):
        accumulate_gradients(counts, 2, has_aux=True)(params, x)
    with pytest.raises(ValueError, match="no axis of a mesh that is known here"):
        accumulate_gradients(lambda params, x: x.mean(), 2, shard_axis="data")(params, x)
