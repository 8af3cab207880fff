"""The truncated Neumann series: a fixed number of products instead of a linear solve.

Source: Geng et al., "On training implicit models", 2021 (the Neumann-series phantom gradient).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.adjoint import Affine, attach
from deq_jax.checks import Real
from deq_jax.closure import Closure
from deq_jax.solve import Solver
from deq_jax.stats import BackwardProbe, Solution, SolveStats, Status

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Neumann:
    """Gradient by k terms of the (damped) Neumann series of `(I - Jᵀ)⁻¹`.

    With J = ∂f/∂z at the solution and a cotangent y, the cotangent handed to f is

        u = Σ_{t<k} w_t,    w_0 = τ y,    w_{t+1} = τ Jᵀ w_t + (1 - τ) w_t,

    for τ = 1 the series y + Jᵀ y + (Jᵀ)² y + ... Bias: the terms left out, of the order ρᵏ with ρ
    the spectral radius of `(1 - τ) I + τ J`; where ρ >= 1 the series does not converge and more
    terms make it worse. Cost: k products, one of them into params and x, and one linearisation.
    Memory does not depend on k.

    A `BackwardProbe` reports `‖Jᵀ u + y - u‖ / ‖y‖` at the cost of one more product, and the status
    `MAX_ITER`.

    Attributes:
        terms: k, at least 1; 1 with τ = 1 is `OneStep`.
        damping: τ in (0, 1].

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    terms: int = 5
    damping: Real = 1.0

    def __post_init__(self) -> None:
        checks.check_count(self, "terms")
        checks.check_number(self, "damping", above=0.0, at_most=1.0)

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> PyTree:
        """See `GradientPolicy`."""
        return attach(f, solution.value, Series(self.damping, self.terms), probe)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["damping"], meta_fields=["terms"])
@dataclasses.dataclass(frozen=True)
class Series:
    """`w = A w + b` approximated by `terms` terms of its series; an `Inverse`."""

    damping: Real
    terms: int

    def transposed(self) -> "Series":
        """See `Inverse`."""
        return self

    def __call__(self, system: Affine, report: bool) -> Solution:
        """See `Inverse`."""
        b, plain = system.b, checks.is_exactly(self.damping, 1)

        def add_term(_: Any, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
            term, total = carry
            # w_{t+1} = τ A w_t + (1 - τ) w_t.
            image = system.product(term)
            if not plain:
                kept = tree.scale(1 - self.damping, term)
                image = tree.add(tree.scale(self.damping, image), kept)
            return image, tree.add(total, image)

        first = b if plain else tree.scale(self.damping, b)
        _, w = lax.fori_loop(0, self.terms - 1, add_term, (first, first))
        return Solution(w, self._stats(system, w, report))

    def _stats(self, system: Affine, w: PyTree, report: bool) -> SolveStats:
        size = tree.safe_norm(system.b)
        residual = jnp.full_like(size, jnp.nan)
        if report:
            residual = tree.safe_norm(tree.subtract(system(w), w))
            residual = residual / jnp.where(size > 0, size, 1)
        count = tree.zeros_per_sample(system.b).astype(jnp.int32)
        status = jnp.where(size == 0, int(Status.CONVERGED), int(Status.MAX_ITER))
        status = jnp.where(jnp.isfinite(tree.safe_norm(w)), status, int(Status.DIVERGED))
        iterations = count + (self.terms - 1)
        return SolveStats(
            residual, iterations, count + status, iterations.max() + jnp.int32(report)
        )
