"""Image classification with networks of other families: made, trained, projected and diagnosed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from experiments import diagnose
from experiments import image_classification as script
from experiments.report.trained import read_run
from experiments.train.config import Optim
from tests.experiments.training import run

SHAPES = dict.fromkeys(script.FAMILIES, (32, 32, 3)) | dict.fromkeys(
    ("mondeq_dense", "pcdeq1_dense", "pcdeq2_dense"), (28, 28, 1)
)
TINY = ["--data.train=200", "--data.eval=100", "--batch-size=20", "--epochs=1", "--run.no-progress"]


@pytest.mark.parametrize("name", script.FAMILIES)
def test_networks_have_what_the_commands_use(name):
    def build():
        rngs = nnx.Rngs(0, dropout=1)
        return script.FAMILIES[name](image_shape=SHAPES[name], num_classes=7, rngs=rngs)

    model = nnx.eval_shape(build)
    definition, state = nnx.split(model)

    def parts(state, images):
        model = nnx.merge(definition, state, copy=True)
        injection = model.injection(images)
        _, _, c = model.core.equation(injection)
        return model.zeros(injection), model.classify(model.zeros(injection)), c

    images = jax.ShapeDtypeStruct((2, *SHAPES[name]), jnp.float32)
    zeros, logits, _ = jax.eval_shape(parts, state, images)
    assert all(leaf.shape[0] == 2 for leaf in jax.tree.leaves(zeros))
    assert logits.shape == (2, 7)
    assert model.core.solver.max_iter > 0


@pytest.mark.slow
def test_weights_stay_in_their_set(tmp_path, without_figures):
    """At a rate that would carry them out of it in the first step."""
    flags = ["--model=pcdeq1_dense", "solver:picard", "--optim.lr=0.01", *TINY]
    ended = run(script, *flags, f"--run.dir={tmp_path}")
    assert ended.code == 0, ended.errors
    core = read_run(tmp_path).model.core
    (gains,) = jax.tree.leaves(nnx.state(core.scale))
    kernel = core.cell.weight.kernel[...]
    assert min(kernel.min(), gains.min()) == 0
    assert kernel.max() > 0.01


@pytest.mark.slow
def test_a_run_and_its_report(tmp_path, monkeypatch):
    flags = ["--model=mondeq_dense", "solver:picard", "--solver.max-iter=60", *TINY]
    ended = run(script, *flags, f"--run.dir={tmp_path / 'run'}")
    assert ended.code == 0, ended.errors
    assert "model: mondeq_dense, " in ended.output
    # The step size is tuned in the middle of the epoch, by halves.
    alpha = float(read_run(tmp_path / "run").model.core.alpha[...])
    assert alpha in (0.5, 0.25, 0.125)
    monkeypatch.setattr("experiments.report.measure.BUDGETS", (5,))
    report = run(diagnose, f"--run={tmp_path / 'run'}", "--examples=40")
    assert report.code == 0, report.errors
    assert (tmp_path / "run" / "diagnosis" / "index.html").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=mdeq", "--network.channels=24"], "--network.* has no effect on --model mdeq"),
        (
            ["--model=mdeq", "stability:on", "stability.normalization:weight"],
            "--model mdeq has its own normalization and start",
        ),
        (["--model=mondeq_conv_large"], "conv-large was published for other images than those of"),
        (
            ["--model=mondeq"],
            "--model must be one of deq, weight_tied, explicit, mdeq, mdeq_large,",
        ),
        (["--optim.drops=1.5"], "--optim.drops must be at least 0 and below 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_flags(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(script, *TINY, "--run.dir=here", *flags)
    assert ended.code == 2
    assert message in ended.complaint


def test_help_names_every_model():
    text = " ".join(script.Config.__doc__.split())
    assert f": {', '.join(script.FAMILIES)}." in text.replace(" or pcdeq2_dense", ", pcdeq2_dense")


def test_the_learning_rate_falls_in_steps():
    schedule = Optim(lr=0.1, drops=(0.25, 0.5), warmup=3).schedule(40)
    rates = [float(schedule(step)) for step in range(40)]
    rise = [0.1 * (step + 1) / 4 for step in range(3)]
    expected = rise + [0.1] * 7 + [0.01] * 10 + [0.001] * 20
    np.testing.assert_allclose(rates, expected, rtol=1e-5)
    plain = Optim(lr=0.1, drops=(0.5,)).schedule(4)
    np.testing.assert_allclose([float(plain(step)) for step in range(4)], [0.1, 0.1, 0.01, 0.01])
