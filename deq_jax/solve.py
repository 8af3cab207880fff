"""The one loop that every solver runs in: a `lax.while_loop`, or scans to be differentiated.

A solver is an update rule: from the points seen so far it proposes the next one. All the rest is
here and is the same for all: the evaluation of f, residuals, each sample's own stop and status,
the best iterate, the count, the trace. `Loop` has the parts: how it begins, one trip, when it goes
on, and what it returns. `solve` puts them together.

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
from deq_jax.control import Control, Watch
from deq_jax.progress import Progress
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
        takes_step: it is called with a pair: the number of the evaluation, int32 `[B]`, and the
            state.
        check_every: evaluations between two looks at whether any sample is still active.
        parts: the function for fewer samples, sizes decreasing: `part.at(index)` is that of the
            `part.size` samples `index`. Once only so many are active, the loop goes on with these
            alone.
    """

    @property
    def mesh_axes(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def mixes(self) -> bool: ...  # noqa: D102
    @property
    def takes_step(self) -> bool: ...  # noqa: D102
    @property
    def check_every(self) -> int: ...  # noqa: D102
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


class Carry(NamedTuple):
    """What goes from trip to trip.

    Attributes:
        proceed: boolean, some sample is active.
        evaluations: int32, evaluations so far.
        z: the points to evaluate next, leaves `[B, ...]`.
        state: of the solver.
        best: what will be returned.
        best_residual: `[B]`, its residual.
        best_step: int32 `[B]`, the number of the evaluation it belongs to; None if f takes none.
        scale: `[B]`, a power of two that keeps squares of z and f(z) in range.
        iterations: int32 `[B]`, evaluations until the sample stopped.
        status: int32 `[B]`, `MAX_ITER` while a sample is active.
        trace: `[max_iter, B]`, or None.
        samples: leaves `[number of samples + 1, B, ...]`, or None. The last row is overwritten in
            each trip and never read.
        fold: what the user's fold has come to, or None.
    """

    proceed: jax.Array
    evaluations: jax.Array
    z: PyTree
    state: PyTree
    best: PyTree
    best_residual: jax.Array
    best_step: jax.Array | None
    scale: jax.Array
    iterations: jax.Array
    status: jax.Array
    trace: jax.Array | None
    samples: PyTree
    fold: PyTree

    @property
    def active(self) -> jax.Array:
        """`[B]`, the samples that have not stopped."""
        return self.status == int(Status.MAX_ITER)


class Loop:
    """The parts of a loop: `begin`, `trip`, `ask`, `proceed` and `finish`.

    Attributes:
        limit: most evaluations.
        until: the evaluations after which this loop ends; `limit`, unless another goes on from it.
        asks: whether a sample can stop by itself. With a tolerance of zero nobody can, and no trip
            asks whether anybody is still active.
    """

    def __init__(
        self,
        f: Map,
        solver: Solver,
        control: Control,
        watch: Watch,
        *,
        observed: Callable[[PyTree], PyTree] | None = None,
        sample_at: tuple[int, ...] = (),
        differentiable: bool = False,
        progress: Progress | None = None,
        leave: int = 0,
    ):
        """Arguments as `solve`; `leave` evaluations are left for another loop."""
        self.f, self.solver, self.control, self.watch = f, solver, control, watch
        self.observed, self.sample_at, self.progress = observed, sample_at, progress
        self.differentiable = differentiable
        self.mesh_axes = f.mesh_axes
        self.parts = () if differentiable else f.parts
        if differentiable:
            # As many trips on every device of a `shard_map`: backpropagation sums the cotangents of
            # what is the same on all of them in each trip, and would wait for ever for a device
            # that made fewer.
            manual = jax.sharding.get_abstract_mesh().manual_axes
            self.mesh_axes = tuple(sorted({*self.mesh_axes, *manual}))
        if self.parts and self.mesh_axes:
            raise ValueError(
                "Execution(shrink_to=...) goes on with some samples alone, so f must treat samples "
                f"independently, but it communicates over the mesh axes {self.mesh_axes}"
            )
        self.linearizes = getattr(solver, "linearizes", False)
        self.scale_free = getattr(solver, "scale_free", False)
        self.limit: Any = solver.max_iter
        if watch.budget is not None:
            self.limit = jnp.clip(watch.budget, 1, solver.max_iter)
        self.until: Any = jnp.maximum(self.limit - leave, 0) if leave else self.limit
        no_tolerance = checks.is_exactly(solver.tol, 0) and checks.is_exactly(solver.atol, 0)
        self.asks = watch.stop is not None or not no_tolerance

    def begin(self, z0: PyTree, reference: jax.Array | None) -> Carry:
        """The carry before the first trip."""
        solver = self.solver
        zeros = tree.zeros_per_sample(z0)
        count = zeros.astype(jnp.int32)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), z0)
        needed = count == 0
        if reference is not None:  # one for all: a product may carry from one sample to another
            needed &= tree.any_of(reference != 0, self.mesh_axes)
        return Carry(
            proceed=tree.any_of(needed, self.mesh_axes),
            evaluations=count.sum(dtype=jnp.int32),
            z=z0,
            state=_checked_state(solver, solver.init(z0, shapes)),
            best=z0,
            best_residual=jnp.where(needed, zeros + jnp.inf, 0),
            best_step=count if self.f.takes_step else None,
            scale=zeros + 1 if reference is None else zeros + tree.unit_scale(reference),
            iterations=count,
            status=jnp.where(needed, count + int(Status.MAX_ITER), count + int(Status.CONVERGED)),
            trace=jnp.broadcast_to((zeros + _unused())[None], (solver.max_iter, *zeros.shape))
            if solver.trace
            else None,
            samples=jax.tree.map(lambda z: jnp.stack([0 * z] * (len(self.sample_at) + 1)), z0)
            if self.sample_at
            else None,
            fold=tree.vary_over(self.watch.init, tree.varying_axes(z0)),
        )

    def proceed(self, carry: Carry) -> jax.Array:
        """Whether another trip follows."""
        return carry.proceed & (carry.evaluations < self.until)

    def ask(self, carry: Carry) -> Carry:
        """The carry, told whether any sample is still active, on any device that matters."""
        if not self.asks:
            return carry
        return carry._replace(proceed=tree.any_of(carry.active, self.mesh_axes))

    def body(self, f: Map, reference: jax.Array | None, carry: Carry) -> Carry:
        """`f.check_every` trips, after which the devices agree whether to go on."""
        if f.check_every == 1 or self.differentiable:
            return self.ask(self.trip(f, reference, carry))
        end = jnp.minimum(carry.evaluations + f.check_every, self.until)
        carry = lax.while_loop(
            lambda carry: carry.evaluations < end,
            functools.partial(self.trip, f, reference),
            carry,
        )
        return self.ask(carry)

    def trip(
        self, f: Map, reference: jax.Array | None, carry: Carry, stops: jax.Array | None = None
    ) -> Carry:
        """One evaluation of f, and all that follows from it.

        Args:
            f: the function, for the samples of `carry`.
            reference: see `solve`.
            carry: from `begin` or the trip before.
            stops: whether a sample may stop as converged in this trip; None is True.
        """
        solver, control, watch = self.solver, self.control, self.watch
        z, active = carry.z, carry.active
        number = carry.evaluations + 1

        # f(z), once.
        step = carry.evaluations + tree.zeros_per_sample(z).astype(jnp.int32)
        at = (step, z) if f.takes_step else z
        product, aux = None, None
        if self.observed is not None:
            fz, aux = self.observed(lax.stop_gradient(at))
        if self.linearizes:
            fz, product = f.linearize(at)
        elif self.differentiable:
            fz = f(at)
        elif self.observed is None:
            fz = _evaluated_once(f, at, z, carry.proceed)

        # The residual ‖f(z) - z‖ / (ε + ‖f(z)‖), of both times a power of two.
        if watch.norm is not None and reference is None:
            scale = carry.scale
            absolute, size = watch.measure(*lax.stop_gradient((z, fz)))
        else:
            choose = (carry.evaluations == 0) & (reference is None)
            together = self.asks and f.check_every == 1
            scale, absolute, size = _measured(carry.scale, choose, z, fz, together=together)
        if reference is None:
            guarded = size + jnp.finfo(size.dtype).tiny
        else:  # against a reference of zero (a zero cotangent) nothing is left to divide by
            guarded = jnp.where(reference > 0, reference * scale, 1)
        residual = absolute / guarded
        finite = jnp.isfinite(absolute) & jnp.isfinite(size)

        # Whether a sample has arrived: by a tolerance or by the user's test.
        tol, atol = (checks.in_dtype(o, residual.dtype) for o in (solver.tol, solver.atol))
        met = residual <= tol
        if not checks.is_exactly(solver.atol, 0):
            met |= (absolute <= atol * scale) & (atol > 0)
        if watch.stop is not None:
            met |= watch.stop(lax.stop_gradient((z, fz, aux)))
        if control.min_iter > 1:
            met &= number >= control.min_iter
        if stops is not None:
            met &= stops

        # What that makes of an active sample, and of one that had arrived: it has to go on if its
        # residual, measured again among the others, is too large now. (With parts, f treats
        # samples apart, and their sizes differ in rounding: nobody is measured again. Neither where
        # each evaluation is of another function, nor where the last iterate is wanted.)
        wakes = not self.parts and not f.takes_step and control.select == "best"
        resting = finite & (carry.status == int(Status.CONVERGED)) & wakes
        woken = resting & ~met
        status = jnp.where(met, int(Status.CONVERGED), int(Status.MAX_ITER))
        status = jnp.where(finite, status, int(Status.DIVERGED))
        status = jnp.where(active | resting, status, carry.status)

        # The next point.
        given = z, fz
        if self.scale_free:
            given = tree.scale(scale, z), tree.scale(scale, fz)
        extra = {}
        if self.linearizes:
            wanted = (status == int(Status.MAX_ITER)) & (number < self.limit)
            extra = {"product": product, "active": wanted}
        proposal, state = _pair(solver, solver.step(*given, carry.state, **extra))
        name = f"{type(solver).__name__}.step must return"
        checks.check_same_form(f"{name} a next point with", "z", proposal, z)
        checks.check_same_form(f"{name} a state with", "the state from init", state, carry.state)
        if self.scale_free:
            proposal = tree.scale(1 / scale, proposal)

        # What would be returned: the best iterate, or the last proposal. Where `atol` is met, an
        # earlier iterate may have a lower relative residual.
        if control.select == "best":
            better = met | (residual < carry.best_residual)
            if f.mixes:
                better |= number == self.limit
            improved = (active & finite & better) | woken
            best, best_step = tree.where(improved, z, carry.best), step
        else:
            usable = jnp.isfinite(tree.norm(lax.stop_gradient(proposal)))
            status = jnp.where(active & ~usable, int(Status.DIVERGED), status)
            improved = active & finite & usable
            best, best_step = tree.where(improved, proposal, carry.best), step + 1
        still_active = status == int(Status.MAX_ITER)

        trace, samples, fold = carry.trace, carry.samples, carry.fold
        if trace is not None:
            row = jnp.where(active | woken, residual, _unused())
            trace = lax.dynamic_update_index_in_dim(trace, row, carry.evaluations, 0)
        if samples is not None:  # a row is overwritten until its evaluation has come
            rows = jnp.asarray(self.sample_at, jnp.int32)
            row = jnp.sum(rows <= carry.evaluations)
            samples = jax.tree.map(
                lambda samples, z: lax.dynamic_update_index_in_dim(samples, z, row, 0), samples, z
            )
        if watch.fold is not None:
            fold = watch.fold(lax.stop_gradient((fold, z, fz, aux)))
        if self.progress is not None:
            self.progress.report(number, residual, active)
        return Carry(
            proceed=carry.proceed,
            evaluations=number,
            # Frozen samples rest at a finite point, so that no NaN goes round in f.
            z=tree.where(still_active, proposal, best),
            state=state,
            best=best,
            best_residual=jnp.where(improved | resting, residual, carry.best_residual),
            best_step=None
            if carry.best_step is None
            else jnp.where(improved, best_step, carry.best_step),
            scale=scale,
            iterations=jnp.where(active | woken, number, carry.iterations),
            status=status,
            trace=trace,
            samples=samples,
            fold=fold,
        )

    def finish(self, end: Carry) -> Solution:
        """What the loop returns, from its last carry."""
        counting: Any = self.solver
        stats = SolveStats(
            end.best_residual,
            end.iterations,
            end.status,
            end.evaluations,
            end.trace,
            counting.products(end.state) if self.linearizes else None,
            end.best_step,
            end.fold,
        )
        samples, steps = [], []
        for index, number in enumerate(self.sample_at):
            diverged = (end.status == int(Status.DIVERGED)) & (end.iterations <= number)
            stopped = (end.iterations < number) | diverged
            sample = jax.tree.map(lambda samples, index=index: samples[index], end.samples)
            samples.append(tree.where(stopped, end.best, sample))
            if end.best_step is not None:
                steps.append(jnp.where(stopped, end.best_step, number - 1))
        return Solution(end.best, stats, tuple(samples), end.state, sample_steps=tuple(steps))


def solve(
    f: Map,
    z0: PyTree,
    solver: Solver,
    control: Control = Control(),  # noqa: B008  (frozen)
    watch: Watch = Watch(),  # noqa: B008  (immutable)
    *,
    observed: Callable[[PyTree], PyTree] | None = None,
    reference: jax.Array | None = None,
    sample_at: tuple[int, ...] = (),
    differentiable: bool = False,
    progress: Progress | None = None,
) -> Solution:
    """Solves `z = f(z)` for every sample, from `z0`, by `solver`.

    Each trip evaluates f once. A sample stops when its residual

        ‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)      (norms over all leaves of the sample)

    is at most `tol`, when `‖f(z) - z‖₂` is at most a positive `atol`, or when a norm is not
    finite; ε is the smallest normal number, so that only an f(z) of exactly zero needs it. f is
    evaluated on stopped samples too. One whose residual is above its tolerance again, because f
    mixes samples and the others have moved, goes on. The loop ends when no sample is active or
    after `max_iter` evaluations. `control` changes norm, stop and what is returned.

    Args:
        f: function of the state alone; returns its structure, shapes and dtypes.
        z0: the start, inexact leaves `[B, ...]`.
        solver: the update rule and the bounds.
        control: when to go on and what to return.
        watch: the functions in `control`, traced.
        observed: the function that also returns what f returns beside z, for `watch`.
        reference: `[B]`, stands for `‖f(z)‖₂` in the residual where given; a linear system
            `u = Jᵀu + y` is measured against `‖y‖`. If it is zero throughout, the start, which
            must be zero too, is the solution, and nothing is evaluated.
        sample_at: numbers of evaluations, increasing, counted from 1; the points evaluated then
            are returned too. Samples that had stopped give their final state.
        differentiable: make the loop out of `scan`, so that it can be differentiated in reverse.
        progress: shows how far the loop is.

    Returns:
        Per sample the iterate that met a tolerance, else the one with the lowest residual, and the
        residual of exactly that iterate, among the others as they are returned.
    """
    loop = Loop(
        f,
        solver,
        control,
        watch,
        observed=observed,
        sample_at=sample_at,
        differentiable=differentiable,
        progress=progress,
    )

    def on_part(part: Any, index: jax.Array) -> Callable[[Carry], Carry]:
        return functools.partial(loop.body, part.at(index), tree.take(reference, index))

    start, on_all = loop.begin(z0, reference), functools.partial(loop.body, f, reference)
    if differentiable:
        end = while_as_scans(loop.proceed, on_all, start, solver.max_iter)
    elif loop.parts:
        axes = batch_axes(loop.begin, (z0, reference), loop.parts[0].size)
        bodies = tuple(Phase(part.size, functools.partial(on_part, part)) for part in loop.parts)
        end = while_shrinking(loop.proceed, on_all, start, bodies, axes)
    else:
        end = lax.while_loop(loop.proceed, on_all, start)
    return loop.finish(end)


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
    scale: jax.Array, choose: jax.Array, z: PyTree, fz: PyTree, *, together: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The scale of each sample, `[B]`, and `‖f(z) - z‖` and `‖f(z)‖` times it.

    Where the scalar `choose` holds, the scale is chosen anew. Without derivatives: a norm of zero
    would have an infinite one. With `together`, all samples decide as one whether products with
    their scales are needed at all, which saves time; over a sharded batch it is an agreement.
    """
    scale, z, fz = lax.stop_gradient((scale, z, fz))
    axes = tree.varying_axes((scale, z, fz))

    def norms(z: PyTree, fz: PyTree) -> tuple[jax.Array, jax.Array]:
        return tree.norm(tree.subtract(fz, z)), tree.norm(fz)

    def chosen() -> jax.Array:
        # JAX 0.12 takes the exponents of `frexp` for the same on all devices of a shard_map.
        return tree.vary_over(tree.unit_scale(z, fz), axes)

    def scaled(scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return scale, *norms(tree.scale(scale, z), tree.scale(scale, fz))

    scale = tree.vary_over(scale, axes)
    if not together:
        return scaled(lax.cond(choose, chosen, lambda: scale))
    plain = scale, *norms(z, fz)
    unusual = choose & ~jnp.all(tree.is_ordinary(jnp.maximum(*plain[1:])))
    return lax.cond(
        unusual | jnp.any(scale != 1),
        lambda scale, *_: scaled(jnp.where(choose, chosen(), scale)),
        lambda *plain: plain,
        *plain,
    )


def _evaluated_once(
    f: Callable[[PyTree], PyTree], at: PyTree, z: PyTree, proceed: jax.Array
) -> PyTree:
    """f(z), in the branch of a conditional that is always taken; `at` is what f is given.

    XLA's CPU compiler computes the last elementwise operations of f (a normalisation, say) again in
    each use of f(z): the residual, both windows, the selections. It does not look into a branch.
    Elsewhere the condition is a constant, and the conditional disappears.
    """
    proceed = lax.platform_dependent(proceed, cpu=lambda p: p, default=jnp.ones_like)
    return lax.cond(proceed, lambda at, z: f(at), lambda at, z: z, at, z)
