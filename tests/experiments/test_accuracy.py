"""The study of accuracy: its reference and its errors, against dense solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import Anderson, Implicit, OneStep, Picard
from experiments.studies import accuracy
from tests.reference import implicit_gradient, newton_equilibrium, relative_error


@pytest.fixture
def problem(x64):
    """A smooth dense cell of three samples."""
    rng = np.random.default_rng(0)
    w, x, y = rng.normal(size=(5, 5)) / 5, rng.normal(size=(3, 5)), rng.normal(size=(3, 5))
    f = lambda w, z, x: jnp.tanh(z @ w + x)  # noqa: E731
    return accuracy.solved(f, *map(jnp.asarray, (w, x, y)))


def of_inputs(inputs, z):
    w, x = inputs
    return jnp.tanh(z @ w + x)


@pytest.mark.slow
def test_the_reference_is_that_of_dense_linear_algebra(problem):
    inputs = problem.params, problem.x
    z = newton_equilibrium(lambda z: of_inputs(inputs, z), jnp.zeros((3, 5)))
    assert relative_error(problem.z, z) < 1e-12
    gradient = implicit_gradient(of_inputs, inputs, z, problem.cotangent)
    assert relative_error(problem.gradient, accuracy.flat(gradient)) < 1e-11
    slopes = 1 - np.asarray(z) ** 2
    radius = [np.abs(np.linalg.eigvals(np.asarray(problem.params) * s)).max() for s in slopes]
    assert accuracy.spectral_radius(problem) == pytest.approx(max(radius))


@pytest.mark.slow
def test_the_error_of_a_biased_gradient_is_its_bias(problem):
    found = accuracy.gradient_error(problem, Anderson(tol=1e-12), OneStep(), "float64")
    _, pullback = jax.vjp(lambda inputs: of_inputs(inputs, problem.z), (problem.params, problem.x))
    biased = accuracy.flat(pullback(problem.cotangent))
    size = np.linalg.norm(problem.gradient)
    bias = np.linalg.norm(biased - problem.gradient) / size
    assert bias > 0.05
    assert found["error"] == pytest.approx(bias, rel=1e-6)
    assert found["solved"]
    exact = accuracy.gradient_error(problem, Anderson(tol=1e-12), Implicit(), "float64")
    assert exact["error"] < 1e-10
    assert exact["backward"] > 3


def test_what_was_not_solved_stands_in_brackets(problem):
    found = accuracy.gradient_error(problem, Picard(tol=1e-12, max_iter=3), Implicit(), "float64")
    assert not found["solved"]
    assert found["evaluations"] == 3
    row = {"solver": "Picard", "policy": "Implicit()", "products": 0, "backward": None}
    row |= {"errors": [1e-9, 0.25], "solved": [True, False], "evaluations": 3}
    part = {"problems": {"A cell": {"radius": 0.5, "rows": [row]}}}
    table = accuracy.render_gradients(part)[-1]
    assert table.splitlines()[-1] == "| Picard | `Implicit()` | 1e-09 | (2e-01) | 3 | - |"


@pytest.mark.slow
def test_half_precision_has_a_floor(problem):
    solver = Anderson(tol=0.0, max_iter=40, trace=True)
    single = accuracy.floor(problem, solver, accuracy.MODES["float32"])
    half = accuracy.floor(problem, solver, accuracy.MODES["mixed, bfloat16"])
    assert 1e-9 < single["residual"] < 1e-6
    assert 2**-12 < half["residual"] < 2**-7  # bfloat16 has 8 bits
    assert 1e-4 < half["error"] < 2e-2
    assert accuracy.mode_gradient_error(problem, accuracy.MODES["float32"]) < 1e-5
