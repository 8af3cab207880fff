"""The one loop that every solver runs in: a `lax.while_loop`, or scans to be differentiated.

A solver is an update rule: from the points seen so far it proposes the next one. All the rest is
here and is the same for all: the evaluation of f, residuals, each sample's own stop and status,
the best iterate, the count, the trace.

Known to be non-optimal: a finished sample is frozen, but f is still evaluated on it until the last
sample of the batch has stopped. Where f can be had for fewer samples (`smaller`), they leave.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.solvers.shrinking import Smaller, batch_axes, while_shrinking
from deq_jax.solvers.unrolling import while_as_scans
from deq_jax.stats import SolveStats, Status

PyTree = Any

EPSILON = 1e-9
"""ε of the relative residual `‖f(z) - z‖ / (ε + ‖f(z)‖)`: decides only where f(z) vanishes."""


@runtime_checkable
class Solver(Protocol):
    """What a solver has to have; any hashable object with these runs in `iterate`.

    A solver that uses more than the values of f sets `linearizes = True`. Its step then receives
    two keyword arguments, `product`, the map `v -> ∂f/∂z v` at z, and `active`, `[B]`, the samples
    still wanted, and it has a method `products(state)` that tells how many products it computed.

    Attributes:
        tol: bound on the relative residual.
        atol: bound on the absolute residual `‖f(z) - z‖`; 0 leaves it out. Either bound stops.
        max_iter: most evaluations of f.
        trace: keep the residual of every evaluation.
    """

    tol: float
    atol: float
    max_iter: int
    trace: bool

    def init(self, z: PyTree, fz: PyTree) -> PyTree:
        """The solver's state before the first evaluation.

        Args:
            z: the start, leaves `[B, ...]`. Make arrays from it (`0 * z`, `tree.zeros_per_sample`)
                and not from constants: inside `shard_map` a loop's carry must vary as its data do.
            fz: structure, shapes and dtypes of what f will return (`jax.ShapeDtypeStruct`); there
                are no values yet, because f is evaluated in the loop and nowhere else.
        """

    def step(self, z: PyTree, fz: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """The next point to evaluate and the new state, from the point `z` and `fz = f(z)`.

        Must treat samples apart: sums run over all axes but the first. A sample that has stopped
        passes through too, and what is proposed for it is thrown away.
        """


def check_solver(name: str, solver: Any) -> None:
    """Raises a TypeError that names the argument unless `solver` can run in the loop."""
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(
            f"{name} must be a solver such as Anderson() or Picard(), or an object with tol, atol, "
            f"max_iter, trace, init and step; got {solver!r}"
        )


def check_samples(sample_at: tuple[int, ...], solver: Solver) -> None:
    """Raises unless `sample_at` are increasing numbers of evaluations that `solver` can reach."""
    if not all(isinstance(number, int) and not isinstance(number, bool) for number in sample_at):
        raise TypeError(f"sample_at must hold integers, got {sample_at!r}")
    bounds = (0, *sample_at, solver.max_iter + 1)
    if any(later <= earlier for earlier, later in itertools.pairwise(bounds)):
        raise ValueError(
            "sample_at must be increasing numbers of evaluations, between 1 and max_iter = "
            f"{solver.max_iter}, got {sample_at!r}"
        )


class Run(NamedTuple):
    """All that a run of the loop leaves behind.

    Attributes:
        value: per sample the iterate that met a tolerance, else the one with the lowest residual;
            leaves `[B, ...]`.
        stats: its report.
        samples: the states at the evaluations `sample_at`, like `value` each.
        solver_state: the solver's own state at the end.
    """

    value: PyTree
    stats: SolveStats
    samples: tuple[PyTree, ...]
    solver_state: PyTree


class _Carry(NamedTuple):
    proceed: jax.Array  # bool []
    evaluations: jax.Array  # int32 []
    z: PyTree  # the point to evaluate next
    solver_state: PyTree
    active: jax.Array  # bool [B]
    best: PyTree
    best_residual: jax.Array  # [B]
    iterations: jax.Array  # int32 [B]
    status: jax.Array  # int32 [B]
    trace: jax.Array | None  # [max_iter, B]
    samples: PyTree  # [number of samples + 1, B, ...], the last row for what nobody asked for


def iterate(
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    solver: Solver,
    *,
    reference: jax.Array | None = None,
    mesh_axes: tuple[str, ...] = (),
    sample_at: tuple[int, ...] = (),
    unrolled: bool = False,
    smaller: tuple[Smaller, ...] = (),
) -> Run:
    """Solves `z = f(z)` for every sample, from `z0`, by `solver`.

    Each trip evaluates f once. A sample stops when its residual

        ‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)      (norms over all leaves of the sample)

    is at most `tol`, when `‖f(z) - z‖₂` is at most a positive `atol`, or when a norm is not
    finite. The loop ends when no sample is active or after `max_iter` evaluations.

    Args:
        f: function of the state alone; returns its structure, shapes and dtypes. For a solver that
            linearises it has a method `linearize(z) -> (f(z), product)`.
        z0: the start, inexact leaves `[B, ...]`.
        solver: the update rule and the bounds.
        reference: `[B]`, stands for `‖f(z)‖₂` in the residual where given; a linear system
            `u = Jᵀu + y` is measured against `‖y‖`. If it is zero throughout, the start, which
            must be zero too, is the solution, and nothing is evaluated.
        mesh_axes: axes of a `shard_map` over which f communicates. Devices along them go on
            together until none has an active sample; along others each stops by itself.
        sample_at: numbers of evaluations, increasing, counted from 1; the points evaluated then
            are returned too. Samples that had stopped give their final state.
        unrolled: make the loop out of `scan`, so that it can be differentiated in reverse.
        smaller: f on some of the samples, for sizes that decrease. Once only so many are active,
            the loop goes on with these alone. Not for an f that communicates, nor `unrolled`.

    Returns:
        `Run`: per sample the iterate that met a tolerance, else the one with the lowest residual,
        and the residual of exactly it.
    """
    if smaller and mesh_axes:
        raise ValueError(
            "Execution(shrink_to=...) goes on with some samples alone, so f must treat samples "
            f"independently, but it communicates over the mesh axes {mesh_axes}"
        )
    linearizes = getattr(solver, "linearizes", False)
    rows = jnp.asarray(sample_at, jnp.int32)

    def any_active(active: jax.Array) -> jax.Array:
        more = jnp.any(active)
        return lax.pmax(more.astype(jnp.int32), mesh_axes) > 0 if mesh_axes else more

    def begin(z0: PyTree, reference: jax.Array | None) -> _Carry:
        zeros = tree.zeros_per_sample(z0)
        count = zeros.astype(jnp.int32)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), z0)
        needed = count == 0
        if reference is not None:  # one for all: a product may carry from one sample to another
            needed &= any_active(reference != 0)
        return _Carry(
            proceed=any_active(needed),
            evaluations=count.sum(dtype=jnp.int32),
            z=z0,
            solver_state=solver.init(z0, shapes),
            active=needed,
            best=z0,
            best_residual=jnp.where(needed, zeros + jnp.inf, 0),
            iterations=count,
            status=jnp.where(needed, count + int(Status.MAX_ITER), count + int(Status.CONVERGED)),
            trace=jnp.broadcast_to(zeros + jnp.nan, (solver.max_iter, *zeros.shape))
            if solver.trace
            else None,
            samples=jax.tree.map(lambda z: jnp.stack([0 * z] * (len(sample_at) + 1)), z0)
            if sample_at
            else None,
        )

    def proceed(carry: _Carry) -> jax.Array:
        return carry.proceed & (carry.evaluations < solver.max_iter)

    def body(f: Any, reference: jax.Array | None, carry: _Carry) -> _Carry:
        z, active = carry.z, carry.active
        if linearizes:
            fz, product = f.linearize(z)
        else:
            fz, product = f(z) if unrolled else _evaluated_once(f, z, carry.proceed), None
        absolute, size = _norms(z, fz)
        size = size if reference is None else reference
        # Against a reference of zero (a zero cotangent) nothing is left to divide by.
        guarded = size + EPSILON if reference is None else jnp.where(size > 0, size, 1)
        residual = absolute / guarded
        finite = jnp.isfinite(absolute) & jnp.isfinite(size)

        met = residual <= solver.tol
        if solver.atol > 0:
            met |= absolute <= solver.atol
        converged = active & finite & met
        diverged = active & ~finite
        # Where atol is what is met, an earlier iterate may have a lower relative residual.
        improved = converged | (active & finite & (residual < carry.best_residual))
        best = tree.where(improved, z, carry.best)
        status = jnp.where(converged, int(Status.CONVERGED), carry.status)
        status = jnp.where(diverged, int(Status.DIVERGED), status)
        still_active = active & ~converged & ~diverged

        given = (z, fz, carry.solver_state)
        if linearizes:
            wanted = still_active & (carry.evaluations + 1 < solver.max_iter)
            proposal, solver_state = solver.step(*given, product=product, active=wanted)
        else:
            proposal, solver_state = solver.step(*given)
        trace, samples = carry.trace, carry.samples
        if trace is not None:
            row = jnp.where(active, residual, jnp.nan)
            trace = lax.dynamic_update_index_in_dim(trace, row, carry.evaluations, 0)
        if samples is not None:
            row = jnp.sum(rows <= carry.evaluations)  # overwritten until its evaluation has come
            samples = jax.tree.map(
                lambda samples, z: lax.dynamic_update_index_in_dim(samples, z, row, 0), samples, z
            )
        return _Carry(
            proceed=any_active(still_active),
            evaluations=carry.evaluations + 1,
            # Frozen samples rest at a finite point, so that no NaN goes round in f.
            z=tree.where(still_active, proposal, best),
            solver_state=solver_state,
            active=still_active,
            best=best,
            best_residual=jnp.where(improved, residual, carry.best_residual),
            iterations=carry.iterations + active.astype(jnp.int32),
            status=status,
            trace=trace,
            samples=samples,
        )

    def at(size: Smaller, index: jax.Array) -> Callable[[_Carry], _Carry]:
        return functools.partial(body, size.at(index), tree.take(reference, index))

    start, on_all = begin(z0, reference), functools.partial(body, f, reference)
    if unrolled:
        end = while_as_scans(proceed, on_all, start, solver.max_iter)
    elif smaller:
        axes = batch_axes(begin, (z0, reference), smaller[0].size)
        bodies = tuple(Smaller(part.size, functools.partial(at, part)) for part in smaller)
        end = while_shrinking(proceed, on_all, start, bodies, axes)
    else:
        end = lax.while_loop(proceed, on_all, start)
    products = solver.products(end.solver_state) if linearizes else None
    stats = SolveStats(
        end.best_residual, end.iterations, end.status, end.evaluations, end.trace, products
    )
    samples = tuple(
        tree.where(
            (end.iterations < number)
            | ((end.status == int(Status.DIVERGED)) & (end.iterations <= number)),
            end.best,
            jax.tree.map(lambda samples, index=index: samples[index], end.samples),
        )
        for index, number in enumerate(sample_at)
    )
    return Run(end.best, stats, samples, end.solver_state)


def _evaluated_once(f: Callable[[PyTree], PyTree], z: PyTree, proceed: jax.Array) -> PyTree:
    """f(z), in the branch of a conditional that is always taken.

    XLA's CPU compiler computes the last elementwise operations of f (a normalisation, say) again in
    each use of f(z): the residual, both windows, the selections. It does not look into a branch.
    Elsewhere the condition is a constant, and the conditional disappears.
    """
    proceed = lax.platform_dependent(proceed, cpu=lambda p: p, default=jnp.ones_like)
    return lax.cond(proceed, lambda z: f(z), lambda z: z, z)


def _norms(z: PyTree, fz: PyTree) -> tuple[jax.Array, jax.Array]:
    """`‖f(z) - z‖` and `‖f(z)‖`, without derivatives: a root at zero would have an infinite one."""
    z, fz = lax.stop_gradient((z, fz))
    return tree.norm(tree.subtract(fz, z)), tree.norm(fz)
