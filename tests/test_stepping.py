"""A solve by hand is the solve that `solve_fixed_point` makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Control, Execution, Picard, solve_fixed_point, stepping

W = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32) / 3
X = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32) * np.array(
    [[0.1], [1.0], [2.0], [3.0]], np.float32
)


def cell(w, z, x):
    return jnp.tanh(z @ w + x)


@pytest.mark.slow
def test_evaluation_by_evaluation():
    solver = Anderson(tol=1e-6, max_iter=30)
    state = stepping.start(cell, W, X, solver=solver)
    residuals = []
    while not state.done:
        state = stepping.advance(state)
        residuals.append(np.asarray(state.residual))
        assert state.evaluations == len(residuals)
        assert state.active.shape == (4,)
    value, stats = stepping.finish(state)
    expected, reference = solve_fixed_point(cell, W, X, solver=solver)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_array_equal(stats.iterations, reference.iterations)
    np.testing.assert_array_equal(stats.status, reference.status)
    assert len(residuals) == reference.evaluations
    assert (np.diff(residuals, axis=0) <= 0).all()  # that of the best iterate never rises
    assert not state.active.any()


@pytest.mark.slow
def test_several_evaluations_at_once_unbatched_with_a_budget_and_aux():
    def f(w, z, x, step):
        return cell(w, z, x), step

    control = Control(budget=np.int32(7), select="last")
    state = stepping.start(
        f, W, X[1], solver=Picard(tol=0.0), batched=False, has_aux=True, pass_step=True,
        control=control,
    )  # fmt: skip
    state = stepping.advance(state, 5)
    assert (state.evaluations, state.done) == (5, False)
    z = jnp.zeros(3)
    for _ in range(5):
        z = cell(W, z, X[1])
    np.testing.assert_allclose(state.value, z, rtol=1e-6)
    state = stepping.advance(state, 5)
    assert (state.evaluations, state.done) == (7, True)
    solution = stepping.finish(state)
    assert solution.aux == 7
    assert solution.value.shape == (3,)


def test_errors():
    state = stepping.start(cell, W, X)
    with pytest.raises(ValueError, match="evaluations must be at least 1, got 0"):
        stepping.advance(state, 0)
    with pytest.raises(ValueError, match="f must return the shapes of z"):
        stepping.start(lambda w, z, x: z[:, :1], W, X)


def test_a_meter_shows_how_far_a_compiled_solve_is(capfd):
    solver = Picard(tol=1e-5, max_iter=80)

    @jax.jit
    def solve(w, x):
        execution = Execution(progress=4)
        return solve_fixed_point(cell, w, x, solver=solver, execution=execution).stats

    stats = jax.block_until_ready(solve(W, X))
    jax.effects_barrier()
    shown = capfd.readouterr().err
    assert f"{stats.evaluations}/80" in shown
    assert "active=" in shown
    assert "residual=" in shown
    assert "4/80" in shown
    with pytest.raises(ValueError, match=r"Execution\.progress must be at least 1, got -2"):
        Execution(progress=-2)
