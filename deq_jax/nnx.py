"""DEQ layer for Flax NNX."""

import dataclasses
from typing import Any

import jax
from flax import nnx

from deq_jax.execution import Execution
from deq_jax.fixed_point import deq_fixed_point, returned
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.loop import Solver
from deq_jax.stats import BackwardProbe

PyTree = Any


class DEQ(nnx.Module):
    """A layer whose output is the equilibrium `z* = cell(z*, x)`.

    Values and gradients are those of `deq_fixed_point` on the cell as a pure function. A cell may
    keep apart what depends on the input alone: if its class has a method `inject`, the layer
    computes `inject(x)` once, before the loop, and iterates `cell(z, inject(x))`; the state then
    starts as zeros shaped like the injection.

    State inside the cell: every evaluation of a solve, and the backward pass, sees the cell as it
    was when the layer was called, so a Dropout has one mask for the whole solve and a BatchNorm
    does not count iterations. After the solve the cell is called once at z*, which updates running
    statistics and advances random streams, as one call of an ordinary layer does.

    Attributes:
        cell: a module with `cell(z, x) -> z`.
        solver: as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        batched: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver = Anderson(),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        batched: bool = True,
        execution: Execution = Execution(),  # noqa: B008  (frozen)
    ):
        if not callable(cell):
            raise TypeError(f"cell must be callable as cell(z, x), got {type(cell).__name__}")
        self.cell = cell
        self.solver = solver
        self.gradient = gradient
        self.batched = batched
        self.execution = execution

    def __call__(
        self,
        x: PyTree,
        z0: PyTree | None = None,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
    ) -> PyTree | tuple[PyTree, ...]:
        """Solves for z*; arguments, returns and errors as `deq_fixed_point`."""
        has_injection = callable(getattr(type(self.cell), "inject", None))
        injection = self.cell.inject(x) if has_injection else x
        definition, params, rest = nnx.split(self.cell, nnx.Param, ...)
        z, stats, *samples = deq_fixed_point(
            _Apply(definition),
            (params, rest),
            injection,
            z0,
            solver=self.solver,
            gradient=self.gradient,
            batched=self.batched,
            return_stats=True,
            backward_probe=backward_probe,
            sample_at=sample_at,
            sample_gradient=sample_gradient,
            execution=self.execution,
        )
        if jax.tree.leaves(rest):
            self.cell(*jax.lax.stop_gradient((z, injection)))
        return returned(z, stats, *(samples or [()]), return_stats)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """The cell as a pure function; equal for equal definitions, so compiled code is found again."""

    definition: Any

    def __call__(self, state: tuple[PyTree, PyTree], z: PyTree, x: PyTree) -> PyTree:
        # A copy: the variables of the merged cell may change (random counters, batch statistics)
        # and must not be those of the caller, who lives at another trace level.
        return nnx.merge(self.definition, *state, copy=True)(z, x)
