"""Settings that all scripts for sequences have: the network's and the optimiser's flags."""

import dataclasses
import math
from typing import Any, Literal

from deq_jax.cells.attention import Norm
from deq_jax.cells.transformer import FeedForward, NormOrder, Positions
from experiments.train.config import TrainingConfig
from experiments.train.errors import UsageError
from experiments.train.runs import flag_of

CellName = Literal["transformer", "trellis"]
ModelName = Literal["deq", "weight_tied", "explicit", "lstm", "gru"]

_TRANSFORMER = ("heads", "positions", "norm", "norm_order", "feed_forward", "residual_scale")
_TRANSFORMER += ("learn_residual_scale", "window", "attention_dropout")
_TRELLIS = ("kernel_size", "dilation")


@dataclasses.dataclass(frozen=True)
class SequenceConfig(TrainingConfig):
    """Flags that every script for sequences has.

    Attributes:
        model: deq, or a control: weight_tied (the cell --depth times with the same weights),
            explicit (--depth cells with weights of their own), lstm or gru (one layer, from Flax).
        cell: of deq, weight_tied and explicit: transformer or trellis.
        features: width of the embedding and of the transformer's state.
        hidden_features: width inside the transformer's feed-forward block; of the state of trellis,
            lstm and gru.
        heads: attention heads; divides --features.
        positions: of the transformer: relative (Transformer-XL), rotary, or none.
        norm: of the transformer: layer or rms.
        norm_order: post or pre.
        feed_forward: relu, gelu or swiglu.
        residual_scale: factor of the transformer's two branches.
        learn_residual_scale: train these factors.
        window: attend to the last so many positions only. None: all.
        attention_dropout: rate of dropout of single attention weights.
        kernel_size: taps of trellis.
        dilation: distance of its taps.
        tied: the head has the weights of the embedding.
        segment_memory: positions of earlier segments whose equilibria are kept. 0: none. For
            trellis any other number keeps what its convolution reaches.
        remat: have the controls compute each application of the cell again in the backward pass,
            instead of keeping what is inside it.
        warmup_steps: steps in which the learning rate rises to --learning-rate.
        clip: largest norm of the gradient; it is scaled down where it is larger. None: any.
        weight_decay: AdamW's, of matrices.
        beta2: Adam's second momentum.
    """

    model: ModelName = "deq"
    cell: CellName = "transformer"
    features: int = 128
    hidden_features: int = 512
    heads: int = 4
    positions: Positions = "relative"
    norm: Norm = "layer"
    norm_order: NormOrder = "post"
    feed_forward: FeedForward = "relu"
    residual_scale: float = 1.0
    learn_residual_scale: bool = False
    window: int | None = None
    attention_dropout: float = 0.0
    kernel_size: int = 2
    dilation: int = 1
    tied: bool = True
    segment_memory: int = 0
    remat: bool = False
    warmup_steps: int = 0
    clip: float | None = 1.0
    weight_decay: float = 0.0
    beta2: float = 0.99
    kernel_std: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("features", "hidden_features", "heads", "window", "kernel_size", "dilation"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("segment_memory", "warmup_steps"):
            self._check(name, lambda value: value >= 0, "at least 0")
        self._check("weight_decay", lambda value: 0 <= value < math.inf, "at least 0 and finite")
        self._check("clip", lambda value: 0 < value < math.inf, "positive and finite")
        self._check("beta2", lambda value: 0 <= value < 1, "at least 0 and below 1")
        self._check("attention_dropout", lambda value: 0 <= value < 1, "at least 0 and below 1")
        if self.start == "learned":
            raise UsageError("--start learned is for images, got it for sequences")
        elsewhere = _TRELLIS if self.cell == "transformer" else _TRANSFORMER
        if self.is_recurrent:
            elsewhere = (*_TRELLIS, *_TRANSFORMER)
        for name in elsewhere:
            if self._changed(name) and name != "heads":
                raise UsageError(f"{flag_of(name)} is not for {self._network_name()}")
        for name in ("segment_memory", "kernel_std"):
            if self.is_recurrent and self._changed(name):
                raise UsageError(f"{flag_of(name)} is not for {self._network_name()}")
        if self.remat and self.model not in ("weight_tied", "explicit"):
            raise UsageError(f"--remat is for the controls, got --model {self.model}")

    @property
    def is_recurrent(self) -> bool:
        """Whether the model is an LSTM or a GRU."""
        return self.model in ("lstm", "gru")

    def sequence_network(self) -> dict[str, Any]:
        """Arguments that all models made of this cell have in common."""
        names = ("features", "hidden_features", "tied", "dropout")
        names += _TRANSFORMER if self.cell == "transformer" else _TRELLIS
        network = {name: getattr(self, name) for name in names}
        network["memory_size"] = self.segment_memory
        if self.cell == "transformer" or self.kernel_std is not None:
            network["kernel_std"] = self.kernel_std
        return network

    def _network_name(self) -> str:
        return f"--model {self.model}" if self.is_recurrent else f"--cell {self.cell}"
