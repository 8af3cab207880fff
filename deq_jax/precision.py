"""Mixed precision: the dtype of f and that of the state are options, not properties of a cell."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def check_floating(owner: object, name: str) -> np.dtype:
    """The field `name` of `owner` as a dtype.

    Raises:
        TypeError: the field holds no real floating dtype; the message names field and value.
    """
    value = getattr(owner, name)
    label = f"{type(owner).__name__}.{name}"
    try:
        dtype = np.dtype(value)
    except TypeError:
        dtype = None
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{label} must be a real floating dtype such as jnp.bfloat16, got {value!r}"
        )
    return dtype


def cast(values: PyTree, dtype: np.dtype | None) -> PyTree:
    """`values` with its floating leaves in `dtype`; None leaves all as they are.

    Complex leaves take the complex dtype nearest to it, complex64 for half precision, which has
    none of its own. Integers, booleans and PRNG keys stay what they are. Differentiable: cotangents
    come back in the leaves' own dtypes.

    Raises:
        ValueError: `dtype` is float64, and JAX was not told to have it.
    """
    if dtype is None:
        return values
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"an Execution asks for {dtype}, which needs jax_enable_x64")
    at_most_single = jnp.finfo(dtype).bits <= 32
    complex_dtype = np.dtype(np.complex64 if at_most_single else np.complex128)

    def cast_leaf(leaf: Any) -> Any:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            return jnp.asarray(leaf, complex_dtype)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            return jnp.asarray(leaf, dtype)
        return leaf

    return jax.tree.map(cast_leaf, values)


def cast_like(values: PyTree, like: PyTree) -> PyTree:
    """`values` with each leaf in the dtype of the leaf of `like` at its place."""
    return jax.tree.map(lambda leaf, other: leaf.astype(other.dtype), values, like)
