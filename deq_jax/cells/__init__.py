"""Functions f as Flax NNX modules: `cell(z, x)`, and `inject(x)` where a cell has one."""

from deq_jax.cells.feedforward import FeedForwardCell as FeedForwardCell
from deq_jax.cells.resnet import ResNetCell as ResNetCell
