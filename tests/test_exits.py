"""The pages for users of other libraries run as they stand, and their answers are right.

What the other libraries are called with is text there; the tests know their options by name.
"""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("standard_promotion")]

DOCS = Path(__file__).parents[1] / "docs"
W = np.array([[0.3, -0.4, 0.1], [0.2, 0.1, 0.3], [-0.1, 0.2, 0.4]])
X = np.array([0.5, -1.0, 2.0])

JAXOPT = """
    FixedPointIteration AndersonAcceleration AndersonWrapper Broyden root_vjp run_iterator
    l2_optimality_error maxiter tol history_size beta ridge stepsize gamma verbose implicit_diff
    implicit_diff_solve jit unroll iter_num num_fun_eval error params solve_gmres solve_bicgstab
    solve_normal_cg
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


@pytest.mark.parametrize(("name", "words"), [("jaxopt", JAXOPT)])
def test_every_entry_point_is_there(name, words):
    text = "\n".join(re.findall(r"`([^`]+)`", page(name)))
    missing = [word for word in words.split() if not re.search(rf"\b{word}\b", text)]
    assert not missing


def test_jaxopt():
    names = run("jaxopt")
    z = equilibrium()
    for name in ("z", "root"):
        np.testing.assert_allclose(names[name], z, atol=1e-5)
    expected = cotangent(2 * z)
    for name, atol in (("gradient", 1e-4), ("unrolled", 1e-3)):
        np.testing.assert_allclose(names[name]["w"], expected, atol=atol)
    np.testing.assert_allclose(names["vjp"]["w"], cotangent(np.ones(3)), atol=1e-4)
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
