"""The report on runs with sequences: what it measures, against NumPy, and its page."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Broyden
from deq_jax.cells.trellis import TrellisState
from deq_jax.models.deq_trellis import DEQTrellisNet
from experiments import copy_memory
from experiments import diagnose as script
from experiments.report import examples as chosen
from experiments.report import measure
from experiments.report.page import render
from experiments.report.trained import read_run
from experiments.train.runs import RunFolder
from tests.experiments.test_diagnose import PNG, SECTIONS, Page


def judged(logits, targets):
    """Which answers are right, and each sequence's mean loss."""
    logits = np.float64(logits)
    chosen = np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    losses = np.log(np.exp(logits).sum(-1)) - chosen
    return logits.argmax(-1) == targets, losses.mean(-1)


@pytest.mark.slow
def test_report_of_a_language_run(language_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "BUDGETS", (2,))
    reports = []
    monkeypatch.setattr(script, "render", lambda report: reports.append(report) or render(report))
    flags = [f"--run={language_run}", "--examples=24", f"--output={tmp_path}"]
    assert script.main(flags) == 0
    assert "solved 24 sequences" in capsys.readouterr().out
    (report,) = reports

    # 24 of all windows of 8 characters, evenly over the text.
    run = read_run(language_run)
    tokens, vocabulary = run.dataset.text.evaluation, run.dataset.text.vocabulary
    total = (len(tokens) - 1) // 8
    numbers = report.subject.examples.numbers
    assert total > 24
    assert numbers[0] == 0
    assert numbers[-1] == total - 1
    assert np.ptp(np.diff(numbers)) <= 1
    windows = np.stack([tokens[8 * number : 8 * number + 9] for number in numbers])
    inputs, targets = windows[:, :-1], windows[:, 1:]

    model = run.model
    logits, stats = jax.jit(lambda tokens: model(tokens, return_stats=True))(jnp.asarray(inputs))
    right, losses = judged(logits, targets)
    assert report.solves.converged.all()
    # Where the two best are close, another program may find them the other way around.
    best = np.sort(logits, -1)
    clear = best[..., -1] - best[..., -2] > 0.01
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(report.solves.correct[clear], right[clear])
    np.testing.assert_allclose(report.solves.loss, losses, rtol=1e-3)
    share = report.solves.correct.mean()
    assert share == pytest.approx(right.mean(), abs=0.02)
    np.testing.assert_allclose(report.solves.iterations, stats.iterations, atol=1)
    found = report.solves.loss
    np.testing.assert_array_equal(report.good, found <= np.sort(found)[11:13].mean())
    # The tolerance is so tight that more evaluations than it asks for change nothing.
    assert list(report.budgets.budgets) == [2, 30]
    assert report.budgets.accuracy[1] == pytest.approx(share, abs=0.02)
    assert report.budgets.loss[1] == pytest.approx(found.mean(), rel=1e-3)
    assert abs(report.budgets.loss[0] - found.mean()) > 5e-3 * found.mean()

    page = Page((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert page.ids == SECTIONS
    assert f"24 of the {total} windows of 8 characters in the validation text" in page.prose
    assert f"Right tokens {share:.1%}, loss {found.mean():.4f} nats a token." in page.prose
    assert "these are the eigenvalues of single positions" in page.prose
    script_named = "The flags of experiments.language_model have the same names" in page.prose
    assert script_named == bool(report.findings)
    assert "12 of 24 sequences have a low loss, 12 a high one." in page.prose
    for name, curve in report.curves.items():
        assert f"{name} {curve.area:.3f}" in page.prose
    assert "images" not in page.text
    # The text is there as it is: its tags are no tags of the page.
    slowest = report.solves.hardest_first()[0]
    assert vocabulary.decode(inputs[slowest]) in page.text
    score = f"right {report.solves.correct[slowest].mean():.0%}, loss {found[slowest]:.3f}"
    assert f"sequence {numbers[slowest]} {score}" in page.prose
    assert "<b>" in page.text
    assert not page.tags & {"b", "script", "link"}
    beside = {file.stem: file.read_bytes() for file in tmp_path.glob("*.png")}
    assert all(png.startswith(PNG) for png in beside.values())
    assert {"budget_loss", "budget_accuracy", "spectrum_slowest", "confidence_roc"} <= set(beside)
    assert {"residuals_forward", "residuals_backward", "epochs_residual"} <= set(beside)
    assert len(page.sources) == len(beside)


@pytest.mark.slow
def test_a_text_shorter_than_a_window(language_run):
    text = read_run(language_run).dataset.text
    tokens = text.evaluation[:6]
    examples = chosen.choose_windows(dataclasses.replace(text, evaluation=tokens), 8, 10)
    np.testing.assert_array_equal(examples.inputs, [tokens[:5]])
    np.testing.assert_array_equal(examples.targets, [tokens[1:]])


COPIES = ["--data.delay=3", "--data.shown=2", "--data.symbols=3", "--data.train=40"]
COPIES += ["--data.test=7", "--batch-size=8", "--network.features=8", "--network.hidden-features=8"]
COPIES += ["--solver.max-iter=8"]


@pytest.mark.slow
def test_copies_are_judged_by_the_symbols_asked_for():
    config = copy_memory.parse_arguments(COPIES)
    dataset, model = copy_memory.load(config, RunFolder("nowhere"))
    model.eval()
    examples = chosen.choose_copies(dataset, 2, 5)
    solves = measure.Network(model, examples).solves()
    inputs = dataset.test[:5]
    right, losses = judged(model(jnp.asarray(inputs))[:, -2:], solves.labels)
    np.testing.assert_array_equal(solves.labels, inputs[:, :2])
    np.testing.assert_array_equal(solves.correct, right)
    np.testing.assert_allclose(solves.loss, losses, rtol=1e-4)
    one, other = map(str, inputs[3, :2])
    guess = "".join(map(str, solves.predicted[3]))
    shown = f"given     {one}{other}00400\nasked for {one}{other}\nanswered  {guess}"
    assert examples.show(examples.inputs[3], solves.labels[3], solves.predicted[3]) == shown
    assert chosen.digits(np.array([3, 10])) == "3 10"


def test_low_loss_is_not_that_of_a_diverged_solve():
    fields = {"softmax": np.ones(4), "residual": np.ones(4), "iterations": np.ones(4)}
    examples = chosen.SequenceExamples(np.ones((4, 2)), np.ones((4, 2)), lambda *parts: "")
    for loss, good in (
        ([1.0, 2.0, 3.0, np.nan], [True, True, False, False]),
        ([np.nan, np.nan, 1.0, np.inf], [False, False, True, False]),
    ):
        ones = np.ones((4, 2))
        solves = measure.Solves(
            labels=ones, predicted=ones, loss=np.array(loss), status=np.ones(4), **fields
        )
        np.testing.assert_array_equal(examples.good(solves), good)


@pytest.mark.slow
def test_spectra_of_a_state_of_two_arrays():
    """A TrellisNet, whose state is the pair (h, c), against the dense Jacobian."""
    solver = Broyden(tol=1e-5, max_iter=60)
    model = DEQTrellisNet(5, 3, 3, solver=solver, kernel_std=0.1, rngs=nnx.Rngs(0))
    model.core.cell.recurrent.kernel[...] *= 20
    model.eval()
    tokens = np.random.default_rng(0).integers(0, 5, (3, 5))
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    examples = chosen.SequenceExamples(inputs, targets, lambda *parts: "")
    network = measure.Network(model, examples)
    assert network.solves().converged.all()
    spectra = network.spectra(np.array([2, 0, 1]))
    assert spectra.looked_at == {"slowest": 2, "median": 0, "fastest": 1}
    x = model.injection(jnp.asarray(inputs))
    z = model.core(x, model.zeros(x))
    assert isinstance(z, TrellisState)
    f, params, injection = model.core.equation(x)
    for row, index in enumerate(spectra.looked_at.values()):
        one, given = jax.tree.map(lambda leaf, i=index: leaf[i : i + 1], (z, injection))
        flat, unravel = jax.flatten_util.ravel_pytree(one)

        def value(v, unravel=unravel, given=given):
            return jax.flatten_util.ravel_pytree(f(params, unravel(v), given))[0]

        expected = np.abs(np.linalg.eigvals(np.float64(jax.jit(jax.jacfwd(value))(flat)))).max()
        assert expected > 0.1
        assert spectra.radius[row] == pytest.approx(expected, rel=0.05)
