"""Layers of convolutional cells and networks.

GroupNorm and BatchNorm are Flax's, which here work in float64 and under strict dtype promotion,
too. Flax's own promote dtypes implicitly.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.checks import check_positive_integer
from deq_jax.partitioning import logical_axes
from deq_jax.tree import accumulation_dtype


def check_sizes(**sizes: int | Sequence[int]) -> None:
    """Raises unless each argument is an integer of at least 1, or a sequence of such integers.

    Raises:
        TypeError: one is not an integer.
        ValueError: one is below 1. Both messages name the argument.
    """
    for name, size in sizes.items():
        if not isinstance(size, Sequence):
            check_positive_integer(name, size)
            continue
        for one in size:
            check_positive_integer(f"each of {name}={tuple(size)}", one)


def uniform(fan_in: int) -> nnx.Initializer:
    """PyTorch's default initialisation of kernels and biases, `U(±1 / √fan_in)`."""
    bound = 1 / math.sqrt(fan_in)

    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> Any:
        del out_sharding
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


def convolution(
    into: int,
    out: int,
    size: int,
    *,
    stride: int = 1,
    std: float | None = None,
    bias: bool = False,
    names: tuple[str | None, str | None] = (None, "channels"),
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution padded by `size // 2` on all sides, as in PyTorch.

    (Flax's `SAME` pads a convolution of stride 2 on two sides only.)

    Args:
        into: channels of the input.
        out: channels of the output.
        size: height and width of the kernel, an odd number.
        stride: of the convolution.
        std: standard deviation of the initial kernel; None for `U(±1 / √fan_in)`.
        bias: whether there is a bias.
        names: of the kernel's last two axes, see `deq_jax.partitioning`.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.
    """
    usual = uniform(into * size**2)
    return nnx.Conv(
        into,
        out,
        (size, size),
        strides=stride,
        padding=((size // 2, size // 2),) * 2,
        use_bias=bias,
        kernel_init=usual if std is None else nnx.initializers.normal(std),
        kernel_metadata=logical_axes(None, None, *names),
        param_dtype=param_dtype,
        rngs=rngs,
    )


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


class ConvNorm(nnx.Module):
    """A `convolution` and a `BatchNorm`.

    Args:
        into: channels of the input.
        out: channels of the output.
        size: height and width of the kernel, an odd number.
        stride: of the convolution.
        std: standard deviation of the initial kernel; None for `U(±1 / √fan_in)`.
        bias: whether the convolution has a bias.
        affine: whether the BatchNorm has a scale and a bias.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.
    """

    def __init__(
        self,
        into: int,
        out: int,
        size: int,
        *,
        stride: int = 1,
        std: float | None = None,
        bias: bool = False,
        affine: bool = True,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.conv = convolution(into, out, size, stride=stride, std=std, bias=bias, **made)
        self.norm = BatchNorm(out, affine=affine, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H / stride, W / stride, out]`."""
        return self.norm(self.conv(x))
