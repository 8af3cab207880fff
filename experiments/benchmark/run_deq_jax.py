"""deq_jax: solvers, devices, layouts and dtypes as the implementation's options say.

At the end: Anderson with an absolute ridge in deq_jax's loop, for the tables at equal ridge.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, BackwardProbe, Execution, Picard, columns, deq_fixed_point, tree
from deq_jax.checks import register_options
from deq_jax.closure import Closure, close
from deq_jax.passes import ready_for_loop
from deq_jax.solvers.anderson import AndersonState
from experiments.benchmark.jax_calls import (
    CELLS,
    Given,
    JaxCalls,
    differentiate,
    given,
    loop_of,
    residual_channels_first,
)
from experiments.benchmark.problems import Arrays, Problem, to_channels_first, to_channels_last

PyTree = Any

AXIS = "batch"


class Calls(JaxCalls):
    """See `JaxCalls`.

    Args:
        problem: what is solved.
        case: `mode`, `time_cell`, `time_products`.
        reference: not looked at.
        options: `solver` (`picard`), `ridge` (an absolute one), `devices`, `layout` (`NCHW`),
            `shrink_to`, `cell_dtype`, `dtype` (of everything), `stricter` (divides the tolerance),
            `jit` (False: every call is eager).
    """

    def __init__(
        self, problem: Problem, case: dict[str, Any], reference: Arrays, options: dict[str, Any]
    ):
        del reference
        self.problem, self.options, self.mode = problem, options, case["mode"]
        self.channels_first = options.get("layout") == "NCHW"
        self.cell = residual_channels_first if self.channels_first else CELLS[problem.cell]
        self.mesh = None
        if "devices" in options:
            shape = (options["devices"],)
            self.mesh = jax.make_mesh(shape, (AXIS,), axis_types=(AxisType.Auto,))
            jax.set_mesh(self.mesh)
        arrays = self._place(given(self._converted()))
        super().__init__(self.mode, self.layer, arrays, options.get("jit", True))
        if case["time_cell"] and "cell_dtype" not in options:
            # In NCHW as it is written it takes seconds; that is what preparing is for.
            if not self.channels_first:
                self.time_loop("cell", self._shard(self._cell_as_written))
            self.time_loop("prepared cell", self._shard(self._cell_as_run))
        if case["time_products"]:
            self.time_loop("product", functools.partial(self._products, prepared=False))
            self.time_loop("prepared product", functools.partial(self._products, prepared=True))

    def layer(
        self, params: Any, x: Any, probe: BackwardProbe | None = None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The solution; the evaluations and the residuals as the solver saw them."""
        z, stats = deq_fixed_point(
            self.cell,
            params,
            x,
            jnp.zeros_like(x["x"]),
            solver=self._solver(),
            return_stats=True,
            backward_probe=probe,
            **self._execution(),
        )
        return z, (stats.evaluations, stats.residual)

    def backward_products(self) -> int | None:
        """Transposed products, from a call with a probe; it is not timed."""
        if self.mode == "forward":
            return None
        probe = BackwardProbe.zeros(len(self.problem.cotangent))

        def report(given: Given) -> BackwardProbe:
            _, gradients, _ = differentiate(self.layer, given, self.mode == "step", probe)
            return gradients[-1]

        return int(np.max(jax.jit(report)(self.given).evaluations))

    def evaluations(self) -> int:
        """Evaluations of the last call; of the slowest device, where there are several."""
        return int(np.max(self._last[2][0]))

    def result(self) -> Arrays:
        """See `JaxCalls.result`; channels last."""
        result = super().result()
        if not self.channels_first:
            return result
        return {name: to_channels_last(name, array) for name, array in result.items()}

    def notes(self) -> str:
        """How it was set."""
        solver = self._solver()
        text = f"{type(solver).__name__}, tolerance {solver.tol:.3g} of every sample"
        if not self.problem.tol:
            own = np.max(np.asarray(self._last[2][1], np.float32))
            text += f"; largest residual as the solver saw it {own:.1e}"
        return text

    def _solver(self) -> Any:
        tol = self.problem.tol / self.options.get("stricter", 1)
        limits = {"tol": tol, "max_iter": self.problem.max_iter}
        if self.options.get("solver") == "picard":
            return Picard(**limits)
        if "ridge" in self.options:
            return AbsoluteRidgeAnderson(ridge=self.options["ridge"], **limits)
        return Anderson(**limits)

    def _execution(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if self.mesh is not None:
            fields["shard_axis"] = AXIS
        if "shrink_to" in self.options:
            fields["shrink_to"] = self.options["shrink_to"]
        if "cell_dtype" in self.options:
            fields["cell_dtype"] = jnp.dtype(self.options["cell_dtype"])
        if not fields:
            return {}
        return {"execution": Execution(**fields)}

    def _converted(self) -> Problem:
        """The problem in the layout and the dtype that the options ask for."""
        problem = self.problem
        changes: dict[str, Any] = {}
        if self.channels_first:
            changes = {
                "params": {k: to_channels_first(k, a) for k, a in problem.params.items()},
                "x": {k: to_channels_first(k, a) for k, a in problem.x.items()},
                "cotangent": to_channels_first("cotangent", problem.cotangent),
            }
        if "dtype" in self.options:
            dtype = jnp.dtype(self.options["dtype"])
            changes = {
                "params": {k: a.astype(dtype) for k, a in problem.params.items()},
                "x": {k: a.astype(dtype) for k, a in problem.x.items()},
                "cotangent": problem.cotangent.astype(dtype),
            }
        return Problem(**{**vars(problem), **changes})

    def _place(self, given: Given) -> Given:
        if self.mesh is None:
            return given
        whole, split = (NamedSharding(self.mesh, spec) for spec in (P(), P(AXIS)))
        placed = jax.device_put((given.x, given.cotangent), split)
        return Given(jax.device_put(given.params, whole), *placed)

    def _shard(self, loop: Any) -> Any:
        if self.mesh is None:
            return loop
        return jax.shard_map(
            loop, mesh=self.mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS), check_vma=False
        )

    def _cell_as_written(self, params: Any, x: Any) -> jax.Array:
        return loop_of(lambda z: self.cell(params, z, x), jnp.zeros_like(x["x"]))

    def _cell_as_run(self, params: Any, x: Any) -> jax.Array:
        z = jnp.zeros_like(x["x"])
        return loop_of(ready_for_loop(close(self.cell, params, x, z)), z)

    def _products(self, params: Any, x: Any, *, prepared: bool) -> jax.Array:
        """Damped transposed products, as they are written or as the backward loop runs them."""
        y = self.given.cotangent
        _, pullback = jax.vjp(lambda z: self.cell(params, z, x), jnp.zeros_like(y))
        product = lambda u: pullback(u)[0]  # noqa: E731
        if prepared:
            product = ready_for_loop(Closure.of(product, y))
        return loop_of(lambda u: 0.5 * product(u) + y, y)


@register_options
@dataclasses.dataclass(frozen=True)
class AbsoluteRidgeAnderson(Anderson):
    """`(H + λ I) w = 1`, `α = w / Σ w`: the ridge of the tutorial, torchdeq and jaxopt.

    None of `Anderson`'s guards; its window and its incremental Gram matrix.

    Attributes:
        ridge: λ, in the units of a squared residual.
    """

    def step(self, z: PyTree, fz: PyTree, state: AndersonState) -> tuple[PyTree, AndersonState]:
        """See `Anderson.step`."""
        flat, target = tree.flatten_samples(z), tree.flatten_samples(fz)
        g = tree.subtract(target, flat)
        residuals = columns.store(state.residuals, g, state.slot)
        targets = columns.store(state.targets, target, state.slot)
        row = columns.inner_products(residuals, g).T
        gram = lax.dynamic_update_index_in_dim(state.gram, row, state.slot, 0)
        gram = lax.dynamic_update_index_in_dim(gram, row, state.slot, 1)
        slots = len(gram)
        newest = jnp.arange(slots, dtype=jnp.int32) == state.slot
        filled = state.filled | newest[:, None]

        identity = jnp.eye(slots, dtype=gram.dtype)[:, :, None]
        both = filled[:, None] & filled[None]
        matrix = jnp.where(both, gram + self.ridge * identity, identity).transpose(2, 0, 1)
        w = jnp.linalg.solve(matrix, filled.T.astype(gram.dtype)[..., None])[..., 0]
        proposal = columns.combine(w / w.sum(1, keepdims=True), targets)
        proposal = jax.tree.map(lambda p, z: p.reshape(z.shape), proposal, z)
        slot = (state.slot + 1) % slots
        return proposal, AndersonState(residuals, targets, gram, filled, state.lowest, slot)
