"""Linear solvers, each sample by itself; one method a file."""

from deq_jax.linear.bicgstab import BiCGStab as BiCGStab
from deq_jax.linear.cg import CG as CG
from deq_jax.linear.dense import Auto as Auto
from deq_jax.linear.dense import Dense as Dense
from deq_jax.linear.gmres import GMRES as GMRES
from deq_jax.linear.group_inverse import GroupInverse as GroupInverse
from deq_jax.linear.krylov import LinearSolver as LinearSolver
from deq_jax.linear.lsmr import LSMR as LSMR
from deq_jax.linear.minres import MINRES as MINRES
