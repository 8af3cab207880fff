"""`deq_fixed_point`: an equation, a solver and a gradient policy become a layer."""

from typing import Any

import jax
import jax.numpy as jnp

from deq_jax import tree
from deq_jax.equation import add_batch_axis, drop_batch_axis, initial_state, trace, trace_equation
from deq_jax.execution import Cell, Execution, Task, run
from deq_jax.gradients.implicit import Implicit, is_linear_solver
from deq_jax.gradients.linear import SolvedInverse
from deq_jax.gradients.policy import AtSolution, GradientPolicy, check_policy
from deq_jax.gradients.prepared import prepare
from deq_jax.precision import cast
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.krylov import LinearSolver
from deq_jax.solvers.loop import Solver, check_samples, check_solver
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any


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
) -> PyTree | tuple[PyTree, ...]:
    """The solution `z*` of `z* = f(params, z*, x)`, differentiable in params and x.

    Found by `solver` in one `lax.while_loop` and differentiated as `gradient` says, by default
    with the implicit function theorem: memory does not grow with the number of iterations. Arrays
    that f closes over get the same gradient as if they were passed in. Works under `jit`, `grad`,
    `jvp`, `hessian` and derivatives of derivatives, `vmap`, `checkpoint`, `scan`, `shard_map`.

    Args:
        f: `f(params, z, x) -> z`, pure and traceable; returns the structure, shapes and dtypes of
            z. It is compiled once for each function object, as by `jax.jit`, so a lambda made anew
            at every call is compiled anew at every call.
        params: any pytree. Integer, boolean and key leaves are fine and get no gradient.
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
    check_solver("solver", solver)
    check_policy("gradient", gradient)
    sample_at = tuple(sample_at)
    check_samples(sample_at, solver)
    policies = (gradient, *_sample_policies(sample_at, sample_gradient, gradient))
    z0 = cast(initial_state(x, z0, batched), execution.state_dtype)
    _check_probe(backward_probe, z0, batched)
    task = Task(solver, policies, batched, sample_at, execution)
    value, stats, samples, _ = run(f, task, params, x, z0, backward_probe)
    return returned(value, stats, samples, return_stats)


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
    check_solver("solver", solver)
    z0 = cast(initial_state(x, z0, batched), execution.state_dtype)
    task = Task(solver, (), batched, execution=execution)
    value, stats, *_ = run(f, task, params, x, z0, None)
    return Solution(value, stats)


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

    Compiled anew at every eager call; put `jax.jit` around it to call it often. No gradient flows
    through it.

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
    z = initial_state(x, z, batched)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (z, cotangent)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cotangent must be like z: got {shapes[1]}, expected {shapes[0]}")
    cotangent = jax.tree.map(lambda y, z: jnp.asarray(y, z.dtype), cotangent, z)
    equation, captured = trace_equation(f, params, x, z, batched=batched)
    if not batched:
        z, cotangent = add_batch_axis(z), add_batch_axis(cotangent)
    detached = jax.lax.stop_gradient((z, cotangent, captured.variables))
    captured = captured._replace(variables=detached[2])
    z, cotangent = tree.vary_with(detached[:2], captured)
    _, pullback = jax.vjp(lambda z: equation(captured, z), z)
    product = prepare(*trace(lambda u: pullback(u)[0], cotangent))
    u, stats = SolvedInverse(solver)(product, cotangent, None, report=True)
    return Solution(u, stats) if batched else Solution(drop_batch_axis(u), stats.single())


def returned(
    value: PyTree, stats: SolveStats, samples: tuple[PyTree, ...], return_stats: bool
) -> PyTree | tuple[PyTree, ...]:
    """What a layer returns: the value, and behind it what else was asked for."""
    if not (return_stats or samples):
        return value
    return (value, *[stats] * return_stats, *[samples] * bool(samples))


def _check_probe(probe: Any, z0: PyTree, batched: bool) -> None:
    if probe is None:
        return
    if not isinstance(probe, BackwardProbe):
        raise TypeError(f"backward_probe must be a BackwardProbe, got {type(probe).__name__}")
    batch = jax.tree.leaves(z0)[0].shape[:1] if batched else ()
    expected = BackwardProbe(batch, batch, batch, ())
    got = BackwardProbe(*(jnp.shape(field) for field in probe))
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
        if isinstance(default, AtSolution) and not isinstance(policy, AtSolution):
            raise TypeError(
                f"sample_gradient={policy!r} differentiates the solver itself and goes only with "
                f"the same gradient, got gradient={default!r}"
            )
    return policies
