"""Sampling from a sequence model, token by token."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_jax.checks import check_positive_integer
from deq_jax.models.segments import Reading
from deq_jax.models.sequence import SequenceModel
from deq_jax.stats import SolveStats
from deq_jax.tree import accumulation_dtype

PyTree = Any


class Generated(NamedTuple):
    """What `generate` returns.

    Attributes:
        tokens: `[B, count]` int32, without the prompt.
        logits: `[B, count, vocabulary]`, those that each token was drawn from, as the model gave
            them.
        stats: of the solve of each token but the last, which is not read: leaves
            `[B, count - 1]`, and `evaluations` `[count - 1]`. None for a model that solves nothing.
    """

    tokens: jax.Array
    logits: jax.Array
    stats: SolveStats | None


def generate(
    model: SequenceModel,
    prompt: jax.Array,
    count: int,
    *,
    key: jax.Array,
    temperature: float = 1.0,
    top_k: int | None = None,
    cache_size: int | None = None,
    warm_start: bool = True,
) -> Generated:
    """Goes on with a prompt.

    The prompt is read at once; then each token is an equilibrium of its own, `[B, 1, ...]`, given
    those before it, which do not depend on it. Equilibria of earlier positions are therefore never
    solved for again: what the cell makes of them (keys and values, say) is kept, and the logits are
    those of a solve of the whole sequence, up to the solver's tolerance.

    Args:
        model: the model, in evaluation mode; left as it is.
        prompt: `[B, P]` integers, at least one each.
        count: tokens to generate.
        key: random key of the draws.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: draw from the so many most probable tokens; None for all.
        cache_size: positions that are kept; None for all. With fewer, a token sees the last
            `cache_size` before it, and through them, as with segment memory, further back.
        warm_start: start each solve from the equilibrium of the token before.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """
    check_positive_integer("count", count)
    prompt = jnp.asarray(prompt)
    if not jnp.issubdtype(prompt.dtype, jnp.integer):
        raise TypeError(f"prompt must be integers, got {prompt.dtype}")
    if prompt.ndim != 2 or not prompt.size:
        raise ValueError(f"prompt must be [B, P] and not empty, got {list(prompt.shape)}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature!r}")
    if top_k is not None:
        check_positive_integer("top_k", top_k)
        if top_k > model.vocabulary_size:
            raise ValueError(
                f"top_k must be at most the vocabulary's {model.vocabulary_size}, got {top_k}"
            )
    if cache_size is None:
        cache_size = prompt.shape[1] + count
    check_positive_integer("cache_size", cache_size)
    # Of 8 bits, say, it could not hold every token that is drawn.
    prompt = prompt.astype(jnp.int32)
    definition, state = nnx.split(model)
    settings = count, top_k, cache_size, warm_start
    return _generate(definition, settings, state, prompt, key, jnp.float32(temperature))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    definition: Any,
    settings: tuple[int, int | None, int, bool],
    values: PyTree,
    prompt: jax.Array,
    key: jax.Array,
    temperature: jax.Array,
) -> Generated:
    count, top_k, cache_size, warm_start = settings

    def read(tokens: jax.Array, cache: PyTree = None, z0: PyTree = None) -> Reading:
        model = nnx.merge(definition, values, copy=True)
        return model.read(tokens, cache, z0, cache_size=cache_size)

    def draw(key: jax.Array, logits: jax.Array) -> jax.Array:
        return sample(key, logits, temperature, top_k)

    def last(state: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf[:, -1:], state)

    keys = jax.random.split(key, count)
    reading = read(prompt)
    logits = reading.logits[:, -1]
    first = draw(keys[0], logits)

    def step(carry: tuple[PyTree, ...], key: jax.Array) -> tuple[tuple[PyTree, ...], PyTree]:
        token, cache, z = carry
        reading = read(token[:, None], cache, z if warm_start else None)
        logits = reading.logits[:, -1]
        token = draw(key, logits)
        return (token, reading.cache, reading.state), (token, logits, reading.stats)

    carry = first, reading.cache, last(reading.state)
    _, (tokens, more, stats) = lax.scan(step, carry, keys[1:])
    tokens = jnp.concatenate([first[None], tokens]).swapaxes(0, 1)
    more = jnp.concatenate([logits[None], more]).swapaxes(0, 1)
    if stats is not None:
        per_sample = ("residual", "iterations", "status")
        swapped = {name: getattr(stats, name).swapaxes(0, 1) for name in per_sample}
        stats = stats._replace(**swapped)
    return Generated(tokens, more, stats)


def sample(
    key: jax.Array, logits: jax.Array, temperature: jax.Array | float, top_k: int | None = None
) -> jax.Array:
    """Draws from `softmax(logits / temperature)`, restricted to the `top_k` largest logits.

    Args:
        key: random key.
        logits: `[..., vocabulary]`.
        temperature: at least 0; 0 takes the largest.
        top_k: None for all. Of equal logits at the border all stay.

    Returns:
        int32 `[...]`.
    """
    logits = logits.astype(accumulation_dtype(logits.dtype))
    if top_k is not None:
        border = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < border, -jnp.inf, logits)
    temperature = jnp.asarray(temperature, logits.dtype)
    cold = temperature == 0
    drawn = jax.random.categorical(key, logits / jnp.where(cold, 1, temperature))
    return jnp.where(cold, logits.argmax(-1), drawn).astype(jnp.int32)
