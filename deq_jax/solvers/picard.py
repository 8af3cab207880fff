"""Picard iteration: apply f again and again."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real

PyTree = Any


class Patience(NamedTuple):
    """What a damping that decays remembers of each sample.

    Attributes:
        lowest: `[B]`, the smallest `‖f(z) - z‖` so far.
        waited: int32 `[B]`, evaluations since it fell.
        damping: `[B]`, τ.
    """

    lowest: jax.Array
    waited: jax.Array
    damping: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Picard:
    """Damped fixed-point iteration.

    The recurrence is

        z_{k+1} = τ f(z_k) + (1 - τ) z_k,    0 < τ <= 1.

    Converges locally if and only if every eigenvalue μ of ∂f/∂z has `|1 - τ + τ μ| < 1`: damping
    helps against eigenvalues that are large and negative or complex, never against real μ >= 1.
    The error shrinks by that factor a step. The residual is that of `f(z) - z` whatever τ is, not
    the length of the damped step.

    With `patience=p` each sample has a τ of its own, which begins at `damping` and is multiplied by
    `decay` whenever `‖f(z) - z‖` has not fallen below its smallest value for p evaluations. Against
    iterates that go round in circles (the patience of Fixed-Point
    Reasoners, arXiv:2606.18206).

    Attributes:
        damping: τ, a number in (0, 1].
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.
        patience: p, at least 1; None keeps τ as it is.
        decay: factor of τ, a number in (0, 1].

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    damping: Real = 1.0
    tol: Real = 1e-4
    max_iter: int = 100
    atol: Real = 0.0
    trace: bool = False
    patience: int | None = None
    decay: Real = 0.5

    def __post_init__(self) -> None:
        checks.check_number(self, "damping", above=0.0, at_most=1.0)
        checks.check_stopping(self)
        if self.patience is not None:
            checks.check_count(self, "patience")
        checks.check_number(self, "decay", above=0.0, at_most=1.0)

    def init(self, z: PyTree, fz: PyTree) -> Patience | tuple[()]:
        """Nothing to remember, unless the damping decays."""
        if self.patience is None:
            return ()
        zeros = tree.zeros_per_sample(z)
        damping = zeros + checks.in_dtype(self.damping, zeros.dtype)
        return Patience(zeros + jnp.inf, zeros.astype(jnp.int32), damping)

    def step(
        self, z: PyTree, fz: PyTree, state: Patience | tuple[()]
    ) -> tuple[PyTree, Patience | tuple[()]]:
        """`z + τ (f(z) - z)`."""
        if self.patience is not None and isinstance(state, Patience):
            difference = tree.subtract(fz, z)
            size = tree.safe_norm(lax.stop_gradient(difference))
            fell = size < state.lowest
            waited = jnp.where(fell, 0, state.waited + 1)
            decays = waited >= self.patience
            decay = checks.in_dtype(self.decay, size.dtype)
            damping = jnp.where(decays, state.damping * decay, state.damping)
            lowest = jnp.where(fell, size, state.lowest)
            state = Patience(lowest, jnp.where(decays, 0, waited), damping)
            return tree.add(z, tree.scale(damping, difference)), state
        if checks.is_exactly(self.damping, 1):
            return fz, state
        return tree.add(z, tree.scale(self.damping, tree.subtract(fz, z))), state
