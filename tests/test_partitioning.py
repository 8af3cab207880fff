"""Names of axes, rules, and the specs made of them; that models work as before on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_jax import linen
from deq_jax.cells import FeedForwardCell, ResNetCell, TransformerCell, TrellisCell
from deq_jax.models.conv_deq import ConvDEQ
from deq_jax.models.deq_transformer import DEQTransformer
from deq_jax.models.deq_trellis import DEQTrellisNet
from deq_jax.models.recurrent import RecurrentNet
from deq_jax.nnx import DEQ
from deq_jax.partitioning import RULES, logical_axes, partition_spec, partition_specs
from deq_jax.stability import SpectralNorm, WeightNorm

D, HEADS, HIDDEN = 8, 4, 12
MESH = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
MODELS = {
    "plain": lambda: FeedForwardCell(3, 4, rngs=nnx.Rngs(0)),
    "residual": lambda: ResNetCell(8, 16, rngs=nnx.Rngs(0)),
    "trellis": lambda: TrellisCell(3, 4, rngs=nnx.Rngs(0)),
    "transformer": lambda: transformer(),
    "images": lambda: ConvDEQ(image_shape=(8, 8, 3), learned_start=True, rngs=nnx.Rngs(0)),
    "text": lambda: DEQTransformer(10, D, HEADS, HIDDEN, tied=False, rngs=nnx.Rngs(0)),
    "weight norm": lambda: DEQTrellisNet(
        10, 4, 6, normalization=WeightNorm(), dropout=0.1, rngs=nnx.Rngs(0, dropout=1)
    ),
    "lstm": lambda: RecurrentNet(10, 4, 6, rngs=nnx.Rngs(0)),
    "gru": lambda: RecurrentNet(10, 4, 4, kind="gru", tied=True, rngs=nnx.Rngs(0)),
}


def transformer(**options):
    return TransformerCell(D, HEADS, HIDDEN, **options, rngs=nnx.Rngs(0))


def by_path(specs):
    """Specs of the variables that are not whole, by path."""
    flat = nnx.to_flat_state(specs)
    return {"/".join(map(str, path)): v.get_value() for path, v in flat if v.get_value() != P()}


@pytest.mark.parametrize(
    ("names", "rules", "shape", "expected"),
    [
        (("batch", "length"), RULES["data"] | RULES["sequence"], None, P("fsdp")),
        (("batch", "length"), {"batch": "fsdp", "length": "tensor"}, None, P("fsdp", "tensor")),
        (("batch",), {"batch": ("data", "fsdp", "tensor")}, (8,), P(("fsdp", "tensor"))),
        (("batch",), {"batch": ("data", "fsdp", "tensor")}, (6,), P()),
        # FSDP takes the channels of the residual stream where they can be divided, ...
        (("embed", "mlp"), RULES["fsdp"], (4, 6), P("fsdp")),
        (("embed", "mlp"), RULES["fsdp"], (5, 6), P(None, "fsdp")),
        (("embed", "mlp"), RULES["fsdp"], (5, 7), P()),
        # ... else the longest axis, of those with names that no other rule takes.
        ((None, "channels", "gates"), RULES["fsdp"], (8, 4, 6), P(None, None, "fsdp")),
        ((None, "channels", "gates"), RULES["fsdp"], (8, 6, 5), P(None, "fsdp")),
        (("embed", "mlp"), RULES["fsdp"] | RULES["tensor"], (4, 6), P("fsdp", "tensor")),
        (("embed", "mlp"), RULES["tensor"] | RULES["fsdp"], (4, 6), P("fsdp", "tensor")),
        (("embed", "mlp"), RULES["tensor"] | RULES["fsdp"], (4, 7), P("fsdp")),
        (("mlp", "heads"), RULES["tensor"], (4, 6), P("tensor")),
        (("embed", "tensor"), {}, (4, 6), P(None, "tensor")),
        (("embed", None), {}, (4, 6), P()),
        (("embed", "mlp"), RULES["replicated"], (4, 6), P()),
        (("embed", "mlp"), RULES["replicated"] | RULES["fsdp"], (4, 6), P("fsdp")),
    ],
)
def test_specs_of_named_axes(names, rules, shape, expected):
    for mesh in (MESH, MESH.abstract_mesh):
        assert partition_spec(names, mesh, rules, shape) == expected


@pytest.mark.slow
def test_a_transformer_by_tensor_and_fsdp():
    model = MODELS["text"]()
    tensor = {
        "embedding": P("tensor"),
        "head": P("tensor"),
        "core/cell/injection/kernel": P(None, None, "tensor"),
        "core/cell/qkv/kernel": P(None, None, "tensor"),
        "core/cell/position/kernel": P(None, "tensor"),
        "core/cell/output/kernel": P("tensor"),
        "core/cell/expand/kernel": P(None, "tensor"),
        "core/cell/contract/kernel": P("tensor"),
    }
    fsdp = {
        "embedding": P(None, "fsdp"),
        "head": P(None, "fsdp"),
        "core/cell/injection/kernel": P("fsdp"),
        "core/cell/qkv/kernel": P("fsdp"),
        "core/cell/position/kernel": P("fsdp"),
        "core/cell/output/kernel": P(None, None, "fsdp"),
        "core/cell/expand/kernel": P("fsdp"),
        "core/cell/contract/kernel": P(None, "fsdp"),
    }
    both = {
        path: P(*(a or b for a, b in zip([*spec, None, None, None], [*fsdp[path], None, None, None],
                                         strict=False)))
        for path, spec in tensor.items()
    }  # fmt: skip
    assert by_path(partition_specs(model, MESH, RULES["tensor"])) == tensor
    assert by_path(partition_specs(nnx.state(model), MESH, RULES["fsdp"])) == fsdp
    got = by_path(partition_specs(model, MESH, RULES["tensor"] | RULES["fsdp"]))
    assert {path: [*spec] for path, spec in got.items()} == {
        path: [*spec][: len(got[path])] for path, spec in both.items()
    }
    assert by_path(partition_specs(model, MESH, RULES["data"] | RULES["sequence"])) == {}
    # Flax's own functions read the same names, and its own rules.
    assert nnx.get_partition_spec(nnx.state(model))["head"].get_value() == P("vocab", "embed")
    with nnx.logical_axis_rules(tuple(RULES["tensor"].items())):
        spec = nnx.get_partition_spec(nnx.state(model)).core.cell.qkv.kernel.get_value()
    assert spec == P("embed", None, "tensor", "kv")


def test_heads_that_cannot_be_divided_stay_whole():
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    cell = TransformerCell(12, 3, 8, rngs=nnx.Rngs(0))
    expected = {"expand/kernel": P(None, "tensor"), "contract/kernel": P("tensor")}
    assert by_path(partition_specs(cell, mesh, RULES["tensor"])) == expected


@pytest.mark.slow
def test_convolutions_and_plain_cells():
    cell = MODELS["residual"]()
    tensor = by_path(partition_specs(cell, MESH, RULES["tensor"]))
    assert tensor == {
        "conv1/kernel": P(None, None, None, "tensor"),
        "conv2/kernel": P(None, None, "tensor"),
    }
    model = MODELS["images"]()
    fsdp = by_path(partition_specs(model, MESH, RULES["fsdp"]))
    assert fsdp.pop("head/kernel") == P("fsdp")
    assert fsdp.pop("core/cell/conv2/kernel") == P(None, None, "fsdp")  # 64 to 48 channels
    assert set(fsdp.values()) == {P(None, None, None, "fsdp")}
    assert by_path(partition_specs(MODELS["plain"](), MESH, RULES["tensor"])) == {
        "input/kernel": P(None, "tensor"),
        "recurrent/kernel": P(None, "tensor"),
    }


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.slow
def test_models_are_made_under_any_mesh(name, axis_type):
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    expected = jax.tree.leaves(nnx.state(MODELS[name](), nnx.Param))
    with jax.set_mesh(mesh):
        definition, state = nnx.split(MODELS[name]())
        model = nnx.merge(definition, state, copy=True)
        optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
        with nnx.logical_axis_rules(tuple(RULES["replicated"].items())):
            abstract = nnx.eval_shape(MODELS[name])
        shapes = jax.eval_shape(lambda: nnx.split(MODELS[name]())[1])
    for got, leaf in zip(jax.tree.leaves(nnx.state(model, nnx.Param)), expected, strict=True):
        np.testing.assert_array_equal(got, leaf)
    # The names go wherever the variables go.
    names = by_path(nnx.get_partition_spec(nnx.state(model, nnx.Param)))
    assert names
    moments = nnx.state(optimizer).opt_state[0]["mu"]
    for tree in (nnx.state(abstract, nnx.Param), shapes, moments):
        assert by_path(nnx.get_partition_spec(tree)) == names
    # Each parameter of more than one axis has names, so that FSDP finds one to divide.
    kernels = {p for p, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)) if leaf.ndim > 1}
    biases = {"content_bias", "position_bias", "bias"}
    assert {"/".join(map(str, p)) for p in kernels if p[-1] not in biases} == set(names)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_states_are_placed_in_one_line(axis_type):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(axis_type,) * 2)
    rules = RULES["fsdp"] | RULES["tensor"]
    _, params, rest = nnx.split(MODELS["weight norm"](), nnx.Param, ...)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    average = optax.ema(0.9).init(params)
    state = params, rest, optimizer.init(params), average
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, partition_specs(state, mesh, rules))
        # Plain arrays, as a train step may have them.
        plain = nnx.as_pure(params), optimizer.init(nnx.as_pure(params))
        specs = nnx.as_pure(partition_specs(params, mesh, rules))
        of_optimizer = optax.tree.map_params(
            optimizer, lambda _, spec: spec, plain[1], specs, transform_non_params=lambda _: P()
        )
        plain = jax.device_put(plain, (specs, of_optimizer))
    for got, leaf in zip(jax.tree.leaves(placed), jax.tree.leaves(state), strict=True):
        assert got.dtype == leaf.dtype
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(got, leaf)
    for kernel in (
        placed[0]["core"]["cell"]["recurrent"]["kernel"].get_value(),
        placed[2][1][0].mu["core"]["cell"]["recurrent"]["kernel"].get_value(),
        placed[3].ema["core"]["cell"]["recurrent"]["kernel"].get_value(),
        plain[0]["core"]["cell"]["recurrent"]["kernel"],
        plain[1][1][0].nu["core"]["cell"]["recurrent"]["kernel"],
    ):
        assert tuple(kernel.sharding.spec)[:2] == (None, "fsdp")
        assert kernel.addressable_shards[0].data.shape == (2, 3, 24)
    embedding = placed[0]["embedding"].get_value()
    assert embedding.addressable_shards[0].data.shape == (5, 2)


@pytest.mark.slow
def test_layers_with_normalised_and_named_kernels():
    x = jnp.ones((2, 3, D))
    for normalization in (WeightNorm(), SpectralNorm(scale=None, learn_scale=True)):
        layer = DEQ(transformer(feed_forward="swiglu"), normalization=normalization)
        plain = DEQ(transformer(feed_forward="swiglu"))
        # Both start as the kernel itself.
        with jax.set_mesh(MESH):
            got = jax.jit(lambda layer, x: layer(x, jnp.zeros_like(x)))(layer, x)
        expected = jax.jit(lambda layer, x: layer(x, jnp.zeros_like(x)))(plain, x)
        np.testing.assert_allclose(got, expected, rtol=2e-3, atol=2e-4)
        if isinstance(normalization, WeightNorm):
            shapes = {path: g.shape for path, g in layer.scale.items()}
            assert shapes["qkv/kernel"] == shapes["injection/kernel"] == (3, HEADS, D // HEADS)
            assert shapes["position/kernel"] == (HEADS, D // HEADS)
            assert shapes["output/kernel"] == shapes["contract/kernel"] == (D,)
            assert shapes["expand/kernel"] == (2, HIDDEN)


@pytest.mark.slow
def test_a_linen_layer_around_a_named_cell():
    cell = nnx.bridge.to_linen(FeedForwardCell, 4, 4)
    layer, x = linen.DEQ(cell=cell, inject=False, normalization=WeightNorm()), jnp.ones((2, 4))
    with jax.set_mesh(MESH):
        variables = layer.init(jax.random.key(0), x)
        gradient = jax.grad(lambda v: layer.apply(v, x).sum())(variables)
    assert jax.tree.structure(gradient) == jax.tree.structure(variables)


def test_initial_numbers_are_those_of_the_joint_matrices():
    """Kernels are drawn as matrices `[inputs, outputs]`, whatever axes they have."""
    cell, rngs = transformer(feed_forward="swiglu", positions="rotary"), nnx.Rngs(0)

    def drawn(std, *shape, bias=False):
        value = std * jax.random.normal(rngs.params(), shape)
        if bias:
            rngs.params()
        return value

    small = 0.3 / np.sqrt(D)
    biases = {leaf.shape for path, leaf in nnx.to_flat_state(nnx.state(cell)) if path[-1] == "bias"}
    assert biases == {(3 * D,), (D,)}  # vectors: the usual mask of weight decay goes by that
    for layer, expected in (
        (cell.injection, drawn(2 / np.sqrt(D), D, 3 * D, bias=True)),
        (cell.qkv, drawn(small, D, 3 * D)),
        (cell.output, drawn(1 / np.sqrt(D), D, D, bias=True)),
        (cell.expand, drawn(small, D, 2 * HIDDEN)),
        (cell.contract, drawn(0.3 / np.sqrt(HIDDEN), HIDDEN, D)),
    ):
        np.testing.assert_allclose(layer.kernel[...].reshape(expected.shape), expected, rtol=1e-6)


def test_bad_rules_and_names():
    cell = transformer()
    with pytest.raises(TypeError, match=r"rules must be a mapping, RULES\[\"fsdp\"\]"):
        partition_specs(cell, MESH, "fsdp")
    with pytest.raises(TypeError, match=r"rules\['embed'\] must be a mesh axis, a tuple"):
        partition_spec(("embed",), MESH, {"embed": 1})
    with pytest.raises(ValueError, match=r"names must be one for each axis of \[2, 3\], got"):
        partition_spec(("embed",), MESH, {}, (2, 3))
    cell.qkv.kernel = nnx.Param(jnp.ones((2, 3)), **logical_axes("embed"))
    with pytest.raises(ValueError, match=r"metadata of .*qkv.*kernel.*: names must be one"):
        partition_specs(cell, MESH, RULES["fsdp"])
