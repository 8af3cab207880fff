"""Defects of locuslab/deq, mdeq, deq-flow and monDEQ, of DEQ.jl and of smaller libraries."""

import copy
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    Anderson,
    BackwardProbe,
    Broyden,
    Implicit,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from tests.museum.problems import (
    normal,
    picard_trace,
    primitives,
    residual_of,
    symmetric,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)
README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


@pytest.mark.museum("locuslab/deq#26: UnboundLocalError where no step improved on the start")
def test_no_step_improves():
    def f(_, z, start):  # good at the start alone
        return jnp.where(z == start, start + 0.01, z + 1 + jnp.abs(z))

    start = np.ones((2, 3), np.float32)
    z, stats = solve_fixed_point(f, None, start, start, solver=Anderson(max_iter=8))
    np.testing.assert_array_equal(z, start)
    np.testing.assert_allclose(stats.residual, 0.01 / 1.01, rtol=1e-4)
    np.testing.assert_array_equal(stats.status, Status.MAX_ITER)


@pytest.mark.museum(
    "locuslab/deq#23: a model could not be deep-copied, because its normalised weights were "
    "computed tensors"
)
@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.slow
def test_deepcopy():
    cell = FeedForwardCell(4, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    cell.recurrent.kernel[...], cell.input.kernel[...] = jnp.asarray(W), jnp.eye(4)
    layer = deq_jax.nnx.DEQ(cell, solver=TIGHT)
    layer(X)
    twin = copy.deepcopy(layer)
    twin.cell.recurrent.kernel[...] = jnp.asarray(-W)
    np.testing.assert_allclose(layer(X), tanh_solution(W, X), rtol=0, atol=1e-11)
    np.testing.assert_allclose(twin(X), tanh_solution(-W, X), rtol=0, atol=1e-11)


@pytest.mark.museum("locuslab/deq#28: Broyden's memory grew with the number of steps")
def test_broyden_memory_is_bounded():
    w, x = np.float32(normal(64, 64, scale=0.05)), np.float32(normal(8, 64, seed=1))

    def temporary_bytes(solver):
        solve = jax.jit(lambda w: solve_fixed_point(tanh_cell, w, x, solver=solver).value)
        return solve.lower(w).compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary_bytes(Broyden(memory=4, max_iter=count)) for count in (20, 200))
    assert abs(many - few) <= 0.02 * few
    pairs = 2 * 4 * x.nbytes
    assert pairs <= few <= 4 * pairs


@pytest.mark.museum(
    "locuslab/deq#29: training crashed at the switch from unrolled pretraining to the equilibrium"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
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


@pytest.mark.museum(
    "locuslab/monotone_op_net: a matrix inverse that depends on the weights alone was rebuilt "
    "under the tape in every pass"
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


@pytest.mark.museum("DEQ.jl#105: the quick start failed as soon as its batch was larger")
@pytest.mark.parametrize("batch", [1, 3, 64])
@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
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


@pytest.mark.museum(
    "DEQ.jl: arguments of a constructor shifted by one, and the Jacobian loss was zero in "
    "pretraining"
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


@pytest.mark.museum("DEQ.jl#94: the state was hardcoded to the size of the input")
@pytest.mark.usefixtures("x64")
def test_a_state_of_another_size_than_the_input():
    u = normal(2, 4, seed=4)

    def loss(x):
        f = lambda w, z, x: tanh_cell(w, z, x @ u)  # noqa: E731
        return jnp.vdot(Y, deq_fixed_point(f, W, x, jnp.zeros((3, 4)), solver=TIGHT))

    expected = tanh_gradients(W, X[:, :2] @ u, Y)[1][1] @ u.T
    assert relative_error(jax.jit(jax.grad(loss))(X[:, :2]), expected) < 1e-11


@pytest.mark.museum(
    "FixedPointAcceleration.jl#11, #12: damped Anderson froze at a point that was no solution and"
    " used up all its evaluations"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
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


@pytest.mark.museum(
    "deepinv PR #1022, #1023: acceleration was off for a long time and no test noticed; backward "
    "options were ignored"
)
@pytest.mark.usefixtures("x64", "standard_promotion")
@pytest.mark.slow
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
