"""Settings of every test: CPU, four virtual devices, strict promotion, a compilation cache."""

import os
from pathlib import Path

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla.flags()])
os.environ["MPLBACKEND"] = "Agg"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
CACHE = Path(__file__).parent.parent / ".cache" / "jax"
if os.environ.get("CI") != "true":  # a checkout made anew has nothing to find, and writing costs
    jax.config.update("jax_compilation_cache_dir", str(CACHE))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


@pytest.fixture
def x64():
    """Runs the test with float64 enabled."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """JAX's default promotion: Flax's normalisations in float64 and Optax's Adam need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield
