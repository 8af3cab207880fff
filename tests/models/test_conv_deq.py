"""The tutorial's network and its controls: counts, the equation, gradients, batch statistics."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from deq_jax import Anderson, BackwardProbe, Picard
from deq_jax.cells.resnet import ResNetCell
from deq_jax.models.conv_deq import (
    ConvDEQ,
    ExplicitConvNet,
    WeightTiedConvNet,
    count_parameters,
)
from tests.reference import relative_error

SMALL = {"image_shape": (6, 4, 2), "num_classes": 3, "channels": 8, "inner_channels": 12,
         "groups": 4, "pool": 2}  # fmt: skip
NETWORKS = {
    "deq": lambda **options: ConvDEQ(**options, rngs=nnx.Rngs(0)),
    "tied": lambda **options: WeightTiedConvNet(depth=3, **options, rngs=nnx.Rngs(0)),
    "explicit": lambda **options: ExplicitConvNet(depth=3, **options, rngs=nnx.Rngs(0)),
}


def images(batch=3, shape=SMALL["image_shape"], seed=0):
    values = np.random.default_rng(seed).uniform(size=(batch, *shape))
    return jnp.asarray(values, jnp.float32)


def randomise(model, seed=0, kernel_scale=0.03):
    """Gives every param a random value, so that scales and biases count too.

    With small kernels the cell contracts.
    """
    state = nnx.state(model, nnx.Param)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        scale = kernel_scale if "kernel" in name else 0.15
        offset = 1.0 if "scale" in name else 0.0
        return jnp.asarray(offset + scale * rng.normal(size=leaf.shape), leaf.dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, state))
    return model


@pytest.mark.parametrize("name", ["deq", "tied"])
def test_parameters_of_the_cifar_networks(name):
    model = nnx.eval_shape(lambda: NETWORKS[name]())
    assert count_parameters(model) == 64_842


@pytest.mark.parametrize("depth", [1, 3])
def test_parameters_of_the_explicit_network(depth):
    def stem_and_head(colours, classes, channels, features):
        return 9 * colours * channels + channels + 4 * channels + features * classes + classes

    def cell(channels, inner):
        return 2 * 9 * channels * inner + 2 * inner + 4 * channels

    cifar = nnx.eval_shape(lambda: ExplicitConvNet(depth=depth, rngs=nnx.Rngs(0)))
    assert count_parameters(cifar) == 9_226 + 55_616 * depth
    assert count_parameters(cifar) == stem_and_head(3, 10, 48, 768) + depth * cell(48, 64)
    small = ExplicitConvNet(depth=depth, rngs=nnx.Rngs(0), **SMALL)
    assert count_parameters(small) == stem_and_head(2, 3, 8, 3 * 2 * 8) + depth * cell(8, 12)
    # Cells of their own: no kernel is shared.
    kernels = [np.asarray(cell.conv1.kernel[...]) for cell in small.cells]
    assert all((kernels[0] != other).any() for other in kernels[1:])


# The formulas, written in plain jax.numpy in float64.


def group_norm(x, weights, groups):
    batch, height, width, channels = x.shape
    grouped = x.reshape(batch, height, width, groups, channels // groups)
    mean = grouped.mean((1, 2, 4), keepdims=True)
    variance = ((grouped - mean) ** 2).mean((1, 2, 4), keepdims=True)
    normal = ((grouped - mean) / jnp.sqrt(variance + 1e-5)).reshape(x.shape)
    return normal * weights["scale"] + weights["bias"]


def conv(x, kernel):
    return lax.conv(x.transpose(0, 3, 1, 2), kernel.transpose(3, 2, 0, 1), (1, 1), "SAME") \
        .transpose(0, 2, 3, 1)  # fmt: skip


@functools.partial(jax.jit, static_argnums=3)
def cell_formula(weights, z, x, groups):
    y = group_norm(jnp.maximum(conv(z, weights["conv1"]["kernel"]), 0), weights["norm1"], groups)
    branch = group_norm(x + conv(y, weights["conv2"]["kernel"]), weights["norm2"], groups)
    return group_norm(jnp.maximum(z + branch, 0), weights["norm3"], groups)


def batch_norm(x, weights, statistics=None):
    mean, variance = statistics or (x.mean((0, 1, 2)), x.var((0, 1, 2)))
    return (x - mean) / jnp.sqrt(variance + 1e-5) * weights["scale"] + weights["bias"]


def injection_formula(weights, images):
    stem = conv(images, weights["stem"]["kernel"]) + weights["stem"]["bias"]
    return batch_norm(stem, weights["norm_in"])


def logits_formula(weights, z):
    z = batch_norm(z, weights["norm_out"])
    batch, height, width, channels = z.shape
    pooled = z.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    return pooled.reshape(batch, -1) @ weights["head"]["kernel"] + weights["head"]["bias"]


def weights_of(model):
    """Params as nested dictionaries of float64 arrays."""
    pure = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), pure)


def wide(array):
    return jnp.asarray(np.asarray(array), jnp.float64)


@pytest.mark.slow
def test_residual_cell_is_the_formula(x64):
    cell = randomise(ResNetCell(6, 10, groups=2, rngs=nnx.Rngs(0)), kernel_scale=0.5)
    z, x = images(2, (5, 4, 6)), images(2, (5, 4, 6), seed=1)
    assert relative_error(cell(z, x), cell_formula(weights_of(cell), wide(z), wide(x), 2)) < 1e-6


@pytest.mark.parametrize("name", ["tied", "explicit"])
@pytest.mark.slow
def test_explicit_networks_are_the_formula(x64, name):
    model = randomise(NETWORKS[name](**SMALL))
    weights, batch = weights_of(model), images()
    x = injection_formula(weights, wide(batch))
    z = jnp.zeros_like(x)
    for k in range(3):
        z = cell_formula(weights["cell"] if name == "tied" else weights["cells"][k], z, x, 4)
    assert relative_error(model(batch), logits_formula(weights, z)) < 1e-5


@pytest.mark.slow
def test_deq_is_the_formula_at_its_equilibrium(x64):
    model = randomise(ConvDEQ(solver=Picard(tol=1e-6, max_iter=300), rngs=nnx.Rngs(0), **SMALL))
    weights, batch = weights_of(model), images()
    logits, stats = model(batch, return_stats=True)
    assert stats.converged.all()
    x = injection_formula(weights, wide(batch))
    step = jax.jit(lambda z: cell_formula(weights["core"]["cell"], z, x, 4))
    z = jnp.zeros_like(x)
    for _ in range(300):
        z = step(z)
    assert relative_error(logits, logits_formula(weights, z)) < 1e-4


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_the_layer_solves_the_equation_to_its_tolerance(x64, tol):
    model = randomise(ConvDEQ(solver=Anderson(tol=tol, max_iter=60), rngs=nnx.Rngs(0), **SMALL))
    x = 6 * images(3, (6, 4, 8)) - 3
    z, stats = model.core(x, return_stats=True)
    z, cell = wide(z), weights_of(model.core.cell)
    fz = np.asarray(cell_formula(cell, z, wide(x), 4)).reshape(3, -1)
    residual = np.linalg.norm(fz - np.asarray(z).reshape(3, -1), axis=1)
    residual /= np.linalg.norm(fz, axis=1)
    assert stats.converged.all()
    assert (residual < 1.01 * tol).all()
    np.testing.assert_allclose(stats.residual, residual, rtol=0.02)
    assert stats.evaluations > 2


@pytest.mark.slow
def test_tied_network_of_large_depth_approaches_the_deq():
    deq = randomise(ConvDEQ(solver=Anderson(tol=1e-6, max_iter=100), rngs=nnx.Rngs(0), **SMALL))
    expected = deq(images())  # in training mode: statistics of the batch
    errors = []
    for depth in (2, 8, 80):
        tied = WeightTiedConvNet(depth=depth, rngs=nnx.Rngs(1), **SMALL)
        state = nnx.to_pure_dict(nnx.state(deq, nnx.Param))
        state["cell"] = state.pop("core")["cell"]
        tied_state = nnx.state(tied, nnx.Param)
        nnx.replace_by_pure_dict(tied_state, state)
        nnx.update(tied, tied_state)
        errors.append(relative_error(tied(images()), expected))
    assert errors[0] > 1e-3
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 2e-5


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.slow
def test_gradients_and_batch_statistics(name):
    model, batch = randomise(NETWORKS[name](**SMALL)), images(5)
    labels = jnp.array([0, 1, 2, 0, 1])
    definition, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def train(params, rest):
        def loss(params):
            model = nnx.merge(definition, params, rest, copy=True)
            chosen = jnp.take_along_axis(jax.nn.log_softmax(model(batch)), labels[:, None], 1)
            return -chosen.mean(), nnx.state(model, nnx.Not(nnx.Param))

        return jax.grad(loss, has_aux=True)(params)

    gradients, after = train(params, rest)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
        name = jax.tree_util.keystr(path)
        # The first cell's first kernel is applied to z = 0; some biases a norm takes out again.
        if "kernel" in name and not name.startswith("['cells'][0]['conv1']"):
            assert np.abs(leaf).max() > 1e-5, path

    weights = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    stem = np.asarray(conv(batch, weights["stem"]["kernel"]) + weights["stem"]["bias"])
    mean, variance = stem.mean((0, 1, 2)), stem.var((0, 1, 2))
    got = nnx.to_pure_dict(after)["norm_in"]
    np.testing.assert_allclose(got["mean"], 0.1 * mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["var"], 0.9 + 0.1 * variance, rtol=1e-4)
    assert np.abs(nnx.to_pure_dict(after)["norm_out"]["mean"]).max() > 1e-4


@pytest.mark.slow
def test_evaluation_uses_and_keeps_the_running_statistics():
    model, batch = randomise(ConvDEQ(rngs=nnx.Rngs(0), **SMALL)), images(5)
    model(batch)
    model.eval()
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    together = model(batch)
    # In evaluation mode a sample's answer does not depend on its batch mates.
    assert relative_error(model(batch[:2]), together[:2]) < 1e-5
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    model.train()
    assert relative_error(model(batch[:2]), together[:2]) > 1e-2


@pytest.mark.slow
def test_probe_reports_the_backward_solve():
    definition, state = nnx.split(randomise(ConvDEQ(rngs=nnx.Rngs(0), **SMALL)))
    batch = images(4)

    def loss(probe):
        model = nnx.merge(definition, state, copy=True)
        return (model(batch, backward_probe=probe) ** 2).sum()

    report = jax.jit(jax.grad(loss))(BackwardProbe.zeros(4))
    assert (report.residual > 0).all()
    assert (report.residual <= 1e-2).all()
    assert 1 < report.evaluations <= 25


@pytest.mark.parametrize("network", [ConvDEQ, WeightTiedConvNet, ExplicitConvNet])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": 4}, r"pool=4 must divide the image's 6x4"),
        ({"groups": 3}, r"channels=8 must be a multiple of groups=3"),
        ({"inner_channels": 10}, r"inner_channels=10 must be a multiple of groups=4"),
        ({"pool": 0}, "pool must be at least 1, got 0"),
    ],
)
def test_bad_shapes_are_named(network, options, message):
    with pytest.raises(ValueError, match=message):
        network(rngs=nnx.Rngs(0), **SMALL | options)


@pytest.mark.parametrize("name", NETWORKS)
def test_bad_images_are_named(name):
    with pytest.raises(ValueError, match=r"\[B, 6, 4, 2\], got \[3, 4, 6, 2\]"):
        NETWORKS[name](**SMALL | {"image_shape": [6, 4, 2]})(images(3, (4, 6, 2)))
    with pytest.raises(TypeError, match=r"images must be floating, .* got uint8"):
        NETWORKS[name](**SMALL)(jnp.zeros((3, 6, 4, 2), jnp.uint8))


@pytest.mark.parametrize("network", [WeightTiedConvNet, ExplicitConvNet])
def test_bad_depth_is_named(network):
    with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
        network(depth=0, rngs=nnx.Rngs(0), **SMALL)
