"""Both layers give a cell its step, take what it returns beside z, and pass `Control` on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import Control, Picard, Truncated, deq_fixed_point

X = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
SOLVER = Picard(tol=0.0, max_iter=8)
CONTROL = Control(select="last")
OPTIONS = {"solver": SOLVER, "gradient": Truncated(2), "has_aux": True, "pass_step": True}


def application(z, x, step, kernel):
    """The cell as a formula: its state is scaled by a function of the step."""
    shrunk = 1 - 0.5 ** (step[:, None].astype(z.dtype) + 1)
    z = jnp.tanh(z @ kernel / 4 + x) * shrunk
    return z, z.sum(1)


class NnxCell(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_bias=False, use_scale=False, rngs=rngs)

    def __call__(self, z, x, step):
        self.norm(z)  # a state to be updated by the last call at z*
        return application(z, x, step, self.linear.kernel[...])


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x, step):
        return application(z, x, step, self.param("kernel", nn.initializers.normal(), (4, 4)))


def expected(kernel, applications):
    """The state and the aux, by a loop; the gradient is that of the last two applications."""
    z = jnp.zeros_like(X)
    for step in range(applications):
        if step == applications - 2:
            z = jax.lax.stop_gradient(z)
        z, _ = application(z, X, jnp.full(3, step), kernel)
    return z, application(z, X, jnp.full(3, applications), kernel)[1]


def loss_of(z, aux):
    return jnp.sum(z**2) + jnp.sum(aux)


@pytest.mark.parametrize("budget", [None, 5])
@pytest.mark.slow
def test_nnx(budget):
    layer = deq_jax.nnx.DEQ(NnxCell(nnx.Rngs(0)), control=CONTROL, **OPTIONS)
    given = {} if budget is None else {"control": Control(budget=budget, select="last")}

    def loss(layer):
        z, stats, aux = layer(X, return_stats=True, **given)
        return loss_of(z, aux), (z, aux, stats)

    (_, (z, aux, stats)), gradient = nnx.value_and_grad(loss, has_aux=True)(layer)
    kernel = layer.cell.linear.kernel[...]
    wanted = expected(kernel, budget or 8)
    for got, reference in zip((z, aux), wanted, strict=True):
        np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(stats.step, [budget or 8] * 3)
    reference = jax.grad(lambda kernel: loss_of(*expected(kernel, budget or 8)))(kernel)
    np.testing.assert_allclose(gradient.cell.linear.kernel[...], reference, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_linen():
    layer = deq_jax.linen.DEQ(LinenCell(), control=CONTROL, **OPTIONS)
    (start, aux), variables = layer.init_with_output(jax.random.key(0), X)
    assert (start.shape, aux.shape) == ((3, 4), (3,))
    kernel = variables["params"]["cell"]["kernel"]

    def loss(variables):
        z, aux = layer.apply(variables, X)
        return loss_of(z, aux), (z, aux)

    (_, got), gradient = jax.value_and_grad(loss, has_aux=True)(variables)
    for one, other in zip(got, expected(kernel, 8), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    reference = jax.grad(lambda kernel: loss_of(*expected(kernel, 8)))(kernel)
    got = gradient["params"]["cell"]["kernel"]
    np.testing.assert_allclose(got, reference, rtol=1e-4, atol=1e-6)
    z, _ = layer.apply(variables, X, control=Control(budget=3, select="last"))
    np.testing.assert_allclose(z, expected(kernel, 3)[0], rtol=1e-5, atol=1e-6)


def test_random_noise_of_each_evaluation():
    """A key folded with the step: evaluations draw different numbers, and the same ones again."""
    key = jax.random.key(3)

    def f(a, z, x, step):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, step)
        return a * z + x + jax.vmap(lambda key: jax.random.normal(key, (4,)))(keys)

    def solve(applications):
        return deq_fixed_point(
            f, 0.5, X, solver=Picard(tol=0.0, max_iter=applications), control=CONTROL,
            pass_step=True,
        )  # fmt: skip

    one, two, again = solve(1), solve(2), solve(2)
    np.testing.assert_array_equal(two, again)
    noise = [jax.random.normal(jax.random.fold_in(key, step), (4,)) for step in range(2)]
    np.testing.assert_allclose(one, X + noise[0], rtol=1e-6)
    np.testing.assert_allclose(two, 0.5 * (X + noise[0]) + X + noise[1], rtol=1e-5, atol=1e-6)
    assert np.abs(noise[0] - noise[1]).min() > 1e-3
