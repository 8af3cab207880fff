"""The recurrent controls: LSTM and GRU step by step in NumPy, counts, dropout, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.recurrent import RecurrentNet
from tests.cells.test_transformer import numbers
from tests.models.sequences import B, V, call, tokens
from tests.reference import relative_error

E, H = 3, 4


def make(kind="lstm", tied=False, **options):
    """Biases are random too, which start as zeros."""
    features = H if tied else E
    model = RecurrentNet(
        V, features, H, kind=kind, tied=tied, param_dtype=jnp.float64, **options, rngs=nnx.Rngs(0)
    )
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), state))
    return model


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lstm(cell, x):
    """Flax's order of gates: i, f, g, o; the bias is that of the recurrent kernel."""
    h = c = np.zeros((len(x), H))
    for t in range(x.shape[1]):
        gates = x[:, t] @ cell["dense_i"]["kernel"] + h @ cell["dense_h"]["kernel"]
        i, f, g, o = np.split(gates + cell["dense_h"]["bias"], 4, -1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        yield h


def gru(cell, x):
    """r, z, n, with the bias of the input's kernel; z keeps the old state."""
    h = np.zeros((len(x), H))
    for t in range(x.shape[1]):
        r, z, n = np.split(x[:, t] @ cell["dense_i"]["kernel"] + cell["dense_i"]["bias"], 3, -1)
        of_r, of_z, of_n = np.split(h @ cell["dense_h"]["kernel"], 3, -1)
        z = sigmoid(z + of_z)
        h = (1 - z) * np.tanh(n + sigmoid(r + of_r) * of_n) + z * h
        yield h


@pytest.mark.parametrize(("kind", "steps"), [("lstm", lstm), ("gru", gru)])
@pytest.mark.parametrize("tied", [False, True])
def test_the_network_is_the_loop(kind, steps, tied, x64):
    model = make(kind, tied)
    weights = numbers(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    x = weights["embedding"]["embedding"][np.asarray(tokens())]
    h = np.stack(list(steps(weights["layer"]["cell"], x)), 1)
    if tied:
        expected = h @ weights["embedding"]["embedding"].T + weights["bias"]
    else:
        expected = h @ weights["head"]["kernel"] + weights["head"]["bias"]
    got = call(model, tokens())
    assert got.dtype == jnp.float64
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize(("kind", "gates"), [("lstm", 4), ("gru", 3)])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters(kind, gates, tied):
    features = 6 if tied else 5
    model = nnx.eval_shape(
        lambda: RecurrentNet(11, features, 6, kind=kind, tied=tied, rngs=nnx.Rngs(0))
    )
    layer = gates * (features * 6 + 6 * 6 + 6)
    around = 11 * features + 11 + (0 if tied else 6 * 11)
    assert count_parameters(model) == layer + around


def test_dropout_has_one_mask_for_all_positions(x64):
    model = make(dropout=0.5)
    mask = np.asarray(model.embedding_dropout(jnp.ones((B, 6, E))))
    assert set(np.unique(mask)) == {0, 2}
    assert (mask == mask[:, :1]).all()
    in_training = call(model, tokens())
    model.eval()
    assert relative_error(call(model, tokens()), call(make(), tokens())) < 1e-14
    assert relative_error(in_training, call(model, tokens())) > 0.05


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "rnn"}, "kind must be one of .*, got 'rnn'"),
        ({"tied": True}, "a tied head needs hidden_features=4 to be features=3"),
        ({"vocabulary_size": 0}, "vocabulary_size must be at least 1, got 0"),
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"hidden_features": 0}, "hidden_features must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be finite, >= 0 and <= 1, got 1.5"),
    ],
)
def test_bad_options_are_named(options, message):
    sizes = {"vocabulary_size": V, "features": E, "hidden_features": H}
    with pytest.raises(ValueError, match=message):
        RecurrentNet(**sizes | options, rngs=nnx.Rngs(0))
