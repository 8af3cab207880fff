"""Linear solvers, each sample by itself; one method a file."""

from deq_jax.linear.bicgstab import BiCGStab as BiCGStab
from deq_jax.linear.gmres import GMRES as GMRES
from deq_jax.linear.krylov import LinearSolver as LinearSolver
