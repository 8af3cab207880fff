"""LSMR for systems that are singular or badly conditioned, each sample by itself.

Source: Fong and Saunders, "LSMR: an iterative algorithm for sparse least-squares problems", 2011.
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
)


@checks.register_options
@dataclasses.dataclass(frozen=True)
class LSMR(Restarted):
    """LSMR: the shortest u with the smallest `‖(I - A) u - y‖² + damping² ‖u‖²`.

    Each iteration costs two products, one with A and one with its transpose, which JAX derives.
    Take this method where I - A is singular and y lies in the range of I - A. That is so for a loss
    that does not depend on the gauge of z* (the phase of an eigenvector, the rotation of orbitals).
    LSMR also serves where the eigenvalues of I - A surround zero and GMRES stagnates.

    Where the system has no solution, the least-squares solution is returned with its true residual,
    and its status is not `CONVERGED`. For an equation with a conserved quantity this solution gives
    a wrong gradient; `GroupInverse` gives the right one.

    Memory: 6 states in float32 or wider.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products, with A or its transpose, at least 4.
        preconditioner: `M(z, v)`, as for `GMRES`, on the right. What is shortest then is `M⁻¹ u`.
        damping: weight of the length of u, in units of I - A. With one above 0 the residual does
            not vanish, and the status is `CONVERGED` only if it is below `tol` all the same.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example: every vector of length 1 solves `z = z / ‖z‖`, and the loss does not tell them apart.

        def cell(angle, z, x):
            c, s = jnp.cos(angle), jnp.sin(angle)
            z = z / jnp.linalg.norm(z, axis=1, keepdims=True)
            return z * jnp.sqrt(c**2 + s**2)

        def loss(angle):
            z = deq_fixed_point(cell, angle, None, jnp.ones((1, 2)), gradient=Implicit(LSMR()))
            return (z**2).sum()
    """

    tol: Real = 1e-4
    max_iter: int = 100
    preconditioner: Preconditioner | None = None
    damping: Real = 0.0

    least_products: ClassVar[int] = 4

    def __post_init__(self) -> None:
        self.check()
        checks.check_number(self, "damping", at_least=0.0)

    def cycle(
        self,
        product: Product,
        r: jax.Array,
        target: jax.Array,
        budget: Any = None,
        any_of: AnyOf = jnp.any,
        precondition: Product | None = None,
    ) -> Cycle:
        """Iterations until the residual meets the target or is as small as it can be."""
        budget = self.max_iter if budget is None else budget
        product = preconditioned(product, precondition)
        damping = checks.in_dtype(self.damping, target.dtype)
        cycle = least_squares(product, r, target, budget, any_of, damping)
        return cycle._replace(correction=corrected(precondition, cycle.correction))


def least_squares(
    product: Product, r: jax.Array, target: jax.Array, budget: Any, any_of: AnyOf, damping: Any
) -> Cycle:
    """The cycle of LSMR; arguments as for `LinearMethod.cycle`.

    Args:
        product: `v -> A v`; transposed by JAX.
        r: right-hand side.
        target: bound on `‖r - (I - A) c‖`.
        budget: most products.
        any_of: see there.
        damping: a number or `[B]`.
    """
    transpose = jax.linear_transpose(product, r)

    def forward(v: jax.Array) -> jax.Array:
        return v - product(v)

    def backward(u: jax.Array) -> jax.Array:
        # The adjoint in the inner product Re⟨a, b⟩.
        return u - jnp.conj(transpose(jnp.conj(u))[0])

    zeros = tree.zeros_per_sample(r)
    eps = jnp.finfo(zeros.dtype).eps
    damping = zeros + damping
    beta = tree.norm(r)
    u = _unit(r, beta)
    v = backward(u)
    alpha = tree.norm(v)
    v = _unit(v, alpha)
    state = _Bidiagonal(
        active=(beta > target) & (alpha > 0),
        stuck=(beta > target) & (alpha == 0),
        x=0 * r,
        u=u,
        v=v,
        h=v,
        h_bar=0 * v,
        alpha=alpha,
        zeta_bar=alpha * beta,
        alpha_bar=alpha,
        rho=zeros + 1,
        rho_bar=zeros + 1,
        c_bar=zeros + 1,
        s_bar=zeros,
        zeta=zeros,
        residual=beta,
        square=alpha**2,
        tail=_Residual(beta, zeros, zeros + 1, zeros, zeros, zeros),
    )
    first = _Carry(zeros.sum().astype(jnp.int32) + 1, (beta > target).astype(jnp.int32), state)

    def proceed(carry: _Carry) -> jax.Array:
        return any_of(carry.state.active) & (carry.products + 2 <= budget)

    def body(carry: _Carry) -> _Carry:
        old = carry.state
        # Golub and Kahan: β u_{k+1} = (I - A) v - α u,  α v_{k+1} = (I - A)ᵀ u_{k+1} - β v.
        u = forward(old.v) - tree.scale(old.alpha, old.u)
        beta = tree.norm(u)
        u = _unit(u, beta)
        v = backward(u) - tree.scale(beta, old.v)
        alpha = tree.norm(v)
        v = _unit(v, alpha)
        # The rotation for the damping, and those that make both triangular factors.
        c_hat, s_hat, alpha_hat = _rotation(old.alpha_bar, damping)
        c, s, rho = _rotation(alpha_hat, beta)
        theta = s * alpha
        theta_bar = old.s_bar * rho
        c_bar, s_bar, rho_bar = _rotation(old.c_bar * rho, theta)
        zeta, zeta_bar = c_bar * old.zeta_bar, -s_bar * old.zeta_bar
        # x moves along h̄.
        h_bar = old.h - tree.scale(_divide(theta_bar * rho, old.rho * old.rho_bar), old.h_bar)
        rotations = c_hat, s_hat, c, s
        tail, residual = _residual(old.tail, rotations, theta_bar, rho_bar, old.zeta, zeta)
        square = old.square + beta**2 + alpha**2
        met = residual <= target
        # ‖(I - A)ᵀ r‖ = |ζ̄| is zero to rounding: no smaller residual exists.
        least = jnp.abs(zeta_bar) <= 10 * eps * jnp.sqrt(square) * residual
        new = _Bidiagonal(
            active=~met & ~least,
            stuck=~met & least,
            x=old.x + tree.scale(_divide(zeta, rho * rho_bar), h_bar),
            u=u,
            v=v,
            h=v - tree.scale(_divide(theta, rho), old.h),
            h_bar=h_bar,
            alpha=alpha,
            zeta_bar=zeta_bar,
            alpha_bar=c * alpha,
            rho=rho,
            rho_bar=rho_bar,
            c_bar=c_bar,
            s_bar=s_bar,
            zeta=zeta,
            residual=residual,
            square=square,
            tail=tail,
        )
        taken = old.active & jnp.isfinite(residual) & jnp.isfinite(alpha)
        state = tree.where(taken, new, old)
        used = carry.used + 2 * old.active.astype(jnp.int32)
        return _Carry(carry.products + 2, used, state._replace(active=taken & state.active))

    end = lax.while_loop(proceed, body, first)
    state = end.state
    return Cycle(state.x, end.products, end.used, state.residual, state.stuck)


class _Carry(NamedTuple):
    products: jax.Array  # int32 []
    used: jax.Array  # int32 [B]
    state: "_Bidiagonal"


class _Residual(NamedTuple):
    """What the estimate of the residual norm remembers, `[B]` each; section 2.8 of the paper."""

    beta_dd: jax.Array
    beta_d: jax.Array
    rho_d: jax.Array
    tau_tilde: jax.Array
    theta_tilde: jax.Array
    d: jax.Array


class _Bidiagonal(NamedTuple):
    active: jax.Array  # bool [B]
    stuck: jax.Array  # bool [B], the residual is as small as it can be
    x: jax.Array  # [B, D]
    u: jax.Array
    v: jax.Array
    h: jax.Array
    h_bar: jax.Array
    alpha: jax.Array  # [B]
    zeta_bar: jax.Array
    alpha_bar: jax.Array
    rho: jax.Array
    rho_bar: jax.Array
    c_bar: jax.Array
    s_bar: jax.Array
    zeta: jax.Array
    residual: jax.Array
    square: jax.Array  # Frobenius norm of the bidiagonal matrix, squared
    tail: _Residual


def _residual(
    tail: _Residual, rotations: Any, theta_bar: Any, rho_bar: Any, zeta_before: Any, zeta: Any
) -> tuple[_Residual, jax.Array]:
    """The norm of the residual, damping included, from the rotations of one iteration."""
    c_hat, s_hat, c, s = rotations
    beta_acute, beta_check = c_hat * tail.beta_dd, -s_hat * tail.beta_dd
    beta_hat, beta_dd = c * beta_acute, -s * beta_acute
    c_tilde, s_tilde, rho_tilde = _rotation(tail.rho_d, theta_bar)
    theta_tilde, rho_d = s_tilde * rho_bar, c_tilde * rho_bar
    beta_d = -s_tilde * tail.beta_d + c_tilde * beta_hat
    tau_tilde = _divide(zeta_before - tail.theta_tilde * tail.tau_tilde, rho_tilde)
    tau = _divide(zeta - theta_tilde * tau_tilde, rho_d)
    d = tail.d + beta_check**2
    residual = jnp.sqrt(d + (beta_d - tau) ** 2 + beta_dd**2)
    return _Residual(beta_dd, beta_d, rho_d, tau_tilde, theta_tilde, d), residual


def _rotation(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """c, s and ρ with `c a + s b = ρ` and `c b - s a = 0`."""
    rho = jnp.sqrt(a**2 + b**2)
    safe = jnp.where(rho > 0, rho, 1)
    return jnp.where(rho > 0, a / safe, 1), b / safe, rho


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.where(b != 0, a / jnp.where(b != 0, b, 1), 0)


def _unit(v: jax.Array, length: jax.Array) -> jax.Array:
    return tree.scale(_divide(jnp.ones_like(length), length), v)
