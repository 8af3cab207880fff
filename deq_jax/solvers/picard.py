"""Picard iteration: apply f again and again."""

import dataclasses
from typing import Any

from deq_jax import checks, tree
from deq_jax.checks import Real

PyTree = Any


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

    Attributes:
        damping: τ, a number in (0, 1].
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    damping: Real = 1.0
    tol: Real = 1e-4
    max_iter: int = 100
    atol: Real = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        checks.check_number(self, "damping", above=0.0, at_most=1.0)
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree) -> tuple[()]:
        """Picard remembers nothing."""
        return ()

    def step(self, z: PyTree, fz: PyTree, state: tuple[()]) -> tuple[PyTree, tuple[()]]:
        """`z + τ (f(z) - z)`."""
        if checks.is_exactly(self.damping, 1):
            return fz, state
        return tree.add(z, tree.scale(self.damping, tree.subtract(fz, z))), state
