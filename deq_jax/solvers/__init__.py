"""Update rules, and the loop they run in."""

from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.bicgstab import BiCGStab as BiCGStab
from deq_jax.solvers.broyden import Broyden as Broyden
from deq_jax.solvers.gmres import GMRES as GMRES
from deq_jax.solvers.krylov import LinearSolver as LinearSolver
from deq_jax.solvers.loop import Solver as Solver
from deq_jax.solvers.loop import iterate as iterate
from deq_jax.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from deq_jax.solvers.picard import Picard as Picard
