"""`Control`, aux, step numbers and `check_every`, against NumPy loops of the same."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import (
    Anderson,
    Control,
    Execution,
    Implicit,
    NewtonKrylov,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_fixed_point,
)
from tests.test_shard_axis import collectives_in_loops

A = np.array([0.5, 0.9, -0.7])
X = np.array([[1.0, 0.2, 3.0], [-2.0, 0.1, 0.4]])

pytestmark = pytest.mark.usefixtures("x64")


def linear(a, z, x):
    """Each entry has an equation of its own: z = a z + x."""
    return a * z + x


def points(count):
    """z_0, ..., z_count of Picard iteration from zero, in NumPy."""
    found = [np.zeros_like(X)]
    for _ in range(count):
        found.append(A * found[-1] + X)
    return found


def solve(control, tol=0.0, max_iter=40, f=linear, **options):
    solver = Picard(tol=tol, max_iter=max_iter, trace=True)
    return solve_fixed_point(f, A, X, solver=solver, control=control, **options)


# --------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("solver", [Anderson, NewtonKrylov])
@pytest.mark.slow
def test_one_compiled_program_for_all_budgets(solver):
    def cell(w, z, x):
        return jnp.tanh(z @ w + x)

    w = np.random.default_rng(0).normal(size=(3, 3))

    @jax.jit
    def solve(w, budget):
        options = solver(tol=1e-12, max_iter=64)
        return solve_fixed_point(cell, w, X, solver=options, control=Control(budget=budget))

    for budget in (1, 3, 64):
        value, stats = solve(w, budget)
        static = jax.jit(functools.partial(solve_fixed_point, cell, x=X))
        expected, reference = static(w, solver=solver(tol=1e-12, max_iter=budget))
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(stats.residual, reference.residual)
        assert stats.evaluations == reference.evaluations <= budget
    assert solve._cache_size() == 1


def test_a_traced_budget_is_clipped_and_a_static_one_checked():
    for budget, evaluations in ((np.int32(0), 1), (np.int32(99), 7)):
        assert solve(Control(budget=budget), max_iter=7).stats.evaluations == evaluations
    with pytest.raises(ValueError, match=r"Control\.budget must be at most the solver's max_iter"):
        solve(Control(budget=8), max_iter=7)


@pytest.mark.slow
def test_unrolled_under_a_budget_has_the_gradient_of_as_many_evaluations():
    def loss(a, budget):
        z = deq_fixed_point(
            linear,
            a,
            X,
            solver=Picard(tol=0.0, max_iter=9),
            gradient=Unrolled(),
            control=Control(budget=budget, select="last"),
        )
        return jnp.sum(z**2)

    def plain(a):
        z = jnp.zeros_like(X)
        for _ in range(4):
            z = linear(a, z, X)
        return jnp.sum(z**2)

    np.testing.assert_allclose(jax.grad(loss)(A, 4), jax.grad(plain)(A), rtol=1e-13)


# ------------------------------------------------------------------- norms, stops, last, min_iter


def expected_residuals(norm, scales, count):
    """`[count, B]`, from the formula."""
    rows = []
    for z, fz in zip(points(count)[:-1], points(count)[1:], strict=True):
        rows.append(norm((fz - z) / scales) / norm(fz / scales))
    return np.stack(rows)


NORMS = {
    "l2": lambda z: np.sqrt((z**2).sum(1)),
    "max": lambda z: np.abs(z).max(1),
    "rms": lambda z: np.sqrt((z**2).mean(1)),
}


@pytest.mark.parametrize("scales", [None, np.array([1.0, 10.0, 0.1])])
@pytest.mark.parametrize("norm", NORMS)
def test_residuals_in_a_norm(norm, scales):
    trace = solve(Control(norm=norm, scales=scales), max_iter=6).stats.trace
    expected = expected_residuals(NORMS[norm], 1 if scales is None else scales, 6)
    np.testing.assert_allclose(trace, expected, rtol=1e-12)


def test_a_norm_of_the_users_own_may_hold_arrays_and_stops_samples():
    weights = jnp.array([1.0, 0.0, 2.0])

    @jax.jit
    def run(weights):
        norm = lambda z: jnp.sqrt(jnp.sum(weights * z**2, 1))  # noqa: E731
        return solve(Control(norm=norm), tol=1e-3).stats

    stats = run(weights)
    expected = expected_residuals(lambda z: np.sqrt((weights * z**2).sum(1)), 1, 40)
    np.testing.assert_array_equal(stats.iterations, (expected <= 1e-3).argmax(0) + 1)
    assert (stats.status == Status.CONVERGED).all()


def test_stop_and_min_iter():
    stop = lambda z, fz, aux: jnp.abs(fz).max(1) > 2.5  # noqa: E731
    stats = solve(Control(stop=stop)).stats
    exceeds = np.stack([np.abs(fz).max(1) > 2.5 for fz in points(40)[1:]])
    assert exceeds.any(0).tolist() == [True, True]
    first = exceeds.argmax(0) + 1
    np.testing.assert_array_equal(stats.iterations, first)
    assert (stats.status == Status.CONVERGED).all()
    later = solve(Control(stop=lambda *_: jnp.ones(2, bool), min_iter=5)).stats
    np.testing.assert_array_equal(later.iterations, [5, 5])


def test_the_last_iterate_is_the_next_point_of_a_sample_when_it_stopped():
    stop = lambda z, fz, aux: aux >= np.array([2, 6], np.int32)  # noqa: E731

    def counted(a, z, x, step):
        return linear(a, z, x), step

    control = Control(stop=stop, select="last")
    value, stats = solve(control, f=counted, has_aux=True, pass_step=True)
    np.testing.assert_array_equal(stats.iterations, [3, 7])
    np.testing.assert_array_equal(stats.step, [3, 7])
    np.testing.assert_allclose(value, [points(3)[3][0], points(7)[7][1]], rtol=1e-13)
    residuals = expected_residuals(NORMS["l2"], 1, 8)
    np.testing.assert_allclose(stats.residual, [residuals[2, 0], residuals[6, 1]], rtol=1e-12)


def test_a_last_iterate_that_is_not_finite_is_not_returned():
    def f(a, z, x):
        return jnp.where(z > 2, jnp.inf, a * z + x)

    value, stats = solve(Control(select="last"), f=f, max_iter=4)
    np.testing.assert_allclose(value[1], points(4)[4][1], rtol=1e-13)
    assert np.isfinite(value).all()
    assert list(stats.status) == [Status.DIVERGED, Status.MAX_ITER]


def test_fold_sees_every_evaluation():
    def combine(carry, z, fz, aux):
        return carry[0] + 1, carry[1] + fz - z, carry[2] + aux

    def f(a, z, x):
        return linear(a, z, x), z.sum()

    init = (np.int32(0), np.zeros_like(X), 0.0)
    stats = jax.jit(lambda: solve(Control(fold=(combine, init)), f=f, has_aux=True, max_iter=5))()
    count, moved, sums = stats.stats.fold
    assert count == 5
    np.testing.assert_allclose(moved, points(5)[5], rtol=1e-13)
    np.testing.assert_allclose(sums, sum(z.sum() for z in points(4)), rtol=1e-13)


def test_unbatched_functions_see_states_without_a_batch():
    control = Control(
        norm=lambda z: jnp.abs(z).max(),
        stop=lambda z, fz, aux: aux > 3,
        fold=(lambda carry, z, fz, aux: carry + z, np.zeros(3)),
    )
    solver = Picard(tol=0.0, max_iter=9)
    f = lambda a, z, x, step: (linear(a, z, x), step)  # noqa: E731
    solution = solve_fixed_point(
        f, A, X[0], solver=solver, control=control, has_aux=True, pass_step=True, batched=False
    )
    assert solution.stats.iterations == 5
    assert solution.aux == solution.stats.step == 4
    np.testing.assert_allclose(solution.stats.fold, sum(points(4))[0], rtol=1e-13)


ERRORS = [
    (lambda: Control(budget=0), r"Control\.budget must be at least 1, got 0"),
    (lambda: Control(budget=2.0), r"Control\.budget must be an integer scalar, got float"),
    (lambda: Control(min_iter=0), r"Control\.min_iter must be at least 1"),
    (lambda: Control(norm="l1"), r'Control\.norm must be "l2", "max", "rms" or a function'),
    (lambda: Control(select="first"), r'Control\.select must be "best" or "last"'),
    (lambda: Control(stop=3), r"Control\.stop must be a function stop\(z, fz, aux\)"),
    (lambda: Control(fold=lambda: 0), r"Control\.fold must be a pair \(function, init\)"),
    (lambda: solve(Control(min_iter=50)), r"Control\.min_iter must be at most the solver's"),
    (lambda: solve(Control(norm=lambda z: z)), r"Control\.norm must return one value a sample"),
    (lambda: solve(Control(stop=lambda *_: True)), r"Control\.stop must return one value a sample"),
    (lambda: solve(Control(fold=(lambda *_: 1, 0.0))), r"Control\.fold must return the dtypes of"),
    (lambda: solve(Control(scales={"a": 1.0})), r"Control\.scales must have the structure"),
    (lambda: solve(Control(scales=np.ones(2))), r"Control\.scales must broadcast"),
    (lambda: solve({"budget": 3}), r"control must be a Control\(\.\.\.\)"),
    (
        lambda: solve(Control(scales=2.0), execution=Execution(shrink_to=1)),
        r"Execution\(shrink_to=1\) goes on with some samples alone",
    ),
    (lambda: solve(Control(), has_aux=True), r"with has_aux=True f must return a pair"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


# ------------------------------------------------------------------------- aux and step numbers


@pytest.mark.slow
def test_aux_is_that_of_the_returned_state_and_has_its_gradient():
    def f(a, z, x):
        return a * jnp.tanh(z) + x, {"energy": jnp.sum(a * z**2, 1)}

    def through_aux(a):
        z, aux = deq_fixed_point(f, a, X, has_aux=True, solver=Picard(tol=1e-14))
        return jnp.sum(aux["energy"] ** 2), z

    def by_hand(a):
        z = jnp.zeros_like(X)
        for _ in range(200):
            z = a * jnp.tanh(z) + X
        return jnp.sum(jnp.sum(a * z**2, 1) ** 2)

    (value, z), got = jax.value_and_grad(through_aux, has_aux=True)(A / 2)
    np.testing.assert_allclose(value, np.sum(np.sum(A / 2 * z**2, 1) ** 2), rtol=1e-12)
    np.testing.assert_allclose(got, jax.grad(by_hand)(A / 2), rtol=1e-10)


KEY = jax.random.key(7)


def noisy(a, z, x, step):
    """Each sample and each evaluation has noise of its own, the size of which depends on a."""

    def noise(step, sample):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(KEY, step), sample), (3,))

    draws = jax.vmap(noise)(step, jnp.arange(len(z)))
    return a * jnp.tanh(z) + x + 0.1 * a * draws.astype(z.dtype)


@pytest.mark.parametrize(
    ("gradient", "select"),
    [(Unrolled(), "last"), (Unrolled(), "best"), (Implicit(Picard(tol=1e-12)), "best")],
)
@pytest.mark.slow
def test_the_derivative_of_noise_is_that_of_the_evaluations_that_were_made(gradient, select):
    options = {"solver": Picard(tol=0.0, max_iter=6), "pass_step": True, "gradient": gradient}
    solve = functools.partial(deq_fixed_point, noisy, x=X, **options)
    control = Control(select=select)

    def loss(a):
        z, stats = solve(a, control=control, return_stats=True)
        return jnp.sum(z**3), stats

    (_, stats), got = jax.value_and_grad(loss, has_aux=True)(A / 2)

    # The same noise again: evaluation after evaluation, then at the step that was returned.
    def applied(a):
        z, seen = jnp.zeros_like(X), []
        for step in range(6):
            seen.append(z)
            z = noisy(a, z, X, jnp.full(2, step))
        return jnp.stack([*seen, z])

    last = {"best": stats.step, "last": np.full(2, 6)}[select]
    assert np.array_equal(stats.step, last)

    def expected(a):
        implicit = isinstance(gradient, Implicit)
        z = applied(A / 2 if implicit else a)[np.asarray(stats.step), np.arange(2)]
        if implicit:  # the equation of that step, linearised at z
            value, push = jax.linearize(lambda z: noisy(A / 2, z, X, stats.step), z)
            change = noisy(a, z, X, stats.step) - value
            total = change
            for _ in range(200):
                total = change + push(total)
            z = z + total
        return jnp.sum(z**3)

    epsilon = 1e-6 * np.eye(3)
    finite = [(expected(A / 2 + e) - expected(A / 2 - e)) / 2e-6 for e in epsilon]
    np.testing.assert_allclose(got, finite, rtol=1e-6)


# --------------------------------------------------------------------------------- check_every


@pytest.mark.parametrize("every", [3, 8])
def test_looking_less_often_changes_no_answer(every):
    one, other = (
        solve(Control(), tol=1e-3, execution=Execution(check_every=k)) for k in (1, every)
    )
    np.testing.assert_array_equal(one.value, other.value)
    np.testing.assert_array_equal(one.stats.iterations, other.stats.iterations)
    np.testing.assert_array_equal(one.stats.trace, other.stats.trace)
    assert other.stats.evaluations == min(-(-one.stats.evaluations // every) * every, 40)


def compiled_gradient(tol, every):
    """Of a batch over four devices, forwards and backwards by the loop."""
    devices = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(np.tile(X, (4, 1)), NamedSharding(devices, P("data")))
    solver = Picard(tol=tol, max_iter=40)

    def loss(a, x):
        execution = Execution(check_every=every)
        return jnp.sum(deq_fixed_point(linear, a, x, solver=solver, execution=execution) ** 2)

    return jax.jit(jax.grad(loss)).lower(A, x).compile()


@pytest.mark.slow
def test_eight_trips_need_one_agreement_and_a_tolerance_of_zero_none():
    assert len(collectives_in_loops(compiled_gradient(1e-6, 1))) >= 2  # forwards and backwards
    compiled = compiled_gradient(1e-6, 8)
    agreements = collectives_in_loops(compiled)
    assert len(agreements) == 2
    # They stand in the loops around the loops.
    name, agreeing, around = "", set(), set()
    for line in compiled.as_text().splitlines():
        header = re.match(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        name = header[1] if header else name
        if line.strip()[:120] in agreements:
            agreeing.add(name)
        if re.search(r" while\(", line):
            around.add(name)
    assert agreeing
    if jax.__version_info__ < (0, 11):  # newer releases print the loop in a computation of its own
        assert agreeing <= around
    assert collectives_in_loops(compiled_gradient(0.0, 1)) == []


# ------------------------------------------------------------------------------------ patience


def test_damping_decays_when_the_residual_stops_falling():
    """Without damping z = -z + x goes round in circles; the rule in NumPy takes the same steps."""
    solver = Picard(tol=0.0, max_iter=8, patience=2, decay=0.5, trace=True)
    control = Control(fold=(lambda zs, z, fz, aux: jnp.roll(zs, -1, 0).at[-1].set(z[:, 0]),
                            np.zeros((8, 2))))  # fmt: skip
    x = np.array([[2.0], [4.0]])
    stats = solve_fixed_point(
        lambda a, z, x: x - a * z, np.array([1.0]), x, solver=solver, control=control
    ).stats
    z, lowest, waited, damping, seen = np.zeros((2, 1)), np.full(2, np.inf), np.zeros(2), 1.0, []
    damping = np.ones(2)
    for _ in range(8):
        seen.append(z[:, 0])
        difference = x - z - z
        size = np.abs(difference[:, 0])
        waited = np.where(size < lowest, 0, waited + 1)
        lowest = np.minimum(lowest, size)
        damping = np.where(waited >= 2, damping * 0.5, damping)
        waited = np.where(waited >= 2, 0, waited)
        z = z + damping[:, None] * difference
    np.testing.assert_allclose(stats.fold, seen, rtol=1e-14)
    assert stats.residual.max() < 1e-12
