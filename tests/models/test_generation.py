"""Generation: token by token against solves of whole sequences, draws against their law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson
from deq_jax.models.generation import generate, sample
from deq_jax.stability import WeightNorm
from tests.models.sequences import MODELS, MODERN, RELATIVE, ROTARY, B, V, call, make, tokens

pytestmark = pytest.mark.slow

COUNT = 4
KEY = jax.random.key(3)
FEW = {"cache_size": 2}
"""With a window of 3 nothing is lost."""

CASES = [
    ("deq_transformer", {}, {}, 3),
    ("deq_transformer", ROTARY, FEW | {"warm_start": False}, 3),
    ("deq_transformer", {"normalization": WeightNorm(), "norm_order": "pre"}, {}, 1),
    ("tied_transformer", RELATIVE, FEW, 3),
    ("explicit_transformer", MODERN, {}, 1),
    ("deq_trellis", {}, {}, 3),
    ("deq_trellis", {"kernel_size": 3, "normalization": WeightNorm()}, {"warm_start": False}, 1),
    ("tied_trellis", {}, {}, 1),
    ("explicit_trellis", {"dilation": 2}, {}, 3),
]


@pytest.mark.parametrize(("name", "options", "settings", "length"), CASES)
def test_logits_are_those_of_the_whole_sequence(name, options, settings, length, x64):
    model, prompt = make(name, depth=2, **options), tokens(length)
    got = generate(model, prompt, COUNT, key=KEY, **settings)
    assert got.tokens.shape == (B, COUNT)
    assert got.tokens.dtype == jnp.int32
    assert got.logits.shape == (B, COUNT, V)
    whole = call(model, jnp.concatenate([prompt, got.tokens], 1))
    expected = whole[:, length - 1 : -1]
    np.testing.assert_allclose(got.logits, expected, rtol=0, atol=1e-9)
    # What was drawn is what `sample` draws, with a key of its own each time.
    keys = jax.random.split(KEY, COUNT)
    for t in range(COUNT):
        np.testing.assert_array_equal(got.tokens[:, t], sample(keys[t], got.logits[:, t], 1.0))
    assert_stats(name, got.stats)


def assert_stats(name, stats):
    if not name.startswith("deq"):
        assert stats is None
        return
    for leaf in (stats.residual, stats.iterations, stats.status):
        assert leaf.shape == (B, COUNT - 1)
    assert stats.evaluations.shape == (COUNT - 1,)
    assert stats.converged.all()
    np.testing.assert_array_equal(stats.evaluations, np.asarray(stats.iterations).max(0))


def test_in_single_precision():
    model = make("deq_transformer", dtype=jnp.float32, solver=Anderson(tol=1e-6, max_iter=60))
    got = generate(model, tokens(3), COUNT, key=KEY)
    assert got.stats.converged.all()
    whole = call(model, jnp.concatenate([tokens(3), got.tokens], 1))
    np.testing.assert_allclose(got.logits, whole[:, 2:-1], rtol=0, atol=1e-4)


def test_a_warm_start_changes_the_cost_alone(x64):
    model = make("deq_transformer")
    warm, cold = (
        generate(model, tokens(3), COUNT, key=KEY, warm_start=start) for start in (True, False)
    )
    np.testing.assert_array_equal(warm.tokens, cold.tokens)
    assert (np.asarray(warm.stats.iterations) != np.asarray(cold.stats.iterations)).any()


@pytest.mark.parametrize("name", ["deq_transformer", "explicit_trellis"])
def test_without_temperature_it_takes_the_most_probable(name, x64):
    """A loop over whole sequences, padded: what stands behind a position does not matter."""
    model, length = make(name, depth=2), 3
    sequence = np.zeros((B, length + COUNT), np.int32)
    sequence[:, :length] = tokens(length)
    for t in range(length, length + COUNT):
        logits = np.asarray(call(model, jnp.asarray(sequence)))
        sequence[:, t] = logits[:, t - 1].argmax(-1)
    got = generate(model, tokens(length), COUNT, key=KEY, temperature=0.0)
    np.testing.assert_array_equal(got.tokens, sequence[:, length:])
    one = generate(model, tokens(length), COUNT, key=KEY, top_k=1)
    np.testing.assert_array_equal(one.tokens, got.tokens)


@pytest.fixture(scope="module")
def quick():
    return make("tied_transformer", depth=1, dtype=jnp.float32, positions="none")


def test_keys_decide(quick):
    first, again, other = (
        generate(quick, tokens(2, batch=40), 3, key=key).tokens
        for key in (KEY, KEY, jax.random.key(4))
    )
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).mean() > 0.2
    # Sequences of a batch are drawn independently, and so are tokens.
    same_prompt = jnp.zeros((40, 2), jnp.int32)
    drawn = np.asarray(generate(quick, same_prompt, 3, key=KEY).tokens)
    assert len({tuple(row) for row in drawn}) > 10


def test_temperature_and_top_k_reach_the_draws(quick):
    prompt, settings = tokens(2, batch=40), {"temperature": 3.0, "top_k": 2}
    got = generate(quick, prompt, 3, key=KEY, **settings)
    keys = jax.random.split(KEY, 3)
    for t in range(3):
        expected = sample(keys[t], got.logits[:, t], 3.0, 2)
        np.testing.assert_array_equal(got.tokens[:, t], expected)


def test_one_token_needs_no_further_reading(x64):
    model = make("deq_transformer")
    got = generate(model, tokens(3), 1, key=KEY)
    assert got.stats.iterations.shape == (B, 0)
    assert got.stats.evaluations.shape == (0,)
    np.testing.assert_allclose(got.logits[:, 0], call(model, tokens(3))[:, -1], atol=1e-9)


def test_the_model_is_left_as_it_is():
    model = make("tied_trellis", depth=1, dropout=0.5, dtype=jnp.float32)
    model.eval()
    before = values(model)
    generate(model, tokens(2), 2, key=KEY)
    for a, b in zip(before, values(model), strict=True):
        np.testing.assert_array_equal(a, b)


def values(model):
    """Parameters, and how often each random stream was used."""
    return jax.tree.map(np.array, jax.tree.leaves(nnx.state(model, (nnx.Param, nnx.RngCount))))


def test_tokens_may_come_in_any_integers():
    """Those that are drawn are not cut to the prompt's dtype."""
    model = MODELS["tied_trellis"](300, 4, 4, depth=1, rngs=nnx.Rngs(0))
    model.bias[...] = model.bias[...].at[290].set(100.0)
    got = generate(model, jnp.ones((1, 2), jnp.uint8), 3, key=KEY)
    assert got.tokens.dtype == jnp.int32
    np.testing.assert_array_equal(got.tokens, [[290, 290, 290]])


# Draws.

LOGITS = np.array([0.3, -1.0, 2.0, 1.1, -4.0, 1.0])


def frequencies(temperature, top_k, draws=20_000):
    logits = jnp.broadcast_to(jnp.asarray(LOGITS, jnp.float32), (draws, len(LOGITS)))
    drawn = np.asarray(sample(jax.random.key(0), logits, temperature, top_k))
    assert drawn.dtype == np.int32
    return np.bincount(drawn, minlength=len(LOGITS)), draws


@pytest.mark.parametrize(
    ("temperature", "top_k"), [(1.0, None), (0.5, None), (3.0, None), (1.0, 3)]
)
def test_draws_follow_the_softmax(temperature, top_k):
    counts, draws = frequencies(temperature, top_k)
    allowed = np.argsort(-LOGITS)[:top_k]
    weights = np.zeros(len(LOGITS))
    weights[allowed] = np.exp(LOGITS[allowed] / temperature)
    expected = draws * weights / weights.sum()
    assert not counts[expected == 0].any()
    likely = expected > 0
    chi_square = ((counts - expected)[likely] ** 2 / expected[likely]).sum()
    # 99.9 % of draws from the law stay below 20.5 with 5 degrees of freedom.
    assert chi_square < 20.5


def test_draws_at_the_border():
    logits = jnp.asarray([[1.0, 3.0, 2.0, 3.0], [0.0, -1.0, 5.0, 4.0]])
    keys = jax.random.split(KEY, 200)
    drawn = jax.vmap(lambda key: sample(key, logits, 1.0, 1))(keys)
    assert set(np.unique(drawn[:, 0])) == {1, 3}  # equal ones stay
    assert set(np.unique(drawn[:, 1])) == {2}
    np.testing.assert_array_equal(sample(KEY, logits, 0.0), [1, 2])
    np.testing.assert_array_equal(sample(KEY, logits, 0.0, 3), [1, 2])
    half = sample(KEY, logits.astype(jnp.bfloat16), 0.5, 1)
    assert half.dtype == jnp.int32
    assert half[1] == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"prompt": np.zeros((2, 0), np.int32)}, r"prompt must be \[B, P\] and not empty, got"),
        ({"prompt": np.zeros(3, np.int32)}, r"prompt must be \[B, P\] and not empty, got \[3\]"),
        ({"temperature": -1.0}, "temperature must be finite and at least 0, got -1.0"),
        ({"temperature": float("nan")}, "temperature must be finite and at least 0, got nan"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_k": V + 1}, f"top_k must be at most the vocabulary's {V}, got {V + 1}"),
        ({"cache_size": 0}, "cache_size must be at least 1, got 0"),
        ({"prompt": np.zeros((1, 2), np.float32)}, "prompt must be integers, got float32"),
    ],
)
def test_bad_arguments_are_named(settings, message, quick):
    error = TypeError if "integers" in message else ValueError
    settings = {"prompt": tokens(2), "count": 2, "key": KEY} | settings
    with pytest.raises(error, match=message):
        generate(quick, **settings)
