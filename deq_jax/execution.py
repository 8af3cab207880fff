"""Running a solve: compiled once for each f and kept, wherever that is safe."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from deq_jax import tree
from deq_jax.equation import Captured, Traced, add_batch_axis, drop_batch_axis, trace_equation
from deq_jax.gradients.policy import GradientPolicy, solve_detached
from deq_jax.solvers.loop import Run, Solver
from deq_jax.stats import BackwardProbe

PyTree = Any
Cell = Callable[[PyTree, PyTree, PyTree], PyTree]


class Task(NamedTuple):
    """What is to be done with an equation; hashable if the solver and the policies are.

    Attributes:
        solver: the solver.
        policies: gradient policies of the value and of each sample; empty for no gradient.
        batched: axis 0 is the batch.
        sample_at: see `iterate`.
    """

    solver: Solver
    policies: tuple[GradientPolicy, ...]
    batched: bool
    sample_at: tuple[int, ...]


def run(
    f: Cell, task: Task, params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None
) -> Run:
    """Solves through a compiled function that is kept for f, wherever that is safe.

    Compiled code kept for f must not have captured arrays of a transformation that has ended. At
    top level none exists. Inside one (`grad`, `vmap`, `jit`), f is traced here and now to see
    whether it captures any; if it does, what was traced is solved on the spot.
    """
    if not _at_top_level():
        equation, captured = trace_equation(f, params, x, z0, batched=task.batched)
        passed = {id(leaf) for leaf in jax.tree.leaves((params, x))}
        if any(
            isinstance(value, jax.core.Tracer) and id(value) not in passed
            for value in (*captured.variables, *captured.constants)
        ):
            return _solve(equation, captured, task, z0, probe)
    try:
        compiled = _compiled(f, task)
    except TypeError:  # f or the solver cannot be hashed, so nothing can be kept for it
        equation, captured = trace_equation(f, params, x, z0, batched=task.batched)
        return _solve(equation, captured, task, z0, probe)
    return compiled(params, x, z0, probe)


def _top_level_state() -> Any:
    with jax.core.eval_context():
        return get_opaque_trace_state()


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    """No transformation is under way."""
    return get_opaque_trace_state() == _TOP_LEVEL


@functools.lru_cache(maxsize=128)
def _compiled(f: Cell, task: Task) -> Any:
    """The jitted solve of f. The cache is bounded, because it keeps f and what f holds alive."""

    def solve(params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Run:
        equation, captured = trace_equation(f, params, x, z0, batched=task.batched)
        return _solve(equation, captured, task, z0, probe)

    return jax.jit(solve)


def _solve(
    equation: Traced, captured: Captured, task: Task, z0: PyTree, probe: BackwardProbe | None
) -> Run:
    if not task.batched:
        z0 = add_batch_axis(z0)
        probe = None if probe is None else BackwardProbe(*map(jnp.atleast_1d, probe[:3]), probe[3])
    z0 = tree.vary_with(z0, captured)
    if task.policies:
        policy, *sample_policies = task.policies
        run = policy.solve(
            equation,
            captured,
            z0,
            task.solver,
            probe=probe,
            sample_at=task.sample_at,
            sample_policies=tuple(sample_policies),
        )
    else:
        run = solve_detached(equation, captured, z0, task.solver)
    run = run._replace(solver_state=None)
    if task.batched:
        return run
    return run._replace(
        value=drop_batch_axis(run.value),
        stats=run.stats.single(),
        samples=tuple(map(drop_batch_axis, run.samples)),
    )
