"""The DEQ-Transformer, a language model that is one block at its equilibrium, and its controls.

Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.attention import (
    KeyValues,
    Memory,
    Norm,
    SequenceInput,
    extend_memory,
    normalise,
)
from deq_jax.cells.transformer import TransformerCell
from deq_jax.checks import check_count
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.sequence import EquilibriumSequenceModel, SequenceModel, UnrolledSequenceModel
from deq_jax.nnx import DEQ
from deq_jax.solve import Solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.stability.normalization import Normalization

PyTree = Any


class _Transformer(SequenceModel):
    """What the models of this file have in common. See `DEQTransformer`."""

    def _make_cells(
        self,
        count: int,
        vocabulary_size: int,
        features: int,
        heads: int,
        hidden_features: int,
        *,
        tied: bool = True,
        dropout: float = 0.0,
        memory_size: int = 0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **cell: Any,
    ) -> list[TransformerCell]:
        """Makes everything around the core, and `count` cells for it."""
        SequenceModel.__init__(
            self,
            vocabulary_size,
            features,
            features,
            tied=tied,
            dropout=dropout,
            memory_size=memory_size,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        options = {"dropout": dropout, "param_dtype": param_dtype, "rngs": rngs, **cell}
        cells = [TransformerCell(features, heads, hidden_features, **options) for _ in range(count)]
        # Post-norm ends with a norm already.
        self.final_norm: Norm | None = None if cells[0].norm_order == "post" else cells[0].norm
        return cells

    def _segment(self, embedding: jax.Array, memory: PyTree) -> SequenceInput:
        return SequenceInput(embedding, memory)

    def _output(self, state: jax.Array) -> jax.Array:
        return state if self.final_norm is None else normalise(state, self.final_norm)

    def _nothing(self, batch: int) -> Memory:
        shape, dtype = (batch, self.memory_size, self.features), self.embedding[...].dtype
        # A buffer each: a training step donates its memory, and no buffer can be donated twice.
        zeros = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
        return Memory(*zeros, jnp.zeros((batch,), jnp.int32))

    def _remember(self, cell: TransformerCell, x: SequenceInput, state: jax.Array) -> Memory:
        newer = Memory(state.astype(x.embedding.dtype), x.embedding)
        return extend_memory(cast(Memory | None, x.memory), newer, self.memory_size)

    def _cache(
        self, cell: TransformerCell, x: SequenceInput, state: jax.Array, size: int
    ) -> KeyValues:
        newer = cell.key_values(Memory(state.astype(x.embedding.dtype), x.embedding))
        return extend_memory(cast(KeyValues | None, x.memory), newer, size)


class DEQTransformer(_Transformer, EquilibriumSequenceModel):
    """A causal language model whose core is the equilibrium of one Transformer block.

        logits = E z* + b,    z* = cell(z*, √D E[tokens])

    Args:
        vocabulary_size: number of tokens.
        features: D, width of embedding and state.
        heads: attention heads.
        hidden_features: width inside the feed-forward block.
        solver: as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
        normalization: of the cell's kernels, as for `deq_jax.nnx.DEQ`.
        **network: as for all models of this file:
            tied: the head has the weights of the embedding (True by default);
            dropout: rate of variational dropout, in the cell and around it;
            memory_size: positions of earlier segments that are kept, see `Segment`; 0 by default;
            param_dtype: dtype of the parameters;
            rngs: stream `params`, and `dropout` where there is dropout;
            and the other options of `TransformerCell`: positions, norm, window and so on.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        heads: int,
        hidden_features: int,
        *,
        solver: Solver = Anderson(tol=1e-2, max_iter=25),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        normalization: Normalization | None = None,
        **network: Any,
    ):
        sizes = vocabulary_size, features, heads, hidden_features
        (cell,) = self._make_cells(1, *sizes, **network)
        self.core = DEQ(
            cell,
            solver=solver,
            gradient=gradient,
            execution=execution,
            normalization=normalization,
        )


class WeightTiedTransformer(_Transformer, UnrolledSequenceModel):
    """Control: `depth` applications of one block from z = 0, ordinary backpropagation.

    As many parameters as `DEQTransformer`; memory grows with `depth`.

    Args:
        vocabulary_size: as for `DEQTransformer`.
        features: likewise.
        heads: likewise.
        hidden_features: likewise.
        depth: number of applications.
        remat: compute each application again in the backward pass instead of keeping what is
            inside it.
        **network: as for `DEQTransformer`.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        heads: int,
        hidden_features: int,
        *,
        depth: int = 8,
        remat: bool = False,
        **network: Any,
    ):
        self.depth, self.remat = depth, remat
        check_count(self, "depth")
        sizes = vocabulary_size, features, heads, hidden_features
        self.cells = nnx.List(self._make_cells(1, *sizes, **network))


class ExplicitTransformer(_Transformer, UnrolledSequenceModel):
    """Control: `depth` blocks with weights of their own, each given the embedding.

    Args:
        vocabulary_size: as for `DEQTransformer`.
        features: likewise.
        heads: likewise.
        hidden_features: likewise.
        depth: number of blocks.
        remat: as for `WeightTiedTransformer`.
        **network: as for `DEQTransformer`.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        heads: int,
        hidden_features: int,
        *,
        depth: int = 8,
        remat: bool = False,
        **network: Any,
    ):
        self.depth, self.remat = depth, remat
        check_count(self, "depth")
        sizes = vocabulary_size, features, heads, hidden_features
        self.cells = nnx.List(self._make_cells(depth, *sizes, **network))
