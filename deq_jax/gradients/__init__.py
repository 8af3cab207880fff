"""Gradient policies: how a solution is differentiated."""

from deq_jax.gradients.implicit import Implicit as Implicit
from deq_jax.gradients.neumann import Neumann as Neumann
from deq_jax.gradients.one_step import OneStep as OneStep
from deq_jax.gradients.phantom import Phantom as Phantom
from deq_jax.gradients.policy import GradientPolicy as GradientPolicy
from deq_jax.gradients.reversed import Reversed as Reversed
from deq_jax.gradients.truncated import Truncated as Truncated
from deq_jax.gradients.unrolled import Unrolled as Unrolled
