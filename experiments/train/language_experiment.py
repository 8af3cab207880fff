"""What `experiments.language_model` trains: a network on a text, its batches, its figures."""

import math
from collections.abc import Iterator

import numpy as np

from experiments.data.text import TextDataset, crops, stream_steps, streams, windows
from experiments.train import training
from experiments.train.experiment import Experiment, assemble
from experiments.train.language_config import Config
from experiments.train.sequence_experiment import build_model, memory_of, optimizer
from experiments.train.totals import Record


def prepare(config: Config, dataset: TextDataset) -> Experiment:
    """Builds the network, the optimiser and the steps.

    Raises:
        UsageError: flags do not fit the text, each other or the machine; the message names them.
    """
    model = build_model(config, len(dataset.vocabulary))
    length, size = config.length, config.batch_size
    remembers = config.segment_memory > 0
    segments = stream_steps(len(dataset.train), length=length, count=size) if remembers else 0
    per_epoch = config.steps_per_epoch or segments or max(1, len(dataset.train) // (length * size))
    steps = config.epochs * per_epoch
    schedule = training.cosine_schedule(
        config.learning_rate, config.final_learning_rate, steps, min(config.warmup_steps, steps - 1)
    )

    def batch(step: int) -> training.Batch:
        if not remembers:
            return training.Batch(
                *crops(dataset.train, length=length, count=size, seed=config.seed, step=step)
            )
        segment = step % segments
        first = np.full(size, segment == 0)
        return training.Batch(
            *streams(dataset.train, length=length, count=size, step=segment), first
        )

    def batches(epoch: int, position: int) -> Iterator[training.Batch]:
        for step in range(position, per_epoch):
            yield batch(epoch * per_epoch + step)

    def evaluation() -> Iterator[training.CountedBatch]:
        count = config.eval_batch_size
        for inputs, targets, counts in windows(
            dataset.evaluation, length=length, count=count, contiguous=remembers
        ):
            yield training.Batch(inputs, targets), counts

    def further(record: Record) -> Record:
        name = dataset.evaluation_name
        nats = record[f"{name}_loss"]
        return {
            f"{name}_perplexity": math.exp(min(nats, 700.0)),
            f"{name}_bits_per_character": nats / math.log(2) / dataset.characters_per_token,
        }

    return assemble(
        config,
        dataset,
        model,
        steps_per_epoch=per_epoch,
        batches=batches,
        evaluation=evaluation,
        schedule=schedule,
        optimizer=optimizer(config, schedule),
        memory=memory_of(model),
        further=further,
    )
