"""Per-sample algebra against NumPy on the concatenated sample."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import tree


def random_tree(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    leaf = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    return {"a": leaf(3, 4), "b": (leaf(3, 2, 2), leaf(3))}


def flat(t):
    return np.concatenate(
        [np.asarray(leaf, np.complex128).reshape(3, -1) for leaf in jax.tree.leaves(t)], axis=1
    )


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16, np.float16, np.complex64])
def test_products_and_norms(dtype):
    a, b = random_tree(0, dtype), random_tree(1, dtype)
    if dtype == np.complex64:
        a = jax.tree.map(lambda leaf: leaf * (1 + 2j), a)
    expected = (flat(a).conj() * flat(b)).sum(1).real
    np.testing.assert_allclose(tree.dot(a, b), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(tree.norm(a), np.linalg.norm(flat(a), axis=1), rtol=1e-6)
    np.testing.assert_allclose(tree.largest(a), np.abs(flat(a)).max(1), rtol=1e-6)
    assert tree.dot(a, b).dtype == tree.norm(a).dtype == jnp.float32


def test_half_precision_sums_do_not_saturate():
    ones = {"a": jnp.full((2, 4000), 8.0, jnp.float16)}
    np.testing.assert_allclose(tree.dot(ones, ones), 256_000.0)  # float16 ends at 65,504


def test_where_keeps_what_is_not_taken_out():
    good, bad = random_tree(0), jax.tree.map(lambda leaf: leaf * jnp.nan, random_tree(0))
    chosen = tree.where(jnp.array([True, False, True]), good, bad)
    finite = np.isfinite(flat(chosen)).all(1)
    np.testing.assert_array_equal(finite, [True, False, True])


def test_scale_takes_numbers_and_samples():
    a = random_tree(0)
    np.testing.assert_allclose(flat(tree.scale(2.0, a)), 2 * flat(a), rtol=1e-6)
    factors = jnp.array([1.0, -2.0, 0.5])
    np.testing.assert_allclose(
        flat(tree.scale(factors, a)), np.asarray(factors)[:, None] * flat(a), rtol=1e-6
    )


def test_zeros_of_a_tree_with_nans_are_zero():
    bad = jax.tree.map(lambda leaf: leaf * jnp.nan, random_tree(0))
    np.testing.assert_array_equal(tree.zeros_per_sample(bad), np.zeros(3))


@pytest.mark.usefixtures("x64")
def test_the_widest_leaf_decides_the_precision_of_the_sums():
    mixed = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": jnp.full((2, 1), 1 + 1e-12, jnp.float64)}
    assert tree.dot(mixed, mixed).dtype == jnp.float64
    np.testing.assert_allclose(tree.dot(mixed, mixed), 3 + (1 + 1e-12) ** 2, rtol=1e-15)
