"""Settings of `experiments.language_model`: the flags, their checks and the presets."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from experiments.data.vocabulary import Level
from experiments.train.presets import parse_with_presets
from experiments.train.sequence_config import SequenceConfig

PresetName = Literal["cpu", "accelerator"]


@dataclasses.dataclass(frozen=True)
class Config(SequenceConfig):
    """Train a deep equilibrium language model, or one of its controls, on a text.

    `--preset` chooses the defaults of all other flags. The same command again goes on with a run
    that was interrupted.

    Attributes:
        preset: cpu (context of 64 characters) or accelerator (256).
        text: name of a prepared data set with one text feature, or a plain text file.
        data_dir: folder of prepared data sets. None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        level: what a token is, characters or words.
        vocabulary_size: most tokens; at level words the rarer ones become <unk>. None: all.
        evaluation_fraction: the last such share of the text is evaluated on, not trained on.
        validation_fraction: hold out the last such share of what is trained on, and report on it
            instead; for choosing settings without looking at the end of the text.
        train_tokens: train on the first so many tokens. None: all.
        eval_tokens: report on the first so many tokens. None: all.
        epochs: parts of the training with a line of the report each, see --steps-per-epoch.
        length: tokens in a training sequence, the context.
        steps_per_epoch: steps between two lines of the report. None: so many that as many tokens
            were seen as there are.
    """

    preset: PresetName = "cpu"
    text: str = "tiny_shakespeare"
    data_dir: str | None = None
    level: Level = "characters"
    vocabulary_size: int | None = None
    evaluation_fraction: float = 0.1
    validation_fraction: float = 0.0
    train_tokens: int | None = None
    eval_tokens: int | None = None
    length: int = 64
    steps_per_epoch: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("vocabulary_size", "train_tokens", "eval_tokens", "length"):
            self._check(name, lambda value: value >= 1, "at least 1")
        self._check("steps_per_epoch", lambda value: value >= 1, "at least 1")
        self._check("evaluation_fraction", lambda value: 0 < value < 1, "above 0 and below 1")
        self._check("validation_fraction", lambda value: 0 <= value < 1, "at least 0 and below 1")


_CPU = Config(
    epochs=8,
    steps_per_epoch=250,
    batch_size=24,
    eval_batch_size=32,
    learning_rate=2e-3,
    final_learning_rate=1e-4,
    warmup_steps=100,
    features=192,
    hidden_features=768,
    heads=6,
    depth=8,
    tol=3e-2,
    max_iter=16,
    jacobian_weight=0.2,
    jacobian_probability=0.35,
    eval_every=2,
)
_ACCELERATOR = dataclasses.replace(
    _CPU,
    preset="accelerator",
    length=256,
    epochs=20,
    batch_size=64,
    features=768,
    hidden_features=3072,
    heads=12,
    dropout=0.2,
    learning_rate=1e-3,
    max_iter=24,
)
PRESETS: dict[str, Config] = {"cpu": _CPU, "accelerator": _ACCELERATOR}


def parse(arguments: Sequence[str] | None = None) -> Config:
    """Reads the command line, see `parse_with_presets`."""
    return parse_with_presets(PRESETS, "cpu", "experiments.language_model", arguments)
