"""Running a solve: how it is carried out, and compiled code kept for each f where that is safe."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
from jax.sharding import AbstractMesh

from deq_jax import checks, precision, sharding, tree
from deq_jax.equation import Captured, Traced, add_batch_axis, drop_batch_axis, trace_equation
from deq_jax.gradients.policy import AtSolution, GradientPolicy, solve_detached
from deq_jax.parts import trace_in_parts
from deq_jax.solvers.loop import Run, Solver
from deq_jax.stats import BackwardProbe

PyTree = Any
Cell = Callable[[PyTree, PyTree, PyTree], PyTree]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a solve is carried out; the equation, its solution and its gradient stay the same.

    Attributes:
        shrink_to: finished samples leave, forwards and in the backward solve: once no more than
            half of the batch is unfinished, the loop goes on with these alone, and so on down to
            this many. The cost follows the mean number of evaluations instead of the largest
            (`stats.evaluations` is the largest still); answers are the same up to the rounding of
            products of another size. None: never; no more samples than this: nothing changes.

            For an f that treats samples independently, with all that belongs to a sample in z or
            x: every leaf of x has the batch on axis 0 and is gathered; `params` and closures are
            the same for all. A batch norm over the batch, or dropout drawn inside f, gives other
            answers; f that sums over the batch or draws numbers for it is refused where its jaxpr
            shows that, which loops, maxima and indexing hide. Each size is traced and compiled by
            itself, forwards and backwards: about as much again for each as the loops take without,
            and more for sizes below 8. A tenth of the batch is a good choice. `GMRES` and
            `BiCGStab` as backward solvers do not shrink. Under `vmap` it is right but saves little.
            With a batch sharded over devices, set `shard_axis` too, or samples move between them.
        shard_axis: name of the mesh axis over which the batch is sharded. The solve runs in
            `jax.shard_map` over it: each shard is solved on its own device and stops by itself, and
            no trip of a loop waits for another device, forwards or backwards (`Unrolled` alone does
            wait). The mesh is that of `jax.set_mesh`, or that of the sharding of a leaf of x or z0;
            its other axes stay automatic. Every leaf of x and z is split on axis 0, `params` and
            closures are the same on all shards and their gradients summed over them. Counts of
            evaluations and products, in `stats` and probe, are those of the shard with the most.
            An f that mixes samples mixes those of a shard, unless it uses collectives over the
            axis; what f draws from a key in `params` is the same on every shard, unless it folds in
            `lax.axis_index`. Reverse mode only. Inside a `shard_map` over this axis it changes
            nothing. None: one loop for the whole batch, whose devices agree in each trip whether
            to go on.
        cell_dtype: real floating dtype in which f is evaluated: floating leaves of params, x and z
            are cast to it (complex ones to complex64, or complex128 for float64; no others), what f
            returns must have it and is cast back to the dtype of the state. Gradients reach params
            and x in their own dtypes (`Phantom` and `Unrolled` add them up in this one first). What
            f closes over is not cast. None: f is given everything as it is. Which tolerance half
            precision can reach: docs/precision.md.
        state_dtype: real floating dtype of the state: `z0` or the zeros in its place are cast to
            it, and the value, histories and the backward solve have it (residuals at least
            float32). None: that of `z0`.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it. In the solve, for
            `shrink_to`: `batched=False`, `Unrolled`, an f that communicates over mesh axes, or
            that fails on fewer samples, or is seen to mix them; a leaf of x without the batch. For
            `shard_axis`: no mesh with that axis, another axis of explicit type, `batched=False`, a
            batch that it does not divide, a leaf of x without the batch.
    """

    shrink_to: int | None = None
    shard_axis: str | None = None
    cell_dtype: Any = None
    state_dtype: Any = None

    def __post_init__(self) -> None:
        if self.shrink_to is not None:
            checks.check_count(self, "shrink_to")
        if self.shard_axis is not None:
            sharding.check_axis(self, "shard_axis")
        for name in ("cell_dtype", "state_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, precision.check_floating(self, name))


class Task(NamedTuple):
    """What is to be done with an equation; hashable if the solver and the policies are.

    Attributes:
        solver: the solver.
        policies: gradient policies of the value and of each sample; empty for no gradient.
        batched: axis 0 is the batch.
        sample_at: see `iterate`.
        execution: how to do it.
    """

    solver: Solver
    policies: tuple[GradientPolicy, ...]
    batched: bool
    sample_at: tuple[int, ...] = ()
    execution: Execution = Execution()


def run(
    f: Cell, task: Task, params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None
) -> Run:
    """Solves through a compiled function that is kept for f, wherever that is safe.

    Compiled code kept for f must not have captured arrays of a transformation that has ended. At
    top level none exists. Inside one (`grad`, `vmap`, `jit`), f is traced here and now to see
    whether it captures any; if it does, what was traced is solved on the spot.

    Raises:
        ValueError: f or the arguments do not fit; see `deq_fixed_point` and `Execution`.
    """
    mesh = sharding.find_mesh(task.execution.shard_axis, x, z0, task.batched)
    solve = _solver_of(f, task, mesh)
    if not _at_top_level():
        if mesh is None:
            given = precision.cast((params, x), task.execution.cell_dtype)
            equation, captured = _trace(f, task, *given, z0)
            passed = {id(leaf) for leaf in jax.tree.leaves(given)}
            if any(
                isinstance(value, jax.core.Tracer) and id(value) not in passed
                for value in (*captured.variables, *captured.constants)
            ):
                return _solve(equation, captured, task, z0, probe)
        elif sharding.captures(
            functools.partial(_evaluate, f, task), task.execution.shard_axis, mesh, params, x, z0
        ):
            return solve(params, x, z0, probe)
    with contextlib.suppress(TypeError):  # where f or the solver cannot be hashed, nothing is kept
        solve = _compiled(f, task, mesh)
    return solve(params, x, z0, probe)


def _top_level_state() -> Any:
    with jax.core.eval_context():
        return get_opaque_trace_state()


_TOP_LEVEL = _top_level_state()


def _at_top_level() -> bool:
    """No transformation is under way."""
    return get_opaque_trace_state() == _TOP_LEVEL


@functools.lru_cache(maxsize=128)
def _compiled(f: Cell, task: Task, mesh: AbstractMesh | None) -> Any:
    """The jitted solve of f. The cache is bounded, because it keeps f and what f holds alive."""
    return jax.jit(_solver_of(f, task, mesh))


def _solver_of(f: Cell, task: Task, mesh: AbstractMesh | None) -> sharding.Solve:
    """The solve as a function of arrays, over the shards of `mesh` if there is one."""

    def solve(params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Run:
        # Before f is traced: what it captures is cast already, and no trip of a loop casts it.
        params, x = precision.cast((params, x), task.execution.cell_dtype)
        return _solve(*_trace(f, task, params, x, z0), task, z0, probe)

    return solve if mesh is None else sharding.over_shards(solve, task.execution.shard_axis, mesh)


def _evaluate(f: Cell, task: Task, params: PyTree, x: PyTree, z0: PyTree) -> PyTree:
    """What f, as the solve traces it, gives at `z0`."""
    params, x = precision.cast((params, x), task.execution.cell_dtype)
    equation, captured = _trace(f, task, params, x, z0)
    return equation(captured, z0)


def _trace(f: Cell, task: Task, params: PyTree, x: PyTree, z0: PyTree) -> tuple[Traced, Captured]:
    dtype, shrink_to = task.execution.cell_dtype, task.execution.shrink_to
    if shrink_to is not None:
        _check_can_shrink(task)
        return trace_in_parts(f, params, x, z0, shrink_to=shrink_to, cell_dtype=dtype)
    return trace_equation(f, params, x, z0, batched=task.batched, cell_dtype=dtype)


def _check_can_shrink(task: Task) -> None:
    shrink_to = f"Execution(shrink_to={task.execution.shrink_to})"
    if not task.batched:
        raise ValueError(f"{shrink_to} needs samples that can leave, but batched=False has none")
    for policy in task.policies:
        if not isinstance(policy, AtSolution):
            raise ValueError(
                f"{shrink_to} does not go with gradient={policy!r}, which differentiates the "
                "solver itself, in a loop of scans"
            )


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
