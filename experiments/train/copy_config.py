"""Settings of `experiments.copy_memory`: the flags, their checks and the presets."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from experiments.train.presets import parse_with_presets
from experiments.train.sequence_config import SequenceConfig

PresetName = Literal["cpu", "accelerator"]


@dataclasses.dataclass(frozen=True)
class Config(SequenceConfig):
    """Train a network to repeat, after a long delay, what it was shown at the beginning.

    `--preset` chooses the defaults of all other flags. The same command again goes on with a run
    that was interrupted.

    Attributes:
        preset: cpu (a delay of 100) or accelerator (400, the paper's).
        delay: T, positions from the last symbol shown to the first one asked for, less one.
        shown: symbols to remember.
        symbols: different symbols.
        train_examples: sequences to train on.
        test_examples: sequences to report on.
    """

    preset: PresetName = "cpu"
    delay: int = 100
    shown: int = 10
    symbols: int = 8
    train_examples: int = 20_000
    test_examples: int = 2_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("delay", "shown", "symbols", "train_examples", "test_examples"):
            self._check(name, lambda value: value >= 1, "at least 1")
        allowed = f"at least --batch-size, {self.batch_size}"
        self._check("train_examples", lambda value: value >= self.batch_size, allowed)
        self._check("segment_memory", lambda value: value == 0, "0: each sequence is one segment")


_CPU = Config(
    epochs=4,
    batch_size=32,
    eval_batch_size=100,
    learning_rate=3e-3,
    final_learning_rate=1e-5,
    warmup_steps=100,
    features=32,
    hidden_features=80,
    heads=2,
    tied=False,
    depth=4,
    tol=1e-2,
    max_iter=16,
    jacobian_weight=0.1,
    jacobian_probability=0.35,
)
_ACCELERATOR = dataclasses.replace(
    _CPU, preset="accelerator", delay=400, epochs=50, tol=1e-3, max_iter=25
)
PRESETS: dict[str, Config] = {"cpu": _CPU, "accelerator": _ACCELERATOR}


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the command line, see `parse_with_presets`."""
    return parse_with_presets(PRESETS, "cpu", "experiments.copy_memory", arguments)
