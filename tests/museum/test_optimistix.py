"""Defects of optimistix 0.1.0 and lineax 0.1.1 (entries O1 to O7, and their issues)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from tests.museum.problems import (
    Counter,
    normal,
    picard_trace,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


def compiled_within(limit, function, *args):
    """The compiled function, whose temporary memory is below `limit` bytes."""
    compiled = jax.jit(function).lower(*args).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < limit
    return compiled


@pytest.mark.museum(
    "optimistix O1: Newton and the adjoint made dense Jacobians: 72 MB at n = 3000 where GMRES "
    "takes 0.6 MB"
)
@pytest.mark.slow
def test_no_dense_jacobian():
    n = 3000

    def f(a, z, x):
        return jnp.tanh(a * jnp.roll(z, 1, axis=1)) + x

    a, x = np.float32(0.5) * np.ones(n, np.float32), np.ones((1, n), np.float32)

    def adjoint(a, z, y):
        return solve_adjoint(f, a, x, z, y, solver=GMRES()).value

    def newton(a):
        return solve_fixed_point(f, a, x, solver=NewtonKrylov(krylov=GMRES(restart=10))).value

    # And it is the adjoint: u_i = s_{i+1} a u_{i+1} + y_i has a constant solution here.
    z = compiled_within(1e6, newton, a)(a)
    slope = 0.5 / np.cosh(0.5 * np.float64(z[0, 0])) ** 2
    u = compiled_within(1e6, adjoint, a, x, x)(a, z, x)
    np.testing.assert_allclose(u, 1 / (1 - slope), rtol=1e-3)


@pytest.mark.museum(
    "optimistix O3 (optimistix#66): one bad lane raised for the whole vmapped batch"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_one_bad_lane_under_vmap():
    def solve(x):
        options = {"solver": TIGHT, "batched": False, "return_stats": True}
        return deq_fixed_point(tanh_cell, W, x, **options)

    spoilt = X.copy()
    spoilt[1, 2] = np.nan
    gradient = jax.jit(jax.vmap(jax.grad(lambda x, y: jnp.vdot(y, solve(x)[0]))))
    z, stats = jax.vmap(solve)(spoilt)
    np.testing.assert_array_equal(stats.status, [0, Status.DIVERGED, 0])
    expected, (_, x_bar) = tanh_gradients(W, X, Y)
    got = gradient(spoilt, Y)
    for i in (0, 2):
        np.testing.assert_allclose(z[i], expected[i], rtol=0, atol=1e-11)
        np.testing.assert_allclose(got[i], x_bar[i], rtol=0, atol=1e-10)


@pytest.mark.museum("optimistix O5: the gradient of auxiliary output was silently zero")
@pytest.mark.parametrize(
    ("entry", "extra"), [(deq_fixed_point, 0), (solve_fixed_point, 0), (solve_adjoint, 2)]
)
def test_auxiliary_output_is_refused_everywhere(entry, extra):
    w, x = np.float32(W), np.float32(X)
    f = Counter(lambda w, z, x: (tanh_cell(w, z, x), {"norm": z.sum()}))
    with pytest.raises(ValueError, match="structure of z") as raised:
        entry(f, w, x, *extra * (x,))
    assert "'norm'" in str(raised.value)
    assert f.read() == 0


@pytest.mark.museum(
    "optimistix O6: a solve went on after its status had become unsuccessful (PR #213)"
)
def test_a_failed_solve_stops_at_once():
    f = Counter(lambda _, z, x: jnp.where(z == 0, x, jnp.nan))
    z, stats = solve_fixed_point(f, None, np.ones((2, 3), np.float32), solver=Anderson())
    np.testing.assert_array_equal(stats.status, Status.DIVERGED)
    assert stats.evaluations == f.read() == 2
    np.testing.assert_array_equal(z, 0)


@pytest.mark.museum("optimistix O6 (optimistix#33): the best iterate so far left out the last one")
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.usefixtures("x64")
def test_the_last_iterate_can_be_the_best(count):
    points, residuals = picard_trace(lambda z: np.tanh(z @ W + X[:1]), np.zeros((1, 4)), count)
    assert residuals.argmin() == count - 1
    z, stats = solve_fixed_point(tanh_cell, W, X[:1], solver=Picard(tol=0.0, max_iter=count))
    np.testing.assert_allclose(z, points[-1], rtol=1e-12)
    np.testing.assert_allclose(stats.residual, residuals[-1], rtol=1e-9)


@pytest.mark.museum("optimistix O7: a solve reported its number of steps and no residuals")
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_residuals_of_every_step():
    solver = Picard(tol=1e-6, max_iter=60, trace=True)
    _, stats = solve_fixed_point(tanh_cell, W, X, solver=solver)
    for i in range(3):
        _, residuals = picard_trace(lambda z, i=i: np.tanh(z @ W + X[i]), np.zeros(4), 60)
        count = int(stats.iterations[i])
        np.testing.assert_allclose(stats.trace[:count, i], residuals[:count], rtol=1e-6)
        assert residuals[count - 1] <= 1e-6 < residuals[count - 2]
        assert np.isnan(stats.trace[count:, i]).all()
    assert stats.evaluations == stats.iterations.max()
    # A linear equation takes one step of Newton's, with one product per eigenvalue that occurs.
    gains = np.array([0.5, 0.5, -0.5, -0.5])
    newton = NewtonKrylov(krylov=GMRES(), forcing=1e-10, tol=1e-8)
    _, stats = solve_fixed_point(lambda g, z, x: g * z + x, gains, X, solver=newton)
    assert (stats.evaluations, stats.products) == (2, 2)


@pytest.mark.museum("optimistix#63: vmapping a solve failed where the solver's state held a jaxpr")
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_solves_can_be_vmapped():
    solver = NewtonKrylov(tol=1e-11)
    z = jnp.zeros((2, 4))
    state = solver.init(z, jax.ShapeDtypeStruct(z.shape, z.dtype))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    weights = np.stack([W, -W, 0.5 * W])
    got = jax.vmap(lambda w: solve_fixed_point(tanh_cell, w, X, solver=solver).value)(weights)
    np.testing.assert_allclose(got, [tanh_solution(w, X) for w in weights], rtol=0, atol=1e-9)


@pytest.mark.museum(
    "optimistix#89: a solver that calls f in two places compiles it twice, as that issue explains"
)
@pytest.mark.parametrize("solver", [Anderson(), NewtonKrylov()])
def test_f_is_traced_once(solver):
    traces = []

    def f(w, z, x):
        traces.append(None)
        return tanh_cell(w, z, x)

    w, x = np.float32(W), np.float32(X)
    jax.make_jaxpr(lambda w: deq_fixed_point(f, w, x, solver=solver))(w)
    forward = len(traces)
    traces.clear()
    jax.make_jaxpr(jax.grad(lambda w: deq_fixed_point(f, w, 2 * x[:2], solver=solver).sum()))(w)
    # Under a transformation once more, to see whether f captures its tracers.
    assert forward <= 2
    assert len(traces) <= 2
