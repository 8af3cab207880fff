"""Newton's method with a Krylov inner solve and backtracking, each sample by itself.

Sources: Dembo, Eisenstat and Steihaug, "Inexact Newton methods", 1982; Eisenstat and Walker,
"Choosing the forcing terms in an inexact Newton method", 1996 (their choice 2).
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import _compat, checks, tree
from deq_jax.captured import Captured
from deq_jax.checks import Real
from deq_jax.linear.bicgstab import BiCGStab
from deq_jax.linear.cg import CG
from deq_jax.linear.dense import Auto, Dense
from deq_jax.linear.gmres import GMRES
from deq_jax.linear.krylov import Cycle, LinearMethod, PreconditionerAt, packed
from deq_jax.linear.lsmr import LSMR
from deq_jax.linear.minres import MINRES

PyTree = Any

_DECREASE = 1e-4
"""Armijo's constant c: a step of length t is accepted below (1 - c t) times the old residual."""

_SHORTEST = 1 / 16
"""Where this fraction of Newton's step is still too long, the plain step is taken instead."""

_HOPELESS = 0.9
"""A step that leaves this fraction of the linear system unsolved is none."""

_LEAST_SQUARES_STEPS = 50
"""Most iterations of conjugate gradients for a damped step, two products each."""

_HALVINGS = 10
"""How often a step is halved for a state that is valid, before no step is taken at all."""


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

    Where `krylov` finds no step, or I - J is nearly singular and s longer than `‖g‖ / √eps`, the
    damped least-squares step is tried, `min ‖(I - J) s - g‖² + λ² ‖s‖²` with λ the relative
    residual (Levenberg and Marquardt, by LSMR), and the plain step if that is none either.

    Cost: `stats.evaluations` evaluations with their linearisation, and `stats.products` products.
    Memory: that of one linearisation of f, of `krylov`, and 3 states.

    Attributes:
        krylov: the method for the linear system, `GMRES(...)` (one cycle, at most `restart`
            products a step), `Dense()` (Newton's method itself, for small states), `Auto()` or
            another of `deq_jax.linear` (at most `max_iter` products a step); its `tol` is not used.
        forcing: largest η, in (0, 1).
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.
        lower: bound that no iterate goes below: a number, or a pytree with as many leaves as z of
            arrays that broadcast to these leaves, so that each sample may have a bound of its own.
            Each trial is clipped. The start should lie inside; the solution should not lie outside.
        upper: bound that no iterate goes above, likewise.
        valid: a predicate, `valid(z) -> [B]` boolean. A step is halved until it leads to a valid
            state, so that f is evaluated at no other (but at the start). Where ten halvings do not
            help the sample stays where it is.

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; it is named.
            A bound does not fit the state; `valid` returns something else than a boolean `[B]`.

    Sources: Dembo, Eisenstat and Steihaug, 1982; Eisenstat and Walker, 1996; for the damped step,
    Yamashita and Fukushima, "On the rate of convergence of the Levenberg-Marquardt method", 2001.

    Example: `z log z = x`, which has no value below zero.

        def cell(params, z, x):
            return z - z * jnp.log(z) + x

        z = deq_fixed_point(
            cell, None, jnp.full((3, 1), 2.0), jnp.full((3, 1), 9.0),
            solver=NewtonKrylov(Dense(), lower=1e-3, valid=lambda z: (z > 0).all(1)),
        )
    """

    krylov: GMRES | BiCGStab | CG | MINRES | LSMR | Dense | Auto = GMRES()  # noqa: RUF009  (frozen)
    forcing: Real = 0.1
    tol: Real = 1e-4
    max_iter: int = 20
    atol: Real = 0.0
    trace: bool = False
    lower: Any = None
    upper: Any = None
    valid: Callable[[Any], jax.Array] | None = None

    linearizes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.krylov, LinearMethod):
            raise TypeError(
                "NewtonKrylov.krylov must be a method for linear systems such as GMRES(), "
                f"BiCGStab(), Dense() or Auto(), got {self.krylov!r}"
            )
        checks.check_number(self, "forcing", above=0.0, at_most=0.999)
        checks.check_stopping(self)
        for name in ("lower", "upper"):
            self._check_bound(name)
        if _is_number(self.lower) and _is_number(self.upper) and self.lower > self.upper:
            raise ValueError(
                "NewtonKrylov.lower must not be above upper, got "
                f"lower={self.lower!r}, upper={self.upper!r}"
            )
        if self.valid is not None:
            if not callable(self.valid):
                raise TypeError(
                    "NewtonKrylov.valid must be a function of the state that returns a boolean "
                    f"for each sample, got {self.valid!r}"
                )
            object.__setattr__(self, "valid", Captured(self.valid))

    def _check_bound(self, name: str) -> None:
        bound = getattr(self, name)
        for path, leaf in checks.named_leaves(bound):
            if not checks.is_array(leaf) or jnp.iscomplexobj(leaf) or isinstance(leaf, bool):
                raise TypeError(
                    f"NewtonKrylov.{name} must be a real number, or a pytree of real arrays like "
                    f"the state: leaf {path} is {leaf!r}"
                )
        if isinstance(bound, tuple):  # tuples are static options, and these are data
            bound = jax.tree.leaves(bound)
        fixed = jax.tree.map(lambda b: lax.stop_gradient(b) if _is_data(b) else b, bound)
        object.__setattr__(self, name, fixed)

    @property
    def constrained(self) -> bool:
        """Whether not every state may be a trial."""
        return not (self.lower is None and self.upper is None and self.valid is None)

    @property
    def scale_free(self) -> bool:
        """Whether z may come scaled: not where bounds or functions of the user see it."""
        given = self.krylov.preconditioner
        told = given is None or isinstance(given, PreconditionerAt)
        return told and not self.constrained

    def at(self, z: PyTree, transposed: bool) -> "NewtonKrylov":
        """The solver of a linear system with A = ∂f/∂z at `z` or its transpose."""
        krylov = self.krylov.at(z, transposed)
        return dataclasses.replace(self, krylov=krylov, lower=None, upper=None, valid=None)

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
        value = tree.norm(lax.stop_gradient(tree.pack(fz)))
        needed = 0.5 * tol * value / jnp.where(size > 0, size, 1)
        accuracy = jnp.maximum(forcing, jnp.minimum(needed, most))
        # (I - J) s = g(z), or the least-squares step, or the plain step.
        rhs = tree.where(active & accepted, g, jnp.zeros_like(g))
        correction, products = self._correction(product, rhs, accuracy, size, value, z)

        # From the new base with the full step, or from the old one with half of the last.
        base = tree.where(accepted, point, state.base)
        direction = tree.where(accepted, correction, state.direction)
        residual = tree.where(accepted, g, state.residual)
        shorter = jnp.where(state.length > _SHORTEST, state.length / 2, 0)
        length = jnp.where(accepted, 1, shorter).astype(state.length.dtype)
        step = tree.where(length > 0, direction, residual)
        proposal, part = self._trial(base, step, jnp.where(length > 0, length, 1), z)
        length = jnp.where(length > 0, part, 0)
        size = jnp.where(accepted, size, state.size)
        products = state.products + products
        return proposal, NewtonState(base, residual, direction, length, size, products)

    def _trial(
        self, base: jax.Array, step: jax.Array, length: jax.Array, like: PyTree
    ) -> tuple[PyTree, jax.Array]:
        """`base + length step`, inside the bounds and valid, and the length that is left."""

        def clipped(packed: jax.Array) -> PyTree:
            trial = tree.unpack(packed, like)
            for name, clip in (("lower", jnp.maximum), ("upper", jnp.minimum)):
                if (bound := getattr(self, name)) is not None:
                    trial = jax.tree.map(clip, trial, _like_state(name, bound, like))
            return trial

        if self.valid is None:
            return clipped(base + tree.scale(length, step)), length
        predicate = self.valid

        def is_valid(length: jax.Array) -> jax.Array:
            flags = predicate(lax.stop_gradient(clipped(base + tree.scale(length, step))))
            if jnp.shape(flags) != length.shape or jnp.result_type(flags) != jnp.bool_:
                raise ValueError(
                    f"NewtonKrylov.valid must return a boolean for each sample, [{length.size}]: "
                    f"got {jnp.result_type(flags)}{list(jnp.shape(flags))}; reduce over all axes "
                    "but the first, as `(z > 0).all(axis=1)` does"
                )
            return flags

        def halve(_: Any, length: jax.Array) -> jax.Array:
            return jnp.where(is_valid(length), length, length / 2)

        length = lax.fori_loop(0, _HALVINGS, halve, length)
        stays = tree.where(is_valid(length), step, jnp.zeros_like(step))
        return clipped(base + tree.scale(length, stays)), length

    def _correction(
        self,
        product: Any,
        g: jax.Array,
        accuracy: jax.Array,
        size: jax.Array,
        value: jax.Array,
        z: PyTree,
    ) -> tuple[jax.Array, jax.Array]:
        """`(I - J)⁻¹ g` to a relative residual of `accuracy` `[B]`, and the products it took."""
        tol = checks.in_dtype(self.tol, accuracy.dtype)

        def any_of(flags: jax.Array) -> jax.Array:
            return tree.any_of(flags, product.mesh_axes)

        def solve(product: Any, g: jax.Array, accuracy: Any, transposed: bool = False) -> Cycle:
            krylov = self.krylov.at(z, transposed)
            target = accuracy * tree.norm(g)
            return krylov.cycle(product, g, target, None, any_of, krylov.precondition(z))

        apply = packed(product, z)
        if product.differentiable:
            # Inside a loop to be differentiated: the derivative of the exact solution.
            correction, products = lax.custom_linear_solve(
                lambda v: v - apply(v),
                g,
                lambda _, g: _as_float(solve(apply, g, accuracy)),
                lambda transposed, y: _as_float(
                    solve(lambda v: v - transposed(v), y, tol, transposed=True)
                ),
                has_aux=True,
            )
            return _or_plain(correction, g), products.astype(jnp.int32)

        cycle = solve(apply, g, accuracy)
        correction = _or_plain(cycle.correction, g)
        if not _transposable(product):
            return correction, cycle.products
        wanted, found = tree.norm(g), tree.norm(cycle.correction)
        # Not below: NaN too.
        singular = ~(found < wanted / jnp.sqrt(jnp.finfo(found.dtype).eps)) | (found == 0)
        singular |= ~(cycle.residual < _HOPELESS * wanted)

        # min ‖(I - J) s - g‖² + λ² ‖s‖² with λ = ‖g‖ / ‖f(z)‖.
        def fall_back(correction: jax.Array) -> tuple[jax.Array, jax.Array]:
            damping = jnp.minimum(size / jnp.where(value > 0, value, 1), 1)
            transpose = jax.linear_transpose(apply, g)

            def adjoint(v: jax.Array) -> jax.Array:  # in the inner product Re⟨a, b⟩
                return v - jnp.conj(transpose(jnp.conj(v))[0])

            def normal(v: jax.Array) -> jax.Array:  # A of the normal equations as (I - A) s = ...
                image = v - apply(v)
                return v - adjoint(image) - tree.scale(damping**2, v)

            rhs = adjoint(tree.where(singular, g, 0 * g))
            most = min(_LEAST_SQUARES_STEPS, tree.unknowns(g))
            cycle = CG().cycle(normal, rhs, accuracy * tree.norm(rhs), most, any_of)
            s = cycle.correction
            better = singular & (tree.norm(g - s + apply(s)) < _HOPELESS * wanted)
            return tree.where(better, s, correction), 2 * cycle.products + 2

        def keep(correction: jax.Array) -> tuple[jax.Array, jax.Array]:
            return correction, jnp.zeros_like(cycle.products)

        needed = any_of(singular & (wanted > 0))
        correction, products = lax.cond(needed, fall_back, keep, correction)
        return correction, cycle.products + products


def _or_plain(correction: jax.Array, g: jax.Array) -> jax.Array:
    """Newton's step where there is one, else the plain step."""
    found = tree.norm(lax.stop_gradient(correction))
    return tree.where(jnp.isfinite(found) & (found > 0), correction, g)


def _transposable(product: Any) -> bool:
    """Whether JAX can transpose the product: not a `while` loop in f."""
    body = getattr(product, "body", None)
    return body is not None and not _compat.contains(body.program.jaxpr, "while")


def _is_data(value: Any) -> bool:
    return isinstance(value, jax.Array)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _like_state(name: str, bound: Any, z: PyTree) -> PyTree:
    """A bound for each entry of the state."""
    leaves, structure = jax.tree.flatten(z)
    bounds = jax.tree.leaves(bound)
    if len(bounds) == 1 and jnp.ndim(bounds[0]) == 0:
        bounds = bounds * len(leaves)
    if len(bounds) != len(leaves):
        raise ValueError(
            f"NewtonKrylov.{name} must be a number or have the {len(leaves)} leaves of the state, "
            f"got {len(bounds)} leaves"
        )

    def fit(bound: Any, path: str, leaf: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(leaf):
            raise ValueError(f"NewtonKrylov.{name}: leaf {path} of the state is complex")
        try:
            return jnp.broadcast_to(jnp.asarray(bound, leaf.dtype), leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"NewtonKrylov.{name} must broadcast to the state: leaf {path}: got "
                f"{jnp.shape(bound)}, expected {leaf.shape}"
            ) from error

    names = [path for path, _ in checks.named_leaves(z)]
    return jax.tree.unflatten(structure, map(fit, bounds, names, leaves))


def _as_float(cycle: Cycle) -> tuple[jax.Array, jax.Array]:
    """An integer beside a differentiated value would need a float0 tangent (jax#24295)."""
    return cycle.correction, cycle.products.astype(jnp.float32)
