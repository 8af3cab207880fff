"""The Flax layers: NNX = Linen = the formula; options, tracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Anderson, BackwardProbe, Control, Picard
from deq_jax.cells.feedforward import FeedForwardCell
from deq_jax.cells.resnet import ResNetCell
from tests.models.test_conv_deq import cell_formula, randomise, weights_of
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

SOLVER = Anderson(tol=1e-12, max_iter=100)
F64 = {"param_dtype": jnp.float64}


pytestmark = pytest.mark.usefixtures("x64", "standard_promotion")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


class Dense(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.recurrent = nnx.Linear(3, 3, use_bias=False, **F64, rngs=rngs)
        self.input = nnx.Linear(3, 3, **F64, rngs=rngs)

    def __call__(self, z, x):
        return jnp.tanh(0.3 * self.recurrent(z) + self.input(x))


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        recurrent = nn.Dense(3, use_bias=False, **F64, name="recurrent")
        return jnp.tanh(0.3 * recurrent(z) + nn.Dense(3, **F64, name="input")(x))


class Wide(nnx.Module):
    """Of a state twice as wide as the input, which is one equation as a whole."""

    batched = False

    def zeros(self, x):
        return jnp.zeros((len(x), 2 * x.shape[1]), x.dtype)

    def __call__(self, z, x):
        return 0.25 * z + jnp.concatenate([x, -x], axis=1)


class LinenWide(nn.Module):
    batched = False

    def zeros(self, x):
        return jnp.zeros((len(x), 2 * x.shape[1]), x.dtype)

    @nn.compact
    def __call__(self, z, x):
        scale = self.param("scale", nn.initializers.constant(0.25, jnp.float64), ())
        return scale * z + jnp.concatenate([x, -x], axis=1)


def dense(params, z, x):
    injection = x @ params["input"]["kernel"] + params["input"]["bias"]
    return jnp.tanh(0.3 * (z @ params["recurrent"]["kernel"]) + injection)


class LinenFeedForward(nn.Module):
    def setup(self):
        self.recurrent = nn.Dense(4, use_bias=False, **F64)
        self.input = nn.Dense(4, **F64)

    def inject(self, x):
        return self.input(x)

    def __call__(self, z, injection):
        return jnp.tanh(self.recurrent(z) + injection)


def feed_forward(params, z, x):
    injection = x @ params["input"]["kernel"] + params["input"]["bias"]
    return jnp.tanh(z @ params["recurrent"]["kernel"] + injection)


class LinenResidual(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        def conv(features, name):
            return nn.Conv(features, (3, 3), use_bias=False, **F64, name=name)

        def norm(name):
            return nn.GroupNorm(2, epsilon=1e-5, **F64, name=name)

        y = norm("norm1")(nn.relu(conv(6, "conv1")(z)))
        return norm("norm3")(nn.relu(z + norm("norm2")(x + conv(4, "conv2")(y))))


# NNX cell, Linen cell, formula, shape of x, shape of z.
CELLS = {
    "dense": (Dense, LinenDense, dense, (4, 3), (4, 3)),
    "inject": (
        lambda: FeedForwardCell(2, 4, **F64, rngs=nnx.Rngs(0)),
        LinenFeedForward,
        feed_forward,
        (3, 2),
        (3, 4),
    ),
    "residual": (
        lambda: randomise(ResNetCell(4, 6, groups=2, **F64, rngs=nnx.Rngs(0))),
        LinenResidual,
        lambda params, z, x: cell_formula(params, z, x, 2),
        (2, 3, 3, 4),
        (2, 3, 3, 4),
    ),
}


@pytest.mark.museum(
    "Linen, while_loop over a bound module: the forward pass works and the reverse pass is a "
    "ValueError"
)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.slow
def test_both_are_the_formula(name):
    make_cell, linen_cell, formula, x_shape, z_shape = CELLS[name]
    x, cotangent = 2 * normal(*x_shape), normal(*z_shape, seed=2)
    layer = deq_jax.nnx.DEQ(make_cell(), solver=SOLVER)
    params = weights_of(layer.cell)
    definition, state = nnx.split(layer)

    def nnx_loss(state, x):
        z = nnx.merge(definition, state)(x)
        return jnp.vdot(cotangent, z), z

    def linen_loss(params, x):
        layer = deq_jax.linen.DEQ(linen_cell(), solver=SOLVER)
        z = layer.apply({"params": {"cell": params}}, x)
        return jnp.vdot(cotangent, z), z

    def gradient(loss, params):
        (_, z), gradients = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(params, x)
        return z, gradients

    nnx_z, (by_state, nnx_by_x) = gradient(nnx_loss, state)
    linen_z, linen_gradients = gradient(linen_loss, params)
    z = newton_equilibrium(lambda z: formula(params, z, x), nnx_z)
    expected = implicit_gradient(
        lambda inputs, z: formula(inputs[0], z, inputs[1]), (params, x), z, cotangent
    )
    nnx_gradients = nnx.to_pure_dict(by_state)["cell"], nnx_by_x
    assert relative_error(nnx_z, z) < 1e-10
    assert relative_error(linen_z, z) < 1e-10
    assert relative_error(nnx_gradients, expected) < 1e-8
    assert relative_error(linen_gradients, expected) < 1e-8


def nnx_layer(**options):
    return deq_jax.nnx.DEQ(Dense(), **options)


def linen_layer(**options):
    layer = deq_jax.linen.DEQ(LinenDense(), **options)
    variables = {"params": {"cell": weights_of(Dense())}}
    return lambda *args, **kwargs: layer.apply(variables, *args, **kwargs)


@pytest.mark.parametrize("make", [nnx_layer, linen_layer])
@pytest.mark.slow
def test_options_reach_the_solve(make):
    x, params = normal(4, 3), weights_of(Dense())
    solver = Picard(tol=1e-8, max_iter=90, trace=True)
    z, stats = make(solver=solver)(x, return_stats=True)
    assert stats.trace.shape == (90, 4)
    assert stats.evaluations > 4
    residual = np.linalg.norm(dense(params, z, x) - z, axis=1) / np.linalg.norm(z, axis=1)
    np.testing.assert_allclose(stats.residual, residual, rtol=1e-3)

    again, stats = make(solver=solver)(x, z, return_stats=True)
    assert stats.evaluations == 1
    np.testing.assert_array_equal(again, z)

    def loss(probe):
        return (make(solver=SOLVER)(x, backward_probe=probe) ** 2).sum()

    report = jax.grad(loss)(BackwardProbe.zeros(4))
    assert (report.residual <= SOLVER.tol).all()
    assert (report.iterations > 2).all()

    single, stats = make(solver=SOLVER, batched=False)(x[0], return_stats=True)
    assert stats.residual.shape == ()
    assert relative_error(single, newton_equilibrium(lambda z: dense(params, z, x[0]), x[0])) < 1e-9


traces = {"count": 0}


class Counted(Dense):
    def __call__(self, z, x):
        traces["count"] += 1
        return super().__call__(z, x)


class LinenCounted(LinenDense):
    @nn.compact
    def __call__(self, z, x):
        traces["count"] += 1
        self.sow("intermediates", "state", z)
        return super().__call__(z, x)


def test_linen_init_calls_the_cell_once():
    x, layer = normal(4, 3), deq_jax.linen.DEQ(LinenCounted(), solver=SOLVER)
    traces["count"] = 0
    z, variables = layer.init_with_output(jax.random.key(0), x)
    assert traces["count"] == 1
    assert set(variables["params"]) == {"cell"}
    assert jax.tree.map(jnp.shape, variables["params"]["cell"]) == {
        "recurrent": {"kernel": (3, 3)},
        "input": {"kernel": (3, 3), "bias": (3,)},
    }
    np.testing.assert_allclose(z, dense(variables["params"]["cell"], jnp.zeros_like(x), x))
    (_, stats), _ = layer.init_with_output(jax.random.key(0), x, return_stats=True)
    assert stats.residual.shape == (4,)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_second_eager_call_does_not_trace(kind):
    if kind == "nnx":
        layer = deq_jax.nnx.DEQ(Counted(), solver=SOLVER)
    else:
        variables = {"params": {"cell": weights_of(Dense())}}
        layer = lambda x: deq_jax.linen.DEQ(LinenCounted(), solver=SOLVER).apply(  # noqa: E731
            variables, x
        )
    first = layer(normal(4, 3))
    before = traces["count"]  # not set to 0: the cell uses this dict, and would be traced anew
    second = layer(normal(4, 3, seed=1))
    assert traces["count"] == before > 0
    assert relative_error(first, second) > 0.1


@pytest.mark.parametrize("framework", ["nnx", "linen"])
@pytest.mark.slow
def test_a_cell_says_where_to_start_and_whether_it_has_a_batch(framework):
    x = normal(3, 2)
    if framework == "nnx":
        layer = deq_jax.nnx.DEQ(Wide(), solver=SOLVER)
    else:
        module = deq_jax.linen.DEQ(LinenWide(), solver=SOLVER)
        variables = module.init(jax.random.key(0), x)

        def layer(*arguments, **options):
            return module.apply(variables, *arguments, **options)

    z, stats = layer(x, return_stats=True)
    np.testing.assert_allclose(z, np.c_[x, -x] / 0.75, rtol=1e-10)
    assert stats.residual.shape == ()
    start = normal(3, 4, seed=1)
    given, _ = layer(x, start, return_stats=True, control=Control(budget=1, select="last"))
    assert relative_error(given, 0.25 * start + np.c_[x, -x]) < 1e-12
