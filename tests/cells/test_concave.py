"""The positive concave cell and its classifiers: against NumPy and dense float64 solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Implicit, Picard, deq_fixed_point, solve_fixed_point
from deq_jax.cells.concave import ConcaveCell
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.pcdeq import PcDEQ

ACTIVATIONS = {
    # σ, σ' and the injection
    "tanh": (np.tanh, lambda a: 1 - np.tanh(a) ** 2),
    "softsign": (lambda a: a / (1 + abs(a)), lambda a: 1 / (1 + abs(a)) ** 2),
    "relu6": (lambda a: np.clip(a, 0, 6), lambda a: ((a > 0) & (a < 6)) * 1.0),
    "sigmoid": (lambda a: 1 / (1 + np.exp(-a)), lambda a: np.exp(-a) / (1 + np.exp(-a)) ** 2),
}
TIGHT = Picard(tol=1e-14, max_iter=2000)


def matrix_of(kernel, shape):
    """W as a matrix on flattened states, `[D, D]`: dense, or a convolution padded with zeros."""
    if kernel.ndim == 2:
        return kernel.T
    height, width, features = shape
    w = np.zeros((height, width, features, height, width, features))
    for i in range(height):
        for j in range(width):
            for a in range(3):
                for b in range(3):
                    k, m = i + a - 1, j + b - 1
                    if 0 <= k < height and 0 <= m < width:
                        w[i, j, :, k, m, :] = kernel[a, b].T
    return w.reshape(height * width * features, -1)


def positive_cell(activation, size, rng, shape):
    """A cell with large random non-negative weights, and its W as a matrix."""
    cell = ConcaveCell(
        shape[-1],
        kernel_size=size,
        activation=activation,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    kernel = rng.uniform(0, 0.4, cell.weight.kernel.shape)
    cell.weight.kernel.set_value(jnp.asarray(kernel))
    return cell, matrix_of(kernel, shape)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("size", "shape"), [(None, (5,)), (3, (3, 4, 2))], ids=["dense", "conv"])
def test_equilibrium_and_gradients_against_a_dense_solve(activation, size, shape):
    rng = np.random.default_rng(1)
    cell, w = positive_cell(activation, size, rng, shape)
    x = rng.normal(size=(2, *shape))
    weights = rng.normal(size=x.shape)
    definition, state = nnx.split(cell)

    def loss(state, x):
        def f(state, z, c):
            return nnx.merge(definition, state)(z, c)

        c = cell.inject(x)
        z = deq_fixed_point(f, state, c, solver=TIGHT, gradient=Implicit())
        return jnp.sum(z * weights), z

    (_, z), (of_state, of_x) = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(
        state, jnp.asarray(x)
    )

    # The same with W as a matrix, in NumPy: 3,000 plain steps, and (I - Jᵀ)⁻¹ as a dense inverse.
    act, slope = ACTIVATIONS[activation]
    flat = x.reshape(2, -1)
    if activation == "sigmoid":
        c, c_slope = np.maximum(flat, 0), (flat > 0) * 1.0
    else:
        c, c_slope = np.log1p(np.exp(5 * flat)) / 5, 1 / (1 + np.exp(-5 * flat))
    expected = np.zeros_like(c)
    for _ in range(3000):
        expected = act(expected @ w.T + c)
    np.testing.assert_allclose(z.reshape(2, -1), expected, atol=1e-11, rtol=0)
    d = slope(expected @ w.T + c)
    of_w = np.zeros_like(w)
    for b, cotangent in enumerate(weights.reshape(2, -1)):
        u = np.linalg.solve(np.eye(len(w)) - (d[b][:, None] * w).T, cotangent)
        np.testing.assert_allclose(
            of_x[b].reshape(-1), d[b] * u * c_slope[b], atol=1e-8 * abs(u).max()
        )
        of_w += np.outer(d[b] * u, expected[b])
    if size is None:
        of_kernel = of_w.T
    else:  # a tap's derivative is the sum over all places where the matrix has it
        of_kernel = np.zeros(cell.weight.kernel.shape)
        for index in np.ndindex(*of_kernel.shape):
            tap = np.zeros_like(of_kernel)
            tap[index] = 1
            of_kernel[index] = (matrix_of(tap, shape) * of_w).sum()
    found = np.asarray(jax.tree.leaves(of_state)[0])
    np.testing.assert_allclose(found, of_kernel, atol=1e-8 * abs(of_kernel).max())


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_error_of_picard_stays_below_the_known_rate(activation):
    rng = np.random.default_rng(2)
    cell, w = positive_cell(activation, None, rng, (6,))
    c = cell.inject(jnp.asarray(rng.normal(size=(4, 6))))
    rate = np.asarray(cell.rate(c))
    act, slope = ACTIVATIONS[activation]
    exact = np.asarray(solve_fixed_point(lambda _, z, c: cell(z, c), (), c, solver=TIGHT).value)
    z = np.zeros_like(exact)
    for k in range(60):
        error = exact - z
        assert (error >= -1e-12).all()
        assert (error <= rate[:, None] ** k * exact + 1e-12).all()
        z = act(z @ w.T + np.asarray(c))
    for b in range(4):
        jacobian = slope(exact[b] @ w.T + np.asarray(c)[b])[:, None] * w
        assert abs(np.linalg.eigvals(jacobian)).max() <= rate[b] + 1e-12
    assert (rate > 0).all()
    assert (rate < 1).all()


@pytest.mark.slow
def test_classifiers_count_and_project():
    def build(form):
        return PcDEQ(form=form, rngs=nnx.Rngs(0))

    assert count_parameters(nnx.eval_shape(lambda: build("dense"))) == (
        784 * 80 + 80 + 2 * 2 * 80 + 80 * 80 + 80 + 80 * 10 + 10
    )
    assert count_parameters(nnx.eval_shape(lambda: build("conv"))) == (
        9 * 82 + 82 + 2 * 2 * 82 + 9 * 82 * 82 + 82 + 3 * 3 * 82 * 10 + 10
    )
    model = PcDEQ(image_shape=(9, 8, 2), form="dense", features=4, num_classes=3, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    negative = jax.tree.map(lambda leaf: leaf - 1.0, params)
    projected = nnx.to_flat_state(model.project(negative))
    for (path, before), (_, after) in zip(nnx.to_flat_state(negative), projected, strict=True):
        before, after = before.get_value(), after.get_value()
        kept = np.maximum(before, 0) if path[0] == "core" else before
        np.testing.assert_array_equal(after, kept)


@pytest.mark.parametrize("form", ["dense", "conv"])
@pytest.mark.slow
def test_classifier_runs_and_has_gradients(form):
    model = PcDEQ(image_shape=(9, 8, 2), form=form, features=4, num_classes=3, rngs=nnx.Rngs(0))
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 9, 8, 2)), jnp.float32)

    def loss(params):
        logits, stats = nnx.merge(definition, params, rest, copy=True)(images, return_stats=True)
        return jnp.sum(logits**2), stats

    gradient, stats = jax.jit(jax.grad(loss, has_aux=True))(params)
    assert (np.asarray(stats.residual) <= 1e-4).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["core"]["cell"]["weight"]["kernel"].get_value()).max() > 0
    assert model(images).shape == (5, 3)


@pytest.mark.parametrize("width", [1, 300])
def test_there_is_one_equilibrium_where_the_input_is_tiny(width):
    cell = ConcaveCell(width, rngs=nnx.Rngs(0))
    cell.weight.kernel.set_value(5 * jnp.eye(width))
    c = cell.inject(jnp.full((2, width), jnp.array([[-18.0], [-100.0]])))
    z, stats = solve_fixed_point(lambda _, z, c: cell(z, c), (), c, solver=Picard(max_iter=200))
    np.testing.assert_allclose(z, np.full((2, width), 0.99991), atol=1e-4)  # z = tanh(5 z)
    assert stats.converged.all()


def test_the_rate_is_that_of_the_normalised_weights():
    model = PcDEQ(image_shape=(3, 2, 1), form="dense", features=4, rngs=nnx.Rngs(0))
    images = jnp.asarray(np.random.default_rng(0).uniform(size=(5, 3, 2, 1)), jnp.float32)
    (gains,) = jax.tree.leaves(nnx.state(model.core.scale))
    model.eval()
    small = model.rate(images)
    nnx.update(model.core.scale, {"weight/kernel": gains * 1e3})
    large = np.asarray(model.rate(images))
    kernel = np.float64(model.core.cell.weight.kernel[...])
    kernel = kernel / np.linalg.norm(kernel, axis=0) * np.float64(gains) * 1e3
    c = np.log1p(np.exp(5 * np.float64(model.injection(images)))) / 5
    expected = 1 - (np.tanh(c) / np.tanh(np.ones(4) @ kernel + c)).min(1)
    np.testing.assert_allclose(large, expected, rtol=1e-3)
    assert (small < large).all()
    nnx.update(model.core.cell.weight.kernel, -model.core.cell.weight.kernel[...])
    assert np.isnan(model.rate(images)).all()


def test_errors_name_the_option():
    with pytest.raises(ValueError, match=r"x must be \[B, ..., 4\], got \[2, 3\]"):
        ConcaveCell(4, rngs=nnx.Rngs(0)).inject(jnp.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"PcDEQ\.features must be at least 1, got 0"):
        PcDEQ(features=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"activation must be one of tanh, .* got 'relu'"):
        ConcaveCell(4, activation="relu", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="form must be dense or conv, got 'multi'"):
        PcDEQ(form="multi", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="at least 8x8 for form='conv', got 6x9"):
        PcDEQ(image_shape=(6, 9, 1), rngs=nnx.Rngs(0))
    model = PcDEQ(form="dense", features=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"shape \[B, 28, 28, 1\], got \[2, 28, 28\]"):
        model(jnp.zeros((2, 28, 28)))
