"""Cells with sharded parameters and states: equal to one device, and what each trip communicates.

Communication is read off the compiled value and gradient of a solve, on a mesh of 2 x 2 devices.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from deq_jax import Anderson
from deq_jax.cells import Memory, ResNetCell, SequenceInput, TransformerCell, TrellisCell
from deq_jax.cells.attention import block_positions, relative_scores, sequence_blocks
from deq_jax.nnx import DEQ
from deq_jax.partitioning import RULES, partition_spec, partition_specs
from tests.reference import relative_error
from tests.xla import Collective, collectives

pytestmark = pytest.mark.usefixtures("x64")

B, L, D, H, F = 4, 16, 32, 4, 64
SOLVER = Anderson(tol=1e-13, max_iter=100)
MODERN = {"positions": "rotary", "norm": "rms", "norm_order": "pre", "feed_forward": "swiglu"}
STATE = f"f64[{B // 2},{L},{D}]"
HEADS = f"f64[{B // 2},{L},{H},{D // H}]"
"""A device's part of the state where its batch is sharded, and its keys, or values."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def mesh_of(*axes, types=AxisType.Auto):
    return jax.make_mesh((2, 2), axes, axis_types=(types,) * 2)


def compare(cell, x, mesh, rules, names):
    """Solves and differentiates on the mesh and on one device; the mesh's collectives."""
    layer = DEQ(cell, solver=SOLVER)
    definition, state = nnx.split(layer)
    start = getattr(cell, "start", jnp.zeros_like)
    weights = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=9), start(x))

    def loss(state, x):
        layer = nnx.merge(definition, state)
        z, stats = layer(x, start(x), return_stats=True)
        terms = jax.tree.map(lambda w, z: (w * z**2).sum(), weights, z)
        return sum(jax.tree.leaves(terms)), (z, stats)

    def compiled(state, x):
        step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        return step.lower(state, x).compile()

    (_, (z, stats)), gradient = compiled(state, x)(state, x)
    assert stats.converged.all()
    with jax.set_mesh(mesh):
        state = jax.device_put(state, partition_specs(state, mesh, rules))
        x = jax.device_put(x, NamedSharding(mesh, partition_spec(names, mesh, rules)))
        program = compiled(state, x)
        (_, (got, same)), got_gradient = program(state, x)
    assert (same.iterations == stats.iterations).all()
    assert relative_error(got, z) < 1e-12
    assert relative_error(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient)) < 1e-12
    for leaf, value in zip(jax.tree.leaves(got_gradient), jax.tree.leaves(gradient), strict=True):
        assert relative_error(leaf, value) < 1e-10
    return collectives(program.as_text())


def in_loops(found: list[Collective]) -> list[tuple[str, tuple[str, ...]]]:
    """Names and shapes of what each trip sends, but for single flags and numbers a sample."""
    large = [c for c in found if c.in_loop and c.size > 8 * B * (SOLVER.history + 1)]
    return [(c.name, c.shapes) for c in large]


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.slow
def test_tensor_parallelism_sums_twice_a_trip(options):
    cell = TransformerCell(D, H, F, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rules = RULES["data"] | RULES["tensor"]
    names = ("batch", "length", None)
    found = compare(cell, normal(B, L, D), mesh_of("data", "tensor"), rules, names)
    # One sum behind the attention and one behind the feed-forward block, forwards and backwards.
    assert in_loops(found) == [("all-reduce", (STATE,))] * 4
    in_float32 = sum(c.size for c in found if c.in_loop) / 2
    assert 2 * 8192 <= in_float32 < 2 * 8200


@pytest.mark.parametrize("memory", [0, 8])
@pytest.mark.slow
def test_sequence_parallelism_gathers_keys_and_values(memory):
    """And nothing of the size of the scores, which relative positions would need."""
    cell = TransformerCell(D, H, F, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    x = normal(B, L, D)
    if memory:
        x = SequenceInput(x, Memory(normal(B, memory, D, seed=1), normal(B, memory, D, seed=2)))
    rules, names = RULES["data"] | RULES["sequence"], ("batch", "length", None)
    found = compare(cell, x, mesh_of("data", "sequence"), rules, names)
    # Forwards keys and values of the segment, backwards the sum of their cotangents.
    keys = f"f64[{B // 2},{H},{memory + L},{D // H}]"
    transposed = f"f64[{B // 2},{H},{D // H},{memory + L}]"
    assert in_loops(found) == [("all-gather", (HEADS,))] * 2 + [("all-reduce", (keys, transposed))]


@pytest.mark.slow
def test_a_residual_cell_sums_once_a_trip(standard_promotion):
    cell = ResNetCell(8, 16, kernel_std=0.02, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rules = RULES["data"] | RULES["tensor"]
    found = compare(cell, normal(B, 4, 4, 8), mesh_of("data", "tensor"), rules, ("batch",))
    assert in_loops(found) == [("all-reduce", (f"f64[{B // 2},4,4,8]",))] * 2


@pytest.mark.slow
def test_a_trellis_cell_has_no_tensor_rules_and_fsdp_agrees():
    cell = TrellisCell(6, 8, kernel_std=0.3, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    mesh, names = mesh_of("fsdp", "tensor"), ("batch", "length", None)
    rules = RULES["fsdp"] | RULES["tensor"]
    specs = partition_specs(cell, mesh, rules)
    assert specs["recurrent"]["kernel"].get_value() == jax.P(None, "fsdp")
    compare(cell, normal(B, 6, 6), mesh, rules, names)


@pytest.mark.parametrize("blocks", [1, 2, 4, 12])
@pytest.mark.parametrize("memory", [0, 3])
def test_scores_of_blocks_by_their_definition(blocks, memory):
    queries = 12
    keys = memory + queries
    query, positions = normal(2, queries, 2, 3), normal(keys, 2, 3, seed=1)
    of_blocks = block_positions(positions, queries, blocks)
    assert of_blocks.shape == (blocks, keys, 2, 3)
    got = relative_scores(query, jnp.broadcast_to(of_blocks, (2, *of_blocks.shape)))
    for i in range(queries):
        for j in range(memory + i + 1):
            distance = memory + i - j
            expected = np.einsum("bhd,hd->bh", query[:, i], positions[keys - 1 - distance])
            np.testing.assert_allclose(got[:, :, i, j], expected, rtol=1e-12)


def test_scores_of_a_batch_that_is_sharded_explicitly():
    query, positions = normal(4, 6, 2, 3), normal(4, 1, 6, 2, 3, seed=1)
    expected = relative_scores(query, positions)
    mesh = mesh_of("data", "tensor", types=AxisType.Explicit)
    with jax.set_mesh(mesh):
        query, positions = jax.device_put((query, positions), jax.P("data"))
        got = jax.jit(relative_scores)(query, positions)
    assert tuple(got.sharding.spec)[:1] == ("data",)
    assert relative_error(got, expected) < 1e-14


def test_there_is_a_block_for_each_shard_of_a_sequence():
    assert sequence_blocks(6) == 1
    with jax.set_mesh(mesh_of("data", "tensor")):
        assert sequence_blocks(6) == 1
    mesh = jax.make_mesh((4,), ("sequence",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        assert [sequence_blocks(length) for length in (1, 6, 8)] == [1, 1, 4]
        count = []

        def f(x):
            count.append(sequence_blocks(8))
            return x

        jax.jit(jax.shard_map(f, in_specs=jax.P("sequence"), out_specs=jax.P("sequence")))(
            jnp.ones(4)
        )
    assert count == [1]
