"""`lax.while_loop` out of scans, which can be differentiated in reverse."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from deq_jax import _compat

PyTree = Any


def while_as_scans(
    proceed: Callable[[PyTree], jax.Array],
    body: Callable[[PyTree], PyTree],
    start: PyTree,
    length: int,
) -> PyTree:
    """`lax.while_loop(proceed, body, start)` of at most `length` trips.

    Two levels of about √length trips, both checkpointed: backpropagation stores 2 √length carries
    and the insides of one trip, and computes every trip twice more.
    """
    # Where a `cond` may not save what f makes, it saves only its input and computes f once more.
    insides = body if _compat.cond_saves() else jax.checkpoint(body, prevent_cse=False)

    def trip(carry: PyTree, _: None) -> tuple[PyTree, None]:
        return lax.cond(proceed(carry), insides, lambda carry: carry, carry), None

    inner = math.isqrt(length - 1) + 1

    def block(carry: PyTree, _: None) -> tuple[PyTree, None]:
        return lax.scan(jax.checkpoint(trip, prevent_cse=False), carry, length=inner)

    block = jax.checkpoint(block, prevent_cse=False)
    return lax.scan(block, start, length=-(-length // inner))[0]
