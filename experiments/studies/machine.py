"""The machine and the versions, without importing what is measured."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable

PACKAGES = ("jax", "jaxlib", "torch", "torchdeq", "jaxopt", "optimistix", "lineax")


def processor() -> str:
    """Cores and model, in one line."""
    try:
        with open("/proc/cpuinfo") as lines:
            models = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
            model = next(models, platform.processor())
    except OSError:
        model = platform.processor()
    return f"{os.cpu_count()} cores {model}"


def versions(packages: Iterable[str] = PACKAGES) -> str:
    """Versions of Python and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def revision() -> str:
    """The checkout's commit, with `-dirty` where files differ from it; empty if there is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    done = subprocess.run(
        command, cwd=os.path.dirname(__file__), capture_output=True, text=True, check=False
    )
    return done.stdout.strip()
