"""What Krylov methods for `u = A u + y` share: restarts from the true residual, and its report.

Used for the transposed system of the implicit gradient and inside Newton's method. `A` is given as
products only and need not be symmetric; each sample has a Krylov space, a stop and a report of its
own.

Differs from `jax.scipy.sparse.linalg`: samples are not one long vector, so that neither the space
nor the stop of one depends on another; a cycle ends at the product that reaches the tolerance; the
residual reported is computed anew from the solution, by a product that is counted; half precision
works, the method itself running in float32.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.stats import Solution, SolveStats, Status

PyTree = Any
Product = Callable[[jax.Array], jax.Array]
AnyOf = Callable[[jax.Array], jax.Array]


@runtime_checkable
class LinearSolver(Protocol):
    """A method for `u = A u + y` from products with A; any hashable object with these serves.

    Attributes:
        tol: bound on the relative residual `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products.
    """

    @property
    def tol(self) -> Any: ...  # noqa: D102
    @property
    def max_iter(self) -> int: ...  # noqa: D102

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
    """

    correction: jax.Array
    products: jax.Array
    used: jax.Array


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


class Restarted(abc.ABC):
    """Cycles of a Krylov method, each started from the true residual of the last solution."""

    tol: Real
    max_iter: int

    def check(self) -> None:
        """Checks `tol` and `max_iter`."""
        checks.check_number(self, "tol", at_least=0.0)
        checks.check_count(self, "max_iter")
        if self.max_iter < 2:
            raise ValueError(
                f"{type(self).__name__}.max_iter must be at least 2, one product to find a "
                f"correction and one to check it, got {self.max_iter}"
            )

    @abc.abstractmethod
    def cycle(
        self, product: Product, r: jax.Array, target: jax.Array, budget: Any, any_of: AnyOf
    ) -> Cycle:
        """Finds c with `‖r - (I - A) c‖ <= target`, as far as `budget` products go.

        Args:
            product: `v -> A v` on packed states `[B, D]`.
            r: right-hand side, `[B, D]`; where it is zero nothing is done.
            target: `[B]`.
            budget: int32, most products.
            any_of: whether any entry of a boolean `[B]` holds, on any device that matters.
        """

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`."""
        packed_product = packed(product, y)

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
            return carry.proceed & (carry.products + 2 <= self.max_iter)

        def body(carry: _Carry) -> _Carry:
            r = tree.where(carry.active, carry.r, jnp.zeros_like(carry.r))
            budget = self.max_iter - carry.products - 1
            cycle = self.cycle(packed_product, r, tol * size, budget, any_of)
            # As it will be returned: in half precision the rounding is part of the residual.
            u = rounded(carry.u + cycle.correction, y)
            u = tree.where(carry.active, u, carry.u)
            r = packed_product(u) + b - u
            residual = tree.norm(r) / guarded
            finite = jnp.isfinite(residual)
            converged = carry.active & finite & (residual <= tol)
            diverged = carry.active & ~finite
            improved = carry.active & finite & (residual < carry.best_residual)
            active = carry.active & ~converged & ~diverged
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
