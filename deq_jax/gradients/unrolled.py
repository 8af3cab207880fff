"""Backpropagation through the solver: the control that every other policy is compared with."""

import dataclasses
from typing import Any

from deq_jax import checks
from deq_jax.closure import Closure
from deq_jax.control import Control, Watch
from deq_jax.gradients.policy import refuse_attach, refuse_probe
from deq_jax.passes import ready_to_differentiate
from deq_jax.solve import Solver, check_samples, solve
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Unrolled:
    """Gradient of the computation that found the returned state, by ordinary differentiation.

    The very solver runs, with its stops, guards and choice of the best iterate, in a loop that can
    be differentiated in any mode. Bias: none with respect to what was computed; with respect to
    the equation, that of a solution that is not exact, and it may be large: the derivatives of
    Anderson's and Broyden's iterates converge later than the iterates do (docs/gradients.md). Every
    sampled state is differentiated the same way.

    Cost: two more evaluations for each one of the forward pass, and a product. Memory: about
    2 √max_iter copies of the solver's state, and one linearisation of f; it is what the other
    policies do without.

    On a CPU convolutions are fast in reverse mode, and slow in forward mode, as for `Truncated`.

    The gradient of a solver's own small systems is taken too. The inner solves of NewtonKrylov are
    differentiated as if they were exact.

    Attributes:
        steps: most evaluations, in place of the solver's `max_iter`; None leaves that.

    Raises:
        ValueError, TypeError: `steps` is no number or below 1; a `BackwardProbe` is passed.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            checks.check_count(self, "steps")

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""
        self.limited(solver)

    def limited(self, solver: Solver) -> Solver:
        """The solver with `max_iter = steps`."""
        if self.steps is None:
            return solver
        if not dataclasses.is_dataclass(solver):
            raise TypeError(
                "Unrolled can set steps only on a solver that is a dataclass, got "
                f"{type(solver).__name__}; set max_iter on the solver itself"
            )
        options: Any = solver
        return dataclasses.replace(options, max_iter=self.steps)

    def solve(
        self,
        f: Closure,
        z0: PyTree,
        solver: Solver,
        control: Control,
        watch: Watch,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        **options: Any,
    ) -> Solution:
        """See `GradientPolicy`."""
        refuse_probe(self, probe)
        solver = self.limited(solver)
        check_samples(sample_at, solver)
        control.check(solver.max_iter)
        if not getattr(solver, "linearizes", False):  # its products are forward mode
            f = ready_to_differentiate(f)
        options["sample_at"] = sample_at
        return solve(f, z0, solver, control, watch, differentiable=True, **options)

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> Any:
        """Raises: a solution alone does not say how it was found."""
        refuse_attach(self)
