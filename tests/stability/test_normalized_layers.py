"""Normalised weights in the Flax layers: NNX = Linen = the formula, statistics, once a call."""

import dataclasses

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Anderson, Picard
from deq_jax.cells.feedforward import FeedForwardCell
from deq_jax.stability import SpectralNorm, WeightNorm, named
from tests.reference import implicit_gradient, newton_equilibrium, relative_error
from tests.test_adapters import LinenFeedForward, feed_forward, normal

SOLVER = Anderson(tol=1e-12, max_iter=100)
F64 = {"param_dtype": jnp.float64}

pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


def values(variables):
    """The arrays in a dict of variables."""
    return {path: variable.get_value() for path, variable in variables.items()}


def make_nnx(normalization, **options):
    cell = FeedForwardCell(2, 4, **F64, rngs=nnx.Rngs(0))
    return deq_jax.nnx.DEQ(cell, solver=SOLVER, normalization=normalization, **options)


def linen_variables(layer):
    """The variables of the Linen layer, from those of the NNX layer."""
    params = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    statistics = values(layer.statistics)
    return {
        "params": params,
        **({"normalization": {"statistics": statistics}} if statistics else {}),
    }


def weight_normalised(kernel, g):
    return kernel * g / jnp.sqrt((kernel**2).sum(0))


def spectrally_normalised(kernel, g):
    return kernel * jnp.minimum(0.8, g / jnp.linalg.svd(kernel, compute_uv=False)[0])


NORMALIZATIONS = {
    "weight": (WeightNorm(), weight_normalised, 1.0),
    # The clip holds for one of the two kernels.
    "spectral": (
        SpectralNorm(0.5, learn_scale=True, clip=0.8, iterations=100),
        spectrally_normalised,
        {"recurrent/kernel": 1.0, "input/kernel": 9.0},
    ),
}


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.slow
def test_both_are_the_formula(name):
    normalization, formula, change = NORMALIZATIONS[name]
    x, cotangent = normal(3, 2), normal(3, 4, seed=2)
    layer = make_nnx(normalization)
    scale = values(layer.scale)
    if name == "weight":
        change = {path: 0.4 + 0.3 * jnp.tanh(normal(*g.shape, seed=3)) for path, g in scale.items()}
    for path, g in scale.items():
        layer.scale[path].set_value(g * change[path])
    variables = linen_variables(layer)
    assert set(variables["params"]) == {"cell", "scale"}

    def equation(inputs, z):
        params, x = inputs
        cell = {
            name: {**leaves, "kernel": formula(leaves["kernel"], params["scale"][f"{name}/kernel"])}
            for name, leaves in params["cell"].items()
        }
        return feed_forward(cell, z, x)

    definition, state, rest = nnx.split(layer, nnx.Param, ...)

    def nnx_loss(state, x):
        z = nnx.merge(definition, state, rest, copy=True)(x)
        return jnp.vdot(cotangent, z), z

    def linen_loss(params, x):
        layer = deq_jax.linen.DEQ(LinenFeedForward(), solver=SOLVER, normalization=normalization)
        z = layer.apply({**variables, "params": params}, x)
        return jnp.vdot(cotangent, z), z

    params = variables["params"]
    z = newton_equilibrium(lambda z: equation((params, x), z), jnp.zeros((3, 4)))
    expected = implicit_gradient(equation, (params, x), z, cotangent)
    assert relative_error(feed_forward(params["cell"], z, x), z) > 1e-2
    for loss, start in ((nnx_loss, state), (linen_loss, params)):
        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (by_params, by_x), value = gradient(start, x)
        if loss is nnx_loss:
            by_params = nnx.to_pure_dict(by_params)
        assert relative_error(value, z) < 1e-9
        assert relative_error((by_params, by_x), expected) < 1e-8


@pytest.mark.parametrize("normalization", [None, SpectralNorm(0.5, clip=0.8)])
def test_layers_hand_out_the_equation_that_they_solve(normalization):
    """Its f at any z is the cell with effective weights, and nothing of the layer changes."""
    x, z = normal(3, 2), normal(3, 4, seed=2)
    layer = make_nnx(normalization)
    if normalization is None:
        variables = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
        effective = variables["params"]["cell"]
    else:
        variables = linen_variables(layer)
        cell = nnx.state(layer.cell, nnx.Param)
        effective, _ = normalization(nnx.to_pure_dict(cell), {}, values(layer.statistics))
    before = jax.tree.map(jnp.copy, nnx.state(layer))
    linen = deq_jax.linen.DEQ(LinenFeedForward(), solver=SOLVER, normalization=normalization)
    equations = (
        layer.equation(x),
        linen.apply(variables, x, method="equation"),
        linen.apply(variables, x, method="equation", mutable=["normalization"])[0],
    )
    for f, params, injection in equations:
        assert relative_error(f(params, z, injection), feed_forward(effective, z, x)) < 1e-12
    assert relative_error(nnx.state(layer), before) == 0
    solved = layer(x)
    f, params, injection = layer.equation(x) if normalization is None else equations[0]
    assert relative_error(f(params, solved, injection), solved) < 1e-9


@pytest.mark.slow
def test_linen_init():
    x = normal(3, 2)
    for normalization, _, _ in (*NORMALIZATIONS.values(), (SpectralNorm(), None, None)):
        layer = deq_jax.linen.DEQ(LinenFeedForward(), normalization=normalization)
        variables = layer.init(jax.random.key(0), x)
        g, statistics = normalization.init(variables["params"]["cell"])
        assert relative_error(variables["params"].get("scale", {"": 1}), g or {"": 1}) < 1e-9
        assert ("normalization" in variables) == bool(statistics)
        assert ("scale" in variables["params"]) == bool(g)
        if statistics:
            stored = variables["normalization"]["statistics"]
            assert relative_error(stored, statistics) < 1e-9
    del variables["normalization"]
    with pytest.raises(ValueError, match=r"statistics is of \[\], the kernels are"):
        layer.apply(variables, x)


@pytest.mark.parametrize("mode", ["train", "eval", "view"])
def test_statistics_advance_in_training_only(mode):
    x, normalization = normal(3, 2), SpectralNorm(0.3)
    layer = make_nnx(normalization)
    kernel = layer.cell.recurrent.kernel
    kernel[...] = kernel[...] + normal(4, 4, seed=5)
    variables = linen_variables(layer)
    old = variables["normalization"]["statistics"]
    _, advanced = normalization(variables["params"]["cell"], {}, old)
    assert relative_error(advanced, old) > 1e-2
    train = mode == "train"
    if mode == "eval":
        layer.eval()
    elif mode == "view":
        layer = nnx.view(layer, deterministic=True)
    expected = advanced if train else old
    z = nnx.jit(lambda layer, x: layer(x))(layer, x)
    assert relative_error(values(layer.statistics), expected) < 1e-12

    twin = deq_jax.linen.DEQ(
        LinenFeedForward(), solver=SOLVER, normalization=normalization, deterministic=not train
    )
    linen_z, changed = twin.apply(variables, x, mutable=["normalization"])
    assert relative_error(changed["normalization"]["statistics"], expected) < 1e-12
    assert relative_error(linen_z, z) < 1e-10
    assert relative_error(twin.apply(variables, x), z) < 1e-10  # immutable: nothing to change
    layer.train()
    layer(x)
    assert not layer.deterministic
    assert relative_error(values(layer.statistics), expected) > 1e-6


class Normed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 3, use_bias=False, **F64, rngs=rngs)
        self.norm = nnx.BatchNorm(3, momentum=0.9, **F64, rngs=rngs)
        self.norm.mean = nnx.BatchStat(jnp.zeros(3))
        self.norm.var = nnx.BatchStat(jnp.ones(3))
        self.dropout = nnx.Dropout(0.0, rngs=nnx.Rngs(dropout=0))

    def __call__(self, z, x):
        return jnp.tanh(0.3 * self.norm(self.linear(z)) + x)


class LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        z = nn.Dense(3, use_bias=False, **F64, name="linear")(z)
        norm = nn.BatchNorm(use_running_average=False, momentum=0.9, **F64, name="norm")
        return jnp.tanh(0.3 * norm(z) + x)


@pytest.mark.slow
def test_batch_statistics_are_of_effective_weights():
    x, normalization = normal(6, 3), WeightNorm(clip=0.5)
    layer = deq_jax.nnx.DEQ(Normed(), solver=SOLVER, normalization=normalization)
    variables = linen_variables(layer)
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables["batch_stats"] = {"cell": {"norm": statistics}}
    z = layer(x)
    inner = np.asarray(z) @ (0.5 * np.asarray(layer.cell.linear.kernel[...]))
    expected = {"mean": 0.1 * inner.mean(0), "var": 0.9 + 0.1 * inner.var(0)}
    found = {"mean": layer.cell.norm.mean[...], "var": layer.cell.norm.var[...]}
    assert relative_error(found, expected) < 1e-9

    twin = deq_jax.linen.DEQ(LinenNormed(), solver=SOLVER, normalization=normalization)
    linen_z, changed = twin.apply(variables, x, mutable=["batch_stats"])
    assert relative_error(linen_z, z) < 1e-9
    assert relative_error(changed["batch_stats"]["cell"]["norm"], expected) < 1e-9


calls = {"count": 0}


@dataclasses.dataclass(frozen=True)
class Counted(WeightNorm):
    def __call__(self, params, trainable, statistics):
        calls["count"] += 1
        return super().__call__(params, trainable, statistics)


def loop_shapes(jaxpr, inside=False):
    """Shapes of all values computed inside of while loops."""
    for equation in jaxpr.eqns:
        here = inside or equation.primitive.name == "while"
        if inside:
            yield from (variable.aval.shape for variable in equation.outvars)
        for inner in jex.jaxprs_in_params(equation.params):
            yield from loop_shapes(inner, here)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_effective_weights_are_computed_once_outside_the_loop(kind):
    x, normalization = normal(3, 2), Counted(kernels=named("recurrent"))
    layer = make_nnx(normalization)
    if kind == "nnx":
        layer.solver = Picard(tol=1e-9)
        definition, state = nnx.split(layer)
        call = lambda state, x: nnx.merge(definition, state, copy=True)(x).sum()  # noqa: E731
    else:
        state = linen_variables(layer)
        twin = deq_jax.linen.DEQ(
            LinenFeedForward(), solver=Picard(tol=1e-9), normalization=normalization
        )
        call = lambda state, x: twin.apply(state, x).sum()  # noqa: E731
    calls["count"] = 0
    shapes = set(loop_shapes(jax.make_jaxpr(jax.grad(call))(state, x).jaxpr))
    assert calls["count"] == 1
    assert (3, 4) in shapes  # the state
    assert (4, 4) not in shapes  # anything made of the kernel


def test_cells_without_kernels():
    class Plain(nnx.Module):
        def __call__(self, z, x):
            return 0.5 * z + x

    with pytest.raises(ValueError, match=r"no leaf of params is a kernel; there are \[\]"):
        deq_jax.nnx.DEQ(Plain(), normalization=WeightNorm())
