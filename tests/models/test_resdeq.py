"""ResDEQ: counts, the stages against a dense solve of all at once, reports, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import BackwardProbe, Implicit, Picard, Status
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.resdeq import SMALL, ResDEQ
from tests.cells import formulas
from tests.cells.formulas import batch_norm, conv, group_norm, randomise, relu, weights_of
from tests.reference import relative_error

OPTIONS = {"image_shape": (4, 4, 2), "num_classes": 3, "channels": (4, 2), "widths": (1, 2),
           "group_size": 2}  # fmt: skip


def abstract(**options):
    return nnx.eval_shape(lambda: ResDEQ(**options, rngs=nnx.Rngs(0)))


def make(**options):
    """A small network with random weights, made without compiling its initialisers."""
    options = {**OPTIONS, "image_shape": [4, 4, 2], **options}  # a list, as from a file
    model = randomise(abstract(**options), np.random.default_rng(0), 0.3)
    statistics = nnx.state(model, nnx.BatchStat)
    nnx.update(model, jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), statistics))
    return model


def images(batch=3, dtype=np.float32):
    return np.random.default_rng(1).uniform(size=(batch, 4, 4, 2)).astype(dtype)


def test_parameters_of_the_published_network():
    """10.31M kernels and biases of the linear layer, as the paper counts, and 9,472 in norms."""
    model = abstract()
    assert count_parameters(model) == 10_319_754
    leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert sum(leaf.size for leaf in leaves if leaf.ndim > 1) + 10 == 10_310_282
    norms = [cell.norm1.num_groups for cell in model.core.cell.cells]
    assert norms == [8, 48, 48, 8]


def test_parameters_of_the_small_network():
    assert count_parameters(abstract(**SMALL)) == 162_810


# All stages at once, in NumPy.


def resnet_cell(weights, z, x, groups, inner_groups):
    y = group_norm(relu(conv(z, weights["conv1"]["kernel"])), weights["norm1"], inner_groups)
    y = group_norm(x + conv(y, weights["conv2"]["kernel"]), weights["norm2"], groups)
    return group_norm(relu(z + y), weights["norm3"], groups)


def descent(weights, x):
    y = conv(relu(batch_norm(x, weights["norm1"])), weights["conv1"]["kernel"], 2)
    y = conv(relu(batch_norm(y, weights["norm2"])), weights["conv2"]["kernel"])
    return y + conv(x, weights["shortcut"]["kernel"], 2)


def stages(weights, z, x):
    fine = resnet_cell(weights["cells"][0], z[0], x, 2, 2)
    x = descent(weights["descents"][0], x + z[0])
    return fine, resnet_cell(weights["cells"][1], z[1], x, 1, 2), x + z[1]


@pytest.mark.slow
def test_stages_against_a_dense_solve_of_all_at_once(x64):
    """Values, gradients, the one equation, and the reports; batch statistics couple the samples."""
    rng = np.random.default_rng(2)
    solver = Picard(tol=1e-13, max_iter=400)
    model = make(param_dtype=jnp.float64, solver=solver, gradient=Implicit())
    x = rng.normal(size=(2, 4, 4, 4))
    cotangent = [rng.normal(size=leaf.shape) for leaf in model.zeros(x)]
    definition, params, rest = nnx.split(model.core, nnx.Param, ...)

    @jax.jit
    def solved(params, x, probe):
        def value(params, x, probe):
            core = nnx.merge(definition, params, rest, copy=True)
            z, stats = core(x, return_stats=True, backward_probe=probe)
            total = sum(jnp.vdot(c, leaf) for c, leaf in zip(cotangent, z, strict=True))
            return total, (z, stats)

        gradients, (z, stats) = jax.grad(value, (0, 1, 2), has_aux=True)(params, x, probe)
        f, weights, injection = nnx.merge(definition, params, rest, copy=True).equation(x)
        return gradients, z, stats, f(weights, z, injection)

    (by_params, by_x, report), z, stats, again = solved(params, x, BackwardProbe.zeros(2))
    assert stats.converged.all()
    assert (report.status == Status.CONVERGED).all()
    assert relative_error(formulas.flat(again), formulas.flat(z)) < 1e-12
    weights = weights_of(model.core.cell)
    directions = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), weights) for _ in range(3)]
    start = tuple(np.asarray(leaf) + 1e-3 for leaf in z)
    reference, by_x_reference, by_weights = formulas.implicit(
        stages, weights, start, x, cotangent, directions
    )
    assert relative_error(formulas.flat(z), formulas.flat(reference)) < 1e-8
    assert relative_error(by_x, by_x_reference) < 1e-8
    gradient = jax.tree.map(np.asarray, nnx.to_pure_dict(by_params))["cell"]
    got = [
        sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction))) for direction in directions
    ]
    assert relative_error(got, by_weights) < 1e-8


@pytest.mark.slow
def test_reports_are_of_all_stages_together():
    """Two stages of budget 3: the first cannot converge, both count."""
    model = make(solver=Picard(tol=1e-30, max_iter=3, trace=True), gradient=Implicit())
    definition, state = nnx.split(model)
    own = nnx.split(model.core.cell.cells[0])

    @jax.jit
    def run(state, probe, batch):
        def loss(probe):
            model = nnx.merge(definition, state, copy=True)
            logits, stats = model(batch, return_stats=True, backward_probe=probe)
            return (logits**2).sum(), (logits, stats)

        report, (logits, stats) = jax.grad(loss, has_aux=True)(probe)
        # The first stage by itself.
        model = nnx.merge(definition, state, copy=True)
        x, cell = model.injection(batch), nnx.merge(*own, copy=True)
        z, residuals = jnp.zeros_like(x), []
        for _ in range(3):
            following = cell(z, x)
            lengths = [jnp.sqrt((y**2).sum((1, 2, 3))) for y in (following - z, following)]
            residuals.append(lengths[0] / lengths[1])
            z = following
        return report, logits, stats, jnp.stack(residuals)

    report, logits, stats, first = run(state, BackwardProbe.zeros(3), images())
    assert logits.shape == (3, 3)
    assert stats.evaluations == 6
    assert (stats.iterations == 6).all()
    assert (stats.status == Status.MAX_ITER).all()
    assert stats.trace.shape == (3, 3)
    assert (stats.trace >= first * (1 - 1e-5)).all()
    assert (stats.residual >= first.min(0) * (1 - 1e-5)).all()
    assert report.evaluations == 6
    assert (report.iterations == 6).all()
    assert (report.residual > 0).all()


def test_published_solver_and_its_gradient_are_traced():
    model = make()
    definition, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, batch):
        model = nnx.merge(definition, params, rest, copy=True)
        z = model.core(model.injection(batch), model.start(model.injection(batch)))
        return model.classify(z).sum()

    gradient = jax.eval_shape(jax.grad(loss), params, images())
    assert jax.tree.structure(gradient) == jax.tree.structure(params)
    state = jax.eval_shape(model.zeros, jnp.zeros((5, 4, 4, 4)))
    assert [leaf.shape for leaf in state] == [(5, 4, 4, 4), (5, 2, 2, 2), (5, 2, 2, 2)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"widths": (1,)}, "must name one number for each stage"),
        ({"group_size": 4}, r"channels=\(4, 2\) must be multiples of group_size=4"),
        ({"image_shape": (4, 3, 2)}, r"must be multiples of 2 for 2 stages"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"widths": (1, 0)}, r"each of widths=\(1, 0\) must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ResDEQ(rngs=nnx.Rngs(0), **OPTIONS | options)


def test_states_on_the_way_and_bad_images_are_refused():
    model = make()
    with pytest.raises(ValueError, match="no states on the way in common; got"):
        model.core(jnp.zeros((1, 4, 4, 4)), sample_at=(2,))
    with pytest.raises(ValueError, match=r"\[B, 4, 4, 2\], got \[3, 4, 4, 3\]"):
        model(jnp.zeros((3, 4, 4, 3)))
    with pytest.raises(TypeError, match=r"images must be floating, .* got uint8"):
        model(jnp.zeros((3, 4, 4, 2), jnp.uint8))
