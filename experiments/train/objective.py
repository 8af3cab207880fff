"""The loss of a network with an equilibrium layer, and what is added to keep it stable."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deq_jax import BackwardProbe, GradientPolicy, SolveStats
from deq_jax.models.conv_deq import ConvDEQ
from deq_jax.models.sequence import EquilibriumSequenceModel, Segment
from deq_jax.stability import (
    JacobianRegularization,
    corrected_loss,
    initializer_loss,
    mixed_initial,
    one_application,
)
from experiments.train.stability import StartName

PyTree = Any
EquilibriumModel = ConvDEQ | EquilibriumSequenceModel


class Outcome(NamedTuple):
    """What a pass through a network gave.

    Attributes:
        loss: mean cross-entropy of the answer.
        extra: what is added to it.
        logits: `[B, classes]`; `[B, L, classes]` for sequences.
        stats: of the solve; None for a model without one.
        memory: for the next segment of the sequences; None without memory.
    """

    loss: jax.Array
    extra: jax.Array
    logits: jax.Array
    stats: SolveStats | None
    memory: PyTree


@dataclasses.dataclass(frozen=True)
class Objective:
    """`loss(z*) + Σ γ^k loss(z_i) + weight ‖J‖² / D + weight |z_0 - z*|`, as far as asked for.

    Attributes:
        seed: seed of all that is random in it.
        regularization: penalty on the Jacobian.
        correction_gamma: weight of the states along the way, relative to the next.
        start: where the solve starts.
        start_weight: weight of the last term.
    """

    seed: int = 0
    regularization: JacobianRegularization | None = None
    correction_gamma: float = 0.8
    start: StartName = "zeros"
    start_weight: float = 0.0

    def plain(self, model: Any, inputs: PyTree, targets: jax.Array) -> Outcome:
        """For a model without a solver: the mean cross-entropy alone."""
        memory = None
        if has_memory(inputs):
            logits, memory = model(inputs, return_memory=True)
        else:
            logits = model(inputs)
        loss = cross_entropy(logits, targets)
        return Outcome(loss, jnp.zeros_like(loss), logits, None, memory)

    def __call__(
        self,
        model: EquilibriumModel,
        inputs: PyTree,
        targets: jax.Array,
        *,
        step: jax.Array,
        sample_at: tuple[int, ...] = (),
        sample_gradient: GradientPolicy | None = None,
        probe: BackwardProbe | None = None,
    ) -> Outcome:
        """One pass in training.

        Args:
            model: the network in training mode.
            inputs: what the network takes.
            targets: `[B]` classes, or `[B, L]`.
            step: number of the step; all that is random depends on it and the seed.
            sample_at: evaluations whose states count.
            sample_gradient: gradient policy of these states.
            probe: where the backward solve reports.
        """
        injection = model.injection(inputs)
        like = model.zeros(injection)
        equation = model.core.equation(injection)
        key = jax.random.fold_in(jax.random.key(self.seed), step)
        start_key, jacobian_key = jax.random.split(key)
        z0 = self._start(model, equation, injection, like, start_key)
        z, stats, *samples = model.core(
            injection,
            z0,
            return_stats=True,
            backward_probe=probe,
            sample_at=sample_at,
            sample_gradient=sample_gradient,
        )

        z = _like(z, like)

        # States along the way are classified by a copy: the running statistics are the answer's.
        aside = nnx.merge(*nnx.split(model), copy=True)

        def loss_of(z: jax.Array) -> jax.Array:
            return cross_entropy(aside.classify(_like(z, like)), targets)

        logits = model.classify(z)
        loss = cross_entropy(logits, targets)
        extra = jnp.zeros_like(loss)
        if samples:
            gamma = self.correction_gamma
            extra += gamma * corrected_loss(loss_of, samples[0], gamma)
        if self.start == "learned":
            extra += self.start_weight * initializer_loss(z0, z)
        if self.regularization is not None:
            f, params, given = equation
            extra += self.regularization(f, params, z, given, key=jacobian_key, step=step)
        memory = model.memory(injection, z) if has_memory(inputs) else None
        return Outcome(loss, extra, logits, stats, memory)

    def _start(
        self,
        model: EquilibriumModel,
        equation: tuple[Any, PyTree, PyTree],
        injection: PyTree,
        like: PyTree,
        key: jax.Array,
    ) -> PyTree:
        if self.start == "learned":
            return model.start(injection)
        if self.start == "mixed":
            return mixed_initial(key, like)
        return one_application(*equation, like) if self.start == "cell" else like


def has_memory(inputs: PyTree) -> bool:
    """Whether a network's input is a segment with memory."""
    return isinstance(inputs, Segment) and inputs.memory is not None


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all that is predicted."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _like(z: PyTree, like: PyTree) -> PyTree:
    """The state in the dtypes of another: a solve may be in a lower precision."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), z, like)
