"""The networks and the optimiser of the scripts for sequences."""

from typing import Any

import jax
import optax
from flax import nnx

from deq_jax.models.deq_transformer import (
    DEQTransformer,
    ExplicitTransformer,
    WeightTiedTransformer,
)
from deq_jax.models.deq_trellis import DEQTrellisNet, ExplicitTrellisNet, WeightTiedTrellisNet
from deq_jax.models.recurrent import RecurrentNet
from deq_jax.models.sequence import SequenceModel
from experiments.train.errors import UsageError
from experiments.train.sequence_config import SequenceConfig

PyTree = Any

_NETWORKS = {
    "transformer": {
        "deq": DEQTransformer,
        "weight_tied": WeightTiedTransformer,
        "explicit": ExplicitTransformer,
    },
    "trellis": {
        "deq": DEQTrellisNet,
        "weight_tied": WeightTiedTrellisNet,
        "explicit": ExplicitTrellisNet,
    },
}


def build_model(config: SequenceConfig, vocabulary_size: int) -> SequenceModel | RecurrentNet:
    """The network for so many tokens, initialised by the seed, in training mode.

    Raises:
        UsageError: flags do not fit each other; the message names them.
    """
    # Dropout draws from a stream of its own; the initial weights are the same with and without.
    rngs = nnx.Rngs(config.seed, dropout=config.seed + 1)
    try:
        model = _network(config, vocabulary_size, rngs)
    except (ValueError, TypeError) as error:
        raise UsageError(f"these flags do not go together: {error}") from error
    model.train()
    return model


def _network(
    config: SequenceConfig, vocabulary_size: int, rngs: nnx.Rngs
) -> SequenceModel | RecurrentNet:
    if config.is_recurrent:
        return RecurrentNet(
            vocabulary_size,
            config.features,
            config.hidden_features,
            kind=config.model,
            tied=config.tied,
            dropout=config.dropout,
            rngs=rngs,
        )
    options = config.sequence_network()
    if config.is_deq:
        options |= {
            "solver": config.forward_solver(),
            "gradient": config.gradient_policy(),
            "execution": config.execution(),
            "normalization": config.normalizer(),
        }
    else:
        options |= {"depth": config.depth, "remat": config.remat}
    return _NETWORKS[config.cell][config.model](vocabulary_size, rngs=rngs, **options)


def optimizer(config: SequenceConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW with decay of matrices alone, behind the clipping of the gradient's norm."""

    def matrices(params: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

    adam = optax.adamw(schedule, b2=config.beta2, weight_decay=config.weight_decay, mask=matrices)
    return (
        adam if config.clip is None else optax.chain(optax.clip_by_global_norm(config.clip), adam)
    )


def memory_of(model: Any) -> Any:
    """`memory(size)`: what the network starts a batch of that size with; None without memory."""
    return getattr(model, "initial_memory", lambda size: None)
