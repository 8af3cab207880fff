"""MDEQ: counts, the network around the cell, shapes, errors, float64, and what trains it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import BackwardProbe, Control, Picard
from deq_jax.cells.multiscale import Lipschitz
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.mdeq import LARGE, MDEQ, TINY
from deq_jax.stability import JacobianRegularization, one_application
from tests.cells.formulas import batch_norm, conv, randomise, relu, weights_of
from tests.cells.test_multiscale import formula as cell_formula
from tests.reference import relative_error

SMALL = {"image_shape": (8, 4, 2), "num_classes": 3, "channels": (4, 4), "head_channels": (2, 1),
         "features": 6, "groups": 2, "expansion": 2}  # fmt: skip


def abstract(**options):
    return nnx.eval_shape(lambda: MDEQ(**options, rngs=nnx.Rngs(0, dropout=1)))


def make(**options):
    """A small network with random weights, made without compiling its initialisers."""
    model = randomise(abstract(**SMALL | options), np.random.default_rng(0), 0.5)
    statistics = jax.tree.map(
        lambda leaf: jnp.full(leaf.shape, 1.0, leaf.dtype), nnx.state(model, nnx.BatchStat)
    )
    nnx.update(model, statistics)
    return model


def images(batch=3, dtype=np.float32):
    return np.random.default_rng(1).uniform(size=(batch, 8, 4, 2)).astype(dtype)


@pytest.mark.parametrize(
    ("options", "cell", "head", "stem"),
    [(TINY, 111_696, 41_266, 5_928), (LARGE, 8_715_232, 2_370_910, 11_296)],
)
@pytest.mark.slow
def test_parameters_of_the_published_networks(options, cell, head, stem):
    """With the g of the weight normalisation, a number for each output channel."""
    model = abstract(**options)
    assert count_parameters(model.core) == cell
    assert count_parameters(model.head) == head
    assert count_parameters(model.stem) == stem
    assert count_parameters(model) == cell + head + stem
    scales = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model.core.scale)))
    assert scales == sum((5 + 1 + 1) * channels for channels in options["channels"])


# The network in NumPy.


def conv_norm(weights, x, stride=1):
    y = conv(x, weights["conv"]["kernel"], stride)
    if "bias" in weights["conv"]:
        y = y + weights["conv"]["bias"]
    return batch_norm(y, weights.get("norm"))


def stem_formula(weights, x, strides=(1, 1)):
    for i, stride in enumerate(strides):
        x = relu(conv_norm(weights[i], x, stride))
    return x


def head_formula(weights, z):
    def bottleneck(weights, x):
        y = x
        for name in ("reduce", "transform", "expand"):
            y = relu(y) if name != "reduce" else y
            y = conv_norm(weights[name], y)
        return relu(y + (conv_norm(weights["shortcut"], x) if "shortcut" in weights else x))

    y = bottleneck(weights["bottlenecks"][0], z[0])
    for i, leaf in enumerate(z[1:]):
        down = relu(conv_norm(weights["descents"][i], y, 2))
        y = bottleneck(weights["bottlenecks"][i + 1], leaf) + down
    y = relu(conv_norm(weights["last"], y)).mean((1, 2))
    return y @ weights["classifier"]["kernel"] + weights["classifier"]["bias"]


@pytest.mark.slow
def test_network_is_the_formula_in_float64(x64):
    """From images to logits, with batch statistics; one shortcut of the head is the identity."""
    solver = Picard(tol=1e-13, max_iter=60)
    options = {"lipschitz": Lipschitz(), "normalization": None, "solver": solver}
    model, batch = make(param_dtype=jnp.float64, **options), images(dtype=np.float64)
    definition, state = nnx.split(model)

    @jax.jit
    def run(state, batch):
        model = nnx.merge(definition, state, copy=True)
        return model(batch, return_stats=True), nnx.state(model, nnx.BatchStat)

    (logits, stats), statistics = run(state, batch)
    assert stats.converged.all()
    assert logits.dtype == jnp.float64
    weights = weights_of(model)
    x = stem_formula(weights["stem"], batch)
    z = [np.zeros(leaf.shape) for leaf in model.zeros(x)]
    for _ in range(60):
        z = cell_formula(weights["core"]["cell"], z, x, lipschitz=Lipschitz())
    assert "shortcut" not in weights["head"]["bottlenecks"][1]
    assert relative_error(logits, head_formula(weights["head"], z)) < 1e-10
    first = conv(batch, weights["stem"][0]["conv"]["kernel"])
    norm = nnx.to_pure_dict(statistics)["stem"][0]["norm"]
    assert relative_error(norm["mean"], 0.9 + 0.1 * first.mean((0, 1, 2))) < 1e-12


@pytest.mark.slow
def test_shapes_with_downsamplings_and_three_branches():
    options = {"channels": (4, 2, 6), "head_channels": (1, 2, 3), "downsamplings": 3}
    model = make(**options, image_shape=(64, 32, 2))
    assert len(model.stem) == 4  # the last is the 1x1 convolution of the injection

    definition, state = nnx.split(model)

    def shapes(batch):
        model = nnx.merge(definition, state, copy=True)
        injection = model.injection(batch)
        return model.start(injection), model(batch)

    state, logits = jax.eval_shape(shapes, jnp.zeros((5, 64, 32, 2)))
    assert [leaf.shape for leaf in state] == [(5, 8, 4, 4), (5, 4, 2, 2), (5, 2, 1, 6)]
    assert logits.shape == (5, 3)


@pytest.mark.slow
def test_a_training_step_traces_with_all_that_the_script_asks_for():
    """Tuples of states go through everything: states on the way, budgets, penalties, reports."""
    definition, params, rest = nnx.split(make(), nnx.Param, ...)
    penalty = JacobianRegularization(weight=0.1)

    def loss(params, probe, batch):
        model = nnx.merge(definition, params, rest, copy=True)
        injection = model.injection(batch)
        f, weights, x = model.core.equation(injection)
        start = one_application(f, weights, x, model.zeros(injection))
        z, stats, samples = model.core(
            injection,
            start,
            return_stats=True,
            backward_probe=probe,
            sample_at=(2,),
            control=Control(budget=jnp.int32(3)),
        )
        extra = penalty(f, weights, z, x, key=jax.random.key(0), step=0)
        return (model.classify(z) + model.classify(samples[0])).sum() + extra, stats

    probe = BackwardProbe.zeros(3)
    step = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (_, stats), (gradient, report) = jax.eval_shape(step, params, probe, images())
    assert stats.residual.shape == (3,)
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    assert report.residual.shape == (3,)


@pytest.mark.slow
def test_projection_of_the_parameters():
    plain = make()
    params = nnx.state(plain, nnx.Param)
    assert plain.project(params) is params

    model = make(lipschitz=Lipschitz(), normalization=None)
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: 40 * leaf, params)
    same = jax.eval_shape(model.project, params)
    assert jax.tree.structure(same) == jax.tree.structure(params)

    @jax.jit
    def project(params):
        def bound(params):
            return nnx.merge(definition, params, rest, copy=True).lipschitz_bound()

        projected = model.project(params)
        return projected, bound(params), bound(projected)

    before = nnx.as_pure(params)
    after, large, small = project(before)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert small < 1 < large
    jax.tree.map(np.testing.assert_array_equal, before["stem"], after["stem"])
    jax.tree.map(np.testing.assert_array_equal, before["head"], after["head"])
    scale = after["core"]["cell"]["blocks"][0]["norm1"]["scale"]
    np.testing.assert_array_equal(np.abs(scale), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_shape": (7, 4, 2)}, r"image_shape=\(7, 4, 2\) must be multiples of 2"),
        ({"downsamplings": 2}, "must be multiples of 8, for 2 branches and 2 downsamplings"),
        ({"head_channels": (2,)}, "must name a number for each branch"),
        ({"lipschitz": Lipschitz()}, "pass normalization=None"),
        ({"downsamplings": -1}, "downsamplings must be an integer >= 0, got -1"),
        ({"features": 0}, "features must be at least 1, got 0"),
        ({"head_channels": (2, 0)}, r"each of head_channels=\(2, 0\) must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MDEQ(rngs=nnx.Rngs(0), **SMALL | options)


def test_bad_images_are_named():
    model = nnx.eval_shape(lambda: MDEQ(**SMALL | {"image_shape": [8, 4, 2]}, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"\[B, 8, 4, 2\], got \[3, 4, 8, 2\]"):
        model(jnp.zeros((3, 4, 8, 2)))
    with pytest.raises(TypeError, match=r"images must be floating, .* got int32"):
        model(jnp.zeros((3, 8, 4, 2), jnp.int32))
