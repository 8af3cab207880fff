"""Sequence models as whole networks: the formula in NumPy, counts, depth, causality, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Broyden, Picard
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.sequence import Segment, SequenceModel
from tests.models.sequences import (
    DEPTH,
    MODELS,
    MODERN,
    RELATIVE,
    ROTARY,
    TRANSFORMERS,
    UNROLLED,
    B,
    L,
    V,
    by_numpy,
    call,
    give_cell,
    make,
    sizes,
    tokens,
)
from tests.reference import relative_error

FORMULAS = [
    *((name, {}, {}) for name in MODELS),
    *((name, {"tied": False}, ROTARY) for name in TRANSFORMERS),
    ("deq_transformer", {}, {"norm_order": "pre"}),
    ("tied_transformer", {}, {"norm_order": "pre", "feed_forward": "gelu"}),
    ("deq_trellis", {"tied": False, "kernel_size": 3}, {"dilation": 2}),
    ("explicit_trellis", {"tied": False}, {"dilation": 2}),
]


@pytest.mark.parametrize(("name", "network", "cell"), FORMULAS)
def test_the_network_is_the_formula(name, network, cell, x64):
    model = make(name, **network, **cell)
    got = call(model, tokens())
    assert got.dtype == jnp.float64
    assert got.shape == (B, L, V)
    assert relative_error(got, by_numpy(name, model, tokens(), cell)) < 1e-9


def test_a_head_may_see_some_channels():
    """Those of the end, of any number; the cell is given the embedding at its own width."""
    options = {"tied": False, "output_features": 2, "dtype": jnp.float32}
    model = make("deq_trellis", **options, solver=Picard(tol=1e-6, max_iter=200))
    definition, state = nnx.split(model)
    assert model.head.shape == (V, 2)
    reading = jax.jit(lambda state: nnx.merge(definition, state).read(tokens(), cache_size=1))(
        state
    )
    expected = reading.state.h[..., -2:] @ model.head[...].T + model.bias[...]
    assert relative_error(reading.logits, expected) < 1e-6


@pytest.mark.slow
def test_stats_and_memory_are_returned_where_asked_for():
    model = make("deq_transformer", dtype=jnp.float32, solver=Picard(tol=1e-4), memory_size=2)
    logits, stats, memory = call(model, tokens(), return_stats=True, return_memory=True)
    assert stats.converged.shape == (B,)
    assert stats.converged.all()
    assert memory.state.shape == memory.embedding.shape == (B, 2, model.features)
    again, same = call(model, tokens(), return_stats=True)
    np.testing.assert_array_equal(logits, again)
    np.testing.assert_array_equal(stats.iterations, same.iterations)
    np.testing.assert_array_equal(call(model, Segment(tokens())), logits)


# Counts.


@pytest.mark.parametrize("network", ["deq", "tied", "explicit"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("options", [{}, MODERN])
def test_parameters_of_transformers(network, tied, options):
    vocabulary, d, heads, f = 11, 12, 3, 20
    attention = (3 * d * d + 3 * d) + 3 * d * d + (d * d + d)  # injection, qkv, output
    if options:  # rotary; a gate; no biases in the feed-forward block
        cell = attention + 2 * d * f + f * d
    else:
        cell = attention + d * d + 2 * d + (d * f + f) + (f * d + d)
    around = vocabulary * d * (1 if tied else 2) + vocabulary
    depth = {} if network == "deq" else {"depth": 4}
    model = nnx.eval_shape(
        lambda: MODELS[f"{network}_transformer"](
            vocabulary, d, heads, f, tied=tied, **options, **depth, rngs=nnx.Rngs(0)
        )
    )
    assert count_parameters(model) == around + cell * (4 if network == "explicit" else 1)
    assert nnx.state(model, nnx.Not(nnx.Param)) == nnx.State({})


@pytest.mark.parametrize("network", ["deq", "tied", "explicit"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("taps", [2, 3])
def test_parameters_of_trellis_networks(network, tied, taps):
    vocabulary, e, h = 11, 6, 10
    cell = taps * e * 4 * h + 4 * h + taps * h * 4 * h
    out = e if tied else 8
    around = vocabulary * e + (0 if tied else vocabulary * out) + vocabulary
    depth = {} if network == "deq" else {"depth": 4}
    model = nnx.eval_shape(
        lambda: MODELS[f"{network}_trellis"](
            vocabulary, e, h, tied=tied, output_features=out, kernel_size=taps, **depth,
            rngs=nnx.Rngs(0),
        )
    )  # fmt: skip
    assert count_parameters(model) == around + cell * (4 if network == "explicit" else 1)


def test_initial_embeddings_have_unit_variance():
    options = {"dropout": 0.0, "memory_size": 0, "param_dtype": jnp.float32}
    model = SequenceModel(500, 16, 16, tied=False, **options, rngs=nnx.Rngs(0))
    rows = jnp.arange(500, dtype=jnp.int32)[None]
    assert np.std(model.embed(rows)) == pytest.approx(1, rel=0.03)
    for weights in (model.embedding, model.head):
        assert np.std(weights[...]) == pytest.approx(1 / 4, rel=0.03)
    assert (np.asarray(model.embedding[...]) != np.asarray(model.head[...])).all()
    assert not np.asarray(model.bias[...]).any()


def test_explicit_cells_are_not_alike():
    name = "explicit_trellis"
    model = MODELS[name](*sizes(name), depth=3, rngs=nnx.Rngs(0))
    first, *others = (np.asarray(cell.recurrent.kernel[...]) for cell in model.cells)
    assert len(others) == 2
    assert all((first != other).all() for other in others)


# Depth.


@pytest.mark.parametrize("kind", ["transformer", "trellis"])
@pytest.mark.slow
def test_many_layers_of_one_cell_are_the_equilibrium(kind, x64):
    deq = make(f"deq_{kind}")
    expected = call(deq, tokens())
    for network in ("tied", "explicit"):
        # With rematerialisation it is a loop, which is compiled fast.
        model, errors = make(f"{network}_{kind}", depth=1, seed=4, remat=True), []
        give_cell(model, deq)
        for depth in (2, 60):
            model.depth = depth
            if network == "explicit":
                model.cells = nnx.List([nnx.clone(deq.core.cell) for _ in range(depth)])
            errors.append(relative_error(call(model, tokens()), expected))
        assert errors[0] > 1e-2
        assert errors[1] < 1e-6


# Causality.


def replaced(at):
    changed = np.array(tokens())
    changed[:, at] = (changed[:, at] + 1) % V
    return jnp.asarray(changed)


@pytest.mark.parametrize("name", MODELS)
def test_no_logit_sees_a_later_token(name):
    """Bit by bit. A DEQ makes a fixed number of plain steps: no step mixes positions."""
    options = {"deq_transformer": RELATIVE, "tied_transformer": MODERN}.get(name, {})
    model = make(name, dtype=jnp.float32, solver=Picard(tol=0.0, max_iter=12), **options)
    old = np.asarray(call(model, tokens()))
    for at in (2, L - 1):
        new = np.asarray(call(model, replaced(at)))
        np.testing.assert_array_equal(new[:, :at], old[:, :at])
        assert (np.abs(new - old)[:, at:].max((0, 2)) > 1e-5).all()


@pytest.mark.parametrize("solver", [Anderson(tol=1e-11), Broyden(tol=1e-11, max_iter=100)])
@pytest.mark.parametrize("name", ["deq_transformer", "deq_trellis"])
def test_accelerated_solves_are_causal_to_their_tolerance(name, solver, x64):
    """Their weights are of the whole sample, so a later token moves the steps, not the end."""
    model = make(name, solver=solver)
    old, stats = call(model, tokens(), return_stats=True)
    new, _ = call(model, replaced(3), return_stats=True)
    assert stats.converged.all()
    assert relative_error(new[:, :3], old[:, :3]) < 1e-8
    assert relative_error(new[:, 3:], old[:, 3:]) > 1e-3


# Bad arguments.

WRONG = {
    "vocabulary_size must be at least 1, got 0": {0: 0},
    "features must be at least 1, got 0": {1: 0},
    "dropout must be finite, >= 0 and <= 1, got 1.5": {"dropout": 1.5},
    "memory_size must be finite, >= 0, got -1": {"memory_size": -1},
    "memory_size must be an integer, got 1.5": {"memory_size": 1.5},
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("message", WRONG)
def test_bad_arguments_are_named(name, message):
    changes = dict(WRONG[message])
    arguments = [changes.pop(index, size) for index, size in enumerate(sizes(name))]
    error = TypeError if "integer" in message else ValueError
    with pytest.raises(error, match=message):
        MODELS[name](*arguments, **changes, rngs=nnx.Rngs(0))


def test_other_bad_arguments_are_named():
    for name in UNROLLED:
        with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
            MODELS[name](*sizes(name), depth=0, rngs=nnx.Rngs(0))
    for wide, message in (
        (5, "output_features=5 must be at most hidden_features=4"),
        (2, "a tied head needs output_features=2 to be features=3"),
    ):
        with pytest.raises(ValueError, match=message):
            MODELS["deq_trellis"](*sizes("deq_trellis"), output_features=wide, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="features=8 must be a multiple of heads=3"):
        MODELS["tied_transformer"](V, 8, 3, 6, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="depth_typo"):
        MODELS["deq_transformer"](V, 8, 2, 6, depth_typo=3, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", MODELS)
def test_bad_inputs_are_named(name):
    model = make(name, dtype=jnp.float32, memory_size=2)

    def trace(*shape, dtype=jnp.int32):
        nnx.eval_shape(model, jax.ShapeDtypeStruct(shape, dtype))

    trace(B, L)
    with pytest.raises(TypeError, match="tokens must be integers, got float32"):
        trace(B, L, dtype=jnp.float32)
    for shape in ((L,), (B, L, 1), (B, 0)):
        with pytest.raises(ValueError, match=r"tokens must be \[B, L\] and not empty, got"):
            trace(*shape)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_memory_of_another_batch_is_named(name):
    model = make(name, dtype=jnp.float32, memory_size=2)
    other = nnx.eval_shape(lambda: model.initial_memory(B + 1))
    with pytest.raises(ValueError, match=r"memory.key must be \[2, 'M', 2, 4\], got \[3, 2, 2, 4"):
        nnx.eval_shape(lambda memory: model(Segment(tokens(), memory)), other)


@pytest.mark.parametrize("name", UNROLLED)
def test_memory_of_another_depth_is_named(name):
    model = make(name, dtype=jnp.float32, memory_size=2)
    short = model.initial_memory(B)[:-1]
    with pytest.raises(ValueError, match=f"memory must have {DEPTH} entries, got {DEPTH - 1}"):
        model(Segment(tokens(), short))
