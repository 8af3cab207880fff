"""The implicit gradient against dense solves, finite differences and unrolled loops, float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import (
    Anderson,
    BackwardProbe,
    Implicit,
    Picard,
    Status,
    deq_fixed_point,
    solve_adjoint,
)
from deq_jax.cells import ResNetCell
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

TIGHT = Anderson(tol=1e-12, max_iter=300)

pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def dense_cell(matrix, z, x):
    return jnp.tanh(z @ matrix.T + x)


def tree_cell(params, z, x):
    """A state of three leaves that feed one another, one of them one-dimensional a sample."""
    a, (b, c) = z["a"], z["bc"]
    mixed = jnp.tanh(a @ params["w"]) + x["in"]
    b_next = 0.4 * jnp.sin(b) + 0.2 * mixed[:, :2, None] * params["scale"]
    return {
        "a": 0.5 * mixed + 0.1 * b.sum((1, 2))[:, None],
        "bc": (b_next, 0.3 * c + a[:, 0] * params["bias"]),
    }


def tree_problem(seed=0):
    params = {
        "w": normal(4, 4, seed=seed, scale=0.3),
        "scale": normal(3, seed=seed + 1),
        "bias": normal(seed=seed + 2),
    }
    x = {"in": normal(2, 4, seed=seed + 3)}
    z0 = {"a": jnp.zeros((2, 4)), "bc": (jnp.zeros((2, 2, 3)), jnp.zeros(2))}
    return params, x, z0


def weighted_sum(z, weights):
    return sum(jax.tree.leaves(jax.tree.map(lambda z, w: (z * w).sum(), z, weights)))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_residual_cell_agrees_with_the_dense_solve():
    cell = ResNetCell(4, 6, groups=2, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    definition, params = nnx.split(cell)
    # Kernels larger than at first: an equilibrium that really depends on them.
    params = jax.tree.map(lambda p: 5 * p if p.ndim == 4 else p + 0.1 * p**2, params)

    def f(params, z, x):
        return nnx.merge(definition, params)(z, x)

    x, y = normal(2, 5, 5, 4, seed=1), normal(2, 5, 5, 4, seed=2)
    solver = Anderson(tol=1e-13, max_iter=400)

    def loss(params, x):
        return (deq_fixed_point(f, params, x, solver=solver) * y).sum()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x)
    start, stats = deq_fixed_point(f, params, x, solver=solver, return_stats=True)
    assert (stats.status == Status.CONVERGED).all()
    z = newton_equilibrium(lambda z: f(params, z, x), start)
    expected = implicit_gradient(lambda inputs, z: f(inputs[0], z, inputs[1]), (params, x), z, y)
    assert relative_error(gradient[0], expected[0]) < 1e-8
    assert relative_error(gradient[1], expected[1]) < 1e-8


@pytest.mark.parametrize("seed", [0, 10])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("backward", [None, Picard(tol=1e-13, max_iter=500)])
@pytest.mark.slow
def test_pytrees_params_inputs_and_closures(seed, batched, backward):
    params, x, z0 = tree_problem(seed)
    y = jax.tree.map(lambda z: normal(*z.shape, seed=5), z0)
    gradient_policy = Implicit(solver=backward)

    def solve(f, params, x):
        return deq_fixed_point(
            f, params, x, z0, solver=TIGHT, gradient=gradient_policy, batched=batched
        )

    passed = jax.grad(lambda p, x: weighted_sum(solve(tree_cell, p, x), y), argnums=(0, 1))

    def closed_over(params, x):
        def f(scale, z, _):
            return tree_cell({**params, "scale": scale}, z, x)

        return weighted_sum(solve(f, params["scale"], None), y)

    z = newton_equilibrium(lambda z: tree_cell(params, z, x), z0)
    expected = implicit_gradient(
        lambda inputs, z: tree_cell(inputs[0], z, inputs[1]), (params, x), z, y
    )
    closed_over = jax.grad(closed_over, argnums=(0, 1))
    for gradient in (passed, closed_over):
        assert relative_error(jax.jit(gradient)(params, x), expected) < 1e-9


@pytest.mark.museum(
    "locuslab/deq#11: users had to run gradcheck themselves to see which of two backward passes "
    "was right"
)
@pytest.mark.slow
def test_finite_differences():
    matrix, x, y = normal(6, 6, scale=0.25), normal(3, 6, seed=1), normal(3, 6, seed=2)

    def loss(matrix, x):
        return (deq_fixed_point(dense_cell, matrix, x, solver=TIGHT) ** 2 * y).sum()

    gradient = jax.grad(loss, argnums=(0, 1))(matrix, x)
    directions = normal(6, 6, seed=3), normal(3, 6, seed=4)
    step = 1e-5
    ahead, behind = (loss(matrix + s * directions[0], x + s * directions[1]) for s in (step, -step))
    expected = (ahead - behind) / (2 * step)
    got = (gradient[0] * directions[0]).sum() + (gradient[1] * directions[1]).sum()
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.slow
def test_second_derivatives_of_everything_against_an_unrolled_loop():
    matrix, bias, x = normal(5, 5, scale=0.25), normal(5, seed=1), normal(3, 5, seed=2)

    def loss(solve, matrix, bias, x):
        # bias is closed over, matrix and x are passed.
        z = solve(lambda p, z, x: jnp.tanh(z @ p.T + x) + 0.1 * bias, matrix, x)
        return (z**3).sum()

    def ours(f, p, x):
        return deq_fixed_point(f, p, x, solver=TIGHT)

    def unrolled(f, p, x):
        step = lambda z, _: (f(p, z, x), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros_like(x), length=80)[0]

    def directional(solve):
        def along(matrix, bias, x):
            gradients = jax.grad(loss, argnums=(1, 2, 3))(solve, matrix, bias, x)
            return sum((g * jnp.cos(i + g)).sum() for i, g in enumerate(gradients))

        return jax.jit(jax.grad(along, argnums=(0, 1, 2)))

    got, expected = (directional(solve)(matrix, bias, x) for solve in (ours, unrolled))
    assert relative_error(got, expected) < 1e-9


@pytest.mark.museum("locuslab/deq#25: derivatives of second and higher order could not be had")
@pytest.mark.slow
def test_third_derivative_in_closed_form():
    """z = a z + x has z* = x / (1 - a), so d³z/da³ = 6 x / (1 - a)⁴."""

    def z(a):
        return deq_fixed_point(lambda a, z, x: a * z + x, a, jnp.ones((1, 1)), solver=TIGHT)[0, 0]

    third = jax.grad(jax.grad(jax.grad(z)))(0.3)
    np.testing.assert_allclose(third, 6 / 0.7**4, rtol=1e-9)


@pytest.mark.museum(
    "akbir/deq-jax: with w = -2, b = 1 its closed-form test expects -2/3, which is right for an "
    "input added to z but was given to the start"
)
@pytest.mark.slow
def test_closed_form_of_a_relu_equilibrium():
    """z = relu(w z + b) with w = -2, b = 1: z* = b / (1 - w) = 1/3; dz/dw = z / (1 - w) = 1/9."""

    def loss(w, b):
        f = lambda params, z, x: jax.nn.relu(params[0] * z + params[1])  # noqa: E731
        return deq_fixed_point(f, (w, b), None, jnp.zeros((1, 1)), solver=TIGHT)[0, 0]

    by_w, by_b = jax.grad(loss, argnums=(0, 1))(-2.0, 1.0)
    np.testing.assert_allclose([loss(-2.0, 1.0), by_w, by_b], [1 / 3, 1 / 9, 1 / 3], rtol=1e-9)


@pytest.mark.parametrize("radius", [0.5, 1.59])
@pytest.mark.slow
def test_spectral_radius_above_one(radius):
    """Anderson finds u where iterating the transposed product diverges."""
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0]
    matrix = jnp.asarray(basis @ np.diag(np.linspace(-radius, 0.6, 8)) @ basis.T)
    x, y = normal(2, 8, seed=1, scale=0.1), normal(2, 8, seed=2)
    solver = Anderson(history=8, tol=1e-12, max_iter=300)

    def loss(matrix, x, probe):
        z = deq_fixed_point(dense_cell, matrix, x, solver=solver, backward_probe=probe)
        return (z * y).sum()

    *gradient, report = jax.grad(loss, argnums=(0, 1, 2))(matrix, x, BackwardProbe.zeros(2))
    z = newton_equilibrium(lambda z: dense_cell(matrix, z, x), jnp.zeros((2, 8)))
    expected = implicit_gradient(
        lambda inputs, z: dense_cell(inputs[0], z, inputs[1]), (matrix, x), z, y
    )
    assert relative_error(gradient, list(expected)) < 1e-8
    assert (report.status == Status.CONVERGED).all()


@pytest.mark.museum(
    "akbir/deq-jax: the backward tolerance lay below float32 resolution, so the solve usually ran"
    " to its cap"
)
@pytest.mark.parametrize("scale", [1e-36, 1e-6, 1e6, 1e37])
def test_the_backward_solve_is_relative_to_the_cotangent(scale):
    matrix, x = normal(6, 6, scale=0.3).astype(jnp.float32), normal(2, 6, seed=1)
    x = x.astype(jnp.float32)
    y = normal(2, 6, seed=2).astype(jnp.float32)
    z = deq_fixed_point(dense_cell, matrix, x)
    solver = Anderson(tol=1e-5)
    one = solve_adjoint(dense_cell, matrix, x, z, y, solver=solver)
    scaled = solve_adjoint(dense_cell, matrix, x, z, jnp.float32(scale) * y, solver=solver)
    assert (scaled.stats.status == Status.CONVERGED).all()
    np.testing.assert_array_equal(one.stats.iterations, scaled.stats.iterations)
    np.testing.assert_allclose(scaled.value, np.float32(scale) * one.value, rtol=1e-4)


@pytest.mark.museum(
    "torchdeq T19: no converged flag, no reason, no count; backward statistics only through a "
    "writer"
)
@pytest.mark.parametrize("budget", [300, 3])
@pytest.mark.slow
def test_the_probe_reports_what_the_backward_solve_reached(budget):
    matrix, x, y = normal(6, 6, scale=0.25), normal(3, 6, seed=1), normal(3, 6, seed=2)
    policy = Implicit(Anderson(tol=1e-7), max_iter=budget)

    def loss(x, probe):
        z = deq_fixed_point(
            dense_cell, matrix, x, solver=TIGHT, gradient=policy, backward_probe=probe
        )
        return (z * y).sum()

    probe = BackwardProbe.zeros(3)
    x_bar, report = jax.jit(jax.grad(loss, argnums=(0, 1)))(x, probe)
    # x̄ = (∂f/∂x)ᵀ u = (1 - z²) u elementwise, which gives u back.
    z = newton_equilibrium(lambda z: dense_cell(matrix, z, x), jnp.zeros((3, 6)))
    slope = 1 - np.asarray(z) ** 2
    u = np.asarray(x_bar) / slope
    residual = np.linalg.norm((slope * u) @ np.asarray(matrix) + y - u, axis=1)
    residual /= np.linalg.norm(y, axis=1)
    np.testing.assert_allclose(report.residual, residual, rtol=1e-3)
    assert report.iterations.max() == report.evaluations
    if budget == 3:
        np.testing.assert_array_equal(report.status, Status.MAX_ITER)
        np.testing.assert_array_equal(report.iterations, 3)
        assert (report.residual > 1e-7).all()
    else:
        np.testing.assert_array_equal(report.status, Status.CONVERGED)
        assert (report.residual <= 1e-7).all()


@pytest.mark.slow
def test_the_probe_of_an_unbatched_solve_and_under_vmap():
    matrix, x = normal(6, 6, scale=0.25), normal(4, 6, seed=1)

    def loss(x, probe):
        z = deq_fixed_point(dense_cell, matrix, x, batched=False, backward_probe=probe)
        return (z**2).sum()

    report = jax.grad(loss, argnums=1)(x[0], BackwardProbe.zeros())
    assert report.residual.shape == report.evaluations.shape == ()
    assert 0 < report.residual <= 1e-4
    probes = jax.tree.map(lambda leaf: jnp.zeros((4, *leaf.shape), leaf.dtype), report)
    reports = jax.vmap(jax.grad(loss, argnums=1))(x, probes)
    assert reports.residual.shape == (4,)
    np.testing.assert_allclose(reports.residual[0], report.residual, rtol=1e-5)
    assert len(set(np.asarray(reports.iterations).tolist())) > 1


@pytest.mark.slow
def test_a_zero_cotangent_returns_zero_at_once_and_alone():
    matrix, x = normal(6, 6, scale=0.25), normal(3, 6, seed=1)
    weights = jnp.array([1.0, 0.0, 2.0])

    def loss(x, probe):
        z = deq_fixed_point(dense_cell, matrix, x, backward_probe=probe)
        return (weights[:, None] * z).sum()

    x_bar, report = jax.grad(loss, argnums=(0, 1))(x, BackwardProbe.zeros(3))
    np.testing.assert_array_equal(x_bar[1], 0)
    assert report.iterations[1] == 1
    assert report.residual[1] == 0
    assert report.status[1] == Status.CONVERGED
    assert (report.iterations[jnp.array([0, 2])] > 3).all()


@pytest.mark.slow
def test_a_diverged_sample_does_not_touch_the_gradients_of_the_others():
    matrix, x = normal(6, 6, scale=0.25), normal(3, 6, seed=1)

    def gradient(x):
        return jax.grad(lambda x: (deq_fixed_point(dense_cell, matrix, x) ** 2).sum())(x)

    clean, spoilt = gradient(x), gradient(x.at[1, 0].set(jnp.nan))
    np.testing.assert_array_equal(clean[0], spoilt[0])
    np.testing.assert_array_equal(clean[2], spoilt[2])


@pytest.mark.museum(
    "locuslab/deq-flow: reusing the last frame's fixed point was wired into the model code"
)
@pytest.mark.museum(
    "akbir/deq-jax: with w = -2, b = 1 its closed-form test expects -2/3, which is right for an "
    "input added to z but was given to the start"
)
def test_the_start_has_no_gradient():
    matrix, x = normal(6, 6, scale=0.25), normal(2, 6, seed=1)
    z0 = normal(2, 6, seed=2)
    by_start = jax.grad(lambda z0: deq_fixed_point(dense_cell, matrix, x, z0).sum())(z0)
    np.testing.assert_array_equal(by_start, 0)


@pytest.mark.slow
def test_temporary_memory_does_not_depend_on_the_iterations():
    matrix, x = normal(64, 64, scale=0.05), normal(8, 64, seed=1)

    def temporary_bytes(max_iter):
        solver = Anderson(max_iter=max_iter)
        loss = lambda m, x: (deq_fixed_point(dense_cell, m, x, solver=solver) ** 2).sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(matrix, x).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = temporary_bytes(10), temporary_bytes(200)
    assert few > 0
    assert abs(many - few) <= 0.02 * few


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"solver": "anderson"}, "Implicit.solver must be a solver"),
        ({"solver": Anderson}, "Implicit.solver must be a solver"),
        ({"tol": -1.0}, "Implicit.tol must be finite, >= 0.0"),
        ({"max_iter": 0}, "Implicit.max_iter must be at least 1"),
    ],
)
def test_bad_options_are_named(arguments, error):
    with pytest.raises((TypeError, ValueError), match=error):
        Implicit(**arguments)


@pytest.mark.museum(
    "torchdeq T9: some solver options could not be set, and tol and max_iter of one call raised"
)
@pytest.mark.museum(
    "DEQ.jl: the adjoint took 10 linear steps and said nothing when they were too few"
)
def test_limits_override_those_of_the_solver():
    assert Implicit(tol=1e-7).backward_solver(Picard()) == Picard(tol=1e-7)
    policy = Implicit(Anderson(history=3), max_iter=9)
    assert policy.backward_solver(Picard()) == Anderson(history=3, max_iter=9)
    assert Implicit().backward_solver(Picard()) == Picard()
