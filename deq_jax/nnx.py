"""DEQ layer for Flax NNX."""

import dataclasses
from typing import Any, Literal, cast, overload

import jax
from flax import nnx

from deq_jax import sharding
from deq_jax.closure import Cell
from deq_jax.control import Control
from deq_jax.execution import Execution
from deq_jax.fixed_point import (
    deq_fixed_point,
    has_injection,
    is_batched,
    returned,
    start_of,
)
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.solve import Solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.stability.normalization import Normalization, check_normalization
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any


class NormalizationStatistics(nnx.Variable[Any]):
    """What a normalisation carries from call to call: vectors of a power iteration, say."""


class DEQ(nnx.Module):
    """A layer whose output is the equilibrium `z* = cell(z*, x)`.

    Values and gradients are those of `deq_fixed_point` on the cell as a pure function. A cell may
    keep apart what depends on the input alone: if its class has a method `inject`, the layer
    computes `inject(x)` once, before the loop, and iterates `cell(z, inject(x))`; the state then
    starts as zeros shaped like the injection. `inject=False` says that a method of that name is
    something else. A cell whose state has another shape has a method `zeros`: without z0 the layer
    starts from `cell.zeros(x)`, x being the input of the layer. A cell whose whole input is one
    equation, such as a graph, says so with a class attribute `batched = False`.

    State inside the cell: every evaluation of a solve, and the backward pass, sees the cell as it
    was when the layer was called, so a Dropout has one mask for the whole solve and a BatchNorm
    does not count iterations. After the solve the cell is called once at z*, which updates running
    statistics, advances random streams and sows, as one call of an ordinary layer does. With
    `Execution(shard_axis="data")` this call too runs on the shards. A `BatchNorm` in the cell with
    `axis_name="data"` has the statistics of the whole batch. One without `axis_name` has those of
    a shard, and its running statistics are their mean over the shards. Values that a shard sows
    for its samples stay sharded. Under `nnx.capture(..., nnx.Intermediate)` the layer sows its
    `SolveStats` as `stats`, from inside an `nnx.Sequential` too.

    With a `normalization` the kernels of the cell are its v (or W₀): the effective weights are
    computed once a call, before the loop, and all uses of the cell in that call, `inject` and the
    last call at z* too, have them. Gradients reach v and g. Trainable parameters start from the
    kernels that the cell has when the layer is made, so set these before. Statistics advance in
    training mode, with each call. They are `scale` and `statistics`: each a dict by path, of
    `nnx.Param` and of `NormalizationStatistics`.

    Attributes:
        cell: a module with `cell(z, x) -> z`.
        solver: as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        batched: as for `deq_fixed_point`; with None, True unless the class of the cell has the
            attribute `batched = False`.
        has_aux: the cell returns a pair `(z, aux)`; see `deq_fixed_point`.
        pass_step: the cell is called as `cell(z, x, step)`; see `deq_fixed_point`.
        control: as for `deq_fixed_point`; a call may be given another one.
        execution: as for `deq_fixed_point`.
        normalization: `deq_jax.stability.WeightNorm()`, `SpectralNorm()` or another map of the
            cell's parameters to effective ones; None leaves them as they are.
        inject: whether the cell's method `inject` is its injection; None if its class has one.
        deterministic: True keeps the statistics of the normalisation; set by `eval()` and
            `train()`.
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        solver: Solver = Anderson(),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        batched: bool | None = None,
        has_aux: bool = False,
        pass_step: bool = False,
        control: Control = Control(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        normalization: Normalization | None = None,
        inject: bool | None = None,
        deterministic: bool = False,
    ):
        if not callable(cell):
            raise TypeError(f"cell must be callable as cell(z, x), got {type(cell).__name__}")
        check_normalization(normalization)
        has_injection(cell, inject)
        self.cell = cell
        self.solver = solver
        self.gradient = gradient
        self.batched = is_batched(cell, batched)
        self.has_aux = has_aux
        self.pass_step = pass_step
        self.control = control
        self.execution = execution
        self.normalization = normalization
        self.inject = inject
        self.deterministic = deterministic
        if normalization is not None:
            scale, statistics = normalization.init(nnx.state(cell, nnx.Param))
            # A variable for each array, which states as plain arrays can hold: not one for a tree.
            self.scale = nnx.data(jax.tree.map(nnx.Param, scale))
            self.statistics = nnx.data(jax.tree.map(NormalizationStatistics, statistics))

    def set_view(self, deterministic: bool | None = None) -> None:
        """For `nnx.view`; see the class's attribute.

        Args:
            deterministic: if True, the statistics of the normalisation are kept.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    @overload
    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        return_stats: Literal[False] = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[()] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> PyTree: ...

    @overload
    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        return_stats: Literal[True],
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[()] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> tuple[PyTree, SolveStats]: ...

    @overload
    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        return_stats: Literal[False] = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, *tuple[int, ...]],
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> tuple[PyTree, tuple[PyTree, ...]]: ...

    @overload
    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        return_stats: Literal[True],
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, *tuple[int, ...]],
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> tuple[PyTree, SolveStats, tuple[PyTree, ...]]: ...

    @overload
    def __call__(
        self,
        x: PyTree,
        z0: PyTree = None,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> Any: ...

    def __call__(
        self,
        x: PyTree,
        z0: PyTree | None = None,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> Any:
        """Solves for z*; arguments, returns and errors as `deq_fixed_point`.

        Without z0 the solve starts from `cell.zeros(x)` if the class of the cell has this method.
        With `control`, in the place of the layer's own, a budget can change from call to call.
        """
        cell = self._effective_cell(advance=not self.deterministic)
        f, state, injection = self._equation(cell, x)
        z, stats, *rest = deq_fixed_point(
            f,
            state,
            injection,
            start_of(cell, x, z0),
            solver=self.solver,
            gradient=self.gradient,
            batched=self.batched,
            return_stats=True,
            backward_probe=backward_probe,
            sample_at=sample_at,
            sample_gradient=sample_gradient,
            has_aux=self.has_aux,
            pass_step=self.pass_step,
            control=self.control if control is None else control,
            execution=self.execution,
        )
        if jax.tree.leaves(state[1]) or f.definition in _sowing:
            step = () if stats.step is None else (stats.step,)
            self._call_at(cell, f, state, (*jax.lax.stop_gradient((z, injection)), *step))
        if hasattr(self, "__captures__"):  # otherwise Flax warns of a sow that nobody reads
            self.sow(nnx.Intermediate, "stats", stats)
        samples = rest[0] if sample_at else ()
        return returned(z, stats, samples, return_stats, (rest[-1],) if self.has_aux else ())

    def _call_at(
        self, cell: nnx.Module, f: "CellFunction", state: PyTree, arguments: tuple[PyTree, ...]
    ) -> None:
        """Calls the cell at z*, on the shards of the solve, and keeps the state that it writes."""
        named = sharding.as_axes(self.execution.shard_axis)
        z, injection, *_ = arguments
        mesh, axes = sharding.find_mesh(named, injection, z, self.batched)
        if mesh is None:
            cast(Any, cell)(*arguments)
            return
        written = sharding.call_on_shards(f.written, state, arguments, axes, mesh)
        before = {id(leaf) for leaf in jax.tree.leaves(state)}
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(written)
            if any(id(leaf) not in before for leaf in jax.tree.leaves(variable))
        ]
        nnx.update(cell, nnx.from_flat_state(changed))

    def equation(self, x: PyTree) -> tuple[Cell, tuple[PyTree, PyTree], PyTree]:
        """What the layer solves: `f, params, injection` with `z* = f(params, z*, injection)`.

        For whatever takes an equation, such as `stability.jacobian_frobenius`, `spectral_radius`
        or `solve_adjoint`. `params` is the pair of the cell's `nnx.Param` state, normalised if
        there is a normalisation, and all its other state; gradients reach the former. Nothing of
        the layer changes, except what `inject` itself may change.
        """
        return self._equation(self._effective_cell(advance=False), x)

    def _equation(
        self, cell: nnx.Module, x: PyTree
    ) -> tuple["CellFunction", tuple[PyTree, PyTree], PyTree]:
        injection = cast(Any, cell).inject(x) if has_injection(cell, self.inject) else x
        definition, *states = nnx.split(cell, nnx.Param, ...)
        params, rest = states
        return CellFunction(definition), (params, rest), injection

    def effective_cell(self) -> nnx.Module:
        """The cell as a call of the layer has it: with normalised weights, if it has such.

        All else in it, random streams say, is the layer's own.
        """
        return self._effective_cell(advance=False)

    def _effective_cell(self, *, advance: bool) -> nnx.Module:
        """The cell with effective weights; its other variables are the layer's own."""
        if self.normalization is None:
            return self.cell
        definition, *states = nnx.split(self.cell, nnx.Param, ...)
        params, rest = states
        scale, statistics = _values(self.scale), _values(self.statistics)
        effective, advanced = self.normalization(params, scale, statistics)
        if jax.tree.leaves(statistics) and advance:
            jax.tree.map(_assign, self.statistics, advanced, is_leaf=_is_variable)
        # No copy: what the cell writes, batch statistics and random counters, must stay.
        return nnx.merge(definition, effective, rest)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _values(variables: PyTree) -> PyTree:
    return jax.tree.map(lambda v: v.get_value(), variables, is_leaf=_is_variable)


def _assign(variable: nnx.Variable[Any], value: jax.Array) -> None:
    variable.set_value(value)


_sowing: dict[Any, None] = {}
"""Definitions of cells that sow values when they are called; they hold no arrays."""
_MOST_DEFINITIONS = 256


@dataclasses.dataclass(frozen=True)
class CellFunction:
    """The cell as a pure function; equal for equal definitions, so compiled code is found again."""

    definition: Any

    def written(
        self, state: tuple[PyTree, PyTree], z: PyTree, x: PyTree, *step: jax.Array
    ) -> PyTree:
        """The state of the cell after a call."""
        cell = nnx.merge(self.definition, *state, copy=True)
        cell(z, x, *step)
        return nnx.state(cell)

    def __call__(
        self, state: tuple[PyTree, PyTree], z: PyTree, x: PyTree, *step: jax.Array
    ) -> PyTree:
        """The new state of the cell, `cell(z, x)`."""
        # A copy: the variables of the merged cell may change (random counters, batch statistics)
        # and must not be those of the caller, who lives at another trace level.
        cell = nnx.merge(self.definition, *state, copy=True)
        z = cell(z, x, *step)
        # What a cell sows grows its state. What it sowed on the way is dropped with the copy.
        if len(jax.tree.leaves(nnx.state(cell))) > len(jax.tree.leaves(state)):
            if len(_sowing) >= _MOST_DEFINITIONS:
                _sowing.pop(next(iter(_sowing)))
            _sowing[self.definition] = None
        return z
