"""Monotone cells: their matrices, resolvents and adjoints, monotonicity for all parameters."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.cells import fourier
from deq_jax.cells.layers import convolution
from deq_jax.cells.monotone import MonotoneConvCell, MonotoneDenseCell, MonotoneMultiTierCell
from tests import monotone_reference as reference

M = 0.3
CASES = {
    "dense": lambda **options: MonotoneDenseCell(3, 6, **options),
    "even grid": lambda **options: MonotoneConvCell((4, 2, 2), 2, **options),
    "odd grid": lambda **options: MonotoneConvCell((3, 5, 1), 2, **options),
    "three tiers": lambda **options: MonotoneMultiTierCell((4, 8, 2), (2, 1, 3), **options),
    "two tiers": lambda **options: MonotoneMultiTierCell((6, 4, 1), (1, 2), **options),
}
ALPHA = 0.7


@functools.cache
def cell_of(name):
    """A cell in float64 whose parameters, scales too, are random."""
    cell = CASES[name](m=M, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)

    def draw(leaf):
        return jnp.asarray(0.5 * rng.normal(size=leaf.shape))

    nnx.update(cell, jax.tree.map(draw, nnx.state(cell, nnx.Param)))
    return cell


def parameters(cell):
    """As nested dictionaries of NumPy arrays; scalars count as floats."""
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(cell, nnx.Param)))


def matrix_of(p, cell):
    """W by the NumPy definitions."""
    if isinstance(cell, MonotoneDenseCell):
        return reference.dense(p, cell.m)
    if isinstance(cell, MonotoneConvCell):
        return reference.conv(p, cell.m, cell.grid)
    return reference.multitier(p, cell.m, cell.grids)


def shapes(cell):
    """The shapes of one state."""
    if isinstance(cell, MonotoneDenseCell):
        return (cell.a.shape[0],)
    if isinstance(cell, MonotoneConvCell):
        return (*cell.grid, cell.a.shape[-1])
    return tuple((*grid, c) for grid, c in zip(cell.grids, cell.channels, strict=True))


def pack(z):
    """A batch of states as rows of one matrix."""
    return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(z)], 1)


def unpack(rows, shape):
    """A batch of states from rows."""
    if not isinstance(shape[0], tuple):
        return rows.reshape(-1, *shape)
    at = np.cumsum([0, *(np.prod(one) for one in shape)])
    return tuple(
        rows[:, start:stop].reshape(-1, *one)
        for start, stop, one in zip(at, at[1:], shape, strict=False)
    )


def size(cell):
    shape = shapes(cell)
    return sum(map(np.prod, shape)) if isinstance(shape[0], tuple) else int(np.prod(shape))


@functools.partial(jax.jit, static_argnums=0)
def products(definition, state, z):
    """W z, Wᵀ z, V z and Vᵀ z of rows."""
    cell = nnx.merge(definition, state)
    resolvent = cell.resolvent(ALPHA)
    z = unpack(z, shapes(cell))
    found = (
        cell.multiply(z),
        cell.multiply_transpose(z),
        cell.apply_resolvent(resolvent, z),
        cell.apply_resolvent_transpose(resolvent, z),
    )
    return tuple(map(pack, found))


@functools.partial(jax.jit, static_argnums=0)
def w_of(definition, state):
    """W, column by column."""
    cell = nnx.merge(definition, state)
    return pack(cell.multiply(unpack(jnp.eye(size(cell)), shapes(cell)))).T


@functools.partial(jax.jit, static_argnums=0)
def inject(definition, state, x):
    return nnx.merge(definition, state).inject(x)


@functools.partial(jax.jit, static_argnums=0)
def apply(definition, state, z, injection):
    return nnx.merge(definition, state)(z, injection)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_products_are_those_of_the_matrices(x64, name):
    cell = cell_of(name)
    w = matrix_of(parameters(cell), cell)
    v = np.linalg.inv(np.eye(len(w)) + ALPHA * (np.eye(len(w)) - w))
    found = products(*nnx.split(cell), np.eye(len(w)))
    for rows, matrix in zip(found, (w, w.T, v, v.T), strict=True):
        np.testing.assert_allclose(rows.T, matrix, atol=1e-11 * np.abs(w).max())


@pytest.mark.parametrize("name", CASES)
def test_adjoint_identity_and_inverse(x64, name):
    cell = cell_of(name)
    z, y = np.random.default_rng(2).normal(size=(2, 3, size(cell)))
    split = nnx.split(cell)
    wz, wtz, _, _ = products(*split, z)
    wty = products(*split, y)[1]
    np.testing.assert_allclose((y * wz).sum(1), (wty * z).sum(1), rtol=1e-10)
    inverted = products(*split, z + ALPHA * (z - wz))[2]
    np.testing.assert_allclose(inverted, z, atol=1e-10)
    inverted = products(*split, z + ALPHA * (z - wtz))[3]
    np.testing.assert_allclose(inverted, z, atol=1e-10)


@pytest.mark.parametrize("name", ["dense", "odd grid", "two tiers"])
def test_strongly_monotone_for_all_parameters(x64, name):
    cell = cell_of(name)
    definition, state = nnx.split(cell)
    rng = np.random.default_rng(3)

    def draw(leaf):
        scale = 10.0 ** rng.uniform(-3, 3)  # scalars of either sign, tiny and huge
        return jnp.asarray(scale * rng.normal(size=leaf.shape))

    for _ in range(20):
        w = np.asarray(w_of(definition, jax.tree.map(draw, state)))
        distance = np.eye(len(w)) - w
        lowest = np.linalg.eigvalsh(distance + distance.T)[0]
        assert lowest >= 2 * M - 1e-13 * np.abs(w).max() * len(w)


def test_a_negative_scale_counts_as_positive_and_zero_has_a_gradient(x64):
    cell = cell_of("two tiers")
    definition, state = nnx.split(cell)
    negative = nnx.to_pure_dict(state)
    positive = jax.tree.map(jnp.array, negative)
    for name in ("g", "s"):
        negative[name] = {i: -jnp.abs(g) for i, g in negative[name].items()}
        positive[name] = {i: jnp.abs(g) for i, g in positive[name].items()}
    zero = {**positive, "g": {i: jnp.zeros(()) for i in positive["g"]}}
    zero["a"] = {i: jnp.zeros_like(a) for i, a in positive["a"].items()}

    def merged(pure):
        replaced = jax.tree.map(jnp.array, state)
        nnx.replace_by_pure_dict(replaced, pure)
        return replaced

    w = w_of(definition, merged(positive))
    np.testing.assert_array_equal(w_of(definition, merged(negative)), w)
    gradient = jax.jit(jax.grad(lambda state: w_of(definition, state).sum()))(merged(zero))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("name", ["even grid", "odd grid", "three tiers"])
def test_injection_and_border(x64, name):
    cell, rng = cell_of(name), np.random.default_rng(4)
    p = parameters(cell)
    grid = cell.grid if name != "three tiers" else cell.grids[0]
    image = rng.normal(size=(grid[0] - 2, grid[1] - 2, p["input_kernel"].shape[2]))
    definition, state = nnx.split(cell)
    injection = inject(definition, state, image[None])
    first = injection if name != "three tiers" else injection[0]
    np.testing.assert_allclose(first[0], reference.inject(p, image, grid), atol=1e-13)
    if name == "three tiers":
        assert [leaf.shape[1:] for leaf in injection] == list(shapes(cell))
        assert not any(leaf.any() for leaf in injection[1:])
    z = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), injection)
    free = [reference.inside(leaf.shape[1:3], leaf.shape[3]) for leaf in jax.tree.leaves(z)]
    preactivation = matrix_of(p, cell) @ pack(z)[0] + pack(injection)[0]
    expected = np.where(np.concatenate(free), np.maximum(preactivation, 0), 0)
    np.testing.assert_allclose(
        pack(apply(definition, state, z, injection))[0], expected, atol=1e-12
    )


def test_dense_cell_is_the_formula(x64):
    cell, rng = cell_of("dense"), np.random.default_rng(5)
    p, x, z = parameters(cell), rng.normal(size=(2, 3)), rng.normal(size=(2, 6))
    c = x @ p["injection"]["kernel"] + p["injection"]["bias"]
    np.testing.assert_allclose(cell.inject(jnp.asarray(x)), c, rtol=1e-12)
    expected = np.maximum(z @ reference.dense(p, M).T + c, 0)
    np.testing.assert_allclose(cell(jnp.asarray(z), jnp.asarray(c)), expected, atol=1e-13)


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (1, 2)])
def test_transforms_are_those_of_numpy(x64, grid):
    z = np.random.default_rng(6).normal(size=(2, *grid, 3))
    expected = np.fft.fft2(z, axes=(1, 2))[:, : grid[0] // 2 + 1].transpose(1, 2, 0, 3)
    expected = expected.reshape(-1, 2, 3)
    found = fourier.to_frequencies(jnp.asarray(z))
    pairs = np.concatenate([expected.real, expected.imag], -1)
    np.testing.assert_allclose(found, pairs, atol=1e-13)
    np.testing.assert_allclose(fourier.from_frequencies(found, grid), z, atol=1e-14)


@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (2, 2)])
@pytest.mark.slow
def test_folding_is_sampling_and_unfolding_inserts_zeros(x64, grid):
    z = np.random.default_rng(7).normal(size=(2, *grid, 3))
    every_second, sparse = z[:, ::2, ::2], np.zeros_like(z)
    sparse[:, ::2, ::2] = every_second
    folded = fourier.fold(fourier.to_frequencies(jnp.asarray(z)), grid, real_pairs=True)
    coarse = fourier.to_frequencies(jnp.asarray(every_second))
    np.testing.assert_allclose(folded / 4, coarse, atol=1e-13)
    unfolded = fourier.unfold(coarse, grid, real_pairs=True)
    np.testing.assert_allclose(fourier.to_frequencies(jnp.asarray(sparse)), unfolded, atol=1e-13)


def test_initial_parameters_are_uniform():
    cell = MonotoneConvCell((4, 4, 2), 40, rngs=nnx.Rngs(0))
    layer = convolution(2, 40, 3, rngs=nnx.Rngs(1))
    for kernel, fan_in in ((cell.a, 360), (cell.input_kernel, 18), (layer.kernel, 18)):
        scaled = np.asarray(kernel[...]) * np.sqrt(fan_in)
        assert np.abs(scaled).max() <= 1
        assert np.abs(scaled).max() > 0.99
        np.testing.assert_allclose(scaled.std(), 1 / np.sqrt(3), rtol=0.05)
    assert cell.g[...] == cell.h[...] == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda **o: MonotoneDenseCell(2, 3, m=0.0, **o), "m must be finite, > 0"),
        (lambda **o: MonotoneConvCell((4, 4, 1), 2, kernel_size=2, **o), "must be odd, got 2"),
        (lambda **o: MonotoneMultiTierCell((4, 4, 1), (2,), **o), "two resolutions or more"),
        (lambda **o: MonotoneMultiTierCell((6, 4, 1), (2, 2, 2), **o), "multiples of 4, got 6x4"),
        (lambda **o: MonotoneDenseCell(2, 0, **o), "features must be at least 1, got 0"),
        (lambda **o: MonotoneConvCell((4, 4, 1), 2, kernel_size=-1, **o), "kernel_size must be at"),
        (lambda **o: MonotoneMultiTierCell((4, 4, 1), (2, 0), **o), r"each of channels=\(2, 0\)"),
    ],
)
def test_errors_say_what_is_wrong(build, message):
    with pytest.raises(ValueError, match=message):
        build(rngs=nnx.Rngs(0))


@pytest.mark.parametrize("shape", [(2, 4, 6, 2), (2, 4, 2, 1), (4, 2, 2)])
def test_images_of_another_shape_are_refused(x64, shape):
    message = r"x must be \[B, H, W, colours\] = \[B, 4, 2, 2\], as image_shape says; got \["
    with pytest.raises(ValueError, match=message):
        cell_of("even grid").inject(jnp.ones(shape))
