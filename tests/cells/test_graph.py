"""Graph cells against dense float64 solves in NumPy; random weights against their guarantees."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.sparse import BCSR

from deq_jax import Control, Picard, Status
from deq_jax.cells.graph import EIGNNCell, Graph, GraphInput, IGNNCell, MonotoneGraphCell
from deq_jax.monotone import MonotoneDEQ
from deq_jax.nnx import DEQ
from deq_jax.stability import spectral_radius
from tests.reference import relative_error

EDGES = np.array([[0, 1, 2, 0, 4, 1, 3], [1, 2, 3, 3, 0, 5, 1]])
"""Of seven nodes, of which node 6 is connected to none."""
NODES, WIDTH = 7, 3
CELLS = {"ignn": IGNNCell, "eignn": EIGNNCell, "monotone": MonotoneGraphCell}
KINDS = ["symmetric", "mean"]


def adjacency(normalization, self_loops=True):
    """Â in float64, from its definition."""
    a = np.zeros((NODES, NODES))
    a[EDGES[1], EDGES[0]] = 1
    if normalization == "symmetric":
        a = np.maximum(a, a.T)
    a += self_loops * np.eye(NODES)
    degrees = a.sum(1)
    inverse = np.where(degrees > 0, 1 / np.where(degrees > 0, degrees, 1), 0)
    if normalization == "mean":
        return inverse[:, None] * a
    return np.sqrt(inverse)[:, None] * a * np.sqrt(inverse)


def graph(normalization="symmetric", **options):
    return Graph.from_edges(EDGES, NODES, normalization=normalization, dtype=float, **options)


# ------------------------------------------------------------------------------------- the graph


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("normalization", KINDS)
def test_adjacency_matrix_is_that_of_the_definition(normalization, self_loops):
    expected = adjacency(normalization, self_loops)
    found = graph(normalization, self_loops=self_loops)
    np.testing.assert_allclose(found.to_dense(), expected, atol=1e-15)
    assert found.symmetric == (normalization == "symmetric")
    assert np.abs(np.linalg.eigvals(expected)).max() < 1 + 1e-12
    z = np.random.default_rng(0).normal(size=(2, NODES, WIDTH))
    product, transposed = jax.vjp(jax.jit(found.propagate), jnp.asarray(z[0]))
    np.testing.assert_allclose(product, expected @ z[0], atol=1e-14)
    np.testing.assert_allclose(transposed(jnp.asarray(z[1]))[0], expected.T @ z[1], atol=1e-14)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_edges_that_stand_there_twice_count_once():
    twice = np.concatenate([EDGES, EDGES[::-1], EDGES, [[2], [2]]], axis=1)
    found = Graph.from_edges(twice, NODES, dtype=float)
    np.testing.assert_array_equal(found.to_dense(), graph().to_dense())
    # With the weight that comes first, also where the second one goes the other way.
    edges, weights = [[0, 1, 1, 2], [1, 0, 2, 1]], [2.0, 5.0, 3.0, 1.0]
    a = np.array([[0.0, 2, 0], [2, 0, 3], [0, 3, 0]])
    scale = 1 / np.sqrt(a.sum(1))
    found = Graph.from_edges(edges, 3, weights=weights, self_loops=False, dtype=float)
    np.testing.assert_allclose(found.to_dense(), scale[:, None] * a * scale, atol=1e-15)
    cell = EIGNNCell(2, param_dtype=float, rngs=nnx.Rngs(0))
    x = GraphInput(found, jnp.asarray([[1.0, 2.0], [0.0, -1.0], [3.0, 0.5]]))
    z = DEQ(cell, solver=Picard(tol=1e-14, max_iter=500))(x)
    assert relative_error(z, cell.closed_form(x, *np.linalg.eigh(found.to_dense()))) < 1e-10
    # With `mean` these are edges of their own.
    directed = Graph.from_edges(edges, 3, weights=weights, self_loops=False, normalization="mean")
    np.testing.assert_allclose(directed.to_dense(), [[0, 1, 0], [2 / 3, 0, 1 / 3], [0, 1, 0]], 1e-6)


@pytest.mark.parametrize("normalization", KINDS)
def test_a_graph_may_have_no_edges(normalization):
    loops = Graph.from_edges([[], []], 3, normalization=normalization)
    np.testing.assert_array_equal(loops.to_dense(), np.eye(3))
    none = Graph.from_edges([[], []], 3, normalization=normalization, self_loops=False)
    np.testing.assert_array_equal(none.propagate(jnp.ones((3, 2))), 0)


@pytest.mark.slow
def test_a_matrix_made_by_hand_is_checked():
    matrix = graph("mean").matrix
    assert not Graph(matrix, symmetric=False).symmetric
    with pytest.raises(ValueError, match=r"not symmetric; pass symmetric=False"):
        Graph(matrix, symmetric=True)
    dense = jnp.asarray(adjacency("symmetric"), jnp.float32)
    padded = BCSR.fromdense(dense, nse=30)
    np.testing.assert_array_equal(Graph(padded, symmetric=True).to_dense(), dense)
    with pytest.raises(TypeError, match=r"BCSR, got .*; Graph.from_edges makes"):
        Graph(dense, symmetric=True)
    with pytest.raises(ValueError, match=r"must be \[N, N\], got \[6, 7\]"):
        Graph(BCSR.fromdense(dense[:6]), symmetric=False)
    # A traced matrix and the leaves of other pytrees are taken as they are.
    whole = graph()
    assert jax.tree.map(lambda _: None, whole).symmetric
    traced = jax.jit(lambda m: Graph(m, symmetric=True).to_dense())(whole.matrix)
    np.testing.assert_array_equal(traced, whole.to_dense())


@pytest.mark.usefixtures("x64")
def test_weights_are_normalised_too():
    weights = np.arange(1.0, 8.0)
    a = np.zeros((NODES, NODES))
    a[EDGES[1], EDGES[0]] = weights
    found = graph("mean", weights=weights, self_loops=False).to_dense()
    np.testing.assert_allclose(found, a / np.maximum(a.sum(1, keepdims=True), 1e-300), atol=1e-15)
    a = a + a.T + np.eye(NODES)
    scale = 1 / np.sqrt(a.sum(1))
    found = graph(weights=weights).to_dense()
    np.testing.assert_allclose(found, scale[:, None] * a * scale, atol=1e-15)


def test_weights_take_the_dtype_of_the_state():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        z = jnp.ones((NODES, 2), dtype)
        product = Graph.from_edges(EDGES, NODES).propagate(z)
        assert product.dtype == dtype
        sums = np.asarray(product.astype(jnp.float32)[:, 0])
        np.testing.assert_allclose(sums, adjacency("symmetric").sum(1), rtol=2e-2)


@pytest.mark.parametrize(
    ("edges", "options", "message"),
    [
        ([[0, 1]], {}, r"edges must be integers \[2, E\]"),
        ([[0.0], [1.0]], {}, r"got float64\[2, 1\]"),
        ([[0], [7]], {}, "nodes from 0 to 6, got numbers from 0 to 7"),
        ([[0], [-1]], {}, "got numbers from -1 to 0"),
        ([[0], [1]], {"weights": [0.0]}, "above zero, got 0.0 for edge 0"),
        ([[0, 1], [1, 2]], {"weights": [1, np.nan]}, "above zero, got nan for edge 1"),
        ([[0], [1]], {"weights": [1.0, 2.0]}, r"one for each edge, got \[2\]"),
        ([[0], [1]], {"normalization": "rows"}, r"normalization must be one of .* got 'rows'"),
    ],
)
def test_bad_edges_are_named(edges, options, message):
    with pytest.raises(ValueError, match=message):
        Graph.from_edges(np.array(edges), 7, **options)


@pytest.mark.slow
def test_bad_states_and_options_are_named():
    with pytest.raises(ValueError, match=r"has 7 nodes, so z .* got \[6, 2\]"):
        Graph.from_edges(EDGES, NODES).propagate(jnp.ones((6, 2)))
    rngs = nnx.Rngs(0)
    with pytest.raises(ValueError, match=r"IGNNCell\.kappa must be finite, > 0.0 and < 1.0"):
        IGNNCell(3, kappa=1.0, rngs=rngs)
    with pytest.raises(ValueError, match=r"EIGNNCell\.gamma must be finite, > 0"):
        EIGNNCell(3, gamma=0.0, rngs=rngs)
    with pytest.raises(ValueError, match=r"MonotoneGraphCell\.monotonicity"):
        MonotoneGraphCell(3, monotonicity=1.5, rngs=rngs)
    x = GraphInput(Graph.from_edges(EDGES, NODES, normalization="mean"), jnp.ones((7, 3)))
    with pytest.raises(ValueError, match="MonotoneGraphCell needs a symmetric graph"):
        MonotoneGraphCell(3, rngs=rngs).inject(x)
    with pytest.raises(ValueError, match=r"shape \[7, 2\] .* got \[7, 3\]"):
        IGNNCell(2, rngs=rngs).inject(x)
    with pytest.raises(TypeError, match=r"graph must be a Graph, see Graph\.from_edges"):
        IGNNCell(3, rngs=rngs).inject(GraphInput(x.features, x.graph))
    with pytest.raises(TypeError, match=r"x must be a GraphInput\(graph, features\)"):
        DEQ(IGNNCell(3, rngs=rngs))(x.features)
    with pytest.raises(TypeError, match=r"MonotoneGraphCell in it"):
        MonotoneDEQ(MonotoneGraphCell(3, rngs=rngs))


def test_a_graph_is_one_equation_without_being_told():
    cell = IGNNCell(3, rngs=nnx.Rngs(0))
    x = GraphInput(Graph.from_edges(EDGES, NODES), jnp.ones((NODES, 3)))
    _, stats = DEQ(cell)(x, return_stats=True)
    assert stats.residual.shape == ()
    with pytest.raises(ValueError, match=r"whole input of IGNNCell .* pass batched=False"):
        DEQ(cell, batched=True)


# ------------------------------------------------------------------------ values and gradients


def layer_and_input(name, normalization="symmetric", scale=1.0):
    """A layer with random parameters in float64, and its input."""
    cell = CELLS[name](WIDTH, param_dtype=float, rngs=nnx.Rngs(1))
    rng = np.random.default_rng(3)
    params = nnx.state(cell, nnx.Param)
    params = jax.tree.map(lambda leaf: jnp.asarray(scale * rng.normal(size=leaf.shape)), params)
    nnx.update(cell, cell.project(params))
    layer = DEQ(cell, solver=Picard(tol=1e-14, max_iter=5000))
    return layer, GraphInput(graph(normalization), jnp.asarray(rng.normal(size=(NODES, WIDTH))))


@functools.partial(jax.jit, static_argnums=0)
def solved(definition, params, x, cotangent):
    """The equilibrium, and the gradient of its product with a cotangent."""

    def product(params, features):
        layer = nnx.merge(definition, params)
        inputs = x._replace(features=features)
        z, stats = layer(inputs, return_stats=True)
        return (z * cotangent).sum(), (z, stats)

    value = jax.value_and_grad(product, argnums=(0, 1), has_aux=True)
    (_, (z, stats)), gradients = value(params, x.features)
    return z, stats, gradients


def dense_solve(a, weight, x, mask, cotangent):
    """z* of `Z = mask (a Z W + X)`, and the cotangents of X and W, from one linear system."""
    jacobian = mask.reshape(-1, 1) * np.kron(a, weight.T)
    system = np.eye(NODES * WIDTH) - jacobian
    z = np.linalg.solve(system, (mask * x).ravel()).reshape(x.shape)
    u = np.linalg.solve(system.T, cotangent.ravel()).reshape(x.shape)
    return z, mask * u, (a @ z).T @ (mask * u)


def weight_and_pullback(cell):
    """W in NumPy, and what makes cotangents of the parameters from that of W."""
    if isinstance(cell, IGNNCell):
        return np.asarray(cell.recurrent.kernel[...]), lambda w: {"recurrent": w}
    c = np.asarray(cell.factor.kernel[...])
    if isinstance(cell, EIGNNCell):
        gram = c.T @ c
        norm = np.linalg.norm(gram)
        total = norm + cell.epsilon

        def pullback(w):
            w = cell.gamma * w
            of_gram = w / total - (w * gram).sum() / (total**2 * norm) * gram
            return {"factor": c @ (of_gram + of_gram.T)}

        return cell.gamma * gram / total, pullback
    d = np.asarray(cell.skew.kernel[...])
    middle = np.eye(WIDTH) + d - d.T

    def pullback(w):
        of_middle = -c @ w @ c.T
        return {
            "factor": -(middle @ c @ w.T + middle.T @ c @ w),
            "skew": of_middle - of_middle.T,
        }

    return (1 - cell.monotonicity) * np.eye(WIDTH) - c.T @ middle @ c, pullback


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "normalization"),
    [("ignn", "symmetric"), ("ignn", "mean"), ("eignn", "symmetric"), ("eignn", "mean"),
     ("monotone", "symmetric")],
)  # fmt: skip
def test_values_and_gradients_are_those_of_a_dense_solve(name, normalization):
    layer, x = layer_and_input(name, normalization)
    cotangent = np.random.default_rng(5).normal(size=(NODES, WIDTH))
    definition, params = nnx.split(layer, nnx.Param)
    z, stats, (of_params, of_features) = solved(definition, params, x, jnp.asarray(cotangent))
    assert stats.status == Status.CONVERGED
    a = adjacency(normalization)
    if name == "monotone":
        a = (np.eye(NODES) + a) / 2
    weight, pullback = weight_and_pullback(layer.cell)
    mask = np.ones_like(cotangent) if name == "eignn" else np.asarray(z > 0, float)
    assert name == "eignn" or 0 < mask.sum() < mask.size
    expected, of_x, of_weight = dense_solve(a, weight, np.asarray(x.features), mask, cotangent)
    assert relative_error(z, expected) < 1e-8
    if name != "eignn":  # the mask is that of the solution
        np.testing.assert_array_equal(a @ expected @ weight + x.features > 0, mask)
    assert relative_error(of_features, of_x) < 1e-8
    for matrix, gradient in pullback(of_weight).items():
        assert relative_error(of_params["cell"][matrix]["kernel"][...], gradient) < 1e-8, matrix


@pytest.mark.usefixtures("x64")
def test_eignn_has_the_closed_form():
    layer, x = layer_and_input("eignn")
    z = layer(x)
    eigen = np.linalg.eigh(np.asarray(x.graph.to_dense()))
    assert relative_error(z, layer.cell.closed_form(x, *eigen)) < 1e-10
    directed = GraphInput(graph("mean"), x.features)
    with pytest.raises(ValueError, match=r"closed_form needs a symmetric graph"):
        layer.cell.closed_form(directed, *eigen)


@pytest.mark.usefixtures("x64")
def test_eignn_with_a_matrix_of_zeros_has_gradients_of_zeros():
    layer, x = layer_and_input("eignn", scale=0.0)
    definition, params = nnx.split(layer, nnx.Param)
    z, _, (of_params, _) = solved(definition, params, x, jnp.ones((NODES, WIDTH)))
    np.testing.assert_array_equal(z, x.features)
    np.testing.assert_array_equal(of_params["cell"]["factor"]["kernel"][...], 0)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_scales_show_the_errors_that_a_huge_node_hides():
    """The caveat of docs/graphs.md: node 0, without edges, is right after one evaluation."""
    features = np.abs(np.random.default_rng(0).normal(size=(5, 4)))
    features[0] *= 1e6
    path = Graph.from_edges([[2, 3], [3, 4]], 5, self_loops=False, dtype=float)
    x = GraphInput(path, jnp.asarray(features))
    cell = IGNNCell(4, param_dtype=float, rngs=nnx.Rngs(0))
    weight = np.asarray(cell.recurrent.kernel[...])
    expected = np.zeros((5, 4))
    for _ in range(1000):
        expected = np.maximum(path.to_dense() @ expected @ weight + features, 0)
    layer = DEQ(cell, solver=Picard(max_iter=1000))
    sizes = jnp.abs(x.features).max(1, keepdims=True)
    plain, stats = layer(x, return_stats=True)
    assert stats.status == Status.CONVERGED
    assert relative_error(plain[1:], expected[1:]) > 0.5
    scaled, stats = layer(x, return_stats=True, control=Control(scales=sizes))
    assert stats.status == Status.CONVERGED
    assert relative_error(scaled[1:], expected[1:]) < 0.01


# ------------------------------------------------------------------------------------ guarantees

DRAWS = 1000


def drawn_params(cell, largest, seed=0):
    """Parameters of `DRAWS` cells, with scales from 0.1 to `largest`, and features."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.uniform(np.log(0.1), np.log(largest), size=(DRAWS, 1, 1)))

    def draw(leaf):
        return jnp.asarray(scales * rng.normal(size=(DRAWS, *leaf.shape)), leaf.dtype)

    params = jax.tree.map(draw, nnx.state(cell, nnx.Param))
    return params, jnp.asarray(rng.normal(size=(DRAWS, NODES, WIDTH)), jnp.float32)


@pytest.mark.parametrize("name", ["ignn", "eignn"])
@pytest.mark.slow
def test_picard_converges_for_random_weights_on_directed_graphs(name):
    """On symmetric ones see tests/stability/test_guarantees.py."""
    cell = CELLS[name](WIDTH, rngs=nnx.Rngs(0))
    layer = DEQ(cell, solver=Picard(tol=1e-5, max_iter=2000))
    definition = nnx.split(layer)[0]
    nodes = Graph.from_edges(EDGES, NODES, normalization="mean")

    @jax.jit
    @jax.vmap
    def status(params, features):
        x = GraphInput(nodes, features)
        layer = nnx.merge(definition, {"cell": params})
        return layer(x, return_stats=True)[1].status

    params, features = drawn_params(cell, 1000.0)
    projected = jax.jit(jax.vmap(cell.project))(params)
    np.testing.assert_array_equal(status(projected, features), Status.CONVERGED)
    if name == "ignn":  # most of them would not without the projection
        radii = np.abs(np.linalg.eigvals(params["recurrent"]["kernel"][...])).max(-1)
        assert (radii > 1).mean() > 0.5


@pytest.mark.usefixtures("x64")
def test_the_projection_makes_the_bound_hold():
    cell = IGNNCell(WIDTH, kappa=0.8, param_dtype=float, rngs=nnx.Rngs(0))
    start = np.abs(cell.recurrent.kernel[...]).sum(0)
    assert start.max() <= 0.8 * (1 + 1e-12)
    params, _ = drawn_params(cell, 1000.0)
    kernels = np.asarray(jax.vmap(cell.project)(params)["recurrent"]["kernel"][...])
    norms = np.abs(kernels).sum(1).max(1)
    assert norms.max() <= 0.8 * (1 + 1e-12)
    # It is what the proof says: the map contracts by 0.8 in the norm that u weights.
    a = adjacency("symmetric")
    u = np.sqrt((a > 0).sum(1))
    np.testing.assert_allclose(a @ u, u, atol=1e-12)
    z = np.random.default_rng(1).normal(size=(DRAWS, NODES, WIDTH))
    weighted = np.abs(a @ z @ kernels) / u[:, None]
    largest = (np.abs(z) / u[:, None]).max((1, 2))
    assert (weighted.max((1, 2)) <= 0.8 * largest * (1 + 1e-12)).all()


@pytest.mark.usefixtures("x64")
def test_the_monotone_cell_contracts_at_the_rate_that_it_says():
    cell = MonotoneGraphCell(WIDTH, monotonicity=0.3, param_dtype=float, rngs=nnx.Rngs(0))
    definition = nnx.split(cell)[0]
    params, _ = drawn_params(cell, 1000.0)
    weights, steps = jax.vmap(lambda p: nnx.merge(definition, p).weight_and_step())(params)
    weights, steps = np.asarray(weights), np.asarray(steps)[:, None, None]
    symmetric = np.linalg.eigvalsh((weights + weights.mT) / 2).max(-1)
    sizes = np.abs(weights).max((1, 2))
    assert (symmetric <= 0.7 + 1e-12 * sizes).all()
    for share in np.linspace(0, 1, 6):  # eigenvalues of ½ (I + Â)
        blocks = (1 - steps) * np.eye(WIDTH) + steps * share * weights
        norms = np.linalg.norm(blocks, 2, axis=(1, 2))
        assert (norms <= 1 - 0.3 * steps[:, 0, 0] + 1e-12).all()
    projected = jax.vmap(cell.project)(params)
    _, steps = jax.vmap(lambda p: nnx.merge(definition, p).weight_and_step())(projected)
    assert (steps >= 1 / 3 - 1e-12).all()
    # Plain iteration would not do.
    assert (np.abs(np.linalg.eigvals(weights)).max(-1) > 1).mean() > 0.5


@pytest.mark.slow
def test_the_library_measures_the_bound():
    cell = IGNNCell(WIDTH, rngs=nnx.Rngs(1))
    layer = DEQ(cell, solver=Picard(tol=1e-5, max_iter=1000))
    features = np.random.default_rng(0).normal(size=(NODES, WIDTH))
    x = GraphInput(Graph.from_edges(EDGES, NODES), jnp.asarray(features, jnp.float32))
    f, params, injection = layer.equation(x)
    z = layer(x)
    found = spectral_radius(f, params, z, injection, jax.random.key(0), batched=False)
    assert found.converged
    assert 0 < float(found.radius) <= cell.kappa + 1e-5
