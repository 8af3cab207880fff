"""Restarted GMRES, each sample with a Krylov space of its own.

Sources: Saad and Schultz, "GMRES: a generalized minimal residual algorithm", 1986; Ayachour, "A
fast implementation for GMRES method", 2003, for the residual norm without Givens rotations.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import solve_triangular

from deq_jax import checks, columns, tree
from deq_jax.checks import Real
from deq_jax.linear.krylov import (
    AnyOf,
    Cycle,
    Preconditioner,
    Product,
    Restarted,
    corrected,
    preconditioned,
)


@checks.register_options
@dataclasses.dataclass(frozen=True)
class GMRES(Restarted):
    """Restarted GMRES: the smallest residual over a Krylov space, for `(I - A) u = y`.

    Arnoldi's process with classical Gram-Schmidt done twice builds an orthonormal basis V of
    {r, A r, A² r, ...} with `(I - A) V_k = V_{k+1} H_k`, and u is moved by

        V_k argmin_c ‖β e₁ - H_k c‖,     β = ‖r‖.

    The residual norm at every product comes from the vector w with `wᵀ H_k = 0`, as `β / ‖w‖`. One
    product an iteration and one after each cycle, which measures the true residual. Never
    diverges; may stagnate if `restart` is small.

    A preconditioner M stands on the right, `(I - A) M w = y` with `u = M w`, so that the residual
    that is made small is the true one.

    Memory: `restart + 1` states in float32 or wider.

    Attributes:
        restart: dimension of the Krylov space at which a cycle ends. No space has more dimensions
            than a sample has unknowns.
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products, at least 2.
        preconditioner: `M(z, v)`, linear in v, an approximation of `(I - J)⁻¹ v` with J = ∂f/∂z at
            z; for the adjoint system JAX transposes it. Arrays that it closes over may be traced.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    restart: int = 20
    tol: Real = 1e-4
    max_iter: int = 100
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        checks.check_count(self, "restart")
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
        """One Krylov space of at most `restart` dimensions."""
        budget = self.max_iter if budget is None else budget
        product = preconditioned(product, precondition)
        steps = max(1, min(self.restart, self.max_iter, tree.unknowns(r)))
        size = tree.norm(r)
        zeros = 0 * size
        safe_size = jnp.where(size > 0, size, 1)
        basis = columns.empty(r, steps + 1)
        basis = columns.store(basis, r / tree.over_samples(safe_size, r).astype(r.dtype), 0)
        # A column not used is a unit vector in a row of its own, and gets the coefficient 0.
        unused = jnp.eye(steps + 1, steps, k=-1, dtype=size.dtype)
        first = _Arnoldi(
            step=zeros.sum().astype(jnp.int32),
            active=size > target,
            basis=basis,
            hessenberg=zeros[:, None, None] + unused[None],
            null=zeros[:, None] + jnp.zeros((1, steps + 1), size.dtype).at[0, 0].set(1),
            used=zeros.astype(jnp.int32),
        )

        def proceed(carry: _Arnoldi) -> jax.Array:
            return any_of(carry.active) & (carry.step < steps) & (carry.step < budget)

        def body(carry: _Arnoldi) -> _Arnoldi:
            k, active = carry.step, carry.active
            v = columns.read(carry.basis, k)
            # Arnoldi: (I - A) v = Σ h_i v_i + below · new.
            h, new, below = columns.orthogonalize(carry.basis, v - product(v))
            # Where nothing is new the space is invariant and holds the solution.
            broken = below == 0
            new = tree.where(active, new, 0 * new)
            # The entry of the null vector that keeps null · H = 0; β / ‖null‖ is the residual.
            null = -(h * carry.null).sum(1) / jnp.where(broken, 1, below)
            null = lax.dynamic_update_index_in_dim(carry.null, null, k + 1, 1)
            h = lax.dynamic_update_index_in_dim(h, below, k + 1, 1)
            hessenberg = lax.dynamic_update_index_in_dim(carry.hessenberg, h, k, 2)
            reached = broken | (size <= target * jnp.sqrt((null**2).sum(1)))
            return _Arnoldi(
                step=k + 1,
                active=active & ~reached,
                basis=columns.store(carry.basis, new, k + 1),
                hessenberg=tree.where(active, hessenberg, carry.hessenberg),
                null=tree.where(active, null, carry.null),
                used=carry.used + active.astype(jnp.int32),
            )

        end = lax.while_loop(proceed, body, first)
        # c = argmin ‖β e₁ - H c‖ by H = Q R.
        q, upper = jnp.linalg.qr(end.hessenberg)
        rhs = size[:, None] * q[:, 0, :]
        coefficients = solve_triangular(upper, rhs[..., None])[..., 0]
        coefficients = jnp.where(jnp.isfinite(coefficients).all(1)[:, None], coefficients, 0)
        correction = columns.combine(coefficients, end.basis[:, :steps])
        # ‖β e₁ - H c‖, which the null vector does not know where the space is invariant.
        left = -jnp.einsum("bij,bj->bi", end.hessenberg, coefficients, precision="highest")
        residual = jnp.sqrt((left.at[:, 0].add(size) ** 2).sum(1))
        return Cycle(corrected(precondition, correction), end.step, end.used, residual)


class _Arnoldi(NamedTuple):
    step: jax.Array  # int32 []
    active: jax.Array  # bool [B]
    basis: jax.Array  # [B, restart + 1, D]
    hessenberg: jax.Array  # [B, restart + 1, restart]
    null: jax.Array  # [B, restart + 1], the vector with null · hessenberg = 0
    used: jax.Array  # int32 [B]
