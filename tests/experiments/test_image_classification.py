import dataclasses
import functools
import json
import sys

import jax
import numpy as np
import pytest
from experiments.data.XX import Images
from experiments.report.traces import residual_traces
from experiments.train.checkpoints import Checkpoints
from experiments.train.image_experiment import counted_batches, prepare, to_float
from experiments.train.image_presets import parse
from flax import nnx

from deq_jax import BackwardProbe
from experiments import image_classification as script
from experiments.data.images import load_dataset
from experiments.train import training
from tests.experiments.conftest import TINY

PNG = b"\x89PNG"

TINY_CONFIG = parse(TINY)


def run(capsys, *flags):
    """Runs the script; returns its exit code, lines of output and lines of complaints."""
    code = script.main([*TINY, *flags])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def experiment(**changes):
    config = dataclasses.replace(TINY_CONFIG, **changes)
    dataset = load_dataset(config.preset, train_examples=config.train_examples, seed=config.seed)
    return prepare(config, dataset)


def test_learns_digits(tmp_path, capsys):
    code = script.main(
        [
            "--validation-fraction=0.2",
            "--epochs=3",
            "--channels=16",
            "--inner-channels=16",
            "--tol=0.1",
            "--max-iter=12",
            "--no-progress",
            f"--run-dir={tmp_path}",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["step"] for record in records] == [35, 70, 105]
    # Chance is 0.1.
    assert records[-1]["validation_accuracy"] > 0.9
    assert lines[-1] == f"validation accuracy {records[-1]['validation_accuracy']:.3f}"
    losses = [record["train_loss"] for record in records]
    assert losses == sorted(losses, reverse=True)
    assert records[0]["learning_rate"] > records[-1]["learning_rate"] > 1e-6
    for solve in ("forward", "backward"):
        for record in records:
            assert 1 < record[f"{solve}_iterations"] <= record[f"{solve}_evaluations"] <= 12
            assert 0 < record[f"{solve}_residual_mean"] <= record[f"{solve}_residual_worst"]
            assert 0 < record[f"{solve}_converged"] <= 1
            assert record[f"{solve}_diverged"] == 0
    # The backward solve is harder at so loose an equilibrium: no such bound holds for it.
    assert min(record["forward_converged"] for record in records) > 0.9
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert (config["epochs"], config["channels"], config["pool"]) == (3, 16, 2)
    for name in ("curves.png", "residuals.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_finished_run_prints_its_result_and_exits(tmp_path, capsys, monkeypatch):
    code, lines, _ = run(capsys, "--epochs=1", f"--run-dir={tmp_path}")
    assert code == 0
    assert lines[1].startswith("model: deq, ")
    assert lines[1].endswith(" parameters")
    assert lines[-1].startswith("test accuracy 0.")
    monkeypatch.setattr(script, "load_dataset", None)
    again = run(capsys, "--epochs=1", f"--run-dir={tmp_path}", "--checkpoint-every-seconds=5")
    assert (again[0], again[1][-1]) == (0, lines[-1])

    code, _, complaint = run(capsys, "--epochs=3", "--tol=0.2", f"--run-dir={tmp_path}")
    assert code == 2
    assert "--epochs was 1, is now 3; --tol was 0.1, is now 0.2" in complaint
    assert "--fresh" in complaint
    assert "--run-dir" in complaint

    monkeypatch.undo()
    (tmp_path / "notes.txt").write_text("mine")
    code, _, _ = run(capsys, "--epochs=1", "--seed=1", "--fresh", f"--run-dir={tmp_path}")
    assert code == 0
    assert json.loads((tmp_path / "config.json").read_text())["config"]["seed"] == 1
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("model", ["weight_tied", "explicit"])
def test_controls_report_no_solver(model, tmp_path, capsys):
    flags = (f"--model={model}", "--depth=2", "--epochs=1", f"--run-dir={tmp_path}")
    code, lines, _ = run(capsys, *flags)
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert code == 0
    assert lines[-1] == f"test accuracy {record['test_accuracy']:.3f}"
    assert not [name for name in record if "forward" in name or "backward" in name]
    assert not (tmp_path / "residuals.png").exists()
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_evaluation_is_done_when_due(tmp_path, capsys):
    code, _, _ = run(capsys, "--epochs=3", "--eval-every=2", f"--run-dir={tmp_path}")
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert code == 0
    assert ["test_accuracy" in record for record in records] == [False, True, True]


def test_evaluation_counts_each_example_once():
    parts = experiment(train_examples=50)
    # 23 examples in batches of 10: the last batch holds 3, of which each is repeated.
    examples = parts.dataset.evaluation.take(np.arange(23))
    prepare_images = functools.partial(to_float, white=16)
    evaluator = training.Evaluator(parts.evaluation_definition, prepare=prepare_images, solves=True)
    # Statistics that differ from those of any batch, so that using the batch's would show.
    rest = jax.tree.map(lambda leaf: leaf + 0.3, parts.state.rest)
    state = parts.state._replace(rest=rest)
    totals = evaluator(state, counted_batches(examples, 10))

    model = nnx.merge(parts.evaluation_definition, state.params, rest, copy=True)
    loss, correct, evaluations = 0.0, 0, []
    for start in (0, 10, 20):
        chosen = slice(start, start + 10)
        images = np.float32(examples.images[chosen]) / np.float32(16)
        logits, stats = model(jax.numpy.asarray(images), return_stats=True)
        evaluations.append(int(stats.evaluations))
        for row, label in zip(np.float64(logits), examples.labels[chosen], strict=True):
            loss += np.log(np.exp(row).sum()) - row[label]
            correct += int(row.argmax() == label)
    assert (int(totals.batches), int(totals.examples)) == (3, 23)
    assert int(totals.correct) == correct
    np.testing.assert_allclose(totals.loss, loss, rtol=1e-5)
    record = totals.record("test") | totals.solver_record("test_")
    np.testing.assert_allclose(record["test_loss"], loss / 23, rtol=1e-5)
    assert record["test_forward_evaluations"] == pytest.approx(np.mean(evaluations))
    assert int(totals.forward.converged) <= 23
    assert int(totals.forward.iterations) <= 23 * max(evaluations)


def test_evaluation_stops_when_asked():
    parts = experiment(train_examples=50)
    prepare_images = functools.partial(to_float, white=16)
    evaluator = training.Evaluator(parts.evaluation_definition, prepare=prepare_images, solves=True)
    empty = Images(np.zeros((10, 8, 8, 1), np.uint8), np.zeros(10, np.int32))
    assert evaluator(parts.state, counted_batches(empty, 10), lambda: True) is None


def test_training_updates_parameters_and_batch_statistics():
    parts = experiment(train_examples=50)
    before = jax.device_get(parts.state)
    batch = next(parts.task.batches(0, 0))
    assert batch.inputs.shape == (10, 8, 8, 1)
    state, metrics = parts.task.train_step(parts.state, batch, 0)
    assert int(state.step) == 1
    assert int(state.totals.examples) == 10
    np.testing.assert_allclose(float(state.totals.loss) / 10, float(metrics["loss"]), rtol=1e-6)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.params, state.params)
    assert all(jax.tree.leaves(changed))
    assert (before.rest["norm_in"]["mean"] != state.rest["norm_in"]["mean"]).any()


def test_totals_are_those_of_the_reports():
    parts = experiment(train_examples=50, tol=0.02, max_iter=8)
    definition, params, rest = training.split_model(parts.model)
    batch = next(parts.task.batches(0, 0))
    images = jax.numpy.asarray(np.float32(batch.inputs) / np.float32(16))

    def loss_of(probe):
        model = nnx.merge(definition, params, rest, copy=True)
        logits, stats = model(images, return_stats=True, backward_probe=probe)
        chosen = jax.nn.log_softmax(logits)[np.arange(10), batch.targets]
        return -chosen.mean(), stats

    report, stats = jax.jit(jax.grad(loss_of, has_aux=True))(BackwardProbe.zeros(10))
    state, _ = parts.task.train_step(parts.state, batch, 0)
    for solve, totals in ((stats, state.totals.forward), (report, state.totals.backward)):
        solve = jax.tree.map(np.asarray, solve)
        assert int(totals.evaluations) == solve.evaluations
        assert int(totals.iterations) == solve.iterations.sum()
        assert int(totals.converged) == (solve.status == 0).sum()
        assert int(totals.diverged) == (solve.status == 2).sum()
        assert int(totals.finite) == 10
        np.testing.assert_allclose(totals.residual, solve.residual.sum(), rtol=1e-3)
        np.testing.assert_allclose(totals.worst_residual, solve.residual.max(), rtol=1e-3)


def test_batches_go_on_at_any_position():
    parts = experiment(train_examples=50)
    whole = list(parts.task.batches(1, 0))
    rest = list(parts.task.batches(1, 2))
    assert len(whole) == 5
    assert len(rest) == 3
    for one, other in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
    labels = np.concatenate([batch.targets for batch in whole])
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(parts.dataset.train.labels))


def test_non_finite_loss_ends_the_run_and_is_not_saved(tmp_path, capsys):
    flags = ("--learning-rate=1e30", "--checkpoint-every-seconds=0", f"--run-dir={tmp_path}")
    code, _, complaint = run(capsys, *flags)
    assert code == 1
    assert "became NaN or infinite in epoch 1, step " in complaint
    parts = experiment(learning_rate=1e30)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(parts.state)
    if restored is not None:
        assert int(restored[0].totals.failed_step) == -1


def test_data_that_changed_are_noticed(tmp_path, capsys, monkeypatch):
    assert run(capsys, "--epochs=1", f"--run-dir={tmp_path}")[0] == 0
    (tmp_path / "result.json").unlink()
    dataset = load_dataset("digits", train_examples=200)
    dataset.train.images[0, 0, 0, 0] ^= 1
    monkeypatch.setattr(script, "load_dataset", lambda *_, **__: dataset)
    code, _, complaint = run(capsys, "--epochs=1", f"--run-dir={tmp_path}")
    assert code == 2
    assert "other data" in complaint


def test_tensorboard(tmp_path, capsys, monkeypatch):
    assert run(capsys, "--epochs=1", "--tensorboard", f"--run-dir={tmp_path / 'one'}")[0] == 0
    (events,) = (tmp_path / "one" / "tensorboard").iterdir()
    assert b"backward_evaluations" in events.read_bytes()
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, complaint = run(capsys, "--tensorboard", f"--run-dir={tmp_path / 'two'}")
    assert code == 2
    assert "pip install -e '.[tensorboard]'" in complaint


@pytest.mark.parametrize("reports", [True, False])
def test_gradients_with_and_without_a_backward_report(reports, tmp_path, capsys):
    gradient = ("--solver=broyden", "--gradient=shine") if reports else ("--gradient=phantom",)
    code, output, _ = run(capsys, *gradient, "--epochs=1", f"--run-dir={tmp_path}")
    assert code == 0
    record = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(record["train_loss"])
    in_output = any("| backward" in line for line in output)
    assert ("backward_evaluations" in record) == in_output == reports
    assert (tmp_path / "residuals.png").is_file()


@pytest.mark.parametrize("changes", [{}, {"start": "learned", "normalization": "spectral"}])
def test_residual_traces_are_those_of_the_solves(changes):
    if changes:  # far from their bound, so that normalised kernels are others
        changes |= {"normalization_bound": 0.05, "kernel_std": 0.1}
    parts = experiment(train_examples=50, **changes)
    model = nnx.merge(parts.evaluation_definition, parts.state.params, parts.state.rest, copy=True)
    examples = parts.dataset.evaluation.take(np.arange(5))
    images = to_float(jax.numpy.asarray(examples.images), 16)
    _, stats = model(images, return_stats=True)
    traces, tolerances = residual_traces(model, images, jax.numpy.asarray(examples.labels))
    assert list(traces) == ["forward", "backward"]
    assert tolerances == {"forward": 0.1, "backward": 0.1}
    for trace in traces.values():
        assert trace.shape == (6, 5)
    np.testing.assert_array_equal(np.isfinite(traces["forward"]).sum(0), stats.iterations)
    np.testing.assert_allclose(np.nanmin(traces["forward"], 0), stats.residual, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=201"], "--batch-size must be at most the 200 training examples, got 201"),
        (["--train-examples=2000"], "--train-examples must be at most 1438"),
        (["--pool=3"], "--pool must be a divisor of the sides of digits's 8x8 images, got 3"),
        (["--preset=mnist", "--data-dir=absent"], "prepare_data mnist --data-dir absent"),
    ],
)
def test_flags_that_do_not_fit_the_data(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, complaint = run(capsys, "--run-dir=here", *flags)
    assert code == 2
    assert message in complaint
    assert "Traceback" not in complaint


def test_corrected_flag_does_not_meet_the_refused_one(tmp_path, capsys):
    flags = ("--epochs=1", f"--run-dir={tmp_path}")
    assert run(capsys, "--batch-size=201", *flags)[0] == 2
    assert run(capsys, *flags)[0] == 0
