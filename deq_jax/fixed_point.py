"""`deq_fixed_point`: an equation, a solver and a gradient policy become a layer."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from deq_jax import tree
from deq_jax.equation import (
    Captured,
    Traced,
    add_batch_axis,
    drop_batch_axis,
    initial_state,
    trace,
    trace_equation,
)
from deq_jax.gradients.implicit import Implicit, linear_fixed_point
from deq_jax.gradients.prepared import prepare
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.loop import Solver, check_solver, iterate
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any
Cell = Callable[[PyTree, PyTree, PyTree], PyTree]


def deq_fixed_point(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    gradient: Implicit = Implicit(),  # noqa: B008  (frozen)
    batched: bool = True,
    return_stats: bool = False,
    backward_probe: BackwardProbe | None = None,
) -> PyTree | tuple[PyTree, SolveStats]:
    """The solution `z*` of `z* = f(params, z*, x)`, differentiable in params and x.

    Found by `solver` in one `lax.while_loop` and differentiated as `gradient` says, by default
    with the implicit function theorem through a `jax.custom_vjp`: memory does not grow with the
    number of iterations. Arrays that f closes over get the same gradient as if they were passed
    in. Works under `jit`, `grad` (and grad of grad), `vmap`, `checkpoint`, `scan`, `shard_map`.

    Args:
        f: `f(params, z, x) -> z`, pure and traceable; returns the structure, shapes and dtypes of
            z. It is compiled once for each function object, as by `jax.jit`, so a lambda made anew
            at every call is compiled anew at every call.
        params: any pytree. Integer, boolean and key leaves are fine and get no gradient.
        x: the input, any pytree, likewise.
        z0: the start, floating or complex leaves `[B, ...]`; zeros shaped like `x` when left out.
            Its gradient is zero: a solution does not depend on where the search began.
        solver: `Anderson(...)`, `Picard(...)` or an object of your own with `init` and `step`.
        gradient: the gradient policy, `Implicit(...)`.
        batched: axis 0 of every leaf of z is the batch, and each sample is an equation of its own,
            with its own residual, history, stop and status, so that its answer does not depend on
            its batch mates (unless f mixes them). False: the whole of z is one equation.
        return_stats: also return `SolveStats`.
        backward_probe: see `BackwardProbe`.

    Returns:
        `z*`: per sample the iterate with the lowest residual
        `‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)`; with `return_stats` the pair `(z*, stats)`. A tolerance that
        was not reached or a sample that became NaN raises nothing: see `stats.status`.

    Raises:
        ValueError: f returns another structure, shape or dtype than z; the batch is empty; leaves
            disagree about it; the probe does not fit the batch.
        TypeError: the state is not floating; `solver`, `gradient` or the probe is something else.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019; "Deep Implicit Layers", ch. 4.
    """
    check_solver("solver", solver)
    if not isinstance(gradient, Implicit):
        raise TypeError(f"gradient must be a policy such as Implicit(), got {gradient!r}")
    z0 = initial_state(x, z0, batched)
    _check_probe(backward_probe, z0, batched)
    solution = _run(f, solver, gradient, batched, params, x, z0, backward_probe)
    return tuple(solution) if return_stats else solution.value


def solve_fixed_point(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
) -> Solution:
    """Solves `z = f(params, z, x)` without a gradient rule; arguments as `deq_fixed_point`.

    Returns:
        `Solution` with `value`, like `z0`, and `stats`. No gradient flows through either.
    """
    check_solver("solver", solver)
    z0 = initial_state(x, z0, batched)
    solution = _run(f, solver, None, batched, params, x, z0, None)
    return Solution(*solution)


def solve_adjoint(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    cotangent: PyTree,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
) -> Solution:
    """Solves `u = Jᵀ u + y`, J = ∂f/∂z at `z`: the backward pass by itself, to look at.

    Compiled anew at every eager call; put `jax.jit` around it to call it often.

    Args:
        f: as for `deq_fixed_point`.
        params: as for `deq_fixed_point`.
        x: as for `deq_fixed_point`.
        z: the point of linearisation, usually a solution; leaves `[B, ...]`.
        cotangent: y, like `z`.
        solver: solver of the linear system; with `trace=True` the stats hold its residuals.
        batched: as for `deq_fixed_point`.

    Returns:
        `value` u, and `stats` with residuals `‖Jᵀ u + y - u‖ / ‖y‖`.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`, and if `cotangent` is not like `z`.
    """
    check_solver("solver", solver)
    z = initial_state(x, z, batched)
    shapes = [jax.tree.map(jnp.shape, tree) for tree in (z, cotangent)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cotangent must be like z: got {shapes[1]}, expected {shapes[0]}")
    cotangent = jax.tree.map(lambda y, z: jnp.asarray(y, z.dtype), cotangent, z)
    equation, captured = trace_equation(f, params, x, z, batched=batched)
    if not batched:
        z, cotangent = add_batch_axis(z), add_batch_axis(cotangent)
    z, cotangent = tree.vary_with((z, cotangent), captured)
    _, pullback = jax.vjp(lambda z: equation(captured, z), z)
    product, residuals = trace(lambda u: pullback(u)[0], cotangent)
    solution = linear_fixed_point(product, solver, *residuals, cotangent)
    return solution if batched else _without_batch_axis(solution)


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


def _run(
    f: Cell,
    solver: Solver,
    gradient: Implicit | None,
    batched: bool,
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    probe: BackwardProbe | None,
) -> Solution:
    """Solves through a compiled function that is kept for f, wherever that is safe.

    Compiled code kept for f must not have captured arrays of a transformation that has ended. At
    top level none exists. Inside one (`grad`, `vmap`, `jit`), f is traced here and now to see
    whether it captures any; if it does, what was traced is solved on the spot.
    """
    if not _at_top_level():
        equation, captured = trace_equation(f, params, x, z0, batched=batched)
        passed = {id(leaf) for leaf in jax.tree.leaves((params, x))}
        if any(
            isinstance(value, jax.core.Tracer) and id(value) not in passed
            for value in (*captured.variables, *captured.constants)
        ):
            return _solve(equation, captured, z0, probe, solver, gradient, batched)
    try:
        compiled = _compiled(f, solver, gradient, batched)
    except TypeError:  # f or the solver cannot be hashed, so nothing can be kept for it
        equation, captured = trace_equation(f, params, x, z0, batched=batched)
        return _solve(equation, captured, z0, probe, solver, gradient, batched)
    return compiled(params, x, z0, probe)


def _top_level_state() -> Any:
    with jax.core.eval_context():
        return get_opaque_trace_state()


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    """No transformation is under way."""
    return get_opaque_trace_state() == _TOP_LEVEL


@functools.lru_cache(maxsize=128)
def _compiled(f: Cell, solver: Solver, gradient: Implicit | None, batched: bool) -> Any:
    """The jitted solve of f. The cache is bounded, because it keeps f and what f holds alive."""

    def solve(params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Solution:
        equation, captured = trace_equation(f, params, x, z0, batched=batched)
        return _solve(equation, captured, z0, probe, solver, gradient, batched)

    return jax.jit(solve)


def _solve(
    equation: Traced,
    captured: Captured,
    z0: PyTree,
    probe: BackwardProbe | None,
    solver: Solver,
    gradient: Implicit | None,
    batched: bool,
) -> Solution:
    if not batched:
        z0 = add_batch_axis(z0)
        probe = None if probe is None else BackwardProbe(*map(jnp.atleast_1d, probe[:3]), probe[3])
    z0 = tree.vary_with(z0, captured)
    if gradient is None:
        prepared = prepare(equation, captured)
        solution = iterate(prepared, z0, solver, mesh_axes=prepared.mesh_axes)
        solution = jax.lax.stop_gradient(solution)
    else:
        solution = gradient.solve(equation, captured, z0, solver, probe)
    return solution if batched else _without_batch_axis(solution)


def _without_batch_axis(solution: Solution) -> Solution:
    """The solution of a batch of one without its batch axis."""
    stats = solution.stats
    return Solution(
        drop_batch_axis(solution.value),
        stats._replace(
            residual=stats.residual[0],
            iterations=stats.iterations[0],
            status=stats.status[0],
            trace=None if stats.trace is None else stats.trace[:, 0],
        ),
    )
