"""Functions f as Flax NNX modules: `cell(z, x)`, and `inject(x)` where a cell has one."""

from deq_jax.cells.attention import KeyValues as KeyValues
from deq_jax.cells.attention import Memory as Memory
from deq_jax.cells.attention import SequenceInput as SequenceInput
from deq_jax.cells.attention import extend_memory as extend_memory
from deq_jax.cells.concave import ConcaveCell as ConcaveCell
from deq_jax.cells.feedforward import FeedForwardCell as FeedForwardCell
from deq_jax.cells.graph import EIGNNCell as EIGNNCell
from deq_jax.cells.graph import Graph as Graph
from deq_jax.cells.graph import GraphInput as GraphInput
from deq_jax.cells.graph import IGNNCell as IGNNCell
from deq_jax.cells.graph import MonotoneGraphCell as MonotoneGraphCell
from deq_jax.cells.monotone import MonotoneConvCell as MonotoneConvCell
from deq_jax.cells.monotone import MonotoneDenseCell as MonotoneDenseCell
from deq_jax.cells.monotone import MonotoneMultiTierCell as MonotoneMultiTierCell
from deq_jax.cells.multiscale import Lipschitz as Lipschitz
from deq_jax.cells.multiscale import MultiscaleCell as MultiscaleCell
from deq_jax.cells.resnet import ResNetCell as ResNetCell
from deq_jax.cells.transformer import TransformerCell as TransformerCell
from deq_jax.cells.trellis import TrellisCell as TrellisCell
from deq_jax.cells.trellis import TrellisHistory as TrellisHistory
from deq_jax.cells.trellis import TrellisInput as TrellisInput
from deq_jax.cells.trellis import TrellisState as TrellisState
