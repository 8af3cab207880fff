import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from deq_jax import BackwardProbe
from experiments import image_classification as script
from experiments.report.measure import residual_traces
from experiments.report.trained import read_run
from experiments.train.metrics import NEVER
from tests.experiments.conftest import TINY
from tests.experiments.training import Parts, checkpoint_numbers, records, run

PNG = b"\x89PNG"


def cross_entropies(logits, labels):
    """Of each row, by the formula and in float64."""
    logits = np.float64(logits)
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(labels)), labels]


@pytest.mark.slow
def test_learns_digits(tmp_path, without_figures):
    flags = ["--data.validation=0.2", "--epochs=3", "--network.channels=16"]
    flags += ["--network.inner-channels=16", "--solver.tol=0.1", "--solver.max-iter=12"]
    ended = run(script, *flags, "--run.no-progress", f"--run.dir={tmp_path}")
    found = records(tmp_path)
    assert ended.code == 0
    assert [record["epoch"] for record in found] == [1, 2, 3]
    assert [record["step"] for record in found] == [35, 70, 105]
    # Chance is 0.1.
    assert found[-1]["validation_accuracy"] > 0.9
    assert ended.lines[-1] == f"validation accuracy {found[-1]['validation_accuracy']:.3f}"
    losses = [record["train_loss"] for record in found]
    assert losses == sorted(losses, reverse=True)
    assert found[0]["learning_rate"] > found[-1]["learning_rate"] > 1e-6
    for solve in ("forward", "backward"):
        for record in found:
            assert 1 < record[f"{solve}_iterations"] <= record[f"{solve}_evaluations"] <= 12
            assert 0 < record[f"{solve}_residual_mean"] <= record[f"{solve}_residual_worst"]
            assert 0 < record[f"{solve}_converged"] <= 1
            assert record[f"{solve}_diverged"] == 0
    # The backward solve is harder at so loose an equilibrium: no such bound holds for it.
    assert min(record["forward_converged"] for record in found) > 0.9


@pytest.mark.slow
def test_what_a_run_leaves(image_run):
    folder, lines = image_run.folder, image_run.ended.lines
    found = records(folder)
    assert lines[0] == "data: digits, 200 training and 200 test images of 8x8x1, 10 classes"
    assert lines[1] == "model: deq, 2,602 parameters"
    assert lines[2].startswith("solver: Anderson(history=5, ")
    assert lines[3].startswith("gradient: Implicit(")
    assert lines[4:6] == ["device: cpu", f"run: {folder}"]
    for line, record in zip(lines[6:8], found, strict=True):
        assert line.startswith(f"epoch   {record['epoch']} | train loss {record['train_loss']:.4f}")
        assert f"forward {record['forward_evaluations']:.1f} evaluations, " in line
    assert lines[8:] == [f"test accuracy {found[-1]['test_accuracy']:.3f}"]
    result = json.loads((folder / "result.json").read_text())
    assert result.pop("seconds") > 0
    assert result == {"evaluation": "test", **found[-1]}
    document = json.loads((folder / "config.json").read_text())
    assert document["script"] == "image_classification"
    assert document["config"]["network.channels"] == 8
    assert document["environment"]["device"] == "cpu"
    for name in ("curves.png", "residuals.png"):
        assert (folder / name).read_bytes().startswith(PNG)
    assert checkpoint_numbers(folder) == [0, 1]
    (events,) = (folder / "tensorboard").iterdir()
    for name in (b"test_loss", b"backward_evaluations", b"learning_rate"):
        assert events.read_bytes().count(name) == 2


@pytest.mark.slow
def test_the_evaluation_counts_each_example_once(image_run):
    """Against the formula, from logits of all 200 at once; the run's batches are of 128."""
    trained = read_run(image_run.folder)
    ((images, labels, counts, _),) = trained.dataset.evaluation_batches(200)
    assert counts.all()
    images = np.float32(images) / 16

    @jax.jit
    def answers(state, images):
        return nnx.merge(definition, state, copy=True)(images, return_stats=True)

    definition, state = nnx.split(trained.model)
    logits, stats = answers(state, images)
    logits, stats = jax.device_get((logits, stats))
    record = records(image_run.folder)[-1]
    assert record["test_loss"] == pytest.approx(cross_entropies(logits, labels).mean(), rel=1e-5)
    assert record["test_accuracy"] == pytest.approx((logits.argmax(-1) == labels).mean())
    # A sample's solve does not depend on the others, a batch takes as many evaluations as its
    # slowest sample.
    of_batches = [stats.iterations[:128].max(), stats.iterations[128:].max()]
    assert record["test_forward_evaluations"] == pytest.approx(np.mean(of_batches))
    assert record["test_forward_iterations"] == pytest.approx(stats.iterations.mean())
    assert record["test_forward_residual_mean"] == pytest.approx(stats.residual.mean(), rel=1e-4)
    assert record["test_forward_converged"] == (stats.status == 0).mean()

    # And the residuals that are drawn are those of these solves.
    traces, tolerances = residual_traces(trained.model, jnp.asarray(images), jnp.asarray(labels))
    assert tolerances == {"forward": 0.1, "backward": 0.1}
    assert [trace.shape for trace in traces.values()] == [(6, 200)] * 2
    np.testing.assert_array_equal(np.isfinite(traces["forward"]).sum(0), stats.iterations)
    np.testing.assert_allclose(np.nanmin(traces["forward"], 0), stats.residual, rtol=1e-4)


@pytest.mark.slow
def test_residuals_of_a_learned_start_and_normalised_kernels():
    """Far from their bound, so that normalised kernels are others."""
    flags = ["stability:on", "--stability.start=learned", "stability.normalization:spectral"]
    flags += ["--stability.normalization.scale=0.05", "--network.kernel-std=0.1"]
    parts = Parts(script, *TINY, *flags)
    batch = next(parts.dataset.evaluation_batches(5))
    images = jnp.asarray(np.float32(batch.inputs) / 16)
    model = nnx.merge(parts.definition(training=False), parts.state.params, parts.state.rest)
    _, stats = model(images, return_stats=True)
    traces, _ = residual_traces(model, images, jnp.asarray(batch.targets))
    np.testing.assert_array_equal(np.isfinite(traces["forward"]).sum(0), stats.iterations)
    np.testing.assert_allclose(np.nanmin(traces["forward"], 0), stats.residual, rtol=1e-5)


@pytest.mark.slow
def test_a_step_by_its_parts():
    """Its loss, gradient, reports and update, from the network alone."""
    parts = Parts(script, *TINY)
    batch = next(parts.batches())
    assert batch.inputs.shape == (10, 8, 8, 1)
    images = jnp.asarray(np.float32(batch.inputs) / 16)
    definition, params, rest = parts.definition(training=True), *parts.state[:2]

    def loss_of(params, probe):
        model = nnx.merge(definition, params, rest, copy=True)
        logits, stats = model(images, return_stats=True, backward_probe=probe)
        chosen = jax.nn.log_softmax(logits)[np.arange(10), batch.targets]
        return -chosen.mean(), (logits, stats)

    compiled = jax.jit(jax.value_and_grad(loss_of, (0, 1), has_aux=True))
    found = jax.device_get(compiled(params, BackwardProbe.zeros(10)))
    (loss, (logits, stats)), (gradient, report) = found
    state, got = parts.step(parts.state, batch)
    totals = jax.device_get(state.totals)
    assert got == pytest.approx(float(loss), rel=1e-5)
    assert got == pytest.approx(cross_entropies(logits, batch.targets).mean(), rel=1e-5)
    assert totals["loss"] == pytest.approx(10 * got)
    assert (int(state.step), totals["predictions"], totals["extra"]) == (1, 10, 0)
    assert totals["correct"] == (logits.argmax(-1) == batch.targets).sum()
    assert totals["failed"] == NEVER
    for name, solve in (("forward", stats), ("backward", report)):
        assert totals[f"{name}.evaluations"] == solve.evaluations
        assert totals[f"{name}.iterations"] == solve.iterations.sum()
        assert totals[f"{name}.converged"] == (solve.status == 0).sum()
        assert totals[f"{name}.diverged"] == (solve.status == 2).sum()
        assert totals[f"{name}.finite"] == 10
        np.testing.assert_allclose(totals[f"{name}.residual"], solve.residual.sum(), rtol=1e-3)
        np.testing.assert_allclose(totals[f"{name}.worst"], solve.residual.max(), rtol=1e-3)

    # Adam's state is the gradient, times 1 - b1; its first step is of the learning rate.
    momentum = optax.tree.get(state.optimizer_state, "mu")
    scale = float(optax.tree.norm(gradient))
    for one, other in zip(jax.tree.leaves(momentum), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(10 * one, other, rtol=1e-3, atol=1e-5 * scale)
    for name in ("head", "stem"):
        old, new, slope = (tree[name]["kernel"] for tree in (params, state.params, gradient))
        sizable = np.abs(slope) > 1e-3 * np.abs(slope).max()
        moved = (new - old)[sizable]
        np.testing.assert_allclose(moved, -1e-3 * np.sign(slope[sizable]), rtol=1e-2)
    assert (rest["norm_in"]["mean"] != state.rest["norm_in"]["mean"]).any()


@pytest.mark.parametrize("model", ["weight_tied", "explicit"])
@pytest.mark.slow
def test_controls_report_no_solver(model, tmp_path, without_figures):
    """Here with an evaluation every other epoch, and after the last."""
    flags = [f"--model={model}", "--depth=2", "--epochs=3", "--eval-every=2", "--data.train=50"]
    ended = run(script, *TINY, *flags, f"--run.dir={tmp_path}")
    found = records(tmp_path)
    assert ended.code == 0
    assert "a control has no solver" in ended.output
    assert ended.lines[-1] == f"test accuracy {found[-1]['test_accuracy']:.3f}"
    assert ["test_accuracy" in record for record in found] == [False, True, True]
    for record in found:
        assert not [name for name in record if "forward" in name or "backward" in name]
    assert (tmp_path / "curves.png").is_file()
    assert not (tmp_path / "residuals.png").exists()


@pytest.mark.parametrize("flags", [["solver:broyden", "--gradient.reuse"], ["gradient:phantom"]])
@pytest.mark.slow
def test_gradients_with_and_without_a_backward_report(flags, tmp_path, without_figures):
    flags = [*flags, "--epochs=1", "--data.train=20", f"--run.dir={tmp_path}"]
    ended = run(script, *TINY, *flags)
    assert ended.code == 0
    (record,) = records(tmp_path)
    assert np.isfinite(record["train_loss"])
    in_output = "| backward" in ended.output
    assert ("backward_evaluations" in record) == in_output == ("--gradient.reuse" in flags)


def test_batches_go_on_at_any_position():
    parts = Parts(script, *TINY, "--data.train=50")
    whole, rest = (list(parts.batches(1, start)) for start in (0, 2))
    assert (len(whole), len(rest)) == (5, 3)
    for one, other in zip(whole[2:], rest, strict=True):
        np.testing.assert_array_equal(one.inputs, other.inputs)
        np.testing.assert_array_equal(one.targets, other.targets)
    # Each of the 50 once.
    assert len({image.tobytes() for batch in whole for image in batch.inputs}) == 50


@pytest.mark.slow
def test_a_non_finite_loss_ends_the_run_and_is_not_saved(tmp_path, without_figures):
    flags = [*TINY, "--model=explicit", "--depth=1", "--optim.lr=1e30", "--run.save-every=1"]
    ended = run(script, *flags, f"--run.dir={tmp_path}")
    assert ended.code == 1
    assert "became NaN or infinite in epoch 1, step " in ended.complaint
    assert "--optim.lr" in ended.complaint
    assert not (tmp_path / "result.json").exists()
    assert checkpoint_numbers(tmp_path)  # a rate that large does no harm before it is used
    state, progress = Parts(script, *flags).restored(tmp_path)
    assert (int(state.totals["failed"]), progress.epoch) == (NEVER, 0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    ended = run(script, *TINY, "--run.tensorboard", f"--run.dir={tmp_path}")
    assert ended.code == 2
    assert "--run.tensorboard needs tensorboardX" in ended.complaint
    assert "pip install -e '.[tensorboard]'" in ended.complaint


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size=201"], "--batch-size must be at most the 200 training examples, got 201"),
        (["--data.train=2000"], "--data.train must be at most 1438"),
        (["--network.pool=3"], "--network does not fit digits: "),
        (["mnist", "--data.dir=absent"], "prepare_data mnist --data-dir absent"),
    ],
    ids=str,
)
def test_flags_that_do_not_fit_the_data(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(script, *TINY, "--run.dir=here", *flags)
    assert ended.code == 2
    assert message in ended.complaint
    assert "Traceback" not in ended.errors
