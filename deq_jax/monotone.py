"""A layer for monotone cells: the equilibrium by an operator splitting."""

import dataclasses
import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax import checks
from deq_jax.control import Control
from deq_jax.execution import Execution
from deq_jax.fixed_point import returned
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.nnx import DEQ, CellFunction
from deq_jax.solve import Solver
from deq_jax.solvers.picard import Picard
from deq_jax.splitting import PeacemanRachford, Splitting, check_splitting
from deq_jax.stats import BackwardProbe

PyTree = Any


class StepSize(nnx.Variable[Any]):
    """The step size α of a splitting: a number that a layer holds and does not train."""


class MonotoneDEQ(DEQ):
    """A layer whose output is the equilibrium `z* = relu(W z* + U x + b)` of a monotone cell.

    It is `deq_jax.nnx.DEQ` on another equation, `u = T(u)`, which the splitting makes of the cell
    (see `deq_jax.splitting`). The solver iterates T, the gradient policy differentiates T, and
    residuals, tolerances and counts are those of T on its own state u. Output and arguments are z.
    `Picard()` with `PeacemanRachford()` converges for every cell of `deq_jax.cells.monotone` and
    all values of its parameters, forwards and backwards.

    The resolvent is computed once a call, before the loop, and serves the backward pass too. For
    many batches with the same parameters, `layer.resolvent()` computes it once for all of them.

    `equation(x)` is T with its parameters and input. `state(z, x)` is the u that belongs to z. The
    Jacobian of T is the same at z* as at u*, since it depends on which entries are positive alone.

    Attributes:
        cell: a cell of `deq_jax.cells.monotone`, or another module with an `inject` and the four
            methods of `deq_jax.splitting.MonotoneOperator`.
        alpha: the step size, a variable. `layer.alpha[...] = 0.5` changes it, and no function that
            was given the layer's state as an argument is compiled again. See also `tune_alpha`.
        splitting: the splitting with this step size.
        solver: as for `deq_fixed_point`.
        gradient: as for `deq_fixed_point`.
        batched: as for `deq_fixed_point`.
        control: as for `deq_fixed_point`; a call may be given another one.
        execution: as for `deq_fixed_point`.

    Raises:
        TypeError: `splitting` is no splitting, the cell is a class or lacks a method that it needs,
            or a number is assigned to `layer.alpha` instead of `layer.alpha[...]`.

    Example: equilibria `[3, 8]` and the resolvent for several batches.
        >>> layer = MonotoneDEQ(MonotoneDenseCell(5, 8, rngs=nnx.Rngs(0)))
        >>> resolvent = layer.resolvent()
        >>> z, stats = layer(jnp.ones((3, 5)), resolvent=resolvent, return_stats=True)
    """

    def __init__(
        self,
        cell: nnx.Module,
        *,
        splitting: Splitting = PeacemanRachford(),  # noqa: B008  (frozen)
        solver: Solver = Picard(),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        batched: bool = True,
        control: Control = Control(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
    ):
        check_splitting(splitting)
        if isinstance(cell, type):
            raise TypeError(
                f"cell must be an instance, such as {cell.__name__}(..., rngs=rngs); got the class"
            )
        needed = ("inject", "multiply", "resolvent", "apply_resolvent", "activation")
        missing = [name for name in needed if not hasattr(cell, name)]
        if missing:
            raise TypeError(
                f"cell must be monotone and have the methods {', '.join(needed)}; "
                f"{type(cell).__name__} lacks {', '.join(missing)}. deq_jax.nnx.DEQ takes all "
                "cells, and Picard() converges on a MonotoneGraphCell in it"
            )
        super().__init__(
            cell,
            solver=solver,
            gradient=gradient,
            batched=batched,
            control=control,
            execution=execution,
        )
        self._splitting = splitting
        self.alpha = StepSize(jnp.asarray(splitting.alpha, jnp.float32))

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; `alpha` must stay a variable."""
        if name == "alpha" and checks.is_array(value) and not isinstance(value, nnx.Variable):
            raise TypeError(f"alpha is a variable; write layer.alpha[...] = {value}")
        super().__setattr__(name, value)

    @property
    def splitting(self) -> Any:
        """The splitting with the layer's present step size."""
        # A frozen dataclass checks its fields; a step size that the user has set is checked here.
        return dataclasses.replace(cast(Any, self._splitting), alpha=self.alpha[...])

    def resolvent(self) -> PyTree:
        """The arrays of the resolvent of the present parameters and step size.

        Give them to calls as `resolvent=`. They are wrong as soon as either changes. A gradient
        with respect to the parameters passes through them. So a function that is differentiated
        has to make them itself, or leave them to the layer.
        """
        return self.splitting.prepare(self.cell)

    def __call__(
        self,
        x: PyTree,
        z0: PyTree | None = None,
        *,
        resolvent: PyTree = None,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
        control: Control | None = None,
    ) -> Any:
        """Solves for z*; arguments, returns and errors as `deq_fixed_point`.

        Args:
            x: the input of the cell.
            z0: a state to start from, like z*; by default u starts at zero.
            resolvent: what `resolvent()` returned; by default it is computed.
            return_stats: also return `SolveStats`, those of u.
            backward_probe: as for `deq_fixed_point`.
            sample_at: as for `deq_fixed_point`; the states are z.
            sample_gradient: as for `deq_fixed_point`.
            control: as for `deq_fixed_point`, in the place of the layer's own.
        """
        u0 = None if z0 is None else self.state(z0, x)
        u, stats, *samples = super().__call__(
            x if resolvent is None else _Prepared(x, resolvent),
            u0,
            return_stats=True,
            backward_probe=backward_probe,
            sample_at=sample_at,
            sample_gradient=sample_gradient,
            control=control,
        )
        splitting = self.splitting
        z, *samples = (splitting.solution(self.cell, u) for u in (u, *(samples and samples[0])))
        return returned(z, stats, tuple(samples), return_stats)

    def state(self, z: PyTree, x: PyTree) -> PyTree:
        """The state u of the equation that belongs to a state z of the cell; u* if z is z*."""
        cell = cast(Any, self.cell)
        return self.splitting.start(cell, z, cell.inject(x))

    def _equation(self, cell: nnx.Module, x: PyTree) -> tuple[Any, Any, PyTree]:
        splitting = self.splitting
        x, resolvent = x if isinstance(x, _Prepared) else (x, splitting.prepare(cell))
        definition, *states = nnx.split(cell, nnx.Param, ...)
        params, rest = states
        prepared = params, splitting, resolvent
        return _SplitCell(definition), (prepared, rest), cast(Any, cell).inject(x)


class _Prepared(NamedTuple):
    """An input and the resolvent that the call was given."""

    x: PyTree
    resolvent: PyTree


@dataclasses.dataclass(frozen=True)
class _SplitCell(CellFunction):
    """T as a pure function of the cell's state, the splitting and the resolvent."""

    def __call__(self, state: Any, z: PyTree, x: PyTree, *step: jax.Array) -> PyTree:
        (params, splitting, resolvent), rest = state
        cell = nnx.merge(self.definition, params, rest, copy=True)
        return splitting.step(cell, resolvent, z, x)


@dataclasses.dataclass(frozen=True)
class AlphaTrial:
    """One step size that `tune_alpha` tried.

    Attributes:
        alpha: the step size.
        evaluations: evaluations that the batch took.
        converged: every sample met the tolerance.
    """

    alpha: float
    evaluations: int
    converged: bool


@dataclasses.dataclass(frozen=True)
class AlphaSearch:
    """What `tune_alpha` found.

    Attributes:
        alpha: the step size that the layer has now.
        trials: all that were tried, in order.
    """

    alpha: float
    trials: tuple[AlphaTrial, ...]


def tune_alpha(
    layer: MonotoneDEQ, x: PyTree, *, largest: float = 1.0, smallest: float = 1e-4
) -> AlphaSearch:
    """Looks for the step size with the fewest iterations and gives it to the layer.

    From `largest` on the step size is halved as long as the number of evaluations does not grow,
    and the last good one is kept. Step sizes with which a sample misses its tolerance are skipped
    at the beginning and end the search later on. If none is good, the layer keeps its own. The
    published training does this in each epoch, at its 31st batch and in its middle.

    This runs outside of `jax.jit`, and compiles one solve for all step sizes.

    Args:
        layer: the layer; its `alpha` is set.
        x: a batch of inputs of the layer.
        largest: the step size to begin with.
        smallest: no smaller one is tried.

    Returns:
        The step size and all trials.

    Raises:
        ValueError: `smallest` is not positive, or above `largest`.

    Source: the code of Winston and Kolter, 2020.
    """
    if not 0 < smallest <= largest:
        raise ValueError(
            f"smallest must be positive and at most largest, got smallest={smallest!r} and "
            f"largest={largest!r}"
        )
    own, best = layer.alpha[...], None
    trials: list[AlphaTrial] = []
    alpha = float(largest)
    while alpha >= smallest:
        layer.alpha[...] = jnp.asarray(alpha, own.dtype)
        evaluations, converged = jax.device_get(_try_alpha(*nnx.split(layer), x))
        trial = AlphaTrial(alpha, int(evaluations), bool(converged))
        trials.append(trial)
        if best is not None and not (converged and trial.evaluations <= best.evaluations):
            break
        best = trial if converged else best
        alpha /= 2
    layer.alpha[...] = own if best is None else jnp.asarray(best.alpha, own.dtype)
    return AlphaSearch(float(layer.alpha[...]), tuple(trials))


@functools.partial(jax.jit, static_argnums=0)
def _try_alpha(definition: Any, state: PyTree, x: PyTree) -> tuple[jax.Array, jax.Array]:
    """The evaluations that a batch takes, and whether all samples converge."""
    stats = nnx.merge(definition, state)(x, return_stats=True)[1]
    return stats.evaluations, stats.converged.all()
