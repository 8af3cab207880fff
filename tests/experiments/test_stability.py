"""The stability tools in training: phases, the loss, findings, resuming."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Implicit, OneStep, Phantom, Picard, Unrolled
from deq_jax.stability import jacobian_frobenius
from experiments import image_classification as script
from experiments.train import loop, metrics
from experiments.train.config import Stability
from experiments.train.reporter import Reporter
from experiments.train.runs import RunFolder
from experiments.train.stability import evaluation_phase, forward, training_phase
from experiments.train.step import network_inputs, split_model
from tests.experiments.conftest import TINY
from tests.experiments.training import Parts, StopAfter, command_line, leaves, records, run

pytestmark = pytest.mark.usefixtures("without_figures")

SOLVER = Anderson(tol=1e-2, max_iter=12)


def settings(*flags):
    on = ["stability:on"] if any("stability" in flag for flag in flags) else []
    return script.parse_arguments(command_line(*on, "--solver.max-iter=12", *flags))


def phases(steps, *flags):
    config = settings(*flags)
    return [training_phase(config, step, steps) for step in range(steps)]


def test_by_default_every_step_is_alike():
    assert set(phases(100)) == {None}  # without `stability:on` there are no phases
    assert evaluation_phase(settings(), 50) is None
    on = dataclasses.replace(settings(), stability=Stability())
    (phase,) = {training_phase(on, step, 100) for step in range(100)}
    assert (phase.solver, phase.gradient, phase.sample_at) == (SOLVER, Implicit(), ())
    assert evaluation_phase(on, 50).solver == SOLVER
    control = dataclasses.replace(on, model="explicit")
    assert training_phase(control, 0, 100) is evaluation_phase(control, 0) is None


def test_pretraining_unrolls_and_then_the_solver_takes_over():
    flags = ("--stability.pretrain-steps=10", "--stability.pretrain-depth=4")
    found, config = phases(11, *flags), settings(*flags)
    assert found[9].pretraining
    assert (found[9].solver, found[9].gradient) == (Picard(tol=0.0, max_iter=5), Unrolled())
    assert found[10].solver == SOLVER
    # After ten steps the network is still one that was unrolled.
    assert evaluation_phase(config, 10).pretraining
    assert not evaluation_phase(config, 11).pretraining
    assert not evaluation_phase(config, 0).pretraining  # the trained network, whatever came before


def test_budgets_are_drawn_by_the_seed_and_the_step():
    drop = "--stability.budget-drop=2"
    one, again, other = (
        [int(phase.limits.budget) for phase in phases(300, drop, f"--seed={seed}")]
        for seed in (0, 0, 1)
    )
    assert set(one) == {10, 11, 12}
    assert all(one.count(budget) > 70 for budget in (10, 11, 12))
    assert one == again != other
    assert len(set(phases(300, drop, "--stability.first-tol=0.27"))) == 1  # one compiled step
    config = settings(drop, "--stability.eval-max-iter=40")
    assert evaluation_phase(config, 3).solver.max_iter == 40


def test_tolerances_fall_geometrically():
    flags = ("--stability.first-tol=0.27", "--stability.tol-stages=4")
    got = [phase.limits.tol for phase in phases(8, *flags)]
    np.testing.assert_allclose(got, np.repeat([0.27, 0.09, 0.03, 0.01], 2), rtol=1e-6)
    assert evaluation_phase(settings(*flags), 0).solver.tol == 1e-2


def test_states_along_the_way_are_spaced_and_differentiated_cheaply():
    states = "--stability.correction-states=3"
    (phase,) = phases(1, states)
    assert (phase.sample_at, phase.sample_gradient) == ((4, 8), OneStep())
    (phase,) = phases(1, states, "gradient:phantom")
    assert (phase.gradient, phase.sample_gradient) == (Phantom(), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["jacobian.weight=-1"], "JacobianRegularization.weight must be"),
        (["jacobian.increment=0.1"], "JacobianRegularization.increment"),
        (["correction-states=0"], "--stability.correction-states must be at least 1, got 0"),
        (["correction-gamma=2"], "--stability.correction-gamma must be from 0 to 1, got 2.0"),
        (["start-weight=-1"], "--stability.start-weight must be at least 0, got -1.0"),
        (["budget-drop=12"], "at most --solver.max-iter less --stability.budget-drop, 0, got 1"),
        (["correction-states=13"], "--stability.correction-states must be at most"),
        (["first-tol=0.001"], "--stability.first-tol must be at least --solver.tol, which is"),
        (["pretrain-steps=-1"], "--stability.pretrain-steps must be at least 0, got -1"),
        (
            ["pretrain-steps=3", "shrink"],
            "--shrink-to must be left out where a loop is differentiated",
        ),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_are_named(flags, message):
    words = [f"--stability.{flag}" if "=" in flag else "--shrink-to=2" for flag in flags]
    ended = run(script, "stability:on", "--solver.max-iter=12", *words)
    assert ended.code == 2
    assert message in ended.complaint


ALL_TERMS = ["--stability.jacobian.weight=0.5", "--stability.start=learned"]
ALL_TERMS += ["--stability.start-weight=0.25", "--stability.correction-states=3"]
ALL_TERMS += ["--stability.correction-gamma=0.5", "--seed=3"]


@pytest.mark.slow
def test_the_loss_is_its_parts():
    """Each term by itself from the pieces of the network, added up here, and one whole step."""
    parts = Parts(script, *TINY, "stability:on", *ALL_TERMS)
    batch = next(parts.batches())
    images, labels = network_inputs(batch, None, 16), jnp.asarray(batch.targets)
    np.testing.assert_allclose(images, np.float64(batch.inputs) / 16, rtol=1e-6)
    before = parts.definition(training=True), parts.state.params, parts.state.rest
    # The second step, whose random numbers are not those of the first.
    state, _ = parts.step(parts.state._replace(step=jnp.int32(7)), batch, 7)
    loss, extra = (float(state.totals[name]) / 10 for name in ("loss", "extra"))

    model = nnx.merge(*before, copy=True)
    injection = model.injection(images)
    start = model.start(injection)
    z, stats, samples = model.core(injection, start, return_stats=True, sample_at=(2, 4))
    norm_out = jax.tree.map(jnp.copy, nnx.state(model.norm_out))

    def cross_entropy(z):
        nnx.update(model.norm_out, norm_out)
        logits = np.float64(model.classify(z))
        chosen = logits[np.arange(len(labels)), labels]
        return (np.log(np.exp(logits).sum(-1)) - chosen).mean()

    np.testing.assert_allclose(loss, cross_entropy(z), rtol=1e-5)
    f, params, given = model.core.equation(injection)
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), 7))[1]
    size = jacobian_frobenius(f, params, z, given, jax.random.split(key)[1])
    expected = 0.25 * cross_entropy(samples[0]) + 0.5 * cross_entropy(samples[1])
    expected += 0.5 * float(size.mean()) / (8 * 8 * 8)
    expected += 0.25 * float(jnp.abs(start - z).mean())
    np.testing.assert_allclose(extra, expected, rtol=1e-4)
    assert state.totals["forward.iterations"] == stats.iterations.sum()


@pytest.mark.slow
def test_the_jacobian_penalty_is_an_estimate_of_the_dense_one():
    """Its mean over many steps, against the Jacobian written out, of a cell of few unknowns."""
    flags = ["stability:on", "--stability.jacobian.weight=1", "--network.channels=2"]
    flags += ["--network.inner-channels=2", "--network.groups=1", "--network.kernel-std=0.3"]
    parts = Parts(script, *TINY, *flags, "--solver.max-iter=20", "--solver.tol=1e-3")
    batch = next(parts.batches())
    inputs = network_inputs(batch, None, 16)[:2]
    labels = jnp.asarray(batch.targets)[:2]
    phase = training_phase(parts.config, 0, 1)
    definition = parts.definition(training=True)

    @jax.jit
    @jax.vmap
    def penalty(step):
        model = nnx.merge(definition, parts.state.params, parts.state.rest, copy=True)
        return forward(parts.config, phase, model, inputs, labels, None, step).extra

    draws = np.asarray(penalty(jnp.arange(300)))
    model = nnx.merge(definition, parts.state.params, parts.state.rest, copy=True)
    injection = model.injection(inputs)
    f, params, given = model.core.equation(injection)
    z = model.core(injection)
    jacobian = jax.jit(jax.jacobian(lambda z: f(params, z, given)))(z)
    unknowns = z[0].size
    dense = np.float64(jacobian).reshape(2, unknowns, 2, unknowns)
    norms = [(dense[n, :, n] ** 2).sum() / unknowns for n in range(2)]
    # The mean of 300 draws, whose deviation is known.
    error = draws.std() / np.sqrt(len(draws))
    assert error < 0.05 * np.mean(norms)
    assert abs(draws.mean() - np.mean(norms)) < 4 * error


@pytest.mark.slow
def test_a_learned_start_learns_from_its_distance_alone():
    """Without that term the initialiser's gradient is zero; with it all others stay the same."""
    parts = Parts(script, *TINY, "stability:on", "--stability.start=learned")
    batch, state = next(parts.batches()), parts.state
    images, labels = network_inputs(batch, None, 16), jnp.asarray(batch.targets)
    definition, phase = parts.definition(training=True), training_phase(parts.config, 0, 1)

    def terms(params):
        model = nnx.merge(definition, params, state.rest, copy=True)
        config = parts.config
        found = forward(config, phase, model, images, labels, None, jnp.int32(0))
        return jnp.stack([found.loss, found.loss + found.extra])

    without, with_term = (
        jax.tree.map(lambda leaf, row=row: leaf[row], gradients)
        for gradients in [jax.jit(jax.jacrev(terms))(state.params)]
        for row in (0, 1)
    )
    for leaf in jax.tree.leaves(without.pop("initializer")):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(with_term.pop("initializer")))
    for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(with_term), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


ALL = ["stability:on", "stability.normalization:spectral", "--network.dropout=0.2"]
ALL += ["--stability.start=mixed", "--stability.pretrain-steps=1", "--stability.pretrain-depth=2"]
ALL += ["--stability.eval-max-iter=8", "--data.train=20", "--data.eval=20"]


@pytest.mark.slow
def test_all_of_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    """In one go, and stopped at every boundary: also that between the phases."""
    flags = [*TINY, *ALL]
    assert run(script, *flags, f"--run.dir={tmp_path / 'whole'}").code == 0
    monkeypatch.setattr(loop, "graceful_stop", lambda: StopAfter(1))
    sessions, code = 0, 130
    while code == 130:
        code = run(script, *flags, f"--run.dir={tmp_path / 'stopped'}").code
        sessions += 1
        assert sessions < 10
    assert (code, sessions) == (0, 6)
    parts = Parts(script, *flags)
    (one, _), (other, _) = (parts.restored(tmp_path / name) for name in ("whole", "stopped"))
    assert leaves(one) == leaves(other)
    # Dropout has drawn its masks.
    _, _, initial = split_model(parts.model)
    assert leaves(one.rest) != leaves(initial)
    first, second = records(tmp_path / "whole")
    assert records(tmp_path / "stopped") == [first, second]
    # Two steps an epoch, the first without a solver: its solve is not counted.
    assert 1 < first["forward_evaluations"] <= 6
    assert second["test_forward_evaluations"] > 6 or second["test_forward_converged"] == 1


@pytest.mark.slow
def test_a_bad_start_is_told_in_words_while_it_runs(tmp_path):
    """Initial weights ten times too large: the first epoch says what is wrong and what to try."""
    flags = ["stability:on", "--stability.jacobian.weight=1e-3", "--network.kernel-std=0.1"]
    ended = run(script, *TINY, *flags, "--solver.tol=1e-3", f"--run.dir={tmp_path}")
    assert ended.code == 0
    extra = [record["train_extra"] for record in records(tmp_path)]
    assert min(extra) > 0
    lines = ended.lines
    first = next(n for n, line in enumerate(lines) if line.startswith("epoch   1"))
    assert f" + {extra[0]:.4f} accuracy" in lines[first]
    told = [n for n, line in enumerate(lines) if line.startswith(("warning: ", "error: "))]
    assert any("forward solves" in lines[n] for n in told if n < first)
    advice = [line.strip() for line in lines[:first] if line.strip().startswith("try: ")]
    assert advice
    # Told at length once, then in a line.
    assert len({lines[n] for n in told if n < first}) == len([n for n in told if n < first])
    assert any(n > first for n in told)
    assert not any(line.strip().startswith("try: ") for line in lines[first + 2 :])


def test_findings_come_once_an_epoch(tmp_path, capsys):
    """Nine of ten solves do not converge: at length, not again, and in a line an epoch later."""
    config = script.parse_arguments(command_line(*TINY, "--solver.tol=0.01"))
    reporter = Reporter(config, RunFolder(tmp_path), [])
    totals = metrics.zeros(forward=True, backward=True) | {
        "forward.solves": 1,
        "forward.samples": 10,
        "forward.finite": 10,
        "forward.converged": 1,
        "forward.residual": 3.0,
        "forward.worst": 0.5,
        "forward.evaluations": 6,
        "forward.iterations": 60,
    }
    for epoch in (1, 1, 2):
        reporter.advise(epoch, totals)
    title, *long, short = capsys.readouterr().out.splitlines()
    assert title.startswith("warning: ")
    assert any("10.0%" in line for line in long)
    assert any(line.strip().startswith("try: ") for line in long)
    assert short.startswith(f"{title}: ")
    assert "10.0%" in short
    assert "try: " not in short
    assert title not in long
    # At the share that is asked for there is nothing to say.
    reporter.advise(3, totals | {"forward.converged": 5})
    assert capsys.readouterr().out == ""
    reporter.advise(3, metrics.zeros(forward=True))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_a_pretraining_epoch_reports_no_solves(tmp_path):
    flags = ["stability:on", "--stability.pretrain-steps=2", "--stability.pretrain-depth=2"]
    flags += ["--data.train=20", f"--run.dir={tmp_path}"]
    ended = run(script, *TINY, *flags)
    assert ended.code == 0
    first, second = records(tmp_path)
    assert "forward_evaluations" not in first
    assert "test_forward_evaluations" not in first
    assert first["test_loss"] > 0
    assert second["forward_evaluations"] > 1
    assert second["test_forward_evaluations"] > 1
    assert "stability: pretrain_steps 2, pretrain_depth 2" in ended.lines
    assert "warning" not in ended.output
