"""What scripts share that measure something and put tables into a page of docs/."""

import dataclasses
import pathlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
import tyro
from jax.flatten_util import ravel_pytree

from experiments.studies.machine import processor, versions

PyTree = Any

DOCS = pathlib.Path(__file__).parent.parent.parent / "docs"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to do.

    Attributes:
        write: put the tables into the page in docs/ as well.
        seed: seed of the problems.
    """

    write: bool = False
    seed: int = 0


def start(description: str | None) -> Config:
    """Reads the command line, enables float64 and says where and with which seed this runs."""
    config = tyro.cli(Config, description=description)
    jax.config.update("jax_enable_x64", True)
    print(f"{origin(config)}\n", flush=True)
    return config


def origin(config: Config) -> str:
    """The machine, the versions and the seed."""
    return f"{machine()}, seed {config.seed}"


def machine() -> str:
    """The machine and the versions, in one line."""
    device = jax.devices()[0]
    return f"{processor()}, {device.platform} ({device.device_kind}), {versions(('jax', 'jaxlib'))}"


def flat(tree: PyTree) -> np.ndarray:
    """All leaves as one vector in float64."""
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def relative_error(values: np.ndarray, expected: np.ndarray) -> float:
    """`‖values - expected‖ / ‖expected‖`."""
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def markdown_head(columns: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    columns = list(columns)
    return "\n".join([markdown_row(columns), markdown_row(["---"] * len(columns))])


def markdown_row(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def write_below(page: pathlib.Path, marker: str, parts: Iterable[str]) -> None:
    """Replaces what stands below the line `marker` of a page by `parts`, as paragraphs.

    Raises:
        ValueError: the page has no such line, or more than one.
    """
    words, *rest = page.read_text(encoding="utf-8").split(f"{marker}\n")
    if len(rest) != 1:
        raise ValueError(f"{page} must have the line {marker!r} once, got it {len(rest)} times")
    page.write_text("\n\n".join([words + marker, *parts]) + "\n", encoding="utf-8")
    print(f"wrote {page}")
