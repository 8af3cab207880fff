"""Implicit graph networks: a graph, and three cells whose equilibrium is that of the whole graph.

The states of all nodes are one matrix Z `[N, features]` and one equation. The cells say so with
`batched = False`, which a layer over them takes over:

    graph = Graph.from_edges(edges, num_nodes)
    x = GraphInput(graph, features)  # [N, features]
    layer = deq_jax.nnx.DEQ(IGNNCell(16, rngs=nnx.Rngs(0)), solver=Picard())
    z = layer(x)

Information travels along one edge in each evaluation of a cell. An equilibrium has seen all nodes
that a node is connected to, however far away they are.

Each cell has one equilibrium and only one, whatever the features are, and `Picard()` converges to
it. For `IGNNCell` this holds after `project`, and for the others for all values of the parameters.
`MonotoneGraphCell` needs a symmetric graph.

| cell | equation | why there is one equilibrium |
| --- | --- | --- |
| `IGNNCell` | `Z = relu(Â Z W + X)` | W has an infinity norm below 1 |
| `EIGNNCell` | `Z = γ Â Z G + X` | G has a Frobenius norm below 1, and γ < 1 |
| `MonotoneGraphCell` | `Z = relu(½ (I + Â) Z W + X)` | `½ (W + Wᵀ)` is at most `(1 - m) I` |
"""

import dataclasses
import functools
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.experimental.sparse import BCSR

from deq_jax import checks
from deq_jax.partitioning import logical_axes
from deq_jax.stability import projections
from deq_jax.tree import accumulation_dtype

PyTree = Any
Normalization = Literal["symmetric", "mean"]


@checks.register_options(data=("matrix",))
@dataclasses.dataclass(frozen=True)
class Graph:
    """The normalised adjacency matrix Â of a graph, whose Perron-Frobenius eigenvalue is at most 1.

    A graph is a pytree: an argument of jitted functions, not a constant in them. Make one with
    `from_edges`. A matrix of your own must have no negative entries and no eigenvalue above 1 in
    magnitude, which are not checked. Its symmetry is checked, unless it is traced.

    Attributes:
        matrix: Â `[N, N]`. Row i has the weights of the nodes that node i receives from.
        symmetric: whether Â is symmetric, and so has eigenvalues in [-1, 1].

    Raises:
        TypeError: `matrix` is no BCSR, or `symmetric` no bool.
        ValueError: `matrix` is not square, or not symmetric although `symmetric` is True.
    """

    matrix: BCSR
    symmetric: bool

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, BCSR):
            raise TypeError(
                "Graph.matrix must be a jax.experimental.sparse.BCSR, got "
                f"{type(self.matrix).__name__}; Graph.from_edges makes a graph from its edges"
            )
        checks.check_flag(self, "symmetric")
        shape = self.matrix.shape
        if len(shape) != 2 or shape[0] != shape[1]:
            raise ValueError(f"Graph.matrix must be [N, N], got {list(shape)}")
        if self.symmetric and not _may_be_symmetric(self.matrix):
            raise ValueError(
                "Graph.matrix is not symmetric; pass symmetric=False, or make the graph with "
                "Graph.from_edges(..., normalization='symmetric')"
            )

    @classmethod
    def from_edges(
        cls,
        edges: Any,
        num_nodes: int,
        *,
        weights: Any = None,
        normalization: Normalization = "symmetric",
        self_loops: bool = True,
        dtype: Any = jnp.float32,
    ) -> "Graph":
        """A graph from the list of its edges.

        With A the matrix of weights and D the diagonal matrix of its row sums, Â is

            symmetric    D^-½ A D^-½    each edge is taken in both directions
            mean         D⁻¹ A          each edge goes one way: each node takes the mean of those
                                        that it receives from

        Both have a vector u > 0 with `Â u <= u`: `u = D^½ 1` (with 1 in the place of a zero) and
        `u = 1`. So their Perron-Frobenius eigenvalue is at most 1. A node that receives from none
        has a row of zeros.

            graph = Graph.from_edges([[0, 1], [1, 2]], 4)  # 0 - 1 - 2, and 3 by itself

        Args:
            edges: `[2, E]` integers: a row of senders and a row of receivers. An edge that is
                listed twice counts once, with the weight of its first entry. With `symmetric`, an
                edge and its reverse are the same edge.
            num_nodes: N.
            weights: `[E]`, above zero; ones by default.
            normalization: see above.
            self_loops: give each node an edge of weight 1 to itself. Edges from a node to itself in
                `edges` are left out then.
            dtype: dtype in which the weights are kept. `propagate` casts them to the dtype of z, or
                to float32 if that is wider.

        Raises:
            ValueError: `edges` has another shape or no integers, names a node that is not there,
                weights are not finite or not above zero, or `normalization` is unknown.
        """
        checks.check_positive_integer("num_nodes", num_nodes)
        edges = np.asarray(edges)
        if edges.size == 0:  # NumPy takes empty lists as floats
            edges = edges.astype(np.int64)
        if edges.ndim != 2 or edges.shape[0] != 2 or edges.dtype.kind not in "iu":
            raise ValueError(
                "edges must be integers [2, E], senders and receivers, got "
                f"{edges.dtype}{list(edges.shape)}"
            )
        if edges.size and not 0 <= edges.min() <= edges.max() < num_nodes:
            raise ValueError(
                f"edges must name nodes from 0 to {num_nodes - 1}, got numbers from {edges.min()} "
                f"to {edges.max()}"
            )
        weights = np.ones(edges.shape[1]) if weights is None else np.asarray(weights, np.float64)
        if weights.shape != edges.shape[1:]:
            raise ValueError(
                f"weights must have shape [{edges.shape[1]}], one for each edge, got "
                f"{list(weights.shape)}"
            )
        bad = np.flatnonzero(~((weights > 0) & np.isfinite(weights)))
        if bad.size:
            raise ValueError(
                f"weights must be finite and above zero, got {weights[bad[0]]} for edge {bad[0]}"
            )
        checks.check_choice("normalization", normalization, Normalization)
        senders, receivers = edges.astype(np.int64)
        if self_loops:
            others = senders != receivers
            senders, receivers, weights = senders[others], receivers[others], weights[others]
        # Of equal edges the first is kept, before the others are mirrored.
        low, high = senders, receivers
        if normalization == "symmetric":
            low, high = np.minimum(senders, receivers), np.maximum(senders, receivers)
        _, first = np.unique(high * num_nodes + low, return_index=True)
        senders, receivers, weights = senders[first], receivers[first], weights[first]
        if normalization == "symmetric":
            mirrored = senders != receivers
            senders, receivers = (
                np.r_[senders, receivers[mirrored]],
                np.r_[receivers, senders[mirrored]],
            )
            weights = np.r_[weights, weights[mirrored]]
        if self_loops:
            loops = np.arange(num_nodes)
            senders, receivers = np.r_[senders, loops], np.r_[receivers, loops]
            weights = np.r_[weights, np.ones(num_nodes)]
        order = np.lexsort((senders, receivers))  # by receiver, then by sender
        senders, receivers, weights = senders[order], receivers[order], weights[order]
        degrees = np.bincount(receivers, weights, num_nodes)
        if normalization == "symmetric":
            weights = weights / np.sqrt(degrees[receivers] * degrees[senders])
        else:
            weights = weights / degrees[receivers]
        pointers = np.searchsorted(receivers, np.arange(num_nodes + 1))
        arrays = (
            jnp.asarray(weights, dtype),
            jnp.asarray(senders, jnp.int32),
            jnp.asarray(pointers, jnp.int32),
        )
        shape = (num_nodes, num_nodes)
        matrix = BCSR(arrays, shape=shape, indices_sorted=True, unique_indices=True)
        return cls(matrix, normalization == "symmetric")

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.matrix.shape[0]

    def propagate(self, z: jax.Array) -> jax.Array:
        """`Â z`, `[N, features]`, in the dtype of z.

        Raises:
            ValueError: z has another number of nodes.
        """
        if z.ndim != 2 or z.shape[0] != self.num_nodes:
            raise ValueError(
                f"the graph has {self.num_nodes} nodes, so z must have shape "
                f"[{self.num_nodes}, features], got {list(z.shape)}"
            )
        # BCSR is the fastest of five forms on a CPU; docs/graphs.md has their times. Its transposed
        # product takes as long as one by segment sums. `linear_call` with a transposed matrix of
        # its own would be faster, but has no rule for `vmap`, and so no Hessian. BCSR multiplies in
        # float32 and wider, in which narrower states had better be summed anyway.
        wide = accumulation_dtype(z.dtype)
        return (_with_dtype(self.matrix, wide) @ z.astype(wide)).astype(z.dtype)

    def to_dense(self) -> jax.Array:
        """Â as an array `[N, N]`."""
        return self.matrix.todense()


def _may_be_symmetric(matrix: BCSR) -> bool:
    """Whether a matrix is symmetric up to rounding, or this process cannot see its entries."""
    arrays = (matrix.data, matrix.indices, matrix.indptr)
    if any(isinstance(a, jax.core.Tracer) or not a.is_fully_addressable for a in arrays):
        return True
    data, columns, pointers = map(np.asarray, arrays)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(pointers))
    # Entries behind the last pointer are padding.
    data, columns = data[: rows.size].astype(np.float64), columns[: rows.size].astype(np.int64)
    places = np.r_[rows * matrix.shape[0] + columns, columns * matrix.shape[0] + rows]
    _, place = np.unique(places, return_inverse=True)
    difference = np.bincount(place, np.r_[data, -data])
    rounding = 8 * float(jnp.finfo(matrix.dtype).eps) * np.abs(data).max(initial=0)
    return bool(np.abs(difference).max(initial=0) <= rounding)


def _with_dtype(matrix: BCSR, dtype: Any) -> BCSR:
    if matrix.dtype == dtype:
        return matrix
    return BCSR(
        (matrix.data.astype(dtype), matrix.indices, matrix.indptr),
        shape=matrix.shape,
        indices_sorted=matrix.indices_sorted,
        unique_indices=matrix.unique_indices,
    )


class GraphInput(NamedTuple):
    """What a layer over a graph cell is given.

    Attributes:
        graph: the graph.
        features: X `[N, features]`, of the width of the cell's state.
    """

    graph: Graph
    features: jax.Array


class GraphInjection(NamedTuple):
    """What a graph cell computes once, before the loop.

    Attributes:
        graph: the graph.
        features: X `[N, features]`.
        weight: W `[features, features]` as the cell multiplies with it.
        step: length of the step of `MonotoneGraphCell`; None for other cells.
    """

    graph: Graph
    features: jax.Array
    weight: jax.Array
    step: jax.Array | None = None


class _GraphCell(nnx.Module):
    """What the cells have in common.

    Attributes:
        features: width of the state.
        batched: False, as the whole graph is one equation; see `deq_jax.nnx.DEQ`.
    """

    batched: ClassVar[bool] = False
    features: int

    def zeros(self, x: GraphInput) -> jax.Array:
        """The zero state `[N, features]`, from which a layer starts without z0."""
        return jnp.zeros_like(x.features)

    def _check(self, x: GraphInput) -> None:
        if not isinstance(x, GraphInput):
            raise TypeError(f"x must be a GraphInput(graph, features), got {type(x).__name__}")
        check_graph(x.graph)
        expected = (x.graph.num_nodes, self.features)
        if x.features.shape != expected:
            raise ValueError(
                f"features must have shape {list(expected)} (nodes of the graph, width of the "
                f"cell), got {list(x.features.shape)}"
            )

    def project(self, params: PyTree) -> PyTree:
        """`params`, an `nnx.Param` state of the cell or of a model of it, as they are.

        All values of this cell's parameters are allowed.
        """
        return params


class IGNNCell(_GraphCell):
    """`f(Z) = relu(Â Z W + X)`, with the infinity norm of W at most κ < 1.

    The norm is that of the map `z -> z W` of a node's state: the largest of the outputs' sums
    `Σᵢ |W[i, j]|`. `project` puts W back into the bound, and is to be called after each step of an
    optimiser. W starts within the bound, near κ times the identity, with which the equilibrium is
    close to the personalised PageRank of X. From a random W, 100 epochs on Planetoid's split of
    Cora came to a test accuracy of 71 %, and from this one to 81 %.

    **Proof that it contracts.** Take `u > 0` with `Â u <= u` (see `Graph.from_edges`) and the norm
    `‖Z‖ = max |Z[i, c]| / u[i]`. As Â has no negative entries,

        |(Â Z W)[i, c]| <= Σⱼ Â[i, j] Σₖ |Z[j, k]| |W[k, c]| <= ‖Z‖ κ Σⱼ Â[i, j] u[j] <= κ u[i] ‖Z‖.

    relu does not increase distances. So f contracts by κ in this norm, on every graph. It has one
    equilibrium, and `Picard()` shrinks the error in this norm by κ in each evaluation. The residual
    in `SolveStats` has the Euclidean norm, which is another one, so it may grow at first.

    Source: Gu, Chang, Zhu, Sojoudi and El Ghaoui, "Implicit graph neural networks", 2020.

    Args:
        features: width of the state.
        kappa: κ, above 0 and below 1.
        param_dtype: dtype of the parameter.
        rngs: stream `params`.

    Raises:
        ValueError: `kappa` is out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        kappa: float = 0.95,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.kappa = features, kappa
        checks.check_count(self, "features")
        checks.check_number(self, "kappa", above=0.0, below=1.0)
        normal = nnx.initializers.variance_scaling(0.01, "fan_in", "normal")
        self.recurrent = _matrix(features, normal, param_dtype, rngs)
        near_identity = jnp.eye(features, dtype=param_dtype) + self.recurrent.kernel[...]
        self.recurrent.kernel.set_value(self._projected(near_identity))

    def _projected(self, kernel: jax.Array) -> jax.Array:
        return projections.project_infinity_norm(kernel, self.kappa)

    def project(self, params: PyTree) -> PyTree:
        """`params` with the nearest W of an infinity norm of at most κ.

        Args:
            params: the `nnx.Param` state of this cell, or of a model that has this cell and no
                other matrix called `recurrent`.
        """
        return projections.project(params, self._projected, projections.named("recurrent"))

    def inject(self, x: GraphInput) -> GraphInjection:
        """The graph, X `[N, features]` and W."""
        self._check(x)
        weight = self.recurrent.kernel[...].astype(x.features.dtype)
        return GraphInjection(x.graph, x.features, weight)

    def __call__(self, z: jax.Array, injection: GraphInjection) -> jax.Array:
        """One application, `[N, features]`."""
        return nnx.relu(injection.graph.propagate(z @ injection.weight) + injection.features)


class EIGNNCell(_GraphCell):
    """`f(Z) = γ Â Z G + X` with `G = FᵀF / (‖FᵀF‖_F + ε)`: linear, and so with a closed form.

    The eigenvalues of G are in [0, 1), as its largest one is at most its Frobenius norm. Those of Â
    have magnitudes of at most 1. So the spectral radius of `Z -> γ Â Z G` is below γ < 1, on every
    graph: there is one equilibrium, and `Picard()` converges to it. On a symmetric graph each
    evaluation shrinks the error by γ in the Euclidean norm.

    Source: Liu, Kawaguchi, Hooi, Wang and Xiao, "EIGNN: efficient infinite-depth graph neural
    networks", 2021.

    Args:
        features: width of the state.
        gamma: γ, above 0 and below 1.
        epsilon: ε, above 0.
        param_dtype: dtype of the parameter.
        rngs: stream `params`.

    Raises:
        ValueError: `gamma` or `epsilon` is out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        gamma: float = 0.9,
        epsilon: float = 1e-6,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.gamma, self.epsilon = features, gamma, epsilon
        checks.check_count(self, "features")
        checks.check_number(self, "gamma", above=0.0, below=1.0)
        checks.check_number(self, "epsilon", above=0.0)
        normal = nnx.initializers.variance_scaling(1.0, "fan_in", "normal")
        self.factor = _matrix(features, normal, param_dtype, rngs)

    def inject(self, x: GraphInput) -> GraphInjection:
        """The graph, X `[N, features]` and `γ G`."""
        self._check(x)
        factor = self.factor.kernel[...]
        wide = factor.astype(accumulation_dtype(factor.dtype))
        gram = jnp.matmul(wide.T, wide, precision="highest")
        # The square of the norm, as the derivative of a norm is not defined where it is zero.
        square = jnp.sum(gram * gram)
        norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
        weight = gram * (self.gamma / (norm + self.epsilon))
        return GraphInjection(x.graph, x.features, weight.astype(x.features.dtype))

    def __call__(self, z: jax.Array, injection: GraphInjection) -> jax.Array:
        """One application, `[N, features]`."""
        return injection.graph.propagate(z @ injection.weight) + injection.features

    def closed_form(self, x: GraphInput, eigenvalues: Any, eigenvectors: Any) -> jax.Array:
        """The equilibrium `[N, features]` from the eigendecomposition of a symmetric Â.

        With `Â = U Λ Uᵀ` the rows of `Uᵀ Z` are equations of their own, with row i of `Uᵀ X` on
        the right-hand side,

            (Uᵀ Z)[i] (I - γ λᵢ G) = (Uᵀ X)[i],

        which are solved together. This takes `O(N² features + N features³)`, and the
        decomposition, once for each graph, `O(N³)`:

            eigenvalues, eigenvectors = np.linalg.eigh(graph.to_dense())

        Args:
            x: as for the layer.
            eigenvalues: `[N]`.
            eigenvectors: `[N, N]`, an eigenvector in each column.

        Raises:
            ValueError: the graph is not symmetric.
        """
        _check_symmetric(x.graph, "EIGNNCell.closed_form")
        _, features, weight, _ = self.inject(x)
        vectors = jnp.asarray(eigenvectors, features.dtype)
        values = jnp.asarray(eigenvalues, features.dtype)
        identity = jnp.eye(self.features, dtype=features.dtype)
        systems = identity - values[:, None, None] * weight.T  # transposed: columns are unknown
        right = jnp.matmul(vectors.T, features, precision="highest")
        solved = jnp.linalg.solve(systems, right[..., None])[..., 0]
        return jnp.matmul(vectors, solved, precision="highest")


class MonotoneGraphCell(_GraphCell):
    """`f(Z) = relu(Z - α (Z - A Z W - X))`, whose equilibria are those of `Z = relu(A Z W + X)`.

    Here `A = ½ (I + Â)` and `W = (1 - m) I - Cᵀ (I + D - Dᵀ) C`, and the graph must be symmetric.
    All C and D are allowed. W may have large negative and complex eigenvalues, with which the
    iteration `Z <- relu(A Z W + X)` diverges. f is a forward-backward step. It has the same
    equilibria for every α > 0: where an entry of Z is positive both equations say `Z = A Z W + X`,
    and where it is zero `A Z W + X <= 0`.

    **Proof that there is one equilibrium.** The symmetric Â has eigenvalues in [-1, 1], so those of
    A are in [0, 1]. In the basis of A's eigenvectors, the linear map `Z -> Z - A Z W` consists of
    the blocks `I - λ W` with λ in [0, 1], acting on rows. Write `G = Cᵀ (I + K) C` with
    `K = D - Dᵀ`. Then a block is `μ I + λ G` with `μ = 1 - λ (1 - m)` in [m, 1]. As K is
    skew-symmetric, `<v, G v> = ‖C v‖² >= 0`. So the map is strongly monotone with constant m, and
    `Z = relu(A Z W + X)` has one solution.

    **Proof that f contracts.** With `β = ‖C‖₂² (1 + ‖K‖₂²)` we have

        ‖G v‖² <= ‖C‖₂² ‖(I + K) C v‖² = ‖C‖₂² (‖C v‖² + ‖K C v‖²) <= β <v, G v>,

    where the middle step uses that K is skew-symmetric once more. Hence

        ‖v - α (μ v + λ G v)‖²
            = (1 - α μ)² ‖v‖² - 2 α λ (1 - α μ) <v, G v> + α² λ² ‖G v‖²
            <= (1 - α μ)² ‖v‖² - α λ (2 - 2 α μ - α λ β) <v, G v>,

    and the last bracket is not negative for `α = 2 / (2 + β)`, whatever λ and μ are. relu does not
    increase distances. So f contracts in the Euclidean norm by `1 - α m`, on every symmetric graph,
    and `Picard()` shrinks the error by this factor in each evaluation. (A block acts on rows of Z,
    so v is multiplied by Gᵀ. That has the form of G, with -K in the place of K.)

    Source: Baker, Wang, Hauck and Wang, "Implicit graph neural networks: a monotone operator
    viewpoint", 2023, for the idea; the parametrisation and the proofs are our own.

    Args:
        features: width of the state.
        monotonicity: m, above 0 and at most 1.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError: `monotonicity` is out of its range.
    """

    def __init__(
        self,
        features: int,
        *,
        monotonicity: float = 0.1,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.features, self.monotonicity = features, monotonicity
        checks.check_count(self, "features")
        checks.check_number(self, "monotonicity", above=0.0, at_most=1.0)
        normal = nnx.initializers.variance_scaling(0.1, "fan_in", "normal")
        self.factor = _matrix(features, normal, param_dtype, rngs)
        self.skew = _matrix(features, normal, param_dtype, rngs)

    def project(self, params: PyTree) -> PyTree:
        """`params` with the nearest C and D of bounded norms, which keeps solves short.

        f contracts without that too. But α becomes small where C or D are large. With `‖C‖₂² <= 2`
        the symmetric part of W has eigenvalues from `-1 - m` to `1 - m`, and with `‖D‖₂ <= ½` K has
        at most norm 1. Then `α >= 1/3`, and f contracts by `1 - m / 3` or better.

        Args:
            params: the `nnx.Param` state of this cell, or of a model that has this cell and no
                other matrices called `factor` and `skew`.
        """
        for name, bound in (("factor", 2**0.5), ("skew", 0.5)):
            params = projections.project(
                params,
                functools.partial(projections.project_spectral, bound=bound),
                projections.named(name),
            )
        return params

    def weight_and_step(self) -> tuple[jax.Array, jax.Array]:
        """W `[features, features]` and α, in float32 or wider; f contracts by `1 - α m`.

        α has no gradient, because the equilibrium does not depend on it.
        """
        dtype = accumulation_dtype(self.factor.kernel[...].dtype)
        factor, skew = (matrix.kernel[...].astype(dtype) for matrix in (self.factor, self.skew))
        skew = skew - skew.T
        identity = jnp.eye(self.features, dtype=dtype)
        product = jnp.matmul(identity + skew, factor, precision="highest")
        weight = (1 - self.monotonicity) * identity
        weight -= jnp.matmul(factor.T, product, precision="highest")
        # In one call: under vmap, two at once can wait for each other for good in jaxlib 0.10.2.
        norms = jnp.linalg.norm(lax.stop_gradient(jnp.stack([factor, skew])), 2, (1, 2))
        bound = norms[0] ** 2 * (1 + norms[1] ** 2)
        return weight, 2 / (2 + bound)

    def inject(self, x: GraphInput) -> GraphInjection:
        """The graph, X `[N, features]`, W and α."""
        self._check(x)
        _check_symmetric(x.graph, "MonotoneGraphCell")
        weight, step = self.weight_and_step()
        dtype = x.features.dtype
        return GraphInjection(x.graph, x.features, weight.astype(dtype), step.astype(dtype))

    def __call__(self, z: jax.Array, injection: GraphInjection) -> jax.Array:
        """One application, `[N, features]`."""
        graph, features, weight, step = injection
        assert step is not None
        product = z @ weight
        lazy = 0.5 * (product + graph.propagate(product))
        return nnx.relu(z + step * (lazy + features - z))


def _matrix(
    features: int, initializer: jax.nn.initializers.Initializer, dtype: Any, rngs: nnx.Rngs
) -> nnx.Linear:
    return nnx.Linear(
        features,
        features,
        use_bias=False,
        kernel_init=initializer,
        kernel_metadata=logical_axes("embed", "mlp"),
        param_dtype=dtype,
        rngs=rngs,
    )


def check_graph(graph: Any) -> None:
    """Raises a TypeError unless the argument `graph` is a `Graph`."""
    if not isinstance(graph, Graph):
        raise TypeError(f"graph must be a Graph, see Graph.from_edges, got {type(graph).__name__}")


def _check_symmetric(graph: Graph, who: str) -> None:
    if not graph.symmetric:
        raise ValueError(
            f"{who} needs a symmetric graph, Graph.from_edges(..., normalization='symmetric'), and "
            "got a directed one; IGNNCell and EIGNNCell take both"
        )
