"""One training step and one batch of an evaluation, as pure functions of split NNX state.

For another loss, change `metrics.cross_entropy` and what is built on it here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import BackwardProbe, gather_params
from deq_jax.models.sequence import Segment
from deq_jax.partitioning import RULES, partition_specs
from experiments.data import Batch
from experiments.train import metrics, stability
from experiments.train.config import TrainingConfig
from experiments.train.metrics import Outcome, Totals, cross_entropy
from experiments.train.processes import BATCH

PyTree = Any


class TrainState(NamedTuple):
    """All that a training step changes; a checkpoint of it is enough to go on from.

    Attributes:
        params: the model's `nnx.Param` values.
        rest: all its other values: batch statistics, random streams.
        optimizer_state: state of the optax optimiser.
        step: int32, steps taken.
        totals: sums over the epoch so far.
        memory: state carried over from the previous segment; None for models without memory.
    """

    params: PyTree
    rest: PyTree
    optimizer_state: PyTree
    step: jax.Array
    totals: Totals
    memory: PyTree


def initial_state(
    config: TrainingConfig, model: nnx.Module, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    # Copies: the model keeps its arrays when the first step donates those of the state.
    _, params, rest = split_model(model)
    params, rest = jax.tree.map(lambda leaf: leaf.copy(), (params, rest))
    return TrainState(
        params=params,
        rest=rest,
        optimizer_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        totals=metrics.zeros(forward=config.is_deq, backward=config.reports_backward),
        memory=initial_memory(model, config.batch_size),
    )


def make_train_step(
    config: TrainingConfig,
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    phase: stability.Phase | None,
    mesh: Mesh | None,
    white: int,
) -> Callable[..., tuple[TrainState, jax.Array]]:
    """A jitted training step, which uses up (donates) the state it is given.

    Besides the gradient of the parameters the step takes that of a `BackwardProbe`, which is how
    the backward solve reports. The state's totals remember the first step whose loss or gradient
    is not finite.

    Args:
        config: the settings.
        model: the network; stays as it is.
        optimizer: the optimiser.
        phase: how its layer is solved with `stability:on`; None otherwise.
        mesh: devices over which the batch is split; None for one device.
        white: value of a white pixel, for images.

    Returns:
        `train_step(state, batch, limits=None) -> (state, loss)`, with the limits of the phase.
    """
    definition = definition_of(model, phase, training=True)
    counted = config.is_deq and not (phase and phase.pretraining)

    def loss_of(params, probe, rest, memory, batch, step, limits):
        # A copy: otherwise the call would write tracers into the outer model.
        model = nnx.merge(definition, _whole(params, mesh), rest, copy=True)
        inputs = network_inputs(batch, memory, white)
        if phase is None:
            outcome = forward(config, model, inputs, batch.targets, probe)
        else:
            outcome = stability.forward(
                config, phase, model, inputs, batch.targets, probe, step, limits
            )
        _, _, rest = split_model(model)
        return outcome.loss + outcome.extra, (outcome, rest)

    def train_step(
        state: TrainState, batch: Batch, limits: stability.Limits | None = None
    ) -> tuple[TrainState, jax.Array]:
        # Forward and backward
        reports = counted and config.reports_backward
        probe = BackwardProbe.zeros(len(batch.targets)) if reports else None
        differentiate = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
        (loss, (outcome, rest)), (gradient, report) = differentiate(
            state.params, probe, state.rest, state.memory, batch, state.step, limits
        )

        # Update
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if hasattr(model, "project"):  # some cells have guarantees for weights in a set
            params = model.project(params)

        # Figures
        size = batch.targets.size
        correct = outcome.logits.argmax(-1) == batch.targets
        finite = jnp.isfinite(loss + optax.tree.norm(gradient))
        stats = outcome.stats if counted else None
        totals = metrics.batch_totals(outcome.loss * size, correct, batch.counts, stats, report)
        totals["extra"] = outcome.extra * size
        totals["failed"] = jnp.where(finite, metrics.NEVER, state.step)
        totals = metrics.add(state.totals, totals)
        state = TrainState(params, rest, optimizer_state, state.step + 1, totals, outcome.memory)
        return state, outcome.loss

    out = (
        None
        if mesh is None
        else (state_shardings(model, optimizer, mesh), NamedSharding(mesh, P()))
    )
    return jax.jit(train_step, donate_argnums=0, out_shardings=out)


def forward(
    config: TrainingConfig,
    model: Any,
    inputs: PyTree,
    targets: jax.Array,
    probe: BackwardProbe | None = None,
) -> Outcome:
    """One pass; the loss is the mean cross-entropy.

    Args:
        config: the settings.
        model: the network.
        inputs: the network's input.
        targets: `[B]` classes, or `[B, L]`.
        probe: a dummy input whose cotangent is the report of the backward solve.
    """
    options: dict[str, Any] = {}
    if config.is_deq:
        options = {"return_stats": True, "backward_probe": probe}
    if isinstance(inputs, Segment):
        options["return_memory"] = True
    returned = model(inputs, **options)
    logits, *others = returned if options else (returned,)
    stats = others.pop(0) if config.is_deq else None
    memory = others.pop(0) if others else None
    loss = cross_entropy(logits, targets)
    return Outcome(loss, jnp.zeros_like(loss), logits, stats, memory)


def make_evaluate_batch(
    config: TrainingConfig,
    model: nnx.Module,
    phase: stability.Phase | None,
    mesh: Mesh | None,
    white: int,
) -> Callable[..., tuple[Totals, PyTree]]:
    """A jitted function that adds a batch to totals: `((totals, memory), params, rest, batch)`.

    Args:
        config: the settings.
        model: the network; stays as it is.
        phase: how its layer is solved with `stability:on`; None otherwise.
        mesh: devices over which the batch is split; None for one device.
        white: value of a white pixel, for images.
    """
    definition = definition_of(model, phase, training=False)
    counted = config.is_deq and not (phase and phase.pretraining)

    def evaluate_batch(carry, params, rest, batch):
        totals, memory = carry
        model = nnx.merge(definition, _whole(params, mesh), rest, copy=True)
        inputs = network_inputs(batch, memory, white)
        _, _, logits, stats, memory = forward(config, model, inputs, batch.targets)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        loss = jnp.where(batch.counts, losses, 0).sum()
        correct = logits.argmax(-1) == batch.targets
        stats = stats if counted else None
        batch_totals = metrics.batch_totals(loss, correct, batch.counts, stats)
        return metrics.add(totals, batch_totals), memory

    out = None if mesh is None else (NamedSharding(mesh, P()), NamedSharding(mesh, BATCH))
    return jax.jit(evaluate_batch, donate_argnums=0, out_shardings=out)


def network_inputs(batch: Batch, memory: PyTree, white: int) -> jax.Array | Segment:
    """What the network is called with: images from 0 to 1, tokens, or tokens and a memory."""
    inputs = jnp.asarray(batch.inputs)
    if inputs.dtype == jnp.uint8:
        inputs = inputs.astype(jnp.float32) / white
    if memory is None:
        return inputs
    if batch.first is not None:
        first = jnp.asarray(batch.first)

        # Zeros are the memory of nothing, for every kind of memory.
        def cleared(leaf: jax.Array) -> jax.Array:
            return jnp.where(first.reshape(first.shape + (1,) * (leaf.ndim - 1)), 0, leaf)

        memory = jax.tree.map(cleared, memory)
    return Segment(inputs, memory)


def initial_memory(model: Any, size: int) -> PyTree:
    """What the network starts a batch of that size with; None without memory."""
    return model.initial_memory(size) if hasattr(model, "initial_memory") else None


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """The model as its static definition, the values of its parameters and all other values."""
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    return definition, nnx.as_pure(params), nnx.as_pure(rest)


def definition_of(model: Any, phase: stability.Phase | None, *, training: bool) -> nnx.GraphDef:
    """The network's definition with its layer solved as in a phase; the network stays as it is."""
    model.train() if training else model.eval()
    if phase is None:
        definition = nnx.graphdef(model)
    else:
        core = model.core
        own = core.solver, core.gradient
        core.solver, core.gradient = phase.solver, phase.gradient
        definition = nnx.graphdef(model)
        core.solver, core.gradient = own
    model.train()
    return definition


def state_shardings(
    model: nnx.Module, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Where the state of a training is held: a sharding for each part of it, or each array.

    Parameters are split over the axes `fsdp` and `tensor` as `deq_jax.partitioning.RULES` say. The
    optimiser's moments are where their parameters are, and a memory is split like the batch.
    """
    whole = NamedSharding(mesh, P())
    rules = {}
    for axis in ("fsdp", "tensor"):
        rules |= RULES[axis] if mesh.shape[axis] > 1 else {}
    specs = nnx.as_pure(partition_specs(nnx.state(model, nnx.Param), mesh, rules))
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    optimizer_state = optax.tree.map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, split_model(model)[1]),
        params,
        transform_non_params=lambda _: whole,
    )
    memory = NamedSharding(mesh, BATCH)
    shardings: Any = (params, whole, optimizer_state, whole, whole, memory)
    return TrainState(*shardings)


def _whole(params: PyTree, mesh: Mesh | None) -> PyTree:
    """The parameters, gathered along `fsdp` once a step, and not wherever they are used."""
    split = mesh is not None and mesh.shape["fsdp"] > 1
    return gather_params(params, "fsdp") if split else params
