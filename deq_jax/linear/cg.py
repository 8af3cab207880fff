"""Conjugate gradients, each sample by itself.

Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.linear.krylov import AnyOf, Cycle, Preconditioner, Product, Restarted, ratio


@checks.register_options
@dataclasses.dataclass(frozen=True)
class CG(Restarted):
    """Conjugate gradients for `(I - A) u = y` with `I - A` symmetric and definite.

    I - J is symmetric where f descends an energy, `f(z) = z - s ∇E(z)`, and then definite at a
    minimum of E. One product an iteration, and one at the end that measures the true residual.

    Symmetry is not tested: for another system the residual that is reported is still the true
    one, and usually misses `tol`. `MINRES` serves symmetric systems that are not definite.

    Memory: 4 states in float32 or wider, 5 with a preconditioner.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products, at least 2.
        preconditioner: `M(z, v)`, as for `GMRES`, but symmetric and positive definite.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example: a hundred equations with the minimum of `Σ cosh(z) - x z` as their solution.

        def descent(step, z, x):
            return z - step * (jnp.sinh(z) - x)

        z = deq_fixed_point(
            descent, 0.3, jnp.linspace(-1.0, 1.0, 100)[:, None], gradient=Implicit(CG())
        )
    """

    tol: Real = 1e-4
    max_iter: int = 100
    preconditioner: Preconditioner | None = None

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
        """Iterations until the recurred residual meets the target or a curvature vanishes."""
        budget = self.max_iter if budget is None else budget
        apply = (lambda v: v) if precondition is None else precondition
        z = apply(r)
        zeros = tree.zeros_per_sample(r)
        first = _Recurrence(
            products=zeros.sum().astype(jnp.int32),
            active=tree.norm(r) > target,
            u=0 * r,
            r=r,
            p=z,
            rho=tree.dot(r, z),
            used=zeros.astype(jnp.int32),
        )

        def proceed(carry: _Recurrence) -> jax.Array:
            return any_of(carry.active) & (carry.products < budget)

        def body(carry: _Recurrence) -> _Recurrence:
            # Along p to the minimum, α = ⟨r, M r⟩ / ⟨p, (I - A) p⟩.
            v = carry.p - product(carry.p)
            alpha, sound = ratio(carry.rho, tree.dot(carry.p, v), tree.norm(carry.p) * tree.norm(v))
            u = carry.u + tree.scale(alpha, carry.p)
            r = carry.r - tree.scale(alpha, v)
            # The next direction p = M r + β p, conjugate to all before.
            z = apply(r)
            rho = tree.dot(r, z)
            beta, usable = ratio(rho, carry.rho, 0)
            p = z + tree.scale(beta, carry.p)
            size = tree.norm(r)
            taken = carry.active & sound & jnp.isfinite(size)
            return _Recurrence(
                products=carry.products + 1,
                active=taken & usable & (size > target),
                u=tree.where(taken, u, carry.u),
                r=tree.where(taken, r, carry.r),
                p=tree.where(taken, p, carry.p),
                rho=jnp.where(taken, rho, carry.rho),
                used=carry.used + carry.active.astype(jnp.int32),
            )

        end = lax.while_loop(proceed, body, first)
        return Cycle(end.u, end.products, end.used, tree.norm(end.r))


class _Recurrence(NamedTuple):
    products: jax.Array  # int32 []
    active: jax.Array  # bool [B]
    u: jax.Array  # [B, D]
    r: jax.Array
    p: jax.Array
    rho: jax.Array  # [B], ⟨r, M r⟩
    used: jax.Array  # int32 [B]
