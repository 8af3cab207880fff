"""Variational dropout: what a mask drops, and that a solve has one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, deq_fixed_point
from deq_jax.nnx import DEQ
from deq_jax.stability import broadcast_axes, dropout_mask

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("full", (64, 20, 30), (64, 20, 30)),
        ("channel", (64, 20, 300), (64, 1, 300)),
        ("channel", (64, 5, 6, 300), (64, 1, 1, 300)),
        ("channel", (64, 300), (64, 300)),
        ("token", (64, 200, 30), (64, 200, 1)),
        ("full", (8, 4, 20, 20), (8, 4, 20, 20)),
    ],
)
def test_masks_drop_the_share_asked_for_and_have_mean_one(kind, shape, expected):
    mask = np.asarray(dropout_mask(KEY, 0.3, shape, kind=kind))
    assert mask.shape == expected
    assert set(np.unique(mask)) == {np.float32(0), np.float32(1 / 0.7)}
    spread = 5 * np.sqrt(0.3 * 0.7 / mask.size)
    assert abs(np.mean(mask == 0) - 0.3) < spread
    again = dropout_mask(KEY, 0.3, shape, kind=kind)
    np.testing.assert_array_equal(mask, again)
    other = dropout_mask(jax.random.key(1), 0.3, shape, kind=kind)
    assert (np.asarray(other) != mask).any()


def test_rates_at_the_ends_and_dtypes():
    for dtype in (jnp.bfloat16, jnp.float32):
        everything = dropout_mask(KEY, 1.0, (4, 5), dtype=dtype)
        nothing = dropout_mask(KEY, 0.0, (4, 5), dtype=dtype)
        assert everything.dtype == nothing.dtype == dtype
        np.testing.assert_array_equal(everything, np.zeros((4, 5)))
        np.testing.assert_array_equal(nothing, np.ones((4, 5)))


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_bad_rates(rate):
    with pytest.raises(ValueError, match="rate must be in"):
        dropout_mask(KEY, rate, (2, 3))


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="'row'"):
        dropout_mask(KEY, 0.5, (2, 3), kind="row")


def recorded(seen):
    """A cell that tells which entries its mask left, at every evaluation and in products."""

    @jax.custom_jvp
    def masked(mask, z):
        jax.debug.callback(lambda mask: seen["forward"].append(mask), mask, ordered=False)
        return mask * z

    @masked.defjvp
    def _(primals, tangents):
        (mask, z), (_, z_dot) = primals, tangents
        # Traced into the linear part: told whenever a product is computed.
        jax.debug.callback(lambda mask: seen["linear"].append(mask), mask)
        return mask * z, mask * z_dot

    def f(params, z, x):
        mask = dropout_mask(params["key"], 0.5, z.shape, kind="full", dtype=z.dtype)
        return jnp.tanh(masked(mask, z @ params["w"]) + x)

    return f


@pytest.mark.slow
def test_all_evaluations_of_a_solve_and_its_gradient_see_one_mask():
    rng = np.random.default_rng(0)
    seen = {"forward": [], "linear": []}
    f = recorded(seen)
    w = jnp.asarray(0.4 * rng.normal(size=(6, 6)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(3, 6)), jnp.float32)
    masks = []
    for step in range(3):
        key = jax.random.fold_in(KEY, step)
        seen["forward"].clear()
        seen["linear"].clear()

        def loss(w, key=key):
            params = {"w": w, "key": key}
            z = deq_fixed_point(f, params, x, solver=Anderson(tol=1e-5, max_iter=50))
            return (z**2).sum()

        jax.block_until_ready(jax.value_and_grad(loss)(w))
        jax.effects_barrier()
        expected = np.asarray(dropout_mask(key, 0.5, (3, 6)))
        assert len(seen["forward"]) >= 3
        assert len(seen["linear"]) >= 1
        for mask in (*seen["forward"], *seen["linear"]):
            np.testing.assert_array_equal(mask, expected)
        masks.append(expected)
    assert (masks[0] != masks[1]).any()
    assert (masks[1] != masks[2]).any()


class _Cell(nnx.Module):
    def __init__(self, seen, rngs):
        self.seen = seen
        self.linear = nnx.Linear(6, 6, kernel_init=nnx.initializers.normal(0.1), rngs=rngs)
        self.dropout = nnx.Dropout(0.5, broadcast_dims=broadcast_axes("token", 3), rngs=rngs)

    def __call__(self, z, x):
        kept = self.dropout(jnp.ones_like(z))
        jax.debug.callback(self.seen.masks.append, kept)
        return jnp.tanh(kept * self.linear(z) + x)


class _Seen:
    def __init__(self):
        self.masks = []

    def __hash__(self):
        return 0

    def __eq__(self, other):
        return isinstance(other, _Seen)


@pytest.mark.slow
def test_flax_dropout_in_a_cell_is_variational():
    seen = _Seen()
    layer = DEQ(_Cell(seen, nnx.Rngs(0, dropout=1)), solver=Anderson(tol=1e-5))
    x = jax.random.normal(KEY, (2, 4, 6))
    kept = []
    for _ in range(2):
        seen.masks.clear()

        def loss(layer, x):
            return (layer(x) ** 2).sum()

        jax.block_until_ready(nnx.grad(loss, argnums=1)(layer, x))
        jax.effects_barrier()
        assert len(seen.masks) >= 3
        for mask in seen.masks:
            np.testing.assert_array_equal(mask, seen.masks[0])
            np.testing.assert_array_equal(mask, np.broadcast_to(mask[..., :1], mask.shape))
        kept.append(seen.masks[0])
    assert (kept[0] != kept[1]).any()
