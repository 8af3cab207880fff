"""What `experiments.image_classification` trains: a network, its optimiser, its batches."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from experiments.data.images import ImageDataset
from experiments.data.sources import Images
from experiments.data.splits import epoch_order
from experiments.train import training
from experiments.train.errors import UsageError
from experiments.train.experiment import Experiment, assemble
from experiments.train.image_config import Config

Model = ConvDEQ | WeightTiedConvNet | ExplicitConvNet


def to_float(images: jax.Array, white: int) -> jax.Array:
    """Images as float32 with `white` scaled to 1."""
    return images.astype(jnp.float32) / white


def build_model(config: Config, dataset: ImageDataset) -> Model:
    """The network for a data set, initialised by the seed, in training mode."""
    network = {
        **config.network(),
        "image_shape": dataset.image_shape,
        "num_classes": dataset.num_classes,
        # Dropout draws from a stream of its own; the initial weights are the same with and without.
        "rngs": nnx.Rngs(config.seed, dropout=config.seed + 1),
    }
    if config.model == "weight_tied":
        model = WeightTiedConvNet(depth=config.depth, **network)
    elif config.model == "explicit":
        model = ExplicitConvNet(depth=config.depth, **network)
    else:
        solver, gradient = config.forward_solver(), config.gradient_policy()
        model = ConvDEQ(
            solver=solver,
            gradient=gradient,
            execution=config.execution(),
            normalization=config.normalizer(),
            learned_start=config.start == "learned",
            **network,
        )
    model.train()
    return model


def counted_batches(
    examples: Images, batch_size: int, devices: int = 1
) -> Iterator[training.CountedBatch]:
    """All examples in batches of one size, each counted exactly once.

    The last batch is filled up with repeated examples that do not count, so that one compiled
    function serves all batches. They repeat examples of the same batch: a sample's solve does not
    depend on its batch mates, hence even the batch's number of evaluations stays what it was.

    Args:
        examples: the images.
        batch_size: examples in a batch; fewer where there are fewer.
        devices: divides the size of the batches.
    """
    size = min(batch_size, len(examples))
    size += -size % devices
    for start in range(0, len(examples), size):
        count = min(size, len(examples) - start)
        taken = examples.take(start + np.arange(size) % count)
        yield training.Batch(taken.images, taken.labels), np.arange(size) < count


def prepare(config: Config, dataset: ImageDataset) -> Experiment:
    """Builds the network, the optimiser and the steps.

    Raises:
        UsageError: a flag does not fit the data or the machine; the message names it.
    """
    config.check_image(dataset.image_shape)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"--batch-size must be at most the {len(dataset.train)} training examples, "
            f"got {config.batch_size}"
        )
    schedule = training.cosine_schedule(
        config.learning_rate, config.final_learning_rate, config.epochs * steps_per_epoch
    )

    def batches(epoch: int, position: int) -> Iterator[training.Batch]:
        order = epoch_order(config.seed, epoch, len(dataset.train))
        for step in range(position, steps_per_epoch):
            taken = dataset.train.take(order[step * config.batch_size :][: config.batch_size])
            yield training.Batch(taken.images, taken.labels)

    return assemble(
        config,
        dataset,
        build_model(config, dataset),
        steps_per_epoch=steps_per_epoch,
        batches=batches,
        evaluation=lambda: counted_batches(
            dataset.evaluation, config.eval_batch_size, config.devices
        ),
        schedule=schedule,
        optimizer=optax.adam(schedule),
        prepare=functools.partial(to_float, white=dataset.white),
    )
