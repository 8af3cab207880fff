"""Gradient policies against explicit series, explicit loops and dense solves, float64."""

import functools

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
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

STAY = Picard(tol=0.0, max_iter=1)
"""Returns its start: a policy at any point one likes, near a solution or far from it."""

TIGHT = Broyden(tol=1e-13, max_iter=100)
SHINE = Implicit(reuse=True, max_iter=1)

# Every policy, with a solver that makes it exactly what `reference` says: the ones that depend on
# the point alone start at a solution and stay there, the others start from zero.
EXACT = {
    "OneStep": (OneStep(), STAY),
    "Neumann": (Neumann(4, 0.7), STAY),
    "Phantom": (Phantom(4, 0.7), STAY),
    "SHINE": (Implicit(reuse=True, tol=1e-13, max_iter=100), TIGHT),
    "Unrolled": (Unrolled(), Picard(tol=0.0, max_iter=100)),
}
FROM_ZERO = ("SHINE", "Unrolled")
SAMPLES = 3

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def cell(params, z, x):
    return jnp.tanh(z @ params["W"].T + x + params["b"])


def problem(seed=0):
    params = {"W": normal(4, 4, seed=seed, scale=0.3), "b": normal(4, seed=seed + 1)}
    return params, normal(SAMPLES, 4, seed=seed + 2), normal(SAMPLES, 4, seed=seed + 3)


def dot(a, b):
    return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))


@functools.lru_cache
def compiled(policy, solver):
    """Gradients of `⟨y, z*⟩` by params, x and the start, and z*, as a function of all four."""

    def loss(params, x, z0, y):
        z = deq_fixed_point(cell, params, x, z0, solver=solver, gradient=policy)
        return dot(y, z), z

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


def gradient(policy, solver, params, x, y, z0=None):
    """Gradients by params and x, and z*."""
    z0 = jnp.zeros_like(x) if z0 is None else z0
    (by_params, by_x, _), z = compiled(policy, solver)(params, x, z0, y)
    return (by_params, by_x), z


# The cell's formulas in NumPy.


def evaluate(params, z, x):
    return np.tanh(np.asarray(z) @ np.asarray(params["W"]).T + np.asarray(x + params["b"]))


def solution(params, x):
    z = np.zeros(x.shape)
    for _ in range(400):
        z = evaluate(params, z, x)
    return z


def pulled_back(params, x, z, u):
    """`(∂f/∂(params, x))ᵀ u` at z."""
    by_x = (1 - evaluate(params, z, x) ** 2) * np.asarray(u)
    return {"W": by_x.T @ np.asarray(z), "b": by_x.sum(0)}, by_x


def transposed_jacobians(params, x, z):
    """Jᵀ of each sample."""
    slopes = 1 - evaluate(params, z, x) ** 2
    return [np.asarray(params["W"]).T * slope for slope in slopes]


def series(params, x, z, y, terms, damping):
    """`Σ_{t<k} (τ Jᵀ + (1 - τ) I)ᵗ τ y`, from matrix powers."""
    u = []
    for transposed, one_y in zip(transposed_jacobians(params, x, z), y, strict=True):
        one = damping * transposed + (1 - damping) * np.eye(len(one_y))
        powers = sum(np.linalg.matrix_power(one, t) for t in range(terms))
        u.append(powers @ (damping * np.asarray(one_y)))
    return np.stack(u)


def start(name, z):
    return jax.tree.map(jnp.zeros_like if name in FROM_ZERO else jnp.asarray, z)


def reference(name, params, x, z, y):
    """What the policies of `EXACT` have to give at a solution z."""
    if name == "OneStep":
        u = y
    elif name in ("Neumann", "Phantom"):
        u = series(params, x, z, y, 4, 0.7)
    else:
        u = [
            np.linalg.solve(np.eye(4) - transposed, np.asarray(one_y))
            for transposed, one_y in zip(transposed_jacobians(params, x, z), y, strict=True)
        ]
    return pulled_back(params, x, z, u)


def damped_steps(params, x, z, y, steps, damping):
    """Gradient of `⟨y, z_k⟩` after k explicit damped steps from z, by ordinary differentiation."""

    def loss(params, x):
        point = jnp.asarray(z)
        for _ in range(steps):
            point = damping * cell(params, point, x) + (1 - damping) * point
        return dot(y, point)

    return jax.grad(loss, argnums=(0, 1))(params, x)


def points():
    """A solution, and a point that is far from one."""
    params, x, y = problem()
    return params, x, y, {"solved": solution(params, x), "early": normal(SAMPLES, 4, seed=6)}


@pytest.mark.museum("DEQ.jl: tests looked at gradients for being finite and no further")
@pytest.mark.slow
def test_one_step_is_one_tracked_call():
    params, x, y, places = points()
    for z in places.values():
        got, value = gradient(OneStep(), STAY, params, x, y, z)
        np.testing.assert_array_equal(value, z)
        tracked = jax.grad(lambda params, x: dot(y, cell(params, jnp.asarray(z), x)), (0, 1))
        assert relative_error(got, tracked(params, x)) < 1e-14
        assert relative_error(got, pulled_back(params, x, z, y)) < 1e-14


@pytest.mark.museum("DEQ.jl: tests looked at gradients for being finite and no further")
@pytest.mark.parametrize(("terms", "damping"), [(1, 0.5), (2, 1.0), (6, 1.0), (5, 0.4)])
def test_neumann_is_the_series(terms, damping):
    params, x, y, places = points()
    for z in places.values():
        got, value = gradient(Neumann(terms, damping), STAY, params, x, y, z)
        np.testing.assert_array_equal(value, z)
        u = series(params, x, z, y, terms, damping)
        assert relative_error(got, pulled_back(params, x, z, u)) < 1e-14


@pytest.mark.museum("DEQ.jl: tests looked at gradients for being finite and no further")
@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (2, 1.0), (5, 0.4), (9, 0.8)])
def test_phantom_is_backpropagation_through_damped_steps(steps, damping):
    params, x, y, places = points()
    for place, z in places.items():
        got, value = gradient(Phantom(steps, damping), STAY, params, x, y, z)
        np.testing.assert_array_equal(value, z)
        assert relative_error(got, damped_steps(params, x, z, y, steps, damping)) < 1e-14
        # At a solution it is the series; elsewhere it is not.
        u = series(params, x, z, y, steps, damping)
        distance = relative_error(got, pulled_back(params, x, z, u))
        assert distance < 1e-12 if place == "solved" or steps == 1 else distance > 1e-2


EARLY = {
    "Implicit": (Implicit(Picard(tol=1e-13, max_iter=300)), Anderson(tol=1e-1)),
    "OneStep": (OneStep(), Picard(tol=1e-1)),
    "Neumann": (Neumann(4, 0.7), Anderson(tol=1e-1)),
    "Phantom": (Phantom(4, 0.7), Picard(tol=1e-1)),
    "SHINE": (SHINE, Broyden(tol=1e-1)),
    "Unrolled": (Unrolled(), Picard(tol=1e-1)),
}


@pytest.mark.parametrize("name", EARLY)
def test_the_value_is_the_solvers(name):
    policy, solver = EARLY[name]
    params, x, y = problem()
    plain = solve_fixed_point(cell, params, x, solver=solver)
    got, z = gradient(policy, solver, params, x, y)
    # Compiled in two programs; the compiler may join operations of one in another way.
    np.testing.assert_allclose(z, plain.value, rtol=1e-15, atol=2e-16)
    residual = np.linalg.norm(evaluate(params, z, x) - z, axis=1)
    residual /= np.linalg.norm(evaluate(params, z, x), axis=1)
    assert residual.min() > 1e-4  # not solved
    np.testing.assert_allclose(plain.stats.residual, residual, rtol=1e-6)
    # The gradient, too, is that at the state which was returned.
    if name == "Phantom":
        assert relative_error(got, damped_steps(params, x, z, y, 4, 0.7)) < 1e-12
    elif name in ("Implicit", "OneStep", "Neumann"):
        assert relative_error(got, reference(name, params, x, z, y)) < 1e-10


def tree_cell(params, z, x):
    """A state of two leaves of different shapes, with an integer and a key among the params."""
    a, b = z["a"], z["b"]
    noise = 0.1 * jax.random.normal(params["key"], a.shape[1:], a.dtype)
    mixed = jnp.tanh(jnp.roll(a, params["shift"], axis=1) @ params["W"] + x["in"] + noise)
    return {
        "a": 0.6 * mixed + 0.1 * b.sum((1, 2))[:, None],
        "b": 0.4 * jnp.sin(b) + 0.2 * mixed[:, :2, None] * params["scale"],
    }


@functools.lru_cache
def tree_problem():
    """Params, those that have no gradient, the input, a solution, a cotangent, and references."""
    params = {"W": normal(4, 4, scale=0.3), "scale": normal(3, seed=1)}
    extra = {"key": jax.random.key(3), "shift": jnp.asarray(1)}
    x = {"in": normal(SAMPLES, 4, seed=2)}
    z = {"a": jnp.zeros((SAMPLES, 4)), "b": jnp.zeros((SAMPLES, 2, 3))}
    y = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=3), z)

    def f(inputs, z):
        return tree_cell(inputs[0] | extra, z, inputs[1])

    inputs = params, x
    z = newton_equilibrium(lambda z: f(inputs, z), z)

    def stepped(terms, damping):
        def loss(inputs):
            point = z
            for _ in range(terms):
                fz = f(inputs, point)
                point = jax.tree.map(lambda z, fz: z + damping * (fz - z), point, fz)
            return dot(y, point)

        return jax.jit(jax.grad(loss))(inputs)

    # The series needs no reference of its own: at a solution it is the phantom gradient, which
    # `test_phantom...` shows with matrix powers.
    expected = {"OneStep": stepped(1, 1.0), "Neumann": stepped(4, 0.7), "Phantom": stepped(4, 0.7)}
    expected["SHINE"] = expected["Unrolled"] = implicit_gradient(f, inputs, z, y)
    return params, extra, x, z, y, expected


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.slow
def test_pytrees_with_integers_and_keys(name):
    policy, solver = EXACT[name]
    params, extra, x, z, y, expected = tree_problem()

    def loss(params, x):
        z0 = start(name, z)
        return dot(y, deq_fixed_point(tree_cell, params, x, z0, solver=solver, gradient=policy))

    got = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(params | extra, x)
    for no_gradient in extra:
        assert got[0].pop(no_gradient).dtype == jax.dtypes.float0
    assert relative_error(got, expected[name]) < 1e-10


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.slow
def test_closures_and_one_equation(name):
    """Everything that is differentiated is closed over, and the batch is one equation."""
    policy, solver = EXACT[name]
    params, extra, x, z, y, expected = tree_problem()

    def loss(inputs):
        def f(nothing, z, also_nothing):
            return tree_cell(inputs[0] | extra, z, inputs[1])

        options = {"solver": solver, "gradient": policy, "batched": False}
        return dot(y, deq_fixed_point(f, None, (), start(name, z), **options))

    assert relative_error(jax.jit(jax.grad(loss))((params, x)), expected[name]) < 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_under_vmap_over_params_and_inputs(name):
    problems = [problem(seed) for seed in (0, 10)]
    solutions = [solution(params, x) for params, x, _ in problems]
    params, x, y = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    z0 = start(name, jnp.stack(solutions))
    got = jax.vmap(compiled(*EXACT[name]))(params, x, z0, y)[0][:2]
    for i, ((params, x, y), z) in enumerate(zip(problems, solutions, strict=True)):
        expected = reference(name, params, x, z, y)
        assert relative_error(jax.tree.map(lambda leaf: leaf[i], got), expected) < 1e-10


@pytest.mark.parametrize("name", EXACT)
def test_linear_in_the_cotangent_and_no_gradient_for_the_start(name):
    params, x, y = problem()
    z0 = start(name, solution(params, x))
    for scale in (1.0, 1e-12):
        (by_params, by_x, by_z0), z = compiled(*EXACT[name])(params, x, z0, scale * y)
        expected = reference(name, params, x, z, scale * y)
        assert relative_error((by_params, by_x), expected) < 1e-10
        np.testing.assert_array_equal(by_z0, 0)


@pytest.mark.parametrize("name", ["Neumann", "Phantom", "SHINE", "Unrolled"])
def test_float32(name):
    policy, solver = EXACT[name]
    if name == "SHINE":
        policy, solver = Implicit(reuse=True, tol=1e-6), Broyden(tol=1e-6)
    params, x, y = problem()
    z = solution(params, x)
    z0 = start(name, z)
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, x, z0, y))
    (*got, _), value = compiled(policy, solver)(*single)
    assert {leaf.dtype for leaf in jax.tree.leaves((got, value))} == {jnp.dtype(jnp.float32)}
    assert relative_error(got, list(reference(name, params, x, z, y))) < 1e-5


@pytest.mark.museum("JAX, while_loop: a while_loop cannot be differentiated in reverse")
@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.slow
def test_unrolled_is_backpropagation_through_the_evaluations(steps):
    params, x, y = problem()
    solver = Picard(damping=0.7, tol=0.0, max_iter=6 if steps is None else 50)
    got, z = gradient(Unrolled(steps), solver, params, x, y)

    def last(params, x):  # the sixth point is evaluated, which its residual is from, and returned
        z = jnp.zeros((SAMPLES, 4))
        for _ in range(5):
            z = 0.7 * cell(params, z, x) + 0.3 * z
        return z

    np.testing.assert_allclose(z, last(params, x), rtol=1e-14)
    expected = jax.grad(lambda params, x: dot(y, last(params, x)), argnums=(0, 1))(params, x)
    assert relative_error(got, expected) < 1e-14


@pytest.mark.slow
def test_unrolled_differentiates_the_best_iterate_of_each_sample():
    """A rotation that grows: residuals rise again, at another evaluation for each sample."""
    turn = 1.2 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    x = jnp.array([[1.0, 0.5], [0.3, -0.2], [0.0, 0.02]])
    z0 = jnp.array([[0.0, 0.0], [3.0, 2.0], [0.1, 0.1]])
    y = normal(3, 2)

    def f(params, z, x):
        return jnp.sin(z @ params.T) + x

    def visited(params, x):
        points = [z0]
        for _ in range(7):
            points.append(f(params, points[-1], x))
        return points

    residuals = [
        np.linalg.norm(f(turn, z, x) - z, axis=1) / np.linalg.norm(f(turn, z, x), axis=1)
        for z in visited(turn, x)
    ]
    choice = np.argmin(residuals, axis=0)
    assert len(set(choice.tolist())) == 3
    assert (choice < 7).all()

    def chosen(params, x):
        points = visited(params, x)
        return jnp.stack([points[k][i] for i, k in enumerate(choice)])

    def value(params, x):
        options = {"solver": Picard(tol=0.0, max_iter=8), "gradient": Unrolled()}
        z = deq_fixed_point(f, params, x, z0, **options)
        return dot(y, z), z

    got, z = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))(turn, x)
    np.testing.assert_allclose(z, chosen(turn, x), rtol=1e-13)
    expected = jax.grad(lambda *inputs: dot(y, chosen(*inputs)), argnums=(0, 1))(turn, x)
    assert relative_error(got, expected) < 1e-13


UNROLLED = {
    "Anderson": Anderson(history=3, mixing=0.9, max_iter=5),
    "Broyden": Broyden(memory=2, line_search=True, max_iter=6),
}


@pytest.mark.parametrize("name", UNROLLED)
@pytest.mark.slow
def test_unrolled_is_the_derivative_of_what_was_computed(name):
    """Finite differences of an unconverged solve: the solver's own small systems count."""
    params, x, y = problem()
    params = params | {"W": 3 * params["W"]}
    z0 = normal(SAMPLES, 4, seed=5)
    direction = jax.tree.map(lambda leaf: normal(*leaf.shape, seed=8), (params, x))

    def at(step):
        moved = jax.tree.map(lambda leaf, d: leaf + step * d, (params, x), direction)
        return gradient(Unrolled(), UNROLLED[name], *moved, y, z0)

    step = 1e-5
    expected = dot(y, at(step)[1] - at(-step)[1]) / (2 * step)
    got, z = at(0.0)
    np.testing.assert_allclose(dot(got, direction), expected, rtol=1e-7)
    assert (np.linalg.norm(evaluate(params, z, x) - z, axis=1) > 1e-3).any()


@pytest.mark.museum("DEQ.jl: tests looked at gradients for being finite and no further")
@pytest.mark.parametrize(
    "solver",
    [
        Anderson(tol=1e-12),
        Broyden(tol=1e-12),
        NewtonKrylov(tol=1e-12),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.slow
def test_unrolled_converged_is_the_dense_gradient(solver):
    params, x, y = problem()
    exact = solution(params, x)
    for scale in (1.0, 1e-9):
        got, z = gradient(Unrolled(), solver, params, x, scale * y)
        assert relative_error(z, exact) < 1e-11
        assert relative_error(got, reference("Unrolled", params, x, exact, scale * y)) < 1e-8


SOLVERS = {
    "Picard": Picard(damping=0.9),
    "Anderson": Anderson(),
    "Broyden": Broyden(memory=2, line_search=True),
    "NewtonKrylov": NewtonKrylov(),
}


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow
def test_unrolled_past_samples_that_stand_still(name):
    """Sample 0 starts where f(z) = z exactly, and its zeros pass through every later step."""
    x, y = normal(2, 3), normal(2, 3, seed=1)
    z0 = x.at[1].add(1.0)

    def loss(gain, x):
        f = lambda gain, z, x: z + gain * jnp.sin(x - z)  # noqa: E731
        z, stats = deq_fixed_point(
            f, gain, x, z0, solver=SOLVERS[name], gradient=Unrolled(), return_stats=True
        )
        return dot(y, z), (z, stats)

    (by_gain, by_x), (z, stats) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(0.5, x)
    assert stats.iterations[0] == 1
    assert stats.iterations[1] > 2
    np.testing.assert_allclose(z, x, atol=1e-3)
    # z* = x whatever the gain; but sample 0 returns its start, which depends on nothing.
    np.testing.assert_array_equal(by_x[0], 0)
    np.testing.assert_allclose(by_x[1], y[1], rtol=0.05)
    assert abs(by_gain) < 0.05


def numpy_broyden(f, z, evaluations):
    """`B` of good Broyden for one sample, dense, from Sherman and Morrison's update itself."""
    inverse = -np.eye(z.size)
    g = f(z) - z
    for _ in range(evaluations - 1):
        change = -inverse @ g
        z = z + change
        g_before, g = g, f(z) - z
        g_change = g - g_before
        v = inverse.T @ change
        inverse = inverse + np.outer(change - inverse @ g_change, v) / (v @ g_change)
    return inverse, z


@pytest.mark.slow
def test_shine_shares_the_forward_estimate():
    params, x, y = problem()
    # No sample stops before the sixth evaluation, so that there is no question which B is meant.
    got, z = gradient(SHINE, Broyden(tol=0.0, max_iter=6), params, x, y)
    u = []
    for i in range(SAMPLES):
        inverse, point = numpy_broyden(lambda z: evaluate(params, z, x[i]), np.zeros(4), 6)
        np.testing.assert_allclose(z[i], point, rtol=1e-9)
        u.append(-inverse.T @ np.asarray(y[i]))
    assert relative_error(got, pulled_back(params, x, z, u)) < 1e-9
    assert relative_error(got, pulled_back(params, x, z, y)) > 0.05


@pytest.mark.slow
def test_refinement_of_shine():
    params, x, y = problem(2)
    expected = reference("SHINE", params, x, solution(params, x), y)

    def error(policy):
        got, _ = gradient(policy, Broyden(tol=1e-6), params, x, y)
        return relative_error(got, expected)

    refined = error(Implicit(Picard(tol=0.0), max_iter=3, reuse=True))
    assert error(SHINE) > 3 * refined
    # Better than three products from nothing, which are three terms of the series.
    u = series(params, x, solution(params, x), y, 3, 1.0)
    cold = relative_error(pulled_back(params, x, solution(params, x), u), expected)
    assert refined < 0.3 * cold


@pytest.mark.parametrize("backward", [GMRES(tol=1e-13), Anderson(tol=1e-13, max_iter=1)], ids=repr)
@pytest.mark.slow
def test_any_backward_solver_starts_from_the_estimate(backward):
    params, x, y = problem()

    def loss(inputs, probe):
        policy = Implicit(backward, reuse=True)
        options = {"solver": TIGHT, "gradient": policy, "backward_probe": probe}
        return dot(y, deq_fixed_point(cell, *inputs, **options))

    probe = BackwardProbe.zeros(SAMPLES)
    got, report = jax.jit(jax.grad(loss, argnums=(0, 1)))((params, x), probe)
    z = solution(params, x)
    if isinstance(backward, GMRES):
        assert relative_error(got, reference("SHINE", params, x, z, y)) < 1e-11
    else:  # u_0 is what was measured; y itself would have this residual:
        left = series(params, x, z, y, 2, 1.0) - y
        cold = np.linalg.norm(left, axis=1) / np.linalg.norm(y, axis=1)
        assert (np.asarray(report.residual) < 0.5 * cold).all()


@pytest.mark.parametrize(
    ("options", "solver"),
    [
        ({"solver": Picard(), "gradient": SHINE}, "Picard"),
        ({"gradient": Implicit(Broyden(), reuse=True)}, "Anderson"),
        ({"sample_at": (1,), "sample_gradient": SHINE}, "Anderson"),
    ],
)
def test_shine_needs_broyden_as_the_forward_solver(options, solver):
    params, x, _ = problem()
    with pytest.raises(TypeError, match=rf"Implicit\(reuse=True\).*Broyden.*{solver}"):
        deq_fixed_point(cell, params, x, **options)


@pytest.mark.parametrize("policy", [Phantom(), Unrolled()], ids=["Phantom", "Unrolled"])
def test_policies_without_a_linear_solve_refuse_a_probe(policy):
    params, x, _ = problem()
    probe = BackwardProbe.zeros(SAMPLES)
    with pytest.raises(ValueError, match=f"backward_probe .* {type(policy).__name__}"):
        deq_fixed_point(cell, params, x, gradient=policy, backward_probe=probe)


@pytest.mark.parametrize(
    ("make", "field", "error"),
    [
        (lambda: Neumann(0), "Neumann.terms", ValueError),
        (lambda: Neumann(2.0), "Neumann.terms", TypeError),
        (lambda: Neumann(True), "Neumann.terms", TypeError),
        (lambda: Neumann(damping=0.0), "Neumann.damping", ValueError),
        (lambda: Neumann(damping=1.1), "Neumann.damping", ValueError),
        (lambda: Neumann(damping=float("nan")), "Neumann.damping", ValueError),
        (lambda: Neumann(damping="half"), "Neumann.damping", TypeError),
        (lambda: Phantom(0), "Phantom.steps", ValueError),
        (lambda: Phantom(1.5), "Phantom.steps", TypeError),
        (lambda: Phantom(damping=-0.5), "Phantom.damping", ValueError),
        (lambda: Phantom(damping=2), "Phantom.damping", ValueError),
        (lambda: Unrolled(0), "Unrolled.steps", ValueError),
        (lambda: Unrolled("all"), "Unrolled.steps", TypeError),
        (lambda: Implicit(reuse=1), "Implicit.reuse", TypeError),
        (lambda: Implicit(tol="1e-3"), "Implicit.tol", TypeError),
        (lambda: Implicit(max_iter=2.0), "Implicit.max_iter", TypeError),
    ],
)
def test_bad_fields_are_named(make, field, error):
    with pytest.raises(error, match=field):
        make()


@pytest.mark.parametrize("policy", [OneStep, Unrolled, "implicit", Picard()], ids=str)
def test_what_is_no_policy_is_refused(policy):
    params, x, _ = problem()
    with pytest.raises(TypeError, match="gradient must be a policy"):
        deq_fixed_point(cell, params, x, gradient=policy)


def test_policies_are_hashable_and_compare_by_value():
    assert len({Neumann(3), Neumann(3), Neumann(4), Phantom(3), OneStep(), OneStep()}) == 4


@pytest.mark.slow
def test_phantom_says_that_it_has_first_derivatives_only():
    params, x, y = problem()

    def loss(x):
        return dot(y, deq_fixed_point(cell, params, x, solver=STAY, gradient=Phantom()))

    for second in (jax.hessian(loss), jax.jacrev(jax.grad(loss))):
        with pytest.raises(TypeError, match=r"Phantom\(.*first derivatives only"):
            second(x)
