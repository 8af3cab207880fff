"""The TrellisNet cell: the formula, step by step; history, dropout, weight norm, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Execution, Picard
from deq_jax.cells import TrellisCell, TrellisHistory, TrellisInput, TrellisState
from deq_jax.nnx import DEQ
from deq_jax.stability import WeightNorm
from tests.cells.test_transformer import evaluate, numbers, solve, weights_of
from tests.models.test_conv_deq import randomise
from tests.reference import implicit_gradient, relative_error

B, L, E, H = 2, 5, 3, 4
SOLVER = Picard(tol=1e-12, max_iter=900)
SHAPES = [(2, 1), (3, 1), (2, 3), (3, 2)]  # taps, dilation


def normal(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(scale=0.4, taps=2, dilation=1, dtype=jnp.float64, **options):
    cell = TrellisCell(
        E, H, kernel_size=taps, dilation=dilation, param_dtype=dtype, **options,
        rngs=nnx.Rngs(0, dropout=1),
    )  # fmt: skip
    return randomise(cell, 0, scale)


def segment(length=L, reach=None, dtype=jnp.float64):
    history = None
    if reach:
        widths = {"h": H, "c": H, "x": E}
        history = TrellisHistory(
            **{name: normal(B, reach, w, seed=5 + w, dtype=dtype) for name, w in widths.items()}
        )
    return TrellisInput(normal(B, length, E, dtype=dtype), history)


def state(length=L, dtype=jnp.float64):
    return TrellisState(*(normal(B, length, H, seed=n, dtype=dtype) for n in (3, 4)))


def formula(weights, z, x, *, dilation=1, mask=1, xp=np):
    """The cell, one step and one tap at a time; `mask` is that of dropout."""
    taps = len(weights["input"]["kernel"])
    reach = (taps - 1) * dilation

    def at(now, before, t):
        if t >= 0:
            return now[:, t]
        return xp.zeros_like(now[:, 0]) if before is None else before[:, reach + t]

    def sigmoid(a):
        return 1 / (1 + xp.exp(-a))

    old_h, old_c, old_x = (None,) * 3 if x.history is None else x.history
    new_h, new_c = [], []
    for t in range(x.x.shape[1]):
        gates = weights["input"]["bias"]
        for j in range(taps):
            source = t - (taps - 1 - j) * dilation
            gates = gates + at(x.x, old_x, source) @ weights["input"]["kernel"][j]
            gates = gates + (at(z.h, old_h, source) * mask) @ weights["recurrent"]["kernel"][j]
        i, o, g, f = (gates[:, n * H : (n + 1) * H] for n in range(4))
        c = sigmoid(f) * at(z.c, old_c, t - dilation) + sigmoid(i) * xp.tanh(g)
        new_c.append(c)
        new_h.append(sigmoid(o) * xp.tanh(c))
    return TrellisState(xp.stack(new_h, 1), xp.stack(new_c, 1))


def residual(cell, z, x, weights=None, **options):
    """How far z is from the equilibrium, by the formula."""
    weights = weights_of(cell) if weights is None else numbers(weights)
    return relative_error(formula(weights, numbers(z), numbers(x), **options), numbers(z))


@pytest.mark.parametrize(("taps", "dilation"), SHAPES)
@pytest.mark.parametrize("length", [5, 1])
def test_the_cell_is_the_formula(taps, dilation, length, x64):
    cell = make(0.6, taps, dilation)
    for reach in (None, (taps - 1) * dilation):
        x, z = segment(length, reach), state(length)
        expected = formula(weights_of(cell), numbers(z), numbers(x), dilation=dilation)
        got = evaluate(cell, z, x)
        assert relative_error(got, expected) < 1e-12
        assert got.h.dtype == got.c.dtype == jnp.float64
    assert set(weights_of(cell)["recurrent"]) == {"kernel"}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_lower_precision(dtype):
    cell, x, z = make(dtype=dtype), segment(L, 1, dtype), state(dtype=dtype)
    got = evaluate(cell, z, x)
    expected = formula(weights_of(cell), numbers(z), numbers(x))
    assert {leaf.dtype for leaf in got} == {jnp.dtype(dtype)}
    assert relative_error(got, expected) < (1e-6 if dtype == jnp.float32 else 2e-2)


@pytest.mark.slow
def test_the_future_never_counts():
    cell, x, z = make(0.6, 3, 2, jnp.float32), segment(6, 4, jnp.float32), state(6, jnp.float32)
    old = evaluate(cell, z, x)
    later = jax.tree.map(lambda leaf: leaf.at[:, 3].add(9), z)
    new = evaluate(cell, later, x._replace(x=x.x.at[:, 3].add(9)))
    for a, b in zip(new, old, strict=True):
        np.testing.assert_array_equal(a[:, :3], b[:, :3])
        # Taps of dilation 2: steps 3 and 5 see step 3.
        changed = np.asarray(a != b).any((0, 2))[3:]
        assert changed.tolist() == [True, False, True]


@pytest.mark.parametrize(("taps", "dilation"), [(2, 1), (3, 2)])
@pytest.mark.slow
def test_segments_are_the_whole(taps, dilation, x64):
    cell, x = make(0.4, taps, dilation), segment(7, (taps - 1) * dilation)
    layer = DEQ(cell, solver=SOLVER)
    whole, _ = solve(layer, x)
    assert residual(cell, whole, x, dilation=dilation) < 1e-10

    # The second segment is shorter than the reach of the convolution, 4 steps, in one of the cases.
    history, states = x.history, []
    for part in (x.x[:, :3], x.x[:, 3:5], x.x[:, 5:]):
        piece = TrellisInput(part, history)
        states.append(solve(layer, piece)[0])
        history = cell.history(piece, states[-1])
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, 1), *states)
    assert relative_error(joined, whole) < 1e-9


@pytest.mark.slow
def test_dropout_has_one_mask_a_solve(x64):
    cell, x = make(dropout=0.5), segment(L, 1)
    layer = DEQ(cell, solver=SOLVER)

    def mask():
        one = nnx.merge(*nnx.split(cell), copy=True)
        drawn = np.asarray(one.dropout(jnp.ones((B, L + 1, H))))
        assert (drawn == drawn[:, :1]).all()  # whole channels
        assert set(np.unique(drawn)) == {0, 2}
        return drawn[:, 0]

    drawn = mask()
    z, _ = solve(layer, x)
    assert residual(cell, z, x, mask=drawn) < 1e-10
    assert residual(cell, z, x) > 1e-2
    layer.eval()
    assert residual(cell, solve(layer, x)[0], x) < 1e-10


def test_weight_norm(x64):
    cell, x = make(), segment()
    layer = DEQ(cell, solver=SOLVER, normalization=WeightNorm())
    assert {path: g.shape for path, g in layer.scale.items()} == {
        "input/kernel": (4 * H,),
        "recurrent/kernel": (4 * H,),
    }
    weights = weights_of(cell)
    for path, g in layer.scale.items():
        g.set_value(g.get_value() * (1.3 + 0.3 * jnp.tanh(normal(*g.shape, seed=len(path)))))
        v = weights[path.split("/")[0]]
        v["kernel"] = v["kernel"] * g.get_value() / jnp.sqrt((v["kernel"] ** 2).sum((0, 1)))
    z, _ = solve(layer, x)
    assert residual(cell, z, x, weights) < 1e-10
    assert residual(cell, z, x) > 1e-2


@pytest.mark.slow
def test_gradients_are_those_of_the_implicit_function(x64):
    cell, x = make(0.5, 2, 2), segment(3, 2)
    layer, cotangent = DEQ(cell, solver=SOLVER), state(3)
    definition, params = nnx.split(layer)

    def loss(params, x):
        z = nnx.merge(definition, params)(x)
        return jnp.vdot(cotangent.h, z.h) + jnp.vdot(cotangent.c, z.c), z

    (by_params, by_x), z = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, x)
    expected = implicit_gradient(
        lambda inputs, z: formula(inputs[0], z, inputs[1], dilation=2, xp=jnp),
        (jax.tree.map(jnp.asarray, weights_of(cell)), x), z, cotangent,
    )  # fmt: skip
    got = nnx.to_pure_dict(by_params)["cell"], by_x
    assert relative_error(got, expected) < 1e-8
    assert all(np.abs(leaf).max() > 1e-8 for leaf in jax.tree.leaves(got))


def test_in_a_layer_in_half_precision_and_with_samples_that_leave():
    x, cell = segment(L, 1, jnp.float32), make(dtype=jnp.float32)
    assert all(len(leaf) == B for leaf in jax.tree.leaves(cell.inject(x)))
    execution = Execution(shrink_to=1, cell_dtype=jnp.bfloat16)
    z, _ = solve(DEQ(cell, solver=Picard(tol=1e-2), execution=execution), x)
    assert {leaf.dtype for leaf in z} == {jnp.dtype(jnp.float32)}
    assert residual(cell, z, x) < 0.03


@pytest.mark.slow
def test_the_default_start_is_easily_solved():
    cell = TrellisCell(8, 32, rngs=nnx.Rngs(0))
    x = normal(3, 32, 8, dtype=jnp.float32)
    _, stats = solve(DEQ(cell, solver=Anderson(tol=1e-3)), x)
    assert stats.evaluations <= 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_features": 0}, "in_features must be at least 1, got 0"),
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"kernel_size": 1}, "kernel_size must be at least 2, got 1"),
        ({"dilation": 0}, "dilation must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be finite, >= 0 and <= 1, got 1.5"),
        ({"kernel_std": -1}, "kernel_std must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrellisCell(**{"in_features": E, "features": H} | options, rngs=nnx.Rngs(0))


def test_bad_arrays_are_named():
    cell, x = make(taps=3, dtype=jnp.float32), segment(L, 2, jnp.float32)
    short = x.history._replace(c=x.history.c[:, 1:])
    for bad, message in (
        (x.x[0], r"x must be \[B, L, 3\], got \[5, 3\]"),
        (x._replace(history=short), r"history.c must be \[B, 2, 4\], got \[2, 1, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cell.inject(bad)
    with pytest.raises(ValueError, match=r"state.h must be \[B, 5, 4\], got \[2, 4, 4\]"):
        cell.history(x, state(4, jnp.float32))
