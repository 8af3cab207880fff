"""DEQ layer for Flax Linen."""

import dataclasses
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import Scope, apply, unfreeze

from deq_jax import sharding, tree
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
from deq_jax.stats import BackwardProbe, SolveStats, Status

PyTree = Any


class DEQ(nn.Module):
    """A layer whose output is the equilibrium `z* = cell(z*, x)`.

    The twin of `deq_jax.nnx.DEQ`: the same values, gradients and treatment of `inject`, `zeros`,
    `batched`, dropout and batch statistics. Variables are the cell's own, under `cell`.

    The layer sows its `SolveStats` as `stats` into the collection `intermediates`.

    Initialisation calls the cell once, to make its parameters, and does not solve: the output of
    `init_with_output` is that one application, before any normalisation.

    With a `normalization` there are `scale` in the collection `params`, its trainable parameters (g
    by path), and `statistics` in the collection `normalization`, each if it has any. Statistics
    advance with each call for which that collection is mutable.

    Attributes:
        cell: a module with `cell(z, x, **kwargs) -> z`.
        solver: as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        batched: as for `deq_jax.nnx.DEQ`.
        has_aux: as for `deq_jax.nnx.DEQ`.
        pass_step: as for `deq_jax.nnx.DEQ`.
        control: as for `deq_jax.nnx.DEQ`.
        execution: as for `deq_fixed_point`.
        rng_streams: names of the random streams the cell draws from; those present are split once
            a call and are then the same in every evaluation.
        normalization: as for `deq_jax.nnx.DEQ`.
        inject: as for `deq_jax.nnx.DEQ`.
        deterministic: True keeps the statistics of the normalisation, in a mutable collection too.
    """

    cell: nn.Module
    solver: Solver = Anderson()
    gradient: GradientPolicy = Implicit()
    batched: bool | None = None
    has_aux: bool = False
    pass_step: bool = False
    control: Control = Control()
    execution: Execution = Execution()
    rng_streams: tuple[str, ...] = ("dropout",)
    normalization: Normalization | None = None
    inject: bool | None = None
    deterministic: bool = False

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
        **kwargs: Any,
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
        **kwargs: Any,
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
        **kwargs: Any,
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
        **kwargs: Any,
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
        **kwargs: Any,
    ) -> Any: ...

    @nn.compact
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
        **kwargs: Any,
    ) -> Any:
        """Solves for z*; `kwargs`, hashable, go to the cell; the rest as `deq_fixed_point`."""
        if not callable(self.cell):
            raise TypeError(f"cell must be callable as cell(z, x), got {self.cell!r}")
        check_normalization(self.normalization)
        if self.is_initializing():
            injection = self._inject(None, x)
            start = start_of(self.cell, x, z0)
            start = jax.tree.map(jnp.zeros_like, injection) if start is None else start
            z = self.cell(start, injection, *self._first_step(start), **kwargs)
            z, *aux = z if self.has_aux else (z,)
            if self.normalization is not None:
                self._init_normalization(self.normalization)
            stats = _nothing_solved(z)
            return returned(z, stats, (z,) * len(sample_at), return_stats, tuple(aux))

        effective = self._effective_params(advance=not self.deterministic)
        injection = self._inject(effective, x)
        f, state = self._function(effective, kwargs)
        z, stats, *rest = deq_fixed_point(
            f,
            state,
            injection,
            start_of(self.cell, x, z0),
            solver=self.solver,
            gradient=self.gradient,
            batched=is_batched(self.cell, self.batched),
            return_stats=True,
            backward_probe=backward_probe,
            sample_at=sample_at,
            sample_gradient=sample_gradient,
            has_aux=self.has_aux,
            pass_step=self.pass_step,
            control=self.control if control is None else control,
            execution=self.execution,
        )
        if f.changing or self.is_mutable_collection("intermediates"):
            step = () if stats.step is None else (stats.step,)
            self._call_at(f, state, (*jax.lax.stop_gradient((z, injection)), *step))
        self.sow("intermediates", "stats", stats)
        samples = rest[0] if sample_at else ()
        return returned(z, stats, samples, return_stats, (rest[-1],) if self.has_aux else ())

    def _call_at(self, f: "_Apply", state: PyTree, arguments: tuple[PyTree, ...]) -> None:
        """Calls the cell at z*, on the shards of the solve, and keeps the variables it writes."""
        assert self.cell.scope is not None
        write = _Write(f.cell, self.cell.scope.mutable or (), f.kwargs)
        named = sharding.as_axes(self.execution.shard_axis)
        z, injection, *_ = arguments
        mesh, axes = sharding.find_mesh(named, injection, z, is_batched(self.cell, self.batched))
        if mesh is None:
            written = write(state, *arguments)
        else:
            written = sharding.call_on_shards(write, state, arguments, axes, mesh)
        if self.normalization is not None:
            written.pop("params", None)  # the effective ones
        for collection, variables in written.items():
            for name, value in variables.items():
                self.cell.put_variable(collection, name, value)

    def _first_step(self, z: PyTree) -> tuple[jax.Array, ...]:
        """The number that the cell gets in its first call, if it takes one."""
        if not self.pass_step:
            return ()
        batched = is_batched(self.cell, self.batched)
        batch = jax.tree.leaves(z)[0].shape[:1] if batched else ()
        return (jnp.zeros(batch, jnp.int32),)

    def _init_normalization(self, normalization: Normalization) -> None:
        scale, statistics = normalization.init(self.cell.variables.get("params", {}))
        if jax.tree.leaves(scale):
            self.param("scale", lambda _: scale)
        if jax.tree.leaves(statistics):
            self.variable("normalization", "statistics", lambda: statistics)

    def equation(self, x: PyTree, **kwargs: Any) -> tuple["_Apply", tuple[PyTree, PyTree], PyTree]:
        """What the layer solves: `f, params, injection` with `z* = f(params, z*, injection)`.

        As `deq_jax.nnx.DEQ.equation`; by itself `layer.apply(variables, x, method="equation")`.
        `params` is the pair of the cell's variables, normalised if there is a normalisation, and
        its random streams.
        """
        effective = self._effective_params(advance=False)
        return *self._function(effective, kwargs), self._inject(effective, x)

    def _function(
        self, effective: PyTree | None, kwargs: dict[str, Any]
    ) -> tuple["_Apply", tuple[PyTree, PyTree]]:
        """The cell as a pure function, and its variables and random streams."""
        cell, variables = self.cell.unbind()
        if effective is not None:
            variables = {**variables, "params": effective}
        rngs = {name: self.make_rng(name) for name in self.rng_streams if self.has_rng(name)}
        changing = tuple(name for name in variables if name != "params")
        return _Apply(cell, changing, tuple(sorted(kwargs.items()))), (variables, rngs)

    def _inject(self, effective: PyTree | None, x: PyTree) -> PyTree:
        return _injection(self.cell, effective, x) if has_injection(self.cell, self.inject) else x

    def _effective_params(self, *, advance: bool) -> PyTree | None:
        """The cell's normalised parameters; None without a normalisation."""
        if self.normalization is None:
            return None
        params = self.cell.variables.get("params", {})
        scale: PyTree = self.get_variable("params", "scale", {})
        statistics: PyTree = self.get_variable("normalization", "statistics", {})
        effective, advanced = self.normalization(params, scale, statistics)
        changes = self.is_mutable_collection("normalization") and advance
        if changes and jax.tree.leaves(statistics):
            self.put_variable("normalization", "statistics", advanced)
        return effective


def _injection(cell: nn.Module, params: PyTree | None, x: PyTree) -> PyTree:
    """`cell.inject(x)` of a bound cell, with other `params` unless None."""

    def inject(cell: Any) -> PyTree:
        return cell.inject(x)

    if params is not None:
        inject = nn.map_variables(inject, "params", trans_in_fn=lambda _: {"params": params})
    return inject(cell)


@dataclasses.dataclass(frozen=True)
class _Apply:
    """The cell as a pure function, which drops the variables that the cell writes."""

    cell: nn.Module
    changing: tuple[str, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(
        self, state: tuple[PyTree, PyTree], z: PyTree, x: PyTree, *step: jax.Array
    ) -> PyTree:
        variables, rngs = state
        kwargs = dict(self.kwargs)
        value, _ = self.cell.apply(
            variables, z, x, *step, **kwargs, rngs=rngs, mutable=list(self.changing)
        )
        return value


@dataclasses.dataclass(frozen=True)
class _Write:
    """What a call of the cell as a pure function writes to its mutable collections.

    It draws what the solve drew. `nn.Module.apply` would end a `capture_intermediates` around it.
    """

    cell: nn.Module
    mutable: Any
    kwargs: tuple[tuple[str, Any], ...]

    def __call__(
        self, state: tuple[PyTree, PyTree], z: PyTree, x: PyTree, *step: jax.Array
    ) -> dict[str, Any]:
        variables, rngs = state

        def call(scope: Scope) -> PyTree:
            cell: Any = self.cell.clone(parent=scope)
            return cell(z, x, *step, **dict(self.kwargs))

        _, written = apply(call, self.mutable)(variables, rngs=rngs)
        return dict(unfreeze(written))


def _nothing_solved(z: PyTree) -> SolveStats:
    """The report of the one application that initialisation makes."""
    zeros = tree.zeros_per_sample(z)
    count = zeros.astype(jnp.int32)
    return SolveStats(zeros + jnp.inf, count + 1, count + int(Status.MAX_ITER), jnp.int32(1))
