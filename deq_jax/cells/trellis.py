"""The TrellisNet cell: a causal temporal convolution with the gates of an LSTM."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.attention import check_sequence, dropped
from deq_jax.checks import check_positive_integer, check_range
from deq_jax.partitioning import logical_axes
from deq_jax.stability.dropout import broadcast_axes


class TrellisState(NamedTuple):
    """The state of `TrellisCell`.

    Attributes:
        h: outputs, `[B, L, features]`.
        c: memory cells, likewise.
    """

    h: jax.Array
    c: jax.Array


class TrellisHistory(NamedTuple):
    """The last R = (kernel_size - 1) · dilation steps of what came before a segment.

    Attributes:
        h: `[B, R, features]`, of the equilibrium.
        c: likewise.
        x: `[B, R, in_features]`, of the input.
    """

    h: jax.Array
    c: jax.Array
    x: jax.Array


class TrellisInput(NamedTuple):
    """A segment of a sequence, and what came before it.

    Attributes:
        x: `[B, L, in_features]`.
        history: the end of the sequence so far; None for its start, which is zeros.
    """

    x: jax.Array
    history: TrellisHistory | None = None


class TrellisInjection(NamedTuple):
    """What `TrellisCell` computes of its input, once a solve.

    Attributes:
        gates: x~, `[B, L, 4 features]`.
        h: history, `[B, R, features]`.
        c: the last `dilation` steps of it, `[B, dilation, features]`.
    """

    gates: jax.Array
    h: jax.Array
    c: jax.Array


class TrellisCell(nnx.Module):
    """One layer of a TrellisNet on the state `(h, c)`, each `[B, L, features]`.

    With k taps of dilation s and * the causal convolution, whose last tap is the step itself:

        (W * h)_t = Σ_{j<k} W_j h_{t - (k - 1 - j) s}
        i, o, g, f = W_h * h + x~,    x~ = W_x * x + b
        c'_t = σ(f_t) c_{t-s} + σ(i_t) tanh(g_t)
        h'_t = σ(o_t) tanh(c'_t)

    The state is the pair, since c' depends on the c before it: h alone is no state of a function.
    A model reads h, or its last channels.

    Steps before the segment are taken from `TrellisInput.history`, zeros by default. As no step
    sees a later one, segments solved one after another, each with the `history` of all before it,
    have the equilibrium of the whole sequence. The injection is a pytree of another kind than the
    state, so a `deq_jax.nnx.DEQ` starts from `zeros(x)`, unless it is given z0.

    What a step has learned reaches the next one with the next evaluation, as in any network that
    goes through time: where σ(f) is near 1, about L / s evaluations are needed, by any solver.

    Dropout is variational (one mask a solve): of channels of h, the same at all steps, in front of
    `W_h`. `WeightNorm()` takes both kernels, as the original does.

    Source: Bai, Kolter and Koltun, "Trellis networks for sequence modeling", 2019, and "Deep
    equilibrium models", 2019; the code of the former.

    Args:
        in_features: width of x.
        features: width of h and of c.
        kernel_size: k, at least 2.
        dilation: s.
        kernel_std: standard deviation of the initial kernels.
        dropout: rate, see above.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: an argument is out of its range; the message names it.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        kernel_size: int = 2,
        dilation: int = 1,
        kernel_std: float = 0.01,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        for name, value in (
            ("in_features", in_features),
            ("features", features),
            ("kernel_size", kernel_size),
            ("dilation", dilation),
        ):
            check_positive_integer(name, value)
        if kernel_size < 2:
            raise ValueError(f"kernel_size must be at least 2, got {kernel_size}")
        check_range("kernel_std", kernel_std, at_least=0)
        check_range("dropout", dropout, at_least=0, at_most=1)
        self.in_features, self.features, self.dilation = in_features, features, dilation
        self.reach = (kernel_size - 1) * dilation

        def convolution(into: int, use_bias: bool) -> nnx.Conv:
            return nnx.Conv(
                into,
                4 * features,
                (kernel_size,),
                padding="VALID",
                kernel_dilation=dilation,
                use_bias=use_bias,
                kernel_init=nnx.initializers.normal(kernel_std),
                kernel_metadata=logical_axes(None, "embed", "gates"),
                param_dtype=param_dtype,
                rngs=rngs,
            )

        # The original's bias is that of the recurrent convolution; here it is added once a solve.
        self.input = convolution(in_features, True)
        self.recurrent = convolution(features, False)
        # Without dropout there is no random stream, and no state besides the parameters.
        axes = broadcast_axes("channel", 3)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=axes, rngs=rngs) if dropout else None

    def zeros(self, x: TrellisInput | jax.Array) -> TrellisState:
        """The zero state, from which a layer starts without z0, in the dtype of x."""
        x = _as_input(x).x
        zeros = jnp.zeros((*x.shape[:2], self.features), x.dtype)
        return TrellisState(zeros, zeros)

    start = zeros  # its name in version 0.1

    def history(self, x: TrellisInput | jax.Array, state: TrellisState) -> TrellisHistory:
        """What the segment that follows x is given, once the state of x is solved for.

        Raises:
            ValueError: an array is of another shape than it must be; the message names it.
        """
        x, before = self._complete(x)
        for name, leaf in zip(("state.h", "state.c"), state, strict=True):
            check_sequence(name, leaf, self.features, x.shape[1])

        def last(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.concatenate([old, new], 1)[:, -self.reach :]

        return TrellisHistory(last(before.h, state.h), last(before.c, state.c), last(before.x, x))

    def inject(self, x: TrellisInput | jax.Array) -> TrellisInjection:
        """x~, and the history that the convolution of h begins with.

        Args:
            x: the segment; a plain array `[B, L, in_features]` is one without history.

        Raises:
            ValueError: an array of x is of another shape than it must be; the message names it.
        """
        x, (h, c, before) = self._complete(x)
        gates = self.input(jnp.concatenate([before, x], 1))
        return TrellisInjection(gates, h, c[:, -self.dilation :])

    def __call__(self, z: TrellisState, injection: TrellisInjection) -> TrellisState:
        """`f(z)`, given what `inject` returned."""
        h = dropped(self.dropout, jnp.concatenate([injection.h, z.h], 1))
        i, o, g, f = jnp.split(self.recurrent(h) + injection.gates, 4, -1)
        earlier = jnp.concatenate([injection.c, z.c], 1)[:, : z.c.shape[1]]
        c = jax.nn.sigmoid(f) * earlier + jax.nn.sigmoid(i) * jnp.tanh(g)
        return TrellisState(jax.nn.sigmoid(o) * jnp.tanh(c), c)

    def _complete(self, given: TrellisInput | jax.Array) -> tuple[jax.Array, TrellisHistory]:
        """The segment and what came before it, checked."""
        x, history = _as_input(given)
        check_sequence("x", x, self.in_features)
        if history is None:
            zeros = jnp.zeros((x.shape[0], self.reach, self.features), x.dtype)
            inputs = jnp.zeros((x.shape[0], self.reach, self.in_features), x.dtype)
            return x, TrellisHistory(zeros, zeros, inputs)
        for name, leaf in zip(TrellisHistory._fields, history, strict=True):
            width = self.in_features if name == "x" else self.features
            check_sequence(f"history.{name}", leaf, width, self.reach)
        return x, history


def _as_input(x: TrellisInput | jax.Array) -> TrellisInput:
    return x if isinstance(x, TrellisInput) else TrellisInput(x)
