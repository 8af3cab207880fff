"""The README's examples run as they stand, and its equations hold."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
LAYERS = (ROOT / "docs" / "layers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README + LAYERS, flags=re.DOTALL)


def example(word):
    """The names that an example of README or docs/layers.md leaves behind; it contains `word`."""
    (block,) = [block for block in BLOCKS if word in block]
    names = {}
    exec(compile(block, f"README ({word})", "exec"), names)
    return names


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_pure_function():
    names = example('params["u"]')
    z, f, params, x = (names[name] for name in ("z", "f", "params", "x"))
    np.testing.assert_allclose(f(params, z, x), z, atol=1e-4)
    assert names["stats"].converged.all()
    # Against a finite difference along a random direction.
    direction = jax.tree.map(lambda p: jnp.cos(1e3 * p), params)
    step = 1e-2
    solve = lambda sign: names["deq_fixed_point"](  # noqa: E731
        f, jax.tree.map(lambda p, d: p + sign * step * d, params, direction), x, names["z0"]
    ).sum()
    expected = (solve(1) - solve(-1)) / (2 * step)
    got = sum((names["gradient"][k] * direction[k]).sum() for k in params)
    np.testing.assert_allclose(got, expected, rtol=0.02)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_nnx_layer():
    names = example("class Classifier")
    assert names["logits"].shape == (4, 10)
    assert np.isfinite(names["logits"]).all()


@pytest.mark.usefixtures("standard_promotion")
def test_linen_layer():
    names = example("flax import linen")
    assert names["logits"].shape == (4, 10)
    assert "cell" in names["variables"]["params"]["layers_1"]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_backward_probe(capsys):
    names = example("BackwardProbe.zeros")
    assert names["report"].residual.shape == (4,)
    assert (names["report"].residual <= 1e-4).all()
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_training_learns_digits():
    names = example("train_step")
    model, x, labels = names["model"], names["images"] / 16, np.asarray(names["labels"])
    # 0.98, as the README says; always answering one digit is right in a tenth.
    assert (np.asarray(model(x)).argmax(-1) == labels).mean() > 0.96
    state = model.layers[0](x, return_stats=True)
    assert state[1].converged.mean() > 0.95


def test_every_example_is_tested():
    # Five are run; the first of the guide shows the arguments and is no program.
    assert len(BLOCKS) == 6


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_links_and_commands_exist():
    for folder, page in ((ROOT, README), (ROOT / "docs", LAYERS)):
        for target in re.findall(r"\]\(([^)#]+)\)", page):
            assert (folder / target).exists(), target
    for module in re.findall(r"python -m ([\w.]+)", README + LAYERS):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.slow
def test_the_stability_guide_runs():
    guide = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names = {}
    exec(compile(block, "docs/stability.md", "exec"), names)
    z, params, x = (np.asarray(names[name], np.float64) for name in ("z", "params", "x"))
    slopes = 1 - np.tanh(z @ params + x) ** 2
    radius = [np.abs(np.linalg.eigvals(params * slope)).max() for slope in slopes]
    np.testing.assert_allclose(names["found"].radius, radius, rtol=0.01)
    norms = [((params * slope) ** 2).sum() for slope in slopes]
    np.testing.assert_allclose(names["size"], norms, rtol=0.5)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_the_guide_to_sequences_runs():
    guide = (ROOT / "docs" / "sequences.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names = {}
    exec(compile(block, "docs/sequences.md", "exec"), names)
    assert names["stats"].converged.all()
    parts = jnp.concatenate([names["first"], names["second"]], 1)
    np.testing.assert_allclose(parts, names["logits"], atol=0.05)
    whole = jnp.concatenate([names["tokens"], names["made"].tokens], 1)
    logits = names["model"](whole)[:, 23:-1]
    np.testing.assert_allclose(names["made"].logits, logits, atol=0.05)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_the_guide_to_loops_runs():
    guide = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
    depth, noise, hand = re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL)
    names = {}
    exec(compile(depth, "docs/loops.md", "exec"), names)
    z, after = jnp.zeros((4, 8)), {}
    for n in range(1, 65):
        z = names["cell"](names["w"], z, names["x"])
        after[n] = (z**2).mean()
    np.testing.assert_allclose(names["shallow"], after[16], rtol=1e-5)
    np.testing.assert_allclose(names["deep"], after[64], rtol=1e-5)
    assert np.abs(names["gradient"]).max() > 0
    exec(compile(noise, "docs/loops.md", "exec"), names)
    stats = names["stats"]
    assert stats.converged.all()
    assert stats.fold == stats.evaluations
    z, logits = names["noisy_cell"](names["jnp"].eye(8) / 2, names["z"],
                                    jnp.arange(32.0).reshape(4, 8) / 32, stats.step)  # fmt: skip
    np.testing.assert_allclose(names["logits"], logits, rtol=1e-5)
    exec(compile(hand, "docs/loops.md", "exec"), names)
    assert names["stats"].converged.all()
    assert names["state"].done


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
@pytest.mark.parametrize("page", ["families", "guarantees"])
def test_the_guides_to_families_run(page, capsys):
    guide = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python.*?\n(.*?)```", guide, flags=re.DOTALL):
        exec(compile(block, f"docs/{page}.md", "exec"), {})
    shape = {"families": "(2, 10)", "guarantees": "(3, 8)"}[page]
    assert shape in capsys.readouterr().out


PAGES_ON_DEVICES = ("scaling", "partitioning", "scaling_layers")


@pytest.mark.parametrize("page", PAGES_ON_DEVICES)
@pytest.mark.slow
def test_the_guides_to_several_devices_run(page):
    """In a process of their own, with four devices: one of them sets a mesh for good."""
    guide = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    program = "\n".join(block for block in blocks if "import" in block or page == "scaling_layers")
    assert "jax" in program
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUMPY_DTYPE_PROMOTION": "standard"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
