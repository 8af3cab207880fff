"""The residual convolution cell of the Deep Implicit Layers tutorial."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import GroupNorm
from deq_jax.partitioning import logical_axes
from deq_jax.stability.dropout import broadcast_axes


class ResNetCell(nnx.Module):
    """A residual block around the state, with the input injected into its branch.

    The cell is

        f(z, x) = norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))

    with z and x `[B, H, W, channels]`, `*` a convolution without bias, padded to keep H and W, and
    norm a GroupNorm with scale and bias. The branch is wider than the state: many parameters for
    a small equilibrium. Kernels start as N(0, 0.01²) by default, smaller than usual, which makes
    the cell contract at first.

    Source: "Deep Implicit Layers", ch. 4.

    Args:
        channels: channels of z and x, a multiple of `groups`.
        inner_channels: channels inside the branch, a multiple of its groups.
        kernel_size: height and width of the kernels.
        groups: groups of the normalisations.
        inner_groups: groups of the normalisation inside the branch; None for `groups`.
        kernel_std: standard deviation of the initial kernels.
        dropout: rate of variational dropout of whole channels behind the second convolution.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError: channels are no multiple of their groups.
    """

    def __init__(
        self,
        channels: int,
        inner_channels: int,
        *,
        kernel_size: int = 3,
        groups: int = 8,
        inner_groups: int | None = None,
        kernel_std: float = 0.01,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        inner_name = "groups" if inner_groups is None else "inner_groups"
        inner_groups = groups if inner_groups is None else inner_groups
        for name, width, which, count in (
            ("channels", channels, "groups", groups),
            ("inner_channels", inner_channels, inner_name, inner_groups),
        ):
            if width % count:
                raise ValueError(f"{name}={width} must be a multiple of {which}={count}")

        def convolution(into: int, out: int, *names: str) -> nnx.Conv:
            return nnx.Conv(
                into,
                out,
                (kernel_size, kernel_size),
                use_bias=False,
                kernel_init=nnx.initializers.normal(kernel_std),
                kernel_metadata=logical_axes(None, None, *names),
                param_dtype=param_dtype,
                rngs=rngs,
            )

        def norm(width: int, groups: int) -> GroupNorm:
            return GroupNorm(width, groups, param_dtype=param_dtype, rngs=rngs)

        self.conv1 = convolution(channels, inner_channels, "channels", "inner_channels")
        self.conv2 = convolution(inner_channels, channels, "inner_channels", "channels")
        self.norm1 = norm(inner_channels, inner_groups)
        self.norm2 = norm(channels, groups)
        self.norm3 = norm(channels, groups)
        # Without dropout there is no random stream, and no state besides the parameters.
        axes = broadcast_axes("channel", 4)
        self.dropout = nnx.Dropout(dropout, broadcast_dims=axes, rngs=rngs) if dropout else None

    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        """One application, `[B, H, W, channels]`."""
        y = self.conv2(self.norm1(nnx.relu(self.conv1(z))))
        if self.dropout is not None:
            y = self.dropout(y)
        return self.norm3(nnx.relu(z + self.norm2(x + y)))
