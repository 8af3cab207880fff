"""Deep equilibrium layers for JAX: batched fixed points, differentiated at the solution."""

from deq_jax import stepping as stepping
from deq_jax.attach import attach_gradient as attach_gradient
from deq_jax.attach import implicit as implicit
from deq_jax.control import Control as Control
from deq_jax.execution import Execution as Execution
from deq_jax.fixed_point import deq_fixed_point as deq_fixed_point
from deq_jax.fixed_point import solve_adjoint as solve_adjoint
from deq_jax.fixed_point import solve_fixed_point as solve_fixed_point
from deq_jax.gradients.implicit import Implicit as Implicit
from deq_jax.gradients.neumann import Neumann as Neumann
from deq_jax.gradients.one_step import OneStep as OneStep
from deq_jax.gradients.phantom import Phantom as Phantom
from deq_jax.gradients.policy import GradientPolicy as GradientPolicy
from deq_jax.gradients.reversed import Reversed as Reversed
from deq_jax.gradients.truncated import Truncated as Truncated
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
from deq_jax.multi_start import MultiStart as MultiStart
from deq_jax.multi_start import multi_start as multi_start
from deq_jax.root import deq_root as deq_root
from deq_jax.sharding import gather_params as gather_params
from deq_jax.solve import Solver as Solver
from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.broyden import Broyden as Broyden
from deq_jax.solvers.chandrupatla import Chandrupatla as Chandrupatla
from deq_jax.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from deq_jax.solvers.picard import Picard as Picard
from deq_jax.solvers.reversible import Reversible as Reversible
from deq_jax.solvers.squarem import SQUAREM as SQUAREM
from deq_jax.solvers.wegstein import Wegstein as Wegstein
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
    "SQUAREM",
    "Anderson",
    "Auto",
    "BackwardProbe",
    "BiCGStab",
    "Broyden",
    "Chandrupatla",
    "Control",
    "Dense",
    "Execution",
    "Finding",
    "GradientPolicy",
    "GroupInverse",
    "Implicit",
    "LinearSolver",
    "MultiStart",
    "Neumann",
    "NewtonKrylov",
    "OneStep",
    "Phantom",
    "Picard",
    "Reversed",
    "Reversible",
    "Solution",
    "SolveStats",
    "Solver",
    "Status",
    "Truncated",
    "Unrolled",
    "Wegstein",
    "__version__",
    "attach_gradient",
    "deq_fixed_point",
    "deq_root",
    "diagnose",
    "gather_params",
    "implicit",
    "multi_start",
    "solve_adjoint",
    "solve_fixed_point",
    "stepping",
]
