"""The size of the cell's Jacobian `J = ∂f/∂z`: its Frobenius norm as a regulariser.

A sample's solver converges fast where J is small, and training makes J grow. A penalty on its
Frobenius norm keeps equilibria cheap to find, at a cost in accuracy that is small or none.

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
from deq_jax.closure import Held, add_batch_axis, call_checked, drop_batch_axis, initial_state

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

    if samples == 1:
        total = estimate(key)
    else:
        total = lax.map(estimate, jax.random.split(key, samples)).mean(0)
    return total if batched else total[0]


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
    leaves, structure = jax.tree.flatten(like)

    def signs(key: jax.Array, leaf: jax.Array) -> jax.Array:
        if not jnp.iscomplexobj(leaf):
            return jax.random.rademacher(key, leaf.shape, leaf.dtype)
        dtype = jnp.finfo(leaf.dtype).dtype
        parts = jax.random.rademacher(key, (2, *leaf.shape), dtype)
        return lax.complex(parts[0], parts[1])

    keys = jax.random.split(key, len(leaves))
    drawn = [signs(key, leaf) for key, leaf in zip(keys, leaves, strict=True)]
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
