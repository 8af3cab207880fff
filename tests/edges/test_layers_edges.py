"""Edges of the Flax layers: what is sown, statistics from inside a network, the injection."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Anderson, Picard, SolveStats, Status, deq_fixed_point

pytestmark = pytest.mark.usefixtures("x64")

SOLVER = Anderson(tol=1e-10, max_iter=60)
WEIGHTS = np.random.default_rng(0).normal(size=(3, 3)) * 0.3
X = np.random.default_rng(1).normal(size=(4, 3))


def solution(x):
    z = np.zeros_like(x)
    for _ in range(400):
        z = np.tanh(z @ WEIGHTS + x)
    return z


class SowingCell(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.asarray(WEIGHTS))

    def __call__(self, z, x):
        self.sow(nnx.Intermediate, "state", z)
        h = z @ self.w[...] + x
        self.sow(nnx.Intermediate, "before", h)
        return jnp.tanh(h)


class Cell(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.asarray(WEIGHTS))

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w[...] + x)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        w = self.param("w", lambda _: jnp.asarray(WEIGHTS))
        self.sow("intermediates", "state", z)
        return jnp.tanh(z @ w + x)


def reference_stats(x):
    """The report of the pure function for the same equation."""
    w = jnp.asarray(WEIGHTS)
    f = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
    return deq_fixed_point(f, w, jnp.asarray(x), solver=SOLVER, return_stats=True)[1]


def check_stats(got, x):
    expected = reference_stats(x)
    assert isinstance(got, SolveStats)
    np.testing.assert_array_equal(got.status, Status.CONVERGED)
    np.testing.assert_array_equal(got.iterations, expected.iterations)
    np.testing.assert_array_equal(got.evaluations, expected.evaluations)
    assert got.residual.shape == (len(x),)
    assert (got.residual <= SOLVER.tol).all()


def capture_eagerly(model, x):
    return nnx.capture(model, nnx.Intermediate)(x)


def capture_under_jit(model, x):
    return nnx.jit(lambda model, x: nnx.capture(model, nnx.Intermediate)(x))(model, x)


def capture_under_grad(model, x):
    def loss(model, x):
        z, sown = nnx.capture(model, nnx.Intermediate)(x)
        return z.sum(), (z, sown)

    return nnx.grad(loss, has_aux=True)(model, x)[1]


CAPTURES = [capture_eagerly, capture_under_jit, capture_under_grad]


@pytest.mark.parametrize("capture", CAPTURES)
def test_nnx_what_the_cell_sows_is_that_of_the_equilibrium(capture):
    layer = deq_jax.nnx.DEQ(SowingCell(), solver=SOLVER)
    z, sown = capture(layer, jnp.asarray(X))
    np.testing.assert_allclose(z, solution(X), rtol=0, atol=1e-8)
    (state,) = sown["cell"]["state"].get_value()
    np.testing.assert_array_equal(state, z)
    (before,) = sown["cell"]["before"].get_value()
    np.testing.assert_allclose(before, np.asarray(z) @ WEIGHTS + X, rtol=0, atol=1e-14)


def test_nnx_what_the_cell_sows_outside_of_capture():
    """The older way, of which Flax warns: values lie in the cell and are popped from there."""
    layer = deq_jax.nnx.DEQ(SowingCell(), solver=SOLVER)
    with pytest.warns(DeprecationWarning, match="sow"):
        z = layer(jnp.asarray(X))
    sown = nnx.pop(layer, nnx.Intermediate)
    (state,) = sown["cell"]["state"].get_value()
    np.testing.assert_array_equal(state, z)
    with pytest.warns(DeprecationWarning, match="sow"):
        again = layer(jnp.asarray(2 * X))
    (state,) = nnx.pop(layer, nnx.Intermediate)["cell"]["state"].get_value()
    np.testing.assert_array_equal(state, again)


def test_nnx_a_cell_that_sows_has_the_gradient_of_one_that_does_not():
    def gradient(cell):
        def loss(model):
            z, _ = nnx.capture(model, nnx.Intermediate)(jnp.asarray(X))
            return (z * jnp.asarray(X)).sum()

        return nnx.grad(loss)(deq_jax.nnx.DEQ(cell, solver=SOLVER))["cell"]["w"].get_value()

    # Implicit function theorem, sample by sample.
    z, expected = solution(X), np.zeros((3, 3))
    for value, cotangent in zip(z, X, strict=True):
        slope = 1 - value**2
        u = np.linalg.solve(np.eye(3) - WEIGHTS * slope[None, :], cotangent)
        expected += np.outer(value, slope * u)
    np.testing.assert_allclose(gradient(SowingCell()), expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(gradient(SowingCell()), gradient(Cell()))


@pytest.mark.parametrize("capture", CAPTURES)
def test_nnx_the_layer_sows_its_statistics(capture):
    layer = deq_jax.nnx.DEQ(Cell(), solver=SOLVER)
    _, sown = capture(layer, jnp.asarray(X))
    (stats,) = sown["stats"].get_value()
    check_stats(stats, X)


@pytest.mark.parametrize("capture", CAPTURES)
def test_nnx_statistics_from_inside_a_sequential(capture):
    model = nnx.Sequential(
        lambda x: 2 * x,
        deq_jax.nnx.DEQ(Cell(), solver=SOLVER),
        deq_jax.nnx.DEQ(SowingCell(), solver=SOLVER),
    )
    z, sown = capture(model, jnp.asarray(X))
    first = solution(2 * X)
    np.testing.assert_allclose(z, solution(first), rtol=0, atol=1e-7)
    (stats,) = sown["layers"][1]["stats"].get_value()
    check_stats(stats, 2 * X)
    (stats,) = sown["layers"][2]["stats"].get_value()
    check_stats(stats, first)
    (state,) = sown["layers"][2]["cell"]["state"].get_value()
    np.testing.assert_array_equal(state, z)


def test_nnx_statistics_of_a_layer_that_is_called_twice():
    layer = deq_jax.nnx.DEQ(Cell(), solver=SOLVER)

    def twice(layer, x):
        return layer(layer(x))

    _, sown = nnx.capture(twice, nnx.Intermediate)(layer, jnp.asarray(X))
    first, second = sown["stats"].get_value()
    check_stats(first, X)
    check_stats(second, solution(X))


def test_nnx_nothing_is_sown_where_nobody_captures():
    """No warning (these are errors here), and the layer keeps its structure."""
    layer = deq_jax.nnx.DEQ(Cell(), solver=SOLVER)
    before = jax.tree.structure(nnx.state(layer))
    layer(jnp.asarray(X))
    _, stats = layer(jnp.asarray(X), return_stats=True)
    check_stats(stats, X)
    assert jax.tree.structure(nnx.state(layer)) == before
    _, sown = nnx.capture(layer, nnx.Intermediate)(jnp.asarray(X))
    assert "stats" in sown
    assert jax.tree.structure(nnx.state(layer)) == before


@pytest.mark.parametrize("jit", [False, True])
def test_linen_the_layer_sows_its_statistics(jit):
    layer = deq_jax.linen.DEQ(cell=LinenCell(), solver=SOLVER)
    variables = {"params": layer.init(jax.random.key(0), jnp.asarray(X))["params"]}

    def apply(variables, x):
        return layer.apply(variables, x, mutable=["intermediates"])

    z, changed = (jax.jit(apply) if jit else apply)(variables, jnp.asarray(X))
    np.testing.assert_allclose(z, solution(X), rtol=0, atol=1e-8)
    (stats,) = changed["intermediates"]["stats"]
    check_stats(stats, X)
    (state,) = changed["intermediates"]["cell"]["state"]
    np.testing.assert_array_equal(state, z)


def test_linen_statistics_from_inside_a_sequential():
    layers = [deq_jax.linen.DEQ(cell=LinenCell(), solver=SOLVER) for _ in range(2)]
    model = nn.Sequential(layers)
    variables = {"params": model.init(jax.random.key(0), jnp.asarray(X))["params"]}
    z, changed = model.apply(variables, jnp.asarray(X), mutable=["intermediates"])
    np.testing.assert_allclose(z, solution(solution(X)), rtol=0, atol=1e-7)
    sown = changed["intermediates"]
    check_stats(sown["layers_0"]["stats"][0], X)
    check_stats(sown["layers_1"]["stats"][0], solution(X))
    # Without a mutable collection nothing is returned beside the value.
    np.testing.assert_array_equal(model.apply(variables, jnp.asarray(X)), z)


# The injection.


class OtherInject(nnx.Module):
    """`inject` is something else here: it takes two arguments."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(WEIGHTS))

    def inject(self, prompt, strength):
        raise AssertionError("the layer called a method that is no injection")

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w[...] + x)


class Injecting(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.asarray(WEIGHTS))

    def inject(self, x):
        return 2 * x

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w[...] + x)


class LinenOtherInject(nn.Module):
    def setup(self):
        self.w = self.param("w", lambda _: jnp.asarray(WEIGHTS))

    def inject(self, prompt, strength):
        raise AssertionError("the layer called a method that is no injection")

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w + x)


class LinenInjecting(nn.Module):
    def setup(self):
        self.w = self.param("w", lambda _: jnp.asarray(WEIGHTS))

    def inject(self, x):
        return 2 * x

    def __call__(self, z, x):
        return jnp.tanh(z @ self.w + x)


def nnx_value(cell, **options):
    layer = deq_jax.nnx.DEQ(cell(), solver=SOLVER, **options)
    return layer(jnp.asarray(X)), layer.equation(jnp.asarray(X))[2]


def linen_value(cell, **options):
    layer = deq_jax.linen.DEQ(cell=cell(), solver=SOLVER, **options)
    variables = {"params": layer.init(jax.random.key(0), jnp.asarray(X))["params"]}
    injection = layer.apply(variables, jnp.asarray(X), method="equation")[2]
    return layer.apply(variables, jnp.asarray(X)), injection


WITHOUT = [(nnx_value, OtherInject), (linen_value, LinenOtherInject)]
WITH = [(nnx_value, Injecting), (linen_value, LinenInjecting)]
NO_METHOD = [(nnx_value, Cell), (linen_value, LinenCell)]


@pytest.mark.parametrize(("value", "cell"), WITHOUT, ids=["nnx", "linen"])
def test_a_method_of_that_name_that_is_no_injection(value, cell):
    z, injection = value(cell, inject=False)
    np.testing.assert_allclose(z, solution(X), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(injection, X)


@pytest.mark.parametrize(("value", "cell"), WITH, ids=["nnx", "linen"])
@pytest.mark.parametrize("options", [{}, {"inject": None}, {"inject": True}, {"inject": False}])
def test_the_injection_is_used_where_it_is_asked_for(value, cell, options):
    x = X if options.get("inject") is False else 2 * X
    z, injection = value(cell, **options)
    np.testing.assert_allclose(z, solution(x), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(injection, x)


@pytest.mark.parametrize(("value", "cell"), NO_METHOD, ids=["nnx", "linen"])
@pytest.mark.parametrize("options", [{}, {"inject": None}, {"inject": False}])
def test_a_cell_without_an_injection(value, cell, options):
    z, injection = value(cell, **options)
    np.testing.assert_allclose(z, solution(X), rtol=0, atol=1e-8)
    np.testing.assert_array_equal(injection, X)


@pytest.mark.parametrize(("value", "cell"), NO_METHOD, ids=["nnx", "linen"])
def test_an_injection_that_the_cell_does_not_have(value, cell):
    with pytest.raises((TypeError, ValueError), match=r"inject=True.*\b(Linen)?Cell\b.*inject"):
        value(cell, inject=True)


@pytest.mark.parametrize(("value", "cell"), WITH, ids=["nnx", "linen"])
def test_an_injection_that_is_no_flag(value, cell):
    with pytest.raises(TypeError, match=r"inject must be .*got 'yes'"):
        value(cell, inject="yes")


def test_nnx_layer_state_is_the_same_with_and_without_the_option():
    """The option is static: it adds no leaf to the state that checkpoints hold."""
    structures = [
        jax.tree.structure(nnx.state(deq_jax.nnx.DEQ(Injecting(), solver=Picard(), **options)))
        for options in ({}, {"inject": True})
    ]
    assert structures[0] == structures[1]
