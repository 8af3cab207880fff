"""Functions f as Flax NNX modules: `cell(z, x)`, and `inject(x)` where a cell has one."""

from deq_jax.cells.attention import KeyValues as KeyValues
from deq_jax.cells.attention import Memory as Memory
from deq_jax.cells.attention import SequenceInput as SequenceInput
from deq_jax.cells.attention import extend_memory as extend_memory
from deq_jax.cells.concave import ConcaveCell as ConcaveCell
from deq_jax.cells.feedforward import FeedForwardCell as FeedForwardCell
from deq_jax.cells.resnet import ResNetCell as ResNetCell
from deq_jax.cells.transformer import TransformerCell as TransformerCell
from deq_jax.cells.trellis import TrellisCell as TrellisCell
from deq_jax.cells.trellis import TrellisHistory as TrellisHistory
from deq_jax.cells.trellis import TrellisInput as TrellisInput
from deq_jax.cells.trellis import TrellisState as TrellisState
