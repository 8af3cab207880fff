"""Reading runs of each command, and what is said about folders that cannot be read."""

import json
import shutil

import jax
import pytest
from flax import nnx

from experiments import image_classification
from experiments.report import trained
from experiments.report.trained import read_config, read_run
from experiments.train.errors import RunMismatchError, UsageError
from experiments.train.runs import RunFolder, flat_settings
from experiments.train.step import split_model
from tests.experiments.conftest import TINY
from tests.experiments.runs import untrained
from tests.experiments.training import Parts, command_line, leaves

COPY = ["--data.delay=3", "--data.shown=2", "--data.symbols=3", "--data.train=40", "--data.test=7"]
COPY += ["--network.features=8", "--network.hidden-features=8", "--batch-size=8"]


def files(folder):
    """Every file below a folder, with its content and when it was written."""
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in found}


def document(folder, **changes):
    """Changes config.json, at its top."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def arguments(folder, *flags):
    """Adds to the command line in config.json, and to the settings that it leads to."""
    found = json.loads((folder / "config.json").read_text())
    words = command_line(*found["arguments"], *flags)
    config = trained.SCRIPTS[found["script"]].parse_arguments(words)
    document(folder, arguments=words, config=flat_settings(config))


def test_an_image_run_comes_back(image_run):
    """Its settings, its network with the trained values, its data and its history."""
    before = files(image_run.folder)
    run = read_run(image_run.folder)
    assert files(image_run.folder) == before
    assert (run.path, run.script) == (image_run.folder, "image_classification")
    words = json.loads((image_run.folder / "config.json").read_text())["arguments"]
    assert run.config == image_classification.parse_arguments(words)
    expected = image_classification.parse_arguments(TINY)
    assert {**flat_settings(run.config), "run.dir": None} == {
        **flat_settings(expected),
        "run.tensorboard": True,
    }
    parts = Parts(image_classification, *TINY)
    state, progress = parts.restored(image_run.folder)
    assert run.progress == progress
    assert progress.history[-1]["test_loss"] > 0
    definition, params, rest = split_model(run.model)
    assert leaves(params) == leaves(state.params) != leaves(parts.state.params)
    assert leaves(rest) == leaves(state.rest)
    assert definition == parts.definition(training=False)
    assert run.dataset.checksum() == parts.dataset.checksum()


def test_a_language_run(language_run):
    before = files(language_run)
    run = read_run(language_run)
    assert files(language_run) == before
    assert (run.path, run.script) == (language_run, "language_model")
    assert run.progress.epoch == 1
    assert run.progress.history[-1]["validation_loss"] > 0
    assert run.model.embedding[...].shape == (18, 16)


def test_runs_of_other_settings(tmp_path):
    saved = untrained(tmp_path / "copy", "copy_memory", *COPY, "cell:trellis")
    run = read_run(tmp_path / "copy")
    assert (run.script, run.config) == ("copy_memory", saved.config)
    assert leaves(split_model(run.model)[1]) == leaves(saved.state.params)
    # More devices are not needed here, and no sample need leave a solve early.
    flags = ["--devices=2", "--shrink-to=4", "--run.no-progress"]
    words = command_line(*TINY, *flags)
    settings = flat_settings(image_classification.parse_arguments(words))
    (tmp_path / "images").mkdir()
    found = {"script": "image_classification", "arguments": words, "config": settings}
    (tmp_path / "images" / "config.json").write_text(json.dumps(found))
    script, config = read_config(tmp_path / "images")
    assert (script, config.devices, config.shrink_to) == ("image_classification", 1, None)
    assert config.solver == image_classification.parse_arguments(words).solver


def complaint(folder, **options):
    with pytest.raises(UsageError) as caught:
        read_run(folder, **options)
    message = str(caught.value)
    assert message.startswith("--run: ")
    assert str(folder) in message
    return message


def test_runs_that_cannot_be_read(language_run, tmp_path):
    assert "there is no folder" in complaint(tmp_path / "absent")
    assert "holds no run, there is no config.json in it" in complaint(tmp_path)
    run = tmp_path / "run"
    shutil.copytree(language_run, run)
    unfit = complaint(run, unfit=lambda script, config: f"{script} {config.data.length}")
    assert unfit.endswith("holds language_model 8")
    settings = json.loads((run / "config.json").read_text())["config"]
    for changes in ({"script": "alchemy"}, {"script": "copy_memory"}, {"arguments": ["--what=1"]}):
        (run / "config.json").unlink()
        shutil.copy(language_run / "config.json", run)
        document(run, **changes)
        known = " or ".join(trained.SCRIPTS)
        assert f"is not that of a run of experiments.{known}, or of another version" in complaint(
            run
        )
    shutil.copy(language_run / "config.json", run)
    document(run, config=settings | {"optim.lr": 0.5})
    assert "other defaults: optim.lr was 0.5, is now 0.002" in complaint(run)
    shutil.copy(language_run / "config.json", run)
    arguments(run, "--network.no-tied")
    assert "can be read with these settings; the newest, checkpoint 0, failed" in complaint(run)
    shutil.copy(language_run / "config.json", run)
    (run / "vocabulary.json").unlink()
    assert "has lost its vocabulary.json" in complaint(run)
    assert not (run / "vocabulary.json").exists()
    shutil.rmtree(run / "checkpoints")
    assert "has no checkpoint yet; train it first" in complaint(run)


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


@pytest.mark.parametrize("name", ["image_classification", "language_model", "copy_memory"])
def test_commands_have_what_is_needed(name, language_run, tmp_path):
    """Each reads its presets, and loads data that the loop can use and a network."""
    module = trained.SCRIPTS[name]
    assert module.__name__ == f"experiments.{name}"
    flags = {
        "image_classification": TINY,
        "copy_memory": COPY,
        "language_model": json.loads((language_run / "config.json").read_text())["arguments"],
    }
    config = module.parse_arguments(command_line(*flags[name]))
    dataset, model = module.load(config, RunFolder(tmp_path))
    size = config.batch_size
    first = next(dataset.train_batches(size, seed=0, epoch=0))
    assert len(first.inputs) == size
    assert first.counts.shape == first.targets.shape
    assert dataset.steps_per_epoch(size) == len(list(dataset.train_batches(size, seed=0, epoch=0)))
    assert jax.tree.leaves(nnx.state(model, nnx.Param))
    assert dataset.checksum() == module.load(config, RunFolder(tmp_path))[0].checksum()
