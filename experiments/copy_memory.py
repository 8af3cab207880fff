"""Trains a DEQ-Transformer, or a control, to repeat symbols that it was shown long before.

    python -m experiments.copy_memory --help
    python -m experiments.copy_memory
    python -m experiments.copy_memory --model lstm --features 10 --hidden-features 53

A sequence of T + 20 tokens begins with 10 symbols from 1 to 8. Then there are zeros, and a 9 at
position T + 10, after which the symbols are asked for: targets are zeros, and the 10 symbols at the
end. The loss is the mean cross-entropy over all positions; who knows when to answer but not what
has `10 ln 8 / (T + 20)`.

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

import jax.numpy as jnp
import numpy as np

from experiments.data.splits import epoch_order
from experiments.train import training
from experiments.train.copy_config import Config, parse
from experiments.train.experiment import Experiment, assemble
from experiments.train.runs import RunDirectory
from experiments.train.script import Script, exit_code
from experiments.train.sequence_experiment import build_model, optimizer
from experiments.train.totals import Record
from experiments.train.training import Batch, CountedBatch

_TRAIN_STREAM, _TEST_STREAM = 5, 6
"""Last words of the seeds of the sequences' draws; see `splits`."""

_TEST_SEED = 0
"""The test sequences are the same ones in every run."""

_TRACED_SEQUENCES = 32


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Sequences and what is to be answered.

    Attributes:
        inputs: `[N, T + 2 S]` int32, with S symbols shown.
        targets: likewise.
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> "Sequences":
        """The sequences at `indices`, in that order."""
        return Sequences(self.inputs[indices], self.targets[indices])


@dataclasses.dataclass(frozen=True)
class CopyTask:
    """The data of a run.

    Attributes:
        train: sequences to train on.
        evaluation: sequences to report on.
        name: what it is called.
        evaluation_name: what the latter are.
    """

    train: Sequences
    evaluation: Sequences
    name: str = "copy memory"
    evaluation_name: str = "test"

    def checksum(self) -> int:
        """CRC-32 of all sequences; their targets follow from them."""
        checksum = zlib.crc32(np.ascontiguousarray(self.train.inputs))
        return zlib.crc32(np.ascontiguousarray(self.evaluation.inputs), checksum)


def sequences(
    count: int, *, delay: int, shown: int, symbols: int, generator: np.random.Generator
) -> Sequences:
    """Draws sequences of the task; see the module's docstring for the default sizes.

    Args:
        count: N.
        delay: T.
        shown: S, symbols to remember.
        symbols: different ones, 1 to `symbols`; the delimiter is the number after them.
        generator: source of the draw.
    """
    drawn = generator.integers(1, symbols + 1, size=(count, shown))
    inputs = np.zeros((count, delay + 2 * shown), np.int32)
    targets = np.zeros_like(inputs)
    inputs[:, :shown] = drawn
    inputs[:, delay + shown - 1] = symbols + 1
    targets[:, delay + shown :] = drawn
    return Sequences(inputs, targets)


def without_memory(config: Config) -> float:
    """The loss of knowing when to answer, but not what."""
    return config.shown * math.log(config.symbols) / (config.delay + 2 * config.shown)


def run(config: Config) -> int:
    """Trains, or goes on with training, until the end or a signal; see `Script.run`."""

    def summary(result: Record) -> str:
        return f"test loss {result['test_loss']:.2e}; without memory {without_memory(config):.2e}"

    return Script("copy_memory", load, _describe, _traced, summary).run(config)


def load(config: Config, directory: RunDirectory) -> Experiment:
    """The sequences and all that is trained on them."""
    del directory
    sizes = {"delay": config.delay, "shown": config.shown, "symbols": config.symbols}
    train = np.random.default_rng([config.seed, 0, _TRAIN_STREAM])
    test = np.random.default_rng([_TEST_SEED, 0, _TEST_STREAM])
    task = CopyTask(
        sequences(config.train_examples, generator=train, **sizes),
        sequences(config.test_examples, generator=test, **sizes),
    )
    return prepare(config, task)


def prepare(config: Config, dataset: CopyTask) -> Experiment:
    """Builds the network, the optimiser and the steps.

    Raises:
        UsageError: flags do not fit each other or the machine; the message names them.
    """
    size = config.batch_size
    per_epoch = len(dataset.train) // size
    steps = config.epochs * per_epoch
    schedule = training.cosine_schedule(
        config.learning_rate, config.final_learning_rate, steps, min(config.warmup_steps, steps - 1)
    )

    def batches(epoch: int, position: int) -> Iterator[Batch]:
        order = epoch_order(config.seed, epoch, len(dataset.train))
        for step in range(position, per_epoch):
            taken = dataset.train.take(order[step * size :][:size])
            yield Batch(taken.inputs, taken.targets)

    def evaluation() -> Iterator[CountedBatch]:
        examples = dataset.evaluation
        together = min(config.eval_batch_size, len(examples))
        together += -together % config.devices
        for start in range(0, len(examples), together):
            count = min(together, len(examples) - start)
            # The last batch is filled up with its own sequences, which do not count.
            taken = examples.take(start + np.arange(together) % count)
            counts = np.broadcast_to(np.arange(together)[:, None] < count, taken.targets.shape)
            yield Batch(taken.inputs, taken.targets), counts

    return assemble(
        config,
        dataset,
        build_model(config, config.symbols + 2),
        steps_per_epoch=per_epoch,
        batches=batches,
        evaluation=evaluation,
        schedule=schedule,
        optimizer=optimizer(config, schedule),
    )


def _describe(experiment: Experiment) -> str:
    config, dataset = experiment.config, experiment.dataset
    return (
        f"{len(dataset.train):,} training and {len(dataset.evaluation):,} test sequences of "
        f"{config.delay + 2 * config.shown} tokens; loss without memory "
        f"{without_memory(config):.3f}"
    )


def _traced(experiment: Experiment) -> Batch:
    examples = experiment.dataset.evaluation
    taken = examples.take(np.arange(min(_TRACED_SEQUENCES, len(examples))))
    return Batch(jnp.asarray(taken.inputs), taken.targets)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` and returns the exit code, see `script.exit_code`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    return exit_code(run, parse(arguments))


if __name__ == "__main__":
    sys.exit(main())
