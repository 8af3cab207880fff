"""Training of sequence models: gradients by a dense solve, remat, dropout, half precision."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Execution, Picard
from deq_jax.models.sequence import Segment
from tests.cells.test_transformer import numbers
from tests.models.sequences import (
    MODERN,
    B,
    L,
    by_numpy,
    call,
    make,
    read_out,
    tokens,
    whole,
    zero_state,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.slow


def cross_entropy(logits, targets):
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
    return -chosen.mean()


@pytest.mark.parametrize(
    ("name", "tied", "length", "options"),
    [
        ("deq_transformer", True, 3, {}),
        ("deq_transformer", False, 2, {"norm_order": "pre", "positions": "none"}),
        ("deq_trellis", True, 3, {}),
    ],
)
def test_gradients_are_those_of_the_implicit_function(name, tied, length, options, x64):
    """All parameters of a language model: a tied embedding counts at both ends."""
    model, inputs = make(name, tied=tied, **options), tokens(length + 1)[:, :-1]
    targets = tokens(length + 1)[:, 1:]
    definition, state = nnx.split(model)

    @jax.jit
    @jax.value_and_grad
    def own(state):
        return cross_entropy(nnx.merge(definition, state)(inputs), targets)

    f, root = whole(name, options), np.sqrt(model.features)

    def equation(weights, z):
        e = root * weights["embedding"][inputs]
        with jax.numpy_dtype_promotion("standard"):
            return f(weights["core"]["cell"], z, e, xp=jnp)

    def loss(weights, z):
        head = weights.get("head", weights["embedding"])
        logits = read_out(name, z, options, xp=jnp) @ head.T + weights["bias"]
        return cross_entropy(logits, targets)

    weights = jax.tree.map(jnp.asarray, numbers(nnx.to_pure_dict(state)))
    start = zero_state(name, root * np.asarray(weights["embedding"])[np.asarray(inputs)])
    z = newton_equilibrium(lambda z: equation(weights, z), jax.tree.map(jnp.asarray, start))
    value, (direct, cotangent) = jax.value_and_grad(loss, argnums=(0, 1))(weights, z)
    through = implicit_gradient(equation, weights, z, cotangent)
    expected = jax.tree.map(jnp.add, direct, through)

    got_value, got = own(state)
    assert float(got_value) == pytest.approx(float(value), rel=1e-9)
    got = nnx.to_pure_dict(got)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True
    ):
        assert np.abs(a).max() > 1e-8, path
        assert relative_error(a, b) < 1e-8, path
    for part in (direct, through):
        assert np.abs(part["embedding"]).max() > (1e-3 if tied or part is through else -1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied_transformer", {}),
        ("explicit_transformer", MODERN),
        ("tied_trellis", {"dropout": 0.4}),
        ("explicit_trellis", {"dropout": 0.4}),
    ],
)
def test_rematerialisation_changes_nothing(name, options, x64):
    """Values, gradients, memory, and where it leaves the random streams."""
    made = make(name, depth=2, memory_size=2, **options)
    memory = made.initial_memory(B)

    def run(remat):
        made.remat = remat
        definition, params, rest = nnx.split(made, nnx.Param, ...)

        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def by_params(params):
            model = nnx.merge(definition, params, rest, copy=True)
            logits, kept = model(Segment(tokens(2), memory), return_memory=True)
            return (logits**2).sum(), (logits, kept, nnx.state(model, nnx.RngCount))

        return by_params(params)

    (gradients, outputs), (same_gradients, same) = run(False), run(True)
    assert relative_error(same_gradients, gradients) < 1e-12
    assert ("dropout" in options) == bool(jax.tree.leaves(outputs[2]))
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(outputs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["deq_transformer", "tied_trellis"])
def test_dropout_is_of_training_alone(name):
    options = {"dtype": jnp.float32}
    if name.startswith("deq"):
        options["solver"] = Picard(tol=0.0, max_iter=8)
    model, plain = make(name, dropout=0.5, **options), make(name, **options)
    in_training = call(model, tokens())
    model.eval()
    np.testing.assert_array_equal(call(model, tokens()), call(plain, tokens()))
    assert relative_error(in_training, call(plain, tokens())) > 0.05


def test_dropout_around_the_core_has_one_mask_for_all_positions():
    model = make("deq_transformer", dropout=0.5, tied=False, dtype=jnp.float32)
    plain = make("deq_transformer", tied=False, dtype=jnp.float32)
    mask = np.asarray(model.embed(tokens()) / plain.embed(tokens()))
    assert_mask(mask)
    other = np.asarray(model.embed(tokens()) / plain.embed(tokens()))
    assert (other != mask).any()
    # With the identity in place of the head its logits are what it is given.
    model.head = nnx.Param(jnp.eye(model.features))
    model.bias = nnx.Param(jnp.zeros(model.features))
    assert_mask(np.asarray(model.classify(jnp.ones((B, L, model.features)))))


def assert_mask(mask):
    assert set(np.unique(mask.round(5))) == {0, 2}
    assert (mask == mask[:, :1]).all()
    assert (mask[0] != mask[1]).any()


@pytest.mark.parametrize("name", ["deq_transformer", "deq_trellis"])
def test_half_precision_in_the_core(name):
    half = Execution(cell_dtype=jnp.bfloat16)
    model = make(name, dtype=jnp.float32, solver=Picard(tol=1e-2), execution=half, memory_size=2)
    logits, stats, memory = call(model, tokens(), return_stats=True, return_memory=True)
    assert logits.dtype == jnp.float32
    assert stats.converged.all()
    floats = {leaf.dtype for leaf in jax.tree.leaves(memory)} - {jnp.dtype(jnp.int32)}
    assert floats == {jnp.dtype(jnp.float32)}
    error = relative_error(logits, by_numpy(name, model, tokens(), {}))
    assert 1e-5 < error < 0.05
