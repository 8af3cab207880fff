"""A solve by hand: the same loop, stepped from Python.

    state = stepping.start(f, params, x, solver=Anderson())
    while not state.done:
        state = stepping.advance(state)
        print(state.evaluations, state.residual)
    z, stats = stepping.finish(state)

The steps are those of `deq_fixed_point`, to the last bit on most inputs; they are compiled once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import _compat, checks, tree
from deq_jax.closure import Closure, Held, add_batch_axis, drop_batch_axis
from deq_jax.control import Control, Watch
from deq_jax.execution import Execution
from deq_jax.fixed_point import Setup, Task, checked_start, closed_problem
from deq_jax.passes import LoopBody
from deq_jax.solve import Carry, Loop, Solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.stats import Solution, Status

PyTree = Any


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["closed", "watch", "held", "carry"],
    meta_fields=["setup"],
)
@dataclasses.dataclass(frozen=True)
class SolveState:
    """A solve that is under way: a pytree, to be looked at between evaluations.

    Attributes:
        closed: the equation.
        watch: the functions of `Control`.
        held: solver and control.
        carry: what goes from evaluation to evaluation.
        setup: the static options.
    """

    closed: Closure
    watch: Watch
    held: Held
    carry: Carry
    setup: Setup

    @property
    def done(self) -> bool:
        """No sample is active any more, or the evaluations are used up."""
        solver, _ = self.held.value
        limit = solver.max_iter
        if self.watch.budget is not None:
            limit = int(jnp.clip(self.watch.budget, 1, limit))
        return not bool(self.carry.proceed) or int(self.carry.evaluations) >= limit

    @property
    def evaluations(self) -> jax.Array:
        """Evaluations of f so far, int32."""
        return self.carry.evaluations

    @property
    def value(self) -> PyTree:
        """What would be returned now, like `z0`."""
        return self._seen(self.carry.best)

    @property
    def residual(self) -> jax.Array:
        """Its residual, `[B]`; infinite before the first evaluation."""
        return self._seen(self.carry.best_residual)

    @property
    def active(self) -> jax.Array:
        """The samples that have not stopped, `[B]` boolean."""
        return self._seen(self.carry.status == int(Status.MAX_ITER))

    def _seen(self, value: PyTree) -> PyTree:
        return value if self.setup.batched else drop_batch_axis(value)

    def _loop(self) -> Loop:
        solver, control = self.held.value
        closed = lax.stop_gradient(self.closed)
        f = closed.output(0) if self.setup.has_aux else closed
        observed = None
        if self.setup.has_aux and (self.watch.stop is not None or self.watch.fold is not None):
            observed = LoopBody(closed)
        return Loop(LoopBody(f), solver, control, self.watch, observed=observed)


def start(
    f: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
    has_aux: bool = False,
    pass_step: bool = False,
    control: Control = Control(),  # noqa: B008  (frozen)
) -> SolveState:
    """The state of a solve before its first evaluation; arguments as `deq_fixed_point`.

    No gradient flows through it. Give the result one with `attach_gradient`.
    """
    setup = Setup(batched, (), has_aux, pass_step, Execution())
    Task(solver, (), control, setup)
    z0 = checked_start(x, z0, setup)
    closed, watch = closed_problem(
        f, params, x, z0, control, setup, value_only=_compat.at_top_level()
    )
    held = Held((solver, control.without_functions()))
    return _start(closed, watch, held, z0, setup)


@functools.partial(jax.jit, static_argnames=("setup",))
def _start(closed: Closure, watch: Watch, held: Held, z0: PyTree, setup: Setup) -> SolveState:
    z0 = z0 if setup.batched else add_batch_axis(z0)
    z0 = lax.stop_gradient(tree.vary_over(z0, closed.state_axes))
    empty: Any = None
    state = SolveState(closed, watch, held, empty, setup)
    return dataclasses.replace(state, carry=state._loop().begin(z0, None))


def advance(state: SolveState, evaluations: int = 1) -> SolveState:
    """The state after some more evaluations of f, fewer if the solve ends before.

    Args:
        state: from `start` or `advance`.
        evaluations: how many, at least 1.

    Raises:
        ValueError, TypeError: `evaluations` is no integer or below 1.
    """
    checks.check_positive_integer("evaluations", evaluations)
    return dataclasses.replace(state, carry=_advance(state, evaluations))


@jax.jit
def _advance(state: SolveState, evaluations: Any) -> Carry:
    loop = state._loop()
    end = state.carry.evaluations + evaluations

    def proceed(carry: Carry) -> jax.Array:
        return loop.proceed(carry) & (carry.evaluations < end)

    return lax.while_loop(proceed, functools.partial(loop.body, loop.f, None), state.carry)


def finish(state: SolveState) -> Solution:
    """The solution as it stands: `value`, `stats`, and `aux` with `has_aux`."""
    solution = _finish(state)
    return dataclasses.replace(solution, state=None)


@jax.jit
def _finish(state: SolveState) -> Solution:
    solution = state._loop().finish(state.carry)
    aux = None
    if state.setup.has_aux:
        at = state.closed.bound(solution.stats.step).output(1)
        aux = lax.stop_gradient(at(solution.value))
    if state.setup.batched:
        return dataclasses.replace(solution, aux=aux)
    value, stats = drop_batch_axis(solution.value), solution.stats.single()
    return dataclasses.replace(solution, value=value, stats=stats, aux=aux)
