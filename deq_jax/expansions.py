"""Numbers kept to several times the precision of a float, as unevaluated sums of floats.

An expansion is a list of m arrays of one shape, the largest component first, that stands for their
sum. With m components of float32 a number has about 24 m significant bits. No wider dtype is
needed, so that this works without `jax_enable_x64` and on accelerators that have no float64.

Every operation here is exact except for the last rounding to m components. The products are those
of a half of a float with a factor of few bits, so that they are exact too: whether a compiler
contracts a product and a sum into one fused operation makes no difference.

Sources: Dekker, "A floating-point technique for extending the available precision", 1971; Ogita,
Rump and Oishi, "Accurate sum and dot product", 2005, for the summation in passes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

FACTOR_BITS = 11
"""A factor is a multiple of `2 ** -FACTOR_BITS` between 0 and 1."""


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`a + b` rounded, and its rounding error: their sum is exactly `a + b`."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two numbers of about half the significant bits whose sum is exactly `a`, float32 or 64."""
    upper = without_last_bits(a, (jnp.finfo(a.dtype).nmant + 1) // 2)  # 12 of 24 bits, 26 of 53
    # The rest of an infinity would be a NaN.
    return upper, jnp.where(jnp.isfinite(a), a - upper, 0)


def without_last_bits(a: jax.Array, count: int) -> jax.Array:
    """`a` with the last bits of its significand cleared, float32 or float64."""
    bits = jnp.finfo(a.dtype).bits
    kind = jnp.uint32 if bits == 32 else jnp.uint64
    mask = kind((1 << bits) - (1 << count))
    return lax.bitcast_convert_type(lax.bitcast_convert_type(a, kind) & mask, a.dtype)


def products(factor: jax.Array, terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Terms whose sum is exactly `factor · Σ terms`, with a factor of `FACTOR_BITS` bits."""
    return [factor * half for term in terms for half in halves(term)]


def rounded(terms: Sequence[jax.Array], count: int) -> list[jax.Array]:
    """The sum of the terms as an expansion of `count` components.

    Each pass adds up the remaining terms. The rounding errors of its additions are the terms of the
    next pass.
    """
    rest, components = list(terms), []
    for _ in range(count):
        total, errors = rest[0], []
        for term in rest[1:]:
            total, error = two_sum(total, term)
            errors.append(error)
        components.append(total)
        rest = errors or [jnp.zeros_like(total)]
    # Components may overlap where terms cancelled. Twice from the smallest upwards parts them, so
    # that the first component is the sum rounded to one float.
    for _ in range(min(2, count - 1)):
        for i in reversed(range(count - 1)):
            components[i], components[i + 1] = two_sum(components[i], components[i + 1])
    return components


def quotient(terms: Sequence[jax.Array], factor: jax.Array, count: int) -> list[jax.Array]:
    """`Σ terms / factor` as an expansion of `count` components, by long division.

    One digit more than there are components makes up for the bit that each digit lacks.
    """
    rest, digits = rounded(terms, count + 1), []
    for _ in range(count + 1):
        # A compiler may divide by a product with the inverse, and join that with each sum that it
        # is part of, without rounding it. Behind an operation on its bits it is one number.
        digit = without_last_bits(rest[0] / factor, 1)
        digits.append(digit)
        # Exact: the terms of rest - factor · digit.
        rest = rounded([*rest, *products(-factor, [digit])], count + 1)
    return rounded(digits, count)
