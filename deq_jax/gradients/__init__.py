"""Gradient policies: how a solution is differentiated."""

from deq_jax.gradients.implicit import Implicit as Implicit
