"""MonDEQ: published counts, the formula, training, evaluation with one resolvent."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, BackwardProbe, Picard, Status, solve_fixed_point
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.mondeq import PUBLISHED, MonDEQ
from tests import monotone_reference as reference
from tests.cells import test_monotone as cells

COUNTS = {
    "mnist-dense": 84_313,
    "mnist-conv": 79_500,
    "mnist-multitier": 81_394,
    "svhn-conv": 172_218,
    "svhn-multitier": 170_194,
    "cifar10-conv": 172_218,
    "cifar10-multitier": 170_194,
    "cifar10-conv-large": 853_612,
    "cifar10-multitier-large": 1_014_546,
}
SMALL = {
    "image_shape": (4, 6, 2),
    "num_classes": 3,
    "m": 0.5,
    "mean": (0.4, 0.6),
    "std": (0.2, 0.3),
}
WIDTHS = {"dense": (6,), "conv": (3,), "multitier": (2, 3)}


def build(operator, **options):
    return MonDEQ(**SMALL, operator=operator, widths=WIDTHS[operator], rngs=nnx.Rngs(0), **options)


def images(batch=3, seed=0):
    return np.random.default_rng(seed).uniform(size=(batch, *SMALL["image_shape"]))


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_the_published_networks(name):
    model = nnx.eval_shape(lambda: MonDEQ(**PUBLISHED[name], rngs=nnx.Rngs(0)))
    assert count_parameters(model) == COUNTS[name]
    assert model.core.cell.m == 1.0
    assert set(COUNTS) == set(PUBLISHED)


def test_sizes_of_the_published_states():
    def grids(name):
        model = nnx.eval_shape(lambda: MonDEQ(**PUBLISHED[name], rngs=nnx.Rngs(0)))
        return model.core.cell.grids, model.head.kernel.shape[0]

    assert grids("mnist-multitier") == (((30, 30), (16, 16), (9, 9)), 81 * 32)
    assert grids("cifar10-multitier") == (((34, 34), (18, 18), (10, 10)), 100 * 60)


@pytest.mark.parametrize("operator", WIDTHS)
@pytest.mark.slow
def test_logits_are_the_formula(x64, operator):
    model = build(operator, solver=Picard(tol=1e-12, max_iter=2000), param_dtype=jnp.float64)
    batch = images()
    logits, stats = jax.jit(lambda model, x: model(x, return_stats=True))(model, batch)
    assert stats.converged.all()
    x = (batch - [0.4, 0.6]) / [0.2, 0.3]
    cell = model.core.cell
    p = cells.parameters(cell)
    w, free = cells.matrix_of(p, cell), np.ones(cells.size(cell), bool)
    if operator == "dense":
        c = x.reshape(3, -1) @ p["injection"]["kernel"] + p["injection"]["bias"]
    else:
        grids = cell.grids if operator == "multitier" else (cell.grid,)
        c = np.array([reference.inject(p, image, grids[0]).reshape(-1) for image in x])
        c = np.pad(c, ((0, 0), (0, cells.size(cell) - c.shape[1])))
        masks = zip(grids, WIDTHS[operator], strict=True)
        free = np.concatenate([reference.inside(*mask) for mask in masks])
    z = np.array([reference.solve(w, row, free) for row in c])
    if operator == "conv":  # of a grid of 6 x 8 the last two rows are left over
        z = z.reshape(3, 6, 2, 4, 3)[:, :4].mean((1, 3)).reshape(3, -1)
    if operator == "multitier":
        z = z[:, -4 * 5 * 3 :]
    head = {
        name: np.asarray(leaf) for name, leaf in nnx.to_pure_dict(nnx.state(model.head)).items()
    }
    np.testing.assert_allclose(logits, z @ head["kernel"] + head["bias"], atol=1e-9)


@functools.partial(jax.jit, static_argnums=0)
def step(definition, params, rest, x, labels):
    """A step of gradient descent, the loss before, and reports of both solves."""

    def loss(params, probe):
        model = nnx.merge(definition, params, rest)
        logits, stats = model(x, return_stats=True, backward_probe=probe)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        return -chosen.mean(), stats

    probe = BackwardProbe.zeros(len(x))
    (value, stats), (gradient, probe) = jax.value_and_grad(loss, (0, 1), has_aux=True)(
        params, probe
    )
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
    return params, value, stats, probe


@pytest.mark.parametrize("operator", WIDTHS)
@pytest.mark.slow
def test_training_lowers_the_loss_and_few_iterations_suffice(operator):
    definition, params, rest = nnx.split(build(operator), nnx.Param, ...)
    x, labels = jnp.asarray(images(8), jnp.float32), jnp.arange(8) % 3
    values = []
    for _ in range(10):
        params, value, stats, probe = step(definition, params, rest, x, labels)
        values.append(float(value))
    assert values[-1] < values[0] - 0.01
    assert stats.converged.all()
    assert (probe.status == int(Status.CONVERGED)).all()
    assert stats.evaluations <= 12
    assert probe.evaluations <= 12


def test_one_resolvent_for_many_batches():
    model = build("conv")

    def solve(model, x, resolvent):
        z = model.core(model.injection(x), resolvent=resolvent)
        return model.classify(z)

    call = jax.jit(solve)
    resolvent = jax.jit(lambda model: model.core.resolvent())(model)
    for seed in range(2):
        x = jnp.asarray(images(seed=seed), jnp.float32)
        np.testing.assert_allclose(call(model, x, resolvent), call(model, x, None), atol=1e-4)


@pytest.mark.slow
def test_the_equation_outside_of_the_layer():
    model = build("conv", solver=Anderson(tol=1e-5))
    x = jnp.asarray(images(), jnp.float32)
    injection = model.injection(x)
    assert model.start(injection) is None
    zeros = model.zeros(injection)
    assert zeros.shape == (3, 6, 8, 3)
    f, params, c = model.core.equation(injection)
    u = solve_fixed_point(f, params, c, zeros, solver=model.core.solver).value
    assert (u < 0).any()
    np.testing.assert_allclose(model.classify(u), model(x), atol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"operator": "fft"}, "operator must be one of"),
        ({"operator": "conv", "widths": (2, 3)}, 'one number with operator="conv"'),
        ({"operator": "dense", "widths": (2,), "std": 0.0}, "std must be positive"),
        ({"operator": "dense", "widths": (2,), "mean": (0.1,) * 3}, "one number or 2"),
        ({"operator": "multitier", "widths": (2, 2, 2)}, "multiples of 4"),
        ({"operator": "multitier", "widths": (2,)}, r'two or more with operator="multitier", such'),
        ({"operator": "conv", "widths": (0,)}, r"each of widths=\(0,\) must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"image_shape": (28, 28)}, r"image_shape must be \(height, width, channels\), got"),
    ],
)
def test_errors_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        MonDEQ(**{**SMALL, **options}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"images must have shape \[B, 4, 6, 2\]"):
        build("dense")(jnp.zeros((1, 4, 6, 1)))


@pytest.mark.slow
def test_resolvent_at_the_published_size():
    # Factorisations of several resolutions at once waited for each other on two cores.
    model = MonDEQ(**PUBLISHED["mnist-multitier"], rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    shapes = [(1, 30, 30, 16), (1, 16, 16, 32), (1, 9, 9, 32)]
    z = tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)

    @jax.jit
    def round_trip(model, z):
        cell = model.core.cell
        wz = cell.multiply(z)
        moved = jax.tree.map(lambda z, wz: 2 * z - wz, z, wz)
        return cell.apply_resolvent(cell.resolvent(1.0), moved)

    for found, expected in zip(round_trip(model, z), z, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_list_as_image_shape_and_integer_pixels():
    options = {**SMALL, "image_shape": [4, 6, 2], "operator": "dense", "widths": [6]}
    model = MonDEQ(**options, rngs=nnx.Rngs(0))
    assert model.injection(jnp.ones((1, 4, 6, 2))).shape == (1, 48)
    with pytest.raises(TypeError, match=r"got uint8. Pass images.astype\(jnp.float32\) / 255"):
        model(jnp.zeros((1, 4, 6, 2), jnp.uint8))
