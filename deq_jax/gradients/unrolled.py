"""Backpropagation through the solver: the control that every other policy is compared with."""

import dataclasses
from typing import Any

import jax

from deq_jax import checks
from deq_jax.equation import Captured, Traced
from deq_jax.gradients.phantom import refuse_probe
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.gradients.prepared import Prepared, communicates
from deq_jax.solvers.loop import Run, Solver, check_samples, iterate
from deq_jax.stats import BackwardProbe

PyTree = Any


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

    The gradient of a solver's own small systems is taken too. Where Anderson's factorisation fails
    (a Gram matrix of dependent residuals: in half precision, or at a tolerance of rounding), the
    gradient of that sample is NaN, and so is that of params, a sum over the batch. The inner solves
    of NewtonKrylov are differentiated as if they were exact.

    Attributes:
        steps: most evaluations, in place of the solver's `max_iter`; None leaves that.

    Raises:
        ValueError, TypeError: `steps` is no number or below 1; a `BackwardProbe` is passed.
    """

    steps: int | None = None

    def __post_init__(self) -> None:
        if self.steps is not None:
            checks.check_count(self, "steps")

    def solve(
        self,
        equation: Traced,
        captured: Captured,
        z0: PyTree,
        solver: Solver,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        sample_policies: tuple[GradientPolicy, ...] = (),
    ) -> Run:
        """See `GradientPolicy`."""
        refuse_probe(self, probe)
        if any(policy != self for policy in sample_policies):
            raise ValueError(
                f"with gradient={self!r} the samples are differentiated in the same way; leave "
                "sample_gradient out"
            )
        if self.steps is not None:
            if not dataclasses.is_dataclass(solver):
                raise TypeError(
                    "Unrolled can set steps only on a solver that is a dataclass, got "
                    f"{type(solver).__name__}; set max_iter on the solver itself"
                )
            solver = dataclasses.replace(solver, max_iter=self.steps)
        check_samples(sample_at, solver)
        f = _Differentiable(equation, captured, communicates(equation, captured))
        # As many trips on every device of a `shard_map`: backpropagation sums the cotangents of
        # what is the same on all of them in each trip, and would wait for ever for a device that
        # made fewer.
        mesh_axes = {*f.mesh_axes, *jax.sharding.get_abstract_mesh().manual_axes}
        run = iterate(
            f,
            jax.lax.stop_gradient(z0),
            solver,
            mesh_axes=tuple(sorted(mesh_axes)),
            sample_at=sample_at,
            unrolled=True,
        )
        return run._replace(stats=jax.lax.stop_gradient(run.stats))


@dataclasses.dataclass(frozen=True)
class _Differentiable:
    """The traced function as it is, without the preparation, which has no derivatives."""

    equation: Traced
    captured: Captured
    mesh_axes: tuple[str, ...]

    def __call__(self, z: PyTree) -> PyTree:
        return self.equation(self.captured, z)

    def linearize(self, z: PyTree) -> tuple[PyTree, Prepared]:
        fz, push = jax.linearize(self, z)
        return fz, Prepared(push, self.mesh_axes, differentiable=True)
