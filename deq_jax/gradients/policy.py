"""What a gradient policy is: it says how a solution is differentiated."""

from typing import Any, Protocol, runtime_checkable

from deq_jax.closure import Closure
from deq_jax.solve import Solver
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@runtime_checkable
class GradientPolicy(Protocol):
    """How a solution is differentiated; any object with these two methods serves.

    A policy that differentiates the loop itself has a third method, which makes the solve, and its
    `attach` is not called: `solve(f, z0, solver, control, watch, *, probe, **options)`, with the
    arguments and the return value of `deq_jax.solve.solve`, differentiable in the arrays of f.
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
    """Whether the policy is one that differentiates the loop itself."""
    return hasattr(policy, "solve")


def refuse_attach(policy: Any) -> Any:
    """Raises, for a policy that differentiates the loop itself: a state that is given has none."""
    raise TypeError(
        f"{policy!r} differentiates the iterates of a solve, and a state that is given has none; "
        "take Implicit() for it"
    )


def refuse_probe(policy: Any, probe: BackwardProbe | None) -> None:
    """Raises if a probe was passed to a policy that solves no linear system."""
    if probe is not None:
        raise ValueError(
            f"backward_probe reports a linear backward solve, but {policy!r} makes none; leave it "
            "out, or use Implicit, Neumann or OneStep"
        )
