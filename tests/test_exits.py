"""The pages for users of other libraries run as they stand, and their answers are right.

What the other libraries are called with is text there; the tests know their options by name.
"""

import functools
import re
from pathlib import Path

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

DOCS = Path(__file__).parents[1] / "docs"
W = np.array([[0.3, -0.4, 0.1], [0.2, 0.1, 0.3], [-0.1, 0.2, 0.4]])
X = np.array([0.5, -1.0, 2.0])

JAXOPT = """
    FixedPointIteration AndersonAcceleration AndersonWrapper Broyden run_iterator
    custom_root custom_fixed_point root_vjp root_jvp reference_signature has_aux solve
    init_state update aux mixing_frequency maxls condition stop_if_linesearch_fails
    l2_optimality_error maxiter tol history_size beta ridge stepsize gamma verbose implicit_diff
    implicit_diff_solve jit unroll iter_num num_fun_eval error params solve_gmres solve_bicgstab
    solve_normal_cg
"""

TORCHDEQ = """
    core f_solver b_solver no_stat f_max_iter b_max_iter f_tol b_tol f_stop_mode b_stop_mode
    eval_factor eval_f_max_iter ift hook_ift grad tau sup_gap sup_loc n_states indexing
    anderson broyden fixed_point_iter simple_fixed_point_iter sliced
    solver_kwargs sradius_mode backward_writer m lam LBFGS_thres ls return_final
    abs_lowest rel_lowest abs_trace rel_trace nstep sradius
    reset_deq register_deq register_solver apply_norm reset_norm remove_norm register_norm
    register_norm_module norm_clip norm_clip_value norm_target_norm norm_no_scale sn_n_power_iters
    reset_dropout fp_correction register_weight_func jac_reg jac_loss_weight jac_loss_freq
    jac_incremental power_method mixed_init mem_gc add_deq_args
"""

OPTIMISTIX = """
    fixed_point root_find FixedPointIteration Newton Chord Bisection Dogleg LevenbergMarquardt BFGS
    BestSoFarFixedPoint BestSoFarRootFinder minimise least_squares rtol atol damp implicit_jvp
    args options max_steps adjoint ImplicitAdjoint linear_solver RecursiveCheckpointAdjoint throw
    value result num_steps state aux has_aux tags norm max_norm rms_norm two_norm init step
    terminate
"""


@functools.cache
def page(name):
    return (DOCS / f"from_{name}.md").read_text(encoding="utf-8")


@functools.cache
def run(name):
    """The names that the page's program leaves behind."""
    program = "\n".join(re.findall(r"```python\n(.*?)```", page(name), flags=re.DOTALL))
    names = {"__name__": f"from_{name}"}
    exec(compile(program, f"docs/from_{name}.md", "exec"), names)
    return names


def equilibrium(w=W, x=X):
    """z = tanh(W z + x) in float64, by Newton's method."""
    z = np.zeros(len(x))
    for _ in range(30):
        value = np.tanh(w @ z + x)
        z = z - np.linalg.solve(np.eye(len(z)) - (1 - value**2)[:, None] * w, z - value)
    return z


def cotangent(y, w=W, x=X):
    """What y becomes on its way back to W: (D u) zᵀ with u = (I - Jᵀ)⁻¹ y, J = D W."""
    z = equilibrium(w, x)
    slope = 1 - z**2
    u = np.linalg.solve(np.eye(len(z)) - (slope[:, None] * w).T, y)
    return np.outer(slope * u, z)


@pytest.mark.parametrize(
    ("name", "words"),
    [("jaxopt", JAXOPT), ("torchdeq", TORCHDEQ), ("optimistix", OPTIMISTIX)],
    ids=("jaxopt", "torchdeq", "optimistix"),
)
def test_every_entry_point_is_there(name, words):
    text = "\n".join(re.findall(r"`([^`]+)`", page(name)))
    missing = [word for word in words.split() if not re.search(rf"\b{word}\b", text)]
    assert not missing


def test_jaxopt():
    names = run("jaxopt")
    z = equilibrium()
    for name in ("z", "root", "by_hand"):
        np.testing.assert_allclose(names[name], z, atol=1e-5)
    assert names["norm"] == pytest.approx((z**2).sum(), abs=1e-5)
    expected = cotangent(2 * z)
    for name, atol in (("gradient", 1e-4), ("unrolled", 1e-3)):
        np.testing.assert_allclose(names[name]["w"], expected, atol=atol)
    np.testing.assert_allclose(names["own"]["w"], expected, atol=1e-4)
    np.testing.assert_allclose(names["vjp"]["w"], cotangent(np.ones(3)), atol=1e-4)
    moved = [cotangent(y).sum() for y in np.eye(3)]
    np.testing.assert_allclose(names["jvp"], moved, atol=1e-4)
    many = np.stack([equilibrium(x=s * X) for s in (1, 2, -1)])
    for name in ("many", "same", "path"):
        np.testing.assert_allclose(names[name], many, atol=2e-3)
    # The lasso's conditions: a subgradient of its sum is zero.
    inputs, targets = map(np.asarray, names["data"])
    w = np.asarray(names["w"], np.float64)
    slope = inputs.T @ (inputs @ w - targets) / len(targets)
    assert w[1] == 0
    assert w[0] > 0
    np.testing.assert_allclose(slope[0], -0.1, atol=1e-5)
    assert abs(slope[1]) < 0.1


def slopes(function, point, step=1e-4):
    """The gradient of a NumPy function by central differences."""
    moved = [point + step * unit.reshape(point.shape) for unit in np.eye(point.size)]
    moved = [(plus, 2 * point - plus) for plus in moved]
    differences = [function(plus) - function(minus) for plus, minus in moved]
    return np.reshape(differences, point.shape) / (2 * step)


def test_torchdeq():
    names = run("torchdeq")
    inputs, y = np.asarray(names["x"], np.float64), np.ones((2, 3))
    z = np.stack([equilibrium(x=x) for x in inputs])
    np.testing.assert_allclose(names["z"], z, atol=1e-4)
    expected = sum(cotangent(2 * z[i], x=inputs[i]) for i in range(2))
    np.testing.assert_allclose(names["g_params"]["w"], expected, atol=1e-4)
    assert (names["report"].residual <= 1e-6).all()
    assert (names["report"].iterations > 1).all()

    # Losses on three states: those on the way are differentiated through one application of f.
    def iterate(z, count, w=W):
        for _ in range(count):
            z = np.tanh(z @ w.T + inputs)
        return z

    def error(weight, state):
        return weight * 2 * (state - y) / y.size

    def one_step(weight, state):
        return (error(weight, state) * (1 - iterate(state, 1) ** 2)).T @ state

    first, second, third, fourth = (iterate(np.zeros_like(y), count) for count in (3, 6, 7, 9))
    expected = sum(cotangent(error(1, z)[i], x=inputs[i]) for i in range(2))
    expected = expected + one_step(0.64, first) + one_step(0.8, third)
    np.testing.assert_allclose(names["g_corrected"]["w"], expected, atol=1e-3)
    expected = one_step(0.64, first) + one_step(0.8, second) + one_step(1, fourth)
    np.testing.assert_allclose(names["g_sliced"]["w"], expected, atol=1e-3)

    # Damped steps from the solution, which stays where it is when W moves.
    def steps(w):
        state, states = z, []
        for _ in range(4):
            state = (state + iterate(state, 1, w)) / 2
            states.append(state)
        return states

    supervised = slopes(lambda w: sum(((s - y) ** 2).mean() for s in steps(w)[1::2]), W)
    np.testing.assert_allclose(names["g_supervised"]["w"], supervised, atol=1e-3)
    phantom = slopes(lambda w: (2 * z * steps(w)[-1]).sum(), W)
    np.testing.assert_allclose(names["g_phantom"]["w"], phantom, atol=1e-3)

    jacobians = (1 - z**2)[:, :, None] * W
    assert names["penalty"] == pytest.approx((jacobians**2).sum((1, 2)).mean() / 3, rel=0.1)
    radius = np.abs(np.linalg.eigvals(jacobians)).max(1)
    np.testing.assert_allclose(names["radius"], radius, rtol=0.01)


def test_optimistix():
    names = run("optimistix")
    z = equilibrium()
    np.testing.assert_allclose(names["z"], z, atol=1e-5)
    assert names["aux"] == pytest.approx((z**2).sum(), abs=1e-4)
    rows = np.stack([cotangent(y) for y in np.eye(3)])
    for name in ("forward", "reverse"):
        np.testing.assert_allclose(names[name], rows, atol=1e-4)
    many = np.stack([equilibrium(x=s * X) for s in (1, 2, -1)])
    np.testing.assert_allclose(names["many"], many, atol=2e-3)
    root = np.zeros(3)
    for _ in range(30):
        slope = np.diag(3 * root**2 + 1) - W
        root = root - np.linalg.solve(slope, root**3 + root - W @ root - X)
    np.testing.assert_allclose(names["root"], root, atol=1e-5)
