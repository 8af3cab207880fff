"""Presets and command line of `experiments.image_classification`."""

import argparse
import dataclasses
from collections.abc import Sequence

import tyro

from experiments.image_config import Config

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
    """Reads the command line; `--preset` chooses the defaults of the other flags.

    Args:
        arguments: the command line without the program; None for that of the process.

    Raises:
        SystemExit: after `--help`, or with code 2 after a message that names a bad flag.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default="digits")
    try:
        preset = early.parse_known_args(arguments)[0].preset
    except argparse.ArgumentError:
        # `--preset` without a value: tyro says so below.
        preset = "digits"
    # An unknown preset is left to tyro as well, which lists those there are.
    default = PRESETS.get(preset, PRESETS["digits"])
    return tyro.cli(
        Config, prog="python -m experiments.image_classification", default=default, args=arguments
    )
