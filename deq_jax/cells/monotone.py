"""Cells of monotone operator equilibrium networks: dense, one convolution, several resolutions.

All three are

    f(z, x) = relu(W z + U x + b),    W = (1 - m) I - Aᵀ A + B - Bᵀ,

so that `I - W + (I - W)ᵀ = 2 m I + 2 Aᵀ A ≥ 2 m I` for all values of the parameters: there is one
equilibrium for every x. The convolutional cells keep this with scales of A and B that are learned,
and the one with several resolutions with W that leads from finer states to coarser ones.

Any solver can iterate these cells, but none is certain to converge. `deq_jax.splitting` has the
equations for which Picard iteration converges; they need `multiply` and the resolvent.

Source: Winston and Kolter, "Monotone operator equilibrium networks", 2020.
"""

import itertools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from deq_jax import checks
from deq_jax.cells import fourier
from deq_jax.cells.fourier import Grid
from deq_jax.cells.layers import check_sizes, uniform
from deq_jax.partitioning import logical_axes

PyTree = Any

_SMALLEST_SCALE = 1e-6
"""Scales of A count as at least this, where the derivative of their square root is still finite."""
_SMALLEST_NORM = 1e-12
"""Kernels are divided by at least this."""


class _MonotoneCell(nnx.Module):
    """What the three cells share.

    Attributes:
        m: strong monotonicity of `I - W`.
    """

    m: float

    def inject(self, x: jax.Array) -> PyTree:
        """`U x + b`, like the state."""
        raise NotImplementedError

    def multiply(self, z: Any) -> Any:
        """`W z`, like z."""
        raise NotImplementedError

    def resolvent(self, alpha: Any) -> Any:
        """`V = (I + α (I - W))⁻¹` as arrays, for α > 0; see the cell."""
        raise NotImplementedError

    def apply_resolvent(self, resolvent: Any, z: Any) -> Any:
        """`V z`, like z."""
        raise NotImplementedError

    def activation(self, z: Any) -> Any:
        """The ReLU of z; in cells of convolutions it clears the border too."""
        raise NotImplementedError

    def __call__(self, z: PyTree, injection: PyTree) -> PyTree:
        """`activation(W z + injection)`, like z; `injection` is `inject(x)`."""
        return self.activation(jax.tree.map(jnp.add, self.multiply(z), injection))

    def multiply_transpose(self, z: PyTree) -> PyTree:
        """`Wᵀ z`, like z."""
        return cast(Any, jax.linear_transpose(self.multiply, z))(z)[0]

    def apply_resolvent_transpose(self, resolvent: PyTree, z: PyTree) -> PyTree:
        """`Vᵀ z`, like z."""
        transposed = jax.linear_transpose(lambda z: self.apply_resolvent(resolvent, z), z)
        return cast(Any, transposed)(z)[0]

    def _check_monotonicity(self) -> None:
        checks.check_number(self, "m", above=0.0)


class MonotoneDenseCell(_MonotoneCell):
    """A dense monotone cell.

    The cell is `relu(W z + U x + b)` with `W = (1 - m) I - Aᵀ A + B - Bᵀ`, z `[B, features]` and
    x `[B, in_features]`. All parameters start uniformly in ±1/√(number of inputs).

    The resolvent is the matrix V itself, `[features, features]`.

    Source: Winston and Kolter, 2020, section 4.

    Args:
        in_features: numbers of an input.
        features: numbers of a state.
        m: strong monotonicity of `I - W`, above 0.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError, TypeError: `m` or a size is not positive.

    Example: three equilibria, `[3, 8]`.
        >>> cell = MonotoneDenseCell(5, 8, rngs=nnx.Rngs(0))
        >>> layer = deq_jax.monotone.MonotoneDEQ(cell)
        >>> z = layer(jnp.ones((3, 5)))
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        m: float = 1.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(in_features=in_features, features=features)
        self.m = m
        self._check_monotonicity()
        self.injection = nnx.Linear(
            in_features,
            features,
            kernel_init=uniform(in_features),
            bias_init=uniform(in_features),
            kernel_metadata=logical_axes("embed", "mlp"),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        draw, shape = uniform(features), (features, features)
        self.a = nnx.Param(draw(rngs.params(), shape, param_dtype))
        self.b = nnx.Param(draw(rngs.params(), shape, param_dtype))

    def inject(self, x: jax.Array) -> jax.Array:
        """`U x + b`, `[B, features]`, of `[B, in_features]`.

        Raises:
            ValueError: x has another shape.
        """
        if x.ndim < 2 or x.shape[-1] != self.injection.in_features:
            raise ValueError(
                f"x must be [B, in_features] = [B, {self.injection.in_features}], got "
                f"{list(x.shape)}; one sample by itself is x[None]"
            )
        return self.injection(x)

    def matrix(self) -> jax.Array:
        """W, `[features, features]`, which acts on columns."""
        a, b = self.a[...], self.b[...]
        return (1 - self.m) * jnp.eye(len(a), dtype=a.dtype) - a.T @ a + b - b.T

    def multiply(self, z: jax.Array) -> jax.Array:
        """`W z`, `[B, features]`."""
        return z @ self.matrix().T

    def resolvent(self, alpha: Any) -> jax.Array:
        """`V = (I + α (I - W))⁻¹`, `[features, features]`."""
        w = self.matrix()
        alpha = checks.in_dtype(alpha, w.dtype)
        return fourier.inverse((1 + alpha) * jnp.eye(len(w), dtype=w.dtype) - alpha * w)

    def apply_resolvent(self, resolvent: jax.Array, z: jax.Array) -> jax.Array:
        """`V z`, `[B, features]`."""
        return z @ resolvent.T

    def activation(self, z: jax.Array) -> jax.Array:
        """`relu(z)`."""
        return nnx.relu(z)


class _Convolutions(_MonotoneCell):
    """What the cells of convolutions share: kernels, borders, the injection."""

    def _kernel(self, into: int, out: int, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
        size = self.kernel_size
        draw, shape = uniform(into * size * size), (size, size, into, out)
        return nnx.Param(draw(rngs.params(), shape, self.param_dtype))

    def _scalar(self) -> nnx.Param[jax.Array]:
        return nnx.Param(jnp.ones((), self.param_dtype))

    def _set_up(
        self,
        m: float,
        kernel_size: int,
        image_shape: tuple[int, int, int],
        channels: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        check_sizes(kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.m, self.kernel_size, self.border = m, kernel_size, kernel_size // 2
        self.param_dtype = dtype
        self._check_monotonicity()
        self.image_shape = image_shape
        colours = image_shape[-1]
        fan_in = colours * kernel_size**2
        self.input_kernel = self._kernel(colours, channels, rngs)
        self.input_bias = nnx.Param(uniform(fan_in)(rngs.params(), (channels,), dtype))

    def _inject(self, x: jax.Array) -> jax.Array:
        if x.shape[1:] != self.image_shape:
            expected = ", ".join(map(str, self.image_shape))
            raise ValueError(
                f"x must be [B, H, W, colours] = [B, {expected}], as image_shape says; got "
                f"{list(x.shape)}"
            )
        p = self.border
        padded = jnp.pad(x, ((0, 0), (p, p), (p, p), (0, 0)))
        return _convolve(padded, self.input_kernel[...]) + self.input_bias[...]

    def _clear_border(self, z: jax.Array) -> jax.Array:
        p = self.border
        height, width = z.shape[1:3]
        inside = (jnp.arange(height) >= p) & (jnp.arange(height) < height - p)
        along = (jnp.arange(width) >= p) & (jnp.arange(width) < width - p)
        mask = (inside[:, None] & along)[:, :, None]
        return jnp.where(mask, nnx.relu(z), jnp.zeros((), z.dtype))


def _unit(kernel: jax.Array) -> jax.Array:
    """The kernel divided by its Frobenius norm; zero stays zero."""
    return kernel * lax.rsqrt(jnp.maximum(jnp.sum(kernel * kernel), _SMALLEST_NORM**2))


def _convolve(z: jax.Array, kernel: jax.Array, stride: int = 1) -> jax.Array:
    """The circular convolution of `[B, H, W, C]` by `[k, k, C, D]`; every `stride`-th point."""
    p = kernel.shape[0] // 2
    z = jnp.pad(z, ((0, 0), (p, p), (p, p), (0, 0)), mode="wrap")
    return lax.conv_general_dilated(
        z, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _transposed(kernel: jax.Array) -> jax.Array:
    """The kernel of the transposed circular convolution."""
    return kernel[::-1, ::-1].swapaxes(2, 3)


def _kernel_of_w(a: jax.Array, b: jax.Array, m: float) -> jax.Array:
    """The kernel `[2 k - 1, 2 k - 1, C, C]` of `(1 - m) I - Aᵀ A + B - Bᵀ`."""
    size = a.shape[0]
    # The correlation of A with itself: channels into A are the batch, those out of A are summed.
    gram = lax.conv_general_dilated(
        a.transpose(2, 0, 1, 3),
        a.transpose(0, 1, 3, 2),
        (1, 1),
        ((size - 1, size - 1),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    ).transpose(1, 2, 0, 3)
    p = size // 2
    skew = jnp.pad(b - _transposed(b), ((p, p), (p, p), (0, 0), (0, 0)))
    identity = (1 - m) * jnp.eye(a.shape[2], dtype=a.dtype)
    return (skew - gram).at[size - 1, size - 1].add(identity)


def _diagonal(w: jax.Array, alpha: Any, grid: Grid) -> jax.Array:
    """`I + α (I - W)` at each frequency, complex `[F, C, C]`, of W with kernel `w`."""
    alpha = checks.in_dtype(alpha, w.dtype)
    center = w.shape[0] // 2
    identity = (1 + alpha) * jnp.eye(w.shape[2], dtype=w.dtype)
    return fourier.kernel_frequencies((-alpha * w).at[center, center].add(identity), grid)


class MonotoneConvCell(_Convolutions):
    """A monotone cell with one circular convolution.

    The cell is `clear(relu(W z + U x + b))` with

        W = (1 - m) I - |g| Aᵀ A + h (B - Bᵀ),

    A and B circular convolutions whose kernels are divided by their Frobenius norms, and scalars g
    and h that are learned and start at 1. The original has g in the place of |g|, and is not
    monotone for negative g. U is a convolution too.

    The state z is `[B, H + 2 p, W + 2 p, channels]` for images x `[B, H, W, colours]`, with
    `p = kernel_size // 2`. U is applied to the image with a border of zeros, and `clear` sets the
    border of the state to zero, so that nothing leaks from one side of the image to the other.

    The resolvent is a matrix for each frequency of the grid, real `[F, 2 channels, 2 channels]`;
    see `deq_jax.cells.fourier`.

    Kernels and b start uniformly in ±1/√(number of inputs).

    Source: Winston and Kolter, 2020, section 4.

    Args:
        image_shape: `(H, W, colours)` of x.
        channels: channels of z.
        kernel_size: side of all kernels, odd.
        m: strong monotonicity of `I - W`, above 0.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError, TypeError: `m` or a size is not positive, or `kernel_size` is even.

    Example: two equilibria, `[2, 8, 8, 4]`.
        >>> cell = MonotoneConvCell((6, 6, 1), 4, rngs=nnx.Rngs(0))
        >>> layer = deq_jax.monotone.MonotoneDEQ(cell)
        >>> z = layer(jnp.ones((2, 6, 6, 1)))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: int,
        *,
        kernel_size: int = 3,
        m: float = 1.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_sizes(image_shape=image_shape, channels=channels)
        height, width, colours = image_shape
        self._set_up(m, kernel_size, (height, width, colours), channels, param_dtype, rngs)
        self.grid = (height + 2 * self.border, width + 2 * self.border)
        self.a = self._kernel(channels, channels, rngs)
        self.b = self._kernel(channels, channels, rngs)
        self.g, self.h = self._scalar(), self._scalar()

    def inject(self, x: jax.Array) -> jax.Array:
        """`U x + b`, `[B, H + 2 p, W + 2 p, channels]`, of images `[B, H, W, colours]`.

        Raises:
            ValueError: x has another shape.
        """
        return self._inject(x)

    def multiply(self, z: jax.Array) -> jax.Array:
        """`W z`, like z."""
        return _convolve(z, self._kernel_of_w())

    def resolvent(self, alpha: Any) -> jax.Array:
        """`V = (I + α (I - W))⁻¹`, `[F, 2 channels, 2 channels]`."""
        diagonal = _diagonal(self._kernel_of_w(), alpha, self.grid)
        return fourier.real_matrices(fourier.inverse(diagonal))

    def apply_resolvent(self, resolvent: jax.Array, z: jax.Array) -> jax.Array:
        """`V z`, like z."""
        return fourier.multiply(resolvent, z)

    def activation(self, z: jax.Array) -> jax.Array:
        """`relu(z)` with a border of zeros."""
        return self._clear_border(z)

    def _kernel_of_w(self) -> jax.Array:
        a, b = _root(self.g[...]) * _unit(self.a[...]), self.h[...] * _unit(self.b[...])
        return _kernel_of_w(a, b, self.m)


def _root(g: jax.Array) -> jax.Array:
    """`√|g|`."""
    return jnp.sqrt(jnp.maximum(jnp.abs(g), _SMALLEST_SCALE))


class _TierResolvent(NamedTuple):
    """The resolvent of one resolution of `MonotoneMultiTierCell`.

    With `D = I + α (m I + Aᵀ A - B + Bᵀ)` and S the convolution to the next resolution, the block
    on the diagonal of `I + α (I - W)` is `D + α Sᵀ S`. By the Woodbury formula its inverse is

        D⁻¹ - D⁻¹ Eᵀ fold* (I + fold E D⁻¹ Eᵀ fold*)⁻¹ fold E D⁻¹,    E = √(α/4) S at stride 1,

    where `fold` sums over the four frequencies that are one on the coarser grid.

    Attributes:
        inverse: `D⁻¹`, a multiplier `[F, 2 C, 2 C]`.
        down: `E D⁻¹`, `[F, 2 C, 2 C']` with C' the channels of the next resolution.
        coarse: `(I + fold E D⁻¹ Eᵀ fold*)⁻¹`, `[G, 2 C', 2 C']`.
        up: `D⁻¹ Eᵀ`, `[F, 2 C', 2 C]`.
        stride_kernel: `2 α S`, `[k, k, C, C']`.
        next_kernel: of `Aᵀ` of the next resolution, `[k, k, C', C']`.
    """

    inverse: jax.Array
    down: jax.Array
    coarse: jax.Array
    up: jax.Array
    stride_kernel: jax.Array
    next_kernel: jax.Array


class MonotoneMultiTierCell(_Convolutions):
    """A monotone cell with states of several resolutions, each half as fine as the one before.

    The state is a tuple of arrays `[B, H/2ⁱ + 2 p, W/2ⁱ + 2 p, channels[i]]` with
    `p = kernel_size // 2`, for images x `[B, H, W, colours]`. W leads from each to itself and to
    the next one:

        W[i, i] = (1 - m) I - Aᵢᵀ Aᵢ - Sᵢᵀ Sᵢ + Bᵢ - Bᵢᵀ,    W[i + 1, i] = -2 Aᵢ₊₁ᵀ Sᵢ,

    with circular convolutions A = √|g| A₀/‖A₀‖, B = h B₀/‖B₀‖ and, of stride 2, S = √|s| S₀/‖S₀‖.
    The last resolution has no S. The scalars g, h and s are learned and start at 1. The original
    takes √g and √s, which are NaN for negative g and s. S leads to a grid half as large, which
    lacks p rows and columns of the next state; zeros are added at the bottom and on the right.

    The image enters at the finest resolution, as in `MonotoneConvCell`, and all borders are zero.

    The resolvent has the arrays of each resolution. `apply_resolvent` substitutes them from fine
    to coarse.

    Kernels and b start uniformly in ±1/√(number of inputs).

    Source: Winston and Kolter, 2020, section 4 and appendix.

    Args:
        image_shape: `(H, W, colours)` of x.
        channels: channels of each resolution, finest first, two or more.
        kernel_size: side of all kernels, odd.
        m: strong monotonicity of `I - W`, above 0.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError, TypeError: `m` or a size is not positive, `kernel_size` is even, there are fewer
            than two resolutions, or the image cannot be halved so often.

    Example: equilibria `[2, 10, 10, 4]` and `[2, 6, 6, 8]`.
        >>> cell = MonotoneMultiTierCell((8, 8, 1), (4, 8), rngs=nnx.Rngs(0))
        >>> layer = deq_jax.monotone.MonotoneDEQ(cell)
        >>> fine, coarse = layer(jnp.ones((2, 8, 8, 1)))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        channels: tuple[int, ...],
        *,
        kernel_size: int = 3,
        m: float = 1.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        channels = tuple(channels)
        check_sizes(image_shape=image_shape, channels=channels)
        height, width, colours = image_shape
        if len(channels) < 2:
            raise ValueError(
                "channels must be those of two resolutions or more, such as (16, 32), got "
                f"{channels}; MonotoneConvCell has one"
            )
        factor = 2 ** (len(channels) - 1)
        if height % factor or width % factor or factor > min(height, width):
            raise ValueError(
                f"{len(channels)} resolutions need an image whose sides are multiples of {factor}, "
                f"got {height}x{width}"
            )
        self._set_up(m, kernel_size, (height, width, colours), channels[0], param_dtype, rngs)
        p = self.border
        self.channels = channels
        self.grids = tuple(
            (height // 2**i + 2 * p, width // 2**i + 2 * p) for i in range(len(channels))
        )
        pairs = tuple(itertools.pairwise(channels))
        self.a = nnx.List([self._kernel(c, c, rngs) for c in channels])
        self.b = nnx.List([self._kernel(c, c, rngs) for c in channels])
        self.stride = nnx.List([self._kernel(c, d, rngs) for c, d in pairs])
        self.g = nnx.List([self._scalar() for _ in channels])
        self.h = nnx.List([self._scalar() for _ in channels])
        self.s = nnx.List([self._scalar() for _ in pairs])

    def inject(self, x: jax.Array) -> tuple[jax.Array, ...]:
        """`U x + b` at the finest resolution, zeros at the others.

        Raises:
            ValueError: x is not `[B, H, W, colours]`.
        """
        first = self._inject(x)
        rest = zip(self.grids[1:], self.channels[1:], strict=True)
        return (first, *(jnp.zeros((len(x), *grid, c), first.dtype) for grid, c in rest))

    def multiply(self, z: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """`W z`, like z."""
        a, w, strides = self._kernels()
        products = []
        for i, state in enumerate(z):
            product = _convolve(state, w[i])
            if i > 0:
                product -= 2 * _convolve(self._down(z[i - 1], strides[i - 1]), _transposed(a[i]))
            if i < len(strides):
                product -= _strided_gram(state, strides[i])
            products.append(product)
        return tuple(products)

    def resolvent(self, alpha: Any) -> tuple[_TierResolvent | jax.Array, ...]:
        """`V = (I + α (I - W))⁻¹`: arrays of each resolution, a multiplier for the last one."""
        a, w, strides = self._kernels()
        alpha = checks.in_dtype(alpha, a[0].dtype)
        tiers: list[_TierResolvent | jax.Array] = []
        before: jax.Array | None = None
        for i, grid in enumerate(self.grids):
            inverse = fourier.inverse(_after(before, _diagonal(w[i], alpha, grid)))
            if i == len(strides):
                tiers.append(fourier.real_matrices(inverse))
                continue
            stride = fourier.kernel_frequencies(strides[i] * jnp.sqrt(alpha / 4), grid)
            down, up = stride @ inverse, inverse @ fourier.conjugate_transpose(stride)
            gram = fourier.fold(stride @ up, grid, real_pairs=False)
            before = coarse = fourier.inverse(jnp.eye(gram.shape[-1], dtype=gram.dtype) + gram)
            tiers.append(
                _TierResolvent(
                    inverse=fourier.real_matrices(inverse),
                    down=fourier.real_matrices(down),
                    coarse=fourier.real_matrices(coarse),
                    up=fourier.real_matrices(up),
                    stride_kernel=2 * alpha * strides[i],
                    next_kernel=_transposed(a[i + 1]),
                )
            )
        return tuple(tiers)

    def apply_resolvent(
        self, resolvent: tuple[_TierResolvent | jax.Array, ...], z: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """`V z`, like z."""
        solved = []
        rest = z[0]
        for i, tier in enumerate(resolvent):
            grid = self.grids[i]
            if not isinstance(tier, _TierResolvent):
                solved.append(fourier.multiply(tier, rest))
                break
            right = fourier.to_frequencies(rest)
            folded = fourier.fold(fourier.at_frequencies(tier.down, right), grid, real_pairs=True)
            folded = fourier.at_frequencies(tier.coarse, folded)
            correction = fourier.unfold(folded, grid, real_pairs=True)
            answer = fourier.at_frequencies(tier.inverse, right)
            answer -= fourier.at_frequencies(tier.up, correction)
            solved.append(fourier.from_frequencies(answer, grid))
            below = self._down(solved[-1], tier.stride_kernel)
            rest = z[i + 1] - _convolve(below, tier.next_kernel)
        return tuple(solved)

    def activation(self, z: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """`relu(z)` with borders of zeros."""
        return tuple(map(self._clear_border, z))

    def _kernels(self) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
        """The kernels of A, of W[i, i] without S, and of S, for each resolution."""

        def scaled(scales: Any, kernels: Any) -> list[jax.Array]:
            pairs = zip(scales, kernels, strict=True)
            return [_root(scale[...]) * _unit(kernel[...]) for scale, kernel in pairs]

        a = scaled(self.g, self.a)
        b = [h[...] * _unit(kernel[...]) for h, kernel in zip(self.h, self.b, strict=True)]
        w = [_kernel_of_w(a, b, self.m) for a, b in zip(a, b, strict=True)]
        return a, w, scaled(self.s, self.stride)

    def _down(self, z: jax.Array, kernel: jax.Array) -> jax.Array:
        """The convolution of stride 2 with zeros behind, at the size of the next resolution."""
        p = self.border
        return jnp.pad(_convolve(z, kernel, 2), ((0, 0), (0, p), (0, p), (0, 0)))


def _after(before: jax.Array | None, matrices: jax.Array) -> jax.Array:
    """The matrices, which XLA computes only when `before` is there.

    On CPUs two of jaxlib's batched factorisations at the same time can wait for each other for ever
    (jaxlib 0.10.2 on two cores): each waits for tasks on threads that the other one holds.
    """
    if before is None:
        return matrices
    # XLA does not simplify the product, since it is NaN where `before` is not finite.
    return matrices + 0 * lax.stop_gradient(before[0, 0, 0])


def _strided_gram(z: jax.Array, kernel: jax.Array) -> jax.Array:
    """`Sᵀ S z`, S the circular convolution of stride 2."""

    def down(z: jax.Array) -> jax.Array:
        return _convolve(z, kernel, 2)

    return cast(Any, jax.linear_transpose(down, z))(down(z))[0]
