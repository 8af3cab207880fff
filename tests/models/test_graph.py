"""Graph networks: logits against the formulas in NumPy, sparse features, projection, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.sparse
from flax import nnx
from jax.experimental.sparse import BCSR

from deq_jax import BackwardProbe, Picard, Status
from deq_jax.cells.graph import EIGNNCell, Graph, IGNNCell, MonotoneGraphCell
from deq_jax.models.graph import APPNP, GCN, SGC, ImplicitGraphNet
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("x64")

NODES, INPUTS, WIDTH, CLASSES = 8, 5, 4, 3
EDGES = np.array([[0, 1, 2, 3, 4, 5, 2], [1, 2, 3, 4, 5, 6, 6]])
CELLS = {"ignn": IGNNCell, "eignn": EIGNNCell, "monotone": MonotoneGraphCell}
SOLVER = Picard(tol=1e-13, max_iter=2000)


def implicit(name, **options):
    cell = CELLS[name](WIDTH, param_dtype=float, rngs=nnx.Rngs(1))
    return ImplicitGraphNet(
        INPUTS, CLASSES, cell=cell, solver=SOLVER, param_dtype=float, rngs=nnx.Rngs(0), **options
    )


def control(kind, **options):
    return kind(INPUTS, CLASSES, param_dtype=float, rngs=nnx.Rngs(0), **options)


def randomised(model, seed=0):
    """The model with random parameters, biases too."""
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape)),
                          nnx.state(model, nnx.Param))  # fmt: skip
    nnx.update(model, model.project(params))
    return model


@pytest.fixture
def data():
    """A graph, features of which most are zero, and the adjacency matrix in NumPy."""
    graph = Graph.from_edges(EDGES, NODES, dtype=float)
    rng = np.random.default_rng(7)
    features = rng.normal(size=(NODES, INPUTS)) * (rng.random((NODES, INPUTS)) < 0.4)
    return graph, jnp.asarray(features), np.asarray(graph.to_dense())


def affine(linear, x):
    return x @ np.asarray(linear.kernel[...]) + np.asarray(linear.bias[...])


def relu(x):
    return np.maximum(x, 0)


def controls():
    return {
        "gcn": control(GCN, features=WIDTH, depth=3),
        "appnp": control(APPNP, features=WIDTH, steps=4, alpha=0.3),
        "sgc": control(SGC, steps=3),
    }


def expected_logits(model, a, x):
    if isinstance(model, GCN):
        first, second, third = model.layers
        return a @ affine(third, relu(a @ affine(second, relu(a @ affine(first, x)))))
    if isinstance(model, SGC):
        return a @ a @ a @ affine(model.head, x)
    predicted = affine(model.head, relu(affine(model.hidden, x)))
    z = predicted
    for _ in range(4):
        z = 0.7 * a @ z + 0.3 * predicted
    return z


@pytest.mark.parametrize("name", ["gcn", "appnp", "sgc"])
@pytest.mark.slow
def test_controls_are_their_formulas(name, data):
    graph, features, a = data
    model = randomised(controls()[name])
    logits = nnx.jit(model)(graph, features)
    expected = expected_logits(model, a, np.asarray(features))
    assert relative_error(logits, expected) < 1e-12
    assert relative_error(model(graph, BCSR.fromdense(features)), expected) < 1e-12


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_logits_are_those_of_the_equilibrium(name, normalize, data):
    graph, features, a = data
    model = randomised(implicit(name, normalize=normalize))
    definition, state = nnx.split(model)

    @jax.jit
    def logits_and_stats(state, features):
        return nnx.merge(definition, state)(graph, features, return_stats=True)

    logits, stats = logits_and_stats(state, features)
    assert stats.status == Status.CONVERGED
    assert stats.residual.shape == ()
    x = affine(model.encoder, np.asarray(features))
    cell, z = model.core.cell, np.zeros((NODES, WIDTH))
    weight = np.asarray(cell.inject(model.injection(graph, features)).weight)
    for _ in range(3000):  # a small step converges for all three
        product = a @ z @ weight
        if name == "monotone":
            product = (z @ weight + product) / 2
        z = z + 0.1 * (product + x - z)
        z = z if name == "eignn" else relu(z)
    if normalize:
        z = z / np.sqrt((z**2).sum(1, keepdims=True) + 1e-12)
    expected = affine(model.head, z)
    assert relative_error(logits, expected) < 1e-10
    sparse, _ = logits_and_stats(state, BCSR.fromdense(features))
    assert relative_error(sparse, expected) < 1e-10


@pytest.mark.parametrize("name", ["ignn", "monotone"])
@pytest.mark.slow
def test_a_step_and_a_projection_keep_the_bound(name, data):
    graph, features, _ = data
    model = implicit(name)
    definition, params = nnx.split(model, nnx.Param)
    optimizer = optax.sgd(30.0)
    labels = jnp.arange(NODES) % CLASSES

    def loss(params, probe):
        model = nnx.merge(definition, params)
        logits, stats = model(graph, features, return_stats=True, backward_probe=probe)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), stats

    @jax.jit
    def step(params):
        with jax.numpy_dtype_promotion("standard"):
            (_, stats), (gradient, report) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
                params, BackwardProbe.zeros()
            )
            updates, _ = optimizer.update(gradient, optimizer.init(params), params)
            stepped = optax.apply_updates(params, updates)
            return stepped, nnx.merge(definition, params).project(stepped), stats, report

    stepped, projected, stats, report = step(params)
    assert stats.status == Status.CONVERGED
    assert report.status == Status.CONVERGED
    assert float(report.residual) <= 1e-6
    assert jax.tree.structure(projected) == jax.tree.structure(params)

    def size(params):
        cell = params["core"]["cell"]
        if name == "ignn":
            return np.abs(cell["recurrent"]["kernel"][...]).sum(0).max() / 0.95
        return np.linalg.norm(cell["factor"]["kernel"][...], 2) / 2**0.5

    assert size(stepped) > 1.01
    assert size(projected) <= 1 + 1e-9
    # All else is as the optimiser left it.
    np.testing.assert_array_equal(projected["head"]["kernel"][...], stepped["head"]["kernel"][...])


def test_dropout_of_sparse_features_is_that_of_their_entries(data):
    graph, features, a = data
    model = SGC(INPUTS, CLASSES, steps=1, dropout=0.5, param_dtype=float,
                rngs=nnx.Rngs(0, dropout=3))  # fmt: skip
    sparse = BCSR.fromdense(features)
    mask = nnx.Dropout(0.5, rngs=nnx.Rngs(0, dropout=3))(jnp.ones_like(sparse.data))
    dropped = np.zeros((NODES, INPUTS))
    dropped[np.nonzero(features)] = np.asarray(sparse.data) * np.asarray(mask)
    expected = a @ affine(model.head, dropped)
    assert relative_error(model(graph, sparse), expected) < 1e-12
    model.eval()
    assert relative_error(model(graph, sparse), a @ affine(model.head, features)) < 1e-12


@pytest.mark.slow
def test_bad_input_is_named(data):
    graph, features, _ = data
    model = control(SGC)
    with pytest.raises(ValueError, match=r"shape \[8, 5\] .* got \[8, 4\]"):
        model(graph, features[:, :4])
    with pytest.raises(ValueError, match=r"got \[7, 5\]"):
        model(graph, BCSR.fromdense(features[:7]))
    with pytest.raises(ValueError, match=r"APPNP\.alpha must be finite, > 0"):
        control(APPNP, alpha=0.0)
    with pytest.raises(ValueError, match=r"GCN\.depth must be at least 1"):
        control(GCN, depth=0)
    for rate in (1.0, 1.5):
        with pytest.raises(ValueError, match=r"dropout must be finite, >= 0.0 and < 1.0"):
            control(SGC, dropout=rate)
    with pytest.raises(TypeError, match=r"graph must be a Graph, see Graph\.from_edges"):
        implicit("ignn")(features, graph)
    with pytest.raises(TypeError, match=r"array or a jax\.experimental\.sparse\.BCSR, got csr_"):
        model(graph, scipy.sparse.csr_array(np.asarray(features)))
    directed = Graph.from_edges(EDGES, NODES, normalization="mean", dtype=float)
    with pytest.raises(ValueError, match="MonotoneGraphCell needs a symmetric graph"):
        implicit("monotone")(directed, features)
