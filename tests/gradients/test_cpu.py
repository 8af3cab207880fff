"""What is done another way on a CPU: against NumPy, and whether it is done where it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Picard, deq_fixed_point
from deq_jax.closure import Closure
from deq_jax.passes import cpu, ready_for_loop
from tests.gradients.test_prepared import check_forward_and_transposed, conv, normal, primitives
from tests.reference import relative_error
from tests.xla import collectives

pytestmark = pytest.mark.usefixtures("x64")

IMAGE, KERNEL = (5, 16, 16, 32), (3, 3, 32, 33)


def prepared(f, z):
    return jax.jit(lambda z: ready_for_loop(Closure.of(f, z))(z))


def in_loop(f, z):
    """Primitives of the prepared f, as a CPU would run them."""
    function = ready_for_loop(Closure.of(f, z))
    closed = jax.make_jaxpr(function)(z)
    names = []

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "cond":  # between platforms, the CPU first
                visit(equation.params["branches"][0].jaxpr)
            else:
                names.append(equation.primitive.name)

    visit(closed.jaxpr)
    return names


def correlate(image, kernel, padding):
    """A 3x3 convolution with stride 1, from its definition: NHWC, HWIO."""
    image = np.pad(np.asarray(image), ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(image, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcij,ijco->bhwo", windows, np.asarray(kernel), optimize=True)


@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        (IMAGE, ((1, 1), (1, 1))),
        (IMAGE, ((0, 0), (0, 0))),
        (IMAGE, ((2, 0), (1, 3))),
        ((4, 17, 18, 32), ((1, 1), (1, 1))),
        ((6, 18, 17, 32), ((0, 0), (1, 0))),
        ((1024, 1, 1, 32), ((1, 1), (1, 1))),
        ((256, 2, 3, 32), ((1, 1), (0, 1))),
    ],
)
def test_winograd_is_the_convolution(shape, padding):
    image, kernel = normal(*shape), normal(*KERNEL, seed=1)

    def f(image):
        return conv(image, kernel, padding=padding)

    assert "conv_general_dilated" not in in_loop(f, image)
    expected = correlate(image, kernel, padding)
    assert relative_error(prepared(f, image)(image), expected) < 1e-14


@pytest.mark.parametrize(
    ("shape", "kernel", "dims"),
    [
        ((5, 32, 16, 15), (33, 32, 3, 3), ("NCHW", "OIHW", "NCHW")),
        ((16, 5, 15, 32), (3, 32, 33, 3), ("HNWC", "WIOH", "CWNH")),
    ],
)
def test_winograd_in_other_layouts_and_transposed(shape, kernel, dims):
    def f(kernel, z):
        return jnp.tanh(conv(z, kernel, dims=dims))

    z, kernel = normal(*shape), 0.01 * normal(*kernel, seed=1)
    check_forward_and_transposed(f, kernel, z)
    assert "conv_general_dilated" not in in_loop(lambda z: f(kernel, z), z)


def test_winograd_rounds_like_the_direct_convolution():
    image, kernel = normal(*IMAGE), normal(*KERNEL, seed=1)
    expected = correlate(image, kernel, ((1, 1), (1, 1)))
    image, kernel = image.astype(jnp.float32), kernel.astype(jnp.float32)
    exact = correlate(image.astype(jnp.float64), kernel.astype(jnp.float64), ((1, 1), (1, 1)))
    assert relative_error(exact, expected) > 1e-9  # the inputs were rounded indeed
    direct = relative_error(conv(image, kernel), exact)
    winograd = relative_error(prepared(lambda z: conv(z, kernel), image)(image), exact)
    assert winograd < 1.5 * direct < 1e-6


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((5, 16, 16, 31), (3, 3, 31, 33), {}),
        ((5, 16, 16, 33), (3, 3, 33, 31), {}),
        ((3, 16, 16, 32), KERNEL, {}),
        (IMAGE, (5, 5, 32, 33), {}),
        (IMAGE, (3, 1, 32, 33), {}),
        (IMAGE, KERNEL, {"strides": (2, 1)}),
        (IMAGE, KERNEL, {"rhs_dilation": (1, 2)}),
        (IMAGE, KERNEL, {"lhs_dilation": (2, 1), "padding": ((1, 1), (1, 1))}),
        (IMAGE, KERNEL, {"padding": ((-1, 1), (1, 1))}),
        ((5, 16, 16, 64), (3, 3, 32, 64), {"feature_group_count": 2}),
    ],
)
def test_other_convolutions_are_left_as_they_are(shape, kernel, options):
    image, kernel = normal(*shape), normal(*kernel, seed=1)

    def f(image):
        return conv(image, kernel, **options)

    assert in_loop(f, image).count("conv_general_dilated") == 1
    assert relative_error(prepared(f, image)(image), jax.jit(f)(image)) < 1e-13


def test_half_precision_is_convolved_directly():
    image, kernel = normal(*IMAGE).astype(jnp.bfloat16), normal(*KERNEL).astype(jnp.bfloat16)
    assert "conv_general_dilated" in in_loop(lambda z: conv(z, kernel), image)


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 4, 5, 2, 6), (1, 2, 4)),
        ((3, 4, 5, 6), (0, 1, 3)),
        ((3, 4, 5, 6), (0, 3)),
        ((2, 3, 2, 4, 2, 3), (0, 2, 4, 5)),
        ((3, 4, 5, 6), (1, 2)),
        ((3, 4, 5, 6), (2, 3)),
        ((3, 4), (0, 1)),
    ],
)
def test_sums_over_every_choice_of_axes(shape, axes):
    z = normal(*shape)

    def f(z):
        return z**2 + lax.expand_dims(jnp.sum(z**3, axes), axes)

    got = prepared(f, z)(z)
    values = np.asarray(z)
    assert relative_error(got, values**2 + (values**3).sum(axes, keepdims=True)) < 1e-14
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    staged = bool(kept) and min(axes) < kept[-1] < max(axes)
    assert in_loop(f, z).count("reduce_sum") == 1 + staged


def test_group_normalisation_and_its_derivative():
    def f(scale, z):
        groups = z.reshape(*z.shape[:-1], 3, 4)
        mean = groups.mean((1, 2, 4), keepdims=True)
        variance = (groups**2).mean((1, 2, 4), keepdims=True) - mean**2
        return scale * ((groups - mean) * lax.rsqrt(variance + 1e-5)).reshape(z.shape)

    z = normal(2, 5, 4, 12)
    check_forward_and_transposed(f, normal(12, seed=1), z)
    assert in_loop(lambda z: f(jnp.ones(12), z), z).count("reduce_sum") == 4


def test_other_platforms_run_what_was_written(monkeypatch):
    z, kernel = normal(*IMAGE), normal(*KERNEL)
    closure = Closure.of(lambda z: conv(z, kernel), z)
    assert "conv_general_dilated" not in primitives(jax.make_jaxpr(ready_for_loop(closure))(z))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert ready_for_loop(closure) is closure


@pytest.mark.parametrize(("batch", "axes"), [(8, (4,)), (6, (2, 2))])
@pytest.mark.slow
def test_blocks_of_samples_keep_a_sharded_batch(batch, axes, monkeypatch):
    """Each trip asks all devices whether to go on, and sends nothing else."""
    monkeypatch.setattr(cpu, "_CACHE", 2**20)  # blocks of four samples, and of two
    mesh = jax.make_mesh(
        axes, ("data", "other")[: len(axes)], axis_types=(AxisType.Auto,) * len(axes)
    )
    kernel, x = 0.01 * normal(3, 3, 32, 32, seed=1), normal(batch, 16, 16, 32)

    def loss(kernel, x):
        def f(kernel, z, x):
            return jnp.tanh(conv(z, kernel) + x)

        z = deq_fixed_point(f, kernel, x, solver=Picard(tol=1e-13))
        return (z * x).sum(), z

    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (_, z), gradient = step(kernel, x)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data")))
    program = step.lower(kernel, sharded).compile()
    (_, got), got_gradient = program(kernel, sharded)
    assert relative_error(got, z) < 1e-12
    assert relative_error(got_gradient, gradient) < 1e-12
    text = program.as_text()
    assert {c.shapes for c in collectives(text) if c.in_loop} == {("pred[]",)}
