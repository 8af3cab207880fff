"""Command lines on which a preset chooses the defaults of all other flags."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import tyro

from experiments.train.config import FOR_CONTROLS, TrainingConfig
from experiments.train.stability import StabilityConfig

AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


def parse_with_presets(
    presets: Mapping[str, AnyConfig], default: str, program: str, arguments: Sequence[str] | None
) -> AnyConfig:
    """Reads a command line; `--preset` chooses the defaults of the other flags.

    What a preset has to keep an equilibrium stable is left out for a `--model` without one.

    Args:
        presets: the settings of each; all of one class, which has a field `preset`.
        default: the preset where none is named.
        program: module that is run.
        arguments: the command line without the program; None for that of the process.

    Raises:
        SystemExit: after `--help`, or with code 2 after a message that names a bad flag.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--preset", default=default)
    early.add_argument("--model", default=None)
    try:
        chosen = early.parse_known_args(arguments)[0]
    except argparse.ArgumentError:
        # `--preset` without a value: tyro says so below.
        chosen = argparse.Namespace(preset=default, model=None)
    # An unknown preset is left to tyro as well, which lists those there are.
    settings = presets.get(chosen.preset, presets[default])
    if chosen.model not in (None, "deq"):
        own = type(settings).__dataclass_fields__
        names = {field.name for field in dataclasses.fields(StabilityConfig)} - set(FOR_CONTROLS)
        settings = dataclasses.replace(settings, **{name: own[name].default for name in names})
    return tyro.cli(type(settings), prog=f"python -m {program}", default=settings, args=arguments)
