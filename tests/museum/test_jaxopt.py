"""Defects of jaxopt 0.8.5 (entries J1 to J12 of our reading, and its issues)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    Broyden,
    Implicit,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.museum.catalogue import defect
from tests.museum.problems import (
    SOLVERS,
    Counter,
    linear_cell,
    normal,
    picard_trace,
    residual_of,
    symmetric,
    tanh_adjoint,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


@defect(
    "jaxopt J1",
    "with its absolute ridge Anderson took 1007 / 2383 / 3759 steps to 1e-4 / 1e-6 / 1e-8 where "
    "Picard took 794 / 1253 / 1711",
    we="Anderson is below 130 / 205 / 278 there, and below Picard at every tolerance",
)
@pytest.mark.usefixtures("x64")
def test_anderson_is_ahead_of_picard_at_every_tolerance():
    w, x = symmetric(np.linspace(0.1, 0.99, 100)), normal(1, 100, seed=7)
    solver = Anderson(tol=1e-8, max_iter=400, trace=True)
    _, stats = solve_fixed_point(linear_cell, w, x, solver=solver)
    _, plain = picard_trace(lambda z: z @ w + x, 0 * x, 2000)
    for tol, bar in ((1e-2, 60), (1e-4, 130), (1e-6, 205), (1e-8, 278)):
        ours, picard = (1 + int(np.argmax(trace <= tol)) for trace in (stats.trace[:, 0], plain))
        assert stats.trace[ours - 1, 0] <= tol
        assert ours <= bar
        assert ours < picard


def split(z):
    return {"a": z[:, :1], "b": (z[:, 1:3], z[:, 3:])}


def join(z):
    return jnp.concatenate([z["a"], *z["b"]], axis=1)


@defect(
    "jaxopt J2",
    "Broyden applied its low-rank product leaf by leaf: the secant condition failed by 0.1 to 0.3 "
    "on a split tree",
    we="products run over the whole tree: B Δg = Δz to rounding, and the steps of the array",
)
@pytest.mark.usefixtures("x64")
def test_broyden_on_a_split_tree():
    solver = Broyden(memory=9, tol=1e-10)
    z = split(jnp.zeros((3, 4)))
    state, step = solver.init(z, z), jax.jit(solver.step)
    points, residuals = [], []
    for _ in range(5):
        fz = split(tanh_cell(W, join(z), X))
        points.append(np.asarray(join(z)))
        residuals.append(np.asarray(join(fz)) - points[-1])
        z, state = step(z, fz, state)
        if len(points) == 1:
            continue
        for i in range(3):
            filled = np.asarray(state.inverse.filled[i])[:, None]
            left, right = (np.asarray(a[i]) * filled for a in state.inverse[:2])
            inverse = -np.eye(4) + left.T @ right
            got = inverse @ (residuals[-1] - residuals[-2])[i]
            assert relative_error(got, (points[-1] - points[-2])[i]) < 1e-12

    array = solve_fixed_point(tanh_cell, W, X, solver=solver)
    tree = solve_fixed_point(
        lambda w, z, x: split(tanh_cell(w, join(z), x)), W, X, split(jnp.zeros((3, 4))),
        solver=solver,
    )  # fmt: skip
    np.testing.assert_array_equal(array.stats.iterations, tree.stats.iterations)
    np.testing.assert_allclose(join(tree.value), array.value, rtol=0, atol=1e-14)


def cosine_derivatives(a, b):
    """z and its derivatives in a and b, of `z = cos(a z) + b`, in NumPy."""
    z = 0.5
    for _ in range(100):
        z -= (z - np.cos(a * z) - b) / (1 + a * np.sin(a * z))
    slope = 1 + a * np.sin(a * z)
    return z, np.array([-z * np.sin(a * z), 1.0]) / slope


@defect(
    "jaxopt J3 (google/jaxopt#474)",
    "jvp and jax.hessian were a TypeError, since custom_vjp has no forward mode",
    we="forward mode, reverse mode and their mixtures",
)
@pytest.mark.usefixtures("x64")
def test_jvp_and_hessian():
    def z(theta):
        f = lambda theta, z, x: jnp.cos(theta[0] * z) + theta[1]  # noqa: E731
        return deq_fixed_point(f, theta, None, jnp.zeros((1, 1)), solver=TIGHT)[0, 0]

    theta, direction = np.array([0.7, 0.3]), np.array([0.4, -1.0])
    _, first = cosine_derivatives(*theta)
    step = 1e-5
    second = [
        (cosine_derivatives(*(theta + h))[1] - cosine_derivatives(*(theta - h))[1]) / (2 * step)
        for h in step * np.eye(2)
    ]
    np.testing.assert_allclose(
        jax.jit(lambda t: jax.jvp(z, (t,), (direction,))[1])(theta), first @ direction, rtol=1e-10
    )
    np.testing.assert_allclose(jax.jit(jax.hessian(z))(theta), second, rtol=1e-8)


@defect(
    "jaxopt J4 (google/jaxopt#31, #111)",
    "a function that closed over what was differentiated ended in an UnexpectedTracerError",
    we="arrays that f closes over get the gradient they would get as arguments",
)
@pytest.mark.usefixtures("x64")
def test_closures_are_differentiated():
    def loss(w, x):
        f = lambda _, z, __: tanh_cell(w, z, x)  # noqa: E731
        return jnp.vdot(Y, deq_fixed_point(f, None, None, jnp.zeros((3, 4)), solver=TIGHT))

    assert relative_error(jax.jit(jax.grad(loss, (0, 1)))(W, X), tanh_gradients(W, X, Y)[1]) < 1e-11


@defect(
    "jaxopt J5",
    "gradients through auxiliary output were silently zero",
    we="f has no auxiliary output, which is an error that says so; computed at z*, it has its "
    "gradient",
)
@pytest.mark.usefixtures("x64")
def test_auxiliary_output_is_refused_or_differentiated():
    def f(w, z, x):
        return tanh_cell(w, z, x), jnp.sum(z**2)

    with pytest.raises(ValueError, match=r"structure of z: got PyTreeDef\(\(\*, \*\)\)"):
        deq_fixed_point(f, W, X)

    def auxiliary(w):
        z = deq_fixed_point(lambda *args: f(*args)[0], w, X, solver=TIGHT)
        return f(w, z, X)[1]

    expected = tanh_gradients(W, X, 2 * tanh_solution(W, X))[1][0]
    assert relative_error(jax.jit(jax.grad(auxiliary))(W), expected) < 1e-11


@defect(
    "jaxopt J6 (google/jaxopt#466)",
    "normal CG capped at 3 steps gave a 21 % wrong gradient and no flag; a user got all zeros",
    we="a capped backward solve reports MAX_ITER and the residual it reached",
)
@pytest.mark.parametrize("backward", [Anderson(), GMRES()])
@pytest.mark.usefixtures("x64")
def test_a_capped_backward_solve_is_flagged(backward):
    w = symmetric([-0.9, -0.6, 0.1, 0.5, 0.8, 0.97])
    x, y = 0.1 * normal(2, 6, seed=1), normal(2, 6, seed=2)
    policy = Implicit(dataclasses.replace(backward, tol=1e-8, max_iter=3))

    def loss(x, probe):
        options = {"solver": Picard(tol=1e-13, max_iter=2000), "gradient": policy}
        return jnp.vdot(y, deq_fixed_point(tanh_cell, w, x, **options, backward_probe=probe))

    x_bar, probe = jax.jit(jax.grad(loss, (0, 1)))(x, BackwardProbe.zeros(2))
    z, (_, exact) = tanh_gradients(w, x, y)
    slope = 1 - z**2
    u = np.asarray(x_bar) / slope  # x̄ = (1 - z²) u
    residual = np.linalg.norm((slope * u) @ w.T + y - u, axis=1) / np.linalg.norm(y, axis=1)
    np.testing.assert_array_equal(probe.status, Status.MAX_ITER)
    np.testing.assert_allclose(probe.residual, residual, rtol=1e-4)
    assert probe.evaluations == 3
    assert relative_error(x_bar, exact) > 0.02
    assert np.abs(x_bar).min() > 0


@defect(
    "jaxopt J7",
    "an eager call with a new but equal solver object compiled again: 320 ms against 150 ms",
    we="solvers are compared by value: f is not traced again",
)
def test_an_equal_solver_object_is_the_same_solver():
    traces = []

    def f(w, z, x):
        traces.append(None)
        return tanh_cell(w, z, x)

    w, x = np.float32(W), np.float32(X)
    first = deq_fixed_point(f, w, x, solver=Anderson(history=3, tol=1e-5), gradient=Implicit())
    second = deq_fixed_point(f, w, 2 * x, solver=Anderson(history=3, tol=1e-5), gradient=Implicit())
    assert len(traces) == 1
    np.testing.assert_allclose(first, tanh_solution(w, x), atol=1e-4)
    np.testing.assert_allclose(second, tanh_solution(w, 2 * x), atol=1e-4)


@defect(
    "jaxopt J8",
    "Anderson on a bfloat16 state was a TypeError",
    we="half-precision states work forward and backward; sums are taken in float32",
)
@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_bfloat16_states(name):
    x = jnp.asarray(normal(4, 6), jnp.bfloat16)

    def loss(x):
        z, stats = deq_fixed_point(
            lambda _, z, x: jnp.tanh(0.7 * z) + x,
            None,
            x,
            solver=SOLVERS[name](tol=2e-2),
            return_stats=True,
        )
        return z.astype(jnp.float32).sum(), (z, stats)

    gradient, (z, stats) = jax.jit(jax.grad(loss, has_aux=True))(x)
    assert z.dtype == gradient.dtype == jnp.bfloat16
    assert stats.residual.dtype == jnp.float32
    exact_x, z = np.asarray(x, np.float64), np.asarray(z, np.float64)
    residual = residual_of(lambda z: np.tanh(0.7 * z) + exact_x, z)
    assert (residual <= 3e-2).all()
    slope = 0.7 / np.cosh(0.7 * z) ** 2
    np.testing.assert_allclose(np.asarray(gradient, np.float64), 1 / (1 - slope), rtol=0.08)


@defect(
    "jaxopt J9",
    "Anderson did not accelerate for the first history_size steps",
    we="it does from the second point on: a straight line is solved by the third",
)
@pytest.mark.usefixtures("x64")
def test_acceleration_starts_at_the_second_point():
    solver = Anderson(history=5, ridge=0.0, tol=0.0, max_iter=3, trace=True)
    z, stats = solve_fixed_point(lambda _, z, x: 0.9 * z + x, None, np.ones((1, 1)), solver=solver)
    np.testing.assert_allclose(z, 10, rtol=1e-10)  # z = 0, 1, 10
    np.testing.assert_allclose(stats.trace[:2, 0], [1, 0.9 / 1.9])
    assert stats.trace[2, 0] < 1e-10


@defect(
    "jaxopt J10",
    "the state returned was one step past the one whose error was quoted",
    we="the residual in the stats is that of exactly the state returned",
)
@pytest.mark.parametrize("name", ["anderson", "newton"])
@pytest.mark.usefixtures("x64")
def test_the_residual_is_that_of_the_state_returned(name):
    w = symmetric([-0.9, -0.5, 0.5, 0.9])
    solver = SOLVERS[name](tol=0.0, max_iter=3)
    z, stats = solve_fixed_point(tanh_cell, w, X, solver=solver)
    expected = residual_of(lambda z: np.tanh(z @ w + X), np.asarray(z))
    np.testing.assert_allclose(stats.residual, expected, rtol=1e-6)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)


@defect(
    "jaxopt J11",
    "an unrolled solve cost in proportion to max_iter: 0.29 s at 1e4, 3.15 s at 1e5",
    we="f runs as often as there are steps, forward and backward, whatever max_iter is",
)
@pytest.mark.usefixtures("x64")
def test_unrolled_cost_follows_the_steps_taken():
    counts, gradients = [], []
    for max_iter in (50, 2500):
        f = Counter(tanh_cell)

        def loss(w, f=f, max_iter=max_iter):
            solver = Picard(tol=1e-8, max_iter=max_iter)
            z, stats = deq_fixed_point(
                f, w, X, solver=solver, gradient=Unrolled(), return_stats=True
            )
            return jnp.vdot(Y, z), stats.evaluations

        gradient, evaluations = jax.jit(jax.grad(loss, has_aux=True))(W)
        gradients.append(gradient)
        counts.append((int(evaluations), f.read()))
    assert counts[0] == counts[1]
    assert counts[0][0] < 50
    assert counts[0][1] <= 3 * counts[0][0]
    np.testing.assert_allclose(*gradients, rtol=1e-12)


@defect(
    "jaxopt J12",
    "Broyden divided by a denominator that nothing kept from zero",
    we="an update with a vanishing denominator is left out, for that sample alone",
)
@pytest.mark.usefixtures("x64")
def test_broyden_denominator_of_zero():
    gains, x = np.array([1.0, 0.5]), np.array([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])

    def f(gains, z, x):
        return gains[:, None] * z + x  # sample 0: z + x, whose residual never changes

    z, stats = solve_fixed_point(f, gains, x, solver=Broyden(tol=1e-10, max_iter=12))
    np.testing.assert_array_equal(stats.status, [Status.MAX_ITER, Status.CONVERGED])
    np.testing.assert_allclose(z[0], 11 * x[0])  # twelve evaluations, each step plain
    np.testing.assert_allclose(z[1], 2 * x[1], rtol=1e-9)


@defect(
    "google/jaxopt#606",
    "a solver put a tracer of its own into a static value",
    we="nothing leaks under jax.checking_leaks, with a closure over a tracer",
)
@pytest.mark.usefixtures("x64")
def test_no_tracer_leaks():
    def loss(w, x):
        f = lambda _, z, x: tanh_cell(w, z, x)  # noqa: E731
        return jnp.vdot(Y, deq_fixed_point(f, None, x, solver=TIGHT))

    with jax.checking_leaks():
        gradients = jax.jit(jax.grad(loss, (0, 1)))(W, X)
    z, expected = tanh_gradients(W, X, Y)
    assert relative_error(gradients, expected) < 1e-11
    assert relative_error(gradients[1] / (1 - z**2), tanh_adjoint(W, z, Y)) < 1e-11
