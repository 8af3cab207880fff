"""Initial states: the same equilibrium from each, and what each is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, deq_fixed_point
from deq_jax.stability import initializer_loss, mixed_initial, one_application, warm_start

KEY = jax.random.key(0)


def f(w, z, x):
    return jnp.tanh(z @ w + x)


def problem():
    rng = np.random.default_rng(0)
    w, x = 0.3 * rng.normal(size=(4, 4)), rng.normal(size=(3, 4))
    return jnp.asarray(w, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.mark.slow
def test_every_start_leads_to_the_same_equilibrium_and_has_no_gradient():
    w, x = problem()
    expected = np.zeros((3, 4))
    for _ in range(200):
        expected = np.tanh(expected @ w + x)
    starts = [one_application(f, w, x), mixed_initial(KEY, x), warm_start(x)]
    for start in starts:
        z = deq_fixed_point(f, w, x, start, solver=Anderson(tol=1e-6))
        np.testing.assert_allclose(z, expected, atol=1e-5)
    np.testing.assert_allclose(starts[0], np.tanh(x), rtol=1e-6)
    np.testing.assert_allclose(
        one_application(f, w, x, x), np.tanh(np.asarray(x) @ np.asarray(w) + x), rtol=1e-5
    )
    gradient = jax.grad(lambda w: one_application(f, w, x, x).sum())(w)
    np.testing.assert_array_equal(gradient, np.zeros_like(w))
    with pytest.raises(ValueError, match="shapes of z"):
        one_application(lambda w, z, x: z[:1], w, x)


def test_mixed_starts_are_normal_or_zero():
    like = {"a": jax.ShapeDtypeStruct((100, 200), jnp.float32), "b": jnp.zeros((100, 50))}
    drawn = mixed_initial(KEY, like, 0.25)
    for leaf in jax.tree.leaves(drawn):
        values = np.asarray(leaf)
        there = values[values != 0]
        assert abs(len(there) / values.size - 0.25) < 0.03
        assert abs(there.mean()) < 0.1
        assert abs(there.std() - 1) < 0.1
    assert not np.array_equal(drawn["a"][:, :50], drawn["b"])
    other = mixed_initial(jax.random.key(1), like, 0.25)
    assert not np.array_equal(other["a"], drawn["a"])
    with pytest.raises(ValueError, match="probability"):
        mixed_initial(KEY, like, -0.5)


@pytest.mark.museum(
    "locuslab/deq-flow: reusing the last frame's fixed point was wired into the model code"
)
@pytest.mark.slow
def test_a_warm_start_over_a_sequence_needs_fewer_evaluations():
    """A scan over inputs that change slowly, from zeros and from the last solution."""
    w, x = problem()
    steps = jnp.arange(10, dtype=jnp.float32)
    inputs = x + 0.002 * steps[:, None, None]
    solver = Anderson(tol=1e-4)

    def advance(carry, x, warm):
        start = warm_start(carry) if warm else jnp.zeros_like(carry)
        z, stats = deq_fixed_point(f, w, x, start, solver=solver, return_stats=True)
        return z, (z, stats.evaluations)

    run = jax.jit(
        lambda warm: jax.lax.scan(lambda c, x: advance(c, x, warm), jnp.zeros_like(x), inputs)[1],
        static_argnums=0,
    )
    (cold, cold_count), (warm, warm_count) = run(False), run(True)
    np.testing.assert_allclose(cold, warm, atol=1e-3)
    assert int(warm_count[0]) == int(cold_count[0])
    assert 5 * int(warm_count[1:].sum()) <= 3 * int(cold_count[1:].sum())


def test_a_warm_start_takes_what_can_be_used():
    previous = {"z": jnp.asarray([[1.0, 2.0], [jnp.nan, 3.0], [4.0, 5.0]])}
    got = warm_start(previous, keep=jnp.asarray([True, True, False]))
    np.testing.assert_array_equal(got["z"], [[1, 2], [0, 0], [0, 0]])
    fresh = {"z": jnp.full((3, 2), 7.0)}
    got = warm_start(previous, fresh)
    np.testing.assert_array_equal(got["z"], [[1, 2], [7, 7], [4, 5]])
    gradient = jax.grad(lambda z: warm_start({"z": z})["z"].sum())(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, np.zeros((3, 2)))


@pytest.mark.slow
def test_a_learned_start_is_taught_by_its_loss_alone():
    """The loss's gradient reaches the initialiser and not the equilibrium; training saves work."""
    w, x = problem()
    initial = {"a": jnp.asarray([[1.0, -2.0]]), "b": jnp.asarray([[3.0]])}
    equilibrium = {"a": jnp.asarray([[0.0, 0.0]]), "b": jnp.asarray([[1.0]])}
    np.testing.assert_allclose(initializer_loss(initial, equilibrium), 5 / 3, rtol=1e-6)
    by_both = jax.grad(initializer_loss, (0, 1))(initial, equilibrium)
    np.testing.assert_allclose(by_both[0]["a"], [[1 / 3, -1 / 3]], rtol=1e-6)
    np.testing.assert_array_equal(by_both[1]["a"], [[0, 0]])

    def evaluations(v):
        return deq_fixed_point(
            f, w, x, jnp.tanh(x @ v), solver=Anderson(tol=1e-3), return_stats=True
        )[1]

    @jax.jit
    def step(v):
        def loss(v):
            z0 = jnp.tanh(x @ v)
            z = deq_fixed_point(f, w, x, z0, solver=Anderson(tol=1e-4))
            return initializer_loss(z0, z) + 0 * (z**2).sum()

        return v - 0.3 * jax.grad(loss)(v)

    v = jnp.eye(4)
    before = evaluations(v).iterations.sum()
    for _ in range(400):
        v = step(v)
    assert int(evaluations(v).iterations.sum()) < int(before)
