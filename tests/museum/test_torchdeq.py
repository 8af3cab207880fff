"""Defects of torchdeq@4f6bd5f (entries T1 to T22 of our reading) that do not stand here."""

import dataclasses
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deq_jax
import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    Anderson,
    BackwardProbe,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from tests.museum.problems import (
    SOLVERS,
    Counter,
    normal,
    residual_of,
    symmetric,
    tanh_cell,
    tanh_gradients,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)
RADIUS = symmetric([-1.59, -0.5, 0.2, 0.6])


@pytest.mark.museum(
    "torchdeq T5: Broyden quoted a relative residual of 0.0 for an infinite state and called it "
    "converged"
)
def test_an_infinite_state_is_not_a_solution():
    def f(params, z, x):
        return 3 * z**2 + x  # z = 3 z² + 1 has no solution; the iterates overflow

    x = np.ones((1, 2), np.float32)
    z, stats = solve_fixed_point(f, None, x, solver=Broyden(max_iter=400))
    assert stats.status[0] != Status.CONVERGED
    assert np.isfinite(z).all()
    np.testing.assert_allclose(
        stats.residual, residual_of(lambda z: 3 * np.float64(z) ** 2 + 1, z), rtol=1e-4
    )


@pytest.mark.museum("torchdeq T6: Anderson with at most two steps returned the start")
@pytest.mark.usefixtures("x64")
def test_two_evaluations_are_used():
    z, stats = solve_fixed_point(tanh_cell, W, X, solver=Anderson(max_iter=2))
    np.testing.assert_allclose(z, np.tanh(X), rtol=1e-12)
    assert stats.evaluations == 2


@pytest.mark.museum(
    "torchdeq T7: with a spectral radius of 1.59 the default backward solver left a 51 % gradient"
    " error, no warning"
)
@pytest.mark.usefixtures("x64")
@pytest.mark.slow
def test_spectral_radius_above_one():
    x, y = normal(2, 4, seed=1, scale=0.1), normal(2, 4, seed=2)

    def report(gradient):
        def loss(w, probe):
            solver = Anderson(tol=1e-12, max_iter=200)
            z = deq_fixed_point(
                tanh_cell, w, x, solver=solver, gradient=gradient, backward_probe=probe
            )
            return jnp.vdot(y, z)

        return jax.jit(jax.grad(loss, (0, 1)))(RADIUS, BackwardProbe.zeros(2))

    _, (exact, _) = tanh_gradients(RADIUS, x, y)
    by_default, probe = report(Implicit())
    assert relative_error(by_default, exact) < 1e-9
    np.testing.assert_array_equal(probe.status, Status.CONVERGED)
    by_picard, probe = report(Implicit(Picard(tol=1e-12)))
    assert relative_error(by_picard, exact) > 0.1
    assert (probe.status != Status.CONVERGED).all()
    assert (probe.residual > 0.1).all()


@pytest.mark.museum(
    "torchdeq T9: unknown options were kept silently and the caller's configuration was changed"
)
def test_unknown_options_are_refused_and_none_is_changed():
    for make in (*SOLVERS.values(), Implicit):
        with pytest.raises(TypeError, match="n_states"):
            make(n_states=2)
    with pytest.raises(TypeError, match="f_max_iter"):
        deq_fixed_point(tanh_cell, np.float32(W), np.float32(X), f_max_iter=3)
    solver = Anderson(history=3, max_iter=7)
    before = dataclasses.asdict(solver)
    solve_fixed_point(tanh_cell, np.float32(W), np.float32(X), solver=solver)
    assert dataclasses.asdict(solver) == before
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.tol = 1.0


@pytest.mark.museum(
    "torchdeq T11: in eval mode the output never required a gradient (torchdeq#4, #8)"
)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_gradients_in_eval_mode():
    cell = FeedForwardCell(4, 4, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    cell.recurrent.kernel[...], cell.input.kernel[...] = jnp.asarray(W), jnp.eye(4)
    layer = deq_jax.nnx.DEQ(cell, solver=TIGHT)
    expected = tanh_gradients(W, X, Y)[1][1]
    for mode in (layer.train, layer.eval):
        mode()
        gradient = jax.jit(jax.grad(lambda x: jnp.vdot(Y, layer(x))))
        assert relative_error(gradient(X), expected) < 1e-11


@pytest.mark.museum("torchdeq T15: each step waited for the host to decide whether to go on")
@pytest.mark.parametrize("solver", [Anderson(trace=True), Broyden(trace=True)])
def test_no_step_waits_for_the_host(solver):
    w, x = np.float32(W), np.float32(X)

    def lowered(function):
        return jax.jit(function).lower(w).as_text()

    forward = lowered(lambda w: solve_fixed_point(tanh_cell, w, x, solver=solver))
    both = lowered(jax.grad(lambda w: deq_fixed_point(tanh_cell, w, x, solver=solver).sum()))
    assert forward.count("stablehlo.while") == 1
    assert both.count("stablehlo.while") == 2
    assert "callback" not in forward + both
    watched = lowered(lambda w: solve_fixed_point(Counter(tanh_cell), w, x, solver=solver))
    assert "callback" in watched


@pytest.mark.museum(
    "torchdeq T21: a rematerialised step drew another dropout mask than the step it replayed"
)
@pytest.mark.usefixtures("x64")
def test_rematerialised_steps_replay_their_randomness():
    @jax.checkpoint
    def f(key, z, x):
        kept = jax.random.bernoulli(key, 0.5, z.shape)
        return x + 0.4 * jnp.where(kept, z / 0.5, 0)

    layer = jax.checkpoint(lambda x, key: deq_fixed_point(f, key, x, solver=TIGHT))
    x, key = jnp.asarray(normal(2, 8, seed=3)), jax.random.key(7)
    summed = lambda x: (layer(x, key).sum(), layer(x, key))  # noqa: E731
    gradient, z = jax.jit(jax.grad(summed, has_aux=True))(x)
    gain = np.where(jax.random.bernoulli(key, 0.5, x.shape), 5.0, 1.0)  # z = x + 0.8 z or z = x
    np.testing.assert_allclose(z, gain * x, rtol=1e-9)
    np.testing.assert_allclose(gradient, gain, rtol=1e-9)


def documented(item, section):
    """Names that a section of a Google docstring describes."""
    text = inspect.getdoc(item).split(f"{section}:\n", 1)[1]
    text = re.split(r"\n\n?\S", text)[0]
    return set(re.findall(r"^    (\w+): ", text, flags=re.MULTILINE))


@pytest.mark.museum("torchdeq T22: the documented keyword z_init raised in the default core")
def test_documented_options_exist():
    for function in (deq_fixed_point, deq_jax.solve_adjoint):
        assert documented(function, "Args") == set(inspect.signature(function).parameters)
    options = [Picard, Anderson, Broyden, NewtonKrylov, deq_jax.GMRES, deq_jax.BiCGStab, Implicit]
    options += [deq_jax.Neumann, deq_jax.Phantom, deq_jax.Unrolled]
    for kind in options:
        assert documented(kind, "Attributes") == {field.name for field in dataclasses.fields(kind)}
    layer = inspect.signature(deq_jax.nnx.DEQ.__init__).parameters
    assert documented(deq_jax.nnx.DEQ, "Attributes") == set(layer) - {"self"}
    fields = {field.name for field in dataclasses.fields(deq_jax.linen.DEQ)}
    assert documented(deq_jax.linen.DEQ, "Attributes") == fields - {"parent", "name"}
