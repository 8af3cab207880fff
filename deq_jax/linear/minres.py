"""The minimum residual method for symmetric systems, each sample by itself.

Source: Paige and Saunders, "Solution of sparse indefinite systems of linear equations", 1975.
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
class MINRES(Restarted):
    """MINRES for `(I - A) u = y` with `I - A` symmetric, definite or not.

    The smallest residual over {r, (I - A) r, (I - A)² r, ...}, as GMRES finds it, by Lanczos's
    process: short recurrences, so that neither memory nor work grows with the iterations. One
    product an iteration, and one at the end that measures the true residual. Where I - A is
    singular and the system has no solution, it stops near the smallest residual, which is above
    `tol`; `LSMR` finds the shortest u with this residual.

    Symmetry is not tested: for another system the residual that is reported is still the true
    one, and usually misses `tol`.

    Memory: 7 states in float32 or wider, 8 with a preconditioner.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products, at least 2.
        preconditioner: `M(z, v)`, as for `GMRES`, but symmetric and positive definite. What is
            smallest then is the residual in the norm of M.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example: I - J is symmetric and has eigenvalues of both signs.

        def cell(weights, z, x):
            return z @ (weights + weights.T) + x

        weights = jax.random.normal(jax.random.key(0), (8, 8))
        z = deq_fixed_point(
            cell, weights, jnp.ones((4, 8)), solver=NewtonKrylov(MINRES()),
            gradient=Implicit(MINRES()),
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
        """Iterations until the recurred residual meets the target or the space is invariant."""
        budget = self.max_iter if budget is None else budget
        apply = (lambda v: v) if precondition is None else precondition
        z = apply(r)
        zeros = tree.zeros_per_sample(r)
        beta = jnp.sqrt(jnp.maximum(tree.dot(r, z), 0))
        start = tree.norm(r)
        eps = jnp.finfo(beta.dtype).eps
        first = _Lanczos(
            products=zeros.sum().astype(jnp.int32),
            active=(start > target) & (beta > 0),
            stuck=start < 0,
            u=0 * r,
            residual=r,
            before=0 * r,
            new=r,
            new_z=z,
            w_before=0 * r,
            w=0 * r,
            beta=beta,
            phi=beta,
            delta=zeros,
            epsilon=zeros,
            cosine=zeros - 1,
            sine=zeros,
            size=zeros,
            used=zeros.astype(jnp.int32),
        )

        def proceed(carry: _Lanczos) -> jax.Array:
            return any_of(carry.active) & (carry.products < budget)

        def body(carry: _Lanczos) -> _Lanczos:
            beta = jnp.where(carry.beta > 0, carry.beta, 1)
            # Lanczos: (I - A) v_k = β_k v_{k-1} + α v_k + β_{k+1} v_{k+1}.
            v = tree.scale(1 / beta, carry.new_z)
            y = v - product(v) - tree.scale(beta, carry.before)
            q = tree.scale(1 / beta, carry.new)
            alpha = tree.dot(v, y)
            y = y - tree.scale(alpha, q)
            z = apply(y)
            square = tree.dot(y, z)
            next_beta = jnp.sqrt(jnp.maximum(square, 0))
            # The rotation before, then the one that clears β_{k+1} below the diagonal.
            delta = carry.cosine * carry.delta + carry.sine * alpha
            gamma_bar = carry.sine * carry.delta - carry.cosine * alpha
            gamma = jnp.sqrt(gamma_bar**2 + next_beta**2)
            row = jnp.abs(alpha) + jnp.where(carry.products > 0, beta, 0) + next_beta
            size = jnp.maximum(carry.size, row)
            cosine, sound = ratio(gamma_bar, gamma, size)
            sine, _ = ratio(next_beta, gamma, size)
            # ‖(I - A) r‖ / ‖r‖ of the last residual is so small that to lower r would take a u that
            # has grown by 1 / √eps: I - A is singular, and u the least-squares solution.
            next_delta = -carry.cosine * next_beta
            left = tree.norm(carry.residual) / jnp.where(start > 0, start, 1)
            least = jnp.sqrt(gamma_bar**2 + next_delta**2) <= jnp.sqrt(eps) * size * left
            # The step along w = (v - ε w_{k-2} - δ w_{k-1}) / γ.
            w = v - tree.scale(carry.epsilon, carry.w_before) - tree.scale(delta, carry.w)
            w = tree.scale(jnp.where(sound, 1 / jnp.where(sound, gamma, 1), 0), w)
            phi = sine * carry.phi
            inverse = jnp.where(next_beta > 0, 1 / jnp.where(next_beta > 0, next_beta, 1), 0)
            residual = tree.scale(sine**2, carry.residual)
            residual = residual - tree.scale(phi * cosine * inverse, y)
            norm = tree.norm(residual)
            taken = carry.active & sound & ~least & jnp.isfinite(norm) & jnp.isfinite(next_beta)
            stuck = jnp.where(carry.active, least, carry.stuck)
            more = (norm > target) & (next_beta > eps * size) & (square > 0)
            return _Lanczos(
                products=carry.products + 1,
                active=taken & more,
                stuck=stuck,
                u=tree.where(taken, carry.u + tree.scale(cosine * carry.phi, w), carry.u),
                residual=tree.where(taken, residual, carry.residual),
                before=tree.where(taken, q, carry.before),
                new=tree.where(taken, y, carry.new),
                new_z=tree.where(taken, z, carry.new_z),
                w_before=tree.where(taken, carry.w, carry.w_before),
                w=tree.where(taken, w, carry.w),
                beta=jnp.where(taken, next_beta, carry.beta),
                phi=jnp.where(taken, phi, carry.phi),
                delta=jnp.where(taken, next_delta, carry.delta),
                epsilon=jnp.where(taken, carry.sine * next_beta, carry.epsilon),
                cosine=jnp.where(taken, cosine, carry.cosine),
                sine=jnp.where(taken, sine, carry.sine),
                size=jnp.where(taken, size, carry.size),
                used=carry.used + carry.active.astype(jnp.int32),
            )

        end = lax.while_loop(proceed, body, first)
        return Cycle(end.u, end.products, end.used, tree.norm(end.residual), end.stuck)


class _Lanczos(NamedTuple):
    products: jax.Array  # int32 []
    active: jax.Array  # bool [B]
    stuck: jax.Array  # bool [B]
    u: jax.Array  # [B, D]
    residual: jax.Array
    before: jax.Array  # v_{k-1}, in the space of residuals
    new: jax.Array  # β_k v_k there
    new_z: jax.Array  # and preconditioned
    w_before: jax.Array
    w: jax.Array
    beta: jax.Array  # [B]
    phi: jax.Array
    delta: jax.Array
    epsilon: jax.Array
    cosine: jax.Array
    sine: jax.Array
    size: jax.Array  # the largest entry of the tridiagonal matrix so far, about ‖I - A‖
    used: jax.Array  # int32 [B]
