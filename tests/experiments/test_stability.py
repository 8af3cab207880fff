"""The stability tools in the training script: phases, the loss, warnings, resuming."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from experiments.train.advice import Trouble
from experiments.train.checkpoints import Checkpoints
from experiments.train.experiment import definition_of
from experiments.train.image_experiment import prepare, to_float
from experiments.train.image_presets import parse
from experiments.train.logging import Reporter
from experiments.train.script import resume
from flax import nnx

from deq_jax import Anderson, Implicit, OneStep, Phantom, Picard, Unrolled
from deq_jax.stability import jacobian_frobenius
from experiments import image_classification as script
from experiments.data.images import load_dataset
from experiments.train import objective, training
from experiments.train.loop import Trainer
from experiments.train.runs import RunDirectory
from experiments.train.stability import Schedule, StabilityConfig
from tests.experiments.conftest import TINY
from tests.experiments.test_resume import StopAfter

SOLVER = Anderson(tol=1e-2, max_iter=12)


def schedule(gradient=Implicit(), steps=100, seed=0, **flags):  # noqa: B008  (frozen)
    return Schedule(StabilityConfig(**flags), SOLVER, gradient, steps, seed)


def test_by_default_every_step_is_alike():
    phases = {schedule().training(step) for step in range(100)}
    (phase,) = phases
    assert (phase.solver, phase.gradient, phase.sample_at) == (SOLVER, Implicit(), ())
    assert schedule().evaluation(50).solver == SOLVER


def test_pretraining_unrolls_and_then_the_solver_takes_over():
    found = schedule(pretrain_steps=10, pretrain_depth=4)
    assert found.training(9).pretraining
    assert (found.training(9).solver, found.training(9).gradient) == (
        Picard(tol=0.0, max_iter=5),
        Unrolled(),
    )
    assert found.training(10).solver == SOLVER
    # After ten steps the network is still one that was unrolled.
    assert found.evaluation(10).pretraining
    assert not found.evaluation(11).pretraining
    assert not found.evaluation(0).pretraining  # the trained network, whatever came before


def test_budgets_are_drawn_by_the_seed_and_the_step():
    one = [schedule(budget_drop=2).budget(step) for step in range(300)]
    assert set(one) == {10, 11, 12}
    assert all(one.count(budget) > 70 for budget in (10, 11, 12))
    assert one == [schedule(budget_drop=2).training(step).solver.max_iter for step in range(300)]
    assert one != [schedule(budget_drop=2, seed=1).budget(step) for step in range(300)]
    assert schedule(budget_drop=2, eval_max_iter=40).evaluation(3).solver.max_iter == 40


def test_tolerances_fall_geometrically():
    found = schedule(first_tol=0.27, tol_stages=4, steps=8)
    got = [found.training(step).solver.tol for step in range(8)]
    np.testing.assert_allclose(got, np.repeat([0.27, 0.09, 0.03, 0.01], 2))
    assert found.evaluation(0).solver.tol == 1e-2


def test_states_along_the_way_are_spaced_and_differentiated_cheaply():
    phase = schedule(correction_states=3).training(0)
    assert (phase.sample_at, phase.sample_gradient) == ((4, 8), OneStep())
    assert schedule(Phantom(), correction_states=3).training(0).sample_gradient is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--jacobian-weight=-1"], "--jacobian-weight must be at least 0 and finite, got -1.0"),
        (["--jacobian-stop=5"], "--jacobian-stop needs --jacobian-weight"),
        (
            ["--jacobian-weight=1", "--jacobian-increment=0.1"],
            "--jacobian-increment needs --jacobian-increment-every",
        ),
        (["--dropout=1"], "--dropout must be at least 0 and below 1, got 1.0"),
        (["--budget-drop=6"], "--budget-drop must be below --max-iter, got 6"),
        (["--correction-states=7"], "--correction-states must be at most --max-iter less"),
        (["--first-tol=0.01"], "--first-tol must be at least --tol, which is above 0, got 0.01"),
        (["--model=explicit", "--pretrain-steps=3"], "--pretrain-steps is for --model deq"),
        (["--pretrain-steps=3", "--shrink-to=2"], "--shrink-to does not go with --pretrain-steps"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, message, capsys):
    with pytest.raises(SystemExit):
        parse([*TINY, *flags])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in said


def parts(*flags):
    config = parse([*TINY, "--train-examples=40", *flags])
    size = config.train_examples
    return prepare(config, load_dataset("digits", train_examples=size, seed=config.seed))


def first_batch(experiment):
    batch = next(experiment.task.batches(0, 0))
    images = to_float(jnp.asarray(batch.inputs), experiment.dataset.white)
    return images, jnp.asarray(batch.targets)


def test_the_loss_is_its_parts():
    """Each term by itself from the pieces of the network, added up here."""
    flags = ("--jacobian-weight=0.5", "--start=learned", "--start-weight=0.25", "--seed=3")
    experiment = parts(*flags, "--correction-states=3", "--correction-gamma=0.5")
    images, labels = first_batch(experiment)
    model = nnx.merge(
        definition_of(experiment.model, schedule().training(0), training=True),
        experiment.state.params,
        experiment.state.rest,
        copy=True,
    )
    before = training.split_model(model)
    loss = objective.Objective(3, experiment.config.regularization(), 0.5, "learned", 0.25)
    got = loss(
        model, images, labels, step=jnp.int32(7), sample_at=(2, 4), sample_gradient=OneStep()
    )

    model = nnx.merge(*before, copy=True)
    injection = model.injection(images)
    start = model.start(injection)
    z, stats, samples = model.core(injection, start, return_stats=True, sample_at=(2, 4))
    norm_out = jax.tree.map(jnp.copy, nnx.state(model.norm_out))

    def cross_entropy(z):
        nnx.update(model.norm_out, norm_out)
        chosen = jax.nn.log_softmax(model.classify(z))[jnp.arange(len(labels)), labels]
        return -float(chosen.mean())

    np.testing.assert_allclose(got.loss, cross_entropy(z), rtol=1e-5)
    f, params, given = model.core.equation(injection)
    key = jax.random.split(jax.random.fold_in(jax.random.key(3), 7))[1]
    size = jacobian_frobenius(f, params, z, given, jax.random.split(key)[1])
    expected = 0.25 * cross_entropy(samples[0]) + 0.5 * cross_entropy(samples[1])
    expected += 0.5 * float(size.mean()) / (8 * 8 * 8)
    expected += 0.25 * float(jnp.abs(start - z).mean())
    np.testing.assert_allclose(got.extra, expected, rtol=1e-4)
    np.testing.assert_array_equal(got.stats.iterations, stats.iterations)


def test_a_learned_start_learns_from_its_distance_alone():
    """Without that term the initialiser's gradient is zero; with it all others stay the same."""
    gradients = []
    for weight in (0.0, 1.0):
        experiment = parts("--start=learned", f"--start-weight={weight}")
        images, labels = first_batch(experiment)
        definition = definition_of(experiment.model, schedule().training(0), training=True)
        state = experiment.state

        def loss_of(params, definition=definition, state=state, weight=weight):
            model = nnx.merge(definition, params, state.rest, copy=True)
            found = objective.Objective(0, None, 0.8, "learned", weight)
            outcome = found(model, images, labels, step=jnp.int32(0))
            return outcome.loss + outcome.extra

        gradients.append(jax.jit(jax.grad(loss_of))(state.params))
    without, with_term = gradients
    for leaf in jax.tree.leaves(without.pop("initializer")):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(with_term.pop("initializer")))
    for one, other in zip(jax.tree.leaves(without), jax.tree.leaves(with_term), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


ALL = (
    "--dropout=0.2",
    "--normalization=spectral",
    "--start=mixed",
    "--pretrain-steps=1",
    "--pretrain-depth=2",
    "--eval-max-iter=8",
    "--train-examples=20",
)


@pytest.fixture(scope="module")
def everything():
    with jax.numpy_dtype_promotion("standard"):
        return parts(*ALL)


def test_all_of_it_resumes_bit_for_bit(everything, tmp_path):
    """In one go, and stopped at every boundary: also that between the phases."""
    initial = jax.device_get(everything.state)

    def train(folder, questions):
        fresh = dataclasses.replace(everything, state=jax.tree.map(jnp.array, initial))
        directory = RunDirectory(folder)
        folder.mkdir(exist_ok=True)
        with Checkpoints(directory.checkpoints) as checkpoints:
            reporter = Reporter(directory)
            stop = StopAfter(questions)
            trainer = Trainer(fresh.task, checkpoints, reporter, stop, 1e9, False)
            state, progress = resume(fresh, checkpoints)
            return trainer.run(state, progress), progress

    expected, whole = train(tmp_path / "whole", 1000)
    state = None
    while state is None:
        state, progress = train(tmp_path / "stopped", 1)
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    first, second = whole.history
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in progress.history[0].items() if k != "seconds"
    }
    # Two steps an epoch, the first without a solver: its solve is not counted.
    assert 1 < first["forward_evaluations"] <= 6
    assert second["test_forward_evaluations"] > 6 or second["test_forward_converged"] == 1


def test_a_bad_start_is_told_in_words_while_it_runs(tmp_path, capsys):
    """Initial weights ten times too large: the first epoch says what is wrong and what to try."""
    flags = ("--kernel-std=0.1", "--tol=1e-3", "--jacobian-weight=1e-3", f"--run-dir={tmp_path}")
    assert script.main([*TINY, "--epochs=2", *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    extra = [record["train_extra"] for record in records]
    assert min(extra) > 0
    lines = capsys.readouterr().out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("epoch   1"))
    assert f" + {extra[0]:.4f} accuracy" in lines[first]
    told = [n for n, line in enumerate(lines) if line.startswith("warning: ")]
    assert any("Few forward solves converge" in lines[n] for n in told if n < first)
    advice = [line.strip() for line in lines[:first] if line.strip().startswith("try: ")]
    assert any("--jacobian-weight" in line for line in advice)
    # Told at length once, then in a line.
    assert len({lines[n] for n in told if n < first}) == len([n for n in told if n < first])
    assert any(n > first for n in told)
    assert not any(line.strip().startswith("try: ") for line in lines[first + 2 :])


def test_warnings_come_once_an_epoch(tmp_path, capsys):
    reporter = Reporter(RunDirectory(tmp_path))
    trouble = Trouble("Something", "0.1 of it", ("more", "less"))
    for epoch in (1, 1, 2):
        reporter.warn(epoch, [trouble])
    assert capsys.readouterr().out.splitlines() == [
        "warning: Something",
        "    0.1 of it",
        "    try: more",
        "    try: less",
        "warning: Something: 0.1 of it",
    ]


def test_a_pretraining_epoch_reports_no_solves(tmp_path, capsys):
    flags = ("--pretrain-steps=20", "--pretrain-depth=2", "--epochs=2", f"--run-dir={tmp_path}")
    assert script.main([*TINY, *flags]) == 0
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "forward_evaluations" not in records[0]
    assert "test_forward_evaluations" not in records[0]
    assert records[0]["test_loss"] > 0
    assert records[1]["forward_evaluations"] > 1
    assert records[1]["test_forward_evaluations"] > 1
    assert not any("warning" in line for line in capsys.readouterr().out.splitlines())
