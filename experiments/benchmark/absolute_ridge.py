"""Anderson with an absolute ridge in deq_jax's loop: to compare implementations at equal ridge."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import Anderson, columns, tree
from deq_jax.checks import register_options
from deq_jax.solvers.anderson import AndersonState

PyTree = Any


@register_options
@dataclasses.dataclass(frozen=True)
class AbsoluteRidgeAnderson(Anderson):
    """`(H + λ I) w = 1`, `α = w / Σ w`: the ridge of the tutorial, torchdeq and jaxopt.

    None of `Anderson`'s guards; its window and its incremental Gram matrix.

    Attributes:
        ridge: λ, in the units of a squared residual.
    """

    def step(self, z: PyTree, fz: PyTree, state: AndersonState) -> tuple[PyTree, AndersonState]:
        """See `Anderson.step`."""
        flat, target = tree.flatten_samples(z), tree.flatten_samples(fz)
        g = tree.subtract(target, flat)
        residuals = columns.store(state.residuals, g, state.slot)
        targets = columns.store(state.targets, target, state.slot)
        row = columns.inner_products(residuals, g).T
        gram = lax.dynamic_update_index_in_dim(state.gram, row, state.slot, 0)
        gram = lax.dynamic_update_index_in_dim(gram, row, state.slot, 1)
        slots = len(gram)
        newest = jnp.arange(slots, dtype=jnp.int32) == state.slot
        filled = state.filled | newest[:, None]

        identity = jnp.eye(slots, dtype=gram.dtype)[:, :, None]
        both = filled[:, None] & filled[None]
        matrix = jnp.where(both, gram + self.ridge * identity, identity).transpose(2, 0, 1)
        w = jnp.linalg.solve(matrix, filled.T.astype(gram.dtype)[..., None])[..., 0]
        proposal = columns.combine(w / w.sum(1, keepdims=True), targets)
        proposal = jax.tree.map(lambda p, z: p.reshape(z.shape), proposal, z)
        slot = (state.slot + 1) % slots
        return proposal, AndersonState(residuals, targets, gram, filled, state.lowest, slot)
