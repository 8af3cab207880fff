"""The implicit gradient: differentiate the equation at its solution, not the solver.

At z* = f(params, z*, x), with J = ∂f/∂z there, a tangent of params and x moves z* by ż, and a
cotangent y of z* goes back to params and x as

    ż = J ż + ∂f/∂(params, x) · (ṗ, ẋ),        u = Jᵀ u + y,   (p̄, x̄) = (∂f/∂(params, x))ᵀ u.

f is linearised at z*; the linear system runs in the solvers' own loop. Memory is that of one
linearisation of f and of the solver, whatever the number of iterations.

Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019, theorem 1; for `reuse`, Ramzi et
al., "SHINE: sharing the inverse estimate from the forward pass", 2022.
"""

import dataclasses
from typing import Any

from deq_jax import checks
from deq_jax.adjoint import Solved, attach
from deq_jax.checks import Real
from deq_jax.closure import Closure, Held
from deq_jax.linear.krylov import LinearSolver, Preconditioner, check_preconditioner
from deq_jax.solve import Solver, check_solver
from deq_jax.solvers.broyden import Broyden
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Implicit:
    """Gradient by the implicit function theorem: exact up to the tolerance of its linear solve.

    Bias: that of z* and of u, each bounded by its tolerance; the gradient's error is roughly the
    error in z* (its square root where f has kinks, as with ReLU). Cost: one linearisation of f,
    and one transposed product for every iteration of the backward solve.

    The backward residual of a sample is `‖Jᵀ u + y - u‖ / ‖y‖`, so gradients of any scale are
    solved to the same relative accuracy; a sample with y = 0 costs nothing. The backward pass never
    raises; pass a `BackwardProbe` to learn which residual it reached.

    With `reuse=True` (SHINE) the forward solver is `Broyden`, whose estimate `B ≈ (J - I)⁻¹` starts
    the backward solve at `u₀ = -Bᵀ y`; if that is by Broyden too, it goes on learning from Bᵀ. With
    `max_iter=r` it makes r products, the last of which measures the residual of what is returned:
    `max_iter=1` is SHINE without refinement, whose bias is that of B, accurate only in directions
    that the forward solve explored. The factors of B, 2 `memory` states, are kept until the
    backward pass.

    Attributes:
        solver: solver of the linear system, any solver or a linear one: `GMRES(...)`,
            `BiCGStab(...)`; None takes the forward solver. Anderson, Broyden and the Krylov methods
            find u also where the spectral radius of J exceeds 1; Picard diverges there.
        tol: tolerance of the linear solve; None takes that of its solver.
        max_iter: most products; None takes that of its solver.
        reuse: start from the forward solver's inverse estimate.
        preconditioner: a function `M(z, v)`, linear in v, that approximates `(I - J)⁻¹ v` with
            J = ∂f/∂z at z = z*. JAX transposes it for the adjoint system. v and the value are like
            z: leaves `[B, ...]`, with B = 1 where `batched=False`. Arrays that M closes over may be
            traced; no gradient flows through them. M stands on the right, `(I - Jᵀ) Mᵀ w = y` with
            `u = Mᵀ w`, so that all residuals are those of u. With one, no sample leaves the batch
            early (`Execution(shrink_to=...)`).

    Raises:
        TypeError, ValueError: `solver` is no solver, `tol` or `max_iter` out of range; the forward
            solver is not `Broyden` and `reuse` is set; `preconditioner` is no function, or `solver`
            has one too.

    Example: a cell whose Jacobian is nearly diagonal, `-> [4, 8]`.

        def cell(params, z, x):
            return params["d"] * jnp.tanh(z) + 0.01 * (z @ params["w"]) + x

        def loss(params, x):
            def nearly_inverse(z, v):
                return v / (1 - params["d"] / jnp.cosh(z) ** 2)

            policy = Implicit(GMRES(), preconditioner=nearly_inverse)
            return deq_fixed_point(cell, params, x, gradient=policy).sum()
    """

    solver: Solver | LinearSolver | None = None
    tol: Real | None = None
    max_iter: int | None = None
    reuse: bool = False
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        if self.solver is not None and not is_linear_solver(self.solver):
            check_solver("Implicit.solver", self.solver)
        if self.tol is not None:
            checks.check_number(self, "tol", at_least=0.0)
        if self.max_iter is not None:
            checks.check_count(self, "max_iter")
        checks.check_flag(self, "reuse")
        check_preconditioner(self)
        if self.preconditioner is not None:
            if getattr(self.solver, "preconditioner", None) is not None:
                raise ValueError(
                    "Implicit.preconditioner and the preconditioner of Implicit.solver are both "
                    "set; leave one of them out"
                )
            if self.reuse:
                raise ValueError(
                    "Implicit(reuse=True) starts from an inverse estimate of its own; leave "
                    "preconditioner out"
                )

    def backward_solver(self, forward: Solver) -> Solver | LinearSolver:
        """The solver of the linear system when `forward` solved the equation."""
        # A solver that is unfit for linear systems names another one.
        fit = getattr(forward, "adjoint_solver", forward)
        solver = fit if self.solver is None else self.solver
        limits: dict[str, Any] = {"tol": self.tol, "max_iter": self.max_iter}
        if _takes_preconditioner(solver):
            limits["preconditioner"] = self.preconditioner
        changes = {name: value for name, value in limits.items() if value is not None}
        if not changes:
            return solver
        if not dataclasses.is_dataclass(solver):
            raise TypeError(
                f"Implicit can set {sorted(changes)} only on a solver that is a dataclass, "
                f"got {type(solver).__name__}; set them on the solver itself"
            )
        unknown = set(changes) - {field.name for field in dataclasses.fields(solver)}
        if unknown:
            raise TypeError(
                f"Implicit sets {sorted(unknown)}, which {type(solver).__name__} does not have; "
                "leave it out"
            )
        options: Any = solver
        return dataclasses.replace(options, **changes)

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""
        if self.reuse and not isinstance(solver, Broyden):
            raise TypeError(
                "Implicit(reuse=True) starts from the inverse estimate of Broyden(...), but the "
                f"forward solver is {solver!r}"
            )

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> PyTree:
        """See `GradientPolicy`."""
        estimate = solution.state.inverse if self.reuse else None
        used = self.backward_solver(solver)
        wrapped = self.preconditioner is not None and not _takes_preconditioner(used)
        preconditioner = Held(self.preconditioner) if wrapped else None
        inverse = Solved(Held(used), estimate, preconditioner)
        return attach(f, solution.value, inverse, probe)


def _takes_preconditioner(solver: Any) -> bool:
    """Whether the solver has a preconditioner of its own; otherwise the system is changed."""
    fields = dataclasses.fields(solver) if dataclasses.is_dataclass(solver) else ()
    return any(field.name == "preconditioner" for field in fields)


def is_linear_solver(solver: Any) -> bool:
    """`solver` solves linear systems only, like `GMRES()`."""
    return not isinstance(solver, type) and isinstance(solver, LinearSolver)
