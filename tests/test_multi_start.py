"""Several starts: the choice among several solutions, and the gradient of what was chosen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, OneStep, Picard, Status, Unrolled, multi_start
from deq_jax.multi_start import MultiStart

SOLVER = Picard(tol=1e-10, max_iter=200)


def double_well(gain, z, x):
    """Two solutions that attract, near x and the sign of each entry, and 0 between them."""
    return jnp.tanh(gain * z + x)


@functools.partial(jax.jit, static_argnames=("select", "solver", "batched"))
def search(gain, x, starts, select="residual", solver=SOLVER, batched=True):
    return multi_start(
        double_well, gain, x, starts, select=select, solver=solver, batched=batched, same=1e-4
    )


def starts_of(*values):
    """`[S, 2, 1]`, equal for both samples where a number is given."""
    return jnp.stack([jnp.broadcast_to(jnp.asarray(v, float), (2,)) for v in values])[..., None]


@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_votes_and_the_residuals():
    x = jnp.asarray([[0.0], [0.1]])
    # The first sample: two starts go up, one down, one rests at 0. The second: one up, three down.
    starts = starts_of([1.0, 0.9], [-1.0, -2.0], [0.5, -1.5], [0.0, -1.0])
    found = search(2.0, x, starts, select="votes")
    assert found.votes.tolist() == [[2, 1], [1, 3], [2, 3], [1, 3]]
    assert float(found.value[0, 0]) > 0.9
    assert float(found.value[1, 0]) < -0.9
    np.testing.assert_allclose(found.value, double_well(2.0, found.value, x), rtol=1e-9)
    np.testing.assert_array_equal(found.stats.status, Status.CONVERGED)

    found = search(2.0, x, starts, select="residual")
    lowest = np.argmin(found.residuals, axis=0)
    np.testing.assert_array_equal(found.winner, lowest)
    assert found.winner[0] == 3  # the start at 0 solves it exactly, though it repels
    np.testing.assert_array_equal(found.value[0], 0)


@pytest.mark.usefixtures("x64")
def test_a_start_that_fails_is_not_chosen_and_hurts_no_other():
    x = jnp.asarray([[0.2], [0.3]])
    starts = starts_of(jnp.nan, [1.0, jnp.nan], jnp.inf)
    found = search(2.0, x, starts)
    assert found.winner[0] == 1
    assert found.stats.status[0] == Status.CONVERGED
    np.testing.assert_array_equal(found.residuals[0], np.inf)
    np.testing.assert_array_equal(found.votes, [[0, 0], [1, 0], [0, 0]])
    # From inf the first value is tanh(inf) = 1, so it is only the residual that is not finite.
    assert found.stats.status[1] == Status.DIVERGED


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_the_gradient_is_that_of_the_chosen_solution(batched):
    x, gain = jnp.asarray([[0.2], [-0.1]]), 2.0
    starts = starts_of(0.05, -1.0, 1.0)

    def loss(gain, x):
        found = multi_start(
            double_well, gain, x, starts, select="votes", solver=SOLVER, batched=batched
        )
        assert isinstance(found, MultiStart)
        return found.value.sum(), found

    (by_gain, by_x), found = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(gain, x)
    z = np.asarray(found.value)
    slope = 1 - z**2  # z = tanh(g z + x): dz/dx = slope / (1 - g slope), dz/dg = z times it
    inner = slope / (1 - gain * slope)
    np.testing.assert_allclose(by_x, inner, rtol=1e-8)
    np.testing.assert_allclose(by_gain, (z * inner).sum(), rtol=1e-8)
    shape = (2,) if batched else ()
    assert found.winner.shape == shape
    assert found.residuals.shape == (3, *shape)
    assert found.stats.iterations.shape == shape
    assert found.stats.evaluations > 1


@pytest.mark.slow
def test_a_search_that_ended_too_early_goes_on_from_its_best():
    x = jnp.asarray([[0.2], [0.3]])
    solver = Anderson(tol=1e-5, max_iter=4)
    found = search(2.0, x, starts_of(3.0, 1.0), solver=solver)
    assert found.stats.residual.max() <= found.residuals.min(0).max()
    assert (found.stats.iterations >= 2).all()


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"gradient": Unrolled()}, TypeError, "nothing to differentiate"),
        ({"gradient": 3}, TypeError, "gradient must be a policy"),
        ({"select": "best"}, ValueError, "select must be"),
        ({"same": -1.0}, ValueError, "same must be"),
        ({"starts": ()}, ValueError, "starts must have leaves"),
        ({"starts": {"a": jnp.ones((3, 2, 1)), "b": jnp.ones((2, 2, 1))}}, ValueError, "same axes"),
        ({"starts": jnp.ones(3)}, ValueError, "every leaf of starts"),
        ({"x": jnp.ones((3, 1))}, ValueError, "multi_start repeats x"),
    ],
)
def test_bad_arguments(change, error, named):
    given = {"x": jnp.ones((2, 1)), "starts": jnp.ones((3, 2, 1)), "gradient": OneStep()} | change
    with pytest.raises(error, match=named):
        multi_start(double_well, 2.0, **given)
