"""The doors: an equation, a solver and a gradient policy become a layer."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp

from deq_jax import _compat, checks, precision, sharding, tree
from deq_jax.adjoint import Affine, Solved
from deq_jax.closure import (
    Cell,
    Closure,
    Held,
    add_batch_axis,
    close,
    drop_batch_axis,
    initial_state,
)
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit, is_linear_solver
from deq_jax.gradients.policy import GradientPolicy, check_policy, differentiates_solver
from deq_jax.linear.krylov import LinearSolver
from deq_jax.passes import LoopBody
from deq_jax.shrinking import sizes
from deq_jax.solve import Solver, check_samples, check_solver, solve
from deq_jax.solvers.anderson import Anderson
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any
State = TypeVar("State")


class _Options(TypedDict, total=False):
    """The keyword arguments of `deq_fixed_point` that do not change its return type."""

    solver: Solver
    gradient: GradientPolicy
    batched: bool
    backward_probe: BackwardProbe | None
    sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None
    execution: Execution


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[False] = False,
    sample_at: tuple[()] = (),
    **options: Unpack[_Options],
) -> State: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[True],
    sample_at: tuple[()] = (),
    **options: Unpack[_Options],
) -> tuple[State, SolveStats]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[False] = False,
    sample_at: tuple[int, *tuple[int, ...]],
    **options: Unpack[_Options],
) -> tuple[State, tuple[State, ...]]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[True],
    sample_at: tuple[int, *tuple[int, ...]],
    **options: Unpack[_Options],
) -> tuple[State, SolveStats, tuple[State, ...]]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: bool = False,
    sample_at: tuple[int, ...] = (),
    **options: Unpack[_Options],
) -> Any: ...


def deq_fixed_point(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
    batched: bool = True,
    return_stats: bool = False,
    backward_probe: BackwardProbe | None = None,
    sample_at: tuple[int, ...] = (),
    sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Any:
    """The solution `z*` of `z* = f(params, z*, x)`, differentiable in params and x.

    Found by `solver` in one `lax.while_loop` and differentiated as `gradient` says, by default
    with the implicit function theorem: memory does not grow with the number of iterations. Arrays
    that f closes over get the same gradient as if they were passed in. Works under `jit`, `grad`,
    `jvp`, `hessian` and derivatives of derivatives, `vmap`, `checkpoint`, `scan`, `shard_map`.

    Args:
        f: `f(params, z, x) -> z`, traceable; returns the structure, shapes and dtypes of z. A call
            outside of `jax.jit` always sees f, and what f uses, as they are now: f is traced again
            unless it certainly holds no arrays or objects and all else that it holds is unchanged.
            What was compiled is used again wherever the traced operations are the same.
        params: any pytree. Integer, boolean and key leaves are fine and get no gradient; functions,
            strings and other objects in it are static.
        x: the input, any pytree, likewise.
        z0: the start, floating or complex leaves `[B, ...]`; zeros shaped like `x` when left out.
            Its gradient is zero: a solution does not depend on where the search began.
        solver: `Anderson(...)`, `Picard(...)`, `Broyden(...)`, `NewtonKrylov(...)` or an object of
            your own with `init` and `step`.
        gradient: the gradient policy: `Implicit(...)`, `OneStep()`, `Neumann(...)`, `Phantom(...)`
            or `Unrolled(...)`. It belongs to the state that is returned, whenever the solver stops.
        batched: axis 0 of every leaf of z is the batch, and each sample is an equation of its own,
            with its own residual, history, stop and status, so that its answer does not depend on
            its batch mates (unless f mixes them). False: the whole of z is one equation.
        return_stats: also return `SolveStats`.
        backward_probe: see `BackwardProbe`.
        sample_at: numbers of evaluations, increasing, counted from 1: return the states evaluated
            then as well, for losses along the way. A sample that had stopped gives its final state.
        sample_gradient: the gradient policy of these states, one for all or one each; None is
            `gradient`.
        execution: how the work is done: `Execution(shrink_to=..., shard_axis=..., ...)`.

    Returns:
        `z*`: per sample the iterate with the lowest residual
        `‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)`; with `return_stats` the pair `(z*, stats)`. With `sample_at`
        there is one more at the end, the tuple of states. A tolerance that was not reached or a
        sample that became NaN raises nothing: see `stats.status`.

    Raises:
        ValueError: f returns another structure, shape or dtype than z; the batch is empty; leaves
            disagree about it; the probe does not fit the batch or the policy; `sample_at` is not
            increasing or beyond `max_iter`.
        TypeError: the state is not floating; `solver`, `gradient` or the probe is something else,
            or they do not go together.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019; "Deep Implicit Layers", ch. 4.
    """
    checks.check_bool("return_stats", return_stats)
    if not isinstance(sample_at, tuple | list):
        raise TypeError(f"sample_at must be a tuple of integers, got {sample_at!r}")
    sample_at = tuple(sample_at)
    policies = (gradient, *_sample_policies(sample_at, sample_gradient, gradient))
    task = _Task(solver, policies, batched, sample_at, execution)
    solution = _run(f, params, x, z0, task, backward_probe)
    return returned(solution.value, solution.stats, solution.samples, return_stats)


def solve_fixed_point(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Solution:
    """Solves `z = f(params, z, x)` without a gradient rule; arguments as `deq_fixed_point`.

    Returns:
        `Solution` with `value`, like `z0`, and `stats`. No gradient flows through either.
    """
    return _run(f, params, x, z0, _Task(solver, (), batched, (), execution), None)


@dataclasses.dataclass(frozen=True)
class _Task:
    """What is to be done with an equation.

    Attributes:
        solver: the solver.
        policies: gradient policies of the value and of each sample; empty for no gradient.
        batched: axis 0 is the batch.
        sample_at: see `solve`.
        execution: how to do it.
    """

    solver: Solver
    policies: tuple[GradientPolicy, ...]
    batched: bool
    sample_at: tuple[int, ...]
    execution: Execution

    def __post_init__(self) -> None:
        check_solver("solver", self.solver)
        checks.check_bool("batched", self.batched)
        check_samples(self.sample_at, self.solver)
        if not isinstance(self.execution, Execution):
            raise TypeError(f"execution must be an Execution(...), got {self.execution!r}")
        for policy in self.policies:
            check_policy("gradient", policy)
            policy.check(self.solver)
        shrink_to = f"Execution(shrink_to={self.execution.shrink_to})"
        if self.execution.shrink_to is not None and not self.batched:
            raise ValueError(
                f"{shrink_to} needs samples that can leave, but batched=False has none"
            )
        if self.execution.shrink_to is not None and any(map(differentiates_solver, self.policies)):
            raise ValueError(
                f"{shrink_to} does not go with gradient={self.policies[0]!r}, which differentiates "
                "the solver itself, in a loop of scans"
            )


def _run(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None,
    task: _Task,
    probe: BackwardProbe | None,
) -> Solution:
    """Checks and casts the arguments, closes f and solves."""
    z0 = precision.cast(initial_state(x, z0, task.batched), task.execution.state_dtype)
    _check_probe(probe, z0, task.batched)
    execution, axis = task.execution, task.execution.shard_axis
    if execution.shrink_to is not None:
        batch = jax.tree.leaves(z0)[0].shape[0]
        why = f"Execution(shrink_to={execution.shrink_to}) gathers samples of x"
        sharding.check_batch(why, x, batch)
    solve_closed = _CloseAndSolve(
        task.batched,
        task.sample_at,
        execution.shrink_to,
        execution.cell_dtype,
        _compat.at_top_level(),
    )
    arguments = (Held(f), Held(params), Held(x), z0, Held((task.solver, task.policies)), probe)
    mesh = sharding.find_mesh(axis, x, z0, task.batched)
    if mesh is None or axis is None:
        return solve_closed(*arguments)
    return sharding.solve_shards(solve_closed, arguments, axis, mesh)


@dataclasses.dataclass(frozen=True)
class _CloseAndSolve:
    """Closes f over the arguments and solves, for a batch or a shard of one.

    Attributes:
        batched: axis 0 is the batch.
        sample_at: see `solve`.
        shrink_to: see `Execution`.
        cell_dtype: see `Execution`.
        value_only: see `Program`.
    """

    batched: bool
    sample_at: tuple[int, ...]
    shrink_to: int | None
    cell_dtype: Any
    value_only: bool

    def __call__(
        self, f: Held, params: Held, x: Held, z0: PyTree, held: Held, probe: BackwardProbe | None
    ) -> Solution:
        """The solution by the solver and with the policies that are `held`."""
        fewer: tuple[int, ...] = ()
        if self.shrink_to is not None:
            fewer = sizes(jax.tree.leaves(z0)[0].shape[0], self.shrink_to)
        # Cast before f is traced, so that no trip of a loop casts params and x.
        cast_params, cast_x = precision.cast((params.value, x.value), self.cell_dtype)
        closed = close(
            f.value,
            cast_params,
            cast_x,
            z0,
            batched=self.batched,
            cell_dtype=self.cell_dtype,
            sizes=fewer,
            value_only=self.value_only,
        )
        return _solve_compiled(closed, z0, held, probe, self.batched, self.sample_at)


def _solve(
    f: Closure,
    z0: PyTree,
    held: Held,
    probe: BackwardProbe | None,
    batched: bool,
    sample_at: tuple[int, ...],
) -> Solution:
    """Solves, and gives the solution its derivative; compiled once for equal programs."""

    def run(f: Closure, z0: PyTree, held: Held, probe: BackwardProbe | None) -> Solution:
        solver, policies = held.value
        if not batched:
            z0 = add_batch_axis(z0)
            if probe is not None:
                per_sample = {k: jnp.atleast_1d(a) for k, a in probe._asdict().items()}
                probe = BackwardProbe(**per_sample)._replace(evaluations=probe.evaluations)
        z0 = jax.lax.stop_gradient(tree.vary_over(z0, tree.varying_axes(f)))
        solution = _solve_and_attach(f, z0, solver, policies, probe, sample_at)
        solution = dataclasses.replace(solution, state=None)
        if batched:
            return solution
        return Solution(
            drop_batch_axis(solution.value),
            solution.stats.single(),
            tuple(map(drop_batch_axis, solution.samples)),
        )

    if _compat.explicit_axes():
        # The loop's own arrays carry no shardings. JAX distributes them; f runs in its own types.
        specs = sharding.solution_specs(f, z0, held.value[0], batched, len(sample_at))
        spread: Any = jax.sharding.auto_axes(run, out_sharding=specs)
        return spread(f, z0, held, probe)
    return run(f, z0, held, probe)


_solve_compiled = jax.jit(_solve, static_argnames=("batched", "sample_at"))


def _solve_and_attach(
    f: Closure,
    z0: PyTree,
    solver: Solver,
    policies: tuple[GradientPolicy, ...],
    probe: BackwardProbe | None,
    sample_at: tuple[int, ...],
) -> Solution:
    if policies and differentiates_solver(policies[0]):
        policy: Any = policies[0]
        if hasattr(policy, "solve"):  # the policy has a loop of its own
            return policy.solve(f, z0, solver, sample_at, probe)
        solver = policy.limited(solver)
        check_samples(sample_at, solver)
        solution = solve(f, z0, solver, sample_at=sample_at, differentiable=True)
        stats = jax.lax.stop_gradient(solution.stats)
        return dataclasses.replace(
            solution,
            value=policy.attach(f, solution, solver=solver, probe=probe),
            stats=stats,
        )
    body = LoopBody(jax.lax.stop_gradient(f))
    solution = jax.lax.stop_gradient(solve(body, z0, solver, sample_at=sample_at))
    if not policies:
        return solution
    value, *samples = (
        policy.attach(
            f,
            dataclasses.replace(solution, value=state),
            solver=solver,
            probe=None if i else probe,
        )
        for i, (policy, state) in enumerate(
            zip(policies, (solution.value, *solution.samples), strict=True)
        )
    )
    return dataclasses.replace(solution, value=value, samples=tuple(samples))


def solve_adjoint(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    cotangent: PyTree,
    *,
    solver: Solver | LinearSolver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
) -> Solution:
    """Solves `u = Jᵀ u + y`, J = ∂f/∂z at `z`: the backward pass by itself, to look at.

    No gradient flows through it.

    Args:
        f: as for `deq_fixed_point`.
        params: as for `deq_fixed_point`.
        x: as for `deq_fixed_point`.
        z: the point of linearisation, usually a solution; leaves `[B, ...]`.
        cotangent: y, like `z`.
        solver: solver of the linear system, `GMRES(...)` and `BiCGStab(...)` among them; where it
            has `trace=True` the stats hold its residuals.
        batched: as for `deq_fixed_point`.

    Returns:
        `value` u, and `stats` with residuals `‖Jᵀ u + y - u‖ / ‖y‖`.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`, and if `cotangent` is not like `z`.
    """
    if not is_linear_solver(solver):
        check_solver("solver", solver)
    checks.check_bool("batched", batched)
    z = initial_state(x, z, batched)
    shapes: list[Any] = [jax.tree.map(jnp.shape, tree) for tree in (z, cotangent)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cotangent must be like z: got {shapes[1]}, expected {shapes[0]}")
    for (name, leaf), y in zip(checks.named_leaves(z), jax.tree.leaves(cotangent), strict=True):
        got = jnp.result_type(y) if checks.is_array(y) else type(y).__name__
        complex_to_real = jnp.iscomplexobj(y) and not jnp.iscomplexobj(leaf)
        if not checks.is_array(y) or complex_to_real:
            raise ValueError(
                f"cotangent must be real where z is real, and of numbers: leaf {name}: got {got}, "
                f"expected {leaf.dtype}"
            )
    cotangent = jax.tree.map(lambda y, z: jnp.asarray(y, z.dtype), cotangent, z)
    closed = close(f, params, x, z, batched=batched)
    return _solve_adjoint_compiled(closed, z, cotangent, Held(solver), batched)


def _solve_adjoint(f: Closure, z: PyTree, cotangent: PyTree, held: Held, batched: bool) -> Solution:
    if not batched:
        z, cotangent = add_batch_axis(z), add_batch_axis(cotangent)
    f, z, cotangent = jax.lax.stop_gradient((f, z, cotangent))
    axes = tree.varying_axes((f, z, cotangent))
    z, cotangent = tree.vary_over((z, cotangent), axes)
    system = Affine.of(f, z, cotangent, transposed=True)
    u, stats = Solved(held)(system, report=True)
    return Solution(u, stats) if batched else Solution(drop_batch_axis(u), stats.single())


_solve_adjoint_compiled = jax.jit(_solve_adjoint, static_argnames=("batched",))


def returned(
    value: PyTree, stats: SolveStats, samples: tuple[PyTree, ...], return_stats: bool
) -> Any:
    """What a layer returns: the value, and behind it what else was asked for."""
    if not (return_stats or samples):
        return value
    return (value, *[stats] * return_stats, *[samples] * bool(samples))


def has_injection(cell: Any, asked: bool | None) -> bool:
    """Whether a layer computes `cell.inject(x)`, from its option `inject` and the cell's class.

    Raises:
        TypeError: the option is no bool, or the class of the cell has no such method.
    """
    found = callable(getattr(type(cell), "inject", None))
    if asked is not None:
        checks.check_bool("inject", asked)
    if asked and not found:
        raise TypeError(f"inject=True, but {type(cell).__name__} has no method inject(self, x)")
    return found if asked is None else asked


def _check_probe(probe: Any, z0: PyTree, batched: bool) -> None:
    if probe is None:
        return
    if not isinstance(probe, BackwardProbe):
        raise TypeError(f"backward_probe must be a BackwardProbe, got {type(probe).__name__}")
    batch: tuple[Any, ...] = jax.tree.leaves(z0)[0].shape[:1] if batched else ()
    expected = {"residual": batch, "iterations": batch, "status": batch, "evaluations": ()}
    got = {name: jnp.shape(field) for name, field in probe._asdict().items()}
    if got != expected:
        raise ValueError(
            f"backward_probe does not fit: got shapes {got}, expected {expected}; "
            f"make it with BackwardProbe.zeros({batch[0] if batched else ''})"
        )


def _sample_policies(
    sample_at: tuple[int, ...], given: Any, default: GradientPolicy
) -> tuple[GradientPolicy, ...]:
    """One policy for each sample."""
    if not isinstance(given, tuple | list):
        policies = (default if given is None else given,) * len(sample_at)
    elif len(given) != len(sample_at):
        raise ValueError(
            f"sample_gradient must hold one policy for each of the {len(sample_at)} samples, "
            f"got {len(given)}"
        )
    else:
        policies = tuple(given)
    for policy in policies:
        check_policy("sample_gradient", policy)
        if differentiates_solver(default) and policy != default:
            raise ValueError(
                f"with gradient={default!r} the samples are differentiated in the same way; leave "
                "sample_gradient out"
            )
        if differentiates_solver(policy) and not differentiates_solver(default):
            raise TypeError(
                f"sample_gradient={policy!r} differentiates the solver itself and goes only with "
                f"the same gradient, got gradient={default!r}"
            )
    return policies
