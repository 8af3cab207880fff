"""Weight and spectral normalisation as pure maps, against NumPy and finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax.stability import SpectralNorm, WeightNorm, flax_output_axes, named
from tests.reference import relative_error

# Path, shape, axes of the inputs: a dense kernel, a convolution, the projections of attention.
KERNELS = {
    ("dense", "kernel"): ((4, 3), (0,)),
    ("conv", "kernel"): ((3, 2, 2, 3), (0, 1, 2)),
    ("attention", "query", "kernel"): ((4, 2, 3), (0,)),
    ("attention", "out", "kernel"): ((2, 3, 4), (0, 1)),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def make_params(dtype=np.float64):
    params = {}
    for seed, (path, (shape, _)) in enumerate(KERNELS.items()):
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node["kernel"] = jnp.asarray(normal(*shape, seed=seed), dtype)
        node["bias"] = jnp.asarray(normal(shape[-1], seed=seed + 10), dtype)
    return params


def leaf_at(params, path):
    for name in path:
        params = params[name]
    return np.asarray(params)


def weight_norm(v, g, inputs, clip=np.inf):
    """The formula, one norm for each index of the outputs."""
    norm = np.sqrt((v**2).sum(inputs, keepdims=True))
    return v * np.minimum(clip, np.expand_dims(g, inputs) / norm)


def central_difference(loss, arrays, direction, step=1e-6):
    """Of `loss` of a list of NumPy arrays, along `direction`."""
    ahead, behind = (
        [a + sign * step * d for a, d in zip(arrays, direction, strict=True)] for sign in (1, -1)
    )
    return (loss(ahead) - loss(behind)) / (2 * step)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip", [None, 1.0])
def test_weight_norm_values_and_gradients(clip):
    normalization, params = WeightNorm(clip=clip), make_params()
    g, statistics = normalization.init(params)
    assert statistics == {}
    assert set(g) == {"/".join(path) for path in KERNELS}
    assert g["attention/query/kernel"].shape == (2, 3)
    g = {name: value * (0.5 + 0.3 * np.arange(1.0 * value.size).reshape(value.shape))
         for name, value in g.items()}  # fmt: skip
    paths = list(KERNELS)
    weights = [normal(*KERNELS[path][0], seed=20 + i) for i, path in enumerate(paths)]

    def reference(arrays):
        """Effective kernels from all v, then all g."""
        half = len(paths)
        return [
            weight_norm(v, g, KERNELS[path][1], clip or np.inf)
            for path, v, g in zip(paths, arrays[:half], arrays[half:], strict=True)
        ]

    def reference_loss(arrays):
        return sum((w * e).sum() for w, e in zip(weights, reference(arrays), strict=True))

    def loss(params, g):
        effective, _ = normalization(params, g, {})
        total = 0.0
        for weight, path in zip(weights, paths, strict=True):
            leaf = effective
            for name in path:
                leaf = leaf[name]
            total += (weight * leaf).sum()
        return total, effective

    (_, effective), (by_params, by_g) = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    )(params, g)
    arrays = [leaf_at(params, path) for path in paths]
    arrays += [np.asarray(g["/".join(path)]) for path in paths]
    for path, expected in zip(paths, reference(arrays), strict=True):
        np.testing.assert_allclose(leaf_at(effective, path), expected, rtol=1e-12)
    np.testing.assert_array_equal(effective["dense"]["bias"], params["dense"]["bias"])
    gradient = [leaf_at(by_params, path) for path in paths]
    gradient += [np.asarray(by_g["/".join(path)]) for path in paths]
    for seed in range(30, 34):
        direction = [normal(*a.shape, seed=seed + i) for i, a in enumerate(arrays)]
        along = sum((a * b).sum() for a, b in zip(gradient, direction, strict=True))
        assert along == pytest.approx(central_difference(reference_loss, arrays, direction), 1e-6)


@pytest.mark.museum(
    "locuslab/deq, initialisation: weight normalisation taken before the initialisation undid it:"
    " 0.0392 instead of 0.0100"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.slow
def test_effective_kernels_start_as_the_kernels(dtype):
    params = make_params(dtype)
    g, _ = WeightNorm().init(params)
    assert {value.dtype for value in g.values()} == {jnp.dtype(jnp.float32)}
    effective, _ = jax.jit(WeightNorm())(params, g, {})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), effective, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(effective)} == {jnp.dtype(dtype)}

    params = {name: params[name] for name in ("conv", "attention")}
    normalization = SpectralNorm(scale=None, learn_scale=True, iterations=3)
    effective, _ = jax.jit(lambda params: normalization(params, *normalization.init(params)))(
        params
    )
    for path in list(KERNELS)[1:]:
        a, b = (leaf_at(tree, path).astype(np.float32) for tree in (effective, params))
        np.testing.assert_allclose(a, b, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-4)
    assert {leaf.dtype for leaf in jax.tree.leaves(effective)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize(
    "normalization",
    [WeightNorm(), WeightNorm(clip=2.0), SpectralNorm(scale=None, learn_scale=True)],
)
def test_zeros_stay_and_can_be_left(normalization):
    # The second channel is zero, and so is all of the other kernel.
    params = {"a": {"kernel": jnp.array([[3.0, 0.0], [4.0, 0.0]])}, "kernel": jnp.zeros((3, 2))}
    g, statistics = normalization.init(params)

    def loss(params, g):
        effective, advanced = normalization(params, g, statistics)
        return sum(jax.tree.leaves(jax.tree.map(jnp.sum, effective))), (effective, advanced)

    gradient, (effective, advanced) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(params, g)
    np.testing.assert_allclose(effective["a"]["kernel"], params["a"]["kernel"], rtol=1e-5)
    np.testing.assert_array_equal(effective["kernel"], 0)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, advanced)))
    np.testing.assert_allclose(gradient[0]["kernel"], 1.0)
    for vector in jax.tree.leaves(advanced):
        assert jnp.linalg.norm(vector) == pytest.approx(1, rel=1e-5)


def largest_singular_value(kernel, inputs):
    rows = int(np.prod([kernel.shape[axis] for axis in inputs]))
    # The inputs come first in all of these kernels.
    return np.linalg.norm(np.asarray(kernel, np.float64).reshape(rows, -1), 2)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("scale", "clip"), [(0.7, 1.0), (50.0, 1.0), (50.0, None)])
@pytest.mark.slow
def test_spectral_norm_against_svd(clip, scale):
    params, normalization = make_params(), SpectralNorm(scale, clip=clip, iterations=200)
    g, statistics = jax.jit(normalization.init)(params)
    assert g == {}
    effective, _ = jax.jit(normalization)(params, g, statistics)
    for path, (_, inputs) in KERNELS.items():
        kernel = leaf_at(params, path)
        factor = min(clip or np.inf, scale / largest_singular_value(kernel, inputs))
        np.testing.assert_allclose(leaf_at(effective, path), factor * kernel, rtol=1e-6)


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_sigma_follows_slowly_changing_kernels():
    # One step a call: the bound holds all the way, up to what the power iteration lags behind.
    normalization, step = SpectralNorm(), jax.jit(SpectralNorm())
    kernel = normal(8, 6)
    _, statistics = normalization.init({"kernel": jnp.asarray(kernel)})
    norms = []
    for call in range(60):
        if call < 30:
            kernel = kernel + 0.02 * normal(8, 6, seed=call + 1)
        effective, statistics = step({"kernel": jnp.asarray(kernel)}, {}, statistics)
        norms.append(np.linalg.norm(effective["kernel"], 2))
    assert min(norms) >= 1 - 1e-9  # sigma is never too large
    assert max(norms) < 1.01
    assert norms[-1] < 1 + 1e-4


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("iterations", [1, 200])
def test_spectral_norm_gradient(iterations):
    # Converged, it is the derivative of `g W₀ / σ(W₀)`. On the way it is that of `g W₀ / aᵀ W₀ b`
    # with the vectors after one step, from NumPy.
    normalization = SpectralNorm(None, learn_scale=True, clip=None, iterations=iterations)
    kernel, weight = normal(5, 4), normal(5, 4, seed=1)
    right = normal(4, seed=2)
    right /= np.linalg.norm(right)
    left = kernel @ right / np.linalg.norm(kernel @ right)
    right_after = left @ kernel / np.linalg.norm(left @ kernel)

    def reference(arrays):
        kernel, g = arrays
        if iterations == 1:
            return (weight * kernel).sum() * g / (left @ kernel @ right_after)
        return (weight * kernel).sum() * g / np.linalg.norm(kernel, 2)

    def loss(kernel, g):
        g, statistics = {"kernel": g}, {"kernel": jnp.asarray(right)}
        effective, advanced = normalization({"kernel": kernel}, g, statistics)
        return (weight * effective["kernel"]).sum(), advanced["kernel"]

    arrays = [kernel, np.asarray(1.3)]
    function = jax.value_and_grad(loss, (0, 1), has_aux=True)
    (value, advanced), gradient = jax.jit(function)(*map(jnp.asarray, arrays))
    assert value == pytest.approx(reference(arrays), 1e-9)
    if iterations == 1:
        np.testing.assert_allclose(advanced, right_after, rtol=1e-12)
    for seed in range(3, 6):
        direction = [normal(5, 4, seed=seed), np.asarray(0.4 * seed)]
        along = sum(
            (a * b).sum() for a, b in zip(map(np.asarray, gradient), direction, strict=True)
        )
        assert along == pytest.approx(central_difference(reference, arrays, direction), 1e-6)


def test_a_non_finite_kernel_does_not_spoil_the_statistics():
    normalization, kernel = SpectralNorm(), jnp.asarray(normal(4, 3), jnp.float32)
    _, statistics = normalization.init({"kernel": kernel})
    for bad in (jnp.nan, jnp.inf):
        effective, kept = normalization({"kernel": kernel.at[1, 1].set(bad)}, {}, statistics)
        np.testing.assert_array_equal(kept["kernel"], statistics["kernel"])
        assert not jnp.isfinite(effective["kernel"][1, 1])
    # `Wᵀ a` is so long that its square overflows: divided by its length it would be zero for ever.
    kernel = jnp.array([[1e20, 1.0], [0.0, 1.0]])
    _, kept = normalization({"kernel": kernel}, {}, {"kernel": jnp.array([0.0, 1.0])})
    np.testing.assert_array_equal(kept["kernel"], [0, 1])


@pytest.mark.parametrize("normalization", [WeightNorm(), SpectralNorm(2.0, learn_scale=True)])
def test_flax_attention_as_state_and_as_dict(normalization):
    attention = nnx.MultiHeadAttention(2, 4, 6, out_features=5, decode=False, rngs=nnx.Rngs(0))
    state = nnx.state(attention, nnx.Param)
    g, statistics = jax.jit(normalization.init)(state)
    assert set(g) == {f"{name}/kernel" for name in ("query", "key", "value", "out")}
    effective, _ = jax.jit(normalization)(state, g, statistics)
    assert isinstance(effective, nnx.State)
    pure = nnx.to_pure_dict(state)
    expected, _ = jax.jit(normalization)(pure, g, statistics)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(effective), expected)
    if isinstance(normalization, WeightNorm):
        norms = np.sqrt((np.asarray(pure["value"]["kernel"]) ** 2).sum(0))
        np.testing.assert_allclose(g["value/kernel"], norms, rtol=1e-6)  # [heads, head_dim]
        assert g["out/kernel"].shape == (5,)


def test_other_names_and_axes():
    w = jnp.asarray(normal(3, 4), jnp.float32)
    params = {"query": {"w": w, "bias": w}, "layers": [w, w[0]]}
    assert set(WeightNorm(kernels=named("w")).init(params)[0]) == {"query/w"}
    both = WeightNorm(kernels=named("query", "layers")).init(params)[0]
    assert set(both) == {"query/w", "layers/0"}
    g, _ = WeightNorm(kernels=named("w"), output_axes=0).init(params)
    np.testing.assert_allclose(g["query/w"], np.linalg.norm(w, axis=1), rtol=1e-6)
    by_path = WeightNorm(kernels=named("w"), output_axes=lambda path, leaf: path.index("w") - 1)
    np.testing.assert_array_equal(by_path.init(params)[0]["query/w"], g["query/w"])
    assert flax_output_axes(("query",), jnp.zeros((2, 3, 4))) == (1, 2)
    assert flax_output_axes(("conv", "kernel"), jnp.zeros((2, 3, 4))) == (-1,)


def test_vmap():
    kernels = jnp.asarray(normal(3, 4, 2), jnp.float32)
    for normalization in (WeightNorm(), SpectralNorm(0.5, learn_scale=True)):
        one = lambda kernel, n=normalization: n(  # noqa: E731
            {"kernel": kernel}, *n.init({"kernel": kernel})
        )[0]["kernel"]
        assert relative_error(jax.jit(jax.vmap(one))(kernels)[1], jax.jit(one)(kernels[1])) < 1e-5


def test_errors():
    params = {"layer": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    for normalization in (WeightNorm, SpectralNorm):
        with pytest.raises(ValueError, match=r"no leaf.*\['layer/bias', 'layer/w'\]"):
            normalization().init({"layer": {"w": jnp.ones((2, 2)), "bias": jnp.ones(2)}})
        with pytest.raises(ValueError, match=r"layer/bias is float32\[2\]"):
            normalization(kernels=lambda path, leaf: True).init(params)
        with pytest.raises(ValueError, match=r"output_axes=\(0, 1\).*layer/kernel"):
            normalization(output_axes=(0, 1)).init(params)
        for clip in (0.0, -1.0, float("inf")):
            with pytest.raises(ValueError, match="clip must be finite, > 0"):
                normalization(clip=clip)
        with pytest.raises(ValueError, match="the kernels are"):
            normalization()(params, {"other": jnp.ones(2)}, {})
    with pytest.raises(ValueError, match=r"statistics is of \[\], the kernels are"):
        SpectralNorm()(params, {}, {})
    with pytest.raises(ValueError, match="iterations must be at least 1"):
        SpectralNorm(iterations=0)
    with pytest.raises(ValueError, match="scale must be finite"):
        SpectralNorm(-1.0)
    with pytest.raises(ValueError, match="scale may be None only with learn_scale"):
        SpectralNorm(None)
    with pytest.raises(TypeError, match="learn_scale must be a bool"):
        SpectralNorm(learn_scale=1)
    assert hash(WeightNorm()) == hash(WeightNorm())
