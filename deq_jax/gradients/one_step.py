"""The one-step gradient, also called Jacobian-free backpropagation.

Source: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks", 2022.
"""

import dataclasses
from typing import Any

from deq_jax import checks
from deq_jax.adjoint import attach
from deq_jax.closure import Closure
from deq_jax.gradients.neumann import Series
from deq_jax.solve import Solver
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class OneStep:
    """Gradient of one application of f at the solution: `(p̄, x̄) = (∂f/∂(params, x))ᵀ y`.

    The first derivatives of `f(params, stop_gradient(z*), x)`. Bias: Jᵀ is neglected, so it is
    exact only where J = ∂f/∂z vanishes, and the error grows with J; still a descent direction where
    J is small enough (Fung et al., theorem 3.1). Cost: one product and one linearisation.

    A `BackwardProbe` reports the neglected `‖Jᵀ y‖ / ‖y‖` at the cost of one more product.
    """

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> PyTree:
        """See `GradientPolicy`."""
        return attach(f, solution.value, Series(damping=1.0, terms=1), probe)
