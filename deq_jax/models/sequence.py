"""What sequence models have in common: tokens in, logits out, and a core made of one cell between.

    embedding - core - output of the state - head

The core is an equilibrium of the cell (`EquilibriumSequenceModel`), or the cell applied k times
from zero, with the same weights or with weights of its own each time (`UnrolledSequenceModel`).
`deq_transformer` and `deq_trellis` say which cell.

A model may have a memory: states of one segment that the next segment of the same sequences reads.
"""

import math
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.attention import dropped
from deq_jax.checks import check_positive_integer, check_range
from deq_jax.models.applications import SequenceCell, apply_in_turn
from deq_jax.models.segments import Reading, Segment, as_segment
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.stability.dropout import broadcast_axes
from deq_jax.stats import BackwardProbe

PyTree = Any


class SequenceModel(nnx.Module):
    """Everything around the core. See the module's docstring.

    The embedding of a token is its row of E, of standard deviation `1 / √D` at first, times √D.
    The head's logits are `E h + b`, if it is tied to the embedding, or `W h + b`.

    Args:
        vocabulary_size: number of tokens.
        features: D, width of the embedding.
        output_features: width of what the head is given.
        tied: the head has the embedding's weights; needs `output_features == features`.
        dropout: rate of variational dropout behind the embedding and in front of the head: of whole
            channels, the same at all positions.
        memory_size: positions of earlier segments that are kept; 0 for none.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        output_features: int,
        *,
        tied: bool,
        dropout: float,
        memory_size: int,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        check_positive_integer("vocabulary_size", vocabulary_size)
        check_positive_integer("features", features)
        check_positive_integer("output_features", output_features)
        check_range("memory_size", memory_size, at_least=0)
        if memory_size:
            check_positive_integer("memory_size", memory_size)
        check_range("dropout", dropout, at_least=0, at_most=1)
        if tied and output_features != features:
            raise ValueError(
                f"a tied head needs output_features={output_features} to be features={features}"
            )
        self.vocabulary_size, self.features = vocabulary_size, features
        self.memory_size = memory_size
        normal = nnx.initializers.normal(1 / math.sqrt(features))
        shape = (vocabulary_size, features)
        names = logical_axes("vocab", "embed")
        self.embedding = nnx.Param(normal(rngs.params(), shape, param_dtype), **names)
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,), param_dtype))
        shape = (vocabulary_size, output_features)
        self.head = None if tied else nnx.Param(normal(rngs.params(), shape, param_dtype), **names)
        axes = broadcast_axes("channel", 3)

        # Without dropout there is no random stream, and no state besides the parameters.
        def drop() -> nnx.Dropout | None:
            return nnx.Dropout(dropout, broadcast_dims=axes, rngs=rngs) if dropout else None

        self.embedding_dropout, self.output_dropout = drop(), drop()

    def embed(self, tokens: jax.Array) -> jax.Array:
        """`[B, L, D]` of tokens `[B, L]`.

        Raises:
            ValueError, TypeError: tokens are not integers of that shape.
        """
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise TypeError(f"tokens must be integers, got {tokens.dtype}")
        if tokens.ndim != 2 or not tokens.size:
            raise ValueError(f"tokens must be [B, L] and not empty, got {list(tokens.shape)}")
        rows = self.embedding[...].at[tokens].get(mode="promise_in_bounds")
        return dropped(self.embedding_dropout, rows * math.sqrt(self.features))

    def classify(self, state: PyTree) -> jax.Array:
        """Logits `[B, L, vocabulary]` from the core's state."""
        weights = (self.embedding if self.head is None else self.head)[...]
        h = dropped(self.output_dropout, self._output(state).astype(weights.dtype))
        return h @ weights.T + self.bias[...]

    def initial_memory(self, batch: int) -> PyTree:
        """Memory of nothing, for the first segment of `batch` sequences; None without memory."""
        raise NotImplementedError

    def read(
        self, tokens: jax.Array, cache: PyTree = None, z0: PyTree = None, *, cache_size: int
    ) -> Reading:
        """Logits of tokens that follow those read so far, for decoding.

        Args:
            tokens: `[B, L]`.
            cache: of the call before; None for the start of the sequences.
            z0: a start of the solve, leaves `[B, L, ...]`; zeros if left out.
            cache_size: positions to keep.
        """
        raise NotImplementedError

    # What depends on the kind of cell. A model's cells are of one kind, which its methods take.

    def _segment(self, embedding: jax.Array, memory: PyTree) -> PyTree:
        """What the cell's `inject` takes."""
        raise NotImplementedError

    def _output(self, state: PyTree) -> jax.Array:
        """What the head is given of a state, `[B, L, output_features]`."""
        raise NotImplementedError

    def _nothing(self, batch: int) -> PyTree:
        """Memory of nothing, of one application of the cell."""
        raise NotImplementedError

    def _remember(self, cell: Any, x: PyTree, state: PyTree) -> PyTree:
        """Memory of one application, for the segment behind x."""
        raise NotImplementedError

    def _cache(self, cell: Any, x: PyTree, state: PyTree, size: int) -> PyTree:
        """The same in the form that decoding keeps."""
        raise NotImplementedError


class EquilibriumSequenceModel(SequenceModel):
    """A sequence model whose core is an equilibrium of its cell.

    Attributes:
        core: the `deq_jax.nnx.DEQ` layer.
    """

    core: DEQ

    def __call__(
        self,
        inputs: Segment | jax.Array,
        *,
        return_stats: bool = False,
        return_memory: bool = False,
        backward_probe: BackwardProbe | None = None,
    ) -> Any:
        """Logits `[B, L, vocabulary]`; where asked for also stats, and the next segment's memory.

        Args:
            inputs: a segment; plain tokens `[B, L]` are one without memory.
            return_stats: return the solve's `SolveStats` as well.
            return_memory: return what the next segment is to be given as well.
            backward_probe: as for `deq_fixed_point`.
        """
        x = self.injection(inputs)
        z, stats = self.core(x, self.zeros(x), return_stats=True, backward_probe=backward_probe)
        returned: list[Any] = [self.classify(z)]
        returned += [stats] if return_stats else []
        returned += [self.memory(x, z)] if return_memory else []
        return returned[0] if len(returned) == 1 else tuple(returned)

    def injection(self, inputs: Segment | jax.Array) -> PyTree:
        """What the core is given."""
        tokens, memory = as_segment(inputs)
        return self._segment(self.embed(tokens), memory)

    def zeros(self, x: PyTree) -> PyTree:
        """The state that a solve starts from, where `x` is from `injection`."""
        return cast(SequenceCell, self.core.cell).zeros(x)

    def start(self, x: PyTree) -> PyTree:
        """Likewise; there is no learned start."""
        return self.zeros(x)

    def memory(self, x: PyTree, z: PyTree) -> PyTree:
        """What the segment behind x is given, from the equilibrium of x; without gradient."""
        if not self.memory_size:
            return None
        return self._remember(self.core.cell, *jax.lax.stop_gradient((x, z)))

    def initial_memory(self, batch: int) -> PyTree:
        """Memory of nothing, for the first segment of `batch` sequences; None without memory."""
        return self._nothing(batch) if self.memory_size else None

    def read(
        self, tokens: jax.Array, cache: PyTree = None, z0: PyTree = None, *, cache_size: int
    ) -> Reading:
        """As for any sequence model; `state` is the equilibrium."""
        x = self._segment(self.embed(tokens), cache)
        z, stats = self.core(x, self.zeros(x) if z0 is None else z0, return_stats=True)
        cache = self._cache(self.core.effective_cell(), x, z, cache_size)
        return Reading(self.classify(z), cache, z, stats)


class UnrolledSequenceModel(SequenceModel):
    """Control: the cell applied `depth` times from zero, ordinary backpropagation.

    Each application has a memory of its own: the states that entered it, as in Transformer-XL.

    Attributes:
        cells: one cell for all applications, or one for each.
        depth: number of applications.
        remat: compute each application again in the backward pass instead of keeping what is
            inside it.
    """

    cells: nnx.List[Any]
    depth: int
    remat: bool

    def __call__(self, inputs: Segment | jax.Array, *, return_memory: bool = False) -> Any:
        """Logits `[B, L, vocabulary]`, with `return_memory` also the next segment's memory.

        Args:
            inputs: a segment; plain tokens `[B, L]` are one without memory.
            return_memory: return what the next segment is to be given as well.
        """
        tokens, memory = as_segment(inputs)

        def keep(cell: SequenceCell, x: PyTree, state: PyTree) -> PyTree:
            if not (return_memory and self.memory_size):
                return None
            return self._remember(cell, *jax.lax.stop_gradient((x, state)))

        logits, memories = self._apply(tokens, memory, keep)
        if not return_memory:
            return logits
        return logits, memories if self.memory_size else None

    def initial_memory(self, batch: int) -> PyTree:
        """Memory of nothing, one for each application; None without memory."""
        if not self.memory_size:
            return None
        return tuple(self._nothing(batch) for _ in range(self.depth))

    def read(
        self, tokens: jax.Array, cache: PyTree = None, z0: PyTree = None, *, cache_size: int
    ) -> Reading:
        """As for any sequence model; `z0` is not used."""

        def keep(cell: SequenceCell, x: PyTree, state: PyTree) -> PyTree:
            return self._cache(cell, x, state, cache_size)

        logits, caches = self._apply(tokens, cache, keep)
        return Reading(logits, caches, None, None)

    def _apply(self, tokens: jax.Array, memory: PyTree, keep: Any) -> tuple[jax.Array, PyTree]:
        embedding = self.embed(tokens)
        memories = (None,) * self.depth if memory is None else memory
        if len(memories) != self.depth:
            raise ValueError(f"memory must have {self.depth} entries, got {len(memories)}")
        state, kept = apply_in_turn(
            self.cells,
            lambda before: self._segment(embedding, before),
            memories,
            keep,
            remat=self.remat,
        )
        return self.classify(state), kept
