"""Defects of optimistix 0.1.0 and lineax 0.1.1 (entries O1 to O7, and their issues)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from tests.museum.catalogue import defect
from tests.museum.problems import (
    Counter,
    normal,
    picard_trace,
    tanh_adjoint,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


def compiled_within(limit, function, *args):
    """The compiled function, whose temporary memory is below `limit` bytes."""
    compiled = jax.jit(function).lower(*args).compile()
    assert 0 < compiled.memory_analysis().temp_size_in_bytes < limit
    return compiled


@defect(
    "optimistix O1",
    "Newton and the adjoint made dense Jacobians: 72 MB at n = 3000 where GMRES takes 0.6 MB",
    we="both are matrix-free: the backward pass at n = 3000 stays below 1 MB",
)
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


@defect(
    "optimistix O2 (lineax#117, #243)",
    "a linear solve that failed in the backward pass raised even with throw=False",
    we="a backward pass never raises; the probe tells which sample failed",
)
@pytest.mark.parametrize("backward", [Broyden(), BiCGStab()])
@pytest.mark.usefixtures("x64")
def test_a_singular_adjoint_does_not_raise(backward):
    def loss(x, probe):
        # At z = 0 sample 0 has J = 1: the adjoint u = u + y has no solution.
        f = lambda _, z, x: x + jnp.sin(jnp.array([[1.0], [0.5]]) * z)  # noqa: E731
        gradient = Implicit(backward, tol=1e-8)
        options = {"solver": Picard(tol=1e-13, max_iter=200), "gradient": gradient}
        return deq_fixed_point(f, None, x, **options, backward_probe=probe).sum()

    x = np.array([[0.0, 0.0], [1.0, 0.0]])
    x_bar, probe = jax.jit(jax.grad(loss, (0, 1)))(x, BackwardProbe.zeros(2))
    z = 1.0
    for _ in range(100):
        z = 1 + np.sin(0.5 * z)
    np.testing.assert_allclose(x_bar[1], [1 / (1 - 0.5 * np.cos(0.5 * z)), 2], rtol=1e-6)
    assert probe.status[1] == Status.CONVERGED
    assert probe.status[0] != Status.CONVERGED
    assert probe.residual[0] > 0.5


@defect(
    "optimistix O3 (optimistix#66)",
    "one bad lane raised for the whole vmapped batch",
    we="a bad lane has its own status; the others are as if it were not there",
)
@pytest.mark.usefixtures("x64")
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


@defect(
    "optimistix O4",
    "a bfloat16 state was a ValueError: the error in the loop's carry was float32",
    we="Newton and the Krylov adjoints take half precision and work in float32",
)
def test_half_precision_in_newton_and_krylov():
    x, w = jnp.asarray(normal(2, 4), jnp.bfloat16), jnp.asarray(W, jnp.bfloat16)
    z, stats = solve_fixed_point(tanh_cell, w, x, solver=NewtonKrylov(tol=2e-2))
    assert z.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(np.float64(z), tanh_solution(w, x), atol=0.05)
    adjoint = functools.partial(solve_adjoint, tanh_cell, solver=GMRES(tol=2e-2))
    u, _ = jax.jit(adjoint)(w, x, z, jnp.ones_like(z))
    assert u.dtype == jnp.bfloat16
    assert relative_error(np.float64(u), tanh_adjoint(w, z, np.ones((2, 4)))) < 0.05


@defect(
    "optimistix O5",
    "the gradient of auxiliary output was silently zero",
    we="every entry point refuses auxiliary output, before anything is solved",
)
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


@defect(
    "optimistix O6",
    "a solve went on after its status had become unsuccessful (PR #213)",
    we="the loop ends with the last active sample, converged or not finite",
)
def test_a_failed_solve_stops_at_once():
    f = Counter(lambda _, z, x: jnp.where(z == 0, x, jnp.nan))
    z, stats = solve_fixed_point(f, None, np.ones((2, 3), np.float32), solver=Anderson())
    np.testing.assert_array_equal(stats.status, Status.DIVERGED)
    assert stats.evaluations == f.read() == 2
    np.testing.assert_array_equal(z, 0)


@defect(
    "optimistix O6 (optimistix#33)",
    "the best iterate so far left out the last one",
    we="the last evaluation counts: a run cut off there returns that point",
)
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.usefixtures("x64")
def test_the_last_iterate_can_be_the_best(count):
    points, residuals = picard_trace(lambda z: np.tanh(z @ W + X[:1]), np.zeros((1, 4)), count)
    assert residuals.argmin() == count - 1
    z, stats = solve_fixed_point(tanh_cell, W, X[:1], solver=Picard(tol=0.0, max_iter=count))
    np.testing.assert_allclose(z, points[-1], rtol=1e-12)
    np.testing.assert_allclose(stats.residual, residuals[-1], rtol=1e-9)


@defect(
    "optimistix O7",
    "a solve reported its number of steps and no residuals",
    we="the residual of every step and sample, the evaluations, and Newton's products",
)
@pytest.mark.usefixtures("x64")
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


@defect(
    "optimistix#63",
    "vmapping a solve failed where the solver's state held a jaxpr",
    we="solver states hold arrays alone, and solves with different parameters can be vmapped",
)
@pytest.mark.usefixtures("x64")
def test_solves_can_be_vmapped():
    solver = NewtonKrylov(tol=1e-11)
    z = jnp.zeros((2, 4))
    state = solver.init(z, jax.ShapeDtypeStruct(z.shape, z.dtype))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    weights = np.stack([W, -W, 0.5 * W])
    got = jax.vmap(lambda w: solve_fixed_point(tanh_cell, w, X, solver=solver).value)(weights)
    np.testing.assert_allclose(got, [tanh_solution(w, X) for w in weights], rtol=0, atol=1e-9)


@defect(
    "optimistix#89",
    "a solver that calls f in two places compiles it twice, as that issue explains",
    we="once for a solve; once more under a transformation, to see what f closes over",
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
