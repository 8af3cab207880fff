"""The multiscale cell of MDEQ, and its Lipschitz variant.

Source: Bai, Koltun and Kolter, "Multiscale deep equilibrium models", 2020, arXiv 2006.08656, and
its code; the Lipschitz variant: "Lipschitz multiscale deep equilibrium models", 2026, arXiv
2602.03297.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_jax.cells.layers import GroupNorm, check_sizes, convolution
from deq_jax.checks import check_choice, check_number, check_range, is_array
from deq_jax.stability.dropout import broadcast_axes
from deq_jax.stability.normalization import WeightNorm
from deq_jax.stability.projections import (
    lipschitz_convolution,
    named,
    project_convolution,
)
from deq_jax.tree import accumulation_dtype

State = tuple[jax.Array, ...]
"""The state of the cell: an array `[B, H / 2^i, W / 2^i, C_i]` for each branch i."""

Activation = Literal["relu", "groupsort"]
Projection = Literal["operator", "matrix"]

WEIGHT_NORM = WeightNorm(kernels=named("conv1", "conv2", "mixing"))
"""The weight normalisation of MDEQ: of the blocks' convolutions and of the 1x1 convolution behind
the fusion. Convolutions between branches are left as they are."""


@dataclasses.dataclass(frozen=True)
class Lipschitz:
    """What makes the multiscale cell a contraction; see `MultiscaleCell`.

    Attributes:
        slope: what each activation is multiplied by.
        residual: r; a block gives `(1 - r) z + r branch(z)`.
        fusion: share of the other branches in the fusion.
        kernel_norm: bound on the norm of each convolution, which `constrain` establishes.
        activation: `relu`, or `groupsort`, which sorts the channels of each pixel in descending
            order.
        projection: `operator` bounds the norm of the convolution itself, and f contracts.
            `matrix`, as published, bounds the norm of the kernel as a matrix
            `[kh · kw · in, out]`. That bounds the norm of the convolution itself by
            `√(kh · kw) · kernel_norm` only, so f need not contract.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it.
    """

    slope: float = 0.4
    residual: float = 0.5
    fusion: float = 0.3
    kernel_norm: float = 2.0
    activation: Activation = "relu"
    projection: Projection = "operator"

    def __post_init__(self) -> None:
        check_number(self, "slope", above=0.0)
        check_number(self, "residual", above=0.0, at_most=1.0)
        check_number(self, "fusion", above=0.0, at_most=1.0)
        check_number(self, "kernel_norm", above=0.0)
        check_choice("activation", self.activation, Activation)
        check_choice("projection", self.projection, Projection)


class MultiscaleCell(nnx.Module):
    """Residual blocks at several resolutions, and a fusion of each with all the others.

    Branch i has the state `z_i`, `[B, H / 2^i, W / 2^i, C_i]`. The cell is

        o_i = norm(relu(z_i + norm(drop(W₂ * relu(norm(W₁ * z_i))) + x_i)))
        y_i = Σ_j T_ij(o_j)
        f_i = norm(M_i * relu(y_i))

    with `*` a convolution without bias and norm a GroupNorm. Only the finest branch is given the
    input: x_0 = x and x_i = 0 for all others. T_ii is the identity. From a coarser branch, j > i,
    T_ij is a 1x1 convolution, a GroupNorm, and each value repeated `2^(j-i)` times along both axes.
    From a finer branch it is i - j convolutions 3x3 of stride 2, each with a GroupNorm, and a ReLU
    between two of them.

    With `lipschitz=Lipschitz(...)` all norms are mean-only (`γ (y - mean) + β`), each relu is
    `slope · relu`, a block is `norm(relu((1 - r) z_i + r norm(...)))`, and the fusion is

        y_i = (1 - a) o_i + a Σ_{j≠i} w_ij T_ij(o_j),
        w_i = softmax(-p_i),   p_ij = j - i for j > i, 0 for j < i.

    `constrain` puts the parameters into the set where each convolution has norm at most
    `kernel_norm` and every `|γ| <= 1`. There f contracts: `lipschitz_bound` is below 1.

    The bound. In the Euclidean norm, that of a residual, the following Lipschitz constants hold. A
    convolution has at most κ, its operator norm. Subtracting means is an orthogonal projection, so
    a norm has at most `|γ|`, its largest scale, and an activation has `slope` s. Dropout at rate p
    has at most `1 / (1 - p)`. Repeating each value `t²` times has exactly t. So a block has
    `b = |γ₃| s (1 - r + r |γ₂| κ₂ / (1 - p) |γ₁| s κ₁)`, `T_ij` has `t_ij = 2^(j-i) |γ| κ` from a
    coarser branch, and from a finer one the product of its `|γ| κ` with an s between each two.
    The part of f between branch j and branch i has at most

        L_ij = |γ_i| κ_i s ((1 - a) δ_ij + a w_ij t_ij) b_j,

    so that `‖f_i(z) - f_i(z')‖ <= Σ_j L_ij ‖z_j - z'_j‖`. Over all branches together f has at most
    c, the spectral norm of the small matrix L. If c < 1, there is exactly one equilibrium, and each
    step of Picard's iteration shrinks the distance to it at least by the factor c, in the Euclidean
    norm over all entries of a sample, for every x and every dropout mask. The published constants
    with κ = 2 give 0.83 for two branches with a dropout of 0.25, and 0.93 for four with 0.3.

    Kernels of blocks and behind the fusion start as `U(±1 / √fan_in)`. Those of T_ij start as
    N(0, `fusion_kernel_std`²). The reference code says N(0, 0.01²) for all, but sets weights that
    its weight normalisation then replaces.

    Args:
        channels: C_i, of the finest branch first; two or more, multiples of `groups`.
        expansion: channels inside a block's branch, in multiples of C_i.
        groups: groups of the norms; those behind the fusion have half as many.
        kernel_size: height and width of a block's kernels, one for all branches or one for each.
        dropout: rate of variational dropout of whole channels behind the second convolution.
        block_affine: whether the norms of the blocks have a scale γ and a bias β.
        fusion_affine: whether those between branches have them.
        final_affine: whether those behind the fusion have them.
        fusion_kernel_std: standard deviation of the initial kernels between branches.
        lipschitz: options of the Lipschitz variant; None for the original cell.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError: fewer than two branches, sizes below 1, channels that are no multiples of
            `groups`, kernel sizes that are even or of another number, a dropout outside [0, 1), or
            options of `lipschitz` under which f need not contract.
        TypeError: sizes that are no integers, or `lipschitz` is something else.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from deq_jax.cells.multiscale import MultiscaleCell
        >>> from deq_jax.nnx import DEQ
        >>> cell = MultiscaleCell((8, 16), groups=4, rngs=nnx.Rngs(0))
        >>> x = jnp.ones((2, 12, 12, 8))
        >>> fine, coarse = DEQ(cell)(x)
        >>> coarse.shape
        (2, 6, 6, 16)
    """

    def __init__(
        self,
        channels: Sequence[int],
        *,
        expansion: int = 5,
        groups: int = 8,
        kernel_size: int | Sequence[int] = 3,
        dropout: float = 0.0,
        block_affine: bool = True,
        fusion_affine: bool = True,
        final_affine: bool = False,
        fusion_kernel_std: float = 0.01,
        lipschitz: Lipschitz | None = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if lipschitz is not None and not isinstance(lipschitz, Lipschitz):
            raise TypeError(f"lipschitz must be Lipschitz(...) or None, got {lipschitz!r}")
        check_sizes(channels=channels, expansion=expansion, groups=groups, kernel_size=kernel_size)
        channels = tuple(channels)
        count = len(channels)
        if count < 2:
            raise ValueError(f"channels must name two branches or more, got {channels}")
        sizes = (kernel_size,) * count if isinstance(kernel_size, int) else tuple(kernel_size)
        if len(sizes) != count:
            raise ValueError(f"kernel_size={sizes} must be one number, or {count} for {channels}")
        if not all(size % 2 for size in sizes):
            raise ValueError(f"kernel_size={kernel_size} must be odd, to keep height and width")
        check_range("dropout", dropout, at_least=0, below=1)
        half = max(1, groups // 2)
        for width in channels:
            if width % groups or width % half:
                raise ValueError(
                    f"channels={channels} must be multiples of groups={groups} and of {half}"
                )
        self.channels = channels
        self.lipschitz = lipschitz
        self.fusion_weights = _fusion_weights(count, lipschitz)
        mean_only = lipschitz is not None
        norm = functools.partial(GroupNorm, mean_only=mean_only, param_dtype=param_dtype, rngs=rngs)
        conv = functools.partial(convolution, param_dtype=param_dtype, rngs=rngs)
        outwards, inwards = ("channels", "inner_channels"), ("inner_channels", "channels")
        activation = _Activation(lipschitz)
        self.blocks = nnx.List(
            [
                _Block(
                    conv(width, expansion * width, size, names=outwards),
                    conv(expansion * width, width, size, names=inwards),
                    norm(expansion * width, groups, affine=block_affine),
                    norm(width, groups, affine=block_affine),
                    norm(width, groups, affine=block_affine),
                    _dropout(dropout, rngs),
                    activation,
                    0.5 if lipschitz is None else lipschitz.residual,
                )
                for width, size in zip(channels, sizes, strict=True)
            ]
        )

        def paths_into(i: int, j: int) -> nnx.Module | None:
            fixed = functools.partial(conv, std=fusion_kernel_std)
            affine = fusion_affine
            if i == j:
                return None
            if j > i:
                scale = norm(channels[i], groups, affine=affine)
                return _Upsampling(fixed(channels[j], channels[i], 1), scale, 2 ** (j - i))
            outputs = [channels[j]] * (i - j - 1) + [channels[i]]
            convs = [fixed(channels[j], out, 3, stride=2) for out in outputs]
            norms = [norm(out, groups, affine=affine) for out in outputs]
            return _Downsampling(convs, norms, activation)

        self.fusion = nnx.List(
            [nnx.List([paths_into(i, j) for j in range(count)]) for i in range(count)]
        )
        self.mixing = nnx.List([conv(width, width, 1) for width in channels])
        self.norms = nnx.List([norm(width, half, affine=final_affine) for width in channels])
        self.activation = activation
        if lipschitz is not None and lipschitz.projection == "operator":
            worst = float(np.linalg.norm(self._pairwise(lambda *_: lipschitz.kernel_norm, _one), 2))
            if not worst < 1:
                raise ValueError(
                    f"{lipschitz!r} with {count} branches and dropout={dropout} bounds the "
                    f"Lipschitz constant by {worst:.3g}, which must be below 1; take a smaller "
                    "kernel_norm, slope or fusion"
                )

    def __call__(self, z: State, x: jax.Array) -> State:
        """One application; z as `zeros(x)`, and x `[B, H, W, C_0]`."""
        self._check(z, x)
        injections = (x, *[None] * (len(z) - 1))
        branches = zip(self.blocks, z, injections, strict=True)
        outputs = [block(state, given) for block, state, given in branches]
        fused = []
        for i, paths in enumerate(self.fusion):
            terms = []
            for path, weight, o in zip(paths, self.fusion_weights[i], outputs, strict=True):
                term = o if path is None else path(o)
                terms.append(term if weight == 1 else weight * term)
            y = self.mixing[i](self.activation(functools.reduce(jnp.add, terms)))
            fused.append(self.norms[i](y))
        return tuple(fused)

    def zeros(self, x: jax.Array) -> State:
        """The zero state for an input `[B, H, W, C_0]`.

        Raises:
            ValueError: height and width of x can not be halved often enough, or x has other
                channels.
        """
        batch, height, width, features = x.shape
        coarsest = 2 ** (len(self.channels) - 1)
        if height % coarsest or width % coarsest or features != self.channels[0]:
            raise ValueError(
                f"x must be [B, H, W, {self.channels[0]}], H and W multiples of {coarsest} for "
                f"{len(self.channels)} branches; got {list(x.shape)}"
            )
        return tuple(
            jnp.zeros((batch, height >> i, width >> i, channels), x.dtype)
            for i, channels in enumerate(self.channels)
        )

    def _check(self, z: Any, x: jax.Array) -> None:
        expected = [like.shape for like in jax.eval_shape(self.zeros, x)]
        if isinstance(z, tuple) and [np.shape(leaf) for leaf in z] == expected:
            return
        got = f"an array of shape {np.shape(z)}" if is_array(z) else f"a {type(z).__name__}"
        if isinstance(z, tuple | list):
            got += f" of shapes {[np.shape(leaf) for leaf in z]}"
        raise ValueError(
            f"the state must be a tuple of arrays of shapes {expected}, as cell.zeros(x) is; got "
            f"{got}. Leave z0 out to start from there"
        )

    # ------------------------------------------------------------------- the Lipschitz variant

    def constrain(self, spatial_shape: tuple[int, int]) -> None:
        """Puts the cell's own parameters into the set that `lipschitz` describes.

        The cell changes in place. A training step works on the parameters as values instead:
        `MDEQ.project(params)` does the same as a pure function. `lipschitz_bound` tells whether
        the present parameters make f contract, projected or not.

        Args:
            spatial_shape: height and width of the finest branch.

        Raises:
            ValueError: the cell is not of the Lipschitz variant.
        """
        lipschitz = self._lipschitz()
        for conv, size in self._convolutions(spatial_shape):
            kernel = conv.kernel[...]
            if lipschitz.projection == "operator":
                kernel = project_convolution(kernel, lipschitz.kernel_norm, size)
            else:
                # The publication follows the largest singular value by a step of power iteration
                # after each step of the optimiser; here it is exact.
                wide = kernel.astype(accumulation_dtype(kernel.dtype))
                sigma = jnp.linalg.norm(wide.reshape(-1, wide.shape[-1]), 2)
                kernel = (wide / jnp.maximum(1, sigma / lipschitz.kernel_norm)).astype(kernel.dtype)
            conv.kernel[...] = kernel
        for _, module in nnx.iter_modules(self):
            if isinstance(module, GroupNorm) and module.scale is not None:
                module.scale[...] = jnp.clip(module.scale[...], -1, 1)

    def lipschitz_bound(self, spatial_shape: tuple[int, int]) -> jax.Array:
        """A bound on f's Lipschitz constant in z, for the cell's parameters, a scalar.

        It is the spectral norm of the matrix L of the class's docstring, made of the bounds that
        `lipschitz_convolution` gives for each convolution. It holds for all parameters, projected
        or not, with any dropout mask and without one, up to rounding.

        Args:
            spatial_shape: height and width of the finest branch.

        Raises:
            ValueError: the cell is not of the Lipschitz variant: GroupNorm's division has no bound.
        """
        self._lipschitz()

        def kernel_norm(conv: nnx.Conv, size: tuple[int, int]) -> jax.Array:
            return lipschitz_convolution(conv.kernel[...], size)

        def largest_scale(norm: GroupNorm) -> Any:
            return 1.0 if norm.scale is None else jnp.abs(norm.scale[...]).max()

        pairwise = self._pairwise(kernel_norm, largest_scale, spatial_shape)
        return jnp.linalg.norm(jnp.stack([jnp.stack(row) for row in pairwise]), 2)

    def _lipschitz(self) -> Lipschitz:
        if self.lipschitz is None:
            raise ValueError(
                "this cell divides by standard deviations and has no bound; make it with "
                "lipschitz=Lipschitz()"
            )
        return self.lipschitz

    def _convolutions(
        self, spatial_shape: tuple[int, int]
    ) -> list[tuple[nnx.Conv, tuple[int, int]]]:
        """Every convolution of the cell, and the size of the image that it is given."""
        found: list[tuple[nnx.Conv, tuple[int, int]]] = []

        def collect(conv: nnx.Conv, size: tuple[int, int]) -> float:
            found.append((conv, size))
            return 1.0

        self._pairwise(collect, _one, spatial_shape)
        return found

    def _pairwise(
        self,
        kernel_norm: Callable[[nnx.Conv, tuple[int, int]], Any],
        largest_scale: Callable[[GroupNorm], Any],
        spatial_shape: tuple[int, int] = (0, 0),
    ) -> list[list[Any]]:
        """L, from the norm of each convolution on images of a size and the scale of each norm."""
        sizes = [(spatial_shape[0] >> i, spatial_shape[1] >> i) for i in range(len(self.channels))]
        slope = self.activation.slope
        blocks = []
        for block, size in zip(self.blocks, sizes, strict=True):
            inner = largest_scale(block.norm1) * slope * kernel_norm(block.conv1, size)
            branch = largest_scale(block.norm2) * kernel_norm(block.conv2, size) * inner
            branch = branch / (1 - (0.0 if block.dropout is None else block.dropout.rate))
            kept = 1 - block.residual + block.residual * branch
            blocks.append(largest_scale(block.norm3) * slope * kept)
        matrix = []
        for i, paths in enumerate(self.fusion):
            final = largest_scale(self.norms[i]) * kernel_norm(self.mixing[i], sizes[i]) * slope
            row = []
            for j, path in enumerate(paths):
                between: Any = 1.0
                if isinstance(path, _Upsampling):
                    between = path.factor * largest_scale(path.norm)
                    between = between * kernel_norm(path.conv, sizes[j])
                elif isinstance(path, _Downsampling):
                    for step, (conv, norm) in enumerate(zip(path.convs, path.norms, strict=True)):
                        between = between * (slope if step else 1.0)
                        between = between * largest_scale(norm) * kernel_norm(conv, sizes[j + step])
                row.append(final * (self.fusion_weights[i][j] * between) * blocks[j])
            matrix.append(row)
        return matrix


class _Block(nnx.Module):
    """The residual block of one branch."""

    def __init__(
        self,
        conv1: nnx.Conv,
        conv2: nnx.Conv,
        norm1: GroupNorm,
        norm2: GroupNorm,
        norm3: GroupNorm,
        dropout: nnx.Dropout | None,
        activation: "_Activation",
        residual: float,
    ):
        self.conv1, self.conv2 = conv1, conv2
        self.norm1, self.norm2, self.norm3 = norm1, norm2, norm3
        self.dropout, self.activation, self.residual = dropout, activation, residual

    def __call__(self, z: jax.Array, x: jax.Array | None) -> jax.Array:
        """`[B, H, W, channels]`, with or without an input of that shape."""
        y = self.conv2(self.activation(self.norm1(self.conv1(z))))
        if self.dropout is not None:
            y = self.dropout(y)
        y = self.norm2(y if x is None else y + x)
        if self.activation.lipschitz is None:
            return self.norm3(self.activation(z + y))
        return self.norm3(self.activation((1 - self.residual) * z + self.residual * y))


class _Upsampling(nnx.Module):
    """A 1x1 convolution and a norm at the coarse resolution, then each value repeated."""

    def __init__(self, conv: nnx.Conv, norm: GroupNorm, factor: int):
        self.conv, self.norm, self.factor = conv, norm, factor

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, factor H, factor W, out]` from `[B, H, W, in]`."""
        y = self.norm(self.conv(z))
        return jnp.repeat(jnp.repeat(y, self.factor, 1), self.factor, 2)


class _Downsampling(nnx.Module):
    """Convolutions of stride 2, each with a norm, and an activation between two of them."""

    def __init__(self, convs: list[nnx.Conv], norms: list[GroupNorm], activation: "_Activation"):
        self.convs, self.norms = nnx.List(convs), nnx.List(norms)
        self.activation = activation

    def __call__(self, z: jax.Array) -> jax.Array:
        """`[B, H / 2^steps, W / 2^steps, out]` from `[B, H, W, in]`."""
        for step, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            z = norm(conv(self.activation(z) if step else z))
        return z


@dataclasses.dataclass(frozen=True)
class _Activation:
    """ReLU, or that of the Lipschitz variant."""

    lipschitz: Lipschitz | None

    @property
    def slope(self) -> float:
        return 1.0 if self.lipschitz is None else self.lipschitz.slope

    def __call__(self, y: jax.Array) -> jax.Array:
        if self.lipschitz is None:
            return nnx.relu(y)
        if self.lipschitz.activation == "relu":
            return self.slope * nnx.relu(y)
        return self.slope * jnp.sort(y, axis=-1, descending=True)


def _one(norm: GroupNorm) -> float:
    return 1.0


def _dropout(rate: float, rngs: nnx.Rngs) -> nnx.Dropout | None:
    # Without dropout there is no random stream, and no state besides the parameters.
    return (
        nnx.Dropout(rate, broadcast_dims=broadcast_axes("channel", 4), rngs=rngs) if rate else None
    )


def _fusion_weights(count: int, lipschitz: Lipschitz | None) -> tuple[tuple[float, ...], ...]:
    """What each T_ij is multiplied by."""
    if lipschitz is None:
        return ((1.0,) * count,) * count
    share = lipschitz.fusion
    rows = []
    for i in range(count):
        likelihoods = [0.0 if j == i else math.exp(-max(j - i, 0)) for j in range(count)]
        others = [share * likelihood / sum(likelihoods) for likelihood in likelihoods]
        rows.append(tuple(1 - share if j == i else others[j] for j in range(count)))
    return tuple(rows)
