"""Solvers of `z = f(z)`: one update rule a file; `deq_jax.solve` has the loop they run in."""

from deq_jax.solvers.anderson import Anderson as Anderson
from deq_jax.solvers.broyden import Broyden as Broyden
from deq_jax.solvers.chandrupatla import Chandrupatla as Chandrupatla
from deq_jax.solvers.newton_krylov import NewtonKrylov as NewtonKrylov
from deq_jax.solvers.picard import Picard as Picard
from deq_jax.solvers.reversible import Reversible as Reversible
from deq_jax.solvers.squarem import SQUAREM as SQUAREM
from deq_jax.solvers.wegstein import Wegstein as Wegstein
