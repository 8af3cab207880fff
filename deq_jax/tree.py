"""Per-sample algebra on pytrees.

Every leaf carries the batch on axis 0, `[B, ...]`; a sample is one vector made of all leaves and
all their other axes. Results that belong to a sample have shape `[B]`. Sums are accumulated in
float32, or in the leaf's own precision where that is wider.

For whole-tree arithmetic without a batch use `optax.tree`; this file has the functions that
`optax.tree` lacks.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import _compat

PyTree = Any


_split_axes: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("axes", default=())


@contextlib.contextmanager
def samples_split_over(axes: tuple[str, ...]) -> Iterator[None]:
    """While it is open, devices along these axes of a `shard_map` hold parts of the same samples.

    Inner products, norms and magnitudes are then those of whole samples.
    """
    token = _split_axes.set(axes)
    try:
        yield
    finally:
        _split_axes.reset(token)


def split_axes() -> tuple[str, ...]:
    """The mesh axes along which devices hold parts of the same samples; none as a rule."""
    return _split_axes.get()


def check_whole_samples(name: str) -> None:
    """Raises a ValueError if devices hold parts of samples, which what is called `name` refuses."""
    if axes := _split_axes.get():
        raise ValueError(
            f"{name} needs whole samples on each device; with Execution(state_axis={axes}) use "
            "another solver, such as GMRES or Anderson"
        )


def same_on_parts(values: PyTree) -> PyTree:
    """Arrays that agree on all devices that hold parts of the same samples, in JAX's types too."""
    axes = frozenset(_split_axes.get())

    def agreed(leaf: jax.Array) -> jax.Array:
        varies = tuple(sorted(axes & _compat.varying_axes(leaf)))
        return lax.pmax(leaf, varies) if varies else leaf

    return jax.tree.map(agreed, values)


def sum_of_parts(values: jax.Array) -> jax.Array:
    """Sums `values` over the devices that hold parts of the same samples."""
    axes = _split_axes.get()
    # In JAX's types the sum may differ between these devices, as all else in a loop may.
    return vary_over(lax.psum(values, axes), frozenset(axes)) if axes else values


def accumulation_dtype(dtype: Any) -> Any:
    """The real dtype in which sums over a leaf are taken: float32, or wider if the leaf is."""
    info = jnp.finfo(dtype)
    return info.dtype if info.bits >= 32 else jnp.dtype(jnp.float32)


def working_dtype(dtype: Any) -> Any:
    """The dtype in which multiples of a leaf are computed before they are rounded to its own."""
    return dtype if jnp.issubdtype(dtype, jnp.complexfloating) else accumulation_dtype(dtype)


def tree_accumulation_dtype(tree: PyTree) -> Any:
    """The widest accumulation dtype over the leaves; residuals and statistics use it."""
    dtypes = [accumulation_dtype(leaf.dtype) for leaf in jax.tree.leaves(tree)]
    return max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)


def over_samples(values: jax.Array, leaf: jax.Array) -> jax.Array:
    """Reshapes per-sample `values` `[B]` to `[B, 1, ...]`, to broadcast against `leaf`."""
    return values.reshape(values.shape + (1,) * (leaf.ndim - values.ndim))


def dot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product of each sample, `[B]`: the sum over all leaves of `Re(conj(a) b)`.

    The real part makes a complex state a vector of its real and imaginary parts.
    """
    dtype = tree_accumulation_dtype(a)

    def leaf_dot(a: jax.Array, b: jax.Array) -> jax.Array:
        axes = tuple(range(1, a.ndim))
        if jnp.iscomplexobj(a):
            product = a.real.astype(dtype) * b.real.astype(dtype)
            product += a.imag.astype(dtype) * b.imag.astype(dtype)
        else:
            product = a.astype(dtype) * b.astype(dtype)
        return product.sum(axes)

    dots = jax.tree.leaves(jax.tree.map(leaf_dot, a, b))
    return sum_of_parts(functools.reduce(jnp.add, dots))


def norm(a: PyTree) -> jax.Array:
    """Euclidean norm of each sample over all leaves, `[B]`."""
    return jnp.sqrt(dot(a, a))


def safe_norm(a: PyTree) -> jax.Array:
    """`norm(a)` where squares would overflow or vanish, too."""
    scale_of_a = unit_scale(a)
    return norm(scale(scale_of_a, a)) / scale_of_a


def any_of(flags: jax.Array, mesh_axes: tuple[str, ...]) -> jax.Array:
    """`jnp.any(flags)`, over the devices along these axes of a `shard_map` too."""
    found = jnp.any(flags)
    # Along all other axes the devices agree already.
    varies = varying_axes(found) - frozenset(_split_axes.get())
    mesh_axes = tuple(a for a in mesh_axes if a in varies or not _compat.tracks_varying_axes(a))
    return lax.pmax(found.astype(jnp.int32), mesh_axes) > 0 if mesh_axes else found


def largest(a: PyTree) -> jax.Array:
    """Largest magnitude of each sample over all leaves, `[B]`."""
    dtype = tree_accumulation_dtype(a)

    def leaf_largest(leaf: jax.Array) -> jax.Array:
        return jnp.abs(leaf).astype(dtype).max(tuple(range(1, leaf.ndim)), initial=0)

    found = jnp.stack([leaf_largest(leaf) for leaf in jax.tree.leaves(a)]).max(0)
    axes = _split_axes.get()
    return vary_over(lax.pmax(found, axes), frozenset(axes)) if axes else found


def add(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise `a + b`."""
    return jax.tree.map(jnp.add, a, b)


def subtract(a: PyTree, b: PyTree) -> PyTree:
    """Leafwise `a - b`."""
    return jax.tree.map(jnp.subtract, a, b)


def scale(factor: Any, a: PyTree) -> PyTree:
    """`factor * a` in the leaves' own dtypes; `factor` is a number or per sample, `[B]`."""
    factor = jnp.asarray(factor)

    def leaf_scale(leaf: jax.Array) -> jax.Array:
        wide = working_dtype(leaf.dtype)
        broad = over_samples(factor, leaf) if factor.ndim else factor
        return (broad.astype(wide) * leaf.astype(wide)).astype(leaf.dtype)

    return jax.tree.map(leaf_scale, a)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Takes each sample from `a` where its `condition` `[B]` holds, else from `b`.

    A selection and not a product with a mask: a NaN in the branch not taken stays there.
    """
    return jax.tree.map(lambda a, b: jnp.where(over_samples(condition, a), a, b), a, b)


def take(a: PyTree, index: jax.Array) -> PyTree:
    """The samples `index` `[n]`, all different, of every leaf: `[n, ...]`."""

    def leaf_take(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf).at[index].get(mode="promise_in_bounds", unique_indices=True)

    return jax.tree.map(leaf_take, a)


def unknowns(a: PyTree) -> int:
    """How many real numbers a sample is made of."""
    leaves = jax.tree.leaves(a)
    here = sum(math.prod(leaf.shape[1:]) * (1 + jnp.iscomplexobj(leaf)) for leaf in leaves)
    axes = _split_axes.get()
    return here * lax.axis_size(axes) if axes else here


def flatten_samples(a: PyTree) -> PyTree:
    """Each leaf `[B, ...]` as `[B, D]`, which is faster on a CPU.

    Under a mesh the leaves stay as they are: a reshape would gather what is sharded behind the
    batch.
    """
    if _compat.shards_states():
        return a
    return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], -1), a)


def pack(a: PyTree) -> jax.Array:
    """Each sample as one vector, `[B, D]`: all leaves behind one another, at least float32.

    Solvers that work on it take the same steps, to the last bit, for an array and for the same
    array split into leaves. The batch axis, and a sharding of it, survive. Under a mesh a state of
    one leaf keeps its axes, `[B, ...]`, and so all of its sharding.
    """
    leaves = jax.tree.leaves(a)
    if len(leaves) > 1 or not _compat.shards_states():
        leaves = [leaf.reshape(leaf.shape[0], -1) for leaf in leaves]
    dtype = tree_accumulation_dtype(a)
    if any(jnp.iscomplexobj(leaf) for leaf in leaves):
        dtype = jnp.dtype(jnp.complex128 if dtype == jnp.float64 else jnp.complex64)
    leaves = [leaf.astype(dtype) for leaf in leaves]
    return leaves[0] if len(leaves) == 1 else jnp.concatenate(leaves, axis=1)


def unpack(packed: jax.Array, like: PyTree) -> PyTree:
    """The inverse of `pack`, in the shapes and dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    sizes = [math.prod(leaf.shape[1:]) for leaf in leaves]
    parts = lax.split(packed, sizes, axis=1) if len(leaves) > 1 else [packed]

    def restore(part: jax.Array, leaf: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(part) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            part = part.real
        return part.astype(leaf.dtype).reshape(leaf.shape)

    return jax.tree.unflatten(structure, map(restore, parts, leaves))


def zeros_per_sample(a: PyTree) -> jax.Array:
    """Zeros `[B]` in the accumulation dtype, made from the data of `a`.

    An empty sum instead of `jnp.zeros`: it inherits which mesh axes `a` varies over, which
    `shard_map` demands of a loop carry, and no NaN in `a` can reach it.
    """
    dtype = tree_accumulation_dtype(a)

    def empty_sum(leaf: jax.Array) -> jax.Array:
        leaf = leaf[:, None] if leaf.ndim == 1 else leaf
        empty = lax.slice_in_dim(leaf, 0, 0, axis=1)
        return jnp.sum(jnp.real(empty), axis=tuple(range(1, leaf.ndim))).astype(dtype)

    return functools.reduce(jnp.add, map(empty_sum, jax.tree.leaves(a)))


def varying_axes(a: PyTree) -> frozenset[str]:
    """The mesh axes of a `shard_map` over which any leaf varies; empty outside of one."""
    return frozenset().union(*map(_compat.varying_axes, jax.tree.leaves(a)))


def vary_over(a: PyTree, axes: frozenset[str]) -> PyTree:
    """`a`, made to vary over these mesh axes of a `shard_map` too.

    The start of a loop must vary as the loop's body makes it vary: over the axes of all that f
    uses, not of its own data alone (zeros vary over none). Differentiable: the cotangent is summed
    over the axes that were added.
    """

    def vary(leaf: jax.Array) -> jax.Array:
        missing = axes - _compat.varying_axes(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(vary, a)


def unit_scale(*trees: PyTree) -> jax.Array:
    """A power of two s for each sample, `[B]`, so that squares of `s * a` stay in range.

    It is 1 at all ordinary sizes. Far above them the largest entry becomes 1. Far below, s is such
    that the iterates of a solve may also grow to 1 before their squares overflow, in float32 from
    1e-25 on (for up to 2^20 entries). Products with a power of two are exact, so a solve takes the
    same steps at every scale.
    """
    largest_entry = jnp.stack([largest(a) for a in trees]).max(0)
    usable = jnp.isfinite(largest_entry) & (largest_entry > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest_entry, 1))
    shift = jnp.where(exponent > 0, -exponent, -exponent * 5 // 8)
    shift = jnp.where(is_ordinary(largest_entry), 0, shift)
    return power_of_two(shift, largest_entry.dtype)


def is_ordinary(size: jax.Array) -> jax.Array:
    """Whether numbers of this size can be squared without a thought; False for NaN."""
    most = jnp.finfo(size.dtype).maxexp
    return (size >= 2.0 ** (-most // 4)) & (size <= 2.0 ** (most // 3))


def power_of_two(exponent: jax.Array, dtype: Any) -> jax.Array:
    """`2 ** exponent`, exactly, for exponents of normal numbers."""
    limits = jnp.finfo(dtype)
    exponent = jnp.clip(exponent, limits.minexp + 2, limits.maxexp - 2)
    return jnp.ldexp(jnp.ones(exponent.shape, dtype), exponent)
