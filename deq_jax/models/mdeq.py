"""MDEQ: an image classifier whose state has several resolutions.

    stem - equilibrium of the multiscale cell - head

The stem is two or more times Conv 3x3 - BatchNorm - ReLU. The head takes each branch through a
bottleneck block, adds the branches up from the finest to the coarsest, and ends with a 1x1
convolution, the mean over all pixels, and a linear layer.

`MDEQ(**TINY, rngs=...)` and `MDEQ(**LARGE, rngs=...)` are the published networks for CIFAR-10, with
158,890 and 11,097,438 parameters (the paper says 170K and 10M). Those of the weight normalisation,
a g for each output channel, are among them.

Source: Bai, Koltun and Kolter, "Multiscale deep equilibrium models", 2020, arXiv 2006.08656, and
its code.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import ConvNorm, check_sizes
from deq_jax.cells.multiscale import WEIGHT_NORM, Lipschitz, MultiscaleCell, State
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.classifier import EquilibriumClassifier, as_image_shape
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.broyden import Broyden
from deq_jax.stability.normalization import Normalization

PyTree = Any

TINY: dict[str, Any] = {
    "channels": (24, 24),
    "head_channels": (8, 16),
    "features": 200,
    "dropout": 0.25,
}
"""Options of the small published network for CIFAR-10."""

LARGE: dict[str, Any] = {
    "channels": (32, 64, 128, 256),
    "head_channels": (14, 28, 56, 112),
    "features": 1680,
    "dropout": 0.3,
}
"""Options of the large one. With Jacobian regularisation its dropout is 0.22, and its solver makes
8 evaluations forwards and 7 backwards."""

LIPSCHITZ: dict[str, Any] = {**LARGE, "lipschitz": Lipschitz(), "normalization": None}
"""Options of Lipschitz MDEQ, which is the large one with a bound. Call `project` on its parameters
after each step of the optimiser. It goes without weight normalisation: the published code keeps it,
and computes from it, before the next step, kernels that no projection has touched."""

_STD = 0.01
"""Standard deviation of the initial kernels of stem and head."""

_EXPANSION = 4
"""Channels that a bottleneck block of the head returns, in multiples of those inside it."""


class MDEQ(EquilibriumClassifier):
    """The multiscale classifier.

    Its core is a `deq_jax.nnx.DEQ` around a `MultiscaleCell`. The state is a tuple of arrays, one
    for each branch. The stem's output is injected into the finest branch, through one more 1x1
    convolution, BatchNorm and ReLU if there are more than two branches or downsamplings.

    Without a start of training by a few unrolled steps (`--stability.pretrain-steps` of the
    training command, 3,000 steps of depth 10 in the original), 18 evaluations leave a large
    residual at first.

    Args:
        image_shape: `(height, width, channels)` of an image; height and width are multiples of
            `2^(downsamplings + branches - 1)`.
        num_classes: number of logits.
        channels: channels of each branch, of the finest first.
        head_channels: channels inside the head's bottleneck block of each branch, which returns
            four times as many.
        features: channels of the head's last convolution.
        downsamplings: how many convolutions of the stem have stride 2.
        expansion: channels inside a block of the cell, in multiples of the branch's.
        groups: groups of the cell's GroupNorms.
        kernel_size: of the cell's blocks, one for all branches or one for each.
        dropout: rate of the cell's variational dropout.
        block_affine: whether the norms of the cell's blocks have a scale and a bias.
        fusion_affine: whether those between branches have them.
        final_affine: whether those behind the fusion have them.
        lipschitz: makes the cell a contraction, with `normalization=None` and `project` after each
            step; see `MultiscaleCell`. The initial parameters are projected.
        normalization: of the cell's kernels, as for `deq_jax.nnx.DEQ`; as published by default.
        solver: as for `deq_fixed_point`; as published by default.
        gradient: as for `deq_fixed_point`; as published by default.
        execution: as for `deq_fixed_point`.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: sizes that do not fit, a normalisation together with `lipschitz`, or
            as for `MultiscaleCell`.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from deq_jax.models.mdeq import MDEQ, TINY
        >>> model = MDEQ(**TINY, image_shape=(8, 8, 3), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 8, 8, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        channels: Sequence[int] = (24, 24),
        head_channels: Sequence[int] = (8, 16),
        features: int = 200,
        downsamplings: int = 0,
        expansion: int = 5,
        groups: int = 8,
        kernel_size: int | Sequence[int] = 3,
        dropout: float = 0.0,
        block_affine: bool = True,
        fusion_affine: bool = True,
        final_affine: bool = False,
        lipschitz: Lipschitz | None = None,
        normalization: Normalization | None = WEIGHT_NORM,
        solver: Solver = Broyden(tol=1e-3, max_iter=18),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(max_iter=20),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        image_shape = as_image_shape(image_shape)
        check_sizes(
            num_classes=num_classes,
            channels=channels,
            head_channels=head_channels,
            features=features,
        )
        if not isinstance(downsamplings, int) or downsamplings < 0:
            raise ValueError(f"downsamplings must be an integer >= 0, got {downsamplings!r}")
        if len(head_channels) != len(channels):
            raise ValueError(
                f"head_channels={tuple(head_channels)} must name a number for each branch of "
                f"channels={tuple(channels)}"
            )
        if lipschitz is not None and normalization is not None:
            raise ValueError(
                "lipschitz bounds the kernels themselves; pass normalization=None with it"
            )
        height, width, colours = image_shape
        coarsest = 2 ** (downsamplings + len(channels) - 1)
        if height % coarsest or width % coarsest:
            raise ValueError(
                f"height and width of image_shape={image_shape} must be multiples of {coarsest}, "
                f"for {len(channels)} branches and {downsamplings} downsamplings"
            )
        self.image_shape = image_shape
        self.state_shape = (height >> downsamplings, width >> downsamplings)
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        finest = channels[0]
        count = max(2, downsamplings)
        self.stem = nnx.List(
            [
                ConvNorm(
                    finest if k else colours,
                    finest,
                    3,
                    stride=2 if k < downsamplings else 1,
                    **made,
                )
                for k in range(count)
            ]
        )
        if downsamplings or len(channels) > 2:
            self.stem.append(ConvNorm(finest, finest, 1, std=_STD, **made))
        cell = MultiscaleCell(
            channels,
            expansion=expansion,
            groups=groups,
            kernel_size=kernel_size,
            dropout=dropout,
            block_affine=block_affine,
            fusion_affine=fusion_affine,
            final_affine=final_affine,
            lipschitz=lipschitz,
            **made,
        )
        if lipschitz is not None:
            cell.constrain(self.state_shape)
        self.core = DEQ(
            cell,
            solver=solver,
            gradient=gradient,
            execution=execution,
            normalization=normalization,
        )
        self.head = _Head(channels, head_channels, features, num_classes, **made)

    def injection(self, images: jax.Array) -> jax.Array:
        """What the core is given, `[B, H, W, channels[0]]`, from images `[B, H, W, C]`."""
        self.check_images(images)
        x = images
        for layer in self.stem:
            x = nnx.relu(layer(x))
        return x

    def zeros(self, injection: jax.Array) -> State:
        """The state that a solve starts from, an array `[B, H / 2^i, W / 2^i, C_i]` a branch."""
        return self.core.cell.zeros(injection)

    def classify(self, z: State) -> jax.Array:
        """Logits `[B, num_classes]` from the equilibrium."""
        return self.head(z)

    def project(self, params: PyTree) -> PyTree:
        """Parameters that `lipschitz` allows, for use after each step of an optimiser.

        This is `MultiscaleCell.constrain` as a pure function, of the whole model's parameters.
        `constrain` changes the cell in place instead; the constructor calls it, so the initial
        parameters are in the set already. After a step without `project` they may not be:
        `lipschitz_bound()` tells whether the cell still contracts.

        Args:
            params: the model's `nnx.Param` state, or its pure values.

        Returns:
            Parameters of the same structure; `params` themselves without `lipschitz`. Those of the
            stem and the head, and of the norms' biases, are as they were.
        """
        if self.core.cell.lipschitz is None:
            return params
        definition, *states = nnx.split(self, nnx.Param, ...)
        model = nnx.merge(definition, params, states[1], copy=True)
        model.core.cell.constrain(self.state_shape)
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def lipschitz_bound(self) -> jax.Array:
        """A bound on the Lipschitz constant of the present cell, which contracts if it is below 1.

        See `MultiscaleCell.lipschitz_bound`.
        """
        return self.core.cell.lipschitz_bound(self.state_shape)


class _Bottleneck(nnx.Module):
    """`relu(shortcut(x) + W₃ * relu(W₂ * relu(W₁ * x)))`, with a BatchNorm behind each `*`."""

    def __init__(self, into: int, inner: int, *, param_dtype: Any, rngs: nnx.Rngs):
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        out = _EXPANSION * inner
        self.reduce = ConvNorm(into, inner, 1, affine=False, std=_STD, **made)
        self.transform = ConvNorm(inner, inner, 3, affine=False, std=_STD, **made)
        self.expand = ConvNorm(inner, out, 1, affine=False, std=_STD, **made)
        self.shortcut = None if into == out else ConvNorm(into, out, 1, std=_STD, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, 4 inner]`."""
        y = self.expand(nnx.relu(self.transform(nnx.relu(self.reduce(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Head(nnx.Module):
    """From the state of all branches to logits; see the module's docstring."""

    def __init__(
        self,
        channels: Sequence[int],
        head_channels: Sequence[int],
        features: int,
        num_classes: int,
        *,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ):
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        outputs = [_EXPANSION * inner for inner in head_channels]
        widths = zip(channels, head_channels, strict=True)
        self.bottlenecks = nnx.List([_Bottleneck(into, inner, **made) for into, inner in widths])
        self.descents = nnx.List(
            [
                ConvNorm(finer, coarser, 3, stride=2, bias=True, std=_STD, **made)
                for finer, coarser in itertools.pairwise(outputs)
            ]
        )
        self.last = ConvNorm(outputs[-1], features, 1, bias=True, std=_STD, **made)
        self.classifier = nnx.Linear(
            features, num_classes, kernel_metadata=logical_axes("embed", "classes"), **made
        )

    def __call__(self, z: State) -> jax.Array:
        """`[B, num_classes]`."""
        y, *coarser = (layer(leaf) for layer, leaf in zip(self.bottlenecks, z, strict=True))
        for descent, branch in zip(self.descents, coarser, strict=True):
            y = branch + nnx.relu(descent(y))
        return self.classifier(nnx.relu(self.last(y)).mean((1, 2)))
