"""The Transformer cell: one block of causal attention, iterated to its equilibrium."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.attention import (
    KeyValues,
    Memory,
    Norm,
    SequenceInput,
    as_sequence,
    attend,
    attention_mask,
    block_positions,
    check_sequence,
    dropped,
    normalise,
    relative_scores,
    rotary_tables,
    rotate,
    sequence_blocks,
    sinusoids,
    whole_sequence,
)
from deq_jax.checks import check_choice, check_positive_integer, check_range
from deq_jax.partitioning import logical_axes
from deq_jax.stability.dropout import broadcast_axes

Positions = Literal["relative", "rotary", "none"]
NormOrder = Literal["post", "pre"]
FeedForward = Literal["relu", "gelu", "swiglu"]


class TransformerInjection(NamedTuple):
    """What `TransformerCell` computes of its input, once a solve; K = M + L.

    Attributes:
        projected: what is added to queries, keys and values, `[B, L, 3, heads, D / heads]`.
        memory: finished positions, their keys rotated where positions are rotary; or None.
        positions: relative: `W_r P`, the largest distance first, of N blocks of queries (see
            `block_positions`), `[B, N, K, heads, D / heads]`; rotary: `[B, L, 2, D / heads / 2]`;
            else None.
        mask: boolean `[B, L, K]`.
    """

    projected: jax.Array
    memory: tuple[jax.Array, jax.Array] | None
    positions: jax.Array | None
    mask: jax.Array


class TransformerCell(nnx.Module):
    """One Transformer block on the state `[B, L, D]`, the input injected into its attention.

    Attention, over memory and segment (`cat = [memory; z]`), with heads of width d = D / heads:

        q, k, v = W_qkv cat + W_inj e + b
        score_ij = ((q_i + b_w)·k_j + (q_i + b_r)·(W_r P_{i-j})) / √d      (relative positions)
        A(z) = W_o softmax(score, over j <= i) v + b_o

    and with the feed-forward block F, the norm N (no parameters) and the residual scale s:

        post:  y = N(z + s A(z))          f(z) = N(y + s F(y))
        pre:   y = z + s A(z), with W_qkv N(cat)    f(z) = N(y) + s F(N(y))

    F is `W_2 relu(W_1 y + b_1) + b_2`, the same with gelu (exact), or SwiGLU,
    `W_2 (silu(a) * b)` with `[a, b] = W_1 y`, without biases.

    With pre-norm the second residual adds the *normalised* y, a quirk of the original that is
    kept: the usual `f(z) = y + F(N(y))` has an equilibrium only where the two branches cancel, and
    a Jacobian near I. Dropped is its window of 1000 where none is asked for.

    A `deq_jax.nnx.DEQ` starts from `zeros(x)`, unless it is given z0. The input may have memory,
    positions whose equilibrium is known. No position sees a later one, so segments solved one after
    another, each with all before it as memory, have the equilibrium of the whole sequence, and
    single tokens too. To decode, keep keys and values of what is finished:

        z = layer(SequenceInput(embedding, cache), z0)                       # [B, 1, D]; any z0
        cache = extend_memory(cache, cell.key_values(Memory(z, embedding)), size)

    These are made by the cell's own kernels. Where the layer has a normalisation, give it `Memory`
    itself, or decode with a layer made of the effective weights.

    Dropout is variational (one mask a solve): of whole channels, the same at all positions, behind
    both branches, inside F and on P (there the same for all samples); `attention_dropout` of single
    attention weights. `WeightNorm()` takes all kernels; the original leaves `injection` out.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019, and its code; Dai et al.,
    "Transformer-XL", 2019. Rotary positions: Su et al., 2021. RMS norm: Zhang and Sennrich, 2019.
    SwiGLU: Shazeer, 2020.

    Args:
        features: D, width of the state and of the embedding; a multiple of `heads`.
        heads: attention heads.
        hidden_features: width inside the feed-forward block.
        positions: `relative`, Transformer-XL's; `rotary`; or `none`, the causal mask alone.
        norm: `layer` or `rms`, see `normalise`.
        norm_order: see above.
        feed_forward: `relu`, `gelu` or `swiglu`.
        residual_scale: s.
        learn_residual_scale: makes s two trainable numbers, one a branch, that start there.
        window: attention to the last `window` positions, itself included; None for all.
        dropout: rate, see above.
        attention_dropout: likewise.
        kernel_std: standard deviation of the initial kernels besides `injection`, and of b_w and
            b_r; None for `1 / √inputs` of `output` and `0.3 / √inputs` of the others.
        injection_std: that of `injection`; None for `2 / √D`. With these defaults and embeddings of
            unit variance the cell is easily solved at first. Small numbers throughout, such as the
            original's 0.01, make it hard: N brings the state to unit size, and beside it small
            branches leave f near the identity, with several equilibria that a start may reach.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        features: int,
        heads: int,
        hidden_features: int,
        *,
        positions: Positions = "relative",
        norm: Norm = "layer",
        norm_order: NormOrder = "post",
        feed_forward: FeedForward = "relu",
        residual_scale: float = 1.0,
        learn_residual_scale: bool = False,
        window: int | None = None,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        kernel_std: float | None = None,
        injection_std: float | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_positive_integer("features", features)
        check_positive_integer("heads", heads)
        check_positive_integer("hidden_features", hidden_features)
        check_positive_integer("window", 1 if window is None else window)
        check_choice("positions", positions, Positions)
        check_choice("norm", norm, Norm)
        check_choice("norm_order", norm_order, NormOrder)
        check_choice("feed_forward", feed_forward, FeedForward)
        check_range("dropout", dropout, at_least=0, at_most=1)
        check_range("attention_dropout", attention_dropout, at_least=0, at_most=1)
        check_range("residual_scale", residual_scale)
        check_range("kernel_std", 0 if kernel_std is None else kernel_std, at_least=0)
        check_range("injection_std", 0 if injection_std is None else injection_std, at_least=0)
        if features % heads:
            raise ValueError(f"features={features} must be a multiple of heads={heads}")
        width = features // heads
        channels = {"relative": features, "rotary": width, "none": 0}[positions]
        if channels % 2:
            raise ValueError(f"{positions} positions need an even number, not {channels} channels")
        self.features, self.heads, self.window = features, heads, window
        self.positions, self.norm_order, self.feed_forward = positions, norm_order, feed_forward
        self.norm: Norm = norm

        def normal(inputs: int, scale: float = 0.3, std: float | None = kernel_std) -> Any:
            return nnx.initializers.normal(scale / math.sqrt(inputs) if std is None else std)

        def linear(
            into: dict[str | None, int],
            out: dict[str | None, int],
            init: Any,
            use_bias: bool = True,
        ) -> nnx.LinearGeneral:
            """From axes to axes, given by their names and lengths."""
            return nnx.LinearGeneral(
                tuple(into.values()),
                tuple(out.values()),
                axis=tuple(range(-len(into), 0)),
                use_bias=use_bias,
                kernel_init=init,
                kernel_metadata=logical_axes(*into, *out),
                param_dtype=param_dtype,
                rngs=rngs,
            )

        gated, small = feed_forward == "swiglu", normal(features)
        embed: dict[str | None, int] = {"embed": features}
        each: dict[str | None, int] = {"heads": heads, "kv": width}
        mlp: dict[str | None, int] = {"mlp": hidden_features}
        # Heads have an axis of their own, and so have queries, keys and values: shards of a joint
        # axis would not be shards of the heads, and would be gathered in each trip of a solve.
        self.injection = linear(embed, {None: 3, **each}, normal(features, 2, injection_std))
        # A vector, as all biases: by their one axis optimisers exempt them from weight decay.
        self.injection.bias = nnx.Param(jnp.zeros((3 * features,), param_dtype))
        self.qkv = linear(embed, {None: 3, **each}, small, use_bias=False)
        self.output = linear(each, embed, normal(features, 1))
        self.expand = linear(embed, {None: 2, **mlp} if gated else mlp, small, not gated)
        self.contract = linear(mlp, embed, normal(hidden_features), not gated)
        if positions == "relative":
            self.position = linear(embed, each, small, use_bias=False)
            self.content_bias = nnx.Param(small(rngs.params(), (heads, width), param_dtype))
            self.position_bias = nnx.Param(small(rngs.params(), (heads, width), param_dtype))
        scales = jnp.full((2,), residual_scale, param_dtype)
        self.residual_scale = nnx.Param(scales) if learn_residual_scale else residual_scale

        # Without dropout there is no random stream, and no state besides the parameters.
        def drop(rate: float, same: tuple[int, ...]) -> nnx.Dropout | None:
            return nnx.Dropout(rate, broadcast_dims=same, rngs=rngs) if rate else None

        same = broadcast_axes("channel", 3)
        self.position_dropout = drop(dropout if positions == "relative" else 0, (0,))
        self.attention_dropout = drop(attention_dropout, ())
        self.output_dropout = drop(dropout, same)
        self.expand_dropout, self.contract_dropout = drop(dropout, same), drop(dropout, same)

    def zeros(self, x: SequenceInput | jax.Array) -> jax.Array:
        """Zeros `[B, L, D]`, from which a layer starts without z0, in the embedding's dtype."""
        return jnp.zeros_like(as_sequence(x).embedding)

    start = zeros  # its name in version 0.1

    def inject(self, x: SequenceInput | jax.Array) -> TransformerInjection:
        """What of the cell depends on the input alone.

        Args:
            x: the segment; a plain embedding `[B, L, D]` is one without memory.

        Raises:
            ValueError: an array of x is of another shape than it must be; the message names it.
        """
        x = as_sequence(x)
        check_sequence("embedding", x.embedding, self.features)
        memory = x.memory
        if isinstance(memory, Memory):
            memory = self.key_values(memory)
        (batch, length, _), dtype = x.embedding.shape, x.embedding.dtype
        before = 0 if memory is None else memory.key.shape[1]
        keys, width = before + length, self.features // self.heads
        if memory is not None and memory.key.shape != (batch, before, self.heads, width):
            expected = [batch, "M", self.heads, width]
            raise ValueError(f"memory.key must be {expected}, got {list(memory.key.shape)}")

        def repeated(a: jax.Array) -> jax.Array:
            # Every leaf has the batch, which solvers gather from and shard over.
            return jnp.broadcast_to(a, (batch, *a.shape[1:]))

        table = None
        if self.positions == "relative":
            distances = dropped(self.position_dropout, sinusoids(keys, self.features, dtype))
            blocks = sequence_blocks(length)
            table = repeated(block_positions(self.position(distances), length, blocks)[None])
        elif self.positions == "rotary":
            tables = rotary_tables(keys, width, dtype)[None]
            table = repeated(tables[:, before:])
            if memory is not None:
                memory = memory._replace(key=rotate(memory.key, tables[:, :before]))
        there = None if memory is None else memory.length
        return TransformerInjection(
            projected=self.injection(x.embedding),
            memory=None
            if memory is None
            else (whole_sequence(memory.key), whole_sequence(memory.value)),
            positions=table,
            mask=repeated(attention_mask(length, keys, self.window, there)),
        )

    def key_values(self, memory: Memory) -> KeyValues:
        """Keys and values of finished positions, for `SequenceInput.memory`.

        Raises:
            ValueError: as for `inject`.
        """
        check_sequence("memory.state", memory.state, self.features)
        length = memory.state.shape[1]
        check_sequence("memory.embedding", memory.embedding, self.features, length)
        state = memory.state if self.norm_order == "post" else normalise(memory.state, self.norm)
        projected = self.qkv(state) + self.injection(memory.embedding)
        return KeyValues(projected[:, :, 1], projected[:, :, 2], memory.length)

    def __call__(self, z: jax.Array, injection: TransformerInjection) -> jax.Array:
        """`f(z)`, `[B, L, D]`, given what `inject` returned.

        Raises:
            ValueError: z is not of the shape of the embedding.
        """
        expected = [*injection.projected.shape[:2], self.features]
        if list(z.shape) != expected:
            raise ValueError(f"z must be {expected}, as `start` makes it, got {list(z.shape)}")
        post, scale = self.norm_order == "post", self.residual_scale
        scales = scale[...].astype(z.dtype) if isinstance(scale, nnx.Param) else (scale, scale)
        inner = z if post else normalise(z, self.norm)
        y = normalise(z + scales[0] * self._attention(inner, injection), self.norm)
        y = y + scales[1] * self._feed_forward(y)
        return normalise(y, self.norm) if post else y

    def _attention(self, z: jax.Array, injection: TransformerInjection) -> jax.Array:
        projected = self.qkv(z) + injection.projected
        query, key, value = (projected[:, :, i] for i in range(3))
        table, scores = injection.positions, None
        if table is not None and self.positions == "rotary":
            query, key = rotate(query, table), rotate(key, table)
        elif table is not None:
            scores = relative_scores(query + self.position_bias[...], table)
            query = query + self.content_bias[...]
        key, value = whole_sequence(key), whole_sequence(value)
        if injection.memory is not None:
            key = jnp.concatenate([injection.memory[0], key], 1)
            value = jnp.concatenate([injection.memory[1], value], 1)
        attended = attend(query, key, value, injection.mask, scores, self.attention_dropout)
        return dropped(self.output_dropout, self.output(attended))

    def _feed_forward(self, y: jax.Array) -> jax.Array:
        hidden = self.expand(y)
        if self.feed_forward == "swiglu":
            hidden = jax.nn.silu(hidden[..., 0, :]) * hidden[..., 1, :]
        elif self.feed_forward == "gelu":
            hidden = jax.nn.gelu(hidden, approximate=False)
        else:
            hidden = jax.nn.relu(hidden)
        hidden = dropped(self.expand_dropout, hidden)
        return dropped(self.contract_dropout, self.contract(hidden))
