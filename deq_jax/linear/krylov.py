"""What methods for `u = A u + y` share: preconditioners, and restarts from the true residual.

Used for the transposed system of the implicit gradient and inside Newton's method. `A` is given as
products only and need not be symmetric; each sample has a Krylov space, a stop and a report of its
own.

Differs from `jax.scipy.sparse.linalg`: samples are not one long vector, so that neither the space
nor the stop of one depends on another; a cycle ends at the product that reaches the tolerance; the
residual reported is computed anew from the solution, by a product that is counted; half precision
works, the method itself running in float32.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.captured import Captured
from deq_jax.checks import Real
from deq_jax.stats import Solution, SolveStats, Status

PyTree = Any
Product = Callable[[jax.Array], jax.Array]
AnyOf = Callable[[jax.Array], jax.Array]
Preconditioner = Callable[[Any, Any], Any]
"""`M(z, v)`, an approximation of `(I - ∂f/∂z)⁻¹ v` at the state z, linear in v.

v and the value are like z: leaves `[B, ...]`, with B = 1 where `batched=False`.
"""

Method = TypeVar("Method", bound="LinearMethod")


@runtime_checkable
class LinearSolver(Protocol):
    """A method for `u = A u + y` from products with A; any hashable object with these serves.

    A method that wants to know where A was taken may have a method `at(z, transposed)`, which
    returns the solver for A = ∂f/∂z at `z` or, `transposed`, for its transpose.

    Attributes:
        tol: bound on the relative residual `‖A u + y - u‖ / ‖y‖`.
    """

    @property
    def tol(self) -> Any: ...  # noqa: D102

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """Solves `u = A u + y` for every sample.

        Args:
            product: `u -> A u`.
            y: leaves `[B, ...]`.
            start: first guess; zero if left out.
            mesh_axes: axes of a `shard_map` over which `product` communicates; devices along them
                have to make as many products.

        Returns:
            u, like `y`, and its report. `iterations` counts the products until a sample stopped,
            `evaluations` those that were computed on the batch.
        """
        ...


class Cycle(NamedTuple):
    """What a cycle of a Krylov method found.

    Attributes:
        correction: `[B, D]`, added to u it lowers the residual.
        products: int32, products computed on the batch.
        used: `[B]` int32, products until the sample met its tolerance.
        residual: `[B]`, `‖r - (I - A) correction‖` as the method's recurrences have it.
        stuck: `[B]` boolean, no further cycle will find a smaller residual.
    """

    correction: jax.Array
    products: jax.Array
    used: jax.Array
    residual: jax.Array
    stuck: jax.Array | None = None


class _Carry(NamedTuple):
    proceed: jax.Array
    products: jax.Array
    u: jax.Array
    r: jax.Array
    active: jax.Array
    best: jax.Array
    best_residual: jax.Array
    iterations: jax.Array
    status: jax.Array


class LinearMethod(abc.ABC):
    """A linear solver that can be given a preconditioner and that can correct a Newton step."""

    tol: Real
    preconditioner: Preconditioner | None

    def at(self: Method, z: PyTree, transposed: bool) -> Method:
        """The solver for A = ∂f/∂z at `z` or its transpose, with the preconditioner to match."""
        if self.preconditioner is None:
            return self
        if isinstance(self.preconditioner, PreconditionerAt):  # told before
            return self
        bound = PreconditionerAt(self.preconditioner, z, transposed)
        options: Any = self
        return dataclasses.replace(options, preconditioner=bound)

    def precondition(self, like: PyTree) -> Product | None:
        """The preconditioner on packed states `[B, D]` of trees shaped like `like`."""
        if self.preconditioner is None:
            return None
        function: Any = self.preconditioner
        if not isinstance(function, PreconditionerAt):  # called by hand, at no state
            function = PreconditionerAt(function, None, False)
        return packed(function, like)

    @abc.abstractmethod
    def cycle(
        self,
        product: Product,
        r: jax.Array,
        target: jax.Array,
        budget: Any = None,
        any_of: AnyOf = jnp.any,
        precondition: Product | None = None,
    ) -> Cycle:
        """Finds c with `‖r - (I - A) c‖ <= target`, as far as `budget` products go.

        Args:
            product: `v -> A v` on packed states `[B, D]`.
            r: right-hand side, `[B, D]`; where it is zero nothing is done.
            target: `[B]`.
            budget: int32, most products; None stands for `max_iter`.
            any_of: whether any entry of a boolean `[B]` holds, on any device that matters.
            precondition: the preconditioner on packed states.
        """

    @abc.abstractmethod
    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`."""


def check_preconditioner(owner: Any) -> None:
    """Checks the field `preconditioner` of options, and makes the arrays it closes over leaves.

    Raises:
        TypeError: it is no function.
    """
    given: Any = owner.preconditioner
    if given is None or isinstance(given, PreconditionerAt):
        return
    if not callable(given):
        raise TypeError(
            f"{type(owner).__name__}.preconditioner must be a function M(z, v) that approximates "
            f"(I - J)⁻¹ v, got {given!r}"
        )
    object.__setattr__(owner, "preconditioner", Captured(given))


class Restarted(LinearMethod):
    """Cycles of a Krylov method, each started from the true residual of the last solution."""

    max_iter: int
    least_products: ClassVar[int] = 2
    """One to find a correction and one to check it."""

    def check(self) -> None:
        """Checks `tol`, `max_iter` and `preconditioner`."""
        checks.check_number(self, "tol", at_least=0.0)
        checks.check_count(self, "max_iter")
        if self.max_iter < self.least_products:
            raise ValueError(
                f"{type(self).__name__}.max_iter must be at least {self.least_products}, the "
                f"products to find a correction and to check it, got {self.max_iter}"
            )
        check_preconditioner(self)

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`."""
        packed_product, precondition = packed(product, y), self.precondition(y)

        def any_of(flags: jax.Array) -> jax.Array:
            return tree.any_of(flags, mesh_axes)

        # Samples are separate systems, so that each has a scale of its own.
        scale = tree.unit_scale(y)
        b = tree.pack(tree.scale(scale, y))
        size = tree.norm(b)
        tol = checks.in_dtype(self.tol, size.dtype)
        count = tree.zeros_per_sample(b).astype(jnp.int32)
        guarded = jnp.where(size > 0, size, 1)

        if start is None:
            u, r, spent = 0 * b, b, 0
        else:
            u = tree.where(size > 0, tree.pack(tree.scale(scale, start)), 0 * b)
            r, spent = packed_product(u) + b - u, 1
        residual = tree.norm(r) / guarded
        finite = jnp.isfinite(residual)
        active = finite & (residual > tol) & (size > 0)
        status = jnp.where(active, count + int(Status.MAX_ITER), count + int(Status.CONVERGED))
        status = jnp.where(finite, status, int(Status.DIVERGED))
        first = _Carry(
            proceed=any_of(active),
            products=count.sum(dtype=jnp.int32) + spent,
            u=u,
            r=r,
            active=active,
            best=u,
            best_residual=jnp.where(finite, residual, jnp.inf),
            iterations=count + jnp.where(size > 0, spent, 0),
            status=status,
        )

        def proceed(carry: _Carry) -> jax.Array:
            return carry.proceed & (carry.products + self.least_products <= self.max_iter)

        def body(carry: _Carry) -> _Carry:
            r = tree.where(carry.active, carry.r, jnp.zeros_like(carry.r))
            budget = self.max_iter - carry.products - 1
            cycle = self.cycle(packed_product, r, tol * size, budget, any_of, precondition)
            # As it will be returned: in half precision the rounding is part of the residual.
            u = rounded(carry.u + cycle.correction, y)
            u = tree.where(carry.active, u, carry.u)
            r = packed_product(u) + b - u
            residual = tree.norm(r) / guarded
            finite = jnp.isfinite(residual)
            converged = carry.active & finite & (residual <= tol)
            diverged = carry.active & ~finite
            improved = carry.active & finite & (residual < carry.best_residual)
            # The same residual would lead to the same correction of nothing, for ever.
            stuck = tree.norm(cycle.correction) == 0
            stuck = stuck if cycle.stuck is None else stuck | cycle.stuck
            active = carry.active & ~converged & ~diverged & ~stuck
            status = jnp.where(converged, int(Status.CONVERGED), carry.status)
            used = jnp.where(active, cycle.products, cycle.used) + 1
            best = tree.where(improved, u, carry.best)
            return _Carry(
                proceed=any_of(active),
                products=carry.products + cycle.products + 1,
                u=tree.where(active, u, best),
                r=r,
                active=active,
                best=best,
                best_residual=jnp.where(improved, residual, carry.best_residual),
                iterations=carry.iterations + jnp.where(carry.active, used, 0),
                status=jnp.where(diverged, int(Status.DIVERGED), status),
            )

        end = lax.while_loop(proceed, body, first)
        # A cotangent that is not finite must not become a gradient of zero.
        value = tree.where(jnp.isfinite(size), end.best, b)
        stats = SolveStats(end.best_residual, end.iterations, end.status, end.products)
        return Solution(tree.scale(1 / scale, tree.unpack(value, y)), stats)


def packed(product: Callable[[PyTree], PyTree], like: PyTree) -> Product:
    """`product` on packed states `[B, D]` instead of trees shaped like `like`."""
    return lambda v: tree.pack(product(tree.unpack(v, like)))


def rounded(u: jax.Array, like: PyTree) -> jax.Array:
    """The packed state `u` `[B, D]` with the values it has in the dtypes of `like`."""
    # The barrier keeps the compiler from taking both conversions out.
    return tree.pack(lax.optimization_barrier(tree.unpack(u, like)))


def ratio(a: jax.Array, b: jax.Array, scale: Any) -> tuple[jax.Array, jax.Array]:
    """`a / b`, and where `[B]` b is more than rounding at `scale`; 0 elsewhere."""
    sound = jnp.abs(b) > jnp.finfo(b.dtype).eps * scale
    return jnp.where(sound, a / jnp.where(sound, b, 1), 0), sound


def preconditioned(product: Product, precondition: Product | None) -> Product:
    """The A' of the system `(I - A) M w = r`, which is `w = A' w + r`: `A' w = w - M w + A M w`.

    Its residual is that of `u = M w` in the system of A, whatever M is.
    """
    if precondition is None:
        return product

    def apply(w: jax.Array) -> jax.Array:
        u = precondition(w)
        return w - u + product(u)

    return apply


def corrected(precondition: Product | None, w: jax.Array) -> jax.Array:
    """`u = M w`."""
    return w if precondition is None else precondition(w)


class PreconditionerAt:
    """A preconditioner bound to a state: `v -> M(z, v)` or its transpose."""

    def __init__(self, function: Preconditioner, z: PyTree, transposed: bool):
        self.function, self.z, self.transposed = function, z, transposed

    def __call__(self, v: PyTree) -> PyTree:
        """`M(z, v)`, or its transpose."""

        def at_z(v: PyTree) -> PyTree:
            value = self.function(self.z, v)
            checks.check_same_form("preconditioner must return", "v", value, v)
            return value

        return jax.linear_transpose(at_z, v)(v)[0] if self.transposed else at_z(v)
