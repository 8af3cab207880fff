"""A trained graph network as a report looks at it: one example, with an answer for each node."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from deq_jax.models.graph import ImplicitGraphNet
from deq_jax.nnx import DEQ
from experiments.data.graphs import GraphDataset
from experiments.report.examples import SequenceExamples, Words


class _OneAtATime(nnx.Module):
    """A cell for states `[B, N, features]`: a graph's cell on each of B states of the graph."""

    def __init__(self, cell: Any):
        self.cell = cell

    def inject(self, x: Any) -> Any:
        """Whatever the graph's cell computes once, in front of the loop."""
        return self.cell.inject(x)

    def __call__(self, z: jax.Array, x: Any) -> jax.Array:
        return jax.vmap(lambda one: self.cell(one, x))(z)


class OneGraph(nnx.Module):
    """An `ImplicitGraphNet` and its graph, with the interface of a network that takes batches.

    Args:
        model: the network.
        dataset: the graph.
    """

    def __init__(self, model: ImplicitGraphNet, dataset: GraphDataset):
        core = model.core
        self._model = model
        self._graph = nnx.data((dataset.graph, dataset.features))
        self.core = DEQ(
            _OneAtATime(core.cell),
            solver=core.solver,
            gradient=core.gradient,
            execution=core.execution,
        )

    def injection(self, inputs: jax.Array) -> Any:
        """What the core is given: always the graph of this object. `inputs` is not looked at."""
        del inputs
        return self._model.injection(*self._graph)

    def zeros(self, x: Any) -> jax.Array:
        """Zeros `[1, N, features]`, the state of one graph."""
        return self._model.zeros(x)[None]

    def start(self, x: Any) -> jax.Array:
        """The state `[1, N, features]` that a solve starts from."""
        return self._model.start(x)[None]

    def classify(self, z: jax.Array) -> jax.Array:
        """Logits `[B, N, classes]`."""
        return jax.vmap(self._model.classify)(z)


@dataclasses.dataclass(frozen=True)
class GraphExample(SequenceExamples):
    """A graph, whose N nodes are classified.

    Attributes:
        mask: boolean `[N]`, the nodes whose answers count.
    """

    mask: np.ndarray = dataclasses.field(kw_only=True)

    words = Words("graph", "graphs", "low-loss", "high-loss", "graphs", "nats a node")

    def asked(self, positions: Any) -> Any:
        """The nodes of the mask."""
        return positions[:, self.mask]


def choose_graph(dataset: GraphDataset) -> GraphExample:
    """The graph, judged by the nodes for testing."""
    mask = dataset.masks["test"]
    return GraphExample(
        np.zeros((1, 0), np.float32),
        dataset.labels[np.newaxis],
        show=lambda inputs, labels, predicted: f"{mask.size:,} nodes, {mask.sum():,} looked at",
        mask=mask,
        facts={
            "data": dataset.describe(),
            "looked at": f"the graph; for accuracy and loss, its {mask.sum():,} nodes for testing",
        },
    )
