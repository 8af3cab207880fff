import os
from pathlib import Path

import pytest

TINY = [
    "--train-examples=200",
    "--batch-size=10",
    "--epochs=2",
    "--channels=8",
    "--inner-channels=8",
    "--groups=4",
    "--tol=0.1",
    "--max-iter=6",
    "--no-progress",
]
"""A network and a training so small that it is the machinery that is tested."""


@pytest.fixture(scope="session")
def shared_tfds() -> Path:
    """Folder with a prepared CIFAR-10, which lies beside the checkout."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "tfds"
    if not (folder / "cifar10").is_dir():
        message = f"there is no prepared CIFAR-10 in {folder}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return folder


@pytest.fixture(autouse=True)
def _as_the_scripts_run(standard_promotion):
    """Optax's Adam raises a Python float to an integer array, which strict promotion forbids."""


@pytest.fixture(scope="session")
def language_run(tmp_path_factory) -> Path:
    """A finished run of experiments.language_model, on a text whose characters HTML would eat."""
    import jax

    from experiments import language_model

    folder = tmp_path_factory.mktemp("language")
    text = folder / "text.txt"
    text.write_text("".join(f"<b>{n % 7} & {n * n % 11}</b> is {n % 5};\n" for n in range(40)))
    flags = ["--features=16", "--hidden-features=16", "--heads=2", "--length=8", "--batch-size=4"]
    flags += ["--epochs=1", "--steps-per-epoch=3", "--warmup-steps=1", "--no-progress"]
    # With this seed all solves converge.
    flags += ["--tol=1e-4", "--max-iter=30", "--evaluation-fraction=0.5", "--seed=4"]
    with jax.numpy_dtype_promotion("standard"):
        code = language_model.main([*flags, f"--text={text}", f"--run-dir={folder / 'run'}"])
    assert code == 0
    return folder / "run"
