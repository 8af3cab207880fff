"""`prepare`: the same function with less in the loop. Values against `jax.vjp` of the cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend import core

from deq_jax.closure import Closure
from deq_jax.passes import ready_for_loop
from tests.reference import relative_error

pytestmark = pytest.mark.usefixtures("x64")

NHWC = ("NHWC", "HWIO", "NHWC")
Z, W = (2, 5, 6, 4), (3, 3, 4, 4)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def conv(z, kernel, strides=(1, 1), padding="SAME", dims=NHWC, **options):
    return lax.conv_general_dilated(z, kernel, strides, padding, dimension_numbers=dims, **options)


def transposed(f, params, z):
    """`u -> (∂f/∂z)ᵀ u`, traced, and what it captures."""
    out, pullback = jax.vjp(lambda z: f(params, z), z)
    return Closure.of(lambda u: pullback(u)[0], out)


def check_forward_and_transposed(f, params, z):
    """Compares prepared functions with f itself and with its vjp, each compiled by itself."""
    expected = jax.jit(f)(params, z)
    u = normal(*expected.shape, seed=7).astype(expected.dtype)

    @jax.jit
    def prepared(params, z, u):
        product = ready_for_loop(transposed(f, params, z))
        return ready_for_loop(Closure.of(lambda z: f(params, z), z))(z), product(u)

    got, got_product = prepared(params, z, u)
    expected_product = jax.jit(lambda params, z, u: jax.vjp(lambda z: f(params, z), z)[1](u)[0])
    assert got.dtype == expected.dtype
    assert relative_error(got, expected) < 1e-13
    assert relative_error(got_product, expected_product(params, z, u)) < 1e-13


def primitives(jaxpr):
    """Names of all primitives of a jaxpr and those nested in it."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for inner in core.jaxprs_in_params(equation.params):
            yield from primitives(inner)


def body(f, params, z):
    """Primitives that a trip of the backward loop runs."""
    product = ready_for_loop(transposed(f, params, z))
    return list(primitives(jax.make_jaxpr(product)(f(params, z))))


FORMS = {
    "same": (Z, W, {}),
    "valid": (Z, W, {"padding": "VALID"}),
    "asymmetric padding": (Z, W, {"padding": ((2, 0), (1, 3))}),
    "negative padding": (Z, W, {"padding": ((-1, 2), (0, -1))}),
    "strides": (Z, W, {"strides": (2, 3)}),
    "strides without padding": (Z, W, {"strides": (2, 2), "padding": "VALID"}),
    "kernel dilation": (Z, W, {"rhs_dilation": (2, 1)}),
    "input dilation": (Z, W, {"lhs_dilation": (2, 3), "padding": ((1, 1), (0, 2))}),
    "strides and both dilations": (
        (2, 9, 9, 4),
        W,
        {"strides": (2, 3), "rhs_dilation": (2, 2), "lhs_dilation": (1, 2),
         "padding": ((0, 1), (2, 0))},
    ),
    "groups": (Z, (3, 3, 2, 6), {"feature_group_count": 2}),
    "depthwise": (Z, (3, 3, 1, 4), {"feature_group_count": 4}),
    "depthwise, two each, strided": (
        Z, (3, 3, 1, 8), {"feature_group_count": 4, "strides": (2, 2)},
    ),
    "kernel 1": (Z, (1, 1, 4, 3), {}),
    "kernel 2": (Z, (2, 2, 4, 3), {}),
    "kernel 4x1": (Z, (4, 1, 4, 4), {"padding": "SAME"}),
    "channels first": ((2, 4, 5, 6), (3, 4, 3, 3), {"dims": ("NCHW", "OIHW", "NCHW")}),
    "channels first, groups, strides": (
        (2, 4, 5, 6),
        (6, 2, 3, 3),
        {"dims": ("NCHW", "OIHW", "NCHW"), "feature_group_count": 2, "strides": (1, 2)},
    ),
    "odd axes": ((5, 2, 6, 4), (3, 6, 4, 2), {"dims": ("HNWC", "WOIH", "CWNH")}),
    "1-D": ((2, 7, 4), (3, 4, 5), {"dims": ("NWC", "WIO", "NWC"), "strides": (2,)}),
    "1-D channels first": ((2, 4, 7), (5, 4, 3), {"dims": ("NCW", "OIW", "NCW"), "strides": (1,)}),
    "3-D": (
        (1, 3, 4, 5, 2),
        (2, 3, 3, 2, 3),
        {"dims": ("NDHWC", "DHWIO", "NDHWC"), "strides": (1, 2, 1)},
    ),
    "batch groups": (
        (2, 4, 5, 6),
        (6, 4, 3, 3),
        {"dims": ("NCHW", "OIHW", "NCHW"), "batch_group_count": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_convolutions_of_every_form(form):
    z_shape, kernel_shape, options = FORMS[form]
    check_forward_and_transposed(
        lambda kernel, z: conv(z, kernel, **options), normal(*kernel_shape), normal(*z_shape)
    )


def test_element_type_of_the_result():
    def f(kernel, z):
        return conv(z, kernel, dims=("NHWC", "OHWI", "NHWC"), preferred_element_type=jnp.float32)

    kernel, z = normal(*W).astype(jnp.bfloat16), normal(*Z).astype(jnp.bfloat16)
    got = jax.jit(lambda z: ready_for_loop(Closure.of(lambda z: f(kernel, z), z))(z))(z)
    assert got.dtype == jnp.float32
    assert relative_error(got, f(kernel, z)) < 1e-6


@jax.custom_jvp
def custom_jvp_cell(kernel, z):
    return jnp.tanh(conv(z, kernel))


@custom_jvp_cell.defjvp
def _custom_jvp_rule(primals, tangents):
    kernel, z = primals
    out = custom_jvp_cell(kernel, z)
    slope = 3 * (1 - out**2)  # not the true derivative: the rule must be what is used
    return out, slope * (conv(tangents[1], kernel) + conv(z, tangents[0]))


@jax.custom_vjp
def custom_vjp_cell(kernel, z):
    return jnp.sin(conv(z, kernel))


custom_vjp_cell.defvjp(
    lambda kernel, z: (custom_vjp_cell(kernel, z), (kernel, z)),
    lambda saved, u: (
        jnp.zeros_like(saved[0]),
        2 * jax.jit(lambda k, u: conv(u, jnp.flip(k, (0, 1)).swapaxes(2, 3)))(saved[0], u),
    ),
)


def plain(kernel, z):
    return jnp.tanh(conv(z, kernel)) + 0.5 * z


def weight_norm(params, z):
    direction, gain = params
    norm = jnp.sqrt((direction**2).sum((0, 1, 2), keepdims=True))
    return jnp.tanh(conv(z, gain * direction / norm)) + z


def closed_over_in_jit(kernel, z):
    fixed = np.random.default_rng(5).normal(size=W)
    return jax.jit(lambda z: conv(conv(z, fixed), kernel))(z)


def dropout(params, z):
    kernel, key = params
    mask = jax.random.bernoulli(key, 0.5, z.shape)
    return jnp.where(mask, conv(z, kernel) / 0.5, 0.0)


def literals(kernel, z):
    padded = lax.pad(2.0 * z, np.float64(0.25), ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
    return jnp.where(z > 0.1, conv(padded, kernel, padding="VALID"), -1.0).clip(-5, 5)


class NNXCell(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(4, 4, (3, 3), param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        self.norm = nnx.GroupNorm(4, 2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def __call__(self, z):
        return self.norm(nnx.relu(z + self.conv(z)))


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z):
        h = nn.Conv(6, (3, 3), param_dtype=jnp.float64)(z)
        h = nn.remat(nn.Conv)(4, (3, 3), feature_group_count=2, param_dtype=jnp.float64)(nn.gelu(h))
        return nn.LayerNorm(param_dtype=jnp.float64)(z + h)


def nnx_cell():
    definition, state = nnx.split(NNXCell())
    return (lambda state, z: nnx.merge(definition, state)(z)), state


def linen_cell():
    cell = LinenCell()
    return cell.apply, cell.init(jax.random.key(0), jnp.zeros(Z))


# The cell, and whether a `rev` remains in the backward loop; None: only for other machines.
CELLS = {
    "plain": (plain, False),
    "jit": (jax.jit(plain), False),
    "checkpoint": (jax.checkpoint(plain), None),
    "jit in checkpoint": (jax.checkpoint(jax.jit(plain)), None),
    "checkpoint in jit": (jax.jit(jax.checkpoint(plain)), None),
    "checkpoint saving nothing": (
        jax.checkpoint(plain, policy=jax.checkpoint_policies.nothing_saveable),
        None,
    ),
    "custom_jvp": (custom_jvp_cell, False),
    "custom_vjp": (custom_vjp_cell, False),
    "flipped kernel": (lambda k, z: conv(z, jnp.flip(k, (0, 1))), False),
    "kernel used twice": (lambda k, z: conv(jnp.sin(conv(z, k)), k), False),
    "kernel in jit's constants": (closed_over_in_jit, False),
    "literals": (literals, False),
    "kernel of the state": (
        lambda k, z: conv(z, k * (1 + jnp.tanh(z).mean())) + conv(z, z[0, :3, :3, :, None] * k),
        False,
    ),
    "vmap": (
        lambda k, z: jax.vmap(lambda z, s: conv(z[None], s * k)[0])(z, jnp.array([1.0, 2.0])),
        False,
    ),
    "vmap over kernels": (
        lambda k, z: jax.vmap(lambda s: conv(z, s * k))(jnp.array([1.0, 2.0])).sum(0),
        False,
    ),
    "scan": (lambda k, z: lax.scan(lambda z, _: (plain(k, z), None), z, length=2)[0], True),
    "cond": (lambda k, z: lax.cond(k[0, 0, 0, 0] > 0, plain, lambda k, z: -z, k, z), True),
}


@pytest.mark.parametrize("name", CELLS)
def test_nested_and_computed_kernels(name):
    f, rev_remains = CELLS[name]
    kernel, z = normal(*W, seed=1), normal(*Z)
    check_forward_and_transposed(f, kernel, z)
    if rev_remains is not None:
        assert ("rev" in body(f, kernel, z)) == rev_remains


FLAX = {"nnx": nnx_cell, "linen": linen_cell}
OTHERS = {
    "weight norm": lambda: (weight_norm, (normal(*W), normal(4))),
    "dropout, typed key": lambda: (dropout, (normal(*W), jax.random.key(0))),
    "dropout, legacy key": lambda: (dropout, (normal(*W), jax.random.PRNGKey(0))),
} | FLAX


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.slow
def test_cells_with_params_of_their_own(name):
    with jax.numpy_dtype_promotion("standard"):  # Flax's normalisations need it in float64
        f, params = OTHERS[name]()
        check_forward_and_transposed(f, params, normal(*Z))
        if name != "linen":  # which has a `checkpoint`
            hoisted = {"rev", "random_bits", "threefry2x32", "sqrt"}
            assert not hoisted.intersection(body(f, params, normal(*Z)))
