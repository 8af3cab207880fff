"""The one-step gradient, also called Jacobian-free backpropagation.

Source: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", 2022.
"""

import dataclasses
from typing import Any

from deq_jax.equation import Captured, Traced
from deq_jax.gradients.neumann import TruncatedSeries
from deq_jax.gradients.policy import AtSolution
from deq_jax.gradients.rule import at_solution
from deq_jax.solvers.loop import Run, Solver
from deq_jax.stats import BackwardProbe

PyTree = Any


@dataclasses.dataclass(frozen=True)
class OneStep(AtSolution):
    """Gradient of one application of f at the solution: `(p̄, x̄) = (∂f/∂(params, x))ᵀ y`.

    The first derivatives of `f(params, stop_gradient(z*), x)`. Bias: Jᵀ is neglected, so it is
    exact only where J = ∂f/∂z vanishes, and the error grows with J; still a descent direction where
    J is small enough (Fung et al., theorem 3.1). Cost: one product and one linearisation.

    A `BackwardProbe` reports the neglected `‖Jᵀ y‖ / ‖y‖` at the cost of one more product.
    """

    def attach(
        self,
        equation: Traced,
        captured: Captured,
        run: Run,
        z: PyTree,
        solver: Solver,
        probe: BackwardProbe | None,
    ) -> PyTree:
        """See `AtSolution`."""
        return at_solution(equation, TruncatedSeries(1, 1.0), captured, z, None, probe)
