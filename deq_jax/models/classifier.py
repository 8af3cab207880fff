"""What image classifiers around an equilibrium have in common."""

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import check_sizes
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any


class EquilibriumClassifier(nnx.Module):
    """An injection, an equilibrium, and a head: `classify(core(x, zeros(x)))`, x the injection.

    Attributes:
        image_shape: `(height, width, channels)` of an image.
        core: the layer, a `deq_jax.nnx.DEQ` or one that is called alike.
    """

    image_shape: tuple[int, int, int]
    core: Any

    def injection(self, images: jax.Array) -> PyTree:
        """What the core is given, from images `[B, H, W, C]`."""
        raise NotImplementedError

    def zeros(self, injection: PyTree) -> PyTree:
        """The state that a solve starts from, leaves `[B, ...]`."""
        raise NotImplementedError

    def start(self, injection: PyTree) -> PyTree:
        """Where a solve starts: at zeros, unless a network has something better."""
        return self.zeros(injection)

    def classify(self, z: PyTree) -> jax.Array:
        """Logits `[B, num_classes]` from the core's output."""
        raise NotImplementedError

    @overload
    def __call__(
        self,
        images: jax.Array,
        *,
        return_stats: Literal[False] = False,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        images: jax.Array,
        *,
        return_stats: Literal[True],
        backward_probe: BackwardProbe | None = None,
    ) -> tuple[jax.Array, SolveStats]: ...

    @overload
    def __call__(
        self,
        images: jax.Array,
        *,
        return_stats: bool,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array | tuple[jax.Array, SolveStats]: ...

    def __call__(
        self,
        images: jax.Array,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array | tuple[jax.Array, SolveStats]:
        """Logits `[B, num_classes]` of `images` `[B, H, W, C]`, with `return_stats` also stats.

        Raises:
            ValueError: images of another shape than `image_shape`.
            TypeError: images that are not floating.
        """
        injection = self.injection(images)
        z, stats = self.core(
            injection, self.start(injection), return_stats=True, backward_probe=backward_probe
        )
        # A solve may be in another precision.
        like = jax.eval_shape(self.zeros, injection)
        logits = self.classify(jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), z, like))
        return (logits, stats) if return_stats else logits

    def check_images(self, images: jax.Array) -> None:
        """Raises unless images are floating and `[B, *image_shape]`."""
        check_images(images, self.image_shape)


def as_image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    """The argument `image_shape` as a tuple.

    Raises:
        ValueError, TypeError: it is not three integers of at least 1.
    """
    if len(image_shape) != 3:
        raise ValueError(f"image_shape must be (height, width, channels), got {tuple(image_shape)}")
    check_sizes(image_shape=image_shape)
    height, width, channels = image_shape
    return height, width, channels


def check_images(images: jax.Array, image_shape: tuple[int, int, int]) -> None:
    """Raises unless images are floating and `[B, *image_shape]`.

    Raises:
        ValueError: images of another shape.
        TypeError: images that are not floating, such as uint8.
    """
    if images.shape[1:] != image_shape:
        raise ValueError(
            f"images must have shape [B, {', '.join(map(str, image_shape))}], "
            f"got {list(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(
            f"images must be floating, with pixels in [0, 1]; got {images.dtype}. Pass "
            "images.astype(jnp.float32) / 255"
        )
