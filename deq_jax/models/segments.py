"""What sequence models are given, and what reading returns."""

from typing import Any, NamedTuple

import jax

from deq_jax.stats import SolveStats

PyTree = Any


class Segment(NamedTuple):
    """Tokens of sequences, and what came before them.

    Attributes:
        tokens: `[B, L]` integers.
        memory: from `SequenceModel.initial_memory` or from the call for the segment before; None
            for the start of the sequences.
    """

    tokens: jax.Array
    memory: PyTree = None


class Reading(NamedTuple):
    """Logits of some tokens, and the cache with which the next tokens are read; see `read`.

    Attributes:
        logits: `[B, L, vocabulary]`.
        cache: for the next call.
        state: of the core, leaves `[B, L, ...]`; None where there is nothing to start a solve from.
        stats: of the solve; None where nothing is solved.
    """

    logits: jax.Array
    cache: PyTree
    state: PyTree
    stats: SolveStats | None


def as_segment(inputs: Segment | jax.Array) -> Segment:
    """Plain tokens are a segment without memory."""
    return inputs if isinstance(inputs, Segment) else Segment(inputs)
