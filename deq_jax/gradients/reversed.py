"""Backpropagation through a reversible solver, whose iterates are computed again backwards.

With the points s_k of `Reversible` and λ_k the cotangent of s_k, one step backwards is

    s_{k-1} = (s_{k+1} - β f(s_k)) / (1 - β)
    λ_k     = λ̃_k + β J_kᵀ λ_{k+1},      λ̃_{k-1} = (1 - β) λ_{k+1},      p̄ += β (∂f/∂p)ᵀ λ_{k+1},

J_k = ∂f/∂z at s_k. It needs two points and two cotangents, however many steps there were.

Source: McCallum, Arora and Foster, "Reversible deep equilibrium models", 2025, arXiv 2509.12917.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.closure import Closure
from deq_jax.control import Control, Watch
from deq_jax.gradients.policy import refuse_attach
from deq_jax.passes import LoopBody
from deq_jax.solve import Solver, check_samples, solve
from deq_jax.solvers.reversible import Reversible, ReversibleState, rounded_state
from deq_jax.stats import BackwardProbe, Solution, SolveStats, Status

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Reversed:
    """Gradient of the returned iterate, as of `Unrolled()`, without a stored iterate.

    Goes with `solver=Reversible(...)` alone, whose iterates the backward pass computes again from
    the last two. Every sampled state is differentiated the same way. Bias: none with respect to
    what was computed, but for the rounding that grows on the way back: see `Reversible` and the
    table in docs/gradients.md. With respect to the equation it is that of a solution that is not
    exact.

    Cost: two evaluations and a product for each evaluation of the forward pass. Memory: that of
    one linearisation of f and of eight states with two components; it does not depend on the number
    of evaluations.

    A `BackwardProbe` reports how well the way back was found: `residual` is the distance of the
    start that was reached from the true one, relative to the larger of the start and the solution.
    It bounds the error of all points between. `iterations` are the steps backwards, and the status
    is `CONVERGED` where the residual is at most √eps of the state's dtype, 3e-4 in float32.

    It has first derivatives in reverse mode only. f must treat samples independently. With
    `batched=False` the whole state is one sample, and f may combine all of it.

    Raises:
        TypeError: the solver is not `Reversible`.
        ValueError: the evaluations would forget more bits than the state has, so that there is no
            way back; the message says how many `components` it takes. Or f mixes samples.
    """

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""
        if not isinstance(solver, Reversible):
            raise TypeError(
                "Reversed() runs the solver backwards, which only solver=Reversible(...) allows; "
                f"got {solver!r}. Take Unrolled() to differentiate its iterates"
            )

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> Any:
        """Raises: a solution alone does not say how it was found."""
        refuse_attach(self)

    def solve(
        self,
        f: Closure,
        z0: PyTree,
        solver: Reversible,
        control: Control,
        watch: Watch,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        **options: Any,
    ) -> Solution:
        """See `GradientPolicy`; `probe` takes up the report of the backward pass."""
        if f.takes_step:
            raise ValueError(
                "Reversed() computes the iterates again, from the last to the first, and needs the "
                "same f in every evaluation; it does not go with pass_step=True. Take Unrolled()"
            )
        if control.select != "best":
            raise ValueError(
                "Reversed() differentiates points that f was evaluated on; it does not go with "
                'Control(select="last")'
            )
        _check_components(solver, z0)
        check_samples(sample_at, solver)
        f = dataclasses.replace(f, parts=())
        if f.mixes:
            raise ValueError(
                "Reversed() needs an f that treats samples independently, but f is seen to mix "
                "them; pass batched=False, which makes the batch one equation"
            )
        body = _Isolated(LoopBody(lax.stop_gradient(f)))
        if (observed := options.pop("observed", None)) is not None:
            options["observed"] = lambda z: (body(z), observed(z)[1])
        # The residuals of all evaluations tell which point was returned.
        traced = dataclasses.replace(solver, trace=True)
        solution = solve(body, z0, traced, control, watch, sample_at=sample_at, **options)
        solution = lax.stop_gradient(solution)
        numbers = _numbers(solution.stats, sample_at)
        states = (solution.value, *solution.samples)
        record = _Record(solver, solution.state, z0, numbers)
        value, *samples = _reversed(f, states, record, probe)
        stats = solution.stats
        if not solver.trace:
            stats = stats._replace(trace=None)
        return Solution(value, stats, tuple(samples), solution.state)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Record:
    """What the backward pass starts from.

    Attributes:
        solver: the solver.
        last: its last two points.
        z0: the start.
        numbers: int32 `[B]` for each differentiated state, the evaluation that it was the point of.
    """

    solver: Reversible
    last: ReversibleState
    z0: PyTree
    numbers: tuple[jax.Array, ...]


class _Isolated:
    """A function that the compiler joins with nothing around it, a `solve.Map`.

    The way back needs the very bits of f(z) that the way there had. Fused with other operations,
    the same product and sum may be rounded once or twice, and each use of f(z) may compute its last
    operations anew. XLA's CPU compiler drops the barriers but does not look into a branch. The
    condition is the same for all lanes of a `vmap`, so that it remains one. Elsewhere it is a
    constant, and the barriers do it.
    """

    parts = ()
    takes_step = False
    check_every = 1

    def __init__(self, body: LoopBody):
        self._body = body

    def __call__(self, z: PyTree) -> PyTree:
        z, always = lax.optimization_barrier((z, jnp.bool_(True)))
        always = lax.platform_dependent(always, cpu=lambda p: p, default=jnp.ones_like)
        return lax.optimization_barrier(lax.cond(always, self._body, lambda z: z, z))

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        return self._body.mesh_axes

    @property
    def mixes(self) -> bool:
        return self._body.mixes

    def linearize(self, z: PyTree) -> tuple[PyTree, Any]:
        return self._body.linearize(z)


def _check_components(solver: Reversible, z0: PyTree) -> None:
    """Raises where the way back is sure to be lost in rounding."""
    if solver.components is None or isinstance(solver.damping, jax.core.Tracer):
        return
    for leaf in jax.tree.leaves(z0):
        dtype = tree.accumulation_dtype(leaf.dtype)
        if solver.components < solver.components_needed(dtype, most=False):
            needed = solver.components_needed(dtype, most=True)
            raise ValueError(
                f"{solver!r} has too few components: {solver.max_iter} evaluations forget more "
                f"bits than {solver.components} of {dtype} hold, so that there is no way back; "
                f"take components={needed}, or None, or a smaller damping or max_iter"
            )


def _numbers(stats: SolveStats, sample_at: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """The evaluation, from 1, at which the value and each sample was the point, `[B]`."""
    trace: Any = stats.trace
    best = jnp.argmin(jnp.where(jnp.isnan(trace), jnp.inf, trace), axis=0).astype(jnp.int32) + 1
    returned = jnp.where(stats.converged, stats.iterations, best)
    diverged = stats.status == int(Status.DIVERGED)

    def of_sample(number: int) -> jax.Array:
        stopped = (stats.iterations < number) | (diverged & (stats.iterations <= number))
        return jnp.where(stopped, returned, number)

    return (returned, *map(of_sample, sample_at))


@jax.custom_vjp
def _reversed(
    f: Closure, states: tuple[PyTree, ...], record: _Record, probe: BackwardProbe | None
) -> tuple[PyTree, ...]:
    return states


def _reversed_forward(
    f: Closure, states: tuple[PyTree, ...], record: _Record, probe: BackwardProbe | None
) -> Any:
    return states, (f, states[0], record, probe)


def _reversed_backward(saved: Any, cotangents: tuple[PyTree, ...]) -> Any:
    f, value, record, probe = saved
    total, stats = _run_back(f, value, record, cotangents)
    given = iter(total)
    leaves = [next(given) if mine else None for mine in f.inexact()]
    report = None if probe is None else BackwardProbe.of(stats)
    return jax.tree.unflatten(jax.tree.structure(f), leaves), None, None, report


_reversed.defvjp(_reversed_forward, _reversed_backward)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["points", "cotangent", "partial", "total", "lost"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class _Carry:
    points: ReversibleState  # s_n, s_{n+1} and n of each sample
    cotangent: PyTree  # λ_{n+1}
    partial: PyTree  # λ̃_n, the part of λ_n that comes from s_{n+2}
    total: list[Any]  # the cotangents of the variables of f
    lost: jax.Array  # bool [B], a point was not finite or is missing


@jax.custom_jvp
def _run_back(
    f: Closure, value: PyTree, record: _Record, cotangents: tuple[PyTree, ...]
) -> tuple[list[Any], SolveStats]:
    """The cotangents of the variables of f, and the report."""
    solver, z0 = record.solver, record.z0
    variables, rebuild = f.variables()
    body = _Isolated(LoopBody(f))

    def pull(point_and_seed: tuple[PyTree, PyTree]) -> tuple[list[Any], PyTree]:
        point, seed = point_and_seed
        _, pullback = jax.vjp(lambda variables, z: rebuild(variables)(z), variables, point)
        return pullback(seed)

    # Traced as a function of the point, and what depends on the variables alone taken out.
    pull_one = LoopBody(Closure.of(pull, (z0, z0)))
    # As many trips on every device of a `shard_map`: cotangents of what is the same on all devices
    # are summed in each trip.
    manual = jax.sharding.get_abstract_mesh().manual_axes
    mesh_axes = tuple(sorted({*body.mesh_axes, *manual}))

    def scaled(factor: int, cotangent: PyTree) -> PyTree:
        """β (0) or 1 - β (1) times a cotangent."""

        def of_leaf(leaf: jax.Array) -> jax.Array:
            wide = tree.accumulation_dtype(leaf.dtype)
            return tree.scale(solver.factors(wide)[factor], leaf)

        return jax.tree.map(of_leaf, cotangent)

    def trip(carry: _Carry) -> _Carry:
        points = carry.points
        active = points.steps > 0
        # s_1 is the start, which is known. It is often zero, where ReLU has a kink, and the
        # derivative of f next to it would be another one.
        point = tree.where(points.steps == 1, z0, rounded_state(points.before, z0))
        # s_{n-1} = (s_{n+1} - β f(s_n)) / (1 - β).
        image = body(point)
        earlier = solver.step_back(image, points)
        found = jnp.isfinite(tree.largest(earlier))

        # λ_n = λ̃_n + y_n + β J_nᵀ λ_{n+1}, with the cotangents y of the returned states.
        partial = carry.partial
        for number, y in zip(record.numbers, cotangents, strict=True):
            here = active & (number == points.steps)
            partial = tree.where(here, tree.add(partial, y), partial)
        nothing = jax.tree.map(jnp.zeros_like, partial)
        seed = tree.where(active, scaled(0, carry.cotangent), nothing)
        by_variables, by_point = pull_one((point, seed))
        complete = tree.add(partial, by_point)

        before = tree.where(active & found, earlier, points.before)
        current = tree.where(active & found, points.before, points.current)
        steps = jnp.where(active, jnp.where(found, points.steps - 1, 0), points.steps)
        return _Carry(
            points=ReversibleState(before, current, steps),
            cotangent=tree.where(active, complete, carry.cotangent),
            partial=tree.where(active, scaled(1, carry.cotangent), carry.partial),
            total=tree.add(carry.total, by_variables),
            lost=carry.lost | (active & ~found),
        )

    nothing = jax.tree.map(jnp.zeros_like, cotangents[0])
    start = _Carry(
        points=record.last,
        cotangent=nothing,
        partial=nothing,
        total=jax.tree.map(jnp.zeros_like, variables),
        # A state that no step back will come to has no gradient, and the report says so.
        lost=functools.reduce(
            jnp.logical_or, [n > jnp.maximum(record.last.steps, 1) for n in record.numbers]
        ),
    )
    end = lax.while_loop(lambda carry: tree.any_of(carry.points.steps > 0, mesh_axes), trip, start)
    return end.total, _report(record, value, end)


def _report(record: _Record, value: PyTree, end: _Carry) -> SolveStats:
    """How far s_0 and s_1 are from the start, which both of them were."""
    z0 = record.z0
    reached = [rounded_state(p, z0) for p in (end.points.before, end.points.current)]
    distance = jnp.stack([tree.safe_norm(tree.subtract(r, z0)) for r in reached]).max(0)
    size = jnp.maximum(tree.safe_norm(z0), tree.safe_norm(value))
    residual = distance / (size + jnp.finfo(size.dtype).tiny)
    residual = jnp.where(end.lost, jnp.inf, residual)
    eps = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(z0))
    status = jnp.where(residual <= eps**0.5, int(Status.CONVERGED), int(Status.MAX_ITER))
    status = jnp.where(jnp.isfinite(residual), status, int(Status.DIVERGED))
    steps = record.last.steps
    return SolveStats(residual, steps, status, steps.max())


@_run_back.defjvp
def _no_second_derivatives(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "Reversed() has first derivatives only; take Unrolled() or Implicit() for second ones"
    )
