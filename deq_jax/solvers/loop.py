"""The one `while_loop` that every solver runs in.

A solver is an update rule: from the points seen so far it proposes the next one. All the rest is
here and is the same for all: the evaluation of f, residuals, each sample's own stop and status,
the best iterate, the count, the trace.

Known to be non-optimal: a finished sample is frozen, but f is still evaluated on it until the last
sample of the batch has stopped.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.stats import Solution, SolveStats, Status

PyTree = Any

EPSILON = 1e-9
"""ε of the relative residual `‖f(z) - z‖ / (ε + ‖f(z)‖)`: decides only where f(z) vanishes."""


@runtime_checkable
class Solver(Protocol):
    """What a solver has to have; any hashable object with these runs in `iterate`.

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


def iterate(
    f: Callable[[PyTree], PyTree],
    z0: PyTree,
    solver: Solver,
    *,
    reference: jax.Array | None = None,
    mesh_axes: tuple[str, ...] = (),
) -> Solution:
    """Solves `z = f(z)` for every sample, from `z0`, by `solver`.

    Each trip evaluates f once. A sample stops when its residual

        ‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)      (norms over all leaves of the sample)

    is at most `tol`, when `‖f(z) - z‖₂` is at most a positive `atol`, or when a norm is not
    finite. The loop ends when no sample is active or after `max_iter` evaluations.

    Args:
        f: function of the state alone; returns its structure, shapes and dtypes.
        z0: the start, inexact leaves `[B, ...]`.
        solver: the update rule and the bounds.
        reference: `[B]`, stands for `‖f(z)‖₂` in the residual where given; a linear system
            `u = Jᵀu + y` is measured against `‖y‖`.
        mesh_axes: axes of a `shard_map` over which f communicates. Devices along them go on
            together until none has an active sample; along others each stops by itself.

    Returns:
        Per sample the iterate with the lowest residual, and the residual of exactly that iterate.
    """
    zeros = tree.zeros_per_sample(z0)
    count = zeros.astype(jnp.int32)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), z0)

    def any_active(active: jax.Array) -> jax.Array:
        more = jnp.any(active)
        return lax.pmax(more.astype(jnp.int32), mesh_axes) > 0 if mesh_axes else more

    start = _Carry(
        proceed=any_active(count == 0),
        evaluations=count.sum(dtype=jnp.int32),
        z=z0,
        solver_state=solver.init(z0, shapes),
        active=count == 0,
        best=z0,
        best_residual=zeros + jnp.inf,
        iterations=count,
        status=count + int(Status.MAX_ITER),
        trace=jnp.broadcast_to(zeros + jnp.nan, (solver.max_iter, *zeros.shape))
        if solver.trace
        else None,
    )

    def proceed(carry: _Carry) -> jax.Array:
        return carry.proceed & (carry.evaluations < solver.max_iter)

    def body(carry: _Carry) -> _Carry:
        z, active = carry.z, carry.active
        fz = f(z)
        absolute = tree.norm(tree.subtract(fz, z))
        size = tree.norm(fz) if reference is None else reference
        # Against a reference of zero (a zero cotangent) nothing is left to divide by.
        guarded = size + EPSILON if reference is None else jnp.where(size > 0, size, 1)
        residual = absolute / guarded
        finite = jnp.isfinite(absolute) & jnp.isfinite(size)

        met = residual <= solver.tol
        if solver.atol > 0:
            met |= absolute <= solver.atol
        converged = active & finite & met
        diverged = active & ~finite
        improved = active & finite & (residual < carry.best_residual)
        best = tree.where(improved, z, carry.best)
        status = jnp.where(converged, int(Status.CONVERGED), carry.status)
        status = jnp.where(diverged, int(Status.DIVERGED), status)
        still_active = active & ~converged & ~diverged

        proposal, solver_state = solver.step(z, fz, carry.solver_state)
        trace = carry.trace
        if trace is not None:
            row = jnp.where(active, residual, jnp.nan)
            trace = lax.dynamic_update_index_in_dim(trace, row, carry.evaluations, 0)
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
        )

    end = lax.while_loop(proceed, body, start)
    return Solution(
        end.best,
        SolveStats(end.best_residual, end.iterations, end.status, end.evaluations, end.trace),
    )
