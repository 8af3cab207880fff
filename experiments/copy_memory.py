"""Trains a DEQ-Transformer, or a control of it, to repeat symbols that it was shown long before.

    python -m experiments.copy_memory --help
    python -m experiments.copy_memory
    python -m experiments.copy_memory --model lstm --network.hidden-features 53

The first word is a preset: cpu (a delay of 100, the default) or accelerator (400, the paper's). The
same command again resumes a run that was interrupted.

A sequence of T + 20 tokens begins with 10 symbols from 1 to 8. Then there are zeros, and a 9 at
position T + 10, after which the symbols are asked for: targets are zeros, and the 10 symbols at the
end. The loss is the mean cross-entropy over all positions; a network that knows when to answer but
not what has `10 ln 8 / (T + 20)`.

Leaves in the run's folder: `config.json`, `metrics.jsonl` (a line an epoch), `checkpoints/`,
`curves.png`, `residuals.png`, and when it is finished `result.json`.

Source of the task: Hochreiter and Schmidhuber, "Long short-term memory", 1997; as in Bai, Kolter
and Koltun, "Deep equilibrium models", 2019, appendix F.
"""

import dataclasses
import math
import sys
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
from flax import nnx

from deq_jax import Anderson
from deq_jax.stability import JacobianRegularization
from experiments.data import WHOLE, Batch, Part
from experiments.data.images import epoch_order
from experiments.train.config import Count, Optim, Settings, Stability, group, parse
from experiments.train.errors import UsageError
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

_TRAIN_STREAM, _TEST_STREAM = 5, 6
"""Last words of the seeds of the draws; without them two uses of a seed would draw the same."""

# ---------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class CopyData(Settings):
    """The task.

    Attributes:
        delay: T, positions from the last symbol shown to the first one asked for, less one.
        shown: symbols to remember.
        symbols: different symbols.
        train: sequences to train on.
        test: sequences to report on.
    """

    prefix = "data."

    delay: Count = 100
    shown: Count = 10
    symbols: Count = 8
    train: Count = 20_000
    test: Count = 2_000


@dataclasses.dataclass(frozen=True)
class Config(SequenceConfig):
    """The settings.

    Attributes:
        data: the task.
    """

    data: group(CopyData) = CopyData()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network.memory:
            raise UsageError("--network.memory must be 0: each sequence is one segment")
        if self.data.train < self.batch_size:
            raise UsageError(
                f"--data.train must be at least --batch-size, {self.batch_size}, "
                f"got {self.data.train}"
            )


_CPU = Config(
    epochs=4,
    batch_size=32,
    eval_batch_size=100,
    depth=4,
    optim=Optim(lr=3e-3, final_lr=1e-5, warmup=100, clip=1.0, beta2=0.99),
    solver=Anderson(tol=1e-2, max_iter=16),
    stability=Stability(jacobian=JacobianRegularization(0.1, probability=0.35)),
    cell=Transformer(heads=2),
    network=SequenceNetwork(features=32, hidden_features=80, tied=False),
)
PRESETS = {
    "cpu": _CPU,
    "accelerator": dataclasses.replace(
        _CPU, epochs=50, solver=Anderson(tol=1e-3, max_iter=25), data=CopyData(delay=400)
    ),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Reads a command line, see `parse`."""
    return parse(PRESETS, "copy_memory", arguments, __doc__)


# ------------------------------------------------------------------------------- data and network


@dataclasses.dataclass(frozen=True)
class CopyTask:
    """The sequences of a run.

    Attributes:
        data: their sizes.
        train: `[N, T + 2 S]` int32, with S symbols shown: what is trained on.
        test: likewise, what is reported on.
        evaluation_name: what the latter are.
        white: of no meaning for tokens.
    """

    data: CopyData
    train: np.ndarray
    test: np.ndarray
    evaluation_name: str = "test"
    white: int = 1

    def checksum(self) -> int:
        """CRC-32 of all sequences; their targets follow from them."""
        return zlib.crc32(self.test.tobytes(), zlib.crc32(self.train.tobytes()))

    def describe(self) -> str:
        """What the sequences are, in a line."""
        return (
            f"{len(self.train):,} training and {len(self.test):,} test sequences of "
            f"{self.train.shape[1]} tokens; loss without memory {without_memory(self.data):.3f}"
        )

    def targets(self, inputs: np.ndarray) -> np.ndarray:
        """Zeros, and at the end the symbols that were shown."""
        targets = np.zeros_like(inputs)
        targets[:, -self.data.shown :] = inputs[:, : self.data.shown]
        return targets

    def steps_per_epoch(self, batch_size: int) -> int:
        """Steps in an epoch."""
        return len(self.train) // batch_size

    def train_batches(
        self, batch_size: int, *, seed: int, epoch: int, start: int = 0, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """A part of each of the batches of an epoch from number `start` on."""
        order = epoch_order(seed, epoch, len(self.train))
        for step in range(start, self.steps_per_epoch(batch_size)):
            examples = order[step * batch_size :][:batch_size]
            inputs = self.train[examples[part.rows(batch_size)]]
            yield Batch(inputs, self.targets(inputs), np.ones(inputs.shape, bool))

    def evaluation_batches(
        self, batch_size: int, *, multiple_of: int = 1, part: Part = WHOLE
    ) -> Iterator[Batch]:
        """Each test sequence exactly once; the last batch is filled up with its own sequences."""
        size = min(batch_size, len(self.test))
        size += -size % multiple_of
        for start in range(0, len(self.test), size):
            count = min(size, len(self.test) - start)
            rows = np.arange(size)[part.rows(size)]
            inputs = self.test[start + rows % count]
            counts = np.broadcast_to(rows[:, np.newaxis] < count, inputs.shape)
            yield Batch(inputs, self.targets(inputs), counts)

    def figures(self, record: Record) -> Record:
        """Nothing follows from the loss."""
        del record
        return {}


def draw_sequences(count: int, data: CopyData, generator: np.random.Generator) -> np.ndarray:
    """Draws sequences of the task, `[count, T + 2 S]` int32; see the module's docstring."""
    inputs = np.zeros((count, data.delay + 2 * data.shown), np.int32)
    inputs[:, : data.shown] = generator.integers(1, data.symbols + 1, size=(count, data.shown))
    inputs[:, data.delay + data.shown - 1] = data.symbols + 1
    return inputs


def without_memory(data: CopyData) -> float:
    """The loss of knowing when to answer, but not what."""
    return data.shown * math.log(data.symbols) / (data.delay + 2 * data.shown)


def load(config: Config, run: RunFolder) -> tuple[CopyTask, nnx.Module]:
    """The sequences, and the network for them; the test sequences are the same in every run."""
    del run
    data = config.data
    train = np.random.default_rng([config.seed, 0, _TRAIN_STREAM])
    test = np.random.default_rng([0, 0, _TEST_STREAM])
    task = CopyTask(
        data, draw_sequences(data.train, data, train), draw_sequences(data.test, data, test)
    )
    return task, build_model(config, data.symbols + 2)


# --------------------------------------------------------------------------------------------- run


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    config = parse_arguments(arguments)
    result = train("copy_memory", config, arguments, load, "copy_memory")
    print(f"test loss {result['test_loss']:.2e}; without memory {without_memory(config.data):.2e}")


if __name__ == "__main__":
    sys.exit(main())
