"""Update rules, and the loop they run in."""

from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.loop import Solver as Solver
from deq_jax.solvers.loop import iterate as iterate
from deq_jax.solvers.picard import Picard as Picard
