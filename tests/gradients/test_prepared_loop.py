"""What `prepare` leaves in the loop, and what it does there. Read from jaxprs and CPU code."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.extend import core

from deq_jax import (
    Anderson,
    Phantom,
    Picard,
    Reversed,
    Reversible,
    Truncated,
    Unrolled,
    deq_fixed_point,
)
from deq_jax.cells.resnet import ResNetCell
from deq_jax.closure import Closure
from deq_jax.passes import ready_for_loop, ready_to_differentiate
from deq_jax.stability import jacobian_spectral_norm
from tests.gradients.test_prepared import (
    CELLS,
    FORMS,
    W,
    Z,
    conv,
    normal,
    plain,
    primitives,
    transposed,
)
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("x64")


def lowered(function, u):
    """What a trip of the loop is on this machine; captured arrays are arguments of it."""
    closed = jax.make_jaxpr(function)(u)

    def trip(constants, u):
        return jax.core.eval_jaxpr(closed.jaxpr, constants, u)

    return jax.jit(trip).lower(closed.consts, u)


def dimension_numbers(lowered):
    """Dimension numbers of the convolutions, as StableHLO writes them."""
    lines = [line for line in lowered.as_text().splitlines() if "stablehlo.convolution" in line]
    return [line.split("dim_numbers = ")[1].split(", window")[0] for line in lines]


HWIO = {
    3: "[b, 0, f]x[0, i, o]->[b, 0, f]",
    4: "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]",
    5: "[b, 0, 1, 2, f]x[0, 1, 2, i, o]->[b, 0, 1, 2, f]",
}


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"batch groups"}))
def test_on_the_cpu_convolutions_are_channels_last(form):
    z_shape, kernel_shape, options = FORMS[form]

    def f(kernel, z):
        return conv(z, kernel, **options)

    kernel, z = normal(*kernel_shape), normal(*z_shape)
    product = transposed(f, kernel, z)
    u = f(kernel, z)
    expected = [HWIO[z.ndim]]
    assert dimension_numbers(lowered(ready_for_loop(product), u)) == expected
    assert dimension_numbers(lowered(product, u)) != expected


@pytest.mark.parametrize("name", [name for name in CELLS if CELLS[name][1] is None])
def test_under_checkpoint_only_the_kernel_is_prepared(name):
    product = transposed(CELLS[name][0], normal(*W), normal(*Z))
    u = normal(*Z)

    def reversals_and_convolutions(function):
        text = lowered(function, u).compile().as_text()
        return text.count(" reverse("), text.count(" convolution(")

    # Two convolutions: the recomputed one and the transposed one.
    assert reversals_and_convolutions(product) == (1, 2)
    assert reversals_and_convolutions(ready_for_loop(product)) == (0, 2)


def prepared_jaxpr(f, params, z):
    return jax.make_jaxpr(ready_for_loop(Closure.of(lambda z: f(params, z), z)))(z)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_what_depends_on_constants_alone_is_done_before(wrap):
    params = normal(4, 4), normal(4, 4, seed=1), normal(3, 4, seed=2), normal(4, seed=3)

    @wrap
    def f(params, z):
        w, u, x, b = params
        gain = jnp.exp(w) / jnp.linalg.norm(w)
        return jnp.tanh(z @ gain + x @ u + b)

    z = normal(3, 4)
    jaxpr = prepared_jaxpr(f, params, z)
    names = list(primitives(jaxpr))
    assert names.count("dot_general") == 1
    assert not {"exp", "sqrt", "div", "reduce_sum"}.intersection(names)
    (got,) = core.jaxpr_as_fun(jaxpr)(z)
    assert relative_error(got, f(params, z)) < 1e-14


def test_under_checkpoint_other_work_stays():
    params = normal(*W), normal(4, 4, seed=1)

    @jax.checkpoint
    def f(params, z):
        kernel, matrix = params
        return conv(z, kernel) * (matrix @ matrix).sum()

    names = list(primitives(prepared_jaxpr(f, params, normal(*Z))))
    assert "dot_general" in names
    assert "conv_general_dilated" in names


def test_a_kernel_that_depends_on_the_state_is_laid_out_too():
    z, kernel = normal(2, 4, 5, 6), normal(4, 4, 3, 3)

    def f(kernel, z):
        return conv(z, kernel * z[0, 0, 0, 0], dims=("NCHW", "OIHW", "NCHW"))

    numbers = dimension_numbers(lowered(ready_for_loop(Closure.of(lambda z: f(kernel, z), z)), z))
    assert numbers == [HWIO[4]]


@pytest.mark.parametrize("form", sorted(set(FORMS) - {"batch groups"}))
def test_the_gradient_of_a_kernel_is_channels_last(form):
    """As the loops of `Phantom` and `Reversed` take it, together with that of the state."""
    z_shape, kernel_shape, options = FORMS[form]
    kernel, z = normal(*kernel_shape), normal(*z_shape)
    out, pullback = jax.vjp(lambda kernel, z: conv(z, kernel, **options), kernel, z)
    u = normal(*out.shape, seed=3)
    product = ready_for_loop(Closure.of(pullback, out))
    if "feature_group_count" not in options:  # a kernel's gradient has groups of the batch then
        assert set(dimension_numbers(lowered(product, u))) == {HWIO[z.ndim]}
    for got, expected in zip(jax.jit(product)(u), jax.jit(pullback)(u), strict=True):
        assert relative_error(got, expected) < 1e-13


def unrolled(f, kernel, z):
    """The loss of three steps of f in a loop that can be differentiated."""
    first = f(kernel, z)
    if first.shape != z.shape:  # a state that can be fed to f again
        return (jnp.sin(first) * normal(*first.shape, seed=4)).sum()
    step = jax.checkpoint(lambda z, _: (jnp.tanh(f(kernel, z)), None))
    return (lax.scan(step, z, length=3)[0] * normal(*z.shape, seed=4)).sum()


def ready(f):
    """`f(kernel, z)`, made ready for a loop that is differentiated."""
    return lambda kernel, z: ready_to_differentiate(Closure.of(lambda z: f(kernel, z), z))(z)


def check_derivatives(f, kernel, z):
    """Gradients, tangents, and a tangent of the gradient, against those of f as it was written."""
    tangent = normal(*kernel.shape, seed=5), normal(*z.shape, seed=6)

    def everything(f):
        gradient = jax.grad(functools.partial(unrolled, f), (0, 1))
        return jax.jit(lambda *args: jax.jvp(gradient, args, tangent))(kernel, z)

    for got, expected in zip(
        jax.tree.leaves(everything(ready(f))), jax.tree.leaves(everything(f)), strict=True
    ):
        assert relative_error(got, expected) < 1e-12
    gradient = jax.grad(functools.partial(unrolled, ready(f)), (0, 1))
    return dimension_numbers(jax.jit(gradient).lower(kernel, z))


@pytest.mark.parametrize("form", FORMS)
def test_differentiated_loops_are_channels_last(form):
    z_shape, kernel_shape, options = FORMS[form]
    grouped = {"feature_group_count", "batch_group_count"}.intersection(options)
    numbers = check_derivatives(
        lambda kernel, z: conv(z, kernel, **options), normal(*kernel_shape), normal(*z_shape)
    )
    assert grouped or set(numbers) == {HWIO[len(z_shape)]}


@pytest.mark.parametrize("name", sorted(set(CELLS) - {"custom_vjp"}))
def test_derivatives_of_nested_convolutions(name):
    check_derivatives(CELLS[name][0], 0.3 * normal(*W, seed=1), normal(*Z))


def test_a_gradient_rule_is_kept():
    f = CELLS["custom_vjp"][0]
    kernel, z = 0.3 * normal(*W, seed=1), normal(*Z)
    gradients = [jax.grad(lambda z, f=f: unrolled(f, kernel, z))(z) for f in (f, ready(f))]
    assert relative_error(gradients[1], gradients[0]) < 1e-13


def test_derivatives_of_one_argument_alone():
    kernel, z = 0.3 * normal(*W, seed=1), normal(*Z)
    for argument in (0, 1):
        got, expected = (
            jax.jit(jax.grad(functools.partial(unrolled, f), argument))(kernel, z)
            for f in (ready(plain), plain)
        )
        assert relative_error(got, expected) < 1e-13
    gradient = jax.jit(jax.grad(functools.partial(unrolled, ready(plain)), 1)).lower(kernel, z)
    assert len(dimension_numbers(gradient)) == 3  # forwards, recomputed, transposed


@pytest.mark.parametrize(
    "gradient", [Unrolled(), Truncated(3), Phantom(3), Reversed()], ids=lambda g: type(g).__name__
)
def test_policies_that_differentiate_in_loops_are_on_the_fast_path(gradient):
    solver = Reversible(max_iter=6) if isinstance(gradient, Reversed) else Picard(max_iter=6)

    def loss(kernel, x):
        def f(kernel, z, x):
            return jnp.tanh(conv(z, kernel) + x)

        return deq_fixed_point(f, kernel, x, solver=solver, gradient=gradient).sum()

    text = jax.jit(jax.grad(loss)).lower(0.1 * normal(*W), normal(*Z)).compile().as_text()
    labels = set(re.findall(r"dim_labels=([\w>-]+)", text))
    assert labels == {"b01f_01io->b01f"}


def test_spread_out_scalars_are_not_stored():
    z = normal(50, 60)

    def f(scalar, z):
        bias = jnp.broadcast_to(scalar, z.shape) + 1.0
        return jnp.where(jnp.arange(60) < 7, z * bias, 0.0) + jnp.full(z.shape, 3.0)

    jaxpr = prepared_jaxpr(f, jnp.asarray(0.5), z)
    assert max(np.size(const) for const in jaxpr.consts) <= 60
    (got,) = core.jaxpr_as_fun(jaxpr)(z)
    assert relative_error(got, f(0.5, z)) < 1e-14


def while_bodies(jaxpr):
    """Bodies of the while loops that a jaxpr runs, nested ones included."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_linear_solve":  # of its four functions it runs one
            yield from while_bodies(equation.params["jaxprs"].solve)
            continue
        if equation.primitive.name == "while":
            yield equation.params["body_jaxpr"]
        for inner in core.jaxprs_in_params(equation.params):
            yield from while_bodies(inner)


@pytest.mark.slow
def test_loops_of_an_ordinary_cell_turn_no_kernel():
    with jax.numpy_dtype_promotion("standard"):
        cell = ResNetCell(4, 8, groups=2, rngs=nnx.Rngs(0))
        definition, params = nnx.split(cell)

        def loss(params, x):
            f = lambda params, z, x: nnx.merge(definition, params)(z, x)  # noqa: E731
            return deq_fixed_point(f, params, x, solver=Picard()).sum()

        gradient = jax.make_jaxpr(jax.grad(loss))(params, normal(*Z).astype(jnp.float32))
    bodies = list(while_bodies(gradient))
    convolutions = [list(primitives(body)).count("conv_general_dilated") for body in bodies]
    assert len(bodies) == 2
    assert convolutions == [2, 2]  # the forward loop and the backward one
    assert "rev" in primitives(gradient)
    assert not any("rev" in primitives(body) for body in bodies)


WRAPPERS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit in checkpoint": lambda f: jax.checkpoint(jax.jit(f)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_callbacks_run_once_an_evaluation(wrapper):
    calls = {"state": 0, "kernel": 0}

    def count(name, _):
        calls[name] += 1

    @WRAPPERS[wrapper]
    def f(kernel, z, x):
        jax.debug.callback(count, "kernel", kernel[0, 0, 0, 0])  # of the constants alone
        jax.debug.callback(count, "state", z[0, 0, 0, 0])
        return jnp.tanh(conv(z, kernel) + x)

    solve = jax.jit(
        lambda kernel, x: deq_fixed_point(f, kernel, x, solver=Picard(), return_stats=True)
    )
    _, stats = solve(0.05 * normal(*W), normal(*Z))
    jax.effects_barrier()
    assert stats.evaluations > 3
    assert calls == {"state": stats.evaluations, "kernel": stats.evaluations}


@pytest.mark.slow
def test_second_derivatives_through_convolutions():
    kernel, x, cotangent = 0.1 * normal(3, 3, 2, 2), normal(1, 4, 3, 2), normal(1, 4, 3, 2, seed=2)

    def f(kernel, z, x):
        return jax.checkpoint(jnp.tanh)(conv(z, kernel) + x)

    def solved(kernel, x):
        return deq_fixed_point(f, kernel, x, solver=Anderson(tol=1e-13, max_iter=100))

    def unrolled(kernel, x):
        step = lambda z, _: (f(kernel, z, x), None)  # noqa: E731
        return lax.scan(step, jnp.zeros_like(x), length=120)[0]

    def second(equilibrium):
        loss = lambda kernel, x: jnp.vdot(cotangent, equilibrium(kernel, x))  # noqa: E731

        def curvature(kernel, x):
            gradients = jax.grad(loss, (0, 1))(kernel, x)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in gradients)

        return jax.jit(jax.grad(curvature, (0, 1)))(kernel, x)

    assert relative_error(second(solved), second(unrolled)) < 1e-9


def test_power_iteration_for_the_spectral_norm_is_on_the_fast_path():
    kernel, z = 0.1 * normal(*W), normal(*Z)

    def norm(kernel):
        f = lambda kernel, z, x: jnp.tanh(conv(z, kernel) + x)  # noqa: E731
        return jacobian_spectral_norm(f, kernel, z, z, jax.random.key(0)).sum()

    text = jax.jit(norm).lower(kernel).compile().as_text()
    assert set(re.findall(r"dim_labels=([\w>-]+)", text)) == {"b01f_01io->b01f"}
