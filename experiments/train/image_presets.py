"""Presets and command line of `experiments.image_classification`."""

import dataclasses
from collections.abc import Sequence

from experiments.train.image_config import Config
from experiments.train.presets import parse_with_presets

_TUTORIAL = Config(
    preset="cifar10",
    epochs=50,
    batch_size=100,
    learning_rate=1e-3,
    channels=48,
    inner_channels=64,
    pool=8,
    eval_batch_size=200,
)
"""The network and the training of the Deep Implicit Layers tutorial, chapter 4."""

_SMALLER = dataclasses.replace(
    _TUTORIAL, preset="mnist", epochs=10, channels=32, inner_channels=48, pool=7
)

PRESETS: dict[str, Config] = {"digits": Config(), "mnist": _SMALLER, "cifar10": _TUTORIAL}


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the command line, see `parse_with_presets`."""
    return parse_with_presets(PRESETS, "digits", "experiments.image_classification", arguments)
