"""Eigenvalues of the cell's Jacobian `J = ∂f/∂z`, by Arnoldi's process for each sample.

A solution attracts plain iteration if and only if the spectral radius of J there is below 1;
Anderson and Broyden cope with more, but need longer the closer eigenvalues come to 1.

Power iteration with a Rayleigh quotient, which other libraries use, is wrong where the dominant
eigenvalues are a complex pair and says nothing about its error.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, columns, tree
from deq_jax.linear.krylov import Product, packed
from deq_jax.stability.jacobian import Cell, point_of

PyTree = Any


class SpectralRadius(NamedTuple):
    """The largest modulus of an eigenvalue of J. With `batched=False` the axis `[B]` is absent.

    Attributes:
        radius: `[B]`, modulus of the dominant Ritz value; NaN where J is not finite.
        error: `[B]`, estimate of its error: the residual of the Ritz pair times the condition
            number of the eigenvalue in the Krylov space. To first order a bound.
        converged: `[B]` boolean, the error is at most `rtol · radius`, or what rounding allows.
        products: int32, products with J on the batch.
    """

    radius: jax.Array
    error: jax.Array
    converged: jax.Array
    products: jax.Array


class Spectrum(NamedTuple):
    """Ritz values, largest modulus first. With `batched=False` the axis `[B]` is absent.

    Attributes:
        values: `[B, steps]` complex; NaN where the Krylov space was exhausted before.
        errors: `[B, steps]`, residuals `‖J v - θ v‖` of the unit Ritz vectors: small for values
            that are eigenvalues, large for those that only outline the spectrum.
    """

    values: jax.Array
    errors: jax.Array


def spectral_radius(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    *,
    steps: int = 32,
    rtol: float = 1e-2,
    max_products: int = 256,
    batched: bool = True,
) -> SpectralRadius:
    """The spectral radius of `J = ∂f/∂z` of each sample, with an estimate of its error.

    Arnoldi's process from a random vector, restarted from the dominant Ritz vectors until all
    samples are within `rtol`. Right for complex pairs. No gradient flows through it.

    For f that treats samples independently; where f mixes them it is no spectral radius of
    anything: use `batched=False` there.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        z: where J is taken, usually the solution; leaves `[B, ...]`.
        x: as for `deq_fixed_point`.
        key: random key, for the first vector.
        steps: dimension of the Krylov space. Memory: `steps + 1` states in float32 or wider.
        rtol: relative error to reach.
        max_products: products with J after which no further restart is made; at least `steps`.
        batched: as for `deq_fixed_point`.

    Returns:
        `SpectralRadius`. Eigenvalues of the `steps x steps` matrices are computed by LAPACK on the
        host, which JAX has for CPU and GPU.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; an option is out of its range.

    Source: Saad, "Numerical methods for large eigenvalue problems", 2011, ch. 6 and 7.1.
    """
    checks.check_positive_integer("steps", steps)
    checks.check_positive_integer("max_products", max_products)
    if not rtol > 0:
        raise ValueError(f"rtol must be above 0, got {rtol!r}")
    product, start, steps = _krylov(f, params, z, x, key, steps, batched)
    if max_products < steps:
        raise ValueError(f"max_products must be at least steps={steps}, got {max_products}")
    tolerance = max(rtol, 10 * float(jnp.finfo(start.dtype).eps))

    class Carry(NamedTuple):
        radius: jax.Array
        error: jax.Array
        start: jax.Array
        products: jax.Array

    def unfinished(carry: Carry) -> jax.Array:
        # NaN compares as false: where J is not finite there is nothing to wait for.
        return carry.error > tolerance * carry.radius

    def proceed(carry: Carry) -> jax.Array:
        return jnp.any(unfinished(carry)) & (carry.products + steps <= max_products)

    def body(carry: Carry) -> Carry:
        space = _arnoldi(product, carry.start, steps)
        values, residuals, conditions, restart = _ritz(space)
        error = residuals[:, 0] * conditions[:, 0]
        # Of several looks at the same operator that with the smallest error counts.
        better = ~(error >= carry.error)
        return Carry(
            radius=jnp.where(better, jnp.abs(values[:, 0]), carry.radius),
            error=jnp.where(better, error, carry.error),
            start=restart,
            products=carry.products + steps,
        )

    zeros = tree.zeros_per_sample(start)
    first = Carry(zeros, zeros + jnp.inf, start, zeros.sum().astype(jnp.int32))
    end = lax.while_loop(proceed, body, first)
    converged = end.error <= tolerance * end.radius
    if batched:
        return SpectralRadius(end.radius, end.error, converged, end.products)
    return SpectralRadius(end.radius[0], end.error[0], converged[0], end.products)


def spectrum(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    *,
    steps: int = 64,
    batched: bool = True,
) -> Spectrum:
    """Ritz values of `J = ∂f/∂z` of each sample: its outermost eigenvalues, for pictures.

    One run of Arnoldi's process. Arguments, returns and errors as `spectral_radius`.
    """
    checks.check_positive_integer("steps", steps)
    product, start, steps = _krylov(f, params, z, x, key, steps, batched)
    values, errors, *_ = _ritz(_arnoldi(product, start, steps))
    return Spectrum(values, errors) if batched else Spectrum(values[0], errors[0])


def _krylov(
    f: Cell, params: PyTree, z: PyTree, x: PyTree, key: jax.Array, steps: int, batched: bool
) -> tuple[Product, jax.Array, int]:
    """The product with J on packed states `[B, D]`, a random start, and at most D steps."""
    params, x = lax.stop_gradient((params, x))
    g, point = point_of(f, params, z, x, batched)
    _, pushforward = jax.linearize(g, point)
    like = tree.pack(point)
    if jnp.iscomplexobj(like):
        raise TypeError("spectra of complex states are not supported: z has complex leaves")
    start = tree.vary_over(jax.random.normal(key, like.shape, like.dtype), tree.varying_axes(like))
    return packed(pushforward, point), start, min(steps, tree.unknowns(like))


class _Space(NamedTuple):
    basis: jax.Array  # [B, steps + 1, D], orthonormal; zero where the space was exhausted
    hessenberg: jax.Array  # [B, steps + 1, steps]
    used: jax.Array  # int32 [B], columns that are there


def _arnoldi(product: Product, start: jax.Array, steps: int) -> _Space:
    """An orthonormal basis V of `{v, J v, J² v, ...}` with `J V_m = V_{m+1} H`."""
    size = tree.norm(start)
    basis = columns.empty(start, steps + 1)
    basis = columns.store(basis, start / tree.over_samples(size, start), 0)
    zeros = 0 * size
    hessenberg = zeros[:, None, None] + jnp.zeros((steps + 1, steps), size.dtype)
    first = _Space(basis, hessenberg, zeros.astype(jnp.int32))

    def body(k: jax.Array, space: _Space) -> _Space:
        active = space.used == k
        w = product(columns.read(space.basis, k))
        h, new, length = columns.orthogonalize(space.basis, w)
        h = lax.dynamic_update_index_in_dim(h, length, k + 1, 1)
        h = jnp.where(active[:, None], h, 0)
        return _Space(
            basis=columns.store(space.basis, tree.where(active, new, 0 * new), k + 1),
            hessenberg=lax.dynamic_update_index_in_dim(space.hessenberg, h, k, 2),
            used=space.used + (active & (length > 0)).astype(jnp.int32),
        )

    return lax.fori_loop(0, steps, body, first)


def _ritz(space: _Space) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Ritz values, largest first, residuals, condition numbers, and a vector to start again from.

    Shapes `[B, steps]`, three times, and `[B, D]`.
    """
    steps = space.hessenberg.shape[2]
    square = space.hessenberg[:, :steps]
    finite = jnp.isfinite(square).all((1, 2))
    square = jnp.where(finite[:, None, None], square, 0)
    values, left, right = lax.linalg.eig(square)
    order = jnp.argsort(-jnp.abs(values), axis=1)
    values = jnp.take_along_axis(values, order, 1)
    left, right = (jnp.take_along_axis(v, order[:, None], 2) for v in (left, right))
    below = space.hessenberg[:, steps, steps - 1]
    residuals = below[:, None] * jnp.abs(right[:, steps - 1])
    residuals += jnp.finfo(below.dtype).eps * jnp.abs(values)
    conditions = 1 / jnp.abs((left.conj() * right).sum(1))

    wanted = (jnp.arange(steps) < max(2, steps // 4)).astype(square.dtype)
    restart = columns.combine((right.real * wanted).sum(2), space.basis[:, :steps])
    restart = tree.where(tree.norm(restart) > 0, restart, space.basis[:, 0])

    # Where the space was exhausted, zeros were added to fill the matrix.
    there = finite[:, None] & (jnp.arange(steps, dtype=jnp.int32) <= space.used[:, None])
    values = jnp.where(there, values, jnp.nan)
    return values, jnp.where(there, residuals, jnp.nan), conditions, restart
