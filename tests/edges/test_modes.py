"""JAX's strict modes and its less common ways: loops inside f, export, traced settings, keys."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Execution,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = pytest.mark.slow

SOLVERS = {
    "Picard": Picard(tol=1e-11, max_iter=150),
    "Anderson": Anderson(tol=1e-11, max_iter=60),
    "Broyden": Broyden(tol=1e-11, max_iter=40),
    "NewtonKrylov": NewtonKrylov(tol=1e-11),
}
BACKWARD = SOLVERS | {"GMRES": GMRES(tol=1e-11), "BiCGStab": BiCGStab(tol=1e-11)}
PICARD = SOLVERS["Picard"]
W = np.random.default_rng(0).normal(size=(3, 3)) * 0.3
X = np.random.default_rng(1).normal(size=(4, 3))
Y = np.random.default_rng(2).normal(size=(4, 3))


def cell(w, z, x):
    return jnp.tanh(z @ w + x)


def solution(w=W, x=X):
    z = np.zeros_like(x)
    for _ in range(500):
        z = np.tanh(z @ w + x)
    return z


def dense_gradients(f=cell, params=W, x=X, y=Y, z=None):
    """Of `<y, z*>` by params and x."""
    params, x, y = jax.tree.map(jnp.asarray, (params, x, y))
    z = newton_equilibrium(lambda z: f(params, z, x), jnp.zeros_like(x) if z is None else z)
    return implicit_gradient(lambda inputs, z: f(inputs[0], z, inputs[1]), (params, x), z, y)


@functools.cache
def expected_gradients():
    return dense_gradients()


x64 = pytest.mark.usefixtures("x64")


# A loop inside f whose number of trips is not known when f is traced.

TRIPS = np.array(3, np.int32)


def with_a_loop(params, z, x):
    w, trips = params

    def body(carry):
        count, h = carry
        return count + 1, jnp.tanh(h @ w + x)

    return lax.while_loop(lambda carry: carry[0] < trips, body, (jnp.zeros_like(trips), 0.5 * z))[1]


def with_a_loop_in_numpy(w, z, x):
    h = 0.5 * z
    for _ in range(TRIPS):
        h = np.tanh(h @ w + x)
    return h


def derivative(f, point, direction):
    """Central differences in NumPy."""
    step = 1e-6
    return (f(point + step * direction) - f(point - step * direction)) / (2 * step)


def expected_tangent(terms):
    """`Σ Jᵗ b` over so many terms, all of them for None; b is the tangent of f at fixed z."""
    f, (dw, dx) = with_a_loop_in_numpy, tangents()
    z = np.zeros_like(X)
    for _ in range(300):
        z = f(W, z, X)
    b = derivative(lambda w: f(w, z, X), W, dw) + derivative(lambda x: f(W, z, x), X, dx)
    directions = np.eye(X.size).reshape(X.size, *X.shape)
    columns = [derivative(lambda z: f(W, z, X), z, e).ravel() for e in directions]
    jacobian = np.stack(columns, axis=1)
    if terms is None:
        total = np.linalg.solve(np.eye(X.size) - jacobian, b.ravel())
    else:
        powers = [np.linalg.matrix_power(jacobian, t) for t in range(terms)]
        total = sum(powers) @ b.ravel()
    return total.reshape(X.shape)


def tangents():
    rng = np.random.default_rng(7)
    return rng.normal(size=W.shape), rng.normal(size=X.shape)


LOOP_POLICIES = {
    "Implicit()": (Implicit(), None),
    **{f"Implicit({name})": (Implicit(solver), None) for name, solver in BACKWARD.items()},
    "OneStep": (OneStep(), 1),
    "Neumann(1)": (Neumann(1), 1),
    "Neumann(3)": (Neumann(3), 3),
}


@x64
@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, True) for name in LOOP_POLICIES), ("Implicit()", False), ("Neumann(3)", False)],
)
def test_jvp_through_a_while_loop_in_f(name, jit):
    policy, terms = LOOP_POLICIES[name]

    def solve(w, x):
        params = w, jnp.asarray(TRIPS)
        return deq_fixed_point(with_a_loop, params, x, solver=PICARD, gradient=policy)

    point = jnp.asarray(W), jnp.asarray(X)
    push = lambda *tangent: jax.jvp(solve, point, tangent)  # noqa: E731
    z, tangent = (jax.jit(push) if jit else push)(*map(jnp.asarray, tangents()))
    assert relative_error(z, with_a_loop_in_numpy(W, np.asarray(z), X)) < 1e-10
    assert relative_error(tangent, expected_tangent(terms)) < 1e-7


@x64
@pytest.mark.parametrize("forward", ["Anderson", "Broyden"])
def test_forward_jacobian_through_a_while_loop_in_f(forward):
    def solve(x):
        params = jnp.asarray(W), jnp.asarray(TRIPS)
        return deq_fixed_point(with_a_loop, params, x, solver=SOLVERS[forward])

    got = jax.jit(jax.jacfwd(solve))(jnp.asarray(X[:1]))[0, :, 0]

    def equilibrium(x):
        z = np.zeros_like(x)
        for _ in range(300):
            z = with_a_loop_in_numpy(W, z, x)
        return z[0]

    columns = [derivative(equilibrium, X[:1], e[None]) for e in np.eye(3)]
    np.testing.assert_allclose(got, np.stack(columns, axis=1), rtol=0, atol=1e-7)


# Strict modes.

POLICIES = {
    "Implicit": Implicit(),
    "GMRES": Implicit(GMRES(tol=1e-11)),
    "BiCGStab": Implicit(BiCGStab(tol=1e-11)),
    "Neumann": Neumann(60),
    "Phantom": Phantom(60),
    "Unrolled": Unrolled(),
}
MODES = [(solver, policy) for solver in SOLVERS for policy in ("Implicit", "Unrolled")]
MODES += [("Picard", policy) for policy in ("GMRES", "BiCGStab", "Neumann", "Phantom")]


def value_and_gradients(solver, policy, f=cell, jit=True, **options):
    def loss(w, x):
        z, stats = deq_fixed_point(
            f, w, x, solver=solver, gradient=policy, return_stats=True, **options
        )
        return jnp.vdot(jnp.asarray(Y), z), (z, stats)

    function = jax.grad(loss, (0, 1), has_aux=True)
    gradients, (z, stats) = (jax.jit(function) if jit else function)(jnp.asarray(W), jnp.asarray(X))
    return z, stats, gradients


@x64
@pytest.mark.parametrize(("solver", "policy"), MODES)
def test_rank_promotion_may_raise(solver, policy):
    expected_gradients()
    with jax.numpy_rank_promotion("raise"):
        z, stats, gradients = value_and_gradients(SOLVERS[solver], POLICIES[policy])
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    assert relative_error(z, solution()) < 1e-9
    assert relative_error(gradients, expected_gradients()) < 1e-6


@x64
@pytest.mark.parametrize("solver", ["damped", "mixed", "shrinking", "line search", "atol"])
def test_rank_promotion_may_raise_with_options(solver):
    tol = 1e-11
    execution = Execution(shrink_to=1) if solver == "shrinking" else Execution()
    method = {
        "damped": Picard(damping=0.9, tol=tol, max_iter=200, trace=True),
        "mixed": Anderson(mixing=0.8, tol=tol, max_iter=90, trace=True),
        "shrinking": SOLVERS["Anderson"],
        "line search": Broyden(line_search=True, tol=tol, max_iter=60),
        "atol": Anderson(tol=0.0, atol=1e-11, max_iter=60),
    }[solver]
    with jax.numpy_rank_promotion("raise"):
        z, stats = deq_fixed_point(
            cell,
            jnp.asarray(W),
            jnp.asarray(X),
            solver=method,
            return_stats=True,
            sample_at=(2,),
            execution=execution,
        )[:2]
        u, report = solve_adjoint(
            cell, jnp.asarray(W), jnp.asarray(X), z, jnp.asarray(Y), solver=method
        )
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_array_equal(report.status, Status.CONVERGED)
    assert relative_error(z, solution()) < 1e-9
    slope = 1 - solution() ** 2
    for i in range(4):
        expected = np.linalg.solve(np.eye(3) - W * slope[i], Y[i])
        assert relative_error(u[i], expected) < 1e-8


@x64
@pytest.mark.parametrize(
    ("solver", "jit"), [*((solver, True) for solver in SOLVERS), ("Anderson", False)]
)
def test_debug_nans_with_a_trace(solver, jit):
    """A trace holds no number of its own making where f makes none."""
    method = type(SOLVERS[solver])(tol=1e-11, max_iter=SOLVERS[solver].max_iter, trace=True)
    expected_gradients()

    def run(w, x):
        return deq_fixed_point(cell, w, x, solver=method, return_stats=True)

    with jax.debug_nans(True):
        z, stats = (jax.jit(run) if jit else run)(jnp.asarray(W), jnp.asarray(X))
        gradient = jax.grad(lambda w: jnp.vdot(jnp.asarray(Y), run(w, jnp.asarray(X))[0]))
        by_w = (jax.jit(gradient) if jit else gradient)(jnp.asarray(W))
        jax.block_until_ready((z, stats, by_w))
    assert relative_error(z, solution()) < 1e-9
    assert relative_error(by_w, expected_gradients()[0]) < 1e-8
    trace = np.asarray(stats.trace)
    first = np.linalg.norm(np.tanh(X), axis=1) / np.linalg.norm(np.tanh(X), axis=1)
    np.testing.assert_allclose(trace[0], first)
    for sample, count in enumerate(np.asarray(stats.iterations)):
        assert np.isfinite(trace[:count, sample]).all()
        np.testing.assert_array_equal(trace[count - 1, sample], stats.residual[sample])


@x64
@pytest.mark.parametrize("solver", SOLVERS)
def test_debug_nans_with_a_sample_of_zeros_and_a_zero_cotangent(solver):
    """Nothing divides by zero on the way, and then selects something else."""
    x, y = jnp.asarray(X).at[1].set(0), jnp.asarray(Y).at[2].set(0)

    def loss(w, x):
        return jnp.vdot(y, deq_fixed_point(cell, w, x, solver=SOLVERS[solver]))

    with jax.debug_nans(True):
        gradients = jax.block_until_ready(jax.grad(loss, (0, 1))(jnp.asarray(W), x))
    assert relative_error(gradients, dense_gradients(x=x, y=y)) < 1e-8


@x64
@pytest.mark.parametrize(
    ("solver", "jit"), [*((solver, False) for solver in SOLVERS), ("Anderson", True)]
)
def test_a_state_with_an_empty_leaf(solver, jit):
    """Under `jvp` without `jit` XLA has no Cholesky factorisation for a loop with an empty leaf."""

    def f(w, z, x):
        return {"a": jnp.tanh(z["a"] @ w + x), "empty": z["empty"] + z["a"].sum(1)[:, None]}

    def run(w, x):
        z0 = {"a": jnp.zeros_like(x), "empty": jnp.zeros((4, 0))}
        return deq_fixed_point(f, w, x, z0, solver=SOLVERS[solver], return_stats=True)

    def value(w, x):
        return run(w, x)[0]["a"]

    def push(dw, dx):
        return jax.jvp(value, (w, x), (dw, dx))

    def pull(w, x):
        return jax.grad(lambda w, x: jnp.vdot(jnp.asarray(Y), value(w, x)), (0, 1))(w, x)

    w, x = jnp.asarray(W), jnp.asarray(X)
    z, stats = run(w, x)
    assert z["empty"].shape == (4, 0)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    by_w, by_x = expected_gradients()
    assert relative_error((jax.jit(pull) if jit else pull)(w, x), (by_w, by_x)) < 1e-8
    dw, dx = tangents()
    primal, tangent = (jax.jit(push) if jit else push)(jnp.asarray(dw), jnp.asarray(dx))
    assert relative_error(primal, solution()) < 1e-9
    # Forward and reverse mode are transposes of each other.
    np.testing.assert_allclose(
        (Y * tangent).sum(), (dw * by_w).sum() + (dx * by_x).sum(), rtol=1e-8
    )


@x64
def test_a_state_with_an_empty_leaf_and_second_derivatives():
    def total(x):
        def f(w, z, x):
            return {"a": jnp.tanh(z["a"] @ w + x), "empty": z["empty"]}

        z0 = {"a": jnp.zeros_like(x), "empty": jnp.zeros((4, 0))}
        options = {"solver": SOLVERS["NewtonKrylov"], "gradient": Implicit(SOLVERS["Anderson"])}
        return jnp.vdot(jnp.asarray(Y), deq_fixed_point(f, jnp.asarray(W), x, z0, **options)["a"])

    dx = tangents()[1]
    _, curvature = jax.jvp(jax.grad(total), (jnp.asarray(X),), (jnp.asarray(dx),))
    step = 1e-5
    above, below = (dense_gradients(x=X + sign * step * dx)[1] for sign in (1, -1))
    assert relative_error(curvature, (np.asarray(above) - np.asarray(below)) / (2 * step)) < 1e-5


@x64
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_state_of_empty_leaves_only(solver):
    def f(params, z, x):
        return z

    z, stats = solve_fixed_point(f, (), (), jnp.zeros((4, 0)), solver=SOLVERS[solver])
    assert z.shape == (4, 0)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)


# Export with a batch size that is not known.


@x64
@pytest.mark.parametrize("solver", SOLVERS)
def test_export_with_a_symbolic_batch(solver):
    matrix = jnp.asarray(np.random.default_rng(3).normal(size=(5, 5)) * 0.2)

    def total(x):
        z, stats = deq_fixed_point(cell, matrix, x, solver=SOLVERS[solver], return_stats=True)
        return z.sum(), (z, stats.status)

    function = jax.jit(jax.grad(total, has_aux=True))
    shape = jax.export.symbolic_shape("b, 5")
    exported = jax.export.export(function)(jax.ShapeDtypeStruct(shape, jnp.float64))
    again = jax.export.deserialize(exported.serialize())
    for batch in (2, 7):
        x = np.random.default_rng(batch).normal(size=(batch, 5))
        gradient, (value, status) = again.call(jnp.asarray(x))
        np.testing.assert_array_equal(status, Status.CONVERGED)
        z = solution(np.asarray(matrix), x)
        assert relative_error(value, z) < 1e-9
        slope = 1 - z**2
        for i in range(batch):
            u = np.linalg.solve(np.eye(5) - np.asarray(matrix) * slope[i], np.ones(5))
            assert relative_error(gradient[i], slope[i] * u) < 1e-8


@x64
def test_export_with_a_symbolic_batch_and_a_krylov_backward_solver():
    matrix = jnp.asarray(W)

    def gradient(x):
        options = {"solver": PICARD, "gradient": Implicit(GMRES(tol=1e-11))}
        return jax.grad(lambda x: deq_fixed_point(cell, matrix, x, **options).sum())(x)

    shape = jax.export.symbolic_shape("b, 3")
    exported = jax.export.export(jax.jit(gradient))(jax.ShapeDtypeStruct(shape, jnp.float64))
    for batch in (1, 4):
        expected = dense_gradients(x=X[:batch], y=np.ones((batch, 3)))[1]
        assert relative_error(exported.call(jnp.asarray(X[:batch])), expected) < 1e-8


# Numbers of a solver that are NumPy scalars, arrays, or traced.

SETTINGS = {
    "Picard.tol": (lambda v: Picard(tol=v, max_iter=300), (1e-2, 1e-5, 1e-9)),
    "Picard.atol": (lambda v: Picard(tol=0.0, atol=v, max_iter=300), (1e-2, 1e-5, 1e-9)),
    "Picard.damping": (lambda v: Picard(damping=v, tol=1e-9, max_iter=300), (0.4, 0.7, 1.0)),
    "Anderson.tol": (lambda v: Anderson(tol=v, max_iter=60), (1e-2, 1e-5, 1e-9)),
    "Anderson.mixing": (lambda v: Anderson(mixing=v, tol=1e-9, max_iter=90), (0.3, 0.6, 1.0)),
    "Anderson.ridge": (lambda v: Anderson(ridge=v, tol=1e-9, max_iter=90), (1e-1, 1e-4, 0.0)),
    "Broyden.tol": (lambda v: Broyden(tol=v, max_iter=40), (1e-2, 1e-5, 1e-9)),
    "NewtonKrylov.tol": (lambda v: NewtonKrylov(tol=v), (1e-2, 1e-5, 1e-9)),
}
KINDS = {
    "NumPy scalar": np.float64,
    "NumPy float32": np.float32,
    "0-d NumPy array": np.asarray,
    "0-d array": jnp.asarray,
}


def run_with(solver):
    z, stats = solve_fixed_point(cell, jnp.asarray(W), jnp.asarray(X), solver=solver)
    return np.asarray(z), np.asarray(stats.iterations)


def check_solution(z, solver_field, value):
    tol = value if solver_field.endswith("tol") else 1e-9
    # ‖z*‖ is about 2, and the equation contracts.
    assert np.abs(z - solution()).max() < 20 * float(tol)


@x64
# Every field in two kinds, and every kind in the fields of Picard.
@pytest.mark.parametrize(
    ("field", "kind"),
    [
        (field, kind)
        for field in SETTINGS
        for kind in KINDS
        if field.startswith("Picard") or kind in ("NumPy float32", "0-d array")
    ],
)
def test_settings_that_are_numpy_scalars_or_arrays(field, kind):
    make, values = SETTINGS[field]
    value = values[1]
    z, iterations = run_with(make(KINDS[kind](value)))
    expected, expected_iterations = run_with(make(value))
    np.testing.assert_array_equal(iterations, expected_iterations)
    # 0.6 in float32 is another number than in float64.
    tolerance = 1e-7 if kind == "NumPy float32" else 1e-13
    np.testing.assert_allclose(z, expected, rtol=0, atol=tolerance)
    check_solution(z, field, value)


@x64
@pytest.mark.parametrize("field", SETTINGS)
def test_traced_settings_are_not_compiled_again(field):
    make, values = SETTINGS[field]

    @jax.jit
    def solve(value, w, x):
        return solve_fixed_point(cell, w, x, solver=make(value))

    counts = []
    for value in values:
        z, stats = solve(jnp.asarray(value), jnp.asarray(W), jnp.asarray(X))
        np.testing.assert_array_equal(stats.status, Status.CONVERGED)
        check_solution(z, field, value)
        if value == values[1]:  # the one whose solve with a number is compiled elsewhere too
            expected, expected_iterations = run_with(make(value))
            np.testing.assert_array_equal(stats.iterations, expected_iterations)
            np.testing.assert_allclose(z, expected, rtol=0, atol=1e-10)
        counts.append(int(stats.evaluations))
    assert solve._cache_size() == 1
    assert len(set(counts)) > 1


@x64
def test_a_traced_tolerance_is_kept_as_in_numpy():
    """The iterations of Picard, counted in NumPy for each tolerance."""
    solve = jax.jit(
        lambda tol: (
            solve_fixed_point(
                cell, jnp.asarray(W), jnp.asarray(X), solver=Picard(tol=tol, max_iter=300)
            ).stats.iterations
        )
    )
    for tol in (1e-1, 1e-3, 1e-6):
        z, counts = np.zeros_like(X), np.zeros(4, int)
        for number in range(1, 100):
            image = np.tanh(z @ W + X)
            residual = np.linalg.norm(image - z, axis=1) / np.linalg.norm(image, axis=1)
            counts = np.where((counts == 0) & (residual <= tol), number, counts)
            z = image
        np.testing.assert_array_equal(solve(jnp.asarray(tol)), counts)


@x64
@pytest.mark.parametrize(
    ("field", "policy"),
    [
        ("Picard.damping", "Implicit"),
        ("Picard.damping", "Unrolled"),
        ("Anderson.mixing", "Implicit"),
        ("Anderson.ridge", "Unrolled"),
    ],
)
def test_gradients_with_traced_settings(field, policy):
    make, values = SETTINGS[field]

    @jax.jit
    def gradients(value, w, x):
        def loss(w, x):
            z = deq_fixed_point(cell, w, x, solver=make(value), gradient=POLICIES[policy])
            return jnp.vdot(jnp.asarray(Y), z)

        return jax.grad(loss, (0, 1))(w, x)

    for value in values[1:]:
        got = gradients(jnp.asarray(value), jnp.asarray(W), jnp.asarray(X))
        assert relative_error(got, expected_gradients()) < 1e-5
    assert gradients._cache_size() == 1


@pytest.mark.museum(
    "torchdeq T9: some solver options could not be set, and tol and max_iter of one call raised"
)
@x64
@pytest.mark.parametrize("kind", ["Implicit.tol", "GMRES.tol", "BiCGStab.tol", "Anderson.tol"])
def test_a_traced_tolerance_of_the_backward_solve(kind):
    make = {
        "Implicit.tol": lambda tol: Implicit(Picard(max_iter=200), tol=tol),
        "GMRES.tol": lambda tol: Implicit(GMRES(tol=tol)),
        "BiCGStab.tol": lambda tol: Implicit(BiCGStab(tol=tol)),
        "Anderson.tol": lambda tol: Implicit(Anderson(tol=tol)),
    }[kind]

    @jax.jit
    def run(tol, w, x, probe):
        def loss(w, x, probe):
            z = deq_fixed_point(cell, w, x, solver=PICARD, gradient=make(tol), backward_probe=probe)
            return jnp.vdot(jnp.asarray(Y), z)

        *gradients, report = jax.grad(loss, (0, 1, 2))(w, x, probe)
        return gradients, report

    seen = []
    for tol in (3e-1, 1e-9):
        gradients, report = run(
            jnp.asarray(tol), jnp.asarray(W), jnp.asarray(X), BackwardProbe.zeros(4)
        )
        assert (report.residual <= tol).all()
        assert relative_error(gradients, list(expected_gradients())) < 10 * tol
        seen.append(float(report.evaluations))
    assert seen[0] < seen[1]
    assert run._cache_size() == 1


# Keys.

KEY_MODES = [(solver, "Implicit") for solver in SOLVERS]
KEY_MODES += [("Picard", policy) for policy in POLICIES if policy != "Implicit"]
KEY_MODES += [("Anderson", "Unrolled"), ("NewtonKrylov", "Unrolled")]
# In params and under jit in every mode; closed over, or eagerly, where the way of the key differs.
KEY_WAYS = [(*mode, False, True) for mode in KEY_MODES] + [
    ("Picard", "Implicit", False, False),
    ("Picard", "Implicit", True, False),
    ("Picard", "Implicit", True, True),
    ("Picard", "Phantom", True, True),
    ("Picard", "Unrolled", True, True),
]


def draws_a_mask(params, z, x):
    w, mask = params
    return jnp.tanh((mask * z) @ w + x)


@functools.cache
def mask_and_gradients():
    mask = np.asarray(jax.random.bernoulli(jax.random.key(5), 0.7, (4, 3)), np.float64)
    return mask, dense_gradients(lambda w, z, x: draws_a_mask((w, jnp.asarray(mask)), z, x))


@pytest.mark.museum(
    "JAX, closure_convert (jax#14760): random keys that a function closes over could not be "
    "hoisted out of it"
)
@x64
@pytest.mark.parametrize(("solver", "policy", "closes_over", "jit"), KEY_WAYS)
def test_key_reuse_is_not_reported_for_one_mask_a_solve(solver, policy, closes_over, jit):
    """f draws the same mask in each evaluation, on purpose."""
    mask, expected = mask_and_gradients()

    def loss(w, x, key):
        def f(params, z, x):
            mine = key if closes_over else params["key"]
            drawn = jax.random.bernoulli(mine, 0.7, z.shape)
            return draws_a_mask((params["w"], drawn.astype(z.dtype)), z, x)

        params = {"w": w} if closes_over else {"w": w, "key": key}
        z = deq_fixed_point(f, params, x, solver=SOLVERS[solver], gradient=POLICIES[policy])
        return jnp.vdot(jnp.asarray(Y), z), z

    with jax.debug_key_reuse(True):
        gradient = jax.grad(loss, (0, 1), has_aux=True)
        gradient = jax.jit(gradient) if jit else gradient
        gradients, z = gradient(jnp.asarray(W), jnp.asarray(X), jax.random.key(5))
    assert relative_error(z, np.tanh((mask * np.asarray(z)) @ W + X)) < 1e-10
    assert relative_error(gradients, expected) < 1e-6


@x64
@pytest.mark.parametrize("solver", SOLVERS)
def test_key_reuse_in_an_eager_call(solver):
    def f(params, z, x):
        mask = jax.random.bernoulli(params["key"], 0.7, z.shape).astype(z.dtype)
        return jnp.tanh((mask * z) @ params["w"] + x)

    mask = np.asarray(jax.random.bernoulli(jax.random.key(6), 0.7, (4, 3)), np.float64)
    with jax.debug_key_reuse(True):
        params = {"w": jnp.asarray(W), "key": jax.random.key(6)}
        z = deq_fixed_point(f, params, jnp.asarray(X), solver=SOLVERS[solver])
    assert relative_error(z, np.tanh((mask * np.asarray(z)) @ W + X)) < 1e-10


# Mixed precision in a scan.


def total_over_a_scan(solve):
    """The gradient, by w and by all x, of a sum of equilibria of which each feeds the next."""

    def total(w, xs):
        def body(carry, x):
            z = solve(w, x + 0.5 * carry)
            return z["a"], z["a"].sum() + z["b"].astype(jnp.float64).sum()

        return lax.scan(body, jnp.zeros((2, 3)), xs)[1].sum()

    return jax.jit(jax.grad(total, (0, 1)))(jnp.asarray(W), jnp.asarray(X.reshape(2, 2, 3)))


@functools.cache
def total_over_a_scan_of_long_loops():
    def plain(w, z, x):
        return {
            "a": jnp.tanh(z["a"] @ w + 0.2 * z["b"] + x),
            "b": jnp.tanh(z["b"] @ w.T - 0.3 * z["a"] + x),
        }

    def long_loop(w, x):
        z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3))}
        return lax.scan(lambda z, _: (plain(w, z, x), None), z0, length=150)[0]

    return total_over_a_scan(long_loop)


@x64
@pytest.mark.parametrize(
    ("solver", "policy"),
    [
        ("Picard", "Unrolled"),
        ("Anderson", "Unrolled"),
        ("Anderson", "Implicit"),
        ("Broyden", "Implicit"),
        ("NewtonKrylov", "Unrolled"),
    ],
)
def test_a_state_of_two_precisions_in_a_scan(solver, policy):
    method = {
        "Picard": Picard(tol=1e-6, max_iter=60),
        "Anderson": Anderson(tol=1e-6, max_iter=30),
        "Broyden": Broyden(tol=1e-6, max_iter=20),
        "NewtonKrylov": NewtonKrylov(tol=1e-6),
    }[solver]

    def f(w, z, x):
        b = z["b"].astype(jnp.float64)
        a = jnp.tanh(z["a"] @ w + 0.2 * b + x)
        b = jnp.tanh(b @ w.T - 0.3 * z["a"] + x)
        return {"a": a, "b": b.astype(jnp.float32)}

    def equilibrium(w, x):
        z0 = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 3), jnp.float32)}
        return deq_fixed_point(f, w, x, z0, solver=method, gradient=POLICIES[policy])

    got = total_over_a_scan(equilibrium)
    assert jax.tree.map(lambda a: a.dtype, got) == (jnp.float64, jnp.float64)
    assert relative_error(got, total_over_a_scan_of_long_loops()) < 1e-3


# Params with leaves that are no arrays.


class Layer:
    """A pytree whose leaves are a matrix, a function and a string."""

    def __init__(self, w, activation, name):
        self.w, self.activation, self.name = w, activation, name


jax.tree_util.register_pytree_node(
    Layer, lambda a: ((a.w, a.activation, a.name), None), lambda _, leaves: Layer(*leaves)
)


def f_of_a_layer(layer, z, x):
    assert layer.name == "recurrent"
    return layer.activation(z @ layer.w + x)


@x64
@pytest.mark.parametrize(
    ("solver", "policy", "jit"),
    [(*mode, True) for mode in MODES if mode[0] == "Picard" or mode[1] == "Implicit"]
    + [("Picard", "Implicit", False), ("NewtonKrylov", "Unrolled", False)],
)
def test_params_with_a_function_and_a_string(solver, policy, jit):
    def loss(w, x):
        layer = Layer(w, jnp.tanh, "recurrent")
        z = deq_fixed_point(
            f_of_a_layer, layer, x, solver=SOLVERS[solver], gradient=POLICIES[policy]
        )
        return jnp.vdot(jnp.asarray(Y), z)

    gradient = jax.grad(loss, (0, 1))
    got = (jax.jit(gradient) if jit else gradient)(jnp.asarray(W), jnp.asarray(X))
    assert relative_error(got, expected_gradients()) < 1e-6


@x64
def test_another_function_among_the_params_is_another_equation():
    w, x = jnp.asarray(W), jnp.asarray(X)
    for activation in (np.tanh, np.sin, np.tanh):
        layer = Layer(w, getattr(jnp, activation.__name__), "recurrent")
        z = deq_fixed_point(f_of_a_layer, layer, x, solver=PICARD)
        assert relative_error(activation(np.asarray(z) @ W + X), z) < 1e-10
        solution = solve_fixed_point(f_of_a_layer, layer, x, solver=PICARD)
        np.testing.assert_array_equal(solution.value, z)
    u, stats = solve_adjoint(f_of_a_layer, layer, x, z, jnp.asarray(Y), solver=PICARD)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    slope = 1 - np.asarray(z) ** 2
    for i in range(4):
        assert relative_error(u[i], np.linalg.solve(np.eye(3) - W * slope[i], Y[i])) < 1e-8


@x64
def test_a_string_in_x():
    def f(w, z, inputs):
        assert inputs["name"] == "first"
        return cell(w, z, inputs["x"])

    inputs = {"x": jnp.asarray(X), "name": "first"}
    z = deq_fixed_point(f, jnp.asarray(W), inputs, jnp.zeros((4, 3)), solver=PICARD)
    assert relative_error(z, solution()) < 1e-9


@x64
@pytest.mark.parametrize("solver", ["Anderson", "NewtonKrylov"])
def test_an_equinox_module_as_params(solver):
    equinox = pytest.importorskip("equinox")

    class Recurrent(equinox.Module):
        linear: equinox.nn.Linear
        activation: object
        name: str

        def __call__(self, z, x):
            return self.activation(jax.vmap(self.linear)(z) + x)

    linear = equinox.nn.Linear(3, 3, use_bias=False, dtype=jnp.float64, key=jax.random.key(0))
    linear = equinox.tree_at(lambda linear: linear.weight, linear, jnp.asarray(W.T))
    module = Recurrent(linear, jax.nn.tanh, "recurrent")

    @equinox.filter_value_and_grad
    def loss(module, x):
        z = deq_fixed_point(lambda m, z, x: m(z, x), module, x, solver=SOLVERS[solver])
        return jnp.vdot(jnp.asarray(Y), z)

    for function in (loss, equinox.filter_jit(loss)):
        value, gradient = function(module, jnp.asarray(X))
        np.testing.assert_allclose(value, (Y * solution()).sum(), rtol=1e-8)
        assert relative_error(gradient.linear.weight.T, expected_gradients()[0]) < 1e-7


@x64
def test_an_ensemble_of_equinox_modules():
    equinox = pytest.importorskip("equinox")
    make = lambda key: equinox.nn.MLP(  # noqa: E731
        3, 3, 4, 1, activation=jax.nn.tanh, dtype=jnp.float64, key=key
    )
    keys = jax.random.split(jax.random.key(0), 3)
    ensemble = equinox.filter_vmap(make)(keys)

    def solve(module, x):
        f = lambda m, z, x: 0.3 * jax.vmap(m)(z) + x  # noqa: E731
        return deq_fixed_point(f, module, x, solver=PICARD)

    got = equinox.filter_vmap(solve, in_axes=(equinox.if_array(0), None))(ensemble, jnp.asarray(X))
    for value, key in zip(got, keys, strict=True):
        first, last = make(key).layers
        z = np.asarray(value)
        hidden = np.tanh(z @ np.asarray(first.weight).T + np.asarray(first.bias))
        image = 0.3 * (hidden @ np.asarray(last.weight).T + np.asarray(last.bias)) + X
        assert relative_error(image, z) < 1e-10


# Collectives: devices that f ties together have to make as many trips as each other.


def mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))


def by_all_gather(mean):
    return lax.all_gather(mean, "data").mean(0)


def by_tiled_all_gather(mean):
    return lax.all_gather(mean[None], "data", tiled=True).mean(0)


def by_psum_scatter(mean):
    copies = jnp.broadcast_to(mean, (4, *mean.shape))
    return lax.psum_scatter(copies, "data", tiled=False) / 4


def by_all_to_all(mean):
    copies = jnp.broadcast_to(mean, (4, *mean.shape))
    return lax.all_to_all(copies, "data", 0, 0, tiled=True).mean(0)


def by_pmean(mean):
    return lax.pmean(mean, "data")


def by_psum(mean):
    return lax.psum(mean, ("data",)) / 4


def by_permutations(mean):
    total = mean
    for shift in (1, 2, 3):
        total = total + lax.ppermute(mean, "data", [(i, (i + shift) % 4) for i in range(4)])
    return total / 4


def by_pmean_in_a_nested_jit(mean):
    return jax.jit(lambda mean: lax.pmean(mean, "data"))(mean)


def by_all_gather_in_a_loop(mean):
    gather = lambda _, m: m + lax.all_gather(mean, "data").mean(0)  # noqa: E731
    return lax.fori_loop(0, 1, gather, 0 * mean)


def by_ragged_all_to_all(mean):
    """Not for the CPU to run, but to be traced."""
    copies = jnp.broadcast_to(mean, (4, *mean.shape))
    places = jnp.arange(4, dtype=jnp.int32)
    ones = jnp.ones(4, jnp.int32)
    here = jnp.full(4, lax.axis_index("data"), jnp.int32)
    out = jnp.zeros_like(copies)
    return lax.ragged_all_to_all(copies, out, places, ones, here, ones, axis_name="data").mean(0)


def by_pbroadcast(mean):
    """Not for the CPU to run, but to be traced."""
    return lax.pbroadcast(mean, ("data",), 0)


MEANS = [
    by_all_gather,
    by_tiled_all_gather,
    by_psum_scatter,
    by_all_to_all,
    by_pmean,
    by_psum,
    by_permutations,
    by_pmean_in_a_nested_jit,
    by_all_gather_in_a_loop,
]


def coupled(mean):
    return lambda w, z, x: jnp.tanh((z - 0.5 * mean(z.mean(0))) @ w + x)


def uneven():
    """Samples of very different sizes, so that devices alone would make different trips."""
    return np.random.default_rng(4).normal(size=(8, 3)) * np.logspace(-3, 0.5, 8)[:, None]


@functools.cache
def coupled_reference():
    x, y = uneven(), np.random.default_rng(5).normal(size=(8, 3))
    f = coupled(lambda mean: mean)
    z = newton_equilibrium(lambda z: f(jnp.asarray(W), z, jnp.asarray(x)), jnp.zeros((8, 3)))
    return SimpleNamespace(x=x, y=y, z=z, gradients=dense_gradients(f, W, x, y))


def check_collective(mean, solver, policy, **options):
    reference = coupled_reference()

    def local(w, x):
        return deq_fixed_point(coupled(mean), w, x, solver=solver, gradient=policy)

    over_batch = jax.shard_map(
        local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"), **options
    )

    def loss(w, x):
        z = over_batch(w, x)
        return jnp.vdot(jnp.asarray(reference.y), z), z

    gradients, z = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
        jnp.asarray(W), jnp.asarray(reference.x)
    )
    assert relative_error(z, reference.z) < 1e-8
    assert relative_error(gradients, reference.gradients) < 1e-7


@x64
@pytest.mark.parametrize("mean", MEANS)
def test_collectives_do_not_hang(mean):
    check_collective(mean, PICARD, Implicit())


@x64
@pytest.mark.parametrize(
    ("mean", "solver"),
    [(by_all_gather, "Anderson"), (by_psum_scatter, "Broyden"), (by_all_to_all, "Anderson")],
)
def test_collectives_do_not_hang_with_other_solvers(mean, solver):
    check_collective(mean, SOLVERS[solver], Implicit(PICARD))


@x64
@pytest.mark.parametrize("mean", [*MEANS, by_ragged_all_to_all, by_pbroadcast])
def test_collectives_are_recognised(mean):
    """Shrinking refuses an f that communicates, which shows what the library has seen."""

    def f(w, z, x):  # rows of a shard stay apart
        return jnp.tanh((z - 0.5 * mean(z)) @ w + x)

    def local(w, x):
        execution = Execution(shrink_to=1)
        return deq_fixed_point(f, w, x, solver=PICARD, execution=execution)

    over_batch = jax.shard_map(
        local, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )
    with pytest.raises(ValueError, match=r"communicates over the mesh axes \('data',\)"):
        jax.eval_shape(over_batch, jnp.asarray(W), jnp.asarray(uneven()))
