"""The report on a run: its numbers against independent ones, its page, its complaints."""

import base64
import dataclasses
import html.parser
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Status
from experiments import diagnose as script
from experiments import image_classification
from experiments.common.advice import Trouble
from experiments.common.data import load_dataset
from experiments.diagnosis import confidence, figures, measure
from experiments.diagnosis import run as source
from experiments.diagnosis.page import render
from experiments.image_experiment import build_model
from experiments.image_presets import parse
from tests.experiments.conftest import TINY

PNG = b"\x89PNG"

SECTIONS = ["warnings", "residuals", "evaluations", "spectrum", "budget", "confidence", "epochs"]


class Page(html.parser.HTMLParser):
    """The tags, ids, images, links and text of a page; it fails on tags that do not match."""

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.links, self.text = [], [], [], [], ""
        self.tags = set()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "img":
            self.sources.append(attributes["src"])
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, in a folder whose name has to be escaped."""
    folder = tmp_path_factory.mktemp("runs") / "a<b>&'c\""
    with jax.numpy_dtype_promotion("standard"):
        flags = [*TINY, "--validation-fraction=0.2", f"--run-dir={folder}"]
        assert image_classification.main(flags) == 0
    return folder


def network(count, scale=1.0, **changes):
    """A network at its initialisation with the cell's kernels scaled, and `count` images."""
    config = dataclasses.replace(parse(TINY), **changes)
    dataset = load_dataset("digits", train_examples=200)
    model = build_model(config, dataset)
    model.eval()
    for convolution in (model.core.cell.conv1, model.core.cell.conv2):
        convolution.kernel[...] = scale * convolution.kernel[...]
    examples = dataset.evaluation.take(np.arange(count))
    return model, examples, jnp.asarray(np.float32(examples.images) / np.float32(16))


@pytest.mark.parametrize("seed", range(5))
def test_auroc_is_the_share_of_pairs_in_order(seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 6, 30).astype(float)
    scores[:3] = -np.inf, np.inf, np.nan
    positive = rng.random(30) < 0.6
    compared = np.where(np.isnan(scores), -np.inf, scores)
    above = compared[positive][:, None]
    below = compared[~positive][None, :]
    expected = ((above > below) + 0.5 * (above == below)).mean()
    assert confidence.auroc(scores, positive) == pytest.approx(expected, abs=1e-12)


def solves_of(correct, residual=None):
    count = len(correct)
    residual = np.linspace(0.001, 0.1, count) if residual is None else np.asarray(residual)
    return measure.Solves(
        labels=np.ones(count, int),
        predicted=np.asarray(correct, int),
        softmax=np.linspace(1.0, 0.5, count),
        residual=residual,
        iterations=np.arange(1, count + 1),
        status=np.where(np.isfinite(residual), Status.CONVERGED, Status.DIVERGED),
    )


def test_confidence_needs_enough_of_both_kinds():
    # The residuals ascend, so that all right answers have a lower one than all wrong ones.
    found = confidence.confidence(solves_of([True] * 30 + [False] * 10))
    assert (found.correct, found.wrong) == (30, 10)
    assert found.auroc == {"softmax maximum": 1.0, "-residual": 1.0, "-evaluations": 1.0}
    assert confidence.confidence(solves_of([False] * 10 + [True] * 30)).auroc["-residual"] == 0.0
    assert confidence.confidence(solves_of([True] * 30 + [False] * 9)).auroc == {}
    assert confidence.confidence(solves_of([False] * 30 + [True] * 9)).auroc == {}


def test_order_of_the_images():
    solves = measure.Solves(
        labels=np.zeros(5, int),
        predicted=np.zeros(5, int),
        softmax=np.ones(5),
        residual=np.array([0.01, np.inf, 0.5, 0.02, 0.4]),
        iterations=np.array([4, 2, 9, 4, 9]),
        status=np.array([0, 2, 1, 0, 1]),
    )
    np.testing.assert_array_equal(solves.hardest_first(), [1, 2, 4, 3, 0])
    assert solves.record() == {
        "forward_iterations": pytest.approx(5.6),
        "forward_residual_mean": pytest.approx(0.93 / 4),
        "forward_residual_worst": np.inf,
        "forward_converged": pytest.approx(0.4),
        "forward_diverged": 1,
    }


def test_backward_record():
    nan = np.nan
    trace = np.array([[1.0, 0.5, np.inf, nan], [0.1, 0.9, nan, nan], [nan, 0.3, nan, nan]])
    record = measure.backward_record(trace, 0.1)
    assert record == {
        "backward_residual_mean": pytest.approx(0.2),
        "backward_residual_worst": np.inf,
        "backward_converged": pytest.approx(1 / 4),
    }
    assert measure.backward_record(np.full((3, 2), nan), 0.1) == {}


@pytest.mark.parametrize("tools", [{}, {"normalization": "weight", "start": "learned"}])
def test_solves_and_budgets_are_those_of_direct_solves(tools):
    # 40 images are a full batch and one that has to be filled up.
    model, examples, images = network(40, scale=2.0, tol=0.01, max_iter=9, **tools)
    looked_at = measure.Network(model, examples, 16)
    logits, stats = model(images, return_stats=True)
    solves = looked_at.solves()
    assert 0 < solves.converged.sum() < 40 or tools
    assert len(set(solves.iterations)) > 1
    np.testing.assert_array_equal(solves.labels, examples.labels)
    np.testing.assert_array_equal(solves.iterations, stats.iterations)
    np.testing.assert_array_equal(solves.status, stats.status)
    np.testing.assert_allclose(solves.residual, stats.residual, rtol=1e-3)
    exponentials = np.exp(np.float64(logits))
    shares = exponentials / exponentials.sum(1, keepdims=True)
    np.testing.assert_array_equal(solves.predicted, shares.argmax(1))
    np.testing.assert_allclose(solves.softmax, shares.max(1), rtol=1e-4)

    budgets = looked_at.budgets((2, 12))
    np.testing.assert_array_equal(budgets.budgets, [2, 9, 12])
    assert budgets.trained == 9
    for row, budget in enumerate(budgets.budgets):
        model.core.solver = Anderson(tol=0.0, max_iter=int(budget))
        logits, stats = model(images, return_stats=True)
        assert int(stats.evaluations) == budget
        residual = np.float64(stats.residual)
        right = np.asarray(logits).argmax(1) == examples.labels
        assert budgets.accuracy[row] == right.mean()
        assert budgets.converged[row] == (residual <= 0.01).mean()
        np.testing.assert_allclose(budgets.residual[row], residual.mean(), rtol=1e-3)


def test_newton_is_not_tried_with_budgets_that_take_forever():
    model, examples, _ = network(3, solver="newton_krylov")
    looked_at = measure.Network(model, examples, 16)
    looked_at._all = lambda answer: solves_of([True, False, True])
    np.testing.assert_array_equal(looked_at.budgets((2, 25, 50)).budgets, [2, 6, 25])


def test_spectra_are_those_of_the_dense_jacobian():
    sizes = {"channels": 4, "inner_channels": 4}
    model, examples, images = network(5, scale=60.0, tol=1e-3, max_iter=100, **sizes)
    looked_at = measure.Network(model, examples, 16)
    order = np.array([3, 1, 4, 0, 2])
    spectra = looked_at.spectra(order, count=3)
    assert spectra.looked_at == {"slowest": 3, "median": 4, "fastest": 2}
    assert spectra.converged.all()
    injection = model.injection(images)
    z = model.core(injection)
    flat = z[0].size

    @jax.jit
    @jax.jacfwd
    def jacobian(v, x):
        return model.core.cell(v.reshape(1, *z.shape[1:]), x[None]).ravel()

    for row, (name, index) in enumerate(spectra.looked_at.items()):
        dense = np.float64(jacobian(z[index].ravel(), injection[index]))
        assert dense.shape == (flat, flat)
        eigenvalues = np.linalg.eigvals(dense)
        expected = np.abs(eigenvalues).max()
        assert expected > 0.2
        assert spectra.radius[row] == pytest.approx(expected, rel=0.02)
        assert abs(spectra.radius[row] - expected) <= 2 * spectra.error[row] + 1e-3
        # What is said to be sharp is an eigenvalue.
        values, errors = spectra.values[name], spectra.errors[name]
        sharp = errors < 1e-3 * expected
        assert sharp.any()
        distance = np.abs(values[sharp][:, None] - eigenvalues[None]).min(1)
        assert distance.max() < 0.02 * expected


def test_a_network_that_is_not_finite():
    model, examples, _ = network(3, scale=np.nan)
    looked_at = measure.Network(model, examples, 16)
    solves = looked_at.solves()
    # The first evaluation is at zero, whose residual needs the kernels, too.
    assert (solves.status == Status.DIVERGED).all()
    spectra = looked_at.spectra(solves.hardest_first())
    budgets = looked_at.budgets((2,))
    assert np.isnan(spectra.radius).all()
    assert np.isnan(budgets.residual).all()
    traces = {"forward": np.full((6, 3), np.nan)}
    judged = confidence.confidence(solves)
    drawn = {
        **figures.residuals(traces, {"forward": 0.1}),
        **figures.evaluations(solves, 6),
        **figures.spectra(spectra),
        **figures.budgets(budgets, 0.1),
        **figures.confidence(solves, judged),
    }
    assert all(png.startswith(PNG) for png in drawn.values())


def test_figures_with_gaps():
    history = [
        {"epoch": 1, "forward_converged": 0.5, "forward_residual_mean": None},
        {"epoch": 2, "forward_converged": np.nan, "forward_residual_mean": 0.0},
    ]
    assert figures.epochs([]) == {}
    assert figures.epochs([{"epoch": 1, "forward_converged": np.nan}]) == {}
    assert list(figures.epochs(history)) == ["epochs_converged", "epochs_residual"]
    residual = np.append(np.linspace(0, 0.1, 29), np.inf)
    solves = solves_of([True] * 15 + [False] * 15, residual)
    drawn = figures.confidence(solves, confidence.confidence(solves))
    assert list(drawn) == ["confidence_residual", "confidence_roc"]


def test_report_of_a_run(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / trained.name
    shutil.copytree(trained, run)
    (run / "result.json").unlink()  # as if it were not finished
    # What a training that goes on is writing at this moment.
    half_written = run / "checkpoints" / "9.orbax-checkpoint-tmp"
    half_written.mkdir()
    monkeypatch.setattr(measure, "BUDGETS", (2, 12))
    reports = []
    monkeypatch.setattr(script, "render", lambda report: reports.append(report) or render(report))
    assert script.main([f"--run={run}", "--images=40"]) == 0
    output = capsys.readouterr().out.splitlines()
    folder = run / "diagnosis"
    assert output[-1] == f"wrote {folder / 'index.html'}"
    for done in ("solved 40 images", "traced residuals", "found spectra", "tried other budgets"):
        assert any(line.startswith(done) for line in output)
    assert half_written.is_dir()

    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.ids == SECTIONS
    assert page.links == [f"#{name}" for name in SECTIONS]
    assert f"Diagnosis of {run}" in page.text
    assert "40 of the 200 validation images, a stratified subset" in page.text
    assert "2 of 2" in page.text
    assert "Anderson(history=5" in page.text
    assert not page.tags & {"b", "script", "link", "iframe"}
    embedded = [base64.b64decode(source.split("base64,")[1]) for source in page.sources]
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert all(png.startswith(PNG) for png in embedded)
    beside = {file.name: file.read_bytes() for file in folder.glob("*.png")}
    assert set(beside.values()) <= set(embedded)
    names = {"residuals_forward", "residuals_backward", "evaluations", "radius", "radius_errors"}
    names |= {f"spectrum_{which}" for which in ("slowest", "median", "fastest")}
    names |= {"budget_accuracy", "budget_residual", "confidence_residual", "epochs_residual"}
    names |= {"epochs_converged", "epochs_evaluations"}
    assert {f"{name}.png" for name in names} <= beside.keys()
    assert len(embedded) == len(beside) + 24  # twelve images each

    (report,) = reports
    restored = source.read_run(run)
    labels = restored.experiment.dataset.evaluation.labels
    np.testing.assert_array_equal(labels[report.numbers], report.examples.labels)
    np.testing.assert_array_equal(np.bincount(report.examples.labels), [4] * 10)
    # The weights are those that the training evaluated at its end.
    experiment = restored.experiment
    weights = (experiment.state.params, experiment.state.rest)
    model = nnx.merge(experiment.evaluation_definition, *weights, copy=True)
    solves = measure.Network(model, experiment.dataset.evaluation, 16).solves()
    result = json.loads((trained / "result.json").read_text())
    assert solves.correct.mean() == pytest.approx(result["validation_accuracy"])
    for name, value in solves.record().items():
        assert value == pytest.approx(result[f"validation_{name}"], rel=1e-3)
    assert list(report.budgets.budgets) == [2, 6, 12]

    troubles = [Trouble("<script>", "1 < 2 & 3", ("raise --max-iter <n>",))]
    page = Page(render(dataclasses.replace(report, troubles=troubles, classes=["<i>"] * 10)))
    for text in ("<script>", "1 < 2 & 3", "--max-iter <n>", "true <i>"):
        assert text in page.text.replace("\n", "")
    assert not page.tags & {"script", "i"}
    page = Page(render(dataclasses.replace(report, troubles=[])))
    assert "Nothing to worry about." in page.text
    judged = confidence.Confidence(31, 9, {}, {})
    page = Page(render(dataclasses.replace(report, confidence=judged)))
    assert "31 of 40 answers are right, 9 wrong. That is not enough mistakes" in page.text


def settings(folder, **changes):
    """A folder with the settings of a run, and with a checkpoint that nobody can read."""
    (folder / "checkpoints" / "0").mkdir(parents=True)
    config = dataclasses.asdict(parse(TINY)) | changes
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return folder


def complaint(capsys, *flags):
    assert script.main(flags) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert "Traceback" not in captured
    return captured


def test_folders_that_hold_no_run(tmp_path, capsys):
    absent = tmp_path / "absent"
    assert f"there is no folder {absent}" in complaint(capsys, f"--run={absent}")
    assert not absent.exists()
    assert "there is no config.json in it" in complaint(capsys, f"--run={tmp_path}")
    flag = f"--run={tmp_path}"
    for text in ("{", "[]", '{"size": 3}', '{"config": {}}', '{"config": [1]}'):
        (tmp_path / "config.json").write_text(text)
        assert "not that of a run of experiments.image_classification" in complaint(capsys, flag)


def test_runs_that_cannot_be_diagnosed(tmp_path, capsys):
    control = settings(tmp_path / "control", model="explicit")
    assert "holds a control, --model explicit" in complaint(capsys, f"--run={control}")
    newer = settings(tmp_path / "newer", gravity=9.81)
    assert "unknown settings: gravity" in complaint(capsys, f"--run={newer}")
    empty = settings(tmp_path / "empty")
    (empty / "checkpoints" / "0").rmdir()
    assert "has no checkpoint yet" in complaint(capsys, f"--run={empty}")
    mnist = settings(tmp_path / "mnist", preset="mnist", pool=7)
    message = complaint(capsys, f"--run={mnist}", "--data-dir=absent")
    assert "prepare_data mnist --data-dir absent" in message
    assert "--images must be at least 1, got 0" in complaint(capsys, "--run=any", "--images=0")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--images=3"])
    assert stopped.value.code == 2
    assert "--run" in capsys.readouterr().err


def test_runs_that_do_not_fit(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = json.loads((run / "config.json").read_text())
    config["config"]["gradient"] = "phantom"  # whose state has no report of a backward solve
    (run / "config.json").write_text(json.dumps(config))
    assert "does not fit the settings in config.json" in complaint(capsys, f"--run={run}")

    def changed(*args, **kwargs):
        dataset = load_dataset(*args, **kwargs)
        dataset.train.images[0, 0, 0, 0] ^= 1
        return dataset

    monkeypatch.setattr(source, "load_dataset", changed)
    assert "was trained on other data" in complaint(capsys, f"--run={trained}")
