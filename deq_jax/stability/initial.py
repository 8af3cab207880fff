"""Where a solve starts: states to pass as `z0`.

The equilibrium and its gradient do not depend on the start, if there is one equilibrium; the
number of evaluations does. Leaving `z0` out starts from zeros.
"""

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.closure import call_checked, initial_state

PyTree = Any


def one_application(
    f: Callable[[PyTree, PyTree, PyTree], PyTree], params: PyTree, x: PyTree, z0: PyTree = None
) -> PyTree:
    """`f(params, z0, x)`, z0 zeros shaped like x if left out; no gradient flows through it.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`.
    """
    z0 = initial_state(x, z0, batched=False)
    return lax.stop_gradient(call_checked(f, params, z0, x))


def mixed_initial(key: jax.Array, like: PyTree, probability: float = 0.5) -> PyTree:
    """Random starts: each entry N(0, 1) with a probability, else 0.

    Trained from such starts a model learns to end in the same place wherever it begins (path
    independence), and gains from more iterations at test time than it was trained with.

    Args:
        key: random key; another one each step.
        like: a pytree of arrays or shapes, real and floating.
        probability: that an entry is not 0.

    Raises:
        ValueError: `probability` is not in [0, 1].

    Source: Anil et al., "Path independent equilibrium models can better exploit test-time
    computation", 2022, arXiv 2211.09961.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability!r}")
    leaves, structure = jax.tree.flatten(like)

    def draw(key: jax.Array, leaf: Any) -> jax.Array:
        values, choice = jax.random.split(key)
        normal = jax.random.normal(values, leaf.shape, leaf.dtype)
        return jnp.where(jax.random.bernoulli(choice, probability, leaf.shape), normal, 0 * normal)

    keys = jax.random.split(key, len(leaves))
    drawn = [draw(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def warm_start(
    previous: PyTree, fresh: PyTree | None = None, *, keep: jax.Array | None = None
) -> PyTree:
    """The solution of the last solve as a start, for a sequence of inputs that change slowly.

    For use in a Python loop or as the carry of a `lax.scan` over time steps.

    Args:
        previous: the last solution, leaves `[B, ...]`.
        fresh: what to start from instead; zeros if left out.
        keep: `[B]` boolean, samples that go on from `previous`, such as `~episode_ended`. A sample
            with a NaN or an infinity in it is always started afresh.

    Returns:
        Like `previous`, without gradient.
    """
    previous = lax.stop_gradient(previous)
    fresh = jax.tree.map(jnp.zeros_like, previous) if fresh is None else lax.stop_gradient(fresh)
    usable = jnp.isfinite(tree.largest(previous))
    return tree.where(usable if keep is None else usable & keep, previous, fresh)


def initializer_loss(initial: PyTree, equilibrium: PyTree) -> jax.Array:
    """`mean |z_0 - z*|` over all entries: what a learned initialiser is trained with.

    z* is taken as a constant. A solve gives its start a zero gradient, so this term is all that
    an initialiser learns from; add it to the loss with a weight.

    Args:
        initial: z_0, what the initialiser gave; leaves `[B, ...]`.
        equilibrium: z*, like `initial`.

    Source: Pal, Edelman and Rackauckas, "Continuous deep equilibrium models: training neural ODEs
    faster by integrating them to infinity", 2022, arXiv 2201.12240 (SkipDEQ).
    """
    distances = jax.tree.map(
        lambda a, b: jnp.abs(a - b).astype(tree.accumulation_dtype(a.dtype)),
        initial,
        lax.stop_gradient(equilibrium),
    )
    leaves = jax.tree.leaves(distances)
    total = cast(jax.Array, sum(leaf.sum() for leaf in leaves))
    return total / sum(leaf.size for leaf in leaves)
