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
