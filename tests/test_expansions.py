"""Sums of floats against exact fractions."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import expansions

SIZE = 50


def exact(terms):
    """The sum of the terms, entry by entry."""
    return [sum(map(Fraction, map(float, entry))) for entry in zip(*terms, strict=True)]


def drawn(dtype, components):
    """Numbers whose components have all their bits, of sizes from 1e-3 to 1e3, and others."""
    rng = np.random.default_rng(0)
    eps = float(np.finfo(dtype).eps)
    size = 10 ** rng.uniform(-3, 3, SIZE)
    scale = 2.0**60 * size  # room for five components of float32
    a = [jnp.asarray(scale * rng.normal(size=SIZE) * (eps / 4) ** i, dtype) for i in range(7)]
    return a[:components], jnp.asarray(scale * rng.normal(size=SIZE), dtype)


@pytest.mark.parametrize(
    ("dtype", "count"), [("float32", 1), ("float32", 4), ("float32", 5), ("float64", 2)]
)
@pytest.mark.parametrize("beta", [1638 / 2048, 1 / 2048])
def test_a_step_and_the_step_back(dtype, count, beta, x64):
    kept = 1 - beta
    a, b = drawn(dtype, count)
    factors = jnp.asarray(beta, dtype), jnp.asarray(kept, dtype)

    @jax.jit
    def there_and_back(a, b):
        terms = expansions.products(factors[1], a) + expansions.products(factors[0], [b])
        there = expansions.rounded(terms, count)
        minus = expansions.products(-factors[0], [b])
        return there, expansions.quotient([*there, *minus], factors[1], count)

    there, back = there_and_back(a, b)
    unit = float(np.finfo(dtype).eps) ** count
    before, image = exact(a), exact([b])
    for i, (got, returned) in enumerate(zip(exact(there), exact(back), strict=True)):
        expected = Fraction(kept) * before[i] + Fraction(beta) * image[i]
        size = max(abs(before[i]), abs(image[i]))
        assert abs(got - expected) <= 8 * unit * size
        assert abs(returned - before[i]) <= 8 * unit * size / Fraction(kept)
        # The first component is the whole, rounded.
        assert there[0][i] == np.asarray(float(got), dtype) or dtype == "float64"


def test_halves_are_exact_and_short(x64):
    for dtype, bits in (("float32", 12), ("float64", 27)):
        a = drawn(dtype, 1)[0][0]
        upper, lower = expansions.halves(a)
        np.testing.assert_array_equal(exact([upper, lower]), exact([a]))
        for half in (upper, lower):
            mantissa = np.frexp(np.asarray(half, np.float64))[0] * 2**bits
            np.testing.assert_array_equal(mantissa, np.round(mantissa))
    np.testing.assert_array_equal(expansions.halves(jnp.float32([np.inf, 0]))[1], 0)


OPTIMISED = """
from fractions import Fraction
import jax, jax.numpy as jnp, numpy as np
from deq_jax import expansions

rng = np.random.default_rng(0)
a = [jnp.asarray(rng.normal(size=200) * 2.0 ** (-25 * i), jnp.float32) for i in range(4)]
b = jnp.asarray(rng.normal(size=200), jnp.float32)
beta = jnp.float32(1638 / 2048)
kept = 1 - beta

@jax.jit
def there(a, b):
    terms = expansions.products(kept, a) + expansions.products(beta, [b])
    return expansions.rounded(terms, 4)

@jax.jit
def back(c, b):
    return expansions.quotient([*c, *expansions.products(-beta, [b])], kept, 4)

errors = [
    abs(sum(Fraction(float(x)) for x in got) - sum(Fraction(float(x)) for x in a))
    for got, a in zip(zip(*back(there(a, b), b)), zip(*a))
]
print(float(max(errors)))
"""


@pytest.mark.slow
def test_with_all_of_the_compilers_optimisations():
    """The tests compile without them. Among them is the fusion of products and sums."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command, root = [sys.executable, "-c", OPTIMISED], Path(__file__).parents[1]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2**-90
