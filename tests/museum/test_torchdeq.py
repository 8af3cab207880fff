"""Defects of torchdeq@4f6bd5f (entries T1 to T22 of our reading) that do not stand here."""

import dataclasses
import functools
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
    OneStep,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from tests.museum.catalogue import defect
from tests.museum.problems import (
    SOLVERS,
    Counter,
    linear_cell,
    normal,
    picard_trace,
    residual_of,
    symmetric,
    tanh_cell,
    tanh_gradients,
    tanh_solution,
)
from tests.reference import relative_error

W, X, Y = normal(4, 4, scale=0.3), normal(3, 4, seed=1), normal(3, 4, seed=2)
TIGHT = Picard(tol=1e-13, max_iter=300)
RADIUS = symmetric([-1.59, -0.5, 0.2, 0.6])


@defect(
    "torchdeq T1",
    "with sampled states and an early stop, the final state silently got the samples' one-step "
    "gradient instead of the implicit one",
    we="each state keeps its own policy, whenever the solver stops",
)
@pytest.mark.usefixtures("x64")
def test_the_final_state_keeps_its_gradient_policy():
    def solve(w):
        return deq_fixed_point(
            tanh_cell,
            w,
            X,
            solver=TIGHT,
            return_stats=True,
            sample_at=(3, 250, 300),
            sample_gradient=OneStep(),
        )

    def gradient(state):
        return jax.jit(jax.grad(lambda w: jnp.vdot(Y, state(solve(w)))))(W)

    value, stats, samples = solve(W)
    z, (exact, _) = tanh_gradients(W, X, Y)
    one_step = z.T @ ((1 - z**2) * Y)
    assert stats.evaluations < 250
    np.testing.assert_array_equal(samples[2], value)
    assert relative_error(gradient(lambda out: out[0]), exact) < 1e-11
    assert relative_error(gradient(lambda out: out[2][2]), one_step) < 1e-11
    assert relative_error(one_step, exact) > 0.05


@defect(
    "torchdeq T2",
    "second-order gradients were 170 % wrong without an exception",
    we="gradient of a gradient as through 200 unrolled steps",
)
@pytest.mark.usefixtures("x64")
def test_gradient_of_a_gradient():
    def layer(w, x):
        return deq_fixed_point(tanh_cell, w, x, solver=TIGHT)

    def unrolled(w, x):
        step = lambda z, _: (tanh_cell(w, z, x), None)  # noqa: E731
        return jax.lax.scan(step, jnp.zeros_like(x), length=200)[0]

    def second(solve):
        first = jax.grad(lambda w, x: jnp.sum(solve(w, x) ** 3), (0, 1))
        penalty = lambda w, x: sum(jnp.sum(g**2) for g in first(w, x))  # noqa: E731
        return jax.jit(jax.grad(penalty, (0, 1)))(W, X)

    assert relative_error(second(layer), second(unrolled)) < 1e-9


def explodes(gains, z, x):
    """Sample by sample `gain z + x`; infinite where z goes beyond 0.9 and x is 0.5 exactly."""
    moved = gains[:, None] * z + x
    return jnp.where((x == 0.5) & (z >= 0.9), jnp.inf, moved)


@defect(
    "torchdeq T3",
    "multiplication with a mask let NaN and inf into the best state of a diverging sample",
    we="samples are frozen by selection; one that diverges returns its best finite iterate",
)
@pytest.mark.parametrize("name", ["picard", "anderson"])
def test_a_sample_that_diverges_returns_its_best_iterate(name):
    gains = np.array([0.5, 0.5, 0.5], np.float32)
    x = np.array([[0.3, -0.2], [0.5, 0.5], [np.nan, 0.1]], np.float32)
    z, stats = solve_fixed_point(explodes, gains, x, solver=SOLVERS[name](tol=1e-5, trace=True))
    np.testing.assert_array_equal(
        stats.status, [Status.CONVERGED, Status.DIVERGED, Status.DIVERGED]
    )
    np.testing.assert_allclose(z[0], 2 * x[0], rtol=1e-4)
    # Sample 1 heads for 1, where f is infinite. Its best iterate is the last finite one.
    np.testing.assert_allclose(stats.residual[1], residual_of(lambda z: 0.5 * z + 0.5, z[1:2])[0])
    assert stats.residual[1] == np.nanmin(
        np.where(np.isinf(stats.trace), np.nan, stats.trace)[:, 1]
    )
    if name == "picard":
        np.testing.assert_allclose(z[1], 0.875)
    np.testing.assert_array_equal(z[2], 0)


@defect(
    "torchdeq T4",
    "an absolute Anderson ridge of 1e-4 kept a relative 1e-5 out of reach in 200 steps at scale 1",
    we="the ridge is relative: the same count at every scale, far below Picard's",
)
@pytest.mark.usefixtures("x64")
def test_anderson_takes_the_same_steps_at_every_scale():
    w, x = symmetric(np.linspace(-0.5, 0.95, 64)), normal(1, 64, seed=1)
    counts = []
    for scale in (2.0**-10, 1.0, 2.0**10):
        solver = Anderson(history=6, tol=1e-5, max_iter=200)
        z, stats = solve_fixed_point(linear_cell, w, scale * x, solver=solver)
        assert residual_of(lambda z, scale=scale: z @ w + scale * x, z)[0] <= 1e-5
        counts.append(int(stats.evaluations))
    _, plain = picard_trace(lambda z: z @ w + x, 0 * x, 400)
    assert len(set(counts)) == 1
    assert counts[0] < 0.4 * (1 + np.argmax(plain <= 1e-5))


@defect(
    "torchdeq T5",
    "limited-memory Broyden overwrote columns that later ones were built on: NaN at L = 20, 10, 5",
    we="when the memory is full it starts over with the newest pair; every L converges",
)
@pytest.mark.parametrize("memory", [20, 5, 2])
@pytest.mark.usefixtures("x64")
def test_broyden_converges_with_little_memory(memory):
    w, x = symmetric(np.linspace(-0.5, 0.95, 64)), normal(1, 64, seed=1)
    solver = Broyden(memory=memory, tol=1e-8, max_iter=200)
    z, stats = solve_fixed_point(linear_cell, w, x, solver=solver)
    assert stats.status[0] == Status.CONVERGED
    np.testing.assert_allclose(z, np.linalg.solve(np.eye(64) - w, x.T).T, rtol=0, atol=1e-5)
    assert stats.evaluations <= 150  # plain iteration takes 300


@defect(
    "torchdeq T5",
    "Broyden quoted a relative residual of 0.0 for an infinite state and called it converged",
    we="such a state is neither returned nor CONVERGED; the best finite one is",
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


@defect(
    "torchdeq T6",
    "samples asked for at steps [5, 10] came from [4, 9], evaluations were miscounted, traces were "
    "padded with 1e8",
    we="sample k is the point of evaluation k, counts are calls of f, traces end in NaN",
)
@pytest.mark.usefixtures("x64")
def test_samples_counts_and_traces_are_exact():
    points, residuals = picard_trace(lambda z: np.tanh(z @ W + X[:1]), np.zeros((1, 4)), 40)
    f = Counter(tanh_cell)
    _, stats, samples = deq_fixed_point(
        f,
        W,
        X[:1],
        solver=Picard(tol=1e-6, max_iter=200, trace=True),
        return_stats=True,
        sample_at=(5, 10),
    )
    count = 1 + int(np.argmax(residuals <= 1e-6))
    np.testing.assert_allclose(samples[0], points[4], rtol=1e-12)
    np.testing.assert_allclose(samples[1], points[9], rtol=1e-12)
    assert stats.evaluations == stats.iterations[0] == f.read() == count
    np.testing.assert_allclose(stats.trace[:count, 0], residuals[:count], rtol=1e-6)
    assert np.isnan(stats.trace[count:]).all()


@defect(
    "torchdeq T6",
    "Anderson with at most two steps returned the start",
    we="two evaluations return the better of the start and f of it",
)
@pytest.mark.usefixtures("x64")
def test_two_evaluations_are_used():
    z, stats = solve_fixed_point(tanh_cell, W, X, solver=Anderson(max_iter=2))
    np.testing.assert_allclose(z, np.tanh(X), rtol=1e-12)
    assert stats.evaluations == 2


@defect(
    "torchdeq T7",
    "with a spectral radius of 1.59 the default backward solver left a 51 % gradient error, no "
    "warning",
    we="the default finds the gradient; a backward solver that cannot reports it through the probe",
)
@pytest.mark.usefixtures("x64")
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


@defect(
    "torchdeq T8",
    "two forward passes before one backward pass never returned, since both shared one hook",
    we="passes are independent: a siamese loss has the sum of the two gradients",
)
@pytest.mark.usefixtures("x64")
def test_two_forward_passes_before_one_backward_pass():
    other = normal(3, 4, seed=5)

    def siamese(w):
        first = deq_fixed_point(tanh_cell, w, X, solver=TIGHT)
        second = deq_fixed_point(tanh_cell, w, other, solver=TIGHT)
        return jnp.sum((first - second) ** 2)

    difference = 2 * (tanh_solution(W, X) - tanh_solution(W, other))
    expected = tanh_gradients(W, X, difference)[1][0] - tanh_gradients(W, other, difference)[1][0]
    assert relative_error(jax.jit(jax.grad(siamese))(W), expected) < 1e-11


@defect(
    "torchdeq T9",
    "unknown options were kept silently and the caller's configuration was changed",
    we="an unknown option is a TypeError that names it; options are frozen",
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


@defect(
    "torchdeq T9",
    "some solver options could not be set, and tol and max_iter of one call raised",
    we="both passes take any solver with any options, per call",
)
@pytest.mark.usefixtures("x64")
def test_every_option_reaches_its_pass():
    def run(solver, gradient):
        def loss(probe):
            options = {"solver": solver, "gradient": gradient, "backward_probe": probe}
            z, stats = deq_fixed_point(tanh_cell, W, X, return_stats=True, **options)
            return jnp.vdot(Y, z), stats

        return jax.jit(jax.grad(loss, has_aux=True))(BackwardProbe.zeros(3))

    probe, stats = run(Picard(tol=0.0, max_iter=6), Implicit(Picard(tol=0.0), max_iter=9))
    assert (stats.evaluations, probe.evaluations) == (6, 9)
    probe, stats = run(Picard(tol=1e-2), Implicit(Picard(), tol=1e-10))
    assert stats.residual.max() <= 1e-2
    assert stats.residual.max() > 1e-6
    assert probe.residual.max() <= 1e-10


@defect(
    "torchdeq T10",
    "a sample's result moved by up to 7e-4 when a hard sample joined its batch",
    we="each sample has its own history, residual and stop",
)
@pytest.mark.parametrize("name", ["anderson", "broyden", "newton"])
def test_a_hard_batch_mate_changes_nothing(name):
    def f(gains, z, x):
        return jnp.tanh(gains[:, None] * jnp.roll(z, 1, axis=1)) + x

    hard, easy = np.array([0.5, 0.99], np.float32), np.array([0.5, 0.5], np.float32)
    x, solver = np.float32(normal(2, 6, seed=1)), SOLVERS[name](tol=1e-3, max_iter=300)
    z, stats = solve_fixed_point(f, hard, x, solver=solver)
    # Beside a copy of itself a sample is as good as alone, and nothing is compiled again.
    alone, alone_stats = solve_fixed_point(f, easy, x[[0, 0]], solver=solver)
    assert stats.iterations[0] < stats.iterations[1]
    assert stats.iterations[0] == alone_stats.iterations[0] == alone_stats.iterations[1]
    np.testing.assert_allclose(z[0], alone[0], rtol=0, atol=1e-6)


@defect(
    "torchdeq T11",
    "in eval mode the output never required a gradient (torchdeq#4, #8)",
    we="gradients depend on differentiation alone, not on a mode",
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


@defect(
    "torchdeq T12",
    "a forgotten reset of the normalisation was an error in the second step",
    we="nothing is kept between calls: step two sees the parameters of step two",
)
@pytest.mark.usefixtures("x64")
def test_training_steps_need_no_reset():
    w, layer = jnp.asarray(W), functools.partial(deq_fixed_point, solver=TIGHT)
    for _ in range(3):
        gradient = jax.grad(lambda w: jnp.vdot(Y, layer(tanh_cell, w, X)))(w)
        assert relative_error(gradient, tanh_gradients(w, X, Y)[1][0]) < 1e-11
        w = w - 0.1 * gradient


@defect(
    "torchdeq T13",
    "a wrong shape that broadcasts was accepted and mixed precisions were promoted silently",
    we="f must return the structure, shapes and dtypes of z; the error names the leaf",
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda z: z[:, :1], ["shapes", "(3, 1)", "(3, 4)"]),
        (lambda z: z.astype(jnp.float64), ["dtypes", "float64", "float32"]),
        (lambda z: (z,), ["structure", "got", "expected"]),
    ],
)
@pytest.mark.usefixtures("x64")
def test_what_f_returns_is_checked(change, words):
    with pytest.raises(ValueError) as raised:
        deq_fixed_point(lambda w, z, x: change(z), None, np.float32(X))
    for word in words:
        assert word in str(raised.value)


@defect(
    "torchdeq T14",
    "compilation, vmap, functional gradients, jacrev and jvp all failed",
    we="all of them give the dense Jacobian",
)
@pytest.mark.parametrize("way", ["jit and jacrev", "vmap of linearize"])
@pytest.mark.usefixtures("x64")
def test_transformations(way):
    def layer(x):
        return deq_fixed_point(tanh_cell, W, x[None], solver=TIGHT)[0]

    jacobian = {
        "jit and jacrev": jax.jit(jax.jacrev(layer)),
        "vmap of linearize": lambda x: jax.vmap(jax.linearize(layer, x)[1], out_axes=1)(jnp.eye(4)),
    }[way](jnp.asarray(X[0]))
    slope = 1 - tanh_solution(W, X[:1])[0] ** 2
    expected = np.linalg.solve(np.eye(4) - slope[:, None] * W.T, np.diag(slope))
    np.testing.assert_allclose(jacobian, expected, rtol=0, atol=1e-11)


@defect(
    "torchdeq T15",
    "each step waited for the host to decide whether to go on",
    we="a solve is one loop on the device; neither pass calls back",
)
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


@defect(
    "torchdeq T19",
    "no converged flag, no reason, no count; backward statistics only through a writer",
    we="status, residual and count per sample, forward and backward",
)
@pytest.mark.usefixtures("x64")
def test_both_passes_report():
    gains = np.array([0.1, 0.999, 0.5])
    x = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, np.nan]])
    f = Counter(lambda gains, z, x: gains[:, None] * z + x)

    def loss(x, probe):
        z, stats = deq_fixed_point(
            f,
            gains,
            x,
            solver=Picard(tol=1e-6, max_iter=25),
            return_stats=True,
            backward_probe=probe,
        )
        return z[:2].sum(), (z, stats)

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    (x_bar, probe), (z, stats) = gradient(x, BackwardProbe.zeros(3))
    np.testing.assert_array_equal(stats.status[:2], [Status.CONVERGED, Status.MAX_ITER])
    assert stats.status[2] == Status.DIVERGED
    assert stats.evaluations == 25 <= f.read()
    residual = residual_of(lambda z: gains[:2, None] * z + x[:2], z[:2])
    np.testing.assert_allclose(stats.residual[:2], residual, rtol=1e-6)
    # The cotangent of x is u itself, of u = gain u + 1.
    np.testing.assert_array_equal(probe.status[:2], [Status.CONVERGED, Status.MAX_ITER])
    u = np.asarray(x_bar)[:2]
    residual = np.abs(gains[:2, None] * u + 1 - u).max(1)
    np.testing.assert_allclose(probe.residual[:2], residual, rtol=1e-4, atol=1e-9)
    assert probe.evaluations == 25


@defect(
    "torchdeq T21",
    "a rematerialised step drew another dropout mask than the step it replayed",
    we="randomness comes from keys: under jax.checkpoint values and gradients have one mask",
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


@defect(
    "torchdeq T22",
    "the documented keyword z_init raised in the default core",
    we="documented names and accepted names are the same",
)
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
