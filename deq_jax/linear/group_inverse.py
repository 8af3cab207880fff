"""The group inverse of a singular system, by two solves.

Sources: Meyer, "The role of the group generalized inverse in the theory of finite Markov chains",
1975; Ipsen and Meyer, "The idea behind Krylov methods", 1998.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax import checks, tree
from deq_jax.linear.bicgstab import BiCGStab
from deq_jax.linear.cg import CG
from deq_jax.linear.gmres import GMRES
from deq_jax.linear.minres import MINRES
from deq_jax.stats import Solution, SolveStats

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class GroupInverse:
    """`u = (I - A)^# y`, the group inverse: for equations that conserve something.

    Where f conserves a mass, `wᵀ f(z) = wᵀ z` for all z, there is one solution for each mass, the
    start picks one of them, and I - J is singular. With a cotangent y of such a z* the adjoint
    system has no solution unless y is orthogonal to the directions in which solutions lie.
    The state moves with params inside its mass, and its exact gradient is that of

        u = (I - Jᵀ)^# y,

    which splits y into a part in the range of `I - Jᵀ` and a part in its null space, and inverts
    the first. Two solves with `solver` do this, from zero, whose Krylov spaces lie in the range:

        (I - A) t = (I - A) y,        (I - A) u = t.

    t is the part of y in the range. It has to be known to be right: the first system always has a
    solution, and the report is that of the worse solve. The gradient of gauge-invariant losses is
    exact, too, and a system that is not singular gets its ordinary solution, at twice the cost.

    The eigenvalue 1 of J must be semisimple, as it is wherever `z <- f(z)` converges. `z0` has a
    zero gradient, so that the mass is taken to be fixed.

    Attributes:
        solver: `GMRES(...)`, `BiCGStab(...)`, `CG(...)` or `MINRES(...)`, without preconditioner,
            which would lead out of the range.

    Raises:
        TypeError, ValueError: `solver` is another or has a preconditioner.

    Example: A <-> B with rates p; `z* = mass (p₁, p₀) / (p₀ + p₁)`.

        def reaction(p, z, x):
            flow = p[0] * z[:, 0] - p[1] * z[:, 1]
            return z + 0.3 * jnp.stack([-flow, flow], axis=1)

        def share(p):
            z = deq_fixed_point(
                reaction, p, None, jnp.ones((1, 2)), gradient=Implicit(GroupInverse())
            )
            return z[0, 0]

        jax.grad(share)(jnp.array([1.0, 3.0]))  # -2 * 3 / 16, 2 * 1 / 16
    """

    solver: GMRES | BiCGStab | CG | MINRES = GMRES()  # noqa: RUF009  (frozen)

    def __post_init__(self) -> None:
        if not isinstance(self.solver, GMRES | BiCGStab | CG | MINRES):
            raise TypeError(
                "GroupInverse.solver must be GMRES, BiCGStab, CG or MINRES, whose solutions lie in "
                f"the range of the system, got {self.solver!r}"
            )
        if self.solver.preconditioner is not None:
            raise ValueError(
                "GroupInverse.solver must have no preconditioner, which would lead out of the "
                "range of the system; leave it out"
            )

    @property
    def tol(self) -> Any:
        """Bound on the relative residual of both solves."""
        return self.solver.tol

    def solve_linear(
        self,
        product: Callable[[PyTree], PyTree],
        y: PyTree,
        start: PyTree | None = None,
        mesh_axes: tuple[str, ...] = (),
    ) -> Solution:
        """See `LinearSolver`; `start`, which need not lie in the range, is not used."""
        size = tree.safe_norm(y)
        image = tree.subtract(y, product(y))
        # Nothing but rounding is left of a y in the null space.
        eps = jnp.finfo(size.dtype).eps
        nothing = tree.safe_norm(image) <= 10 * eps * size
        image = tree.where(nothing, jax.tree.map(jnp.zeros_like, image), image)
        t, first = self.solver.solve_linear(product, image, None, mesh_axes)
        u, second = self.solver.solve_linear(product, t, None, mesh_axes)
        stats = SolveStats(
            residual=jnp.maximum(first.residual, second.residual),
            iterations=first.iterations + second.iterations + (size > 0).astype(jnp.int32),
            status=jnp.maximum(first.status, second.status),
            evaluations=first.evaluations + second.evaluations + 1,
        )
        return Solution(u, stats)
