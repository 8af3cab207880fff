"""Operations that XLA's CPU compiler (0.10) runs slowly inside a loop, written another way.

Each replacement computes the same as the operation it stands for, up to rounding:

- a convolution whose kernel is not laid out as HWIO misses the fast path (jax#12868), and takes
  up to forty times as long: `ChannelsLast` lays the kernel out, before the loop if the kernel is
  the same in every trip. Where JAX will differentiate the loop, `Differentiable` takes its place:
  the transposes that JAX derives from it have kernels laid out as HWIO too;
- a convolution of any layout runs on one core, matrix products on all: `Winograd` turns 3x3
  convolutions into matrix products, with 2.25 times fewer multiplications;
- a sum over space and over the channels of a group, as GroupNorm takes it, is not vectorised:
  `SumInStages` sums over space first, all channels side by side.

Source of the fast convolution: Lavin and Gray, "Fast algorithms for convolutional neural
networks", 2016, F(2x2, 3x3).
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from deq_jax import _compat
from deq_jax.passes.flatten import Flat, Operation, inline

_LEAST_CHANNELS = 32
_LEAST_PIXELS = 1024
"""Below so many input or output channels, or pixels in a batch, Winograd's is no faster."""


def rewrite_operations(flat: Flat, known: int) -> Flat:
    """Replaces convolutions, and sums in stages.

    Args:
        flat: a loop's body, flattened without the derivative rules in it.
        known: how many of its first inputs are the same in every trip.
    """
    return _rewritten(flat, set(flat.invars[:known]), _replacement, keep_rules=False)


def rewrite_to_differentiate(flat: Flat) -> Flat:
    """Replaces convolutions by ones whose derivatives in reverse mode are fast too.

    Args:
        flat: a loop's body, flattened with the derivative rules in it.
    """
    return _rewritten(flat, set(), _differentiable, keep_rules=True)


def _rewritten(
    flat: Flat,
    constant: set[Any],
    choose: Callable[[Any, list[bool]], Callable[..., jax.Array] | None],
    keep_rules: bool,
) -> Flat:
    operations: list[Operation] = []
    replaced: dict[Any, Any] = {}
    for op in flat.operations:
        inputs = [
            a if isinstance(a, _compat.Literal) else replaced.get(a, a) for a in op.equation.invars
        ]
        op = dataclasses.replace(op, equation=op.equation.replace(invars=inputs))
        fixed = [isinstance(a, _compat.Literal) or a in constant for a in inputs]
        if all(fixed) and not op.equation.effects:
            constant.update(op.equation.outvars)
        elif (other := choose(op.equation, fixed)) is not None:
            traced = _compat.trace_types(other, inputs)
            equations, outputs = inline(traced, inputs, keep_rules=keep_rules)
            operations += map(Operation, equations)
            replaced.update(zip(op.equation.outvars, outputs, strict=True))
            continue
        operations.append(op)
    outvars = [a if isinstance(a, _compat.Literal) else replaced.get(a, a) for a in flat.outvars]
    return dataclasses.replace(flat, operations=operations, outvars=outvars)


def _replacement(equation: Any, fixed: list[bool]) -> Callable[..., jax.Array] | None:
    """A faster way to run the equation on a CPU; None where there is nothing to gain."""
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated" and params["batch_group_count"] == 1:
        image, kernel = (atom.aval for atom in equation.invars)
        convolution = ChannelsLast(params)
        if fixed[1] and convolution.suits_winograd(image, kernel):
            return Winograd(params)
        if params["dimension_numbers"] != _channels_last(image.ndim):
            return convolution
    if name == "reduce_sum" and params.get("out_sharding") is None:
        return SumInStages.of(equation.invars[0].aval.shape, params["axes"])
    return None


def _differentiable(equation: Any, fixed: list[bool]) -> Callable[..., jax.Array] | None:
    """A convolution that is as fast, and whose transposes are; None for another operation."""
    params = equation.params
    if equation.primitive.name != "conv_general_dilated":
        return None
    if params["batch_group_count"] != 1 or params["feature_group_count"] != 1:
        return None  # their transposes arrange the channels in another way
    return Differentiable(params)


@dataclasses.dataclass(frozen=True)
class ChannelsLast:
    """A convolution on `[N, *spatial, C]`, its kernel laid out `[*spatial, I, O]`.

    Attributes:
        params: of `conv_general_dilated`.
    """

    params: dict[str, Any]

    def before(self, kernel: jax.Array) -> Any:
        """The kernel; the barrier keeps the compiler from undoing its layout."""
        return lax.optimization_barrier(self.kernel_last(kernel))

    def kernel_last(self, kernel: jax.Array) -> jax.Array:
        """The kernel as `[*spatial, I, O]`."""
        out, into, *spatial = self.params["dimension_numbers"].rhs_spec
        return lax.transpose(kernel, (*spatial, into, out))

    def __call__(self, image: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution, in the axes it was written in."""
        ready = self.before(kernel)
        batch, channel, *spatial = self.params["dimension_numbers"].lhs_spec
        out = self.convolve(lax.transpose(image, (batch, *spatial, channel)), ready)
        batch, channel, *spatial = self.params["dimension_numbers"].out_spec
        return lax.transpose(out, tuple(np.argsort((batch, *spatial, channel))))

    def convolve(self, image: jax.Array, ready: Any) -> jax.Array:
        """The convolution of `[N, *spatial, C]`."""
        return self._convolved(image, ready, _channels_last(image.ndim))

    def _convolved(
        self, image: jax.Array, kernel: jax.Array, numbers: lax.ConvDimensionNumbers
    ) -> jax.Array:
        params = self.params
        return lax.conv_general_dilated(
            image,
            kernel,
            window_strides=params["window_strides"],
            padding=params["padding"],
            lhs_dilation=params["lhs_dilation"],
            rhs_dilation=params["rhs_dilation"],
            dimension_numbers=numbers,
            feature_group_count=params["feature_group_count"],
            precision=params["precision"],
            preferred_element_type=params["preferred_element_type"],
        )

    def suits_winograd(self, image: Any, kernel: Any) -> bool:
        """Whether it is a dense 3x3 convolution, without strides, of some size."""
        params = self.params
        out, into, *spatial = params["dimension_numbers"].rhs_spec
        return (
            [kernel.shape[axis] for axis in spatial] == [3, 3]
            and min(kernel.shape[out], kernel.shape[into]) >= _LEAST_CHANNELS
            and image.size >= _LEAST_PIXELS * kernel.shape[into]
            and {*params["window_strides"], *params["lhs_dilation"], *params["rhs_dilation"]} == {1}
            and params["feature_group_count"] == 1
            and min(min(sides) for sides in params["padding"]) >= 0
            and image.dtype == kernel.dtype
            and image.dtype in (jnp.float32, jnp.float64)
            and params["preferred_element_type"] in (None, image.dtype)
        )


def _channels_last(ndim: int) -> lax.ConvDimensionNumbers:
    """Dimension numbers of `[N, *spatial, C]` inputs and `[*spatial, I, O]` kernels."""
    spatial = tuple(range(1, ndim - 1))
    return lax.ConvDimensionNumbers(
        lhs_spec=(0, ndim - 1, *spatial),
        rhs_spec=(ndim - 1, ndim - 2, *range(ndim - 2)),
        out_spec=(0, ndim - 1, *spatial),
    )


@dataclasses.dataclass(frozen=True)
class Differentiable(ChannelsLast):
    """A convolution from which JAX derives transposes whose kernels are laid out as HWIO.

    With `y = x * k` the tangents are `dx * k` and `x * dk`. JAX transposes a convolution by
    reading the same arrays with other roles for their axes: the kernel's I and O change places,
    and for the gradient of k so do N and C of the image, while the cotangent becomes the kernel.
    So the tangents are computed from `[*spatial, O, I]`, `[C, *spatial, N]` and
    `[I, *spatial, O]`, to `[*spatial, N, O]`. The transposes are then on the fast path, and the
    tangents, which only forward mode computes, are not.

    Through three evaluations in a `scan` of two 3x3 convolutions, 24 to 120 channels and back, on
    50 images of 32x32 pixels, the gradient took 1.5 s of CPU time in place of 60.
    """

    def convolve(self, image: jax.Array, ready: Any) -> jax.Array:
        """The convolution of `[N, *spatial, C]`."""

        @jax.custom_jvp
        def convolution(image: jax.Array, kernel: jax.Array) -> jax.Array:
            return self._convolved(image, kernel, _channels_last(image.ndim))

        def derivative(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
            (image, kernel), parts = primals, []
            if not isinstance(tangents[0], SymbolicZero):
                parts.append(self._of_image(tangents[0], kernel))
            if not isinstance(tangents[1], SymbolicZero):
                parts.append(self._of_kernel(image, tangents[1]))
            return convolution(image, kernel), functools.reduce(operator.add, parts)

        convolution.defjvp(derivative, symbolic_zeros=True)
        return convolution(image, ready)

    def _of_image(self, tangent: jax.Array, kernel: jax.Array) -> jax.Array:
        """`dx * k`."""
        numbers = _channels_last(tangent.ndim)
        out, into, *spatial = numbers.rhs_spec
        numbers = numbers._replace(rhs_spec=(into, out, *spatial))
        return self._convolved(tangent, kernel.swapaxes(-1, -2), numbers)

    def _of_kernel(self, image: jax.Array, tangent: jax.Array) -> jax.Array:
        """`x * dk`."""
        last, middle = image.ndim - 1, range(1, image.ndim - 1)
        numbers = lax.ConvDimensionNumbers(
            lhs_spec=(last, 0, *middle),
            rhs_spec=(last, 0, *middle),
            out_spec=(last - 1, last, *range(last - 1)),
        )
        image, tangent = image.swapaxes(0, last), jnp.moveaxis(tangent, last - 1, 0)
        return jnp.moveaxis(self._convolved(image, tangent, numbers), last - 1, 0)


@dataclasses.dataclass(frozen=True)
class Winograd(ChannelsLast):
    """A 3x3 convolution by 16 matrix products: F(2x2, 3x3) of Lavin and Gray.

    The output is cut into tiles of 2x2, each of which depends on a 4x4 patch d of the input. With
    the kernel g transformed before the loop,

        Y = Aᵀ [ (G g Gᵀ) ⊙ (Bᵀ d B) ] A

    where ⊙ is elementwise in the 4x4 positions and a matrix product over the channels. Entries of
    A and B are 0 and ±1, of G at most 1, so that rounding is that of the direct convolution (on
    random data 2.6e-7 against 3.8e-7 in float32).
    """

    def before(self, kernel: jax.Array) -> Any:
        """G g Gᵀ: 16 matrices `[I, O]`."""
        kernel = self.kernel_last(kernel)
        rows = _transform(_G, [kernel[i] for i in range(3)])
        matrices = [g for row in rows for g in _transform(_G, [row[j] for j in range(3)])]
        return lax.optimization_barrier(matrices)

    def convolve(self, image: jax.Array, ready: Any) -> jax.Array:
        """The convolution of `[N, H, W, C]`, some samples at a time."""
        batch, *sides, channels = image.shape
        # Patches and products take four times the memory of input and output; beyond the cache
        # they take twice the time.
        sample = 4 * math.prod(sides) * (channels + ready[0].shape[1]) * image.dtype.itemsize
        # Each block has as many samples of each shard of the batch: a loop over blocks of samples
        # that follow one another would gather the batch. On one device there is one shard.
        shards = math.gcd(batch, jax.device_count())
        together = max(
            n
            for n in range(shards, batch + 1, shards)
            if batch % n == 0 and (n == shards or n * sample <= _CACHE)
        )
        blocks = batch // together

        def regrouped(a: jax.Array, *axes: int) -> jax.Array:
            # XLA copies an array to swap two axes, even if one of them has the length 1.
            return a if shards == 1 else a.reshape(*axes, -1, *a.shape[-3:]).swapaxes(0, 1)

        parts = regrouped(image, shards, blocks).reshape(blocks, together, *image.shape[1:])
        out = lax.map(lambda part: self._convolve(part, ready), parts)
        return regrouped(out, blocks, shards).reshape(batch, *out.shape[2:])

    def _convolve(self, image: jax.Array, ready: list[jax.Array]) -> jax.Array:
        batch, *sides, _ = image.shape
        padding = self.params["padding"]
        out = [side + sum(pads) - 2 for side, pads in zip(sides, padding, strict=True)]
        height, width = reach = [side + side % 2 for side in out]
        margins = [
            (low, length + 2 - side - low, 0)
            for length, side, (low, _) in zip(reach, sides, padding, strict=True)
        ]
        image = lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
        rows = _transform(_B, [image[:, i : i + height : 2] for i in range(4)])
        patches = [
            patch
            for row in rows
            for patch in _transform(_B, [row[:, :, j : j + width : 2] for j in range(4)])
        ]
        # Sixteen products and not a batched one: putting their operands into one array takes as
        # long as multiplying them.
        products = [
            jnp.matmul(patch, matrix, precision=lax.Precision.HIGHEST)
            for patch, matrix in zip(patches, ready, strict=True)
        ]
        columns = [_transform(_A, products[j::4]) for j in range(4)]
        blocks = [_transform(_A, [column[i] for column in columns]) for i in range(2)]
        image = jnp.stack([jnp.stack(block, 3) for block in blocks], 2)
        return image.reshape(batch, height, width, -1)[:, : out[0], : out[1]]


_CACHE = 2**24
"""Bytes that are taken to fit into a processor's cache."""

_B = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_G = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_A = ((1, 1, 1, 0), (0, 1, -1, -1))


def _transform(matrix: Sequence[Sequence[float]], parts: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ parts`, the parts being arrays: a few sums and differences each."""

    def combine(row: Sequence[float]) -> jax.Array:
        terms = [
            (c, part if abs(c) == 1 else part * abs(c)) for c, part in zip(row, parts, strict=True)
        ]
        added = functools.reduce(operator.add, [term for c, term in terms if c > 0])
        return functools.reduce(operator.sub, [term for c, term in terms if c < 0], added)

    return [combine(row) for row in matrix]


@dataclasses.dataclass(frozen=True)
class SumInStages:
    """A sum over outer and innermost axes with a kept one between, outer axes first.

    Attributes:
        outer: the reduced axes before the last one that is kept.
        inner: the reduced axes after it.
    """

    outer: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], axes: Sequence[int]) -> "SumInStages | None":
        """The replacement for a sum of this shape; None if it reduces no such axes."""
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        if not kept:
            return None
        outer = tuple(axis for axis in axes if axis < kept[-1])
        inner = tuple(axis for axis in axes if axis > kept[-1])
        return cls(outer, inner) if outer and inner else None

    def __call__(self, value: jax.Array) -> jax.Array:
        """The sum."""
        lead, rest = value.shape[: max(self.outer) + 1], value.shape[max(self.outer) + 1 :]
        # All axes behind the outer ones as one: added up side by side. The barrier keeps the
        # compiler from joining the two sums again.
        value = lax.reshape(value, (*lead, int(np.prod(rest)))).sum(self.outer)
        value = lax.optimization_barrier(value)
        value = value.reshape(*value.shape[:-1], *rest)
        return value.sum(tuple(range(value.ndim - len(self.inner), value.ndim)))
