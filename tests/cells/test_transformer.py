"""The Transformer cell: the formula, position by position; memory, decoding, dropout, gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Execution, Picard
from deq_jax.cells import KeyValues, Memory, SequenceInput, TransformerCell, extend_memory
from deq_jax.cells.attention import attention_mask, relative_shift, rotary_tables, rotate
from deq_jax.nnx import DEQ
from deq_jax.stability import WeightNorm
from tests.models.test_conv_deq import randomise
from tests.reference import implicit_gradient, relative_error

B, L, D, H, F = 2, 4, 8, 2, 6
SOLVER = Picard(tol=1e-12, max_iter=900)
MODERN = {"positions": "rotary", "norm": "rms", "norm_order": "pre", "feed_forward": "swiglu"}


def normal(*shape, seed=0, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def make(scale=0.12, dtype=jnp.float64, **options):
    """A cell of random parameters. What comes in counts most, or there are several equilibria."""
    cell = TransformerCell(D, H, F, **options, param_dtype=dtype, rngs=nnx.Rngs(0, dropout=1))
    randomise(cell, 0, scale)
    cell.injection.kernel[...] *= 0.6 / scale
    cell.output.kernel[...] *= 0.5 / scale
    return cell


def evaluate(cell, z, x):
    definition, state = nnx.split(cell)

    @jax.jit
    def call(state, z, x):
        cell = nnx.merge(definition, state)
        return cell(z, cell.inject(x))

    return call(state, z, x)


def solve(layer, x):
    """The equilibrium and what it took; the state of the layer stays as it is."""
    definition, state = nnx.split(layer)

    @jax.jit
    def call(state, x):
        layer = nnx.merge(definition, state, copy=True)
        return layer(x, return_stats=True)

    z, stats = call(state, x)
    assert stats.converged.all()
    return z, stats


def formula(
    weights, z, x, *, positions="relative", norm="layer", norm_order="post", feed_forward="relu",
    window=None, masks=None, xp=np,
):  # fmt: skip
    """The cell, one query and one head at a time; `masks` are those of dropout."""
    masks = masks or {}
    kernel = {name: value["kernel"] for name, value in weights.items() if isinstance(value, dict)}

    def normalised(y):
        if norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        return y / xp.sqrt((y**2).mean(-1, keepdims=True) + 1e-5)

    def angles(position, channels):
        return position / 10000 ** (2 * np.arange(channels // 2) / channels)

    def rotated(vector, position):
        pairs = vector[:, : D // H // 2] + 1j * vector[:, D // H // 2 :]
        pairs = pairs * np.exp(1j * angles(position, D // H))
        return xp.concatenate([pairs.real, pairs.imag], -1)

    state, embedding = z, x.embedding
    memory = 0 if x.memory is None else x.memory.state.shape[1]
    if memory:
        state = xp.concatenate([x.memory.state, state], 1)
        embedding = xp.concatenate([x.memory.embedding, embedding], 1)
    inner = normalised(state) if norm_order == "pre" else state
    # The parameters as the matrices that the formula has.
    bias, shape = weights["injection"]["bias"], {"contract": (F, D)}
    kernel = {name: value.reshape(*shape.get(name, (D, -1))) for name, value in kernel.items()}
    qkv = inner @ kernel["qkv"] + embedding @ kernel["injection"] + bias

    attended = []
    for i, h in itertools.product(range(z.shape[1]), range(H)):
        at = memory + i
        q, k, v = (
            qkv[..., part * D + h * D // H : part * D + (h + 1) * D // H] for part in range(3)
        )
        seen = range(0 if window is None else max(0, at - window + 1), at + 1)
        scores = []
        for j in seen:
            if positions == "relative":
                wave = np.concatenate([np.sin(angles(at - j, D)), np.cos(angles(at - j, D))])
                r = ((wave * masks.get("position", 1)) @ kernel["position"]).reshape(H, -1)[h]
                score = ((q[:, at] + weights["content_bias"][h]) * k[:, j]).sum(-1)
                score = score + ((q[:, at] + weights["position_bias"][h]) * r).sum(-1)
            elif positions == "rotary":
                score = (rotated(q[:, at], at) * rotated(k[:, j], j)).sum(-1)
            else:
                score = (q[:, at] * k[:, j]).sum(-1)
            scores.append(score / np.sqrt(D // H))
        exponentials = [xp.exp(score) for score in scores]
        dropped = masks.get("attention", np.ones((len(z), H, z.shape[1], memory + z.shape[1])))
        attended.append(
            sum(
                (dropped[:, h, i, j] * e / sum(exponentials))[:, None] * v[:, j]
                for j, e in zip(seen, exponentials, strict=True)
            )
        )
    attended = xp.stack(attended, 1).reshape(z.shape)
    attended = attended @ kernel["output"] + weights["output"]["bias"]
    s = weights.get("residual_scale", (1, 1))
    y = normalised(z + s[0] * attended * masks.get("output", 1))
    hidden = y @ kernel["expand"]
    if feed_forward == "swiglu":
        hidden = hidden[..., :F] / (1 + xp.exp(-hidden[..., :F])) * hidden[..., F:]
        out = hidden * masks.get("expand", 1) @ kernel["contract"]
    else:
        hidden = hidden + weights["expand"]["bias"]
        if feed_forward == "relu":
            hidden = xp.maximum(hidden, 0)
        else:  # x Φ(x)
            erf = np.vectorize(__import__("math").erf)
            hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
        out = hidden * masks.get("expand", 1) @ kernel["contract"] + weights["contract"]["bias"]
    y = y + s[1] * out * masks.get("contract", 1)
    return normalised(y) if norm_order == "post" else y


def numbers(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def weights_of(cell):
    return numbers(nnx.to_pure_dict(nnx.state(cell, nnx.Param)))


def sequence(length=L, memory=0, seed=0, dtype=jnp.float64):
    kept = None
    if memory:
        kept = Memory(*(normal(B, memory, D, seed=seed + n, dtype=dtype) for n in (5, 6)))
    return SequenceInput(normal(B, length, D, seed=seed, dtype=dtype), kept)


def residual(cell, z, x, options, weights=None, **more):
    """How far z is from the equilibrium, by the formula."""
    weights = weights_of(cell) if weights is None else numbers(weights)
    value = formula(weights, numbers(z), numbers(x), **options, **more)
    return relative_error(value, numbers(z))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_order": "pre", "window": 3},
        {"positions": "rotary", "feed_forward": "gelu", "window": 2},
        {"positions": "none", "norm": "rms"},
        MODERN,
    ],
)
@pytest.mark.parametrize("memory", [0, 3])
def test_the_cell_is_the_formula(options, memory, x64):
    cell = make(0.6, **options, learn_residual_scale=memory > 0, residual_scale=0.7)
    if not memory:
        cell.residual_scale = 1.0
    x, z = sequence(memory=memory), normal(B, L, D, seed=3)
    expected = formula(weights_of(cell), numbers(z), numbers(x), **options)
    got = evaluate(cell, z, x)
    assert got.dtype == jnp.float64
    assert relative_error(got, expected) < 1e-12


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.slow
def test_lower_precision(dtype, options):
    cell = make(0.4, dtype=dtype, **options)
    x, z = sequence(memory=2, dtype=dtype), normal(B, L, D, seed=3, dtype=dtype)
    got = evaluate(cell, z, x)
    assert got.dtype == dtype
    expected = formula(weights_of(cell), numbers(z), numbers(x), **options)
    assert relative_error(got, expected) < (1e-6 if dtype == jnp.float32 else 2e-2)


def test_a_fixed_residual_scale():
    cell, x = make(dtype=jnp.float32), sequence(dtype=jnp.float32)
    z = normal(B, L, D, seed=3, dtype=jnp.float32)
    cell.residual_scale = 0.3
    weights = weights_of(cell)
    expected = formula(weights | {"residual_scale": (0.3, 0.3)}, numbers(z), numbers(x))
    assert relative_error(evaluate(cell, z, x), expected) < 1e-6
    learned = TransformerCell(
        D, H, F, residual_scale=0.3, learn_residual_scale=True, rngs=nnx.Rngs(0)
    )
    np.testing.assert_allclose(learned.residual_scale[...], [0.3, 0.3])


def test_relative_shift_by_its_definition():
    for queries, keys in ((1, 1), (1, 4), (3, 3), (3, 5)):
        scores = np.random.default_rng(0).normal(size=(2, queries, keys))
        shifted = np.asarray(relative_shift(jnp.asarray(scores, jnp.float32)))
        for i, j in itertools.product(range(queries), range(keys)):
            distance = keys - queries + i - j
            if distance >= 0:
                expected = scores[:, i, keys - 1 - distance].astype(np.float32)
                np.testing.assert_array_equal(shifted[:, i, j], expected)


def test_mask_by_its_definition():
    length = np.array([0, 2, 3])
    for window in (None, 1, 3):
        mask = np.asarray(attention_mask(4, 7, window, jnp.asarray(length, jnp.int32)))
        for b, i, j in itertools.product(range(3), range(4), range(7)):
            seen = j <= 3 + i and (window is None or 3 + i - j < window)
            assert mask[b, i, j] == (seen and j >= 3 - length[b])


def test_rotated_products_depend_on_differences():
    q, k = (normal(1, 1, 1, D, seed=n, dtype=jnp.float32) for n in (1, 2))
    tables = rotary_tables(9, D, jnp.float32)[None]

    def product(i, j):
        return np.vdot(rotate(q, tables[:, i : i + 1]), rotate(k, tables[:, j : j + 1]))

    for shift in (1, 4):
        np.testing.assert_allclose(product(4, 1), product(4 + shift, 1 + shift), rtol=1e-4)
    assert abs(product(4, 1) - product(4, 2)) > 1e-2
    np.testing.assert_allclose(product(0, 0), np.vdot(q, k), rtol=1e-5)


@pytest.mark.parametrize("options", [{}, MODERN, {"window": 2}])
@pytest.mark.slow
def test_the_future_and_what_is_outside_never_count(options):
    cell, x = make(0.6, dtype=jnp.float32, **options), sequence(6, 3, dtype=jnp.float32)
    z = normal(B, 6, D, seed=3, dtype=jnp.float32)
    old = evaluate(cell, z, x)
    changed = SequenceInput(x.embedding.at[:, 4].add(9), x.memory)
    new = evaluate(cell, z.at[:, 4].add(9), changed)
    np.testing.assert_array_equal(new[:, :4], old[:, :4])
    assert (np.abs(new - old)[:, 4:].max((0, 2)) > 1e-4).sum() == 2

    # Memory that is not there may hold anything; so may what a window leaves out.
    short = x.memory._replace(length=jnp.array([1, 3], jnp.int32))
    at = jnp.array([0, 0] if "window" not in options else [1, 1])
    other = short._replace(state=short.state.at[jnp.arange(B), at].add(9))
    old, new = (evaluate(cell, z, x._replace(memory=m)) for m in (short, other))
    np.testing.assert_array_equal(new[0], old[0])
    same = bool((new[1] == old[1]).all())
    assert same == ("window" in options)


@pytest.mark.parametrize("options", [{}, {"norm_order": "pre", "window": 3}, MODERN])
@pytest.mark.slow
def test_segments_and_tokens_are_the_whole(options, x64):
    cell, x = make(**options), sequence(6)
    layer = DEQ(cell, solver=SOLVER)
    whole, _ = solve(layer, x)
    assert residual(cell, whole, x, options) < 1e-10

    # Segments, the second with the state and embedding of the first.
    first, second = x.embedding[:, :4], x.embedding[:, 4:]
    head, _ = solve(layer, SequenceInput(first))
    tail, _ = solve(layer, SequenceInput(second, Memory(head, first)))
    assert relative_error(jnp.concatenate([head, tail], 1), whole) < 1e-9

    # Tokens, with a cache of constant size, from anywhere, in one compiled function.
    @jax.jit
    def step(embedding, cache):
        z = layer(SequenceInput(embedding, cache), 0.1 * embedding)
        return z, extend_memory(cache, cell.key_values(Memory(z, embedding)), size)

    size = 2 if "window" in options else 5
    empty = jnp.zeros((B, size, H, D // H))
    cache, states = KeyValues(empty, empty, jnp.zeros(B, jnp.int32)), []
    for t in range(6):
        z, cache = step(x.embedding[:, t : t + 1], cache)
        states.append(z)
        assert (cache.length == min(t + 1, size)).all()
    assert relative_error(jnp.concatenate(states, 1), whole) < 1e-9
    assert step._cache_size() == 1


@pytest.mark.slow
def test_extended_memory_by_its_definition():
    x, y = sequence(2, 3, dtype=jnp.float32).memory, sequence(2, 2, 9, dtype=jnp.float32).memory
    for size in (1, 4, 5, 7):
        for length in (None, jnp.array([1, 3], jnp.int32)):
            got = extend_memory(x._replace(length=length), y, size)
            joined = np.concatenate([x.state, y.state], 1)
            for b in range(B):
                there = min(size, 2 + (3 if length is None else int(length[b])))
                assert got.length[b] == there
                np.testing.assert_array_equal(got.state[b, size - there :], joined[b, 5 - there :])
            assert got.state.shape == got.embedding.shape == (B, size, D)
    got = extend_memory(None, y, 3)
    np.testing.assert_array_equal(got.embedding[:, 1:], y.embedding)
    np.testing.assert_array_equal(got.length, [2, 2])
    with pytest.raises(ValueError, match="newer must have no length"):
        extend_memory(x, got, 3)
    with pytest.raises(ValueError, match="one kind, got Memory and KeyValues"):
        extend_memory(x, KeyValues(x.state, x.state), 3)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        extend_memory(x, y, 0)


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.slow
def test_dropout_has_one_mask_a_solve(options, x64):
    cell, x = make(dropout=0.4, attention_dropout=0.3, **options), sequence()
    layer = DEQ(cell, solver=SOLVER)

    def masks():
        one = nnx.merge(*nnx.split(cell), copy=True)
        shapes = {"output": (B, L, D), "expand": (B, L, F), "contract": (B, L, D),
                  "attention": (B, H, L, L)}  # fmt: skip
        if not options:
            shapes["position"] = (L, D)
        drawn = {
            name: numbers(getattr(one, f"{name}_dropout")(jnp.ones(shape)))
            for name, shape in shapes.items()
        }
        for name, mask in drawn.items():
            assert set(np.unique(mask.round(9))) == {
                0,
                round(1 / (0.7 if name[0] == "a" else 0.6), 9),
            }
        for name in set(drawn) - {"attention", "position"}:
            assert (drawn[name] == drawn[name][:, :1]).all()  # whole channels
        if "position" in drawn:
            assert (drawn["position"] == drawn["position"][:1]).all()
            drawn["position"] = drawn["position"][0]
        return drawn

    drawn = masks()
    z, _ = solve(layer, x)
    assert residual(cell, z, x, options, masks=drawn) < 1e-10
    assert residual(cell, z, x, options) > 1e-2
    layer.eval()
    assert residual(cell, solve(layer, x)[0], x, options) < 1e-10


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.slow
def test_weight_norm(options, x64):
    cell, x = make(**options), sequence(memory=2)
    layer = DEQ(cell, solver=Anderson(tol=1e-12, max_iter=200), normalization=WeightNorm())
    names = {"injection", "qkv", "output", "expand", "contract"}
    names |= set() if options else {"position"}
    assert set(layer.scale) == {f"{name}/kernel" for name in names}
    weights = weights_of(cell)
    for path, g in layer.scale.items():
        name = path.split("/")[0]
        g.set_value(g.get_value() * (1 + 0.15 * jnp.tanh(normal(*g.shape, seed=len(path)))))
        v = weights[name]["kernel"]
        inputs = (0, 1) if name == "output" else 0
        weights[name]["kernel"] = v * g.get_value() / jnp.sqrt((v**2).sum(inputs))
    z, _ = solve(layer, x)
    assert residual(cell, z, x, options, weights) < 1e-10
    assert residual(cell, z, x, options) > 1e-2


@pytest.mark.parametrize("options", [{}, MODERN])
@pytest.mark.slow
def test_gradients_are_those_of_the_implicit_function(options, x64):
    cell, x = make(0.3, **options, learn_residual_scale=True), sequence(3, 2)
    layer, cotangent = DEQ(cell, solver=SOLVER), normal(B, 3, D, seed=8)
    definition, state = nnx.split(layer)

    def loss(state, x):
        z = nnx.merge(definition, state)(x)
        return jnp.vdot(cotangent, z), z

    (by_state, by_x), z = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(state, x)

    def f(inputs, z):
        with jax.numpy_dtype_promotion("standard"):
            return formula(inputs[0], z, inputs[1], **options, xp=jnp)

    inputs = jax.tree.map(jnp.asarray, weights_of(cell)), x
    expected = implicit_gradient(f, inputs, z, cotangent)
    got = nnx.to_pure_dict(by_state)["cell"], by_x
    assert relative_error(got, expected) < 1e-8
    for leaf in jax.tree.leaves(got):
        assert np.abs(leaf).max() > 1e-8


@pytest.mark.parametrize("options", [{}, MODERN])
def test_every_leaf_of_the_injection_has_the_batch(options):
    cell, x = make(dtype=jnp.float32, **options), sequence(3, 2, dtype=jnp.float32)
    x = x._replace(memory=x.memory._replace(length=jnp.array([1, 2], jnp.int32)))
    shapes = nnx.eval_shape(lambda cell, x: cell.inject(x), cell, x)
    assert all(leaf.shape[0] == B for leaf in jax.tree.leaves(shapes))


@pytest.mark.slow
def test_samples_may_leave_the_solve():
    cell, x = make(dtype=jnp.float32), sequence(3, 2, dtype=jnp.float32)
    x = x._replace(memory=x.memory._replace(length=jnp.array([1, 2], jnp.int32)))
    plain, fewer = (
        solve(DEQ(cell, solver=Picard(tol=1e-5), execution=Execution(shrink_to=n)), x)[0]
        for n in (None, 1)
    )
    assert relative_error(fewer, plain) < 1e-5


@pytest.mark.parametrize("options", [{}, MODERN])
def test_half_precision_in_a_layer(options):
    cell, x = make(dtype=jnp.float32, **options), sequence(dtype=jnp.float32)
    half = Execution(cell_dtype=jnp.bfloat16)
    z, _ = solve(DEQ(cell, solver=Picard(tol=1e-2), execution=half), x)
    assert z.dtype == jnp.float32
    assert residual(cell, z, x, options) < 0.03


@pytest.mark.parametrize("options", [{}, {"norm_order": "pre"}, MODERN])
@pytest.mark.slow
def test_the_default_start_is_easily_solved(options):
    cell = TransformerCell(32, 4, 64, **options, rngs=nnx.Rngs(0))
    x = normal(3, 16, 32, dtype=jnp.float32)
    _, stats = solve(DEQ(cell, solver=Anderson(tol=1e-3)), x)
    assert stats.evaluations <= 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "features=8 must be a multiple of heads=3"),
        ({"features": 9, "heads": 3}, "relative positions need an even number, not 9"),
        ({"positions": "rotary", "heads": 8}, "rotary positions need an even number, not 1"),
        ({"positions": "absolute"}, "positions must be one of .*, got 'absolute'"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"norm_order": "both"}, "norm_order must be one of"),
        ({"feed_forward": "tanh"}, "feed_forward must be one of"),
        ({"hidden_features": 0}, "hidden_features must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"dropout": 1.5}, "dropout must be finite, >= 0 and <= 1, got 1.5"),
        ({"attention_dropout": -1}, "attention_dropout must be finite, >= 0 and <= 1"),
        ({"residual_scale": float("nan")}, "residual_scale must be finite"),
        ({"kernel_std": -0.1}, "kernel_std must be"),
        ({"injection_std": -0.1}, "injection_std must be"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TransformerCell(
            **{"features": D, "heads": H, "hidden_features": F} | options, rngs=nnx.Rngs(0)
        )


@pytest.mark.slow
def test_bad_arrays_are_named():
    cell, x = make(dtype=jnp.float32), sequence(memory=2, dtype=jnp.float32)
    state, embedding, _ = x.memory
    heads = jnp.zeros((B + 1, 2, H, D // H))
    for bad, message in (
        (x._replace(embedding=state[0]), r"embedding must be \[B, L, 8\], got \[2, 8\]"),
        (x._replace(memory=Memory(state[..., 1:], embedding)), r"memory.state must be \[B, L, 8\]"),
        (x._replace(memory=Memory(state, x.embedding)), r"memory.embedding must be \[B, 2, 8\]"),
        (x._replace(memory=KeyValues(heads, heads)), r"memory.key must be .*got \[3, 2, 2, 4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cell.inject(bad)
    with pytest.raises(ValueError, match=r"z must be \[2, 4, 8\], as `start` makes it"):
        cell(state, cell.inject(x))
