"""Fixed-point correction: losses on states along the way to the equilibrium.

A loss on the equilibrium alone says nothing about how to get there. A loss on a few states of the
solver's trajectory as well, weighted the less the earlier they are, teaches the cell to be near
the answer soon. The states come from `deq_fixed_point(..., sample_at=...)`, each with a gradient of
its own.

Source: Bai, Geng, Savani and Kolter, "Deep equilibrium optical flow estimation", 2022, arXiv
2204.08442; weights as in TorchDEQ.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import jax

from deq_jax import checks

PyTree = Any


def evenly_spaced(max_iter: int, states: int) -> tuple[int, ...]:
    """Evaluations at which to sample so that, with the final one, there are `states` states.

    `⌊max_iter / states⌋ · k` for k = 1, ..., states - 1; for `sample_at`.

    Args:
        max_iter: most evaluations of the solver.
        states: number of states, the final one included; 1 samples nothing.

    Raises:
        TypeError: they are not integers.
        ValueError: they are below 1, or there are more states than evaluations.
    """
    checks.check_positive_integer("max_iter", max_iter)
    checks.check_positive_integer("states", states)
    if states > max_iter:
        raise ValueError(f"states must be at most max_iter={max_iter}, got {states}")
    return tuple(max_iter // states * k for k in range(1, states))


def correction_weights(states: int, gamma: float = 0.8) -> tuple[float, ...]:
    """`γ^(n-1-i)` for i = 0, ..., n-1: 1 for the last state, less for those before.

    Raises:
        TypeError: `states` is not an integer.
        ValueError: `states` is below 1, or `gamma` is not in [0, 1].
    """
    checks.check_positive_integer("states", states)
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be in [0, 1], got {gamma!r}")
    return tuple(gamma ** (states - 1 - i) for i in range(states))


def corrected_loss(
    loss: Callable[[PyTree], jax.Array], states: Sequence[PyTree], gamma: float = 0.8
) -> jax.Array:
    """`Σ_i γ^(n-1-i) loss(z_i)` over states in the order of the trajectory, the answer last.

    Not divided by the sum of the weights, as in the paper: with `gamma=0` it is the loss alone.

    Args:
        loss: of one state.
        states: z_0, ..., z_{n-1}, such as `(*samples, z)`.
        gamma: see above.

    Raises:
        ValueError: there are no states, or `gamma` is not in [0, 1].
    """
    if not states:
        raise ValueError("states must hold at least the final one, got none")
    weights = correction_weights(len(states), gamma)
    terms = [weight * loss(z) for weight, z in zip(weights, states, strict=True)]
    return cast(jax.Array, sum(terms))  # there is a term, so it is no integer
