"""The one loop that every solver runs in: a `lax.while_loop`, or scans to be differentiated.

A solver is an update rule: from the points seen so far it proposes the next one. All the rest is
here and is the same for all: the evaluation of f, residuals, each sample's own stop and status,
the best iterate, the count, the trace.

Known to be non-optimal: a finished sample is frozen, but f is still evaluated on it until the last
sample of the batch has stopped. Where f can be had for fewer samples (`f.parts`), they leave.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.shrinking import Phase, batch_axes, while_shrinking
from deq_jax.stats import Solution, SolveStats, Status
from deq_jax.unrolling import while_as_scans

PyTree = Any


@runtime_checkable
class Solver(Protocol):
    """What a solver has to have; any object with these runs in `solve`.

    A solver that uses more than the values of f sets `linearizes = True`. Its step then receives
    two keyword arguments, `product`, the map `v -> ∂f/∂z v` at z, and `active`, `[B]`, the samples
    still wanted, and it has a method `products(state)` that tells how many products it computed.

    A solver that takes the same steps for f and for `s f(z / s)` may set `scale_free = True`. At
    sizes whose squares would overflow or vanish its step is then given z and fz times a power of
    two.

    Attributes:
        tol: bound on the relative residual.
        atol: bound on the absolute residual `‖f(z) - z‖`; 0 leaves it out. Either bound stops.
        max_iter: most evaluations of f.
        trace: keep the residual of every evaluation.
    """

    @property
    def tol(self) -> Any: ...  # noqa: D102
    @property
    def atol(self) -> Any: ...  # noqa: D102
    @property
    def max_iter(self) -> int: ...  # noqa: D102
    @property
    def trace(self) -> bool: ...  # noqa: D102

    def init(self, z: Any, fz: Any, /) -> Any:
        """The solver's state before the first evaluation.

        Args:
            z: the start, leaves `[B, ...]`. Make arrays from it (`0 * z`, `tree.zeros_per_sample`)
                and not from constants: inside `shard_map` a loop's carry must vary as its data do.
            fz: structure, shapes and dtypes of what f will return (`jax.ShapeDtypeStruct`); there
                are no values yet, because f is evaluated in the loop and nowhere else.
        """
        ...

    def step(self, z: Any, fz: Any, state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The next point to evaluate and the new state, from the point `z` and `fz = f(z)`.

        Must treat samples apart: sums run over all axes but the first. A sample that has stopped
        passes through too, and what is proposed for it is thrown away.
        """
        ...


class Map(Protocol):
    """A function of the state as a loop needs it: a `Closure`, or `adjoint.Affine`.

    Attributes:
        mesh_axes: axes of a `shard_map` over which it communicates. Devices along them go on
            together until none has an active sample; along others each stops by itself.
        mixes: samples are seen not to be independent. What is returned if not all converge is then
            the last batch that was evaluated, since no other has the residuals that are reported.
        parts: the function for fewer samples, sizes decreasing: `part.at(index)` is that of the
            `part.size` samples `index`. Once only so many are active, the loop goes on with these
            alone.
    """

    @property
    def mesh_axes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def mixes(self) -> bool: ...  # noqa: D102
    @property
    def parts(self) -> tuple[Any, ...]: ...  # noqa: D102

    def __call__(self, z: Any, /) -> Any:
        """The function at `z`."""
        ...

    def linearize(self, z: Any, /) -> tuple[Any, Any]:
        """The function at `z` and its derivative there, a `Map`."""
        ...


def check_solver(name: str, solver: Any) -> None:
    """Raises a TypeError that names the argument unless `solver` can run in the loop."""
    if isinstance(solver, type) or not isinstance(solver, Solver):
        raise TypeError(
            f"{name} must be a solver such as Anderson() or Picard(), or an object with tol, atol, "
            f"max_iter, trace, init and step; got {solver!r}"
        )
    checks.check_stopping(solver)


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


class _Carry(NamedTuple):
    proceed: jax.Array  # bool []
    evaluations: jax.Array  # int32 []
    z: PyTree  # the point to evaluate next
    state: PyTree  # of the solver
    best: PyTree
    best_residual: jax.Array  # [B]
    scale: jax.Array  # [B], power of two that keeps squares of z and f(z) in range
    iterations: jax.Array  # int32 [B]
    status: jax.Array  # int32 [B]; MAX_ITER while a sample is at work
    trace: jax.Array | None  # [max_iter, B]
    samples: PyTree  # [number of samples + 1, B, ...], the last row is overwritten and never read

    @property
    def active(self) -> jax.Array:
        return self.status == int(Status.MAX_ITER)


def solve(
    f: Map,
    z0: PyTree,
    solver: Solver,
    *,
    reference: jax.Array | None = None,
    sample_at: tuple[int, ...] = (),
    differentiable: bool = False,
) -> Solution:
    """Solves `z = f(z)` for every sample, from `z0`, by `solver`.

    Each trip evaluates f once. A sample stops when its residual

        ‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)      (norms over all leaves of the sample)

    is at most `tol`, when `‖f(z) - z‖₂` is at most a positive `atol`, or when a norm is not
    finite; ε is the smallest normal number, so that only an f(z) of exactly zero needs it. f is
    evaluated on stopped samples too. One whose residual is above its tolerance again, because f
    mixes samples and the others have moved, goes on. The loop ends when no sample is active or
    after `max_iter` evaluations.

    Args:
        f: function of the state alone; returns its structure, shapes and dtypes.
        z0: the start, inexact leaves `[B, ...]`.
        solver: the update rule and the bounds.
        reference: `[B]`, stands for `‖f(z)‖₂` in the residual where given; a linear system
            `u = Jᵀu + y` is measured against `‖y‖`. If it is zero throughout, the start, which
            must be zero too, is the solution, and nothing is evaluated.
        sample_at: numbers of evaluations, increasing, counted from 1; the points evaluated then
            are returned too. Samples that had stopped give their final state.
        differentiable: make the loop out of `scan`, so that it can be differentiated in reverse.

    Returns:
        Per sample the iterate that met a tolerance, else the one with the lowest residual, and the
        residual of exactly that iterate, among the others as they are returned.
    """
    mesh_axes, parts = f.mesh_axes, f.parts
    if differentiable:
        # As many trips on every device of a `shard_map`: backpropagation sums the cotangents of
        # what is the same on all of them in each trip, and would wait for ever for a device that
        # made fewer.
        mesh_axes = tuple(sorted({*mesh_axes, *jax.sharding.get_abstract_mesh().manual_axes}))
        parts = ()
    if parts and mesh_axes:
        raise ValueError(
            "Execution(shrink_to=...) goes on with some samples alone, so f must treat samples "
            f"independently, but it communicates over the mesh axes {mesh_axes}"
        )
    linearizes = getattr(solver, "linearizes", False)
    rows = jnp.asarray(sample_at, jnp.int32)

    def any_active(active: jax.Array) -> jax.Array:
        return tree.any_of(active, mesh_axes)

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
            state=_checked_state(solver, solver.init(z0, shapes)),
            best=z0,
            best_residual=jnp.where(needed, zeros + jnp.inf, 0),
            scale=zeros + 1 if reference is None else zeros + tree.unit_scale(reference),
            iterations=count,
            status=jnp.where(needed, count + int(Status.MAX_ITER), count + int(Status.CONVERGED)),
            trace=jnp.broadcast_to((zeros + _unused())[None], (solver.max_iter, *zeros.shape))
            if solver.trace
            else None,
            samples=jax.tree.map(lambda z: jnp.stack([0 * z] * (len(sample_at) + 1)), z0)
            if sample_at
            else None,
        )

    def proceed(carry: _Carry) -> jax.Array:
        return carry.proceed & (carry.evaluations < solver.max_iter)

    def body(f: Map, reference: jax.Array | None, carry: _Carry) -> _Carry:
        z, active = carry.z, carry.active
        # f(z), once.
        product = None
        if linearizes:
            fz, product = f.linearize(z)
        else:
            fz = f(z) if differentiable else _evaluated_once(f, z, carry.proceed)

        # The residual ‖f(z) - z‖ / (ε + ‖f(z)‖), of both times a power of two.
        choose = (carry.evaluations == 0) & (reference is None)
        scale, absolute, size = _measured(carry.scale, choose, z, fz)
        if reference is None:
            guarded = size + jnp.finfo(size.dtype).tiny
        else:  # against a reference of zero (a zero cotangent) nothing is left to divide by
            guarded = jnp.where(reference > 0, reference * scale, 1)
        residual = absolute / guarded
        finite = jnp.isfinite(absolute) & jnp.isfinite(size)

        # What that makes of an active sample, and of one that had arrived: it has to go on if its
        # residual, measured again among the others, is too large now. (With parts, f treats
        # samples apart, and their sizes differ in rounding: nobody is measured again.)
        tol, atol = (checks.in_dtype(o, residual.dtype) for o in (solver.tol, solver.atol))
        met = residual <= tol
        if not checks.is_exactly(solver.atol, 0):
            met |= (absolute <= atol * scale) & (atol > 0)
        resting = finite & (carry.status == int(Status.CONVERGED)) & (not parts)
        woken = resting & ~met
        status = jnp.where(met, int(Status.CONVERGED), int(Status.MAX_ITER))
        status = jnp.where(finite, status, int(Status.DIVERGED))
        status = jnp.where(active | resting, status, carry.status)
        still_active = status == int(Status.MAX_ITER)

        # The best iterate. Where `atol` is met, an earlier iterate may have a lower relative
        # residual.
        better = met | (residual < carry.best_residual)
        if f.mixes:
            better |= carry.evaluations + 1 == solver.max_iter
        improved = (active & finite & better) | woken
        best = tree.where(improved, z, carry.best)

        # The next point.
        given = z, fz
        if getattr(solver, "scale_free", False):
            given = tree.scale(scale, z), tree.scale(scale, fz)
        extra = {}
        if linearizes:
            wanted = still_active & (carry.evaluations + 1 < solver.max_iter)
            extra = {"product": product, "active": wanted}
        proposal, state = _pair(solver, solver.step(*given, carry.state, **extra))
        name = f"{type(solver).__name__}.step must return"
        checks.check_same_form(f"{name} a next point with", "z", proposal, z)
        checks.check_same_form(f"{name} a state with", "the state from init", state, carry.state)
        if getattr(solver, "scale_free", False):
            proposal = tree.scale(1 / scale, proposal)

        trace, samples = carry.trace, carry.samples
        if trace is not None:
            row = jnp.where(active | woken, residual, _unused())
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
            state=state,
            best=best,
            best_residual=jnp.where(improved | resting, residual, carry.best_residual),
            scale=scale,
            iterations=jnp.where(active | woken, carry.evaluations + 1, carry.iterations),
            status=status,
            trace=trace,
            samples=samples,
        )

    def on_part(part: Any, index: jax.Array) -> Callable[[_Carry], _Carry]:
        return functools.partial(body, part.at(index), tree.take(reference, index))

    start, on_all = begin(z0, reference), functools.partial(body, f, reference)
    if differentiable:
        end = while_as_scans(proceed, on_all, start, solver.max_iter)
    elif parts:
        axes = batch_axes(begin, (z0, reference), parts[0].size)
        bodies = tuple(Phase(part.size, functools.partial(on_part, part)) for part in parts)
        end = while_shrinking(proceed, on_all, start, bodies, axes)
    else:
        end = lax.while_loop(proceed, on_all, start)
    counting: Any = solver
    products = counting.products(end.state) if linearizes else None
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
    return Solution(end.best, stats, samples, end.state)


def _checked_state(solver: Solver, state: PyTree) -> PyTree:
    """What a solver's init returned, if its leaves are arrays."""
    for name, leaf in checks.named_leaves(state):
        if not checks.is_array(leaf):
            raise ValueError(
                f"{type(solver).__name__}.init must return a state of arrays, leaf {name} is "
                f"{leaf!r}"
            )
    return state


def _pair(solver: Solver, returned: Any) -> tuple[PyTree, PyTree]:
    """What a solver's step returned, if that is a pair."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise ValueError(
            f"{type(solver).__name__}.step must return a pair, the next point and the new state, "
            f"got {returned!r}"
        )
    return returned


def _unused() -> float:
    """What stands in a trace after the stop: NaN, or infinity where JAX is told to forbid NaN."""
    return jnp.inf if jax.debug_nans.value else jnp.nan


def _measured(
    scale: jax.Array, choose: jax.Array, z: PyTree, fz: PyTree
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scale of each sample, `[B]`, and `‖f(z) - z‖` and `‖f(z)‖` times it.

    Where `choose` holds the scale is chosen anew. Without derivatives: a norm of zero would have
    an infinite one.
    """
    scale, z, fz = lax.stop_gradient((scale, z, fz))
    axes = tree.varying_axes((scale, z, fz))

    def norms(z: PyTree, fz: PyTree) -> tuple[jax.Array, jax.Array]:
        return tree.norm(tree.subtract(fz, z)), tree.norm(fz)

    def scaled(scale: jax.Array, *_: jax.Array) -> tuple[jax.Array, ...]:
        # JAX 0.12 takes the exponents of `frexp` for the same on all devices of a shard_map.
        chosen = tree.vary_over(tree.unit_scale(z, fz), axes)
        scale = jnp.where(choose, chosen, scale)
        return scale, *norms(tree.scale(scale, z), tree.scale(scale, fz))

    plain = tree.vary_over(scale, axes), *norms(z, fz)
    unusual = choose & ~jnp.all(tree.is_ordinary(jnp.maximum(*plain[1:])))
    return lax.cond(unusual | jnp.any(scale != 1), scaled, lambda *plain: plain, *plain)


def _evaluated_once(f: Callable[[PyTree], PyTree], z: PyTree, proceed: jax.Array) -> PyTree:
    """f(z), in the branch of a conditional that is always taken.

    XLA's CPU compiler computes the last elementwise operations of f (a normalisation, say) again in
    each use of f(z): the residual, both windows, the selections. It does not look into a branch.
    Elsewhere the condition is a constant, and the conditional disappears.
    """
    proceed = lax.platform_dependent(proceed, cpu=lambda p: p, default=jnp.ones_like)
    return lax.cond(proceed, lambda z: f(z), lambda z: z, z)
