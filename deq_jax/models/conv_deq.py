"""The tutorial's convolutional image classifier, and its two controls.

All three are one network around a different core, and the core of each is made of the same cell:

    Conv 3x3 - BatchNorm - core - BatchNorm - average pool - Linear

The core is an equilibrium of the cell (`ConvDEQ`), the cell applied k times from zero with the
same weights (`WeightTiedConvNet`), or k cells with weights of their own (`ExplicitConvNet`).

Source: "Deep Implicit Layers", ch. 4; 64,842 parameters in its CIFAR-10 form.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import check_sizes
from deq_jax.cells.resnet import ResNetCell
from deq_jax.checks import check_count
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.classifier import EquilibriumClassifier, as_image_shape, check_images
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.stability.normalization import Normalization


def count_parameters(model: nnx.Module) -> int:
    """Number of trainable scalars (`nnx.Param`)."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


class _ImageClassifier(nnx.Module):
    """Everything around the core. See the module's docstring.

    Args:
        image_shape: `(height, width, channels)` of an image.
        num_classes: number of logits.
        channels: channels of the core's state.
        inner_channels: channels inside the cell's branch.
        groups: groups of the cell's GroupNorms.
        pool: side of the average pool's window and its stride; must divide height and width.
        kernel_std: standard deviation of the cell's initial kernels.
        dropout: rate of the cell's variational dropout.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: `pool` does not divide the image, or a size is not positive.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        channels: int = 48,
        inner_channels: int = 64,
        groups: int = 8,
        pool: int = 8,
        kernel_std: float = 0.01,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        check_sizes(
            num_classes=num_classes,
            channels=channels,
            inner_channels=inner_channels,
            groups=groups,
            pool=pool,
        )
        self.image_shape = height, width, colours = as_image_shape(image_shape)
        if height % pool or width % pool:
            raise ValueError(f"pool={pool} must divide the image's {height}x{width}")
        self.channels, self.inner_channels, self.groups = channels, inner_channels, groups
        self.pool, self.kernel_std, self.dropout = pool, kernel_std, dropout
        names = logical_axes(None, None, None, "channels")
        self.stem = nnx.Conv(colours, channels, (3, 3), kernel_metadata=names, rngs=rngs)
        # PyTorch's 0.1 is the weight of the new batch, Flax's 0.9 that of the old statistics.
        self.norm_in = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.norm_out = nnx.BatchNorm(channels, momentum=0.9, epsilon=1e-5, rngs=rngs)
        features = (height // pool) * (width // pool) * channels
        names = logical_axes("embed", "classes")
        self.head = nnx.Linear(features, num_classes, kernel_metadata=names, rngs=rngs)

    def _cell(self, rngs: nnx.Rngs) -> ResNetCell:
        return ResNetCell(
            self.channels,
            self.inner_channels,
            groups=self.groups,
            kernel_std=self.kernel_std,
            dropout=self.dropout,
            rngs=rngs,
        )

    def injection(self, images: jax.Array) -> jax.Array:
        """What the core is given, `[B, H, W, channels]`, from images `[B, H, W, C]`."""
        check_images(images, self.image_shape)
        return self.norm_in(self.stem(images))

    def classify(self, z: jax.Array) -> jax.Array:
        """Logits `[B, num_classes]` from the core's output `[B, H, W, channels]`."""
        batch, height, width, channels = z.shape
        pool = self.pool  # not nnx.avg_pool, which fails under strict dtype promotion
        windows = (batch, height // pool, pool, width // pool, pool, channels)
        pooled = self.norm_out(z).reshape(windows).mean((2, 4))
        return self.head(pooled.reshape(batch, -1))


class ConvDEQ(_ImageClassifier, EquilibriumClassifier):
    """The classifier whose core is the equilibrium of one residual cell.

    Args:
        solver: as for `deq_fixed_point`; the tutorial's tolerance and budget by default.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`; a state of another dtype is cast back behind the core.
        normalization: of the cell's kernels, as for `deq_jax.nnx.DEQ`.
        learned_start: start the solve from `norm(relu(W * injection))`, a layer with weights of its
            own (SkipDEQ) that learns from `stability.initializer_loss` alone, instead of zeros.
        rngs: stream `params`.
        **network: as for the module's networks: `image_shape`, `num_classes`, `channels`,
            `inner_channels`, `groups`, `pool`, `kernel_std`, `dropout`.
    """

    def __init__(
        self,
        *,
        solver: Solver = Anderson(tol=1e-2, max_iter=25),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        normalization: Normalization | None = None,
        learned_start: bool = False,
        rngs: nnx.Rngs,
        **network: Any,
    ):
        super().__init__(rngs=rngs, **network)
        cell = self._cell(rngs)
        self.core = DEQ(
            cell,
            solver=solver,
            gradient=gradient,
            execution=execution,
            normalization=normalization,
        )
        self.initializer = _Initializer(self.channels, self.groups, rngs) if learned_start else None

    def zeros(self, injection: jax.Array) -> jax.Array:
        """The state that a solve starts from unless there is a learned start."""
        return jnp.zeros_like(injection)

    def start(self, injection: jax.Array) -> jax.Array | None:
        """The learned start of the solve, like `injection`; None without one."""
        if self.initializer is None:
            return None
        # No gradient flows back: the start must not change the injection that the solve is given.
        return self.initializer(jax.lax.stop_gradient(injection))


class _Initializer(nnx.Module):
    """`norm(relu(W * x))`, of the same make as the end of the cell."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.conv = nnx.Conv(
            channels,
            channels,
            (3, 3),
            use_bias=False,
            kernel_metadata=logical_axes(None, None, None, "channels"),
            rngs=rngs,
        )
        self.norm = nnx.GroupNorm(channels, groups, epsilon=1e-5, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H, W, channels]`."""
        return self.norm(nnx.relu(self.conv(x)))


class WeightTiedConvNet(_ImageClassifier):
    """Control: `depth` applications of one cell from z = 0, ordinary backpropagation.

    As many parameters as `ConvDEQ`; memory grows with `depth`.

    Args:
        depth: number of applications.
        rngs: stream `params`.
        **network: as for `ConvDEQ`.
    """

    def __init__(self, *, depth: int = 8, rngs: nnx.Rngs, **network: Any):
        super().__init__(rngs=rngs, **network)
        self.depth = depth
        check_count(self, "depth")
        self.cell = self._cell(rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[B, num_classes]` of `images` `[B, H, W, C]`."""
        injection = self.injection(images)
        z = jnp.zeros_like(injection)
        for _ in range(self.depth):
            z = self.cell(z, injection)
        return self.classify(z)


class ExplicitConvNet(_ImageClassifier):
    """Control: `depth` cells with weights of their own, each given the injection.

    Args:
        depth: number of cells.
        rngs: stream `params`.
        **network: as for `ConvDEQ`.
    """

    def __init__(self, *, depth: int = 8, rngs: nnx.Rngs, **network: Any):
        super().__init__(rngs=rngs, **network)
        self.depth = depth
        check_count(self, "depth")
        self.cells = nnx.List([self._cell(rngs) for _ in range(depth)])

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[B, num_classes]` of `images` `[B, H, W, C]`."""
        injection = self.injection(images)
        z = jnp.zeros_like(injection)
        for cell in self.cells:
            z = cell(z, injection)
        return self.classify(z)
