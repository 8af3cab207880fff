"""Projections of kernels onto sets of bounded norm, and which leaves of a pytree are kernels.

For cells with guarantees, `f(z, x) = φ(W z + ...)` with φ 1-Lipschitz: f contracts in the norm in
which W is bounded below 1. Apply a projection after an optimiser's step. A kernel maps its input
axes, which come first, to its output axes: `[in, out]`, as in `z @ W`. All is computed in float32
or wider and returned in the kernel's dtype, to whose rounding the bounds hold.
"""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax.tree import accumulation_dtype

PyTree = Any
Path = tuple[str, ...]
Axes = int | tuple[int, ...]
Predicate = Callable[[Path, Any], bool]


def _is_matrix(leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def is_kernel(path: Path, leaf: Any) -> bool:
    """Whether a leaf is a kernel by Flax's naming: floating, two axes or more, called `kernel`."""
    return path[-1:] == ("kernel",) and _is_matrix(leaf)


def named(*names: str) -> Predicate:
    """A predicate for leaves on whose path one of `names` stands, floating and of two axes or more.

    `named("recurrent")` picks the kernel of that submodule, `named("w")` all leaves called `w`.
    Leaves called `bias` are left out: those of Flax's attention have two axes.
    """
    return lambda path, leaf: (
        not set(names).isdisjoint(path) and path[-1] != "bias" and _is_matrix(leaf)
    )


def flax_output_axes(path: Path, leaf: Any) -> tuple[int, ...]:
    """Axes of the output channels in Flax's kernels and in those of `cells.TransformerCell`.

    The last axis, of dense and convolution kernels and of attention's `out`, `[heads, head_dim,
    out]`; the last two of its `query`, `key` and `value`, `[in, heads, head_dim]`. In the
    Transformer cell all but the first of `qkv` and `injection`, `[in, 3, heads, head_dim]`, of
    `position`, `[in, heads, head_dim]`, and of `expand` with SwiGLU, `[in, 2, hidden]`.
    """
    names, shape = set(path[-2:]), leaf.shape
    if names & {"query", "key", "value"} and leaf.ndim == 3:
        return (1, 2)
    # The lengths tell them from convolutions that have these names.
    to_heads = leaf.ndim in (3, 4) and shape[0] == shape[-2] * shape[-1]
    gated = leaf.ndim == 3 and shape[1] == 2
    if (names & {"qkv", "injection", "position"} and to_heads) or ("expand" in names and gated):
        return tuple(range(1, leaf.ndim))
    return (-1,)


def select_kernels(
    params: PyTree, kernels: Predicate
) -> tuple[dict[Path, jax.Array], Callable[[dict[Path, jax.Array]], PyTree]]:
    """The chosen leaves by path, and a function that returns `params` with others in their place.

    Raises:
        ValueError: none is chosen, or one that is not floating or has less than two axes.
    """
    keyed, structure = jax.tree_util.tree_flatten_with_path(params)
    leaves = {_names(keys): leaf for keys, leaf in keyed}
    chosen = {path: leaf for path, leaf in leaves.items() if kernels(path, leaf)}
    if not chosen:
        there = sorted(map("/".join, leaves))
        raise ValueError(f"no leaf of params is a kernel; there are {there}")
    for path, leaf in chosen.items():
        if not _is_matrix(leaf):
            raise ValueError(
                f"a kernel must be floating with two axes or more, {'/'.join(path)} is "
                f"{jnp.result_type(leaf)}{list(jnp.shape(leaf))}"
            )
    return chosen, lambda others: jax.tree.unflatten(structure, {**leaves, **others}.values())


def _names(keys: tuple[Any, ...]) -> Path:
    # An nnx.State and Linen's boxed parameters have a `.value` behind the names.
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def check_paths(what: str, given: Collection[str], chosen: Collection[Path]) -> None:
    """Raises a ValueError unless `given` has the paths of the chosen kernels."""
    paths = {"/".join(path) for path in chosen}
    if set(given) != paths:
        raise ValueError(f"{what} is of {sorted(given)}, the kernels are {sorted(paths)}")


def kernel_axes(
    path: Path, kernel: jax.Array, output_axes: Axes | Callable[[Path, Any], Axes]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Input axes and output axes of a kernel, both in order.

    Raises:
        ValueError: an axis does not exist or stands twice, or one of the two would be empty.
    """
    axes = output_axes(path, kernel) if callable(output_axes) else output_axes
    axes = axes if isinstance(axes, tuple) else (axes,)
    ndim = jnp.ndim(kernel)
    outputs = {axis % ndim for axis in axes}
    inputs = tuple(axis for axis in range(ndim) if axis not in outputs)
    valid = len(outputs) == len(axes) and all(-ndim <= axis < ndim for axis in axes)
    if not (valid and inputs and outputs):
        raise ValueError(
            f"output_axes={axes} must be different axes, not all, of {'/'.join(path)} "
            f"{list(jnp.shape(kernel))}"
        )
    return inputs, tuple(sorted(outputs))


def kernel_matrix(kernel: jax.Array, axes: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    """The kernel as `[inputs, outputs]`, from its input and output axes."""
    inputs, outputs = axes
    rows = math.prod(kernel.shape[axis] for axis in inputs)
    return kernel.transpose(inputs + outputs).reshape(rows, -1)


def project(
    params: PyTree,
    projection: Callable[[jax.Array], jax.Array],
    kernels: Predicate = is_kernel,
) -> PyTree:
    """`params` with `projection(kernel)` in the place of each kernel.

    Args:
        params: any pytree of arrays.
        projection: of a kernel, `functools.partial(project_infinity_norm, bound=0.9)` say.
        kernels: which leaves, a predicate of (names on the path, leaf).

    Raises:
        ValueError: no leaf is a kernel.
    """
    chosen, replace = select_kernels(params, kernels)
    return replace({path: projection(kernel) for path, kernel in chosen.items()})


def project_infinity_norm(
    w: jax.Array, bound: float | jax.Array, *, output_axes: Axes = -1
) -> jax.Array:
    """The nearest kernel, in the Frobenius norm, whose infinity norm is at most `bound`.

    The infinity norm of `z -> z @ W` is the largest of the outputs' sums `Σᵢ |W[i, j]|`: with W as
    `[in, out]`, the l1 norm of a column. Each column is projected by itself, `sign(w) max(|w| - θ,
    0)`, with θ found by sorting: exact, with no iteration. With it `φ(z @ W + ...)`, φ elementwise,
    contracts by `bound` in the largest magnitude of a sample.

    Source: Duchi et al., "Efficient projections onto the l1-ball", 2008, figure 1.

    Args:
        w: kernel of two axes or more.
        bound: at least 0.
        output_axes: the axes that tell outputs; all others are summed over.

    Returns:
        A kernel like `w`; `w` itself, to the bit, where it is within the bound.

    Raises:
        ValueError: `bound` is a negative number, or `output_axes` are no axes of `w`.
    """
    wide, bound = _prepared(w, bound)
    axes = kernel_axes((), wide, output_axes)
    columns = kernel_matrix(jnp.abs(wide), axes)
    descending = jnp.sort(columns, axis=0, descending=True)
    excess = jnp.cumsum(descending, axis=0) - bound
    count = jnp.arange(1, len(columns) + 1, dtype=wide.dtype)[:, None]
    # It holds for the entries that stay above zero. With bound 0 there is none, and the threshold
    # is the largest entry.
    kept = jnp.maximum(jnp.sum(descending * count > excess, axis=0), 1)
    threshold = jnp.take_along_axis(excess / count, kept[None] - 1, axis=0)[0]
    outside = jnp.sum(columns, axis=0) > bound

    def spread(of_outputs: jax.Array) -> jax.Array:
        sizes = [wide.shape[axis] for axis in axes[1]]
        return jnp.expand_dims(of_outputs.reshape(sizes), axes[0])

    shrunk = jnp.sign(wide) * jnp.maximum(jnp.abs(wide) - spread(threshold), 0)
    return jnp.where(spread(outside), shrunk, wide).astype(w.dtype)


def project_frobenius(w: jax.Array, bound: float | jax.Array) -> jax.Array:
    """The nearest kernel whose Frobenius norm is at most `bound`: `w · min(1, bound / ‖w‖)`.

    That norm bounds the spectral norm of any matrix the kernel's entries make up.

    Raises:
        ValueError: `bound` is a negative number.
    """
    wide, bound = _prepared(w, bound)
    norm = jnp.sqrt(jnp.sum(wide * wide))
    return _scaled_to(wide, norm, bound).astype(w.dtype)


def project_spectral(
    w: jax.Array, bound: float | jax.Array, *, output_axes: Axes = -1
) -> jax.Array:
    """The nearest kernel, in the Frobenius norm, whose spectral norm is at most `bound`.

    `U min(S, bound) Vᵀ`, from the singular values of `w` as a matrix `[inputs, outputs]`. With it
    `φ(z @ W + ...)` contracts by `bound` in the Euclidean norm.

    Args:
        w: kernel of two axes or more.
        bound: at least 0.
        output_axes: the axes that are outputs; all others are inputs.

    Returns:
        A kernel like `w`; `w` itself, to the bit, where it is within the bound.

    Raises:
        ValueError: `bound` is a negative number, or `output_axes` are no axes of `w`.
    """
    wide, bound = _prepared(w, bound)
    inputs, outputs = axes = kernel_axes((), wide, output_axes)
    left, values, right = jnp.linalg.svd(kernel_matrix(wide, axes), full_matrices=False)
    clipped = jnp.matmul(left * jnp.minimum(values, bound), right, precision="highest")
    order = inputs + outputs
    clipped = clipped.reshape([wide.shape[axis] for axis in order])
    clipped = clipped.transpose([order.index(axis) for axis in range(wide.ndim)])
    return jnp.where(values[0] > bound, clipped, wide).astype(w.dtype)


def lipschitz_convolution(kernel: jax.Array, spatial_shape: tuple[int, ...]) -> jax.Array:
    """An upper bound of the operator norm of a zero-padded convolution, a scalar.

    It is the norm of the circular convolution on a torus of `size + taps - 1` points along each
    axis: the largest singular value, over the torus's frequencies ω, of the matrices
    `Σ_d K[d] exp(-i ω·d)`, `[in, out]`. What is returned is not below it, and above it by 1e-5 of
    it at most.

    Proof that it is a bound: put the image on the torus with zeros behind it (an isometry),
    convolve there, and keep the points that are asked for (norm at most 1); with `taps - 1` zeros
    between the image's end and its start no window of `taps` points sees both, so this is the
    zero-padded convolution, and its norm is at most that of the circular one.

    It holds for SAME and VALID padding and for any stride. With SAME, stride 1 and an image of
    twice the taps it was at most 1.2 times the norm, for random kernels. A grouped convolution is
    bounded too, less sharply. For a dilated one pass the kernel with its zeros.

    Source: Sedghi, Gupta and Long, "The singular values of convolutional layers", 2019, for the
    circular convolution.

    Args:
        kernel: `[*taps, in, out]`, one tap axis or more.
        spatial_shape: size of the image along each tap axis.

    Raises:
        ValueError: `spatial_shape` has not one positive size for each tap axis.
    """
    kernel = jnp.asarray(kernel)
    taps = kernel.shape[:-2]
    if not taps or len(spatial_shape) != len(taps) or min(spatial_shape) < 1:
        raise ValueError(
            f"spatial_shape must be a positive size for each tap axis of the kernel "
            f"{list(kernel.shape)}, got {tuple(spatial_shape)}"
        )
    torus = [size + tap - 1 for size, tap in zip(spatial_shape, taps, strict=True)]
    wide = kernel.astype(accumulation_dtype(kernel.dtype))
    # Half of the frequencies will do: a real kernel's others are their conjugates. And the Gram
    # matrix: it is the small singular values that lose accuracy in it.
    symbol = jnp.fft.rfftn(wide, torus, axes=range(len(taps)))
    adjoint = symbol.conj().swapaxes(-1, -2)
    narrow = symbol.shape[-2] < symbol.shape[-1]
    factors = (symbol, adjoint) if narrow else (adjoint, symbol)
    gram = jnp.matmul(*factors, precision="highest")
    return jnp.sqrt(_largest_eigenvalue(gram).max())


_SQUARINGS = 20


def _largest_eigenvalue(gram: jax.Array) -> jax.Array:
    """`tr(Gᵐ)^(1/m)`, m = 2²⁰, of positive semidefinite matrices `[..., n, n]`.

    It is not below the largest eigenvalue, and at most `n^(1/m)` times as large, for 1,000 channels
    7e-6 more. It takes products of matrices only. Eigenvalue problems are slow on accelerators, and
    two batches of them in one program can block each other on a CPU for ever: jaxlib 0.10.2 spreads
    each over the threads of XLA's pool, and waits for them on such a thread.
    """

    def scaled(power: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The matrices divided by their traces, and the logarithms of these; zeros stay zeros."""
        trace = jnp.trace(power, axis1=-2, axis2=-1).real
        usable = jnp.where(trace <= 0, 1, trace)
        return power / usable[..., None, None].astype(power.dtype), jnp.log(usable)

    def square(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # Gᵐ is exp(logarithm) · power.
        power, logarithm = carry
        power, more = scaled(jnp.matmul(power, power, precision="highest"))
        return power, 2 * logarithm + more

    power, logarithm = lax.fori_loop(0, _SQUARINGS, square, scaled(gram))
    trace = jnp.trace(power, axis1=-2, axis2=-1).real
    return jnp.where(trace <= 0, 0, jnp.exp(logarithm / 2**_SQUARINGS))


def project_convolution(
    kernel: jax.Array, bound: float | jax.Array, spatial_shape: tuple[int, ...]
) -> jax.Array:
    """The kernel, scaled where `lipschitz_convolution` is above `bound` so that it is `bound`.

    A scaling, `kernel · min(1, bound / norm)`, and not the nearest kernel of that norm.

    Args:
        kernel: `[*taps, in, out]`.
        bound: at least 0.
        spatial_shape: size of the image along each tap axis.

    Raises:
        ValueError: `bound` is a negative number, or as for `lipschitz_convolution`.
    """
    wide, bound = _prepared(kernel, bound)
    norm = lipschitz_convolution(wide, spatial_shape)
    return _scaled_to(wide, norm, bound).astype(kernel.dtype)


def _prepared(w: jax.Array, bound: float | jax.Array) -> tuple[jax.Array, jax.Array]:
    if isinstance(bound, (int, float)) and not bound >= 0:
        raise ValueError(f"bound must be at least 0, got {bound}")
    wide = w.astype(accumulation_dtype(w.dtype))
    return wide, jnp.asarray(bound).astype(wide.dtype)


def _scaled_to(w: jax.Array, norm: jax.Array, bound: jax.Array) -> jax.Array:
    outside = norm > bound
    return jnp.where(outside, w * (bound / jnp.where(outside, norm, 1)), w)
