"""Several states of each sample side by side, as solvers keep them: windows, bases, factors.

A stack of m columns is a tree with leaves `[B, m, ...]`, for states with leaves `[B, ...]` as
`tree.flatten_samples` makes them. Coefficients belong to a sample and stand over all leaves:
`[B, m]`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree

PyTree = Any


def empty(flat: PyTree, slots: int) -> PyTree:
    """Zero columns for states with leaves `[B, ...]`; they vary over mesh axes as `flat` does."""
    zeros = tree.zeros_per_sample(flat)

    def leaf_empty(leaf: jax.Array) -> jax.Array:
        columns = jnp.zeros((1, slots, *leaf.shape[1:]), leaf.dtype)
        return columns + tree.over_samples(zeros.astype(leaf.dtype), columns)

    return jax.tree.map(leaf_empty, flat)


def store(columns: PyTree, values: PyTree, slot: jax.Array | int) -> PyTree:
    """Writes `values`, leaves `[B, ...]`, into one column, the same for all samples."""
    return jax.tree.map(
        lambda columns, leaf: lax.dynamic_update_index_in_dim(columns, leaf, slot, 1),
        columns,
        values,
    )


def read(columns: PyTree, slot: jax.Array | int) -> PyTree:
    """One column, leaves `[B, ...]`."""
    return jax.tree.map(
        lambda columns: lax.dynamic_index_in_dim(columns, slot, 1, keepdims=False), columns
    )


def inner_products(columns: PyTree, values: PyTree) -> jax.Array:
    """`⟨column_i, values⟩` over all leaves of each sample, `[B, m]`, in float32 or wider."""
    dtype = tree.tree_accumulation_dtype(values)

    def leaf_products(columns: jax.Array, leaf: jax.Array) -> jax.Array:
        def real_products(a: jax.Array, b: jax.Array) -> jax.Array:
            axes = tuple(range(2, a.ndim)), tuple(range(1, b.ndim))
            # Full precision: accelerators would take float32 products in fewer bits by default.
            return lax.dot_general(
                a,
                b,
                (axes, ((0,), (0,))),
                lax.Precision.HIGHEST,
                preferred_element_type=dtype,
            )

        if jnp.iscomplexobj(leaf):
            return real_products(columns.real, leaf.real) + real_products(columns.imag, leaf.imag)
        return real_products(columns, leaf)

    products = jax.tree.leaves(jax.tree.map(leaf_products, columns, values))
    return tree.sum_of_parts(functools.reduce(jnp.add, products))


def combine(weights: jax.Array, columns: PyTree) -> PyTree:
    """`Σ_i weights_i column_i` for each sample, leaves `[B, ...]` in the columns' dtypes."""

    def leaf_combine(columns: jax.Array) -> jax.Array:
        dtype = tree.working_dtype(columns.dtype)
        # Weights as a matrix of one row: XLA's CPU compiler takes up to twice as long for a vector.
        combined = lax.dot_general(
            weights.astype(dtype)[:, None],
            columns.astype(dtype),
            (((2,), (1,)), ((0,), (0,))),
            lax.Precision.HIGHEST,
        )
        return combined[:, 0].astype(columns.dtype)

    return jax.tree.map(leaf_combine, columns)


def orthogonalize(basis: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of Arnoldi's process: classical Gram-Schmidt, done twice.

    Args:
        basis: `[B, m, ...]`, orthonormal columns and zeros.
        w: `[B, ...]`.

    Returns:
        Coefficients h `[B, m]`; the unit vector v `[B, ...]` and its length `[B]` in
        `w = Σ h_i basis_i + length · v`. Both are 0 where w brings nothing new.
    """
    before = tree.norm(w)
    h = inner_products(basis, w)
    w = w - combine(h, basis)
    again = inner_products(basis, w)
    w = w - combine(again, basis)
    length = tree.norm(w)
    new = length > 10 * jnp.finfo(length.dtype).eps * before
    length = jnp.where(new, length, 0)
    v = w / tree.over_samples(jnp.where(new, length, 1), w).astype(w.dtype)
    return h + again, tree.where(new, v, 0 * w), length
