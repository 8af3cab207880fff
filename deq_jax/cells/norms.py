"""Flax's GroupNorm and BatchNorm, which here work in float64 and under strict dtype promotion.

Flax's own combine their statistics, in float32, with arrays of other dtypes, which strict promotion
forbids.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.tree import accumulation_dtype


class GroupNorm(nnx.GroupNorm):
    """`γ (y - mean) / √(var + 1e-5) + β`, mean and variance of each group of channels of a sample.

    With `mean_only` nothing is divided: `γ (y - mean) + β`. That is an orthogonal projection
    followed by γ, so its Lipschitz constant is at most `max |γ|`. A division has no such bound.

    Args:
        channels: channels of y, a multiple of `groups`.
        groups: number of groups.
        affine: whether there are γ (`scale`) and β (`bias`).
        mean_only: whether the division is left out.
        param_dtype: dtype of γ and β.
        rngs: stream `params`.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        *,
        affine: bool = True,
        mean_only: bool = False,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            channels,
            groups,
            epsilon=1e-5,
            use_bias=affine,
            use_scale=affine,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.mean_only = mean_only

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        """`[B, H, W, channels]`; `mask` as for Flax's, and not with `mean_only`."""
        if not self.mean_only:
            with jax.numpy_dtype_promotion("standard"):
                return super().__call__(x, mask=mask)
        if mask is not None:
            raise ValueError("GroupNorm(mean_only=True) takes no mask")
        grouped = x.astype(accumulation_dtype(x.dtype))
        grouped = grouped.reshape(*x.shape[:-1], self.num_groups, self.group_size)
        axes = (*range(1, x.ndim - 1), x.ndim)
        y = (grouped - grouped.mean(axes, keepdims=True)).reshape(x.shape).astype(x.dtype)
        if self.scale is None or self.bias is None:
            return y
        return y * self.scale[...] + self.bias[...]


class BatchNorm(nnx.BatchNorm):
    """Flax's, with PyTorch's momentum and ε; its statistics are at least as wide as parameters.

    Args:
        channels: channels of the input.
        affine: whether there are γ (`scale`) and β (`bias`).
        param_dtype: dtype of γ and β.
        rngs: stream `params`.
    """

    def __init__(
        self,
        channels: int,
        *,
        affine: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        # PyTorch's 0.1 is the weight of the new batch, Flax's 0.9 that of the old statistics.
        super().__init__(
            channels,
            momentum=0.9,
            epsilon=1e-5,
            use_bias=affine,
            use_scale=affine,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        wide = accumulation_dtype(jnp.dtype(param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(channels, wide))
        self.var = nnx.BatchStat(jnp.ones(channels, wide))

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """`[B, H, W, channels]`; arguments as for Flax's."""
        with jax.numpy_dtype_promotion("standard"):
            return super().__call__(x, use_running_average, mask=mask)
