"""Defects of jaxopt 0.8.5 (entries J1 to J12 of our reading, and its issues)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    Anderson,
    Implicit,
    Picard,
    Unrolled,
    deq_fixed_point,
)
from tests.museum.problems import (
    Counter,
    normal,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)


@pytest.mark.museum("jaxopt J5: gradients through auxiliary output were silently zero")
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


@pytest.mark.museum(
    "jaxopt J7: an eager call with a new but equal solver object compiled again: 320 ms against "
    "150 ms"
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


@pytest.mark.museum(
    "jaxopt J11: an unrolled solve cost in proportion to max_iter: 0.29 s at 1e4, 3.15 s at 1e5"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
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
