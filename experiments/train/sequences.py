"""The networks of the commands for sequences, and the settings of these networks."""

import dataclasses
from typing import Annotated, Any, Literal

from flax import nnx

from deq_jax.cells.attention import Norm
from deq_jax.cells.transformer import FeedForward, NormOrder, Positions
from deq_jax.models.deq_transformer import (
    DEQTransformer,
    ExplicitTransformer,
    WeightTiedTransformer,
)
from deq_jax.models.deq_trellis import DEQTrellisNet, ExplicitTrellisNet, WeightTiedTrellisNet
from deq_jax.models.recurrent import RecurrentNet
from experiments.train.config import (
    Count,
    Positive,
    Range,
    Rate,
    Settings,
    TrainingConfig,
    choice,
    group,
)
from experiments.train.errors import UsageError


@dataclasses.dataclass(frozen=True)
class Transformer:
    """The transformer's cell.

    Attributes:
        heads: attention heads; divides --network.features.
        positions: relative (Transformer-XL), rotary, or none.
        norm: layer or rms.
        norm_order: post or pre.
        feed_forward: relu, gelu or swiglu.
        residual_scale: factor of the two branches.
        learn_residual_scale: train these factors.
        window: attend to the last so many positions only. None: all.
        attention_dropout: rate of dropout of single attention weights.
    """

    heads: int = 4
    positions: Positions = "relative"
    norm: Norm = "layer"
    norm_order: NormOrder = "post"
    feed_forward: FeedForward = "relu"
    residual_scale: float = 1.0
    learn_residual_scale: bool = False
    window: int | None = None
    attention_dropout: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trellis:
    """The cell of a trellis network, a causal convolution and an LSTM's gates.

    Attributes:
        kernel_size: taps.
        dilation: distance of the taps.
    """

    kernel_size: int = 2
    dilation: int = 1


CellChoice = choice("transformer", Transformer()) | choice("trellis", Trellis())


@dataclasses.dataclass(frozen=True)
class SequenceNetwork(Settings):
    """The network around the equilibrium.

    Attributes:
        features: width of the embedding and of the transformer's state.
        hidden_features: width inside the transformer's feed-forward block; of the state of trellis,
            lstm and gru.
        tied: the head has the weights of the embedding.
        dropout: rate of variational dropout, one mask a solve.
        kernel_std: standard deviation of the cell's initial kernels. None: what the cell chooses.
        memory: positions of earlier segments whose equilibria are kept, 0 for none. For a trellis
            any other number keeps what its convolution reaches.
        remat: have the controls compute each application of the cell again in the backward pass,
            instead of keeping what is inside it.
    """

    prefix = "network."

    features: Count = 128
    hidden_features: Count = 512
    tied: bool = True
    dropout: Rate = 0.0
    kernel_std: Positive | None = None
    memory: Annotated[int, Range(0)] = 0
    remat: bool = False


@dataclasses.dataclass(frozen=True)
class SequenceConfig(TrainingConfig):
    """What all commands for sequences have in common.

    Attributes:
        model: deq, or a control: weight_tied (the cell --depth times with the same weights),
            explicit (--depth cells with weights of their own), lstm or gru (one layer, from Flax).
        cell: of deq, weight_tied and explicit.
        network: the network.
    """

    model: Literal["deq", "weight_tied", "explicit", "lstm", "gru"] = "deq"
    cell: CellChoice = Transformer()
    network: group(SequenceNetwork) = SequenceNetwork()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stability is not None and self.stability.start == "learned":
            raise UsageError("--stability.start learned is for images, not for sequences")
        if self.is_recurrent and self.network.memory:
            raise UsageError(f"--network.memory is not for --model {self.model}")
        if self.network.remat and self.model not in ("weight_tied", "explicit"):
            raise UsageError(f"--network.remat is for the controls, not for --model {self.model}")

    @property
    def is_recurrent(self) -> bool:
        """Whether the model is an LSTM or a GRU."""
        return self.model in ("lstm", "gru")


_NETWORKS = {
    Transformer: {
        "deq": DEQTransformer,
        "weight_tied": WeightTiedTransformer,
        "explicit": ExplicitTransformer,
    },
    Trellis: {
        "deq": DEQTrellisNet,
        "weight_tied": WeightTiedTrellisNet,
        "explicit": ExplicitTrellisNet,
    },
}


def build_model(config: SequenceConfig, vocabulary_size: int) -> nnx.Module:
    """The network for so many tokens, initialised by the seed, in training mode.

    Raises:
        UsageError: flags do not fit each other; the message names them.
    """
    # Dropout draws from a stream of its own; the initial weights are the same with and without.
    rngs = nnx.Rngs(config.seed, dropout=config.seed + 1)
    network = dataclasses.asdict(config.network)
    memory, remat = network.pop("memory"), network.pop("remat")
    if network["kernel_std"] is None and not isinstance(config.cell, Transformer):
        del network["kernel_std"]
    try:
        if config.is_recurrent:
            network.pop("kernel_std", None)
            return RecurrentNet(vocabulary_size, kind=config.model, rngs=rngs, **network)
        options: dict[str, Any] = network | dataclasses.asdict(config.cell)
        options |= {"memory_size": memory, "rngs": rngs}
        if config.is_deq:
            options |= config.layer()
        else:
            options |= {"depth": config.depth, "remat": remat}
        return _NETWORKS[type(config.cell)][config.model](vocabulary_size, **options)
    except (ValueError, TypeError) as error:
        raise UsageError(f"--network and cell: do not fit: {error}") from error
