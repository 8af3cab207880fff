"""Image classifiers around positive concave deep equilibrium layers (pcDEQ)."""

from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.concave import Activation, ConcaveCell
from deq_jax.cells.layers import BatchNorm
from deq_jax.checks import check_count
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.models.classifier import EquilibriumClassifier, as_image_shape
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.picard import Picard
from deq_jax.stability.normalization import WeightNorm

PyTree = Any

_POOL = 8


class PcDEQ(EquilibriumClassifier):
    """A classifier whose core is the equilibrium of a `ConcaveCell` with weight normalisation.

    The two forms are

        dense:  Linear - BatchNorm - core - BatchNorm - Linear
        conv:   Conv 3x3 - BatchNorm - core - max pool 3x3 - BatchNorm - average pool 8x8 - Linear

    with a max pool of stride 1 that keeps height and width, and an average pool that leaves out the
    rows and columns behind the last whole window. Each core has one equilibrium for non-negative
    weights, which Picard iteration finds; see `ConcaveCell`. Training has to keep the weights
    non-negative: after each step of the optimiser,

        params = model.project(params)

    Source: Gabor, Piotrowski, Cavalcante, arXiv:2402.04029, and its code for MNIST: 80 features of
    the dense form, 82 of the convolutional one.

    Args:
        image_shape: `(height, width, channels)` of an image.
        num_classes: number of logits.
        form: `dense` or `conv`.
        features: size of the state's last axis; None for the published one.
        activation: of the cell: tanh, softsign or relu6 (pcDEQ-1), or sigmoid (pcDEQ-2).
        solver: as for `deq_fixed_point`; the published tolerance and budget by default.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError: `form` or `activation` is unknown, or an image of the convolutional form is
            smaller than a window of the average pool.
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        form: Literal["dense", "conv"] = "conv",
        features: int | None = None,
        activation: Activation = "tanh",
        solver: Solver = Picard(tol=1e-4, max_iter=200),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if form not in ("dense", "conv"):
            raise ValueError(f"form must be dense or conv, got {form!r}")
        height, width, colours = image_shape = as_image_shape(image_shape)
        if form == "conv" and min(height, width) < _POOL:
            raise ValueError(
                f"images must be at least {_POOL}x{_POOL} for form='conv', got {height}x{width}"
            )
        self.image_shape, self.form = image_shape, form
        self.features = {"dense": 80, "conv": 82}[form] if features is None else features
        check_count(self, "features")
        kind: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.stem: nnx.Linear | nnx.Conv
        if form == "dense":
            names = logical_axes(None, "mlp")
            inputs, outputs = height * width * colours, self.features
            self.stem = nnx.Linear(inputs, self.features, kernel_metadata=names, **kind)
        else:
            names = logical_axes(None, None, None, "channels")
            outputs = (height // _POOL) * (width // _POOL) * self.features
            self.stem = nnx.Conv(colours, self.features, (3, 3), kernel_metadata=names, **kind)
        self.norm_in = BatchNorm(self.features, **kind)
        self.norm_out = BatchNorm(self.features, **kind)
        window = None if form == "dense" else 3
        cell = ConcaveCell(self.features, kernel_size=window, activation=activation, **kind)
        self.core = DEQ(
            cell, solver=solver, gradient=gradient, execution=execution, normalization=WeightNorm()
        )
        names = logical_axes("embed", "classes")
        self.head = nnx.Linear(outputs, num_classes, kernel_metadata=names, **kind)

    def injection(self, images: jax.Array) -> jax.Array:
        """What the core is given, `[B, ..., features]`, from images `[B, H, W, C]`."""
        self.check_images(images)
        if self.form == "dense":
            images = images.reshape(len(images), -1)
        return self.norm_in(self.stem(images))

    def zeros(self, injection: jax.Array) -> jax.Array:
        """The state that a solve starts from, from which it rises to the equilibrium."""
        return jnp.zeros_like(injection)

    def classify(self, z: jax.Array) -> jax.Array:
        """Logits `[B, num_classes]` from the core's output `[B, ..., features]`."""
        if self.form == "conv":
            z = nnx.max_pool(z, (3, 3), (1, 1), "SAME")
        z = self.norm_out(z)
        if self.form == "conv":
            batch, height, width, features = z.shape
            rows, columns = height // _POOL, width // _POOL
            z = z[:, : rows * _POOL, : columns * _POOL]
            z = z.reshape(batch, rows, _POOL, columns, _POOL, features).mean((2, 4))
        return self.head(z.reshape(len(z), -1))

    def rate(self, images: jax.Array) -> jax.Array:
        """By which factor the error of each sample shrinks in an evaluation, `[B]`.

        See `ConcaveCell`; NaN if weights are negative, so that nothing is known.
        """
        cell = cast(Any, self.core.effective_cell())
        return cell.rate(cell.inject(self.injection(images)))

    def project(self, params: PyTree) -> PyTree:
        """Sets what is negative of the core's weights and gains to zero.

        Args:
            params: the model's parameters, `nnx.state(model, nnx.Param)`, or the same as a nested
                dict of arrays.

        Returns:
            A pytree like `params`; what is not of the core is unchanged.
        """
        projected = jax.tree.map(lambda leaf: leaf, params)  # a copy
        projected["core"] = ConcaveCell.project(params["core"])
        return projected
