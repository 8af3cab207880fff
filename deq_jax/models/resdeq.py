"""ResDEQ: a residual network whose stages are one equilibrium each.

    Conv 3x3 - BatchNorm - ReLU - stage - down-sampling - stage - ... - stage - mean - Linear

Stage i adds the equilibrium of a residual cell to its input: `u_i = x_i + z_i` with
`z_i = cell_i(z_i, x_i)`. Down-sampling is a residual block of stride 2 that has BatchNorm and ReLU
ahead of its convolutions, `x_{i+1} = down_i(u_i)`.

`ResDEQ(rngs=...)` is the published network for CIFAR-10. It has 10,319,754 parameters, 10,310,282
of which are kernels and the linear layer, which the paper counts (10.31M). `ResDEQ(**SMALL,
rngs=...)` has 162,810, about as many as the small MDEQ.

Source: McCallum, Arora and Foster, "Reversible deep equilibrium models", 2025, arXiv 2509.12917,
and its code.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.cells.layers import BatchNorm, ConvNorm, check_sizes, convolution
from deq_jax.cells.resnet import ResNetCell
from deq_jax.closure import Cell
from deq_jax.control import Control
from deq_jax.execution import Execution
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.gradients.reversed import Reversed
from deq_jax.models.classifier import EquilibriumClassifier, as_image_shape
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.reversible import Reversible
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any

State = tuple[jax.Array, ...]
"""The equilibrium `[B, H / 2^i, W / 2^i, C_i]` of each stage i, and the output of the last."""

SMALL: dict[str, Any] = {"channels": (16, 32, 32, 16)}
"""Options of a network with 162,810 parameters."""


class ResDEQ(EquilibriumClassifier):
    """The classifier with several equilibria in a row.

    Its core is called like one `deq_jax.nnx.DEQ`. `Stages` describes the state and the statistics
    of the core.

    Args:
        image_shape: `(height, width, channels)` of an image; height and width are multiples of
            `2^(stages - 1)`.
        num_classes: number of logits.
        channels: channels of each stage.
        widths: channels inside the branch of each stage's cell, in multiples of the stage's.
        group_size: channels in a group of the cells' GroupNorms; divides all `channels`.
        kernel_std: standard deviation of the cells' initial kernels.
        dropout: rate of the cells' variational dropout.
        solver: of each stage, as for `deq_fixed_point`; as published by default, whose 4 steps of
            two states are 8 evaluations.
        gradient: as for `deq_fixed_point`; as published by default.
        execution: as for `deq_fixed_point`.
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError, TypeError: sizes that do not fit or are not positive.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from deq_jax.models.resdeq import ResDEQ
        >>> model = ResDEQ(channels=(16, 16), widths=(1, 1), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((2, 32, 32, 3))).shape
        (2, 10)
    """

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        channels: Sequence[int] = (128, 256, 256, 128),
        widths: Sequence[int] = (1, 3, 3, 1),
        group_size: int = 16,
        kernel_std: float = 0.01,
        dropout: float = 0.0,
        solver: Solver = Reversible(damping=0.8, tol=1e-6, max_iter=8),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Reversed(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        image_shape = as_image_shape(image_shape)
        check_sizes(
            num_classes=num_classes, channels=channels, widths=widths, group_size=group_size
        )
        if len(channels) != len(widths) or not channels:
            raise ValueError(
                f"channels={tuple(channels)} and widths={tuple(widths)} must name one number for "
                "each stage"
            )
        for width in channels:
            if width % group_size:
                raise ValueError(
                    f"channels={tuple(channels)} must be multiples of group_size={group_size}"
                )
        height, width, colours = image_shape
        coarsest = 2 ** (len(channels) - 1)
        if height % coarsest or width % coarsest:
            raise ValueError(
                f"height and width of image_shape={image_shape} must be multiples of {coarsest} "
                f"for {len(channels)} stages"
            )
        self.image_shape = image_shape
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.stem = ConvNorm(colours, channels[0], 3, **made)
        cells = [
            ResNetCell(
                width,
                factor * width,
                groups=width // group_size,
                inner_groups=factor * width // group_size,
                kernel_std=kernel_std,
                dropout=dropout,
                **made,
            )
            for width, factor in zip(channels, widths, strict=True)
        ]
        descents = [_Descent(*pair, **made) for pair in itertools.pairwise(channels)]
        self.core = Stages(
            StagesCell(cells, descents), solver=solver, gradient=gradient, execution=execution
        )
        self.head = nnx.Linear(
            channels[-1], num_classes, kernel_metadata=logical_axes("embed", "classes"), **made
        )

    def injection(self, images: jax.Array) -> jax.Array:
        """What the first stage is given, `[B, H, W, channels[0]]`, from images `[B, H, W, C]`."""
        self.check_images(images)
        return nnx.relu(self.stem(images))

    def zeros(self, injection: jax.Array) -> State:
        """The state that the solves start from."""
        return self.core.cell.zeros(injection)

    def classify(self, z: State) -> jax.Array:
        """Logits `[B, num_classes]` from the core's output, of which the last array counts."""
        return self.head(z[-1].mean((1, 2)))


class Stages(nnx.Module):
    """Equilibria in a row, solved one after the other, called like one `deq_jax.nnx.DEQ`.

    The state is the equilibrium z_i of each stage, and at last the output `x_n + z_n` of the last
    one. All together are one equilibrium, that of `cell`, whose Jacobian is block-triangular: its
    eigenvalues are those of the stages, and zeros. `equation(x)` is this one equation, for whatever
    looks at Jacobians. A call solves it from the top: the first stage, then the second for what the
    first gave, and so on.

    The statistics of a call are those of all its solves together: of each sample the largest
    residual and the worst status, and the sums of the iterations, evaluations and products. A
    trace holds the largest residual that any stage had at its k-th evaluation. A `BackwardProbe`
    reports the backward solves of all stages in the same way. A budget of `control` is that of
    each stage.

    Attributes:
        cell: the whole as one cell.
        solver: of each stage, as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
    """

    def __init__(
        self,
        cell: "StagesCell",
        *,
        solver: Solver,
        gradient: GradientPolicy,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
    ):
        self.cell = cell
        self.solver, self.gradient, self.execution = solver, gradient, execution

    def __call__(
        self,
        x: jax.Array,
        z0: State | None = None,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[()] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> Any:
        """Solves for all equilibria.

        Args:
            x: `[B, H, W, channels[0]]`, input of the first stage.
            z0: where the solves start, like `cell.zeros(x)`, whose last array is of no account;
                zeros if left out.
            return_stats: return statistics, too.
            backward_probe: a dummy input whose cotangent reports the backward solves.
            sample_at: must be empty.
            sample_gradient: of no account.
            control: as for `deq_fixed_point`, for each stage.

        Returns:
            The state, or the state and statistics.

        Raises:
            ValueError: states on the way are asked for: the stages have no way in common.
        """
        if sample_at:
            raise ValueError(
                "sample_at must be empty: the stages are solved one after the other and have no "
                f"states on the way in common; got {sample_at}"
            )
        count = len(self.cell.cells)
        starts: Sequence[Any] = (None,) * count if z0 is None else z0
        probes: Sequence[Any] = (None,) * count
        if backward_probe is not None:
            probes = _each_own(backward_probe, count)
        reports = []

        def solved(i: int, cell: ResNetCell, x: jax.Array) -> jax.Array:
            layer = DEQ(cell, solver=self.solver, gradient=self.gradient, execution=self.execution)
            z, stats = layer(
                x, starts[i], return_stats=True, backward_probe=probes[i], control=control
            )
            reports.append(stats)
            return z

        *states, output = self.cell.along(x, solved)
        z = (*states, output)
        return (z, _together(reports)) if return_stats else z

    def equation(self, x: jax.Array) -> tuple[Cell, tuple[PyTree, PyTree], jax.Array]:
        """All stages as one equation: `f, params, x`; see `deq_jax.nnx.DEQ.equation`."""
        return DEQ(self.cell).equation(x)


class StagesCell(nnx.Module):
    """All stages as one cell: `f_i(z) = cell_i(z_i, x_i)`, `x_{i+1} = down_i(x_i + z_i)`.

    The last array of the state is the output of the last stage, `x_n + z_n`.

    Args:
        cells: a cell for each stage.
        descents: the down-sampling behind each but the last.
    """

    def __init__(self, cells: Sequence[ResNetCell], descents: Sequence["_Descent"]):
        self.cells = nnx.List(cells)
        self.descents = nnx.List(descents)

    def __call__(self, z: State, x: jax.Array) -> State:
        """One application to the state of all stages."""
        images = []

        def given(i: int, cell: ResNetCell, x: jax.Array) -> jax.Array:
            images.append(cell(z[i], x))
            return z[i]

        *_, output = self.along(x, given)
        return (*images, output)

    def along(self, x: jax.Array, state: Any) -> State:
        """The states of the stages, each from `state(i, cell_i, x_i)`, and the output."""
        states = []
        for i, cell in enumerate(self.cells):
            states.append(state(i, cell, x))
            x = x + states[-1].astype(x.dtype)
            if i < len(self.descents):
                x = self.descents[i](x)
        return (*states, x)

    def zeros(self, x: jax.Array) -> State:
        """The zero state for an input `[B, H, W, channels[0]]`."""
        batch, height, width, _ = x.shape
        channels = [x.shape[-1], *(descent.conv1.out_features for descent in self.descents)]
        states = [
            jnp.zeros((batch, height >> i, width >> i, features), x.dtype)
            for i, features in enumerate(channels)
        ]
        return (*states, states[-1])


class _Descent(nnx.Module):
    """`W₂ * relu(norm(W₁ * relu(norm(x)))) + W₀ * x`, with W₁ (3x3) and W₀ (1x1) of stride 2."""

    def __init__(self, into: int, out: int, *, param_dtype: Any, rngs: nnx.Rngs):
        made: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.norm1 = BatchNorm(into, **made)
        self.conv1 = convolution(into, out, 3, stride=2, **made)
        self.norm2 = BatchNorm(out, **made)
        self.conv2 = convolution(out, out, 3, **made)
        self.shortcut = convolution(into, out, 1, stride=2, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[B, H / 2, W / 2, out]`."""
        y = self.conv1(nnx.relu(self.norm1(x)))
        y = self.conv2(nnx.relu(self.norm2(y)))
        return y + self.shortcut(x)


_COMBINED: dict[str, Any] = {
    "residual": jnp.maximum,
    "iterations": jnp.add,
    "status": jnp.maximum,
    "evaluations": jnp.add,
    "trace": jnp.fmax,
    "products": jnp.add,
}
"""How a figure of two solves in a row is made of their own."""


def _together(reports: Sequence[SolveStats]) -> SolveStats:
    """The statistics of several solves as those of one; see `Stages`."""
    combined = {
        name: functools.reduce(combine, [getattr(report, name) for report in reports])
        for name, combine in _COMBINED.items()
        if getattr(reports[0], name) is not None
    }
    return SolveStats(**{"trace": None, **combined})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _each_own(probe: BackwardProbe, count: int) -> tuple[BackwardProbe, ...]:
    """A probe for each of several solves, whose reports come back as one."""
    return (probe,) * count


def _each_own_forward(probe: BackwardProbe, count: int) -> tuple[Any, None]:
    return (probe,) * count, None


def _each_own_backward(
    count: int, _: None, reports: tuple[BackwardProbe, ...]
) -> tuple[BackwardProbe]:
    combined = {
        name: functools.reduce(_COMBINED[name], [getattr(report, name) for report in reports])
        for name in BackwardProbe._fields
    }
    return (BackwardProbe(**combined),)


_each_own.defvjp(_each_own_forward, _each_own_backward)
