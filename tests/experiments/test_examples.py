"""Every file of `experiments/examples` runs, is short, and does what it says."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "experiments" / "examples"
FILES = sorted(FOLDER.glob("*.py"))


def load(name):
    """The example as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_is_short_and_stands_alone(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert not re.search(r"^\s*(from|import) experiments", text, flags=re.MULTILINE)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", ["train_digits_nnx", "train_digits_linen"])
def test_digits_are_learned(name, capsys):
    assert load(name).main(epochs=4) > 0.9
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert float(re.search(r"largest residual (\S+)", lines[-1]).group(1)) <= 1e-4


@pytest.mark.usefixtures("standard_promotion")
def test_own_images(tmp_path, capsys):
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for label in range(3):
        folder = tmp_path / f"class{label}"
        folder.mkdir()
        for number, image in enumerate(digits.images[digits.target == label][:80]):
            pixels = (image * 15).astype(np.uint8)
            Image.fromarray(pixels).resize((20, 14)).save(folder / f"{number}.png")
    accuracy = load("own_images").main(tmp_path, epochs=3)
    assert "240 images of 3 classes: class0, class1, class2" in capsys.readouterr().out
    assert accuracy > 0.85


def test_own_images_names_a_folder_without_classes(tmp_path):
    with pytest.raises(SystemExit, match="at least two folders"):
        load("own_images").read_folder(tmp_path)


@pytest.mark.usefixtures("standard_promotion")
def test_own_text(tmp_path, capsys):
    file = tmp_path / "text.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    loss = load("own_text").main(file, steps=60, batch=8, length=32, features=32, every=30)
    assert loss < 2.0  # log(28) = 3.33 nats for a guess
    assert capsys.readouterr().out.splitlines()[-1].startswith("the quick brown ")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jaxopt, where it is installed
def test_from_jaxopt(capsys):
    z, gradient, differences = load("from_jaxopt").main()
    assert np.isfinite(z).all()
    assert np.abs(gradient["w"]).max() > 0
    if differences is not None:
        assert max(differences.values()) < 1e-3
    assert "deq_jax" in capsys.readouterr().out


def test_from_torchdeq():
    losses = load("from_torchdeq").main()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("name", "pattern", "most"),
    [
        ("pure_jax", r"closed form: relative error (\S+)", 1e-9),
        ("pure_jax", r"asymmetry of the Hessian: (\S+)", 1e-9),
        ("two_devices", r"a loop each: relative difference from one device (\S+)", 1e-4),
        ("accumulate", r"step 40: mean squared error (\S+)", 0.2),
    ],
)
def test_it_agrees(name, pattern, most):
    """In a process of its own: these set JAX up in their own way."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, check=True
    )
    assert float(re.search(pattern, done.stdout).group(1)) <= most
