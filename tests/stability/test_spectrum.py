"""Spectral radii and Ritz values against numpy.linalg.eigvals of dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.stability import spectral_radius, spectrum

KEY = jax.random.key(0)


def rotation(rng, radius, size):
    """Planes that turn by random angles, all scaled by the same radius."""
    matrix = np.zeros((size, size))
    for i in range(0, size, 2):
        c, s = radius * np.array([np.cos(angle := rng.uniform(0.3, 3.0)), np.sin(angle)])
        matrix[i : i + 2, i : i + 2] = [[c, -s], [s, c]]
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return basis @ matrix @ basis.T


def gap(rng, first, second, size):
    """Symmetric, with two eigenvalues close to each other and all others below."""
    values = np.concatenate([[first, second], rng.uniform(-0.8, 0.8, size - 2)])
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    return basis @ np.diag(values) @ basis.T


def matrices(size=40):
    """Twenty matrices: rotations, gaps, full, non-normal and nearly singular ones."""
    rng = np.random.default_rng(0)
    found = [rotation(rng, 0.9, size) for _ in range(4)]
    found += [gap(rng, 0.90, second, size) for second in (0.89, 0.89, -0.89, 0.895)]
    found += [rng.normal(size=(size, size)) / size**0.5 for _ in range(6)]
    for _ in range(4):
        upper = np.triu(rng.normal(size=(size, size)), 1) * 0.1
        found.append(upper + np.diag(rng.uniform(-0.9, 0.9, size)))
    found.append(1.5 * np.eye(size))
    found.append(np.outer(rng.normal(size=size), rng.normal(size=size)) / 20)
    return np.array(found)


def linear(matrices, z, x):
    return jnp.einsum("bij,bj->bi", matrices, z) + x


@pytest.fixture(scope="module")
def estimate():
    return jax.jit(lambda matrices, z, key: spectral_radius(linear, matrices, z, z, key, steps=32))


@pytest.mark.museum(
    "torchdeq T16: the spectral radius of a rotation scaled by 0.9 came out as 0.688, with no "
    "sign of doubt"
)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_radius_of_twenty_maps(estimate, seed):
    """Power iteration with a Rayleigh quotient gives 0.688 for a rotation scaled by 0.9."""
    found = matrices()
    expected = np.abs(np.linalg.eigvals(found)).max(1)
    z = jnp.zeros(found.shape[:2])
    got = estimate(jnp.asarray(found, jnp.float32), z, jax.random.key(seed))
    assert got.converged.all(), (got.error, got.products)
    np.testing.assert_allclose(got.radius, expected, rtol=0.01)
    assert (np.abs(got.radius - expected) <= got.error + 1e-5).all()
    assert (got.error <= 0.01 * expected).all()


@pytest.mark.slow
def test_a_cell_at_its_equilibrium(x64):
    """Nonlinear, two leaves, and a Jacobian that differs from sample to sample."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=(9, 9)))
    z = {"a": jnp.asarray(rng.normal(size=(3, 5))), "b": jnp.asarray(rng.normal(size=(3, 2, 2)))}

    def cell(params, z, x):
        flat = jnp.concatenate([z["a"], z["b"].reshape(-1, 4)], 1)
        out = jnp.tanh(flat @ params)
        return {"a": out[:, :5], "b": out[:, 5:].reshape(-1, 2, 2)}

    got = spectral_radius(cell, params, z, None, KEY)
    flat = np.concatenate([z["a"], np.reshape(z["b"], (3, 4))], 1)
    slopes = 1 - np.tanh(flat @ params) ** 2
    expected = [np.abs(np.linalg.eigvals(np.asarray(params) * slope)).max() for slope in slopes]
    np.testing.assert_allclose(got.radius, expected, rtol=1e-9)
    assert int(got.products) == 9  # as many as the state has entries
    values = np.asarray(spectrum(cell, params, z, None, KEY).values)
    for value, slope in zip(values, slopes, strict=True):
        dense = np.linalg.eigvals(np.asarray(params) * slope)
        distance = np.abs(value[:, None] - dense)
        assert distance.min(0).max() < 1e-9
        assert distance.min(1).max() < 1e-9
    assert (np.abs(values)[:, :-1] >= np.abs(values)[:, 1:] - 1e-12).all()


@pytest.mark.slow
def test_ritz_values_with_small_errors_are_eigenvalues():
    matrix = gap(np.random.default_rng(1), 0.95, -0.9, 60)
    z = jnp.zeros((1, 60))
    got = spectrum(linear, jnp.asarray(matrix[None], jnp.float32), z, z, KEY, steps=20)
    assert got.values.shape == got.errors.shape == (1, 20)
    expected = np.linalg.eigvalsh(matrix)
    distance = np.abs(np.asarray(got.values[0])[:, None] - expected).min(1)
    assert (distance <= np.asarray(got.errors[0]) + 1e-5).all()
    assert np.asarray(got.errors[0])[:2].max() < 0.01
    assert np.asarray(got.errors[0]).max() > 0.01


@pytest.mark.slow
def test_the_error_knows_how_sensitive_the_eigenvalue_is():
    """Far from normal a small residual does not mean a small error."""
    rng = np.random.default_rng(0)
    found = [
        np.triu(rng.normal(size=(40, 40)), 1) * 0.4 + np.diag(rng.uniform(-0.9, 0.9, 40))
        for _ in range(12)
    ]
    z = jnp.zeros((12, 40))
    arguments = (linear, jnp.asarray(found, jnp.float32), z, z, KEY)
    got = spectral_radius(*arguments, steps=30, max_products=30)
    deviation = np.abs(got.radius - np.abs(np.linalg.eigvals(found)).max(1))
    assert (deviation <= 2 * got.error + 1e-4).all()
    residual = np.asarray(spectrum(*arguments, steps=30).errors[:, 0])
    assert (deviation > 2 * residual + 1e-4).any()


@pytest.mark.slow
def test_an_exhausted_space_has_no_more_values():
    z = jnp.zeros((2, 6))
    diagonal = jnp.asarray([[3, 3, 3, 2, 2, 2], [1, 1, 1, 1, 1, 1]], jnp.float32)
    got = spectrum(lambda p, z, x: p * z, diagonal, z, z, KEY)
    np.testing.assert_allclose(np.asarray(got.values[0, :2]).real, [3, 2], rtol=1e-5)
    assert np.isnan(got.values[0, 2:]).all()
    np.testing.assert_allclose(np.asarray(got.values[1, :1]).real, [1], rtol=1e-5)
    assert np.isnan(got.errors[1, 1:]).all()


@pytest.mark.slow
def test_unbatched_is_the_whole_state(x64):
    matrix = rotation(np.random.default_rng(0), 0.9, 6)
    z = jnp.zeros((2, 3))
    got = spectral_radius(
        lambda p, z, x: (p @ z.reshape(-1)).reshape(2, 3), matrix, z, z, KEY, batched=False
    )
    assert got.radius.shape == got.error.shape == got.converged.shape == ()
    np.testing.assert_allclose(got.radius, 0.9, rtol=1e-9)


@pytest.mark.museum(
    "torchdeq T16: the spectral radius of a rotation scaled by 0.9 came out as 0.688, with no "
    "sign of doubt"
)
@pytest.mark.slow
def test_what_cannot_be_known_is_said():
    """Too few products: not converged. A Jacobian that is not finite: NaN, and no endless loop."""
    found = jnp.asarray(matrices()[8:10], jnp.float32)
    z = jnp.zeros(found.shape[:2])
    few = spectral_radius(linear, found, z, z, KEY, steps=4, max_products=4)
    assert not few.converged.any()
    assert int(few.products) == 4
    broken = found.at[0, 0, 0].set(jnp.nan)
    got = spectral_radius(linear, broken, z, z, KEY)
    assert np.isnan(got.radius[0])
    assert not got.converged[0]
    assert got.converged[1]
    np.testing.assert_allclose(
        got.radius[1], np.abs(np.linalg.eigvals(np.asarray(found[1]))).max(), rtol=0.01
    )


def test_a_zero_jacobian_has_radius_zero():
    z = jnp.ones((2, 3))
    got = spectral_radius(lambda p, z, x: x, None, z, z, KEY)
    np.testing.assert_array_equal(got.radius, [0, 0])
    assert got.converged.all()


@pytest.mark.slow
def test_half_precision():
    z = jnp.zeros((1, 20), jnp.bfloat16)
    values = jnp.linspace(-0.5, 0.9, 20).astype(jnp.bfloat16)
    got = spectral_radius(lambda p, z, x: p * z, values, z, z, KEY)
    assert got.radius.dtype == jnp.float32
    np.testing.assert_allclose(got.radius, [0.9], rtol=0.02)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"steps": 0}, "steps"),
        ({"rtol": 0.0}, "rtol"),
        ({"steps": 3, "max_products": 2}, "max_products"),
    ],
)
def test_bad_options_are_named(options, named):
    z = jnp.zeros((2, 5))
    with pytest.raises(ValueError, match=named):
        spectral_radius(lambda p, z, x: z, None, z, z, KEY, **options)
    with pytest.raises(TypeError, match="complex"):
        spectral_radius(lambda p, z, x: z, None, z.astype(jnp.complex64), z, KEY)
