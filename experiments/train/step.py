"""One training step and one batch of an evaluation, as pure functions of split NNX state.

This is the file to read, and to change, for another loss.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import BackwardProbe, SolveStats
from deq_jax.models.sequence import Segment
from deq_jax.stability import corrected_loss, initializer_loss, mixed_initial, one_application
from experiments.data import Batch
from experiments.train import metrics
from experiments.train.config import Stability, TrainingConfig
from experiments.train.metrics import Totals
from experiments.train.phases import Phase

PyTree = Any


class TrainState(NamedTuple):
    """All that a training step changes; a checkpoint of it is enough to go on from.

    Attributes:
        params: the model's `nnx.Param` values.
        rest: all its other values: batch statistics, random streams.
        optimizer_state: state of the optax optimiser.
        step: int32, steps taken.
        totals: sums over the epoch so far.
        memory: of the segments before, for a sequence model that has some; else None.
    """

    params: PyTree
    rest: PyTree
    optimizer_state: PyTree
    step: jax.Array
    totals: Totals
    memory: PyTree


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]


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
    definition: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    phase: Phase | None,
    mesh: Mesh | None,
    white: int,
) -> TrainStep:
    """A jitted training step, which uses up (donates) the state it is given.

    Besides the gradient of the parameters the step takes that of a `BackwardProbe`, which is how
    the backward solve reports. The state's totals remember the first step whose loss or gradient
    is not finite.

    Args:
        config: the settings.
        definition: the model in training mode, its layer solved as in the phase.
        optimizer: the optimiser.
        phase: how its layer is solved; None for a model without a solver.
        mesh: devices over which the batch is split; None for one device.
        white: value of a white pixel, for images.

    Returns:
        `train_step(state, batch) -> (state, loss)`.
    """
    counted = phase is not None and not phase.pretraining

    def loss_of(params, probe, rest, memory, batch, step):
        # A copy: the batch statistics that the call updates are to be those of this trace level.
        model = nnx.merge(definition, params, rest, copy=True)
        inputs = network_inputs(batch, memory, white)
        outcome = forward(config, phase, model, inputs, batch.targets, step, probe)
        _, _, rest = split_model(model)
        return outcome.loss + outcome.extra, (outcome, rest)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        size = batch.targets.size
        reports = counted and config.reports_backward
        probe = BackwardProbe.zeros(len(batch.targets)) if reports else None

        # Forward and backward
        (loss, (outcome, rest)), (gradient, report) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(state.params, probe, state.rest, state.memory, batch, state.step)

        # Update
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        params = optax.apply_updates(state.params, updates)

        # Figures
        correct = outcome.logits.argmax(-1) == batch.targets
        finite = jnp.isfinite(loss + optax.tree.norm(gradient))
        stats = outcome.stats if counted else None
        totals = metrics.batch_totals(outcome.loss * size, correct, batch.counts, stats, report)
        totals["extra"] = outcome.extra * size
        totals["failed"] = jnp.where(finite, metrics.NEVER, state.step)
        totals = metrics.add(state.totals, totals)
        state = TrainState(params, rest, optimizer_state, state.step + 1, totals, outcome.memory)
        return state, outcome.loss

    return jax.jit(train_step, donate_argnums=0, out_shardings=same_on_all(mesh))


def forward(
    config: TrainingConfig,
    phase: Phase | None,
    model: Any,
    inputs: PyTree,
    targets: jax.Array,
    step: jax.Array,
    probe: BackwardProbe | None,
) -> Outcome:
    """One pass in training.

    The loss is the mean cross-entropy of the answer. As far as the settings ask for them,
    `Σ γ^k loss(z_k)` over states along the way, `weight ‖J‖² / D` and `weight |z_0 - z*|` are
    added to it.

    Args:
        config: the settings.
        phase: how the layer is solved; None for a model without a solver.
        model: the network in training mode.
        inputs: what the network takes.
        targets: `[B]` classes, or `[B, L]`.
        step: number of the step; all that is random depends on it and the seed.
        probe: where the backward solve reports.
    """
    remembers = has_memory(inputs)
    if phase is None:
        logits, memory = model(inputs, return_memory=True) if remembers else (model(inputs), None)
        loss = cross_entropy(logits, targets)
        return Outcome(loss, jnp.zeros_like(loss), logits, None, memory)

    # The equilibrium
    tools = config.tools
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    start_key, jacobian_key = jax.random.split(key)
    injection = model.injection(inputs)
    equation, like = model.core.equation(injection), model.zeros(injection)
    z0 = _start(tools, model, equation, injection, like, start_key)
    z, stats, *samples = model.core(
        injection,
        z0,
        return_stats=True,
        backward_probe=probe,
        sample_at=phase.sample_at,
        sample_gradient=phase.sample_gradient,
    )
    z = cast_like(z, like)

    # The answer, and what is added to its loss
    aside = nnx.merge(*nnx.split(model), copy=True)  # the running statistics are the answer's
    logits = model.classify(z)
    loss = cross_entropy(logits, targets)
    extra = jnp.zeros_like(loss)
    if samples:

        def loss_of(z: PyTree) -> jax.Array:
            return cross_entropy(aside.classify(cast_like(z, like)), targets)

        gamma = tools.correction_gamma
        extra += gamma * corrected_loss(loss_of, samples[0], gamma)
    if tools.start == "learned":
        extra += tools.start_weight * initializer_loss(z0, z)
    if tools.jacobian.weight or tools.jacobian.increment:
        f, params, x = equation
        extra += tools.jacobian(f, params, z, x, key=jacobian_key, step=step)
    memory = model.memory(injection, z) if remembers else None
    return Outcome(loss, extra, logits, stats, memory)


def _start(
    tools: Stability, model: Any, equation: Any, injection: PyTree, like: PyTree, key: jax.Array
) -> PyTree:
    """Where a training solve starts."""
    if tools.start == "learned":
        return model.start(injection)
    if tools.start == "mixed":
        return mixed_initial(key, like)
    return one_application(*equation, like) if tools.start == "cell" else like


def make_evaluate_batch(
    definition: nnx.GraphDef, phase: Phase | None, mesh: Mesh | None, white: int
) -> Callable[[tuple[Totals, PyTree], PyTree, PyTree, Batch], tuple[Totals, PyTree]]:
    """A jitted `evaluate_batch((totals, memory), params, rest, batch)`, which returns the former.

    Args:
        definition: the model in evaluation mode, its layer solved as in the phase.
        phase: how its layer is solved; None for a model without a solver.
        mesh: devices over which the batch is split; None for one device.
        white: value of a white pixel, for images.
    """
    solves = phase is not None and not phase.pretraining

    def evaluate_batch(carry, params, rest, batch):
        totals, memory = carry
        model = nnx.merge(definition, params, rest, copy=True)
        options = {"return_stats": True} if solves else {}
        if memory is not None:
            options["return_memory"] = True
        returned = model(network_inputs(batch, memory, white), **options)
        returned = list(returned) if options else [returned]
        logits = returned.pop(0)
        stats = returned.pop(0) if solves else None
        memory = returned.pop() if returned else None
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
        loss = jnp.where(batch.counts, losses, 0).sum()
        correct = logits.argmax(-1) == batch.targets
        return metrics.add(totals, metrics.batch_totals(loss, correct, batch.counts, stats)), memory

    return jax.jit(evaluate_batch, donate_argnums=0, out_shardings=same_on_all(mesh))


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


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, PyTree, PyTree]:
    """The model as its static definition, the values of its parameters and all other values."""
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    return definition, nnx.as_pure(params), nnx.as_pure(rest)


def definition_of(model: Any, phase: Phase | None, *, training: bool) -> nnx.GraphDef:
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


def initial_memory(model: Any, size: int) -> PyTree:
    """What the network starts a batch of that size with; None without memory."""
    return model.initial_memory(size) if hasattr(model, "initial_memory") else None


def has_memory(inputs: PyTree) -> bool:
    """Whether a network's input is a segment with memory."""
    return isinstance(inputs, Segment) and inputs.memory is not None


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean over all that is predicted."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def cast_like(z: PyTree, like: PyTree) -> PyTree:
    """The state in the dtypes of another: a solve may be in a lower precision."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), z, like)


def same_on_all(mesh: Mesh | None) -> NamedSharding | None:
    """The sharding of what is whole on every device."""
    return None if mesh is None else NamedSharding(mesh, P())
