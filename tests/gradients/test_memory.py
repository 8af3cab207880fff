"""Temporary memory of compiled gradients, as XLA has planned it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    Broyden,
    Implicit,
    Neumann,
    OneStep,
    Phantom,
    Picard,
    Reversed,
    Reversible,
    Unrolled,
    deq_fixed_point,
)


def cell(params, z, x):
    """Elementwise and of low rank, so that parameters are small beside the states."""
    mixed = (z @ params["down"]) @ params["up"]
    return jnp.tanh(params["gain"] * z + mixed + x + params["bias"])


@functools.lru_cache
def temporary_bytes(solver, policy, size=512, batch=8):
    """Of the gradient by params and x in float32; nothing is run."""
    single = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"down": (size, 4), "up": (4, size), "gain": (size,), "bias": (size,)}
    params = jax.tree.map(single, params, is_leaf=lambda leaf: isinstance(leaf, tuple))

    def loss(params, x):
        return (deq_fixed_point(cell, params, x, solver=solver, gradient=policy) ** 2).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, single((batch, size)))
    return lowered.compile().memory_analysis().temp_size_in_bytes


CONSTANT = {
    "Implicit": lambda n: (Anderson(max_iter=n), Implicit()),
    "GMRES": lambda n: (Picard(max_iter=n), Implicit(GMRES(restart=4, max_iter=n))),
    "SHINE": lambda n: (Broyden(memory=4, max_iter=n), Implicit(reuse=True)),
    "OneStep": lambda n: (Picard(max_iter=n), OneStep()),
    "Neumann": lambda n: (Picard(max_iter=n), Neumann(n)),
    "Phantom": lambda n: (Picard(max_iter=n), Phantom(n)),
}


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.slow
def test_memory_does_not_depend_on_the_iterations(name):
    few, many = (temporary_bytes(*CONSTANT[name](n)) for n in (5, 40))
    assert few > 8 * 512 * 4  # more than one state: it is measured
    assert abs(many - few) <= 0.02 * few


@pytest.mark.slow
def test_memory_of_reversed_does_not_depend_on_the_iterations():
    few, many = (temporary_bytes(Reversible(components=2, max_iter=n), Reversed()) for n in (4, 64))
    # 64 evaluations need their residuals in addition, [64, 8].
    assert abs(many - few) <= 0.02 * few


@pytest.mark.slow
def test_memory_of_unrolled_grows_with_the_root_of_the_iterations():
    state = 8 * 512 * 4
    few, more, many = (temporary_bytes(Picard(max_iter=n), Unrolled()) for n in (10, 40, 160))
    # Each factor of 4 would multiply a linear growth by 4.
    assert state < more - few < 15 * state
    assert many - more < 3 * (more - few)
    assert many > 2 * temporary_bytes(Picard(max_iter=40), OneStep())


@pytest.mark.slow
def test_memory_of_a_sample_with_gmres():
    """State of 3000 numbers: a dense Jacobian would be 36 MB."""
    batch = 8
    for solver in (Picard(), Anderson()):
        total = temporary_bytes(solver, Implicit(GMRES()), 3000, batch)
        assert total / batch < 1e6
        # Two bases of restart + 1 states, for the loop's step, and what f and the solver need.
        assert total / batch < (2 * 21 + 10) * 3000 * np.dtype(np.float32).itemsize
