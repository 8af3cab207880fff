"""Deep equilibrium layers for JAX: batched fixed points, differentiated at the solution."""

from deq_jax.execution import Execution as Execution
from deq_jax.fixed_point import deq_fixed_point as deq_fixed_point
from deq_jax.fixed_point import solve_adjoint as solve_adjoint
from deq_jax.fixed_point import solve_fixed_point as solve_fixed_point
from deq_jax.gradients.implicit import Implicit as Implicit
from deq_jax.gradients.neumann import Neumann as Neumann
from deq_jax.gradients.one_step import OneStep as OneStep
from deq_jax.gradients.phantom import Phantom as Phantom
from deq_jax.gradients.policy import GradientPolicy as GradientPolicy
from deq_jax.gradients.unrolled import Unrolled as Unrolled
from deq_jax.linear.bicgstab import BiCGStab as BiCGStab
from deq_jax.linear.cg import CG as CG
from deq_jax.linear.dense import Auto as Auto
from deq_jax.linear.dense import Dense as Dense
from deq_jax.linear.gmres import GMRES as GMRES
from deq_jax.linear.group_inverse import GroupInverse as GroupInverse
from deq_jax.linear.krylov import LinearSolver as LinearSolver
from deq_jax.linear.lsmr import LSMR as LSMR
from deq_jax.linear.minres import MINRES as MINRES
from deq_jax.solve import Solver as Solver
from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.broyden import Broyden as Broyden
from deq_jax.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from deq_jax.solvers.picard import Picard as Picard
from deq_jax.stability.diagnosis import Finding as Finding
from deq_jax.stability.diagnosis import diagnose as diagnose
from deq_jax.stats import BackwardProbe as BackwardProbe
from deq_jax.stats import Solution as Solution
from deq_jax.stats import SolveStats as SolveStats
from deq_jax.stats import Status as Status

__version__ = "0.2.0"

# Without it a star import would bring `nnx` and `linen`, the submodules, in the place of Flax's.
__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "Anderson",
    "Auto",
    "BackwardProbe",
    "BiCGStab",
    "Broyden",
    "Dense",
    "Execution",
    "Finding",
    "GradientPolicy",
    "GroupInverse",
    "Implicit",
    "LinearSolver",
    "Neumann",
    "NewtonKrylov",
    "OneStep",
    "Phantom",
    "Picard",
    "Solution",
    "SolveStats",
    "Solver",
    "Status",
    "Unrolled",
    "__version__",
    "deq_fixed_point",
    "diagnose",
    "solve_adjoint",
    "solve_fixed_point",
]
