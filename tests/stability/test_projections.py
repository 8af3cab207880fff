"""Projections: optimality by duality and by bisection in NumPy; convolutions as dense matrices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.stability import (
    lipschitz_convolution,
    named,
    project,
    project_convolution,
    project_frobenius,
    project_infinity_norm,
    project_spectral,
)

DTYPES = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def columns_of(w):
    return w.reshape(-1, w.shape[-1])


# Of each projection: the norm it bounds, that norm's dual.
NORMS = {
    project_infinity_norm: (
        lambda w: np.abs(columns_of(w)).sum(0).max(),
        lambda w: np.abs(columns_of(w)).max(0).sum(),
    ),
    project_frobenius: (np.linalg.norm, np.linalg.norm),
    project_spectral: (
        lambda w: np.linalg.norm(columns_of(w), 2),
        lambda w: np.linalg.norm(columns_of(w), "nuc"),
    ),
}
every_projection = pytest.mark.parametrize("projection", NORMS)


@functools.cache
def compiled(projection, **options):
    return jax.jit(functools.partial(projection, **options))


@pytest.mark.usefixtures("x64")
@every_projection
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((6, 4), jnp.float64),
        ((2, 2, 5), jnp.float64),
        ((3, 5), jnp.float32),
        ((3, 5), jnp.bfloat16),
    ],
)
def test_it_is_the_nearest_point(projection, dtype, shape):
    # p is the projection of w onto the ball B if and only if p is in B and `<w - p, q - p> <= 0`
    # for all q in B; the largest `<w - p, q>` is the bound times the dual norm of w - p.
    norm, dual = NORMS[projection]
    w = jnp.asarray(normal(*shape), dtype)
    bound, tolerance = 0.8, DTYPES[dtype]
    p = compiled(projection)(w, bound)
    assert p.dtype == dtype
    w, p = np.asarray(w, np.float64), np.asarray(p, np.float64)
    assert norm(w) > 1.2 * bound
    assert norm(p) <= bound * (1 + tolerance)
    away = w - p
    assert bound * dual(away) - (away * p).sum() <= tolerance * norm(w) * dual(w)
    np.testing.assert_allclose(compiled(projection)(jnp.asarray(p), bound), p, atol=tolerance)


def l1_projection(column, bound):
    """By bisection on the threshold."""
    if np.abs(column).sum() <= bound:
        return column
    low, high = 0.0, np.abs(column).max()
    for _ in range(100):
        middle = (low + high) / 2
        if np.maximum(np.abs(column) - middle, 0).sum() > bound:
            low = middle
        else:
            high = middle
    return np.sign(column) * np.maximum(np.abs(column) - high, 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("bound", [0.0, 0.4, 1.5, 3.0])
def test_infinity_norm_by_bisection(bound):
    w = normal(5, 6)
    w[:, 0], w[:, 1] = 0, [2, -2, 2, 1, -1]  # zeros, and ties
    w[:, 2] *= 0.1  # within most of the bounds
    expected = np.stack([l1_projection(column, bound) for column in w.T], axis=1)
    project_one = compiled(project_infinity_norm)
    np.testing.assert_allclose(project_one(jnp.asarray(w), bound), expected, atol=1e-12)
    vmapped = jax.jit(jax.vmap(project_one, (0, None)))(jnp.stack([w, -2 * w]), bound)
    np.testing.assert_allclose(vmapped[0], expected, atol=1e-12)
    np.testing.assert_allclose(vmapped[1], project_one(-2 * w, bound), atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("projection", [project_infinity_norm, project_spectral])
def test_output_axes(projection):
    w = normal(3, 4, 2)  # [in, heads, head_dim]
    p = compiled(projection, output_axes=(1, 2))(w, 0.7)
    flat = compiled(projection)(w.reshape(3, 8), 0.7)
    np.testing.assert_allclose(p.reshape(3, 8), flat, atol=1e-12)
    first = compiled(projection, output_axes=0)(w, 0.7)  # [out, in, in]
    flat = compiled(projection)(w.reshape(3, 8).T, 0.7)
    np.testing.assert_allclose(first.reshape(3, 8), flat.T, atol=1e-12)


@every_projection
def test_within_the_bound_nothing_changes(projection):
    w = jnp.asarray(normal(4, 3), jnp.float32)
    bound = 1.01 * NORMS[projection][0](np.asarray(w))
    projection = compiled(projection)
    np.testing.assert_array_equal(projection(w, bound), w)
    zero = jnp.zeros((4, 3))
    np.testing.assert_array_equal(projection(zero, 0.0), zero)
    np.testing.assert_array_equal(projection(w, 0.0), zero)


@pytest.mark.usefixtures("x64")
def test_a_cell_contracts_after_the_projection():
    w, z = jnp.asarray(normal(6, 6)), jnp.asarray(normal(2, 6, seed=1))
    for projection, order in ((project_infinity_norm, np.inf), (project_spectral, 2)):
        p = compiled(projection)(w, 0.5)
        jacobian = np.asarray(jax.jacobian(lambda z, p=p: jnp.tanh(z @ p))(z[0]))
        assert np.linalg.norm(np.asarray(p).T, order) <= 0.5 + 1e-12
        assert np.linalg.norm(jacobian, order) <= 0.5


def convolution_matrix(kernel, size, *, pad, stride):
    """The dense matrix of a zero-padded convolution, entry by entry."""
    *taps, into, out = kernel.shape
    outputs = [(n + 2 * p - t) // stride + 1 for n, p, t in zip(size, pad, taps, strict=True)]
    matrix = np.zeros((*outputs, out, *size, into))
    for point in itertools.product(*map(range, outputs)):
        for tap in itertools.product(*map(range, taps)):
            source = tuple(stride * p - q + t for p, q, t in zip(point, pad, tap, strict=True))
            if all(0 <= s < n for s, n in zip(source, size, strict=True)):
                matrix[(*point, slice(None), *source)] += kernel[tap].T
    return matrix.reshape(np.prod(outputs) * out, -1)


# Taps, channels in and out, size of the image, padding, stride; how much too large at most.
CONVOLUTIONS = {
    "same": ((3, 3), 2, 3, (6, 5), (1, 1), 1, 1.2),
    "narrower": ((3, 3), 3, 2, (6, 6), (1, 1), 1, 1.2),
    "wide taps": ((5, 3), 1, 2, (3, 6), (2, 1), 1, 2.2),
    "one tap": ((1, 1), 3, 3, (3, 3), (0, 0), 1, 1 + 1e-9),
    "one pixel": ((3, 3), 2, 2, (1, 1), (1, 1), 1, np.inf),
    "valid": ((3, 3), 2, 2, (6, 6), (0, 0), 1, 1.3),
    "stride": ((3, 3), 2, 2, (6, 6), (1, 1), 2, 2.1),
    "one axis": ((3,), 2, 2, (12,), (1,), 1, 1.05),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_bound_against_the_dense_matrix(name):
    taps, into, out, size, pad, stride, factor = CONVOLUTIONS[name]
    for seed in range(3):
        kernel = normal(*taps, into, out, seed=seed)
        if seed == 2:
            kernel = np.abs(kernel)  # the low frequencies are the large ones
        exact = np.linalg.norm(convolution_matrix(kernel, size, pad=pad, stride=stride), 2)
        bound = float(lipschitz_convolution(jnp.asarray(kernel), size))
        assert exact * (1 - 1e-9) <= bound <= exact * factor, bound / exact


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("channels", [(1, 1), (3, 40), (40, 3)])
def test_convolution_bound_is_the_circular_norm(channels):
    """Singular values by NumPy; many channels and gaps between singular values of all sizes."""
    kernel = normal(3, 1, *channels)
    symbols = np.fft.fftn(kernel, (8, 4), axes=(0, 1))
    expected = np.linalg.norm(symbols, 2, axis=(-2, -1)).max()
    bound = float(jax.jit(lipschitz_convolution, static_argnums=1)(jnp.asarray(kernel), (6, 4)))
    assert expected * (1 - 1e-12) <= bound <= expected * (1 + 1e-5)
    assert lipschitz_convolution(jnp.zeros((3, 3, 2, 2)), (4, 4)) == 0
    assert np.isnan(lipschitz_convolution(jnp.full((3, 3, 2, 2), jnp.nan), (4, 4)))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.slow
def test_projected_convolution(dtype):
    kernel, size = jnp.asarray(normal(3, 3, 2, 2), dtype), (4, 4)
    projected = jax.jit(project_convolution, static_argnums=2)(kernel, 0.9, size)
    assert projected.dtype == dtype
    ratio = np.asarray(projected, np.float64) / np.asarray(kernel, np.float64)
    np.testing.assert_allclose(ratio, ratio.mean(), rtol=DTYPES[dtype])
    assert lipschitz_convolution(projected, size) == pytest.approx(0.9, rel=DTYPES[dtype])
    np.testing.assert_array_equal(project_convolution(kernel, 100.0, size), kernel)
    np.testing.assert_array_equal(project_convolution(jnp.zeros((3, 3, 1, 2)), 0.0, size), 0)
    both = jax.vmap(lambda kernel: lipschitz_convolution(kernel, size))(
        jnp.stack([kernel, -2 * kernel])
    )
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-5)


def test_project_changes_the_chosen_leaves():
    params = {
        "recurrent": {"kernel": normal(3, 3), "bias": normal(3)},
        "query": {"kernel": normal(3, 3), "bias": normal(2, 3)},
        "steps": np.arange(4).reshape(2, 2),
    }
    params = jax.tree.map(jnp.asarray, params)
    shrink = functools.partial(project_frobenius, bound=0.5)

    def changed(kernels):
        projected = project(params, shrink, *kernels)
        paths = jax.tree_util.tree_leaves_with_path(
            jax.tree.map(lambda a, b: bool((a != b).any()), params, projected)
        )
        return {jax.tree_util.keystr(k, simple=True, separator="/") for k, leaf in paths if leaf}

    assert changed([]) == {"recurrent/kernel", "query/kernel"}
    assert changed([named("query")]) == {"query/kernel"}
    assert changed([lambda path, leaf: "recurrent" in path and leaf.ndim == 2]) == {
        "recurrent/kernel"
    }


def test_errors():
    w = jnp.ones((3, 2))
    for projection in NORMS:
        for bound in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="bound must be at least 0, got"):
                projection(w, bound)
    with pytest.raises(ValueError, match="bound must be at least 0"):
        project_convolution(jnp.ones((3, 3, 1, 1)), -1, (4, 4))
    for axes in (2, (0, 1), (), (0, 0), (-3,)):
        with pytest.raises(ValueError, match="output_axes="):
            project_infinity_norm(w, 1.0, output_axes=axes)
    for kernel, size in ((jnp.ones((3, 3, 1, 1)), (4,)), (w, ()), (jnp.ones((3, 1, 1)), (0,))):
        with pytest.raises(ValueError, match="a positive size for each tap axis"):
            lipschitz_convolution(kernel, size)
    with pytest.raises(ValueError, match=r"no leaf of params is a kernel.*\['a/w', 'b/0'\]"):
        project({"a": {"w": w}, "b": [w]}, lambda w: w)
    with pytest.raises(
        ValueError, match=r"floating with two axes or more, kernel is int32\[2, 2\]"
    ):
        project({"kernel": jnp.ones((2, 2), jnp.int32)}, lambda w: w, lambda path, leaf: True)
