"""The Jacobian penalty against dense Jacobians in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax.stability import (
    JacobianRegularization,
    denoising_energy,
    jacobian,
    jacobian_frobenius,
    jacobian_spectral_norm,
    jacobian_trace,
)

KEY = jax.random.key(0)


def cell(params, z, x):
    """Two leaves that act on each other, smooth."""
    a, b = z["a"], z["b"].reshape(len(z["b"]), -1)
    return {
        "a": jnp.tanh(a @ params["aa"] + b @ params["ba"] + x),
        "b": jnp.sin(a @ params["ab"] + b).reshape(z["b"].shape),
    }


def problem(batch=3):
    rng = np.random.default_rng(0)
    shapes = {"aa": (5, 5), "ba": (4, 5), "ab": (5, 4)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    z = {"a": jnp.asarray(rng.normal(size=(batch, 5)))}
    z["b"] = jnp.asarray(rng.normal(size=(batch, 2, 2)))
    return params, z, jnp.asarray(rng.normal(size=(batch, 5)))


def dense(params, z, x):
    """`‖∂f/∂z‖²` of each sample from its dense Jacobian."""

    def of_sample(z, x):
        def f(z):
            fz = cell(params, jax.tree.map(lambda leaf: leaf[None], z), x[None])
            return jax.tree.map(lambda leaf: leaf[0], fz)

        return sum((block**2).sum() for block in jax.tree.leaves(jax.jacfwd(f)(z)))

    return jnp.stack(
        [of_sample(jax.tree.map(lambda leaf: leaf[i], z), x[i]) for i in range(len(x))]
    )


@pytest.mark.slow
@pytest.mark.museum(
    "DeepEquilibriumNetworks.jl: the Jacobian penalty was vᵀ J v, whose mean is the trace and not"
    " the norm"
)
def test_the_mean_over_many_samples_is_the_dense_norm(x64):
    params, z, x = problem()
    got = jax.jit(lambda: jacobian_frobenius(cell, params, z, x, KEY, 4096))()
    expected = np.asarray(dense(params, z, x))
    np.testing.assert_allclose(got, expected, rtol=0.02)
    whole = jacobian_frobenius(cell, params, z, x, KEY, 4096, batched=False)
    np.testing.assert_allclose(whole, expected.sum(), rtol=0.02)


def test_one_sample_is_the_formula(x64):
    """A diagonal Jacobian makes each estimate exact, whatever the signs."""
    z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
    got = jacobian_frobenius(lambda p, z, x: jnp.sin(p * z) + x, 2.0, z, 0 * z, KEY)
    np.testing.assert_allclose(got, ((2 * np.cos(2 * z)) ** 2).sum(1), rtol=1e-12)


@pytest.mark.museum(
    "torchdeq T18: the Jacobian penalty of a recipe differentiated through the solve, unlike the "
    "paper's"
)
@pytest.mark.parametrize("attached", [False, True])
def test_its_gradient_is_that_of_the_dense_formula_at_a_constant_state(x64, attached, monkeypatch):
    """Over the rows of a Hadamard matrix the mean of `‖vᵀ J‖²` is the norm, without noise."""
    rows = jnp.asarray([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]], float)
    rng = np.random.default_rng(1)
    weights, x, z = (rng.normal(size=shape) for shape in ((4, 4), (2, 4), (2, 4)))
    weights0 = weights

    def f(weights, z, x):
        return jnp.tanh(z @ weights + x)

    def estimate(weights, x, row):
        monkeypatch.setattr(jacobian, "random_signs", lambda key, like: like * 0 + row)
        # A state that depends on the parameters is cut off from them.
        state = jnp.asarray(z) * (1.0 + float(attached) * (weights - weights0).sum())
        return jacobian_frobenius(f, weights, state, x, KEY).sum()

    def exact(weights, x):
        slopes = 1 - np.tanh(z @ weights + x) ** 2
        return ((slopes[:, None, :] * weights[None]) ** 2).sum()

    gradients = [jax.grad(estimate, (0, 1))(weights, x, row) for row in rows]
    for number, argument in enumerate((weights, x)):
        got = sum(gradient[number] for gradient in gradients) / len(rows)
        expected = np.zeros(argument.shape)
        for index in np.ndindex(argument.shape):
            step = np.zeros(argument.shape)
            step[index] = 1e-6
            ends = [
                exact(*(a + sign * step if a is argument else a for a in (weights, x)))
                for sign in (1, -1)
            ]
            expected[index] = (ends[0] - ends[1]) / 2e-6
        assert np.linalg.norm(got - expected) < 1e-5 * np.linalg.norm(expected)


def test_half_precision_and_complex_states():
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(3, 4)), jnp.bfloat16)
    got = jacobian_frobenius(lambda p, z, x: p * z, jnp.bfloat16(2), z, z, KEY)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, [16.0] * 3)
    z = jnp.asarray(rng.normal(size=(3, 4)) + 1j, jnp.complex64)
    # As a real map, multiplication by p turns and stretches each of 4 planes: 2 |p|² each.
    got = jacobian_frobenius(lambda p, z, x: p * z, jnp.complex64(3 + 4j), z, z, KEY)
    np.testing.assert_allclose(got, [4 * 2 * 25.0] * 3, rtol=1e-6)


def penalty(z, key, step, **options):
    """The term for `f = 2 z`, where `‖J‖² / D` is 4."""
    return JacobianRegularization(**options)(
        lambda p, z, x: p * z, jnp.float32(2), z, z, key=key, step=step
    )


@pytest.mark.slow
def test_the_schedule():
    z = jnp.ones((3, 5))
    steps = {0: 0.5, 9: 0.5, 10: 0.75, 29: 1.0, 30: 0.0}
    for step, weight in steps.items():
        options = {"weight": 0.5, "increment": 0.25, "increment_every": 10, "stop": 30}
        assert float(penalty(z, KEY, jnp.int32(step), **options)) == 4 * weight
    terms = jax.vmap(lambda key: penalty(z, key, 0, weight=1.0, probability=0.3))(
        jax.random.split(KEY, 2000)
    )
    assert set(np.unique(terms)) == {0.0, 4.0}
    assert abs(np.mean(np.asarray(terms) == 4) - 0.3) < 0.04
    state = {"a": jnp.ones((3, 5)), "b": jnp.ones((3, 2, 2))}  # D counts all leaves
    term = JacobianRegularization(1.0)(
        lambda p, z, x: jax.tree.map(lambda leaf: p * leaf, z), 2.0, state, None, key=KEY, step=0
    )
    assert float(term) == 4


def test_a_step_without_the_term_does_not_compute_it():
    z, calls = jnp.ones((3, 5)), []

    def f(p, z, x):
        jax.debug.callback(lambda: calls.append(None))
        return jnp.sin(p * z)

    @jax.jit
    def gradient(p, key):
        term = JacobianRegularization(1.0, probability=0.5)
        return jax.grad(lambda p: term(f, p, z, z, key=key, step=0))(p)

    counts = {}
    for number in range(8):
        calls.clear()
        got = float(gradient(jnp.float32(2), jax.random.key(number)))
        jax.effects_barrier()
        counts.setdefault(got != 0, set()).add(len(calls) > 0)
    assert counts == {True: {True}, False: {False}}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"weight": -1.0}, "weight"),
        ({"weight": 1.0, "probability": 1.5}, "probability"),
        ({"weight": 1.0, "stop": 0}, "stop"),
        ({"weight": 1.0, "increment": 0.1}, "increment_every"),
    ],
)
def test_bad_schedules_name_the_field(options, named):
    with pytest.raises(ValueError, match=named):
        JacobianRegularization(**options)


def test_bad_arguments():
    z = jnp.ones((3, 5))
    with pytest.raises(ValueError, match="samples must be at least 1"):
        jacobian_frobenius(lambda p, z, x: z, None, z, z, KEY, 0)
    with pytest.raises(ValueError, match="shapes of z"):
        jacobian_frobenius(lambda p, z, x: z[:, :1], None, z, z, KEY)


def dense_jacobians(params, z, x):
    """∂f/∂z of each sample, `[B, D, D]`, by the columns."""

    def of_sample(z, x):
        leaves, structure = jax.tree.flatten(z)

        def f(flat):
            parts = [flat[:5], flat[5:].reshape(2, 2)]
            fz = cell(params, jax.tree.map(lambda a: a[None], structure.unflatten(parts)), x[None])
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(fz)])

        return jax.jacfwd(f)(jnp.concatenate([leaf.ravel() for leaf in leaves]))

    return np.asarray(jax.jit(jax.vmap(of_sample))(z, x))


@pytest.mark.slow
def test_the_spectral_norm_is_the_largest_singular_value(x64):
    params, z, x = problem()
    expected = np.linalg.norm(dense_jacobians(params, z, x), 2, axis=(1, 2))
    norm = jax.jit(jacobian_spectral_norm, static_argnums=(0, 5))
    got = norm(cell, params, z, x, KEY, 200)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    early = norm(cell, params, z, x, KEY, 1)
    assert (early < expected).all()
    assert (early > 0.2 * expected).all()


def test_the_gradient_of_the_spectral_norm(x64):
    """Against finite differences of the dense singular value, at a constant state."""
    rng = np.random.default_rng(1)
    weights, x, z = (rng.normal(size=shape) for shape in ((4, 4), (2, 4), (2, 4)))

    def f(weights, z, x):
        return jnp.tanh(z @ weights + x)

    def exact(weights):
        slopes = 1 - np.tanh(z @ weights + x) ** 2
        return np.linalg.norm(slopes[:, None, :] * weights, 2, axis=(1, 2)).sum()

    def estimate(weights):
        return jacobian_spectral_norm(f, weights, z, jnp.asarray(x), KEY, 300).sum()

    got, direction = jax.jit(jax.grad(estimate))(weights), rng.normal(size=(4, 4))
    difference = (exact(weights + 1e-6 * direction) - exact(weights - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((got * direction).sum(), difference, rtol=1e-5)


@pytest.mark.slow
def test_the_spectral_norm_of_zero_and_of_a_complex_map():
    z = jnp.ones((2, 3), jnp.complex64)
    # f(z) = a z + b conj(z) stretches by |a| + |b| in one direction of each plane.
    f = lambda p, z, x: p * z + 2j * jnp.conj(z)  # noqa: E731
    got = jacobian_spectral_norm(f, jnp.complex64(3 + 4j), z, z, KEY, 20)
    np.testing.assert_allclose(got, [7.0, 7.0], rtol=1e-5)

    def zero(p):
        return jacobian_spectral_norm(lambda p, z, x: p * 0 * z, p, z, z, KEY).sum()

    value, gradient = jax.value_and_grad(zero)(jnp.complex64(1))
    assert (value, gradient) == (0, 0)


@pytest.mark.slow
def test_the_trace(x64):
    params, z, x = problem()
    expected = np.trace(dense_jacobians(params, z, x), axis1=1, axis2=2)
    got = jax.jit(lambda: jacobian_trace(cell, params, z, x, KEY, 4096))()
    np.testing.assert_allclose(got, expected, atol=0.2)
    whole = jacobian_trace(cell, params, z, x, KEY, 2, batched=False)
    assert whole.shape == ()
    # A diagonal Jacobian makes each estimate exact, its gradient too.
    z = z["a"]

    def trace(p):
        return jacobian_trace(lambda p, z, x: jnp.sin(p * z) + x, p, z, z, KEY).sum()

    value, gradient = jax.value_and_grad(trace)(2.0)
    np.testing.assert_allclose(value, (2 * np.cos(2 * z)).sum(), rtol=1e-12)
    expected = (np.cos(2 * z) - 2 * z * np.sin(2 * z)).sum()
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)


def test_the_denoising_energy(x64):
    """Of a linear map it is `σ² ‖J‖²` about an equilibrium; elsewhere the residual comes on top."""
    rng = np.random.default_rng(0)
    matrix, z = rng.normal(size=(4, 4)), rng.normal(size=(3, 4))
    x = z - z @ matrix  # so that z = z @ matrix + x
    energy = jax.jit(
        lambda x, scale: denoising_energy(
            lambda w, z, x: z @ w + x, jnp.asarray(matrix), z, x, KEY, scale, 4096
        )
    )
    for scale in (0.1, 2.0):
        expected = scale**2 * (matrix**2).sum()
        np.testing.assert_allclose(energy(x, scale), [expected] * 3, rtol=0.05)
    away = energy(x + 1.0, 0.5)
    np.testing.assert_allclose(away, [0.25 * (matrix**2).sum() + 4] * 3, rtol=0.05)
    # One sample is the formula; z is a constant.
    noise = jacobian.random_normal(KEY, jnp.asarray(z))

    def one(z, p):
        return denoising_energy(lambda p, z, x: jnp.sin(p * z), p, z, x, KEY, 0.3).sum()

    by_z, by_p = jax.grad(one, (0, 1))(jnp.asarray(z), 1.5)
    np.testing.assert_array_equal(by_z, 0)
    moved = z + 0.3 * noise
    expected = (2 * (np.sin(1.5 * moved) - z) * np.cos(1.5 * moved) * moved).sum()
    np.testing.assert_allclose(by_p, expected, rtol=1e-10)


def test_bad_arguments_of_the_other_measures():
    z = jnp.ones((3, 5))
    arguments = (lambda p, z, x: z, None, z, z, KEY)
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        jacobian_spectral_norm(*arguments, 0)
    with pytest.raises(TypeError, match="samples must be an integer"):
        jacobian_trace(*arguments, 1.5)
    with pytest.raises(ValueError, match="scale must be above 0"):
        denoising_energy(*arguments, 0.0)
