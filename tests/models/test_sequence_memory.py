"""Memory of sequence models: segments are the whole, with windows too, and carry no gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.models.sequence import Segment
from deq_jax.stability import WeightNorm
from tests.models.sequences import MODELS, RELATIVE, ROTARY, B, call, make, tokens
from tests.reference import relative_error

pytestmark = pytest.mark.slow

LENGTH, PARTS = 6, (slice(0, 2), slice(2, 4), slice(4, 6))
ALL = [
    *((name, 4 if name.endswith("transformer") else 1, {}) for name in MODELS),
    # A window that memory fits: what it has lost, no position would have looked at.
    ("deq_transformer", 2, RELATIVE),
    ("tied_transformer", 2, ROTARY),
    ("deq_trellis", 1, {"kernel_size": 3, "dilation": 2}),
    ("explicit_trellis", 1, {"dilation": 3}),
    # The memory goes through kernels as the layer uses them.
    ("deq_transformer", 4, {"normalization": WeightNorm(), "norm_order": "pre"}),
    ("deq_trellis", 1, {"normalization": WeightNorm()}),
]


@pytest.mark.parametrize(("name", "size", "options"), ALL)
def test_segments_are_the_whole(name, size, options, x64):
    model, inputs = make(name, depth=2, memory_size=size, **options), tokens(LENGTH)
    whole, logits = call(model, inputs), []
    empty = memory = model.initial_memory(B)
    for part in PARTS:
        out, memory = call(model, Segment(inputs[:, part], memory), return_memory=True)
        logits.append(out)
        # One compiled step serves all segments.
        assert shapes(memory) == shapes(empty)
    error = relative_error(jnp.concatenate(logits, 1), whole)
    assert error < (1e-9 if name.startswith("deq") else 1e-13)
    # It matters: a segment without memory says something else.
    alone, _ = call(model, Segment(inputs[:, PARTS[2]], empty), return_memory=True)
    assert relative_error(alone, whole[:, PARTS[2]]) > 1e-3


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


@pytest.mark.parametrize("name", ["deq_trellis", "tied_transformer"])
def test_initial_memory_is_no_memory(name, x64):
    model = make(name, memory_size=2)
    inputs = tokens(2)
    got = call(model, Segment(inputs, model.initial_memory(B)), return_memory=True)[0]
    assert relative_error(got, call(model, inputs)) < 1e-13
    without = make(name)
    assert without.initial_memory(B) is None
    logits, memory = call(without, inputs, return_memory=True)
    assert memory is None
    assert relative_error(logits, got) < 1e-13


def test_buffers_of_the_initial_memory_are_all_different():
    """So that a training step may be given all of them for good."""
    for name in ("explicit_transformer", "deq_trellis"):
        leaves = jax.tree.leaves(make(name, dtype=jnp.float32, memory_size=2).initial_memory(B))
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_memory_has_its_last_positions(x64):
    model = make("tied_transformer", memory_size=4)
    short, rest = tokens(3), tokens(6)
    _, memory = call(model, short, return_memory=True)
    assert len(memory) == model.depth
    for own in memory:
        np.testing.assert_array_equal(own.length, [3, 3])
        np.testing.assert_allclose(own.embedding[:, 1:], embedded(model, short), rtol=1e-14)
    _, longer = call(model, Segment(rest, memory), return_memory=True)
    for own in longer:
        np.testing.assert_array_equal(own.length, [4, 4])
        np.testing.assert_allclose(own.embedding, embedded(model, rest)[:, -4:], rtol=1e-14)
    # What entered each application: zeros the first, then what came out of the one before.
    assert not np.asarray(memory[0].state).any()
    assert all(np.asarray(own.state[:, 1:]).all() for own in memory[1:])


def embedded(model, inputs):
    return np.asarray(model.embedding[...])[np.asarray(inputs)] * np.sqrt(model.features)


@pytest.mark.parametrize(
    "name", ["deq_transformer", "tied_transformer", "deq_trellis", "explicit_trellis"]
)
def test_no_gradient_flows_through_memory(name, x64):
    model = make(name, depth=2, memory_size=2)
    definition, state = nnx.split(model)
    first, second = tokens(2), tokens(2, seed=1)

    def remembered(state):
        return nnx.merge(definition, state)(first, return_memory=True)[1]

    def loss(state, memory, factor):
        # Only floats can be differentiated by; a factor of 1 on each of them stands for them.
        scaled = jax.tree.map(lambda a: a * factor if a.dtype == factor.dtype else a, memory)
        return (nnx.merge(definition, state)(Segment(second, scaled)) ** 2).sum()

    @jax.jit
    def gradients(state):
        factor = jnp.ones(())
        through = jax.grad(lambda state: loss(state, remembered(state), factor))(state)
        memory = remembered(state)
        return through, *jax.grad(loss, argnums=(0, 2))(state, memory, factor)

    through, past, by_memory = gradients(state)
    assert relative_error(through, past) < 1e-14
    assert abs(by_memory) > 1e-3  # and not because memory would not matter
