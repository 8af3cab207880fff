"""What a gradient policy is: it says how a solution is differentiated."""

from typing import Any, Protocol, runtime_checkable

from deq_jax.closure import Closure
from deq_jax.solve import Solver
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@runtime_checkable
class GradientPolicy(Protocol):
    """How a solution is differentiated; any object with these two methods serves.

    A policy that differentiates the solver's own loop sets `unrolled = True`. The solve is then
    made of scans, by the solver that `limited(solver)` returns. A policy that also has a method
    `solve(f, z0, solver, sample_at, probe)`, as `Reversed` has, finds the solution itself.
    """

    def check(self, solver: Solver) -> None:
        """Raises if the policy cannot serve a solution found by `solver`."""
        ...

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> Any:
        """`solution.value`, with derivatives with respect to the arrays of f.

        The value itself must not change: it is the state whose residual is reported.

        Args:
            f: the equation; `f(z)` is differentiable in z and in `f.arrays`.
            solution: what the solver left behind, without derivatives.
            solver: the solver that found it.
            probe: takes up the report of the backward solve.
        """
        ...


def check_policy(name: str, policy: Any) -> None:
    """Raises a TypeError that names the argument unless `policy` is a gradient policy."""
    if isinstance(policy, type) or not isinstance(policy, GradientPolicy):
        raise TypeError(
            f"{name} must be a policy such as Implicit(), OneStep() or Unrolled(), got {policy!r}"
        )


def differentiates_solver(policy: Any) -> bool:
    """Whether the policy is one that differentiates the solver's own loop."""
    return getattr(policy, "unrolled", False)


def refuse_probe(policy: Any, probe: BackwardProbe | None) -> None:
    """Raises if a probe was passed to a policy that solves no linear system."""
    if probe is not None:
        raise ValueError(
            f"backward_probe reports a linear backward solve, but {policy!r} makes none; leave it "
            "out, or use Implicit, Neumann or OneStep"
        )
