import dataclasses
import os
from pathlib import Path

import jax
import pytest

from experiments import image_classification, language_model
from experiments.train import loop
from tests.experiments.training import Ended, compile_once, run

TINY = [
    "--data.train=200",
    "--batch-size=10",
    "--epochs=2",
    "--network.channels=8",
    "--network.inner-channels=8",
    "--network.groups=4",
    "--solver.tol=0.1",
    "--solver.max-iter=6",
    "--run.no-progress",
]
"""A network and a training so small that it is the machinery that is tested."""


def shared_data(name: str, holds: str) -> Path:
    """A folder of data beside the checkout. Without it tests are skipped, and fail in CI."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / name
    if not (folder / holds).exists():
        message = f"there is no {holds} in {folder}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(scope="session")
def shared_tfds() -> Path:
    """Folder with prepared data sets."""
    return shared_data("tfds", "cifar10")


@pytest.fixture(scope="session")
def shared_graphs() -> Path:
    """Folder with the files of graphs."""
    return shared_data("graphs", "cora.npz")


@pytest.fixture(autouse=True)
def _as_the_scripts_run(standard_promotion):
    """Optax's Adam raises a Python float to an integer array, which strict promotion forbids."""


@pytest.fixture(scope="session", autouse=True)
def _compiled_once():
    """See `compile_once`. JAX makes its four devices before a command asks for fewer."""
    jax.devices()
    with pytest.MonkeyPatch.context() as patch:
        compile_once(patch)
        yield


@pytest.fixture
def without_figures(monkeypatch):
    """Runs leave empty figures, which cost nothing."""
    monkeypatch.setattr(loop, "draw_curves", lambda history, path: path.touch())
    monkeypatch.setattr(loop, "draw_residuals", lambda traces, path, tolerances: path.touch())
    monkeypatch.setattr(loop, "residual_traces", lambda *arguments: ({}, {}))


@dataclasses.dataclass(frozen=True)
class ImageRun:
    """A finished run of experiments.image_classification, to be read and not changed."""

    folder: Path
    ended: Ended


@pytest.fixture(scope="session")
def image_run(tmp_path_factory) -> ImageRun:
    """A finished run with the flags `TINY`."""
    folder = tmp_path_factory.mktemp("images") / "run"
    with jax.numpy_dtype_promotion("standard"):
        ended = run(image_classification, *TINY, "--run.tensorboard", f"--run.dir={folder}")
    assert ended.code == 0, ended.errors
    return ImageRun(folder, ended)


@pytest.fixture(scope="session")
def language_run(tmp_path_factory) -> Path:
    """A finished run of experiments.language_model, on a text whose characters HTML would eat."""
    folder = tmp_path_factory.mktemp("language")
    text = folder / "text.txt"
    text.write_text("".join(f"<b>{n % 7} & {n * n % 11}</b> is {n % 5};\n" for n in range(40)))
    flags = ["--network.features=16", "--network.hidden-features=16", "--cell.heads=2"]
    flags += ["--data.length=8", "--data.steps-per-epoch=3", "--data.evaluation=0.5"]
    flags += ["--batch-size=4", "--epochs=1", "--optim.warmup=1", "--run.no-progress"]
    # With this seed all solves converge.
    flags += ["--solver.tol=1e-4", "--solver.max-iter=30", "--seed=4"]
    with jax.numpy_dtype_promotion("standard"):
        ended = run(language_model, *flags, f"--data.name={text}", f"--run.dir={folder / 'run'}")
    assert ended.code == 0, ended.errors
    return folder / "run"
