"""Image classifiers whose core is a monotone operator equilibrium.

    (image - mean) / std - equilibrium of a monotone cell - Linear

The published networks are in `PUBLISHED`:

    model = MonDEQ(**PUBLISHED["mnist-conv"], rngs=nnx.Rngs(0))

Source: Winston and Kolter, "Monotone operator equilibrium networks", 2020, table 1.
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import check_sizes, uniform
from deq_jax.cells.monotone import MonotoneConvCell, MonotoneDenseCell, MonotoneMultiTierCell
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.classifier import EquilibriumClassifier, as_image_shape
from deq_jax.monotone import AlphaSearch, MonotoneDEQ, tune_alpha
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.picard import Picard
from deq_jax.splitting import PeacemanRachford, Splitting

PyTree = Any
Operator = Literal["dense", "conv", "multitier"]

_POOL = 4


class MonDEQ(EquilibriumClassifier):
    """A classifier with a monotone core.

    With `operator="dense"` the image is flattened, and the head is linear in the state. With
    `"conv"` the state `[B, H + 2, W + 2, width]` is averaged over windows of 4x4 first; rows and
    columns that are left over are ignored. With `"multitier"` the head is linear in the coarsest
    state. Weights and biases start uniformly in ±1/√(number of inputs).

    Args:
        image_shape: `(height, width, channels)` of an image.
        num_classes: number of logits.
        operator: which monotone cell is the core.
        widths: features of the dense state, channels of the convolutional one, or the channels of
            each resolution, finest first.
        m: strong monotonicity, above 0.
        mean: mean of the pixels, one number for all channels or one for each. The network gets
            `(image - mean) / std`.
        std: standard deviation of the pixels, one number for all channels or one for each.
        splitting: as for `MonotoneDEQ`.
        solver: as for `deq_fixed_point`; the published tolerance and budget by default.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`; a state of another dtype is cast back behind the core.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Attributes:
        core: the `MonotoneDEQ`.

    Raises:
        ValueError, TypeError: `operator` is unknown, `widths` does not fit it, a size or a standard
            deviation is not positive, or the image is too small or cannot be halved so often.

    Example: logits `[2, 10]`.
        >>> model = MonDEQ(**PUBLISHED["mnist-dense"], rngs=nnx.Rngs(0))
        >>> logits, stats = model(jnp.zeros((2, 28, 28, 1)), return_stats=True)
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        operator: Operator = "conv",
        widths: Sequence[int] = (54,),
        m: float = 1.0,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        splitting: Splitting = PeacemanRachford(),  # noqa: B008  (frozen)
        solver: Solver = Picard(tol=1e-2, max_iter=300),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths, image_shape = tuple(widths), as_image_shape(image_shape)
        check_sizes(widths=widths, num_classes=num_classes)
        if operator not in get_args(Operator):
            raise ValueError(f"operator must be one of {get_args(Operator)}, got {operator!r}")
        if operator != "multitier" and len(widths) != 1:
            raise ValueError(f'widths must be one number with operator="{operator}", got {widths}')
        if operator == "multitier" and len(widths) < 2:
            raise ValueError(
                f'widths must be two or more with operator="{operator}", such as (16, 32, 32); got '
                f"{widths}"
            )
        self.image_shape, self.operator = image_shape, operator
        self.mean, self.std = (
            _of_channels("mean", mean, image_shape),
            _of_channels("std", std, image_shape),
        )
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {std}")
        height, width, colours = image_shape
        options: dict[str, Any] = {"m": m, "param_dtype": param_dtype, "rngs": rngs}
        cell: MonotoneDenseCell | MonotoneConvCell | MonotoneMultiTierCell
        if operator == "dense":
            cell = MonotoneDenseCell(height * width * colours, widths[0], **options)
            features = widths[0]
        elif operator == "conv":
            cell = MonotoneConvCell(image_shape, widths[0], **options)
            pooled = [side // _POOL for side in cell.grid]
            if 0 in pooled:
                raise ValueError(f"the image must be at least 2x2, got {height}x{width}")
            features = pooled[0] * pooled[1] * widths[0]
        else:
            cell = MonotoneMultiTierCell(image_shape, widths, **options)
            features = cell.grids[-1][0] * cell.grids[-1][1] * widths[-1]
        self.core = MonotoneDEQ(
            cell, splitting=splitting, solver=solver, gradient=gradient, execution=execution
        )
        self.head = nnx.Linear(
            features,
            num_classes,
            kernel_init=uniform(features),
            bias_init=uniform(features),
            kernel_metadata=logical_axes("embed", "classes"),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    def injection(self, images: jax.Array) -> jax.Array:
        """What the core is given: standardised images, flattened for a dense core.

        Args:
            images: `[B, H, W, C]`, floating, with pixels in the units of `mean` and `std`.

        Raises:
            ValueError: they have another shape.
            TypeError: they are not floating.
        """
        self.check_images(images)
        mean, std = (jnp.asarray(values, images.dtype) for values in (self.mean, self.std))
        images = (images - mean) / std
        return images.reshape(len(images), -1) if self.operator == "dense" else images

    def tune(self, images: jax.Array) -> AlphaSearch:
        """Gives the core the step size that takes fewest iterations; see `tune_alpha`.

        Args:
            images: `[B, H, W, C]`.
        """
        return tune_alpha(self.core, self.injection(images))

    def zeros(self, injection: jax.Array) -> PyTree:
        """The state of zeros that a solve starts from."""
        like = jax.eval_shape(cast(Any, self.core.cell).inject, injection)
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), like)

    def start(self, injection: jax.Array) -> None:
        """No start but zeros."""
        del injection

    def classify(self, z: PyTree) -> jax.Array:
        """Logits `[B, num_classes]` of the core's z*, or of the u* of `core.equation`."""
        z = cast(Any, self.core.cell).activation(z)  # changes no z*
        if self.operator == "multitier":
            z = z[-1]
        if self.operator == "conv":
            batch, height, width, channels = z.shape
            rows, columns = height // _POOL, width // _POOL
            windows = (batch, rows, _POOL, columns, _POOL, channels)
            z = z[:, : rows * _POOL, : columns * _POOL].reshape(windows).mean((2, 4))
        return self.head(z.reshape(len(z), -1))


def _of_channels(
    name: str, values: float | Sequence[float], image_shape: tuple[int, int, int]
) -> tuple[float, ...]:
    channels = image_shape[-1]
    if isinstance(values, int | float):
        return (float(values),) * channels
    values = tuple(float(value) for value in values)
    if len(values) != channels:
        raise ValueError(f"{name} must be one number or {channels}, one a channel, got {values}")
    return values


_MNIST = {"image_shape": (28, 28, 1), "mean": 0.1307, "std": 0.3081}
_SVHN = {
    "image_shape": (32, 32, 3),
    "mean": (0.4377, 0.4438, 0.4728),
    "std": (0.1980, 0.2010, 0.1970),
}
_CIFAR10 = {
    "image_shape": (32, 32, 3),
    "mean": (0.4914, 0.4822, 0.4465),
    "std": (0.2470, 0.2435, 0.2616),
}

PUBLISHED: dict[str, dict[str, Any]] = {
    "mnist-dense": {**_MNIST, "operator": "dense", "widths": (87,)},
    "mnist-conv": {**_MNIST, "operator": "conv", "widths": (54,)},
    "mnist-multitier": {**_MNIST, "operator": "multitier", "widths": (16, 32, 32)},
    "svhn-conv": {**_SVHN, "operator": "conv", "widths": (81,)},
    "svhn-multitier": {**_SVHN, "operator": "multitier", "widths": (16, 32, 60)},
    "cifar10-conv": {**_CIFAR10, "operator": "conv", "widths": (81,)},
    "cifar10-multitier": {**_CIFAR10, "operator": "multitier", "widths": (16, 32, 60)},
    "cifar10-conv-large": {**_CIFAR10, "operator": "conv", "widths": (200,)},
    "cifar10-multitier-large": {**_CIFAR10, "operator": "multitier", "widths": (64, 128, 128)},
}
"""Arguments of `MonDEQ` for the published networks, all with m = 1.

| | parameters |
| --- | --- |
| `mnist-dense` | 84,313 |
| `mnist-conv` | 79,500 |
| `mnist-multitier` | 81,394 |
| `svhn-conv`, `cifar10-conv` | 172,218 |
| `svhn-multitier`, `cifar10-multitier` | 170,194 |
| `cifar10-conv-large` | 853,612 |
| `cifar10-multitier-large` | 1,014,546 |

Pixels are between 0 and 1. The mean and the standard deviation are those of the published code.
"""
