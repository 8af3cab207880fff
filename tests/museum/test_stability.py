"""Defects in how other libraries keep equilibria stable: spectra, penalties, normalisation."""

import jax.numpy as jnp
import pytest
from flax import nnx

from deq_jax.nnx import DEQ
from deq_jax.stability import (
    SpectralNorm,
    WeightNorm,
)


class _Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
        self.out = _Subclass(4, 4, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(self.out(self.attention(z + x)))


class _Subclass(nnx.Linear):
    """Not `nnx.Linear` itself."""


@pytest.mark.museum(
    "torchdeq T20: subclasses of a layer and the projections of attention were left out of a "
    "normalisation"
)
@pytest.mark.parametrize("normalization", [WeightNorm(), SpectralNorm()])
@pytest.mark.slow
def test_all_kernels_are_normalised(normalization):
    layer = DEQ(_Attention(nnx.Rngs(0)), normalization=normalization)
    kept = layer.statistics if isinstance(normalization, SpectralNorm) else layer.scale
    names = {f"attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert set(kept) == {*names, "out/kernel"}
