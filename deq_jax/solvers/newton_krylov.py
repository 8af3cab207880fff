"""Newton's method with a Krylov inner solve and backtracking, each sample by itself.

Sources: Dembo, Eisenstat and Steihaug, "Inexact Newton methods", 1982; Eisenstat and Walker,
"Choosing the forcing terms in an inexact Newton method", 1996 (their choice 2).
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.linear.bicgstab import BiCGStab
from deq_jax.linear.gmres import GMRES
from deq_jax.linear.krylov import PreconditionerAt, packed

PyTree = Any

_DECREASE = 1e-4
"""Armijo's constant c: a step of length t is accepted below (1 - c t) times the old residual."""

_SHORTEST = 1 / 16
"""Where this fraction of Newton's step is still too long, the plain step is taken instead."""


class NewtonState(NamedTuple):
    """What is remembered between evaluations; vectors are packed, `[B, D]`, at least float32.

    Attributes:
        base: the point Newton's step starts from.
        residual: g = f(z) - z there.
        direction: Newton's step s.
        length: `[B]`, the fraction t of it that was tried; 0 for the plain step g.
        size: `[B]`, `‖f(z) - z‖` at the base; infinite before the first point.
        products: int32, Jacobian-vector products so far.
    """

    base: jax.Array
    residual: jax.Array
    direction: jax.Array
    length: jax.Array
    size: jax.Array
    products: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class NewtonKrylov:
    """Newton's method on `g(z) = f(z) - z = 0`, with products instead of a Jacobian.

        (I - J) s = g(z),   J = ∂f/∂z at z,     z <- z + t s

    f is linearised once at each evaluation (`jax.linearize`), which is the evaluation; the system
    is solved by `krylov` down to `η ‖g‖` with the forcing term

        η = min(forcing, 0.9 (‖g‖ / ‖g_before‖)²),

    not below what `tol` asks for. t starts at 1 and is halved while the residual does not decrease,
    at most four times, after which the plain step `z + g` is taken; a trial is an evaluation and
    counts as one. Converges superlinearly near a solution, also where
    the spectral radius of J exceeds 1. Meant for smooth f: where f has kinks (ReLU), its
    linearisation may mislead and samples may stall far from a solution that the other solvers find.

    Cost: `stats.evaluations` evaluations with their linearisation, and `stats.products` products.
    Memory: that of one linearisation of f, of `krylov`, and 3 states.

    Attributes:
        krylov: `GMRES(...)` (one cycle, at most `restart` products a step) or `BiCGStab(...)` (at
            most `max_iter` products a step); its `tol` is not used.
        forcing: largest η, in (0, 1).
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; it is named.
    """

    krylov: GMRES | BiCGStab = GMRES()  # noqa: RUF009  (frozen)
    forcing: Real = 0.1
    tol: Real = 1e-4
    max_iter: int = 20
    atol: Real = 0.0
    trace: bool = False

    linearizes: ClassVar[bool] = True

    @property
    def scale_free(self) -> bool:
        """Whether z may come scaled: not where a function of the user sees it."""
        given = self.krylov.preconditioner
        return given is None or isinstance(given, PreconditionerAt)

    def at(self, z: PyTree, transposed: bool) -> "NewtonKrylov":
        """The solver of a linear system with A = ∂f/∂z at `z` or its transpose."""
        return dataclasses.replace(self, krylov=self.krylov.at(z, transposed))

    def __post_init__(self) -> None:
        if not isinstance(self.krylov, GMRES | BiCGStab):
            raise TypeError(f"NewtonKrylov.krylov must be GMRES or BiCGStab, got {self.krylov!r}")
        checks.check_number(self, "forcing", above=0.0, at_most=0.999)
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree) -> NewtonState:
        """No base yet."""
        zeros = tree.zeros_per_sample(z)
        start = tree.pack(z)
        return NewtonState(
            base=start,
            residual=0 * start,
            direction=0 * start,
            length=zeros + 1,
            size=zeros + jnp.inf,
            products=zeros.sum().astype(jnp.int32),
        )

    def products(self, state: NewtonState) -> jax.Array:
        """Jacobian-vector products computed so far."""
        return state.products

    def step(
        self, z: PyTree, fz: PyTree, state: NewtonState, *, product: Any, active: jax.Array
    ) -> tuple[PyTree, NewtonState]:
        """Newton's step from `z`, or half of the last one, where that went too far."""
        point = tree.pack(z)
        g = tree.pack(fz) - point
        size = tree.norm(lax.stop_gradient(g))
        # Armijo's test of the step that led here; the plain step is taken whatever it does.
        acceptable = size <= (1 - _DECREASE * state.length) * state.size
        accepted = acceptable | (state.length == 0)

        # The forcing term η = min(forcing, 0.9 (‖g‖ / ‖g_before‖)²).
        most, tol = (checks.in_dtype(o, size.dtype) for o in (self.forcing, self.tol))
        shrunk = jnp.where(jnp.isfinite(state.size), size / jnp.where(size > 0, state.size, 1), 1)
        forcing = jnp.minimum(most, 0.9 * shrunk**2)
        # Half of the step that `tol` still asks for is enough; more would be solved in vain.
        needed = 0.5 * tol * tree.norm(lax.stop_gradient(tree.pack(fz)))
        needed = needed / jnp.where(size > 0, size, 1)
        accuracy = jnp.maximum(forcing, jnp.minimum(needed, most))
        # (I - J) s = g(z).
        rhs = tree.where(active & accepted, g, jnp.zeros_like(g))
        correction, products = self._correction(product, rhs, accuracy, z)
        # Where no correction was found (I - J may be singular) the plain step is taken.
        found = tree.norm(lax.stop_gradient(correction))
        sound = jnp.isfinite(found) & (found > 0)
        correction = tree.where(sound, correction, g)

        # From the new base with the full step, or from the old one with half of the last.
        base = tree.where(accepted, point, state.base)
        direction = tree.where(accepted, correction, state.direction)
        residual = tree.where(accepted, g, state.residual)
        shorter = jnp.where(state.length > _SHORTEST, state.length / 2, 0)
        length = jnp.where(accepted, 1, shorter).astype(state.length.dtype)
        step = tree.where(length > 0, tree.scale(length, direction), residual)
        proposal = tree.unpack(base + step, z)
        size = jnp.where(accepted, size, state.size)
        products = state.products + products
        return proposal, NewtonState(base, residual, direction, length, size, products)

    def _correction(
        self, product: Any, g: jax.Array, accuracy: jax.Array, z: PyTree
    ) -> tuple[jax.Array, jax.Array]:
        """`(I - J)⁻¹ g` to a relative residual of `accuracy` `[B]`, and the products it took."""
        tol = checks.in_dtype(self.tol, accuracy.dtype)

        def any_of(flags: jax.Array) -> jax.Array:
            return tree.any_of(flags, product.mesh_axes)

        def solve(
            product: Any, g: jax.Array, accuracy: Any, transposed: bool = False
        ) -> tuple[jax.Array, jax.Array]:
            target = accuracy * tree.norm(g)
            krylov = self.krylov.at(z, transposed)
            precondition, budget = krylov.precondition(z), krylov.max_iter
            cycle = krylov.cycle(product, g, target, budget, any_of, precondition)
            return cycle.correction, cycle.products

        apply = packed(product, z)
        if not product.differentiable:
            return solve(apply, g, accuracy)
        # Inside a loop to be differentiated: the derivative of the exact solution of the system.
        correction, products = lax.custom_linear_solve(
            lambda v: v - apply(v),
            g,
            lambda _, g: _as_float(solve(apply, g, accuracy)),
            lambda transposed, y: _as_float(solve(lambda v: v - transposed(v), y, tol, True)),
            has_aux=True,
        )
        return correction, products.astype(jnp.int32)


def _as_float(result: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """An integer beside a differentiated value would need a float0 tangent (jax#24295)."""
    correction, products = result
    return correction, products.astype(jnp.float32)
