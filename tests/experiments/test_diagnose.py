"""The report on a run: its page, and what it complains of."""

import base64
import dataclasses
import html.parser
import json
import shutil

import jax
import numpy as np
import pytest

from deq_jax import Finding, Status
from deq_jax.stability import Severity
from experiments import diagnose as script
from experiments import image_classification
from experiments.report import measure
from experiments.report.examples import ImageExamples
from experiments.report.page import render
from experiments.report.trained import read_run
from experiments.train.runs import flat_settings
from tests.experiments.conftest import TINY

PNG = b"\x89PNG"

SECTIONS = ["warnings", "residuals", "evaluations", "spectrum", "budget", "confidence", "epochs"]


class Page(html.parser.HTMLParser):
    """The tags, ids, images, links and text of a page; it fails on tags that do not match.

    `prose` is the text with single spaces for tags and white space, `code` what is set as code.
    """

    VOID = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.sources, self.links, self.text = [], [], [], [], ""
        self.tags, self.prose, self.code = set(), "", []
        self.feed(text)
        self.close()
        self.prose = " ".join(self.prose.split())
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
        self.prose += f" {data}"
        if self.open and self.open[-1] == "code":
            self.code.append(data)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, in a folder whose name has to be escaped."""
    folder = tmp_path_factory.mktemp("runs") / "a<b>&'c\""
    with jax.numpy_dtype_promotion("standard"):
        flags = [*TINY, "--data.validation=0.2", f"--run.dir={folder}"]
        assert image_classification.main(flags) == 0
    return folder


@pytest.mark.slow
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
    (report,) = reports
    said = [str(finding) for finding in report.findings] or ["nothing to worry about"]
    assert "\n".join(said) in "\n".join(output)

    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.ids == SECTIONS
    assert page.links == [f"#{name}" for name in SECTIONS]
    assert f"Diagnosis of {run}" in page.text
    assert "40 of the 200 validation images, a stratified subset" in page.prose
    assert "epochs trained 2 of 2" in page.prose
    assert "Anderson(history=5" in page.prose
    assert "for 40 of the images" in page.prose
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

    restored = read_run(run)
    images, labels = restored.dataset.evaluation_examples(np.arange(200))
    chosen = report.subject.examples
    np.testing.assert_array_equal(labels[chosen.numbers], chosen.targets)
    np.testing.assert_array_equal(images[chosen.numbers], chosen.inputs)
    np.testing.assert_array_equal(np.bincount(chosen.targets), [4] * 10)
    # The weights are those that the training evaluated at its end.
    solves = measure.Network(restored.model, ImageExamples(images, labels, white=16)).solves()
    result = json.loads((trained / "result.json").read_text())
    assert solves.correct.mean() == pytest.approx(result["validation_accuracy"])
    summary = dataclasses.asdict(solves.summary())
    names = ("converged", "diverged", "residual_mean", "residual_worst", "iterations")
    for name in names:
        assert summary[name] == pytest.approx(result[f"validation_forward_{name}"], rel=1e-3)
    assert list(report.budgets.budgets) == [2, 6, 12]

    advice = ("Raise `max_iter <n>`.",)
    finding = Finding("<script>", Severity.WARNING, "1 < 2 & 3", advice)
    named = dataclasses.replace(chosen, classes=["<i>"] * 10)
    subject = dataclasses.replace(report.subject, examples=named, no_backward="No `<none>`.")
    traces = {"forward": report.traces["forward"]}
    changed = {"findings": [finding], "subject": subject, "traces": traces}
    page = Page(render(dataclasses.replace(report, **changed)))
    for text in ("<script>", "1 < 2 & 3", "Raise max_iter <n> .", "true <i>", "No <none> ."):
        assert text in page.prose
    assert {"max_iter <n>", "<none>"} <= set(page.code)
    assert not page.tags & {"script", "i"}
    page = Page(render(dataclasses.replace(report, findings=[])))
    assert "Nothing to worry about." in page.prose
    for right, missing in ((31, "mistakes"), (9, "right answers")):
        few = dataclasses.replace(report, good=np.arange(40) < right, curves={})
        tally = f"{right} of 40 answers are right, {40 - right} wrong."
        assert f"{tally} That is not enough {missing} to tell" in Page(render(few)).prose
    broken = dataclasses.replace(
        report.solves,
        residual=np.full(40, np.inf),
        status=np.full(40, Status.DIVERGED),
        iterations=np.arange(40),
    )
    flat = dataclasses.replace(report.spectra, radius=np.full(32, np.nan))
    page = Page(render(dataclasses.replace(report, solves=broken, spectra=flat)))
    assert "0.0% of 40 images converge, in a mean of 19.5 evaluations" in page.prose
    assert "(median 19.5, from 0 to 39). Images that never had a finite residual: 40." in page.prose
    assert "Jacobians that are not finite: 32. Estimates that did not converge: 0." in page.prose
    assert page.prose.count("residual inf diverged") == 24


def settings(folder, *words, **changes):
    """A folder with the settings of a run, and with a checkpoint that nobody can read."""
    (folder / "checkpoints" / "0").mkdir(parents=True)
    config = flat_settings(image_classification.parse_arguments(words)) | changes
    document = {"script": "image_classification", "arguments": words, "config": config}
    (folder / "config.json").write_text(json.dumps(document))
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
    of_another = '{"script": "alchemy", "arguments": [], "config": {}}'
    for text in ("{", "[]", '{"size": 3}', '{"config": {}}', '{"config": [1]}', of_another):
        (tmp_path / "config.json").write_text(text)
        assert "not that of a run of experiments.image_classification" in complaint(capsys, flag)


def test_runs_that_cannot_be_diagnosed(tmp_path, capsys):
    control = settings(tmp_path / "control", "--model=explicit")
    message = complaint(capsys, f"--run={control}")
    assert "holds a control, --model explicit, which has no solver" in message
    newer = settings(tmp_path / "newer", gravity=9.81)
    message = complaint(capsys, f"--run={newer}")
    assert "a version with other defaults: gravity was 9.81, is now absent" in message
    empty = settings(tmp_path / "empty")
    (empty / "checkpoints" / "0").rmdir()
    assert "has no checkpoint yet" in complaint(capsys, f"--run={empty}")
    mnist = settings(tmp_path / "mnist", "mnist")
    message = complaint(capsys, f"--run={mnist}", "--data-dir=absent")
    assert "prepare_data mnist --data-dir absent" in message
    assert "--examples must be at least 1, got 0" in complaint(capsys, "--run=any", "--images=0")
    with pytest.raises(SystemExit) as stopped:
        script.main(["--images=3"])
    assert stopped.value.code == 2
    assert "--run" in capsys.readouterr().err


def test_runs_that_do_not_fit(trained, tmp_path, capsys, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    # Its state would have no report of a backward solve.
    document = json.loads((run / "config.json").read_text())
    document["arguments"].append("gradient:phantom")
    config = image_classification.parse_arguments(document["arguments"])
    (run / "config.json").write_text(json.dumps(document | {"config": flat_settings(config)}))
    assert "can be read with these settings" in complaint(capsys, f"--run={run}")

    load_images = image_classification.load_images

    def changed(*args, **kwargs):
        dataset = load_images(*args, **kwargs)
        dataset._train.images[0, 0, 0, 0] ^= 1
        return dataset

    monkeypatch.setattr(image_classification, "load_images", changed)
    assert "was trained on other data" in complaint(capsys, f"--run={trained}")
