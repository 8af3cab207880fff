"""Stabilised biconjugate gradients, each sample by itself.

Source: van der Vorst, "Bi-CGSTAB: a fast and smoothly converging variant of Bi-CG", 1992.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.linear.krylov import (
    AnyOf,
    Cycle,
    Preconditioner,
    Product,
    Restarted,
    corrected,
    preconditioned,
    ratio,
)


@checks.register_options
@dataclasses.dataclass(frozen=True)
class BiCGStab(Restarted):
    """Stabilised biconjugate gradients for `(I - A) u = y`.

    Two products an iteration, and one at the end that measures the true residual. Short
    recurrences: the memory does not grow with the iterations, but the residual may jump, and where
    a denominator vanishes the method starts over from the true residual.

    Memory: 6 states in float32 or wider.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products, at least 3.
        preconditioner: `M(z, v)`, as for `GMRES`, on the right too.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    tol: Real = 1e-4
    max_iter: int = 100
    preconditioner: Preconditioner | None = None

    least_products: ClassVar[int] = 3

    def __post_init__(self) -> None:
        self.check()

    def cycle(
        self,
        product: Product,
        r: jax.Array,
        target: jax.Array,
        budget: Any = None,
        any_of: AnyOf = jnp.any,
        precondition: Product | None = None,
    ) -> Cycle:
        """Iterations until the recurred residual meets the target or a recurrence breaks down."""
        budget = self.max_iter if budget is None else budget
        product = preconditioned(product, precondition)
        shadow = r
        square = tree.dot(r, r)
        zeros = 0 * square
        first = _Recurrence(
            products=zeros.sum().astype(jnp.int32),
            active=jnp.sqrt(square) > target,
            u=0 * r,
            r=r,
            p=r,
            rho=square,
            used=zeros.astype(jnp.int32),
        )

        def proceed(carry: _Recurrence) -> jax.Array:
            return any_of(carry.active) & (carry.products + 2 <= budget)

        def body(carry: _Recurrence) -> _Recurrence:
            # Along p to s = r - α (I - A) p, orthogonal to the shadow residual.
            v = carry.p - product(carry.p)
            alpha, sound = ratio(carry.rho, tree.dot(shadow, v), tree.norm(shadow) * tree.norm(v))
            s = carry.r - tree.scale(alpha, v)
            # Along s to the smallest residual r = s - ω (I - A) s.
            t = s - product(s)
            omega, _ = ratio(tree.dot(t, s), tree.dot(t, t), 0)
            u = carry.u + tree.scale(alpha, carry.p) + tree.scale(omega, s)
            r = s - tree.scale(omega, t)
            # The next direction p = r + β (p - ω v).
            rho = tree.dot(shadow, r)
            growth, usable = ratio(rho * alpha, carry.rho * omega, 0)
            p = r + tree.scale(growth, carry.p - tree.scale(omega, v))
            size = tree.norm(r)
            taken = carry.active & sound & jnp.isfinite(size)
            usable &= jnp.abs(rho) > jnp.finfo(rho.dtype).eps * tree.norm(shadow) * size
            return _Recurrence(
                products=carry.products + 2,
                active=taken & usable & (size > target),
                u=tree.where(taken, u, carry.u),
                r=tree.where(taken, r, carry.r),
                p=tree.where(taken, p, carry.p),
                rho=jnp.where(taken, rho, carry.rho),
                used=carry.used + 2 * carry.active.astype(jnp.int32),
            )

        end = lax.while_loop(proceed, body, first)
        u = corrected(precondition, end.u)
        return Cycle(u, end.products, end.used, tree.norm(end.r))


class _Recurrence(NamedTuple):
    products: jax.Array  # int32 []
    active: jax.Array  # bool [B]
    u: jax.Array  # [B, D]
    r: jax.Array
    p: jax.Array
    rho: jax.Array  # [B]
    used: jax.Array  # int32 [B]
