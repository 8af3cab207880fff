"""Trains a deep equilibrium language model, or a control of it, on a text.

    python -m experiments.language_model --help
    python -m experiments.language_model --data.dir DIR
    python -m experiments.language_model --data.name FILE.txt --data.level words

The first word is a preset: cpu (a context of 64 characters, the default) or accelerator (256). The
same command again resumes a run that was interrupted.

Leaves in the run's folder: `config.json`, `vocabulary.json`, `metrics.jsonl` (a line an epoch),
`checkpoints/`, `curves.png`, `residuals.png`, and when it is finished `result.json`.
`experiments.generate` writes text with what was trained.
"""

import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
from flax import nnx

from deq_jax import Anderson
from deq_jax.stability import JacobianRegularization
from experiments.data import WHOLE, Batch, Part
from experiments.data.text import TextDataset, crops, load_text, stream_steps, streams, windows
from experiments.data.vocabulary import Level
from experiments.train.config import Count, Optim, Range, Rate, Settings, Stability, group, parse
from experiments.train.loop import train
from experiments.train.metrics import Record
from experiments.train.reporter import reports_errors
from experiments.train.runs import RunFolder
from experiments.train.sequences import (
    SequenceConfig,
    SequenceNetwork,
    Transformer,
    build_model,
)

# ---------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class TextData(Settings):
    """The text.

    Attributes:
        name: name of a prepared data set with one text feature, or a plain text file.
        dir: folder of prepared data sets. None: $TFDS_DATA_DIR or ~/tensorflow_datasets.
        level: what a token is, characters or words.
        vocabulary: most tokens; at level words the rarer ones become <unk>. None: all.
        evaluation: the last such share of the text is evaluated on, not trained on.
        validation: hold out the last such share of what is trained on, and report on it instead,
            to choose settings without looking at the end of the text.
        train: train on the first so many tokens. None: all.
        eval: report on the first so many tokens. None: all.
        length: tokens in a training sequence, the context.
        steps_per_epoch: steps between two lines of the report. None: so many that as many tokens
            were seen as there are.
    """

    prefix = "data."

    name: str = "tiny_shakespeare"
    dir: str | None = None
    level: Level = "characters"
    vocabulary: Count | None = None
    evaluation: Annotated[float, Range(above=0, below=1)] = 0.1
    validation: Rate = 0.0
    train: Count | None = None
    eval: Count | None = None
    length: Count = 64
    steps_per_epoch: Count | None = None


@dataclasses.dataclass(frozen=True)
class Config(SequenceConfig):
    """The settings.

    Attributes:
        data: the text.
    """

    data: group(TextData) = TextData()


_CPU = Config(
    epochs=8,
    batch_size=24,
    eval_batch_size=32,
    eval_every=2,
    depth=8,
    optim=Optim(lr=2e-3, final_lr=1e-4, warmup=100, clip=1.0, beta2=0.99),
    solver=Anderson(tol=3e-2, max_iter=16),
    stability=Stability(jacobian=JacobianRegularization(0.2, probability=0.35)),
    cell=Transformer(heads=6),
    network=SequenceNetwork(features=192, hidden_features=768),
    data=TextData(steps_per_epoch=250),
)
PRESETS = {
    "cpu": _CPU,
    "accelerator": dataclasses.replace(
        _CPU,
        epochs=20,
        batch_size=64,
        optim=dataclasses.replace(_CPU.optim, lr=1e-3),
        solver=Anderson(tol=3e-2, max_iter=24),
        cell=Transformer(heads=12),
        network=SequenceNetwork(features=768, hidden_features=3072, dropout=0.2),
        data=TextData(steps_per_epoch=250, length=256),
    ),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Reads a command line, see `parse`."""
    return parse(PRESETS, "language_model", arguments, __doc__)


# ------------------------------------------------------------------------------- data and network


@dataclasses.dataclass(frozen=True)
class TextBatches:
    """The batches of a text: random windows, or, for a network with memory, contiguous streams.

    Attributes:
        text: the text.
        config: the settings.
        evaluation_name: what is reported on.
        white: of no meaning for tokens.
    """

    text: TextDataset
    config: Config
    evaluation_name: str = "validation"
    white: int = 1

    def checksum(self) -> int:
        """CRC-32 of the tokens and the vocabulary."""
        return self.text.checksum()

    def describe(self) -> str:
        """What the text is, in a line."""
        text = self.text
        return (
            f"{text.name}, {len(text.train):,} training and {len(text.evaluation):,} "
            f"{text.evaluation_name} {text.vocabulary.level}, {len(text.vocabulary):,} different "
            "ones"
        )

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in an epoch."""
        tokens, length = len(self.text.train), self.config.data.length
        if self.config.data.steps_per_epoch is not None:
            return self.config.data.steps_per_epoch
        if self.config.network.memory:
            return stream_steps(tokens, length=length, count=batch_size)
        return max(1, tokens // (length * batch_size))

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """A part of each of the batches of an epoch from number `start` on."""
        tokens, length = self.text.train, self.config.data.length
        per_epoch = self.steps_per_epoch(batch_size)
        size: dict[str, Any] = {"length": length, "count": batch_size}
        own = range(batch_size)[part.rows(batch_size)]
        counts = np.ones((len(own), length), bool)
        for step in range(epoch * per_epoch + start, (epoch + 1) * per_epoch):
            if self.config.network.memory:
                segment = step % stream_steps(len(tokens), **size)
                found = streams(tokens, **size, step=segment, part=part)
                yield Batch(*found, counts, np.full(len(own), segment == 0))
            else:
                yield Batch(*crops(tokens, **size, seed=seed, step=step, part=part), counts)

    def evaluation_batches(
        self, batch_size: int, *, multiple_of: int = 1, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """Each token that is reported on as a target, exactly once; or a part of each batch."""
        del multiple_of  # windows fill up every batch
        contiguous = self.config.network.memory > 0
        length = self.config.data.length
        for found in windows(
            self.text.evaluation,
            length=length,
            count=batch_size,
            contiguous=contiguous,
            part=part,
        ):
            yield Batch(*found)

    def figures(self, record: Record) -> Record:
        """Perplexity, and bits per character whatever a token is."""
        nats = record[f"{self.evaluation_name}_loss"]
        bits = nats / math.log(2) / self.text.characters_per_token
        return {
            f"{self.evaluation_name}_perplexity": math.exp(min(nats, 700.0)),
            f"{self.evaluation_name}_bits_per_character": bits,
        }


def load(config: Config, run: RunFolder) -> tuple[TextBatches, nnx.Module]:
    """The text, with the run's vocabulary, and the network for it."""
    data = config.data
    text = load_text(
        data.name,
        data_dir=data.dir,
        level=data.level,
        vocabulary_size=data.vocabulary,
        evaluation_fraction=data.evaluation,
        validation_fraction=data.validation,
        train_tokens=data.train,
        eval_tokens=data.eval,
        vocabulary_path=run.vocabulary,
    )
    return TextBatches(text, config), build_model(config, len(text.vocabulary))


# --------------------------------------------------------------------------------------------- run


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    config = parse_arguments(arguments)
    result = train("language_model", config, arguments, load, "language_model")
    print(
        f"validation loss {result['validation_loss']:.4f} nats a token, "
        f"perplexity {result['validation_perplexity']:.2f}, "
        f"{result['validation_bits_per_character']:.3f} bits a character"
    )


if __name__ == "__main__":
    sys.exit(main())
