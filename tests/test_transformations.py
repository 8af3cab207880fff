"""`deq_fixed_point` under JAX's transformations, against dense solves and unrolled loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    Implicit,
    Neumann,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

ANDERSON = Anderson(tol=1e-13, max_iter=100)
SOLVER = Picard(tol=1e-13, max_iter=300)  # quicker to compile

pytestmark = pytest.mark.usefixtures("x64")


def cell(params, z, x):
    return jnp.tanh(z @ params["W"] + x @ params["U"])


def make_params(seed=0, scale=0.3):
    rng = np.random.default_rng(seed)
    return {
        "W": jnp.asarray(scale * rng.normal(size=(3, 3))),
        "U": jnp.asarray(rng.normal(size=(3, 3))),
    }


def normal(*shape, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def layer(params, x, z0=None, **options):
    return deq_fixed_point(cell, params, x, z0, **{"solver": SOLVER, **options})


def loss(params, x, cotangent, **options):
    return jnp.vdot(cotangent, layer(params, x, **options))


def dense(params, x, cotangent):
    """Equilibrium and gradients with respect to params and x."""
    z = newton_equilibrium(lambda z: cell(params, z, x), jnp.zeros_like(x))
    gradients = implicit_gradient(lambda inputs, z: cell(inputs[0], z, inputs[1]),
                                  (params, x), z, cotangent)  # fmt: skip
    return z, gradients


def unrolled(params, x, steps=150):
    """The equilibrium by plain iteration, differentiable by ordinary backpropagation."""

    def step(z, _):
        return (cell(params, z, x), None)

    return jax.lax.scan(step, jnp.zeros_like(x), length=steps)[0]


WRAPPERS = {
    "grad": lambda f: jax.grad(f, (0, 1)),
    "jit of grad": lambda f: jax.jit(jax.grad(f, (0, 1))),
    "grad of jit": lambda f: jax.grad(jax.jit(f), (0, 1)),
    "grad of checkpoint": lambda f: jax.grad(jax.checkpoint(f), (0, 1)),
    "jit of grad of checkpoint": lambda f: jax.jit(jax.grad(jax.checkpoint(f), (0, 1))),
    "grad of checkpoint saving nothing": lambda f: jax.grad(
        jax.checkpoint(f, policy=jax.checkpoint_policies.nothing_saveable), (0, 1)
    ),
}


@pytest.mark.museum("DEQ.jl: tests looked at gradients for being finite and no further")
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradient_is_the_dense_one(wrapper):
    params, x, cotangent = make_params(), normal(4, 3), normal(4, 3, seed=2)
    gradients = WRAPPERS[wrapper](loss)(params, x, cotangent)
    assert relative_error(gradients, dense(params, x, cotangent)[1]) < 1e-10


@pytest.mark.parametrize("over", ["params", "x", "both"])
@pytest.mark.slow
def test_vmap(over):
    models = [make_params(seed) for seed in range(3)] if over != "x" else [make_params()] * 3
    inputs = [normal(2, 3, seed=s) * (s + 1) for s in range(3)] if over != "params" else (
        [normal(2, 3)] * 3
    )  # fmt: skip
    cotangent = normal(2, 3, seed=9)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    params_axis, params = (None, models[0]) if over == "x" else (0, stacked)
    x_axis, x = (None, inputs[0]) if over == "params" else (0, jnp.stack(inputs))

    def both(params, x):
        value, stats = layer(params, x, return_stats=True, solver=ANDERSON)
        return value, stats, jax.grad(loss, (0, 1))(params, x, cotangent, solver=ANDERSON)

    value, stats, gradients = jax.jit(jax.vmap(both, (params_axis, x_axis)))(params, x)
    assert stats.residual.shape == stats.iterations.shape == stats.status.shape == (3, 2)
    assert stats.evaluations.shape == (3,)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(stats.evaluations, stats.iterations.max(1))
    for i, (one_params, one_x) in enumerate(zip(models, inputs, strict=True)):
        expected_value, expected = dense(one_params, one_x, cotangent)
        assert relative_error(value[i], expected_value) < 1e-11
        assert relative_error(jax.tree.map(lambda leaf: leaf[i], gradients), expected) < 1e-10


@pytest.mark.slow
def test_vmap_gradient_of_shared_params_is_the_sum():
    params, x, cotangent = make_params(), normal(3, 2, 3), normal(3, 2, 3, seed=2)

    def total(params):
        return jnp.vdot(cotangent, jax.vmap(lambda x: layer(params, x))(x))

    expected = [dense(params, x[i], cotangent[i])[1][0] for i in range(3)]
    summed = jax.tree.map(lambda *leaves: sum(leaves), *expected)
    assert relative_error(jax.jit(jax.grad(total))(params), summed) < 1e-10


@pytest.mark.parametrize(
    "policy",
    [Implicit(GMRES(tol=1e-13)), Neumann(80), Unrolled()],
    ids=lambda policy: type(policy).__name__,
)
@pytest.mark.slow
def test_vmap_over_a_named_axis_that_f_communicates_over(policy):
    """What is mapped over is coupled, so that all of it has to make as many trips."""
    matrix, x = 0.3 * normal(3, 3), normal(4, 2, 3, seed=2) * jnp.logspace(-2, 1, 4)[:, None, None]
    cotangent = normal(4, 2, 3, seed=3)
    solver = Picard(tol=1e-13, max_iter=80)

    def coupled(mean):
        return lambda matrix, z, x: jnp.tanh((z - 0.5 * mean(z)) @ matrix + x)

    def mapped(matrix, x):
        f = coupled(lambda z: jax.lax.pmean(z, "models"))
        one = functools.partial(deq_fixed_point, f, matrix, solver=solver, gradient=policy)
        return jax.vmap(one, axis_name="models")(x)

    def whole(matrix, x):
        f = coupled(lambda z: z.mean(0))
        return jax.lax.scan(lambda z, _: (f(matrix, z, x), None), jnp.zeros_like(x), length=200)[0]

    got, expected = (
        jax.jit(jax.grad(lambda *args: jnp.vdot(cotangent, solve(*args)), (0, 1)))(matrix, x)
        for solve in (mapped, whole)
    )
    assert relative_error(got, expected) < 1e-9


@pytest.mark.slow
def test_probe_under_vmap_and_jit():
    params, x, cotangent = make_params(), normal(3, 2, 3), normal(2, 3, seed=2)

    def probed(probe, x):
        return jnp.vdot(cotangent, layer(params, x, backward_probe=probe))

    probe = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), BackwardProbe.zeros(2))
    report = jax.jit(jax.vmap(jax.grad(probed)))(probe, x)
    assert report.residual.shape == (3, 2)
    assert (report.residual <= SOLVER.tol).all()
    assert (report.iterations >= 3).all()
    np.testing.assert_array_equal(report.evaluations, report.iterations.max(1))


def recurrent(step, params, xs):
    """States `[T, B, 3]` of a recurrence whose step gets the state before."""

    def advance(h, x):
        h = step(params, x + jnp.roll(h, 1, axis=1), h)
        return h, h

    return jax.lax.scan(advance, jnp.zeros(xs.shape[1:]), xs)[1]


@pytest.mark.slow
def test_scan_over_time_with_warm_start():
    params, xs, cotangent = make_params(), normal(5, 2, 3), normal(5, 2, 3, seed=2)

    def total(step, params, xs):
        return jnp.vdot(cotangent, recurrent(step, params, xs))

    def gradient(step):
        return jax.jit(jax.value_and_grad(functools.partial(total, step), (0, 1)))(params, xs)

    expected = gradient(lambda params, x, h: unrolled(params, x))
    warm = functools.partial(layer, solver=ANDERSON)
    assert relative_error(gradient(warm), expected) < 1e-10


def test_warm_start_at_the_solution_ends_at_once():
    params, x = make_params(), normal(2, 3)

    def advance(z, _):
        z, stats = layer(params, x, z, return_stats=True, solver=Picard(tol=1e-9, max_iter=200))
        return z, stats.evaluations

    _, evaluations = jax.lax.scan(advance, jnp.zeros_like(x), length=3)
    assert evaluations[0] > 5
    np.testing.assert_array_equal(evaluations[1:], 1)


@pytest.mark.museum(
    "torchdeq T8: two forward passes before one backward pass never returned, since both shared "
    "one hook"
)
@pytest.mark.slow
def test_two_solves_before_one_backward_pass():
    params, first, second = make_params(), normal(2, 3), normal(2, 3, seed=2)

    def siamese(params):
        a, b = layer(params, first), layer(params, second)
        return jnp.sum((a - b) ** 2) + a[0, 0] * b[1, 2]

    zeros = jnp.zeros((2, 3))
    a, b = dense(params, first, zeros)[0], dense(params, second, zeros)[0]
    by_a = (2 * (a - b)).at[0, 0].add(b[1, 2])
    by_b = (2 * (b - a)).at[1, 2].add(a[0, 0])
    expected = jax.tree.map(
        jnp.add, dense(params, first, by_a)[1][0], dense(params, second, by_b)[1][0]
    )
    assert relative_error(jax.grad(siamese)(params), expected) < 1e-10


KEYS = {"typed": jax.random.key, "legacy": jax.random.PRNGKey}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.slow
def test_keys_integers_and_booleans_among_params_and_x(kind, jit):
    params, x, cotangent = make_params(), normal(4, 3), normal(4, 3, seed=2)
    extra = {"key": KEYS[kind](3), "shift": jnp.asarray(1), "flag": jnp.asarray(True)}
    labels = jnp.arange(3)

    def noisy(params, z, inputs):
        x, labels = inputs
        x = x + jax.random.normal(params["key"], x.shape, x.dtype)
        rolled = jnp.roll(z, params["shift"], axis=1)
        out = cell(params, rolled[:, labels], x)
        return jnp.where(params["flag"], out, jnp.nan)

    def total(weights, x):
        z0 = jnp.zeros_like(x)
        z = deq_fixed_point(noisy, weights | extra, (x, labels), z0, solver=SOLVER)
        return jnp.vdot(cotangent, z)

    gradient = jax.grad(total, (0, 1))
    gradients = (jax.jit(gradient) if jit else gradient)(params, x)

    noise = jax.random.normal(extra["key"], x.shape, x.dtype)

    def plain(inputs, z):
        return cell(inputs[0], jnp.roll(z, 1, axis=1), inputs[1] + noise)

    z = newton_equilibrium(lambda z: plain((params, x), z), jnp.zeros_like(x))
    assert relative_error(gradients, implicit_gradient(plain, (params, x), z, cotangent)) < 1e-10


def test_integers_differentiated_with_allow_int_get_float0():
    def total(params, x):
        def f(params, z, x):
            return cell(params, jnp.roll(z, params["shift"], axis=1), x)

        return deq_fixed_point(f, params, x, solver=SOLVER).sum()

    params = make_params() | {"shift": jnp.asarray(1)}
    gradients = jax.grad(total, allow_int=True)(params, normal(4, 3))
    assert gradients["shift"].dtype == jax.dtypes.float0
    assert np.abs(gradients["W"]).min() > 0


@pytest.mark.museum(
    "jaxopt J4 (google/jaxopt#31, #111): a function that closed over what was differentiated "
    "ended in an UnexpectedTracerError"
)
@pytest.mark.parametrize("jit", [False, True])
def test_closure_over_what_is_differentiated(jit):
    params, x, cotangent = make_params(), normal(4, 3), normal(4, 3, seed=2)

    def total(params, x):
        def f(nothing, z, also_nothing):
            return cell(params, z, x)

        return jnp.vdot(cotangent, deq_fixed_point(f, (), (), jnp.zeros_like(x), solver=SOLVER))

    gradient = jax.grad(total, (0, 1))
    gradients = (jax.jit(gradient) if jit else gradient)(params, x)
    assert relative_error(gradients, dense(params, x, cotangent)[1]) < 1e-10


@pytest.mark.museum("torchdeq T2: second-order gradients were 170 % wrong without an exception")
@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.slow
def test_gradient_of_gradient(jit):
    params, x, cotangent = make_params(), normal(2, 3), normal(2, 3, seed=2)

    def curvature(equilibrium, params, x):
        def total(params, x):
            return jnp.vdot(cotangent, equilibrium(params, x))

        gradients = jax.grad(total, (0, 1))(params, x)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(gradients))

    expected = jax.jit(jax.grad(functools.partial(curvature, unrolled), (0, 1)))(params, x)
    second = jax.grad(functools.partial(curvature, layer), (0, 1))
    assert relative_error((jax.jit(second) if jit else second)(params, x), expected) < 1e-9


@pytest.mark.museum("google/jaxopt#606: a solver put a tracer of its own into a static value")
@pytest.mark.slow
def test_nothing_leaks():
    params, x, cotangent = make_params(), normal(2, 3), normal(2, 3, seed=2)
    expected = dense(params, x, cotangent)[1]

    def total(params, x):  # closes over a tracer, the case that can leak
        def f(nothing, z, x):
            return cell(params, z, x)

        return jnp.vdot(cotangent, deq_fixed_point(f, (), x, solver=SOLVER))

    with jax.checking_leaks():
        gradients = jax.jit(jax.grad(total, (0, 1)))(params, x)
        again = jax.grad(loss, (0, 1))(params, x, cotangent)
    assert relative_error(gradients, expected) < 1e-10
    assert relative_error(again, expected) < 1e-10


def test_eval_shape_and_shapes_of_gradients():
    params, x = make_params(), jax.ShapeDtypeStruct((5, 3), jnp.float64)
    solve = functools.partial(layer, return_stats=True, solver=Picard(trace=True, max_iter=7))
    value, stats = jax.eval_shape(solve, params, x)
    assert (value.shape, value.dtype) == ((5, 3), jnp.float64)
    assert (stats.residual.shape, stats.residual.dtype) == ((5,), jnp.float64)
    assert (stats.iterations.shape, stats.iterations.dtype) == ((5,), jnp.int32)
    assert (stats.evaluations.shape, stats.trace.shape) == ((), (7, 5))
    by_params, by_x = jax.eval_shape(jax.grad(loss, (0, 1)), params, x, x)
    assert jax.tree.map(jnp.shape, by_params) == {"W": (3, 3), "U": (3, 3)}
    assert by_x.shape == (5, 3)
