"""Settings of every test: CPU, four virtual devices, strict promotion, a compilation cache."""

import gc
import os
from pathlib import Path

from tests import xla

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla.flags()])
os.environ["MPLBACKEND"] = "Agg"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
# Operations do not say in which line of Python they were written: 7 % of the tests' time.
jax.config.update("jax_traceback_in_locations_limit", 0)
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


MOST_MAPPINGS = 20_000
"""Linux allows a process 65,530 memory mappings; each compiled function of the CPU takes several,
and XLA ends the process with a segmentation fault when it gets no more."""


def pytest_runtest_teardown(item, nextitem):
    """After a module's last test drops what JAX has compiled, when it is a great deal.

    What is left is not looked at by Python's garbage collection any more: traces and modules are
    millions of objects, and going through them took seconds in the middle of a test.
    """
    if nextitem is not None and nextitem.path == item.path:
        return
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        gc.unfreeze()
        jax.clear_caches()
        gc.collect()
    gc.freeze()
