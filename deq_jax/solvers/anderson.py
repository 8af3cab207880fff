"""Anderson acceleration (type II) with a ridge relative to the Gram matrix.

Sources: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011; the DEQ chapter
of the Deep Implicit Layers tutorial, whose absolute ridge is what this file does not do: as soon
as squared residuals fall below such a ridge, the weights tend to 1/n and the method averages its
window instead of extrapolating.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from deq_jax import checks, tree
from deq_jax.solvers import columns

PyTree = Any

_STAGNATION = 0.01
"""A proposal closer to z than this times ‖g‖ is replaced by the plain step z + β g."""

_BLOW_UP = 1e3
"""A residual this many times the lowest one seen empties the window."""


class AndersonState(NamedTuple):
    """The window, a ring of `history` slots in any order.

    Attributes:
        residuals: leaves `[B, history, D]`, `g_i = f(z_i) - z_i`.
        targets: leaves `[B, history, D]`, `z_i + β g_i`.
        gram: `[B, history, history]`, `⟨g_i, g_j⟩`, at least float32.
        filled: `[B, history]`, the slot holds a pair of this sample's window.
        lowest: `[B]`, lowest `‖g‖` so far.
        slot: int32, the slot to overwrite next.
    """

    residuals: PyTree
    targets: PyTree
    gram: jax.Array
    filled: jax.Array
    lowest: jax.Array
    slot: jax.Array


@dataclasses.dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: the best combination of the last m points, then a mixed step.

    With g_i = f(z_i) - z_i over the window of the last n = min(k + 1, m) points, per sample,

        α = argmin ‖Σ α_i g_i‖² + ρ Σ α_i² ‖g_i‖²   subject to   Σ α_i = 1
        z_{k+1} = Σ α_i (z_i + β g_i)

    in closed form: `(H + ρ diag H) w = 1`, `α = w / Σ w` with the Gram matrix `H_ij = ⟨g_i, g_j⟩`.
    The ridge is proportional to H, so f and its rescaled twin `s f(z / s)` take the same steps at
    every scale s; scaled to unit diagonal, the matrix is factorised by Cholesky. One new pair
    changes one row of H: m inner products an iteration. Acceleration starts at the second point.

    Guards, each per sample: a proposal that hardly moves gives way to the plain step `z + β g`; a
    factorisation that fails, or a residual far above the best one, empties the window down to
    its newest pair. Nothing raises.

    Memory: 2 m states.

    Attributes:
        history: m, at least 1; 1 is the plain step `z + β g`.
        mixing: β > 0; below 1 damped, above 1 overprojected.
        ridge: ρ >= 0, dimensionless; raised to the rounding level of the Gram matrix where it is
            smaller.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    history: int = 5
    mixing: float = 1.0
    ridge: float = 1e-4
    tol: float = 1e-4
    max_iter: int = 50
    atol: float = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        checks.check_count(self, "history")
        checks.check_number(self, "mixing", above=0.0)
        checks.check_number(self, "ridge", at_least=0.0)
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree) -> AndersonState:
        """An empty window."""
        zeros = tree.zeros_per_sample(z)

        flat = tree.flatten_samples(z)
        row = zeros[:, None] + jnp.zeros(self.history, zeros.dtype)
        return AndersonState(
            residuals=columns.empty(flat, self.history),
            targets=columns.empty(flat, self.history),
            gram=row[:, :, None] + jnp.zeros(self.history, zeros.dtype),
            filled=row > 0,
            lowest=zeros + jnp.inf,
            slot=zeros.sum().astype(jnp.int32),
        )

    def step(self, z: PyTree, fz: PyTree, state: AndersonState) -> tuple[PyTree, AndersonState]:
        """Stores the pair of `z` and proposes the minimiser of the window, mixed."""
        original = z
        z, fz = tree.flatten_samples(z), tree.flatten_samples(fz)
        g = tree.subtract(fz, z)
        plain = fz if self.mixing == 1.0 else tree.add(z, tree.scale(self.mixing, g))
        residuals = columns.store(state.residuals, g, state.slot)
        targets = columns.store(state.targets, plain, state.slot)

        row = columns.inner_products(residuals, g)
        gram = lax.dynamic_update_index_in_dim(state.gram, row, state.slot, 1)
        gram = lax.dynamic_update_index_in_dim(gram, row, state.slot, 2)
        # What only decides has no derivative: that of a root at zero would be infinite.
        size = lax.stop_gradient(row)
        size = jnp.sqrt(lax.dynamic_index_in_dim(size, state.slot, 1, keepdims=False))
        newest = jnp.arange(self.history, dtype=state.slot.dtype) == state.slot
        blown_up = size > _BLOW_UP * state.lowest
        filled = newest | (state.filled & ~blown_up[:, None])

        weights, solved = _minimiser(gram, filled, self.ridge)
        weights = jnp.where(solved[:, None], weights, newest.astype(weights.dtype))
        proposal = columns.combine(weights, targets)
        moved = tree.norm(lax.stop_gradient(tree.subtract(proposal, z)))
        proposal = tree.where(moved < _STAGNATION * size, plain, proposal)
        proposal = jax.tree.map(lambda p, z: p.reshape(z.shape), proposal, original)
        return proposal, AndersonState(
            residuals=residuals,
            targets=targets,
            gram=gram,
            filled=newest | (filled & solved[:, None]),
            lowest=jnp.minimum(state.lowest, size),
            slot=(state.slot + 1) % self.history,
        )


def _minimiser(gram: jax.Array, filled: jax.Array, ridge: float) -> tuple[jax.Array, jax.Array]:
    """Weights `[B, m]` of the window's smallest residual, and where `[B]` they could be had.

    Rows and columns are scaled to a unit diagonal, which makes the ridge relative and keeps pairs
    of very different size apart from rounding. An empty slot becomes a row of the identity with
    right-hand side 0: weight 0 at a static shape.
    """
    slots = gram.shape[-1]
    diagonal = jnp.diagonal(gram, axis1=1, axis2=2)
    usable = filled & (diagonal > 0)
    scale = jnp.where(usable, lax.rsqrt(jnp.where(usable, diagonal, 1)), 0)
    correlation = jnp.where(
        usable[:, :, None] & usable[:, None, :],
        gram * scale[:, :, None] * scale[:, None, :],
        0,
    )
    # Rounding leaves an error of about m ε in the scaled matrix; below it a ridge does nothing.
    ridge = max(ridge, 2 * slots * float(jnp.finfo(gram.dtype).eps))
    identity = jnp.eye(slots, dtype=gram.dtype)
    matrix = correlation * (1 - identity) + (1 + ridge) * identity
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    w = scale * cho_solve((factor, True), scale[..., None])[..., 0]
    total = w.sum(1, keepdims=True)
    weights = w / jnp.where(total > 0, total, 1)
    solved = jnp.isfinite(weights).all(1) & (total[:, 0] > 0)
    return weights, solved
