"""Defects of locuslab/deq, mdeq, deq-flow and monDEQ, of DEQ.jl and of smaller libraries."""

import copy
import functools
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    Anderson,
    BackwardProbe,
    Broyden,
    Implicit,
    Neumann,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from tests.museum.catalogue import defect
from tests.museum.problems import (
    normal,
    picard_trace,
    primitives,
    residual_of,
    symmetric,
    tanh_adjoint,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import picard, relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@defect(
    "locuslab/deq#21",
    "one residual for the whole batch: when it stopped depended on the batch size",
    we="forward and backward, a sample among 64 takes the steps it takes alone",
)
@pytest.mark.usefixtures("x64")
def test_the_batch_size_changes_nothing():
    gains, x = np.linspace(0.1, 0.95, 64), normal(64, 4, seed=1)

    def run(gains, x):
        def loss(x, probe):
            z, stats = deq_fixed_point(
                lambda gains, z, x: jnp.tanh(gains[:, None] * jnp.roll(z, 1, axis=1)) + x,
                gains,
                x,
                return_stats=True,
                backward_probe=probe,
            )
            return jnp.sum(z**2), (z, stats.iterations)

        gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
        (x_bar, probe), (z, iterations) = gradient(x, BackwardProbe.zeros(len(x)))
        return z, x_bar, iterations, probe.iterations

    together, alone = run(gains, x), run(gains[:1], x[:1])
    assert together[2][0] < together[2].max()
    assert together[3][0] < together[3].max()
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a[0], b[0], rtol=1e-10)


@defect(
    "locuslab/deq#26",
    "UnboundLocalError where no step improved on the start",
    we="the start is an iterate like any other and is returned with its residual",
)
def test_no_step_improves():
    def f(_, z, start):  # good at the start alone
        return jnp.where(z == start, start + 0.01, z + 1 + jnp.abs(z))

    start = np.ones((2, 3), np.float32)
    z, stats = solve_fixed_point(f, None, start, start, solver=Anderson(max_iter=8))
    np.testing.assert_array_equal(z, start)
    np.testing.assert_allclose(stats.residual, 0.01 / 1.01, rtol=1e-4)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)


@defect(
    "locuslab/deq#20",
    "a singular system in Anderson's window crashed the run: singular U",
    we="a window that cannot be factorised starts over with its newest pair",
)
@pytest.mark.usefixtures("x64")
def test_a_singular_window_does_not_crash():
    # In one dimension all residuals are parallel: every window of two or more is singular.
    solver = Anderson(history=5, ridge=0.0, tol=1e-12)
    z, stats = solve_fixed_point(
        lambda _, z, x: jnp.cos(z) + x, None, np.array([[0.0], [0.3]]), solver=solver
    )
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(z, np.cos(z) + np.array([[0.0], [0.3]]), rtol=1e-11)
    assert stats.evaluations <= 15  # Picard takes 70
    # And of residuals that are equal, where f only shifts.
    z, stats = solve_fixed_point(lambda _, z, x: z + x, None, np.ones((1, 3)), solver=solver)
    assert np.isfinite(z).all()
    assert stats.status[0] == Status.MAX_ITER


@defect(
    "locuslab/deq#11",
    "users had to run gradcheck themselves to see which of two backward passes was right",
    we="finite differences agree, in forward and in reverse mode",
)
@pytest.mark.usefixtures("x64")
def test_gradcheck():
    @jax.jit
    def layer(w, x):
        return deq_fixed_point(tanh_cell, w, x, solver=TIGHT)

    check_grads(layer, (W, X), order=1, modes=("fwd", "rev"), eps=1e-5, rtol=1e-7)


@defect(
    "locuslab/deq#23",
    "a model could not be deep-copied, because its normalised weights were computed tensors",
    we="layers hold parameters alone: a copy is a copy, before and after use",
)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_deepcopy():
    cell = FeedForwardCell(4, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    cell.recurrent.kernel[...], cell.input.kernel[...] = jnp.asarray(W), jnp.eye(4)
    layer = deq_jax.nnx.DEQ(cell, solver=TIGHT)
    layer(X)
    twin = copy.deepcopy(layer)
    twin.cell.recurrent.kernel[...] = jnp.asarray(-W)
    np.testing.assert_allclose(layer(X), tanh_solution(W, X), rtol=0, atol=1e-11)
    np.testing.assert_allclose(twin(X), tanh_solution(-W, X), rtol=0, atol=1e-11)


@defect(
    "locuslab/deq#25",
    "derivatives of second and higher order could not be had",
    we="derivatives of any order",
)
@pytest.mark.usefixtures("x64")
def test_third_derivative_in_closed_form():
    def z(a):  # z = a z + 2: z = 2 / (1 - a)
        f = lambda a, z, x: a * z + x  # noqa: E731
        return deq_fixed_point(f, a, 2 * jnp.ones((1, 1)), solver=TIGHT)[0, 0]

    third = jax.jit(jax.grad(jax.grad(jax.grad(z))))(0.3)
    np.testing.assert_allclose(third, 12 / 0.7**4, rtol=1e-9)


@defect(
    "locuslab/deq#12, #15, #24",
    "the backward hook had to remove itself: without that a run hung, with it some crashed",
    we="no hooks: one forward pass serves any number of backward passes",
)
@pytest.mark.usefixtures("x64")
def test_several_backward_passes():
    z, pullback = jax.vjp(lambda x: deq_fixed_point(tanh_cell, W, x, solver=TIGHT), jnp.asarray(X))
    for cotangent in (Y, np.roll(Y, 1, axis=0), Y):
        expected = tanh_gradients(W, X, cotangent)[1][1]
        assert relative_error(pullback(jnp.asarray(cotangent))[0], expected) < 1e-11
    np.testing.assert_allclose(z, tanh_solution(W, X), rtol=0, atol=1e-11)


@defect(
    "locuslab/deq#28",
    "Broyden's memory grew with the number of steps",
    we="with memory=L it holds L pairs, whatever max_iter is",
)
def test_broyden_memory_is_bounded():
    w, x = np.float32(normal(64, 64, scale=0.05)), np.float32(normal(8, 64, seed=1))

    def temporary_bytes(solver):
        solve = jax.jit(lambda w: solve_fixed_point(tanh_cell, w, x, solver=solver).value)
        return solve.lower(w).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary_bytes(Broyden(memory=4, max_iter=count)) for count in (20, 200))
    assert abs(many - few) <= 0.02 * few
    pairs = 2 * 4 * x.nbytes
    assert pairs <= few <= 4 * pairs


@defect(
    "locuslab/deq#29",
    "training crashed at the switch from unrolled pretraining to the equilibrium",
    we="only the gradient policy changes; parameters, state and structure of gradients stay",
)
@pytest.mark.usefixtures("x64")
def test_the_switch_from_pretraining():
    params, z = {"w": jnp.asarray(W)}, None
    for policy in (Unrolled(steps=3), Implicit()):

        def loss(params, z, policy=policy):
            f = lambda params, z, x: tanh_cell(params["w"], z, x)  # noqa: E731
            z = deq_fixed_point(f, params, X, z, solver=TIGHT, gradient=policy)
            return jnp.vdot(Y, z), z

        gradient, z = jax.jit(jax.grad(loss, has_aux=True))(params, z)
        if policy == Unrolled(steps=3):  # the points 0, first, second; the last is the best
            first, second = np.tanh(X), np.tanh(np.tanh(X) @ W + X)
            np.testing.assert_allclose(z, second, rtol=1e-12)
            np.testing.assert_allclose(gradient["w"], first.T @ ((1 - second**2) * Y), rtol=1e-10)
        else:
            expected = tanh_gradients(params["w"], X, Y)[1][0]
            assert relative_error(gradient["w"], expected) < 1e-11
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)


@defect(
    "locuslab/mdeq#5",
    "Broyden's first step went the wrong way: z - g instead of z + g; jaxopt's default gamma = 1 "
    "is the same slip",
    we="B₀ = -I for g = f(z) - z, so the first step is Picard's",
)
@pytest.mark.usefixtures("x64")
def test_broyden_starts_with_a_picard_step():
    _, (first, second) = deq_fixed_point(
        tanh_cell, W, X, X, solver=Broyden(), sample_at=(1, 2), gradient=OneStep()
    )
    np.testing.assert_array_equal(first, X)
    np.testing.assert_allclose(second, np.tanh(X @ W + X), rtol=1e-14)


@defect(
    "locuslab/mdeq#8",
    "the sign of the backward equation was unclear: Jᵀu + y = 0 or u = Jᵀu + y",
    we="u = Jᵀu + y, and solve_adjoint returns exactly that u",
)
@pytest.mark.usefixtures("x64")
def test_the_sign_of_the_backward_equation():
    z = tanh_solution(W, X)
    adjoint = functools.partial(solve_adjoint, tanh_cell, solver=Broyden(tol=1e-11))
    u, stats = jax.jit(adjoint)(W, X, z, Y)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    np.testing.assert_allclose(u, tanh_adjoint(W, z, Y), rtol=0, atol=1e-9)


@defect(
    "locuslab/deq-flow",
    "reusing the last frame's fixed point was wired into the model code",
    we="a warm start is one argument, z0, which costs fewer evaluations and no gradient",
)
@pytest.mark.usefixtures("x64")
def test_warm_start_is_one_line():
    solver, z, warm, cold = Picard(tol=1e-8), None, 0, 0
    for frame in range(4):
        x = X + 1e-4 * frame
        z, stats = deq_fixed_point(tanh_cell, W, x, z, solver=solver, return_stats=True)
        np.testing.assert_allclose(z, tanh_solution(W, x), rtol=0, atol=1e-7)
        warm += int(stats.evaluations)
        cold += int(solve_fixed_point(tanh_cell, W, x, solver=solver).stats.evaluations)
    assert warm < 0.75 * cold
    start = lambda z: deq_fixed_point(tanh_cell, W, X, z, solver=solver).sum()  # noqa: E731
    np.testing.assert_array_equal(jax.grad(start)(z), 0)


@defect(
    "locuslab/monotone_op_net",
    "a matrix inverse that depends on the weights alone was rebuilt under the tape in every pass",
    we="what f computes from params alone is done once, before the loop",
)
@pytest.mark.usefixtures("x64")
def test_work_on_parameters_is_not_in_the_loop():
    def f(w, z, x):
        return z @ jnp.linalg.inv(w) + x

    w = 3 * np.eye(4) + W
    jaxpr = jax.make_jaxpr(lambda w: solve_fixed_point(f, w, X, solver=TIGHT).value)(w)
    assert "lu" in set(primitives(jaxpr.jaxpr))
    assert "lu" not in set(primitives(loop_body(jaxpr.jaxpr)))
    z = solve_fixed_point(f, w, X, solver=TIGHT).value
    np.testing.assert_allclose(z, X @ np.linalg.inv(np.eye(4) - np.linalg.inv(w)), atol=1e-11)


def loop_body(jaxpr):
    """The body of the one `while` in a jaxpr."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            return equation.params["body_jaxpr"].jaxpr
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found = loop_body(getattr(inner, "jaxpr", inner))
            if found is not None:
                return found
    return None


@defect(
    "DEQ.jl",
    "the adjoint took 10 linear steps and said nothing when they were too few",
    we="the backward solve has the forward solver's budget, and the probe says what it reached",
)
@pytest.mark.usefixtures("x64")
def test_ten_adjoint_steps_are_not_enough():
    w, x, y = 0.95 * symmetric([-1, -0.4, 0.3, 1]), 0.1 * X, normal(3, 4, seed=2)

    def run(gradient):
        def loss(w, probe):
            options = {"solver": Picard(tol=1e-12, max_iter=2000), "gradient": gradient}
            return jnp.vdot(y, deq_fixed_point(tanh_cell, w, x, **options, backward_probe=probe))

        return jax.jit(jax.grad(loss, (0, 1)))(w, BackwardProbe.zeros(3))

    exact = tanh_gradients(w, x, y)[1][0]
    gradient, probe = run(Implicit())
    assert relative_error(gradient, exact) < 1e-9
    assert probe.evaluations > 100
    gradient, probe = run(Implicit(max_iter=10))
    assert relative_error(gradient, exact) > 0.05
    np.testing.assert_array_equal(probe.status, Status.MAX_ITER)
    assert (probe.residual > 0.05).all()


def neumann_gradient(terms, damping):
    """Gradient in W with u = Σ w_t, w_0 = τ y, w_{t+1} = τ Jᵀ w_t + (1 - τ) w_t."""
    z = tanh_solution(W, X)
    term, u = damping * Y, 0
    for _ in range(terms):
        u = u + term
        term = damping * ((1 - z**2) * term) @ W.T + (1 - damping) * term
    return z.T @ ((1 - z**2) * u)


@defect(
    "DEQ.jl",
    "tests looked at gradients for being finite and no further",
    we="the gradient of every policy is its formula",
)
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (Implicit(), lambda: tanh_gradients(W, X, Y)[1][0]),
        (OneStep(), lambda: neumann_gradient(1, 1.0)),
        (Neumann(3, 0.7), lambda: neumann_gradient(3, 0.7)),
        (Phantom(4, 0.6), lambda: neumann_gradient(4, 0.6)),
        (Unrolled(), lambda: tanh_gradients(W, X, Y)[1][0]),
    ],
)
@pytest.mark.usefixtures("x64")
def test_the_gradient_of_every_policy(policy, expected):
    def loss(w):
        return jnp.vdot(Y, deq_fixed_point(tanh_cell, w, X, solver=TIGHT, gradient=policy))

    assert relative_error(jax.jit(jax.grad(loss))(W), expected()) < 1e-10


@defect(
    "DEQ.jl#105",
    "the quick start failed as soon as its batch was larger",
    we="the README's first example runs at batch 1, 3 and 64, and its equation holds",
)
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.usefixtures("standard_promotion")
def test_the_quick_start_at_other_batch_sizes(batch):
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    block = next(block for block in blocks if "deq_fixed_point" in block)
    assert block.count("(4, ") == 2  # the shapes of x and z0
    if batch < 64:  # the gradient, slow to compile, at the largest batch only
        block = re.sub(r"^gradient = .*\n", "", block, flags=re.MULTILINE)
    names = {}
    exec(block.replace("(4, ", f"({batch}, "), names)
    z, f, params, x = (names[name] for name in ("z", "f", "params", "x"))
    assert len(z) == len(x) == batch
    assert residual_of(lambda z: f(params, jnp.float32(z), x), z).max() < 1e-4
    assert names["stats"].converged.shape == (batch,)
    assert names["stats"].converged.all()


@defect(
    "DEQ.jl",
    "arguments of a constructor shifted by one, and the Jacobian loss was zero in pretraining",
    we="options are keywords, and a value in the wrong place is a TypeError that names it",
)
def test_options_cannot_shift():
    for function, positional in (
        (deq_fixed_point, ["f", "params", "x", "z0"]),
        (solve_fixed_point, ["f", "params", "x", "z0"]),
        (solve_adjoint, ["f", "params", "x", "z", "cotangent"]),
        (deq_jax.nnx.DEQ.__init__, ["self", "cell"]),
    ):
        kinds = inspect.signature(function).parameters.values()
        free = [p.name for p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert free == positional
    for wrong in ({"solver": Implicit()}, {"gradient": Picard()}, {"gradient": Implicit}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be"):
            deq_fixed_point(tanh_cell, np.float32(W), np.float32(X), **wrong)


@defect(
    "DEQ.jl#94",
    "the state was hardcoded to the size of the input",
    we="the state has the shape of z0, whatever the input is",
)
@pytest.mark.usefixtures("x64")
def test_a_state_of_another_size_than_the_input():
    u = normal(2, 4, seed=4)

    def loss(x):
        f = lambda w, z, x: tanh_cell(w, z, x @ u)  # noqa: E731
        return jnp.vdot(Y, deq_fixed_point(f, W, x, jnp.zeros((3, 4)), solver=TIGHT))

    expected = tanh_gradients(W, X[:, :2] @ u, Y)[1][1] @ u.T
    assert relative_error(jax.jit(jax.grad(loss))(X[:, :2]), expected) < 1e-11


@defect(
    "akbir/deq-jax",
    "with w = -2, b = 1 its closed-form test expects -2/3, which is right for an input added to z "
    "but was given to the start",
    we="-2/3 for what is added to z, 1/9 and 1/3 for w and b, 0 for the start",
)
@pytest.mark.usefixtures("x64")
def test_closed_form():
    def loss(w, b, added, start):
        f = lambda params, z, added: params[0] * (z + added) + params[1]  # noqa: E731
        return deq_fixed_point(f, (w, b), added, start, solver=Anderson(tol=1e-13))[0, 0]

    arguments = -2.0, 1.0, jnp.zeros((1, 1)), jnp.ones((1, 1))
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*arguments)
    np.testing.assert_allclose(value, 1 / 3, rtol=1e-10)
    np.testing.assert_allclose(
        [float(g.sum()) for g in gradients], [1 / 9, 1 / 3, -2 / 3, 0], rtol=1e-10
    )


@defect(
    "akbir/deq-jax",
    "the backward tolerance lay below float32 resolution, so the solve usually ran to its cap",
    we="the tolerance is relative to the cotangent: reached well before the cap, a tiny one too",
)
def test_the_backward_tolerance_can_be_met():
    w, x, scale = np.float32(W), np.float32(X), 1e-12

    def loss(x, probe):
        z = deq_fixed_point(tanh_cell, w, x, solver=Anderson(tol=1e-5), backward_probe=probe)
        return np.float32(scale) * jnp.vdot(np.float32(Y), z)

    x_bar, probe = jax.jit(jax.grad(loss, (0, 1)))(x, BackwardProbe.zeros(3))
    np.testing.assert_array_equal(probe.status, Status.CONVERGED)
    assert probe.evaluations < 20
    assert relative_error(x_bar, scale * tanh_gradients(w, x, Y)[1][1]) < 1e-4


@defect(
    "akbir/deq-jax, locuslab/deq#17",
    "Broyden took states of three dimensions only",
    we="any number of dimensions, with the steps of the flat state",
)
@pytest.mark.parametrize("shape", [(2, 2, 3, 2)])
@pytest.mark.usefixtures("x64")
def test_broyden_on_any_shape(shape):
    x = normal(2, 12)
    solver = Broyden(tol=1e-9)
    f = lambda _, z, x: 0.9 * jnp.sin(z) + x  # noqa: E731
    flat, shaped = (
        solve_fixed_point(f, None, x.reshape(s), solver=solver) for s in ((2, 12), shape)
    )
    np.testing.assert_array_equal(flat.stats.iterations, shaped.stats.iterations)
    np.testing.assert_allclose(shaped.value.reshape(2, 12), flat.value, rtol=0, atol=1e-14)
    assert residual_of(lambda z: 0.9 * np.sin(z) + x, flat.value).max() <= 1e-9


@defect(
    "FixedPointAcceleration.jl#11, #12",
    "damped Anderson froze at a point that was no solution and used up all its evaluations",
    we="a proposal that hardly moves gives way to a plain step; the case reported there is solved",
)
@pytest.mark.usefixtures("x64")
def test_damped_anderson_does_not_freeze():
    a = np.linspace(-0.9, 0.9, 8)

    def f(a, p, _):  # the coupled logit map of the issue
        return jax.nn.sigmoid((a - 16 * (p.sum(1, keepdims=True) - p) / 7) / 0.1)

    solver = Anderson(mixing=0.8, tol=0.0, atol=2e-3, max_iter=500, trace=True)
    p, stats = solve_fixed_point(f, a, None, np.full((1, 8), 0.5), solver=solver)
    expected = 1 / (1 + np.exp(-(a - 16 * (np.sum(p) - p) / 7) / 0.1))
    assert stats.status[0] == Status.CONVERGED
    assert np.linalg.norm(expected - p) <= 2e-3
    # A window with a far smaller residual, whose target is z itself: the proposal would be z.
    solver, small = Anderson(history=2, mixing=0.3), np.array([[1e-3, 0.0]])
    z, g = np.zeros((1, 2)), np.array([[0.0, 1.0]])
    _, state = solver.step(z - 0.3 * small, z + 0.7 * small, solver.init(z, z))
    np.testing.assert_allclose(solver.step(z, z + g, state)[0], z + 0.3 * g, rtol=1e-6)


@defect(
    "FixedPointAcceleration.jl#13",
    "the damping of plain iteration was silently without effect",
    we="damped iteration takes the damped steps, and solves what the plain one cannot",
)
@pytest.mark.usefixtures("x64")
def test_damping_has_an_effect():
    f = lambda _, z, x: -1.5 * z + x  # noqa: E731
    x, solver = np.array([[1.0, 2.0]]), Picard(damping=0.5, tol=1e-12)
    z, (sample,) = deq_fixed_point(f, None, x, solver=solver, sample_at=(6,), gradient=OneStep())
    points = picard(lambda z: -1.5 * z + x[0], np.zeros(2), damping=0.5, steps=6)
    np.testing.assert_allclose(sample[0], points[-1], rtol=1e-14)
    np.testing.assert_allclose(z, x / 2.5, rtol=1e-10)
    assert solve_fixed_point(f, None, x, solver=Picard()).stats.status[0] != Status.CONVERGED


@defect(
    "deepinv PR #1022, #1023",
    "acceleration was off for a long time and no test noticed; backward options were ignored",
    we="Anderson is on in both passes of a layer: far fewer evaluations than Picard",
)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_acceleration_is_on():
    w = symmetric([-0.9, -0.3, 0.3, 0.9])
    cell = FeedForwardCell(4, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    cell.recurrent.kernel[...], cell.input.kernel[...] = jnp.asarray(w), jnp.eye(4)

    def counts(solver, backward):
        layer = deq_jax.nnx.DEQ(cell, solver=solver, gradient=Implicit(backward))

        def loss(probe):
            z, stats = layer(0.1 * X, return_stats=True, backward_probe=probe)
            return jnp.vdot(Y, z), stats

        probe, stats = jax.jit(jax.grad(loss, has_aux=True))(BackwardProbe.zeros(3))
        return int(stats.evaluations), int(probe.evaluations)

    plain, anderson = Picard(tol=1e-7, max_iter=900), Anderson(tol=1e-7, max_iter=900)
    _, residuals = picard_trace(lambda z: np.tanh(z @ w + 0.1 * X[0]), np.zeros(4), 300)
    mixed, other = counts(anderson, plain), counts(plain, anderson)
    assert mixed[0] < 0.4 * (1 + np.argmax(residuals <= 1e-7))
    assert mixed[0] < 0.4 * other[0]
    assert other[1] < 0.4 * mixed[1]
