"""Recurrent networks as controls of sequence models: one LSTM or GRU layer of Flax."""

from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.checks import check_choice, check_positive_integer, check_range
from deq_jax.partitioning import logical_axes

Kind = Literal["lstm", "gru"]

_CELLS = {"lstm": nnx.OptimizedLSTMCell, "gru": nnx.GRUCell}
assert set(_CELLS) == set(get_args(Kind))


class RecurrentNet(nnx.Module):
    """Control: embedding, one recurrent layer, linear head.

    Args:
        vocabulary_size: number of tokens.
        features: width of the embedding.
        hidden_features: width of the recurrent state.
        kind: `lstm` or `gru`.
        tied: the head has the weights of the embedding; needs equal widths.
        dropout: rate of dropout behind the embedding and in front of the head, of whole channels,
            the same at all positions.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        vocabulary_size: int,
        features: int,
        hidden_features: int,
        *,
        kind: Kind = "lstm",
        tied: bool = False,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive_integer("vocabulary_size", vocabulary_size)
        check_positive_integer("features", features)
        check_positive_integer("hidden_features", hidden_features)
        check_choice("kind", kind, Kind)
        check_range("dropout", dropout, at_least=0, at_most=1)
        if tied and features != hidden_features:
            raise ValueError(
                f"a tied head needs hidden_features={hidden_features} to be features={features}"
            )
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        names = logical_axes("vocab", "embed")
        self.embedding = nnx.Embed(vocabulary_size, features, embedding_metadata=names, **options)
        names = logical_axes("embed", "gates")
        names = {"kernel_metadata": names, "recurrent_kernel_metadata": names}
        self.layer = nnx.RNN(_CELLS[kind](features, hidden_features, **names, **options))
        options["kernel_metadata"] = logical_axes("embed", "vocab")
        self.head = None if tied else nnx.Linear(hidden_features, vocabulary_size, **options)
        self.bias = nnx.Param(jnp.zeros((vocabulary_size,), param_dtype)) if tied else None

        def drop() -> nnx.Dropout | None:
            return nnx.Dropout(dropout, broadcast_dims=(1,), rngs=rngs) if dropout else None

        self.embedding_dropout, self.output_dropout = drop(), drop()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `[B, L, vocabulary]` of tokens `[B, L]`."""
        embedded = self.embedding(tokens)
        if self.embedding_dropout is not None:
            embedded = self.embedding_dropout(embedded)
        h = cast(jax.Array, self.layer(embedded))  # a pair only where it is asked for its carry
        if self.output_dropout is not None:
            h = self.output_dropout(h)
        if self.head is not None:
            return self.head(h)
        assert self.bias is not None  # it is there where the head is tied
        return self.embedding.attend(h) + self.bias[...]
