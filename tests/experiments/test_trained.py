"""Reading runs of each script, and what is said about folders that cannot be read."""

import json
import shutil

import jax
import numpy as np
import pytest
from experiments.train.checkpoints import Checkpoints

from experiments.report import trained
from experiments.report.trained import read_config, read_run
from experiments.train.errors import RunMismatchError, UsageError
from experiments.train.runs import RunDirectory
from tests.experiments.conftest import TINY
from tests.experiments.runs import untrained

COPY = ["--delay=3", "--shown=2", "--symbols=3", "--train-examples=40", "--test-examples=7"]
COPY += ["--features=8", "--hidden-features=8", "--batch-size=8"]


def files(folder):
    """Every file below a folder, with its content and when it was written."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def document(folder, **changes):
    """Changes config.json; a setting is changed if the document has no such key."""
    file = folder / "config.json"
    found = json.loads(file.read_text())
    for name, value in changes.items():
        (found if name in found else found["config"])[name] = value
    file.write_text(json.dumps(found))


def arrays(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def test_a_language_run(language_run):
    before = files(language_run)
    run = read_run(language_run)
    assert files(language_run) == before
    assert (run.path, run.script) == (language_run, "language_model")
    assert run.progress.epoch == 1
    assert run.progress.history[-1]["validation_loss"] > 0
    with Checkpoints(language_run / "checkpoints") as checkpoints:
        state, _ = checkpoints.restore(run.experiment.state)
    initial = run.experiment.model
    assert not np.array_equal(state.params["embedding"], initial.embedding[...])
    for one, other in zip(arrays(run.experiment.state.params), arrays(state.params), strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(run.model().embedding[...], state.params["embedding"])


def test_runs_of_the_other_scripts(tmp_path):
    saved = untrained(tmp_path / "copy", "copy_memory", *COPY)
    run = read_run(tmp_path / "copy")
    assert run.script == "copy_memory"
    for one, other in zip(arrays(run.experiment.state), arrays(saved.state), strict=True):
        np.testing.assert_array_equal(one, other)
    # A run from before scripts were recorded is one of images; more devices are not needed here.
    untrained(tmp_path / "images", "image_classification", *TINY)
    file = tmp_path / "images" / "config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("script") == "image_classification"
    file.write_text(json.dumps(settings))
    document(tmp_path / "images", devices=2, shrink_to=4)
    script, config = read_config(tmp_path / "images")
    assert (script, config.devices, config.shrink_to) == ("image_classification", 1, None)
    assert read_run(tmp_path / "images").experiment.config.preset == "digits"


def complaint(folder, **options):
    with pytest.raises(UsageError) as caught:
        read_run(folder, **options)
    message = str(caught.value)
    assert message.startswith("--run: ")
    assert str(folder) in message
    return message


def test_runs_that_cannot_be_read(language_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(language_run, run)
    assert complaint(run, unfit=lambda script, config: f"{script} {config.length}").endswith(
        "holds language_model 8"
    )
    document(run, script="alchemy")
    assert "a script that is not known here, alchemy; known are image_" in complaint(run)
    document(run, script="copy_memory")
    assert "not that of a run of experiments.copy_memory, or of another version" in complaint(run)
    document(run, script="language_model", tied=False)
    assert "does not fit the settings in config.json" in complaint(run)
    document(run, tied=True)
    (run / "vocabulary.json").unlink()
    assert "has lost its vocabulary.json" in complaint(run)
    assert not (run / "vocabulary.json").exists()


def test_the_vocabulary_is_that_of_the_run(language_run, tmp_path):
    """Another order of the symbols is another network's; it is read and not put right."""
    run = tmp_path / "run"
    shutil.copytree(language_run, run)
    file = run / "vocabulary.json"
    vocabulary = json.loads(file.read_text())
    vocabulary["symbols"].reverse()
    file.write_text(json.dumps(vocabulary))
    with pytest.raises(RunMismatchError, match="was trained on other data"):
        read_run(run)
    assert json.loads(file.read_text()) == vocabulary


def test_a_folder_is_of_one_script(language_run, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    shutil.copytree(language_run, directory.path)
    config = json.loads(directory.config.read_text())["config"]
    directory.open(config, script="language_model")
    directory.open(config)
    with pytest.raises(RunMismatchError, match=r"run of experiments.language_model, not of exp"):
        directory.open(config, script="copy_memory")
    # Nobody knows what a run of old is of, but its settings.
    directory.config.write_text(json.dumps({"config": config}))
    directory.open(config, script="copy_memory")


@pytest.mark.parametrize("name", trained.SCRIPTS)
def test_scripts_have_what_is_needed(name):
    module = trained.SCRIPTS[name]
    assert module.__name__ == f"experiments.{name}"
    assert {"preset"} < set(module.Config.__dataclass_fields__)
    assert callable(module.load)
