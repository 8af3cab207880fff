"""Weight and spectral normalisation, as pure maps from parameters to effective parameters.

Both are meant to be evaluated once a step, outside a solver's loop: every evaluation of f in a
solve then sees the same effective weights, and pays nothing for them. The layers of `deq_jax.nnx`
and `deq_jax.linen` do so with their option `normalization`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.checks import check_count, check_flag, check_number
from deq_jax.stability.projections import (
    Axes,
    Path,
    Predicate,
    check_paths,
    flax_output_axes,
    is_kernel,
    kernel_axes,
    kernel_matrix,
    select_kernels,
)
from deq_jax.tree import accumulation_dtype

PyTree = Any
Arrays = dict[str, jax.Array]

# Steps of power iteration before the first call, so that this one is normalised well already.
STARTING_ITERATIONS = 30


class Normalization(Protocol):
    """What the layers ask of a normalisation; `WeightNorm` and `SpectralNorm` are two.

    It must be hashable, and its results pytrees of arrays.
    """

    def init(self, params: PyTree) -> tuple[PyTree, PyTree]:
        """Trainable parameters and statistics for `params`; either may be empty."""
        ...

    def __call__(
        self, params: PyTree, trainable: PyTree, statistics: PyTree
    ) -> tuple[PyTree, PyTree]:
        """Effective parameters, like `params`, and the next statistics."""
        ...


def check_normalization(normalization: Any) -> None:
    """Raises a TypeError unless it is None or has the methods of `Normalization`."""
    usable = callable(getattr(normalization, "init", None)) and callable(normalization)
    if normalization is not None and (isinstance(normalization, type) or not usable):
        raise TypeError(
            "normalization must be WeightNorm(), SpectralNorm(), None or an object with init and "
            f"__call__, got {normalization!r}"
        )


@dataclasses.dataclass(frozen=True)
class WeightNorm:
    """Weight normalisation: `W = v · min(clip, g / ‖v‖)`, one g and one norm a channel.

    `v` is the kernel in `params`, `‖v‖` the Euclidean norm of all that feeds one output channel,
    and `g` is trainable. g starts as `‖v‖`, so the effective kernel starts as the kernel; one that
    is overwritten after `init` is brought back to the old norms. Norms and g are float32 or wider,
    effective kernels have the kernel's dtype. A channel whose v is zero stays zero and passes its
    cotangent on to v unchanged, so that it can leave zero.

    Where the clip holds, g gets no gradient.

    Source: Salimans and Kingma, "Weight normalization", 2016; the clip: torchdeq.

    Attributes:
        clip: upper bound of the factor `g / ‖v‖`; None for no bound.
        kernels: which leaves are normalised: a predicate of (names on the path, leaf).
        output_axes: axes of the output channels: numbers, or a function of (names on the path,
            leaf). The default knows the layouts of Flax (`flax_output_axes`).
    """

    clip: float | None = None
    kernels: Predicate = is_kernel
    output_axes: Axes | Callable[[Path, Any], Axes] = flax_output_axes

    def __post_init__(self) -> None:
        _check_optional(self, "clip")

    def init(self, params: PyTree) -> tuple[Arrays, Arrays]:
        """The start for `params`.

        Args:
            params: any pytree of arrays.

        Returns:
            g by path (`"conv1/kernel"`), shaped like the output axes; no statistics, an empty dict.

        Raises:
            ValueError: no leaf is a kernel, or one has no axes but output axes.
        """
        chosen, _ = select_kernels(params, self.kernels)
        norms = {path: self._norm(path, kernel) for path, kernel in chosen.items()}
        return {"/".join(path): norm for path, (norm, _) in norms.items()}, {}

    def __call__(
        self, params: PyTree, trainable: Arrays, statistics: Arrays
    ) -> tuple[PyTree, Arrays]:
        """Effective parameters.

        Args:
            params: as given to `init`, its kernels being v.
            trainable: g by path.
            statistics: empty; returned as they are.

        Returns:
            `params` with W in the place of each kernel, and `statistics`.

        Raises:
            ValueError: as `init`, or `trainable` is of other kernels.
        """
        chosen, replace = select_kernels(params, self.kernels)
        check_paths("trainable", trainable, chosen)

        def effective(path: Path, kernel: jax.Array) -> jax.Array:
            norm, inputs = self._norm(path, kernel)
            factor = _factor(trainable["/".join(path)], norm, self.clip)
            return _scaled(kernel, jnp.expand_dims(factor, inputs))

        return replace({path: effective(path, chosen[path]) for path in chosen}), statistics

    def _norm(self, path: Path, kernel: jax.Array) -> tuple[jax.Array, tuple[int, ...]]:
        """Norm of each output channel, and the axes it is taken over."""
        inputs, _ = kernel_axes(path, kernel, self.output_axes)
        return _norm(_wide(kernel), inputs), inputs


@dataclasses.dataclass(frozen=True)
class SpectralNorm:
    """Spectral normalisation: `W = W₀ · min(clip, g / σ)`, σ the largest singular value of W₀.

    W₀ is the kernel in `params`, read as the matrix `[inputs, outputs]`, all other axes being
    inputs. So `‖W‖₂ = min(clip · σ, g)`: with the defaults, clip = g = 1, a kernel of norm at most
    1 is left as it is and a larger one is scaled to norm 1. Without a clip every kernel gets norm
    g. g is one number a kernel, which alone makes this a bound (a g for each row, as torchdeq
    has it, is none).

    A convolution's operator is not this matrix: its norm may be larger, by a factor of at most the
    root of the number of taps (`kh · kw`). `project_convolution` bounds the operator itself.

    `σ = aᵀ W₀ b` after `iterations` steps of power iteration, `a = W₀ b / ‖·‖`, `b = W₀ᵀ a / ‖·‖`.
    b is the statistic of a kernel, carried from call to call: as the weights change little from
    step to step, one step follows them. A call never takes σ too large; as b converges the bound
    holds. The gradient is that of `aᵀ W₀ b` with a and b constant, exact for converged vectors.
    The start is not random: a fixed vector and 30 steps. A kernel that is zero stays zero and
    passes its cotangent on. σ and g are float32 or wider, W has the kernel's dtype.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018; the
    clip: torchdeq.

    Attributes:
        scale: g, or its start where it is learned. None, for a learned g only: it starts as σ.
        learn_scale: whether g is trainable. A learned g bounds nothing unless it is bounded.
        clip: upper bound of the factor `g / σ`; None for no bound.
        iterations: steps of power iteration a call.
        kernels: which leaves are normalised: a predicate of (names on the path, leaf).
        output_axes: as for `WeightNorm`. A stack of kernels, `[layers, in, out]`, is bounded as
            one matrix, whose norm is at least that of each of them.
    """

    scale: float | None = 1.0
    learn_scale: bool = False
    clip: float | None = 1.0
    iterations: int = 1
    kernels: Predicate = is_kernel
    output_axes: Axes | Callable[[Path, Any], Axes] = flax_output_axes

    def __post_init__(self) -> None:
        _check_optional(self, "scale")
        check_flag(self, "learn_scale")
        _check_optional(self, "clip")
        check_count(self, "iterations")
        if self.scale is None and not self.learn_scale:
            raise ValueError("SpectralNorm.scale may be None only with learn_scale=True")

    def init(self, params: PyTree) -> tuple[Arrays, Arrays]:
        """The start for `params`.

        Args:
            params: any pytree of arrays.

        Returns:
            g by path (`"conv1/kernel"`), scalars, or an empty dict where g is fixed; b by path,
            `[outputs]`.

        Raises:
            ValueError: no leaf is a kernel, or one has no axes but output axes.
        """
        chosen, _ = select_kernels(params, self.kernels)
        trainable, statistics = {}, {}
        for path, kernel in chosen.items():
            name, matrix = "/".join(path), self._matrix(path, kernel)
            start = jax.random.normal(jax.random.key(0), matrix.shape[1:], matrix.dtype)
            start = start / jnp.linalg.norm(start)
            sigma, statistics[name] = _largest_singular_value(matrix, start, STARTING_ITERATIONS)
            if self.learn_scale:
                g = sigma if self.scale is None else jnp.full_like(sigma, self.scale)
                trainable[name] = lax.stop_gradient(g)
        return trainable, statistics

    def __call__(
        self, params: PyTree, trainable: Arrays, statistics: Arrays
    ) -> tuple[PyTree, Arrays]:
        """Effective parameters, and statistics one call on.

        Args:
            params: as given to `init`.
            trainable: g by path; empty where it is fixed.
            statistics: b by path.

        Returns:
            `params` with W in the place of each kernel, and the new statistics. To evaluate without
            a change, drop the latter.

        Raises:
            ValueError: as `init`, or `trainable` or `statistics` are of other kernels.
        """
        chosen, replace = select_kernels(params, self.kernels)
        check_paths("trainable", trainable, chosen if self.learn_scale else {})
        check_paths("statistics", statistics, chosen)
        fixed = None if self.learn_scale else self.scale
        effective, advanced = {}, {}
        for path, kernel in chosen.items():
            name, matrix = "/".join(path), self._matrix(path, kernel)
            sigma, advanced[name] = _largest_singular_value(
                matrix, statistics[name], self.iterations
            )
            g = trainable[name] if fixed is None else jnp.full_like(sigma, fixed)
            effective[path] = _scaled(kernel, _factor(g, sigma, self.clip))
        return replace(effective), advanced

    def _matrix(self, path: Path, kernel: jax.Array) -> jax.Array:
        return kernel_matrix(_wide(kernel), kernel_axes(path, kernel, self.output_axes))


def _check_optional(owner: object, name: str) -> None:
    if getattr(owner, name) is not None:
        check_number(owner, name, above=0.0)


def _wide(kernel: jax.Array) -> jax.Array:
    return jnp.asarray(kernel).astype(accumulation_dtype(jnp.result_type(kernel)))


def _norm(a: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Euclidean norm over `axes`, whose derivative at zero is zero and not NaN."""
    square = jnp.sum(a * a, axes)
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)


def _factor(g: jax.Array, norm: jax.Array, clip: float | None) -> jax.Array:
    """`min(clip, g / norm)`, with 1 for `0 / 0`: zeros are passed on as they are."""
    positive = norm > 0
    ratio = jnp.where(positive, g.astype(norm.dtype) / jnp.where(positive, norm, 1), 1)
    return ratio if clip is None else jnp.minimum(ratio, clip)


def _scaled(kernel: jax.Array, factor: jax.Array) -> jax.Array:
    return (_wide(kernel) * factor).astype(jnp.result_type(kernel))


def _largest_singular_value(
    matrix: jax.Array, right: jax.Array, iterations: int
) -> tuple[jax.Array, jax.Array]:
    """`aᵀ W b` after power iteration from `b = right`, differentiable in W, and the last b."""
    constant = lax.stop_gradient(matrix)
    right = lax.stop_gradient(right).astype(matrix.dtype)

    def unit(vector: jax.Array, otherwise: jax.Array) -> jax.Array:
        # Power iteration never leaves a zero or non-finite vector: start again from `otherwise`.
        length = _norm(vector)
        usable = (length > 0) & (length < math.inf)
        return jnp.where(usable, vector / jnp.where(usable, length, 1), otherwise)

    def step(right: jax.Array) -> tuple[jax.Array, jax.Array]:
        left = jnp.matmul(constant, right, precision="highest")
        left = unit(left, jnp.zeros_like(left))
        return left, unit(jnp.matmul(left, constant, precision="highest"), right)

    # The last step stands outside, for its `left`; the first, so that the loop's carry varies over
    # the mesh axes that the matrix varies over.
    if iterations > 1:
        _, right = step(right)
        right = lax.fori_loop(0, iterations - 2, lambda _, right: step(right)[1], right)
    left, right = step(right)
    sigma = jnp.matmul(left, jnp.matmul(matrix, right, precision="highest"), precision="highest")
    return sigma, right
