"""The DEQ-TrellisNet, an equilibrium of a temporal convolution with gates, and its controls.

Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019; "Trellis networks for sequence
modeling", 2019.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.trellis import TrellisCell, TrellisHistory, TrellisInput, TrellisState
from deq_jax.checks import check_count
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.sequence import EquilibriumSequenceModel, SequenceModel, UnrolledSequenceModel
from deq_jax.nnx import DEQ
from deq_jax.solve import Solver
from deq_jax.solvers.broyden import Broyden
from deq_jax.stability.normalization import Normalization

PyTree = Any


class _TrellisNet(SequenceModel):
    """What the models of this file have in common. See `DEQTrellisNet`."""

    def _make_cells(
        self,
        count: int,
        vocabulary_size: int,
        features: int,
        hidden_features: int,
        *,
        output_features: int | None = None,
        tied: bool = True,
        dropout: float = 0.0,
        memory_size: int = 0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **cell: Any,
    ) -> list[TrellisCell]:
        """Makes everything around the core, and `count` cells for it."""
        output_features = features if output_features is None else output_features
        if output_features > hidden_features:
            raise ValueError(
                f"output_features={output_features} must be at most "
                f"hidden_features={hidden_features}, of which they are the last"
            )
        SequenceModel.__init__(
            self,
            vocabulary_size,
            features,
            output_features,
            tied=tied,
            dropout=dropout,
            memory_size=memory_size,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.hidden_features, self.output_features = hidden_features, output_features
        options = {"dropout": dropout, "param_dtype": param_dtype, "rngs": rngs, **cell}
        cells = [TrellisCell(features, hidden_features, **options) for _ in range(count)]
        self.reach = cells[0].reach
        return cells

    def _segment(self, embedding: jax.Array, memory: TrellisHistory | None) -> TrellisInput:
        return TrellisInput(embedding, memory)

    def _output(self, state: TrellisState) -> jax.Array:
        return state.h[..., -self.output_features :]

    def _nothing(self, batch: int) -> TrellisHistory:
        dtype = self.embedding[...].dtype
        widths = self.hidden_features, self.hidden_features, self.features
        return TrellisHistory(*(jnp.zeros((batch, self.reach, width), dtype) for width in widths))

    def _remember(self, cell: TrellisCell, x: TrellisInput, state: TrellisState) -> TrellisHistory:
        dtype = x.x.dtype
        return cell.history(x, TrellisState(state.h.astype(dtype), state.c.astype(dtype)))

    def _cache(
        self, cell: TrellisCell, x: TrellisInput, state: TrellisState, size: int
    ) -> TrellisHistory:
        return self._remember(cell, x, state)


class DEQTrellisNet(_TrellisNet, EquilibriumSequenceModel):
    """A causal language model whose core is the equilibrium of one TrellisNet layer.

        logits = E h* + b,    (h*, c*) = cell((h*, c*), √D E[tokens])

    with the last D channels of h*. What a position has learned reaches the next one with the next
    evaluation, so that about as many are needed as the network should look back.

    Args:
        vocabulary_size: number of tokens.
        features: D, width of the embedding.
        hidden_features: width of h and c.
        solver: as for `deq_fixed_point`; the paper's Broyden by default.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
        normalization: of the cell's kernels, as for `deq_jax.nnx.DEQ`.
        **network: as for all models of this file:
            output_features: channels of h that the head is given, the last ones; D by default;
            tied: the head has the weights of the embedding (True by default);
            dropout: rate of variational dropout, in the cell and around it;
            memory_size: 1 to keep the end of a segment for the next one, see `Segment`; however
                large, it is the cell's reach that is kept; 0, the default, for none;
            param_dtype: dtype of the parameters;
            rngs: stream `params`, and `dropout` where there is dropout;
            and the other options of `TrellisCell`: kernel_size, dilation, kernel_std.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        hidden_features: int,
        *,
        solver: Solver = Broyden(tol=1e-2, max_iter=25),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        normalization: Normalization | None = None,
        **network: Any,
    ):
        (cell,) = self._make_cells(1, vocabulary_size, features, hidden_features, **network)
        self.core = DEQ(
            cell,
            solver=solver,
            gradient=gradient,
            execution=execution,
            normalization=normalization,
        )


class WeightTiedTrellisNet(_TrellisNet, UnrolledSequenceModel):
    """Control, and the TrellisNet itself: `depth` applications of one layer from z = 0.

    Args:
        vocabulary_size: as for `DEQTrellisNet`.
        features: likewise.
        hidden_features: likewise.
        depth: number of applications.
        remat: compute each application again in the backward pass instead of keeping what is
            inside it.
        **network: as for `DEQTrellisNet`.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        hidden_features: int,
        *,
        depth: int = 8,
        remat: bool = False,
        **network: Any,
    ):
        self.depth, self.remat = depth, remat
        check_count(self, "depth")
        sizes = vocabulary_size, features, hidden_features
        self.cells = nnx.List(self._make_cells(1, *sizes, **network))


class ExplicitTrellisNet(_TrellisNet, UnrolledSequenceModel):
    """Control: `depth` layers with weights of their own, each given the embedding.

    Args:
        vocabulary_size: as for `DEQTrellisNet`.
        features: likewise.
        hidden_features: likewise.
        depth: number of layers.
        remat: as for `WeightTiedTrellisNet`.
        **network: as for `DEQTrellisNet`.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        hidden_features: int,
        *,
        depth: int = 8,
        remat: bool = False,
        **network: Any,
    ):
        self.depth, self.remat = depth, remat
        check_count(self, "depth")
        sizes = vocabulary_size, features, hidden_features
        self.cells = nnx.List(self._make_cells(depth, *sizes, **network))
