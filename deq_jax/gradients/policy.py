"""What a gradient policy is: it solves an equation and says how the solution is differentiated."""

import abc
from typing import Any, Protocol, runtime_checkable

import jax

from deq_jax.equation import Captured, Traced
from deq_jax.gradients.prepared import prepare
from deq_jax.solvers.loop import Run, Solver, iterate
from deq_jax.stats import BackwardProbe

PyTree = Any


@runtime_checkable
class GradientPolicy(Protocol):
    """How a solution is differentiated; frozen and hashable."""

    def solve(
        self,
        equation: Traced,
        captured: Captured,
        z0: PyTree,
        solver: Solver,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_policies: tuple["GradientPolicy", ...] = (),
    ) -> Run:
        """Solves the equation, with the gradient attached to the value and the samples.

        Args:
            equation: f, traced.
            captured: the arrays it uses.
            z0: the start, leaves `[B, ...]`.
            solver: the solver.
            probe: takes up the report of the backward solve of the value.
            sample_at: see `iterate`.
            sample_policies: the policy of each sample.
        """


def check_policy(name: str, policy: Any) -> None:
    """Raises a TypeError that names the argument unless `policy` is a gradient policy."""
    if isinstance(policy, type) or not isinstance(policy, GradientPolicy):
        raise TypeError(
            f"{name} must be a policy such as Implicit(), OneStep() or Unrolled(), got {policy!r}"
        )


class AtSolution(abc.ABC):
    """A policy that needs the solution only, and not how it was found.

    The solver runs on arrays cut off from differentiation; afterwards `attach` gives its result
    derivatives. The value is never changed by that: it stays the state whose residual is reported.
    """

    def solve(
        self,
        equation: Traced,
        captured: Captured,
        z0: PyTree,
        solver: Solver,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_policies: tuple["AtSolution", ...] = (),
    ) -> Run:
        """See `GradientPolicy`."""
        for policy in (self, *sample_policies):
            policy.check(solver)
        run = solve_detached(equation, captured, z0, solver, sample_at)
        value = self.attach(equation, captured, run, run.value, solver, probe)
        samples = tuple(
            policy.attach(equation, captured, run, sample, solver, None)
            for policy, sample in zip(sample_policies, run.samples, strict=True)
        )
        return run._replace(value=value, samples=samples)

    def check(self, solver: Solver) -> None:  # noqa: B027  (most policies serve any solver)
        """Raises if the policy cannot serve a solution found by `solver`."""

    @abc.abstractmethod
    def attach(
        self,
        equation: Traced,
        captured: Captured,
        run: Run,
        z: PyTree,
        solver: Solver,
        probe: BackwardProbe | None,
    ) -> PyTree:
        """`z`, with derivatives with respect to `captured.variables`.

        Args:
            equation: f, traced.
            captured: the arrays it uses.
            run: what the solver left behind.
            z: its solution or one of its samples, without derivatives.
            solver: the solver.
            probe: takes up the report of the backward solve.
        """


def solve_detached(
    equation: Traced,
    captured: Captured,
    z0: PyTree,
    solver: Solver,
    sample_at: tuple[int, ...] = (),
) -> Run:
    """Solves the equation; no derivative goes through."""
    detached = Captured(jax.lax.stop_gradient(captured.variables), captured.constants)
    prepared = prepare(equation, detached)
    run = iterate(
        prepared,
        jax.lax.stop_gradient(z0),
        solver,
        mesh_axes=prepared.mesh_axes,
        sample_at=sample_at,
        smaller=prepared.smaller,
    )
    return jax.lax.stop_gradient(run)
