"""Classifiers of the nodes of a graph: an equilibrium of one cell, and three controls.

    ImplicitGraphNet    dropout - Linear - core - dropout - Linear
    GCN                 (dropout - Linear - Â - relu) k times, the last without relu
    APPNP               dropout - Linear - relu - dropout - Linear - PageRank, K steps
    SGC                 dropout - Linear - Â, K times

All are called as `model(graph, features)` and return logits `[N, num_classes]`. Features are an
array `[N, in_features]` or, where most of them are zero, a `jax.experimental.sparse.BCSR` of that
shape; dropout then draws for its entries only.
"""

import itertools
from typing import Any, Literal, cast, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.sparse import BCSR

from deq_jax.cells.graph import (
    EIGNNCell,
    Graph,
    GraphInput,
    IGNNCell,
    MonotoneGraphCell,
    check_graph,
)
from deq_jax.checks import check_count, check_number, check_range
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.nnx import DEQ
from deq_jax.partitioning import logical_axes
from deq_jax.solve import Solver
from deq_jax.solvers.picard import Picard
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any
Features = jax.Array | BCSR
GraphCell = IGNNCell | EIGNNCell | MonotoneGraphCell


class _GraphNet(nnx.Module):
    """What the networks have in common: the sizes, dropout, linear layers and checks.

    Args:
        in_features: width of the features.
        num_classes: number of logits.
        dropout: rate of dropout in front of each linear layer, in [0, 1).
        param_dtype: dtype of the parameters.
        rngs: stream `params`, and `dropout` where there is dropout.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        dropout: float = 0.0,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.in_features, self.num_classes = in_features, num_classes
        for name in ("in_features", "num_classes"):
            check_count(self, name)
        check_range("dropout", dropout, at_least=0.0, below=1.0)
        self.param_dtype = param_dtype
        # Without dropout there is no random stream, and no state besides the parameters.
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def project(self, params: PyTree) -> PyTree:
        """`params`, the model's `nnx.Param` state, with each parameter in the set of its cell.

        Call it after each step of an optimiser. It bounds the matrices of `IGNNCell` and
        `MonotoneGraphCell`.
        """
        return params

    def _linear(self, into: int, out: int, rngs: nnx.Rngs, *names: str | None) -> nnx.Linear:
        return nnx.Linear(
            into,
            out,
            kernel_metadata=logical_axes(*names),
            param_dtype=self.param_dtype,
            rngs=rngs,
        )

    def _apply(self, linear: nnx.Linear, features: Features) -> jax.Array:
        """Dropout and a linear layer."""
        if not isinstance(features, BCSR):
            return linear(features if self.dropout is None else self.dropout(features))
        data = features.data if self.dropout is None else self.dropout(features.data)
        bias = linear.bias
        assert bias is not None
        arrays = (data, features.indices, features.indptr)
        return BCSR(arrays, shape=features.shape) @ linear.kernel[...] + bias[...]

    def _check(self, graph: Graph, features: Features) -> None:
        check_graph(graph)
        if not isinstance(features, jax.Array | np.ndarray | BCSR):
            raise TypeError(
                "features must be an array or a jax.experimental.sparse.BCSR, got "
                f"{type(features).__qualname__}; BCSR.from_scipy_sparse makes one of a SciPy matrix"
            )
        expected = (graph.num_nodes, self.in_features)
        if tuple(features.shape) != expected:
            raise ValueError(
                f"features must have shape {list(expected)} (nodes of the graph, in_features of "
                f"the network), got {list(features.shape)}"
            )


class ImplicitGraphNet(_GraphNet):
    """The classifier whose core is the equilibrium of a graph cell.

    The logits are `head(dropout(z*))` with `z* = cell(z*, (graph, X))` and X the features behind
    dropout and a linear layer. The whole graph is one equation, so the statistics of a solve are
    scalars.

        model = ImplicitGraphNet(5, 3, cell=IGNNCell(16, rngs=rngs), rngs=rngs)
        logits, stats = model(graph, features, return_stats=True)  # features [N, 5], logits [N, 3]

    Args:
        in_features: width of the features.
        num_classes: number of logits.
        cell: an `IGNNCell`, `EIGNNCell` or `MonotoneGraphCell`, or another cell with their methods.
        normalize: divide the state of each node by its length, `z / sqrt(‖z‖² + 1e-12)`, in front
            of the head. For graphs in which the state becomes small with the distance from where
            information comes in.
        solver: as for `deq_fixed_point`. The default is sure to converge for the three cells, if
            `max_iter` is large enough.
        gradient: as for `deq_fixed_point`.
        execution: as for `deq_fixed_point`.
        dropout: rate of dropout in front of both linear layers. There is none inside the core.
        param_dtype: dtype of the two linear layers.
        rngs: stream `params`, and `dropout` where there is dropout.

    Attributes:
        core: the `deq_jax.nnx.DEQ`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        cell: GraphCell,
        normalize: bool = False,
        solver: Solver = Picard(tol=1e-4, max_iter=300),  # noqa: B008  (frozen)
        gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
        execution: Execution = Execution(),  # noqa: B008  (frozen)
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, num_classes, rngs=rngs, **options)
        self.normalize = normalize
        self.encoder = self._linear(in_features, cell.features, rngs, None, "embed")
        self.core = DEQ(cell, solver=solver, gradient=gradient, execution=execution, batched=False)
        self.head = self._linear(cell.features, num_classes, rngs, "embed", "classes")

    def project(self, params: PyTree) -> PyTree:
        """See the base class."""
        return cast(GraphCell, self.core.cell).project(params)

    def injection(self, graph: Graph, features: Features) -> GraphInput:
        """What the core is given: the graph, and X `[N, features of the cell]`."""
        self._check(graph, features)
        return GraphInput(graph, self._apply(self.encoder, features))

    def zeros(self, x: GraphInput) -> jax.Array:
        """The state that a solve starts from."""
        return cast(GraphCell, self.core.cell).zeros(x)

    def start(self, x: GraphInput) -> jax.Array:
        """Likewise; there is no learned start."""
        return self.zeros(x)

    def classify(self, z: jax.Array) -> jax.Array:
        """Logits `[N, num_classes]` from the core's output."""
        if self.normalize:
            # A state far below 1e-6 is not known better than zero, and keeps its derivative finite.
            z = z * jax.lax.rsqrt(jnp.sum(z * z, axis=-1, keepdims=True) + 1e-12)
        return self._apply(self.head, z)

    @overload
    def __call__(
        self,
        graph: Graph,
        features: Features,
        *,
        return_stats: Literal[False] = False,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array: ...

    @overload
    def __call__(
        self,
        graph: Graph,
        features: Features,
        *,
        return_stats: Literal[True],
        backward_probe: BackwardProbe | None = None,
    ) -> tuple[jax.Array, SolveStats]: ...

    @overload
    def __call__(
        self,
        graph: Graph,
        features: Features,
        *,
        return_stats: bool,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array | tuple[jax.Array, SolveStats]: ...

    def __call__(
        self,
        graph: Graph,
        features: Features,
        *,
        return_stats: bool = False,
        backward_probe: BackwardProbe | None = None,
    ) -> jax.Array | tuple[jax.Array, SolveStats]:
        """Logits `[N, num_classes]`, with `return_stats` also the statistics of the solve.

        Args:
            graph: the graph.
            features: `[N, in_features]`, an array or a BCSR.
            return_stats: return the solve's `SolveStats` as well.
            backward_probe: as for `deq_fixed_point`; `BackwardProbe.zeros()`.

        Raises:
            TypeError: an argument is of another type.
            ValueError: the features do not fit the graph or the network, or the graph the cell.
        """
        x = self.injection(graph, features)
        z, stats = self.core(x, return_stats=True, backward_probe=backward_probe)
        logits = self.classify(z.astype(x.features.dtype))
        return (logits, stats) if return_stats else logits


class GCN(_GraphNet):
    """Control: graph convolutions, each of which sees one edge further.

    Layer l is `relu(Â H W_l + b_l)`, and the last one has no relu.

    Source: Kipf and Welling, "Semi-supervised classification with graph convolutional networks",
    2017.

    Args:
        in_features: width of the features.
        num_classes: number of logits.
        features: width of the hidden layers.
        depth: number of layers.
        rngs: stream `params`, and `dropout` where there is dropout.
        **options: `dropout` and `param_dtype`, as for `ImplicitGraphNet`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        features: int = 16,
        depth: int = 2,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, num_classes, rngs=rngs, **options)
        self.features, self.depth = features, depth
        for name in ("features", "depth"):
            check_count(self, name)
        widths = [in_features, *[features] * (depth - 1), num_classes]
        self.layers = nnx.List(
            [
                self._linear(into, out, rngs, None, "embed" if out == features else "classes")
                for into, out in itertools.pairwise(widths)
            ]
        )

    def __call__(self, graph: Graph, features: Features) -> jax.Array:
        """Logits `[N, num_classes]`."""
        self._check(graph, features)
        hidden: Features = features
        for number, layer in enumerate(self.layers, 1):
            product = graph.propagate(self._apply(layer, hidden))
            hidden = product if number == self.depth else nnx.relu(product)
        assert isinstance(hidden, jax.Array)
        return hidden


class APPNP(_GraphNet):
    """Control: a network of the features alone, and K steps of personalised PageRank behind it.

    `Z_k = (1 - α) Â Z_{k-1} + α H`, where `Z_0 = H` are the logits of a network with one hidden
    layer.

    Source: Gasteiger, Bojchevski and Günnemann, "Predict then propagate: graph neural networks
    meet personalized PageRank", 2019.

    Args:
        in_features: width of the features.
        num_classes: number of logits.
        features: width of the hidden layer.
        steps: K.
        alpha: α, above 0 and at most 1.
        rngs: stream `params`, and `dropout` where there is dropout.
        **options: `dropout` and `param_dtype`, as for `ImplicitGraphNet`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        features: int = 64,
        steps: int = 10,
        alpha: float = 0.1,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, num_classes, rngs=rngs, **options)
        self.features, self.steps, self.alpha = features, steps, alpha
        for name in ("features", "steps"):
            check_count(self, name)
        check_number(self, "alpha", above=0.0, at_most=1.0)
        self.hidden = self._linear(in_features, features, rngs, None, "embed")
        self.head = self._linear(features, num_classes, rngs, "embed", "classes")

    def __call__(self, graph: Graph, features: Features) -> jax.Array:
        """Logits `[N, num_classes]`."""
        self._check(graph, features)
        predicted = self._apply(self.head, nnx.relu(self._apply(self.hidden, features)))

        def propagate(_: jax.Array, z: jax.Array) -> jax.Array:
            return (1 - self.alpha) * graph.propagate(z) + self.alpha * predicted

        return jax.lax.fori_loop(0, self.steps, propagate, predicted)


class SGC(_GraphNet):
    """Control: a linear classifier of features that were averaged over K edges, `Â^K (X W + b)`.

    Source: Wu, Zhang, de Souza, Fifty, Yu and Weinberger, "Simplifying graph convolutional
    networks", 2019, but for the bias, which is averaged too.

    Args:
        in_features: width of the features.
        num_classes: number of logits.
        steps: K.
        rngs: stream `params`, and `dropout` where there is dropout.
        **options: `dropout` and `param_dtype`, as for `ImplicitGraphNet`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        steps: int = 2,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        super().__init__(in_features, num_classes, rngs=rngs, **options)
        self.steps = steps
        check_count(self, "steps")
        self.head = self._linear(in_features, num_classes, rngs, None, "classes")

    def __call__(self, graph: Graph, features: Features) -> jax.Array:
        """Logits `[N, num_classes]`."""
        self._check(graph, features)
        projected = self._apply(self.head, features)
        return jax.lax.fori_loop(0, self.steps, lambda _, z: graph.propagate(z), projected)
