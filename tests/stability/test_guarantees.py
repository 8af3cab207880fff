"""Nothing breaks a guarantee of docs/guarantees.md: a thousand random cells of each family.

Weights are drawn over ten orders of magnitude and put back into the family's set as in training.
Each draw is solved in float64 by the solver that the page names. Every one must converge, and the
bound that the page states must hold.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Picard, Status, solve_fixed_point
from deq_jax.cells import ConcaveCell

DRAWS = 1000


def many(cell, draw, seed=0):
    """The cell's definition, and its parameters `DRAWS` times along a new first axis.

    Args:
        cell: the cell.
        draw: NumPy's generator and a shape -> values.
        seed: seed of the generator.
    """
    definition, state = nnx.split(cell)
    rng = np.random.default_rng(seed)
    draws = jax.tree.map(lambda leaf: jnp.asarray(draw(rng, (DRAWS, *leaf.shape))), state)
    return definition, draws


def sizes(rng, shape):
    """A factor for each draw, from 1e-5 to 1e5."""
    return 10 ** rng.uniform(-5, 5, (shape[0],) + (1,) * (len(shape) - 1))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("activation", ["tanh", "softsign", "relu6", "sigmoid"])
def test_positive_concave_cells(activation):
    cell = ConcaveCell(6, activation=activation, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    definition, draws = many(
        cell, lambda rng, shape: sizes(rng, shape) * abs(rng.normal(size=shape))
    )
    x = jnp.asarray(np.random.default_rng(1).normal(size=(DRAWS, 1, 6)))

    solver = Picard(tol=1e-6, max_iter=20_000)

    @jax.jit
    @jax.vmap
    def solved(state, x):
        cell = nnx.merge(definition, state)
        c = cell.inject(x)

        def f(_, z, c):
            return cell(z, c)

        solution = solve_fixed_point(f, (), c, solver=solver)
        other = solve_fixed_point(f, (), c, 1000 + c, solver=solver)
        return solution.value, solution.stats, other.value, cell.rate(c)

    z, stats, other, rate = jax.device_get(solved(draws, x))
    assert (stats.status == Status.CONVERGED).all()
    assert (rate < 1).all()
    # After k steps from zero the residual is at most r^k / (1 - r^k).
    most = np.ceil(np.log(1e-6 / (1 + 1e-6)) / np.log(rate))
    assert (stats.iterations <= most + 1).all()
    distance = np.linalg.norm(z - other, axis=-1) / np.linalg.norm(z, axis=-1)
    assert distance.max() < 1e-3
