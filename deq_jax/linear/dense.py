"""Direct solves of small systems, and the choice between them and a Krylov method."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.linear.gmres import GMRES
from deq_jax.linear.krylov import (
    AnyOf,
    Cycle,
    LinearMethod,
    Preconditioner,
    Product,
    check_preconditioner,
    packed,
    rounded,
)
from deq_jax.linear.minres import MINRES
from deq_jax.stats import Solution, SolveStats, Status

PyTree = Any

_UNROLLED = 4
"""Up to this many unknowns the elimination is written out over the batch."""

DENSE_UP_TO = 32
"""Up to this many unknowns `Auto` takes `Dense`; measured by `experiments.studies.linear`."""


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Dense(LinearMethod):
    """`(I - A) u = y` by the matrix itself: D products make it, LU factorisation solves it.

    Exact up to rounding, whatever the spectrum, and the fastest method for small states. With up to
    4 unknowns a sample the elimination is written out elementwise over the batch, so that a million
    tiny systems cost a few passes over their entries. One more product measures the true residual.
    A matrix that is singular to rounding leaves `u = 0` and the status `MAX_ITER`.

    A complex state counts twice, as its real and its imaginary parts, since a product need not be
    complex linear.

    Memory: `[B, D, D]` for D unknowns a sample, and D products at once.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`, by which the status is given.

    Raises:
        ValueError, TypeError: `tol` is negative or no number.

    Example: Kepler's equation for 100,000 planets, by Newton's method.

        def kepler(eccentricity, z, anomaly):
            return anomaly + eccentricity * jnp.sin(z)

        anomaly = jnp.linspace(0.0, 3.0, 100_000)[:, None]
        z = deq_fixed_point(kepler, 0.8, anomaly, solver=NewtonKrylov(Dense()))
    """

    tol: Real = 1e-4

    preconditioner: ClassVar[None] = None  # type: ignore[misc]  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        checks.check_number(self, "tol", at_least=0.0)

    def cycle(
        self,
        product: Product,
        r: jax.Array,
        target: jax.Array,
        budget: Any = None,
        any_of: AnyOf = jnp.any,
        precondition: Product | None = None,
    ) -> Cycle:
        """The solution; no products where no sample is above its target."""
        tree.check_whole_samples("Dense")
        size = tree.norm(r)
        active = size > target
        wanted = any_of(active)

        def solve(r: jax.Array) -> tuple[jax.Array, jax.Array]:
            return _solve(_matrix(product, r), r)

        def skip(r: jax.Array) -> tuple[jax.Array, jax.Array]:
            return 0 * r, size

        correction, residual = lax.cond(wanted, solve, skip, r)
        columns = tree.unknowns(r)
        return Cycle(
            correction=tree.where(active, correction, 0 * r),
            products=jnp.where(wanted, columns, 0).astype(jnp.int32),
            used=jnp.where(active, columns, 0).astype(jnp.int32),
            residual=jnp.where(active, residual, size),
        )

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`; `start` is not used."""
        apply = packed(product, y)
        # Samples are separate systems, so that each has a scale of its own.
        scale = tree.unit_scale(y)
        b = tree.pack(tree.scale(scale, y))
        size = tree.norm(b)
        tol = checks.in_dtype(self.tol, size.dtype)
        guarded = jnp.where(size > 0, size, 1)
        cycle = self.cycle(apply, b, 0 * guarded, None, lambda flags: tree.any_of(flags, mesh_axes))
        # Of a singular system, infinities and what is worse than nothing are not kept.
        found = cycle.residual < size
        u = rounded(tree.where(found, cycle.correction, 0 * b), y)
        residual = tree.norm(apply(u) + b - u) / guarded
        status = jnp.where(residual <= tol, int(Status.CONVERGED), int(Status.MAX_ITER))
        status = jnp.where(jnp.isfinite(residual), status, int(Status.DIVERGED))
        stats = SolveStats(
            residual=jnp.where(jnp.isfinite(residual), residual, jnp.inf),
            iterations=cycle.used + (size > 0).astype(jnp.int32),
            status=status.astype(jnp.int32),
            evaluations=cycle.products + 1,
        )
        # A cotangent that is not finite must not become a gradient of zero.
        u = tree.where(jnp.isfinite(size), u, b)
        return Solution(tree.scale(1 / scale, tree.unpack(u, y)), stats)


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Auto(LinearMethod):
    """`Dense` for small states, a Krylov method for others: the choice is made by shapes.

    Up to 32 unknowns a sample it is `Dense(tol)`. Above it is `GMRES`, or `MINRES` if the caller
    knows that `I - J` is symmetric.

    Attributes:
        tol: bound on `‖A u + y - u‖ / ‖y‖`.
        max_iter: most products of the Krylov method, at least 2.
        symmetric: `I - J` is symmetric. This is not tested.
        preconditioner: `M(z, v)` for the Krylov method, as for `GMRES`.

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; it is named.

    Example: the same options for states of any size.

        policy = Implicit(Auto(tol=1e-6))
    """

    tol: Real = 1e-4
    max_iter: int = 100
    symmetric: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        checks.check_number(self, "tol", at_least=0.0)
        checks.check_count(self, "max_iter")
        checks.check_flag(self, "symmetric")
        check_preconditioner(self)
        self._krylov()

    def choice(self, like: PyTree) -> LinearMethod:
        """The method for states like this one, leaves `[B, ...]`."""
        fits = tree.unknowns(like) <= DENSE_UP_TO and not tree.split_axes()
        return Dense(self.tol) if fits else self._krylov()

    def _krylov(self) -> LinearMethod:
        options: Any = {"tol": self.tol, "max_iter": self.max_iter}
        options["preconditioner"] = self.preconditioner
        return MINRES(**options) if self.symmetric else GMRES(**options)

    def cycle(
        self,
        product: Product,
        r: jax.Array,
        target: jax.Array,
        budget: Any = None,
        any_of: AnyOf = jnp.any,
        precondition: Product | None = None,
    ) -> Cycle:
        """A cycle of the method that is chosen."""
        return self.choice(r).cycle(product, r, target, budget, any_of, precondition)

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`."""
        return self.choice(y).solve_linear(product, y, start, mesh_axes)


def _matrix(product: Product, like: jax.Array) -> jax.Array:
    """`I - A` for each sample, `[n, B, n]` by columns; complex numbers as two real ones."""
    n = tree.unknowns(like)
    # They vary over mesh axes as the state does.
    zeros = tree.zeros_per_sample(like)[:, None]

    def column(unit: jax.Array) -> jax.Array:
        v = _from_real(zeros + unit, like)
        return _to_real(v - product(v))

    return jax.vmap(column)(jnp.eye(n, dtype=zeros.dtype))


def _solve(columns: jax.Array, r: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The solution `[B, D]` of the systems with these columns, and the norm of its residual."""
    b, n = _to_real(r), columns.shape[0]
    if n <= _UNROLLED:
        u = jnp.stack(_eliminate(columns, b), axis=1)
    else:
        u = jnp.linalg.solve(columns.transpose(1, 2, 0), b[..., None])[..., 0]
    error = (
        b - sum(columns[j] * u[:, j, None] for j in range(n))
        if n <= _UNROLLED
        else (b - jnp.einsum("jbi,bj->bi", columns, u, precision=lax.Precision.HIGHEST))
    )
    return _from_real(u, r), tree.norm(error)


def _eliminate(columns: jax.Array, b: jax.Array) -> list[jax.Array]:
    """Gaussian elimination with partial pivoting, elementwise over the batch."""
    n = columns.shape[0]
    rows = [[*(columns[j, :, i] for j in range(n)), b[:, i]] for i in range(n)]
    for k in range(n):
        # The largest entry of the column below becomes the pivot.
        for i in range(k + 1, n):
            larger = jnp.abs(rows[i][k]) > jnp.abs(rows[k][k])
            for j in range(k, n + 1):
                above, below = rows[k][j], rows[i][j]
                rows[k][j] = jnp.where(larger, below, above)
                rows[i][j] = jnp.where(larger, above, below)
        for i in range(k + 1, n):
            factor = rows[i][k] / rows[k][k]
            for j in range(k + 1, n + 1):
                rows[i][j] = rows[i][j] - factor * rows[k][j]
    u: list[jax.Array] = []
    for k in reversed(range(n)):
        known = sum(rows[k][j] * u[n - 1 - j] for j in range(k + 1, n))
        u.append((rows[k][n] - known) / rows[k][k])
    return u[::-1]


def _to_real(v: jax.Array) -> jax.Array:
    """`[B, D]`, complex as `[B, 2 D]` of real and imaginary parts."""
    v = v.reshape(v.shape[0], -1)
    return jnp.concatenate([v.real, v.imag], axis=1) if jnp.iscomplexobj(v) else v


def _from_real(v: jax.Array, like: jax.Array) -> jax.Array:
    """The inverse of `_to_real`."""
    if jnp.iscomplexobj(like):
        half = v.shape[1] // 2
        v = lax.complex(v[:, :half], v[:, half:])
    return v.reshape(like.shape)
