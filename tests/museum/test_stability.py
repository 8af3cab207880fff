"""Defects in how other libraries keep equilibria stable: spectra, penalties, normalisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.nnx import DEQ
from deq_jax.stability import (
    SpectralNorm,
    WeightNorm,
    jacobian_frobenius,
    spectral_radius,
)
from tests.museum.catalogue import defect
from tests.museum.problems import normal

KEY = jax.random.key(0)


@defect(
    "torchdeq T16",
    "the spectral radius of a rotation scaled by 0.9 came out as 0.688, with no sign of doubt",
    we="the radius is right for complex pairs, and comes with an error and a flag",
)
def test_the_spectral_radius_of_a_rotation():
    c, s = 0.9 * np.cos(0.7), 0.9 * np.sin(0.7)
    rotation = jnp.asarray([[c, -s], [s, c]], jnp.float32)
    z = jnp.zeros((1, 2))
    found = spectral_radius(lambda w, z, x: z @ w, rotation, z, z, KEY)
    np.testing.assert_allclose(found.radius, [0.9], rtol=1e-5)
    assert found.converged.all()
    few = normal(1, 50, 50, seed=0) / 7
    doubtful = spectral_radius(
        lambda w, z, x: jnp.einsum("bij,bj->bi", w, z),
        few.astype(np.float32),
        jnp.zeros((1, 50)),
        None,
        KEY,
        steps=3,
        max_products=3,
    )
    assert not doubtful.converged.any()


@defect(
    "torchdeq T18",
    "the Jacobian penalty of a recipe differentiated through the solve, unlike the paper's",
    we="the penalty takes its state as a constant, however it was come by",
)
def test_the_penalty_does_not_differentiate_its_state():
    w, x = jnp.float32(0.5), jnp.asarray([[0.3], [0.7]])

    def f(w, z, x):
        return jnp.tanh(w * z) + x

    def penalty(w):
        z = x / (1 - w / 2)  # some function of w
        return jacobian_frobenius(f, w, z, x, KEY).sum()

    z = np.float64(x) / 0.75
    slope = 1 / np.cosh(0.5 * z) ** 2
    # d/dw of (w sech²(w z))² at constant z.
    expected = (2 * 0.5 * slope**2 * (1 - 2 * 0.5 * z * np.tanh(0.5 * z))).sum()
    np.testing.assert_allclose(jax.grad(penalty)(w), expected, rtol=1e-5)


@defect(
    "DeepEquilibriumNetworks.jl",
    "the Jacobian penalty was vᵀ J v, whose mean is the trace and not the norm",
    we="the penalty of a Jacobian with trace 0 is its squared norm",
)
def test_the_penalty_is_no_trace():
    turn = jnp.asarray([[0.0, -3.0], [3.0, 0.0]])
    z = jnp.zeros((4, 2))
    got = jacobian_frobenius(lambda w, z, x: z @ w, turn, z, z, KEY)
    np.testing.assert_allclose(got, [18.0] * 4, rtol=1e-6)


class _Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = _Subclass(4, 4, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.out(self.attention(z + x)))


class _Subclass(nnx.Linear):
    """Not `nnx.Linear` itself."""


@defect(
    "torchdeq T20",
    "subclasses of a layer and the projections of attention were left out of a normalisation",
    we="every leaf named kernel is normalised, whatever layer it belongs to",
)
@pytest.mark.parametrize("normalization", [WeightNorm(), SpectralNorm()])
def test_all_kernels_are_normalised(normalization):
    layer = DEQ(_Attention(nnx.Rngs(0)), normalization=normalization)
    kept = layer.statistics if isinstance(normalization, SpectralNorm) else layer.scale
    names = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert set(kept) == {*names, "out/kernel"}


@defect(
    "locuslab/deq, initialisation",
    "weight normalisation taken before the initialisation undid it: 0.0392 instead of 0.0100",
    we="the effective kernel starts as the kernel that was initialised",
)
def test_normalised_kernels_start_as_they_were_initialised():
    cell = nnx.Linear(64, 64, kernel_init=nnx.initializers.normal(0.01), rngs=nnx.Rngs(0))
    effective, _ = WeightNorm()(nnx.state(cell), *WeightNorm().init(nnx.state(cell)))
    np.testing.assert_allclose(effective["kernel"].get_value(), cell.kernel[...], rtol=1e-5)
    np.testing.assert_allclose(np.std(effective["kernel"].get_value()), 0.01, rtol=0.05)
