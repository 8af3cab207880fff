"""Deep equilibrium layers for JAX: batched fixed points, differentiated at the solution."""

from deq_jax.fixed_point import deq_fixed_point as deq_fixed_point
from deq_jax.fixed_point import solve_adjoint as solve_adjoint
from deq_jax.fixed_point import solve_fixed_point as solve_fixed_point
from deq_jax.gradients.implicit import Implicit as Implicit
from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.loop import Solver as Solver
from deq_jax.solvers.picard import Picard as Picard
from deq_jax.stats import BackwardProbe as BackwardProbe
from deq_jax.stats import Solution as Solution
from deq_jax.stats import SolveStats as SolveStats
from deq_jax.stats import Status as Status

# Without it a star import would bring `nnx` and `linen`, the submodules, in the place of Flax's.
__all__ = [
    "Anderson",
    "BackwardProbe",
    "Implicit",
    "Picard",
    "Solution",
    "SolveStats",
    "Solver",
    "Status",
    "deq_fixed_point",
    "solve_adjoint",
    "solve_fixed_point",
]
