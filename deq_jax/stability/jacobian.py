"""The size of the cell's Jacobian `J = ∂f/∂z`: norms of it as regularisers.

A sample's solver converges fast where J is small, and training makes J grow. A penalty on its
Frobenius norm keeps equilibria cheap to find, at a cost in accuracy that is small or none. The
spectral norm, the trace and the denoising energy are other measures of the same thing.

Source: Bai, Koltun and Kolter, "Stabilizing equilibrium models by Jacobian regularization", 2021,
arXiv 2106.14342.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.closure import (
    Closure,
    Held,
    add_batch_axis,
    call_checked,
    drop_batch_axis,
    initial_state,
)
from deq_jax.passes import LoopBody

PyTree = Any
Cell = Callable[[PyTree, PyTree, PyTree], PyTree]


def jacobian_frobenius(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    samples: int = 1,
    *,
    batched: bool = True,
) -> jax.Array:
    """An unbiased estimate of `‖J‖²`, the squared Frobenius norm of `J = ∂f/∂z` of each sample.

    Hutchinson's estimate: `‖J‖² = E ‖vᵀ J‖²` over random signs v, whose variance is smaller than
    that of the normal v of the paper (for one random v it is of the order of
    `‖J Jᵀ‖²`, without the diagonal). A transposed product for each v.

    z is taken as a constant. Gradients reach params and x through the second derivatives of f at
    this z, not through z's own dependence on them, which would be another backward solve.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        z: where J is taken, usually the solution; leaves `[B, ...]`.
        x: as for `deq_fixed_point`.
        key: random key.
        samples: number of v. Their products are computed one after another.
        batched: as for `deq_fixed_point`. Where f mixes samples, a sample's result is that of the
            columns of the whole Jacobian that belong to it.

    Returns:
        `[B]` in float32 or wider; a scalar with `batched=False`. Divide by the number of entries of
        a sample's state, as the paper does, to compare states of different size.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; `samples` is not a positive integer.
    """
    checks.check_positive_integer("samples", samples)
    g, start = point_of(f, params, z, x, batched)
    _, pullback = jax.vjp(g, start)

    def estimate(key: jax.Array) -> jax.Array:
        (product,) = pullback(random_signs(key, start))
        return tree.dot(product, product)

    total = _mean_over(estimate, key, samples)
    return total if batched else total[0]


def jacobian_spectral_norm(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    iterations: int = 10,
    *,
    batched: bool = True,
) -> jax.Array:
    """The spectral norm `‖J‖₂ = max ‖J v‖ / ‖v‖` of `J = ∂f/∂z` of each sample, from below.

    Power iteration on Jᵀ J, from a random v, for each sample:

        u <- J v / ‖J v‖,   v <- Jᵀ u / ‖Jᵀ u‖,     and in the end   ‖J‖₂ ≈ ‖Jᵀ u‖.

    Below 1, plain iteration contracts near z, whatever the eigenvectors of J are. A squared
    singular value that is a factor r smaller than the largest one fades as r to the power of
    2 `iterations`. The result is the norm in the direction u and so at most `‖J‖₂`.

    z, u and v are taken as constants. The gradient by params and x is that of `uᵀ J v`, which is
    the gradient of `‖J‖₂` where u and v have converged and the largest singular value is single.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        z: where J is taken, usually the solution; leaves `[B, ...]`.
        x: as for `deq_fixed_point`.
        key: random key, for the first v.
        iterations: products with Jᵀ J, at least 1; two products each.
        batched: as for `deq_fixed_point`. For f that treats samples independently; where f mixes
            them, use `batched=False`.

    Returns:
        `[B]` in float32 or wider; a scalar with `batched=False`.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; `iterations` is not a positive integer.

    Source: Miyato et al., "Spectral normalization for generative adversarial networks", 2018, for
    the gradient; the iteration is the usual one.
    """
    checks.check_positive_integer("iterations", iterations)
    constant, start = point_of(f, *lax.stop_gradient((params, z, x)), batched)
    _, pullback = jax.vjp(constant, start)

    def transposed(u: PyTree) -> PyTree:
        # The adjoint with respect to `tree.dot`, in which a complex state is a real vector.
        (product,) = pullback(jax.tree.map(jnp.conj, u))
        return jax.tree.map(jnp.conj, product)

    push = jax.linear_transpose(lambda u: pullback(u)[0], start)
    to_state = LoopBody(Closure.of(transposed, start))
    to_value = LoopBody(Closure.of(lambda v: push(v)[0], start))

    def unit(v: PyTree) -> PyTree:
        size = tree.safe_norm(v)
        return tree.scale(jnp.where(size > 0, 1 / jnp.where(size > 0, size, 1), 0), v)

    def body(_: Any, u: PyTree) -> PyTree:
        return unit(to_value(unit(to_state(u))))

    u = unit(to_value(unit(random_normal(key, start))))
    u = lax.stop_gradient(lax.fori_loop(0, iterations - 1, body, u))

    # ‖Jᵀ u‖ once more, by the function that has a gradient.
    g, start = point_of(f, params, z, x, batched)
    _, pullback = jax.vjp(g, start)
    (product,) = pullback(jax.tree.map(jnp.conj, u))
    square = tree.dot(product, product)
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return norm if batched else norm[0]


def jacobian_trace(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    samples: int = 1,
    *,
    batched: bool = True,
) -> jax.Array:
    """An unbiased estimate of `tr J`, the sum of the eigenvalues of `J = ∂f/∂z` of each sample.

    Hutchinson's estimate: `tr J = E vᵀ J v` over random signs v, by one transposed product for each
    v. Its variance is that of the part of J off its diagonal, `‖J + Jᵀ‖² / 2` without the diagonal,
    and does not vanish where the trace does.

    The trace says where the eigenvalues are on average. As a penalty it moves them to the left,
    away from 1, where I - J is singular, and it does not keep them small: bound it below, or take
    `jacobian_frobenius` for that. z is taken as a constant, as there.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        z: where J is taken, usually the solution; leaves `[B, ...]`.
        x: as for `deq_fixed_point`.
        key: random key.
        samples: number of v. Their products are computed one after another.
        batched: as for `deq_fixed_point`.

    Returns:
        `[B]` in float32 or wider; a scalar with `batched=False`. A complex state counts as a vector
        of its real and imaginary parts.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; `samples` is not a positive integer.

    Source: Hutchinson, "A stochastic estimator of the trace of the influence matrix for Laplacian
    smoothing splines", 1989.
    """
    checks.check_positive_integer("samples", samples)
    g, start = point_of(f, params, z, x, batched)
    _, pullback = jax.vjp(g, start)

    def estimate(key: jax.Array) -> jax.Array:
        v = random_signs(key, start)
        (product,) = pullback(jax.tree.map(jnp.conj, v))
        return tree.dot(jax.tree.map(jnp.conj, product), v)

    total = _mean_over(estimate, key, samples)
    return total if batched else total[0]


def denoising_energy(
    f: Cell,
    params: PyTree,
    z: PyTree,
    x: PyTree,
    key: jax.Array,
    scale: float = 0.1,
    samples: int = 1,
    *,
    batched: bool = True,
) -> jax.Array:
    """How far f is from bringing a disturbed equilibrium back in one step, for each sample.

    The energy is

        E ‖f(params, z + σ ε, x) - z‖²     over normal ε, with σ = `scale`.

    At an equilibrium z and for small σ it is `σ² ‖J‖²` with the Frobenius norm of J = ∂f/∂z, up to
    terms in σ⁴. For a larger σ it also sees f at that distance from z, where J says nothing. It
    takes evaluations only, and its gradient only first derivatives of f: it is the cheapest penalty
    in this file. If z does not solve the equation, `‖f(z) - z‖²` is part of it.

    z is taken as a constant: the penalty draws f(z + σ ε) to z and not z to it.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        z: the solution; leaves `[B, ...]`.
        x: as for `deq_fixed_point`.
        key: random key.
        scale: σ > 0, in units of z.
        samples: number of ε. They are evaluated one after another.
        batched: as for `deq_fixed_point`.

    Returns:
        `[B]` in float32 or wider; a scalar with `batched=False`. Divide by the number of entries of
        a sample's state to compare states of different size.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; `samples` is not a positive integer, or
            `scale` not a positive number.

    Source: the denoising energy of Perschewski and Stober, 2025,
    doi 10.1016/j.procs.2025.07.136, without its division by the number of entries. The formula was
    derived from the idea and from its use in other libraries, not taken from the paper.
    """
    checks.check_positive_integer("samples", samples)
    if not isinstance(scale, jax.Array) and not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale!r}")
    g, start = point_of(f, params, z, x, batched)

    def estimate(key: jax.Array) -> jax.Array:
        noise = tree.scale(scale, random_normal(key, start))
        error = tree.subtract(g(tree.add(start, noise)), start)
        return tree.dot(error, error)

    total = _mean_over(estimate, key, samples)
    return total if batched else total[0]


def _mean_over(
    estimate: Callable[[jax.Array], jax.Array], key: jax.Array, samples: int
) -> jax.Array:
    """The mean of the estimates for `samples` keys, one after another."""
    if samples == 1:
        return estimate(key)
    return lax.map(estimate, jax.random.split(key, samples)).mean(0)


def point_of(
    f: Cell, params: PyTree, z: PyTree, x: PyTree, batched: bool
) -> tuple[Callable[[PyTree], PyTree], PyTree]:
    """`z -> f(params, z, x)`, which checks what f returns, and z as a constant with a batch."""
    z = lax.stop_gradient(initial_state(x, z, batched))
    axes = tree.varying_axes(Held((params, x)))
    if batched:
        return (lambda z: call_checked(f, params, z, x)), tree.vary_over(z, axes)
    start = tree.vary_over(add_batch_axis(z), axes)

    def single(z: PyTree) -> PyTree:
        return add_batch_axis(call_checked(f, params, drop_batch_axis(z), x))

    return single, start


def random_signs(key: jax.Array, like: PyTree) -> PyTree:
    """Independent entries 1 or -1 (real and imaginary parts each), shaped like `like`."""
    return _random(jax.random.rademacher, key, like)


def random_normal(key: jax.Array, like: PyTree) -> PyTree:
    """Independent entries N(0, 1) (real and imaginary parts each), shaped like `like`."""
    return _random(jax.random.normal, key, like)


def _random(draw: Callable[..., jax.Array], key: jax.Array, like: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(like)

    def of_leaf(key: jax.Array, leaf: jax.Array) -> jax.Array:
        if not jnp.iscomplexobj(leaf):
            return draw(key, leaf.shape, leaf.dtype)
        dtype = jnp.finfo(leaf.dtype).dtype
        parts = draw(key, (2, *leaf.shape), dtype)
        return lax.complex(parts[0], parts[1])

    keys = jax.random.split(key, len(leaves))
    drawn = [of_leaf(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
    return tree.vary_over(jax.tree.unflatten(structure, drawn), tree.varying_axes(like))


@dataclasses.dataclass(frozen=True)
class JacobianRegularization:
    """The term `weight · ‖J‖² / D` of a loss, on a schedule.

    In a step it is there with a probability, which saves its cost in the others, and its weight
    grows as training goes on:

        weight(step) = weight + increment · ⌊step / increment_every⌋     for step < stop, else 0.

    D is the number of entries of a sample's state; the mean over the batch is taken.

    Attributes:
        weight: weight at step 0.
        probability: that a step has the term.
        increment: added to the weight every `increment_every` steps.
        increment_every: None for never.
        stop: step from which on there is no such term; None for never.
        samples: products for each estimate.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it.

    Source: arXiv 2106.14342, whose settings for WikiText-103 are a weight of 1.9 or 2, probability
    0.35 or 0.4, and 0.1 more every 30,000 or 35,000 steps.
    """

    weight: float
    probability: float = 1.0
    increment: float = 0.0
    increment_every: int | None = None
    stop: int | None = None
    samples: int = 1

    def __post_init__(self) -> None:
        checks.check_number(self, "weight", at_least=0.0)
        checks.check_number(self, "probability", at_least=0.0, at_most=1.0)
        checks.check_number(self, "increment", at_least=0.0)
        for name in ("increment_every", "stop"):
            if getattr(self, name) is not None:
                checks.check_count(self, name)
        checks.check_count(self, "samples")
        if self.increment and self.increment_every is None:
            raise ValueError(
                f"{type(self).__name__}.increment={self.increment} needs increment_every"
            )

    def weight_at(self, step: jax.Array | int) -> jax.Array:
        """The weight in a step that has the term, float32."""
        step = jnp.asarray(step)
        weight = jnp.float32(self.weight)
        if self.increment_every is not None:
            count = (step // self.increment_every).astype(jnp.float32)
            weight = weight + jnp.float32(self.increment) * count
        return weight if self.stop is None else jnp.where(step < self.stop, weight, 0)

    def __call__(
        self,
        f: Cell,
        params: PyTree,
        z: PyTree,
        x: PyTree,
        *,
        key: jax.Array,
        step: jax.Array | int,
    ) -> jax.Array:
        """The term for a loss, a float32 scalar; 0, and not computed, in a step without it.

        Args:
            f: as for `jacobian_frobenius`.
            params: likewise.
            z: likewise; leaves `[B, ...]`.
            x: likewise.
            key: random key of this step; decides whether the term is there, too.
            step: number of the step, from 0.
        """
        choice, key = jax.random.split(key)
        weight = self.weight_at(step)
        entries = sum(leaf.size for leaf in jax.tree.leaves(z)) / len(jax.tree.leaves(z)[0])

        def term(_: None) -> jax.Array:
            size = jacobian_frobenius(f, params, z, x, key, self.samples)
            return weight * size.mean().astype(jnp.float32) / entries

        there = (jax.random.uniform(choice) < self.probability) & (weight > 0)
        return lax.cond(there, term, lambda _: 0 * weight, None)
