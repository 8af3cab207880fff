"""The training step and the evaluation of a network, as pure functions of split NNX state."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from deq_jax import BackwardProbe
from deq_jax.models.sequence import Segment
from experiments.train import devices
from experiments.train.objective import Objective
from experiments.train.stability import Phase
from experiments.train.totals import Totals

PyTree = Any
Metrics = dict[str, jax.Array]
StopRequested = Callable[[], bool]


class Batch(NamedTuple):
    """Examples of one step, as they are kept in memory.

    Attributes:
        inputs: `[B, ...]`: images `[B, H, W, C]` uint8, or tokens `[B, L]` int32.
        targets: `[B]` int32 classes, or `[B, L]` where each position is to predict one.
        first: boolean `[B]`: the sequence begins here, and what is in memory is of another. None
            where nothing is carried from batch to batch.
    """

    inputs: np.ndarray | jax.Array
    targets: np.ndarray | jax.Array
    first: np.ndarray | jax.Array | None = None


CountedBatch = tuple[Batch, np.ndarray]
"""A batch, and which of its targets count, booleans of their shape."""


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
    memory: PyTree = None


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
NumberedTrainStep = Callable[[TrainState, Batch, int], tuple[TrainState, Metrics]]


def split_model(model: nnx.Module) -> tuple[Any, PyTree, PyTree]:
    """The model as its static definition, the values of its parameters and all other values."""
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    return definition, nnx.as_pure(params), nnx.as_pure(rest)


def cosine_schedule(
    learning_rate: float, final: float, steps: int, warmup: int = 0
) -> optax.Schedule:
    """Cosine decay per step from `learning_rate` to `final` at step `steps`.

    Before it, in the first `warmup` of the steps, the rate rises linearly from almost 0.
    """
    decay = optax.cosine_decay_schedule(
        learning_rate, max(1, steps - warmup), alpha=final / learning_rate
    )
    if not warmup:
        return decay
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def initial_state(
    params: PyTree,
    rest: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    solves: bool,
    probes: bool,
    memory: PyTree = None,
) -> TrainState:
    """The state before the first step; `solves` and `probes` as for `make_train_step`."""
    return TrainState(
        params=params,
        rest=rest,
        optimizer_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        totals=Totals.zeros(solves=solves, gradients=probes),
        memory=memory,
    )


def unchanged(inputs: jax.Array) -> jax.Array:
    """For networks that take what is kept in memory as it is."""
    return inputs


def _given(
    prepare: Callable[[jax.Array], jax.Array], batch: Batch, memory: PyTree
) -> jax.Array | Segment:
    """What the network is called with."""
    inputs = prepare(batch.inputs)
    if memory is None:
        return inputs
    if batch.first is not None:
        # Zeros are the memory of nothing, for every kind of memory.
        first = batch.first

        def cleared(leaf: jax.Array) -> jax.Array:
            return jnp.where(first.reshape(first.shape + (1,) * (leaf.ndim - 1)), 0, leaf)

        memory = jax.tree.map(cleared, memory)
    return Segment(inputs, memory)


def make_train_step(
    definition: Any,
    optimizer: optax.GradientTransformation,
    *,
    prepare: Callable[[jax.Array], jax.Array] = unchanged,
    objective: Objective,
    phase: Phase | None,
    probes: bool,
    mesh: Mesh | None = None,
) -> TrainStep:
    """A jitted training step, which uses up (donates) the state it is given.

    The loss is the mean cross-entropy of the batch and what `objective` adds. Besides the gradient
    of the parameters the step takes that of a `BackwardProbe`, which is how the backward solve
    reports.

    Args:
        definition: the model's definition in training mode, from `split_model`.
        optimizer: the optimiser.
        prepare: makes of a batch's inputs what the network takes.
        objective: the loss.
        phase: how its layer is solved, as it is in `definition`; None for a model without a solver.
        probes: its gradient is one that can report on its backward solve.
        mesh: devices over which the batch is split, see `devices.provide`.

    Returns:
        `train_step(state, batch) -> (state, metrics)`; metrics are `loss` and `accuracy` of this
        batch. The state's totals remember the first step whose loss or gradient is not finite.
    """

    def loss_of(params, probe, rest, memory, batch, step):
        # A copy: the batch statistics that the call updates are to be those of this trace level.
        model = nnx.merge(definition, params, rest, copy=True)
        inputs = _given(prepare, batch, memory)
        if phase is None:
            outcome = objective.plain(model, inputs, batch.targets)
        else:
            outcome = objective(
                model,
                inputs,
                batch.targets,
                step=step,
                sample_at=phase.sample_at,
                sample_gradient=phase.sample_gradient,
                probe=probe,
            )
        _, _, rest = split_model(model)
        return outcome.loss + outcome.extra, (outcome, rest)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        size = batch.targets.size
        probe = BackwardProbe.zeros(batch.targets.shape[0]) if probes else None
        (loss, (outcome, rest)), (gradient, report) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(state.params, probe, state.rest, state.memory, batch, state.step)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        correct = outcome.logits.argmax(-1) == batch.targets
        counted = phase is not None and phase.reports
        totals = state.totals.add(
            outcome.loss * size,
            correct,
            jnp.ones(batch.targets.shape, bool),
            outcome.stats if counted else None,
            report,
            extra=outcome.extra * size,
        )
        totals = totals.note_step(state.step, jnp.isfinite(loss + optax.tree.norm(gradient)))
        state = TrainState(
            params=optax.apply_updates(state.params, updates),
            rest=rest,
            optimizer_state=optimizer_state,
            step=state.step + 1,
            totals=totals,
            memory=outcome.memory,
        )
        return state, {"loss": outcome.loss, "accuracy": correct.mean()}

    return devices.jit(train_step, ("same", "batch"), mesh)


class Phased:
    """A training step that is another compiled function in each phase.

    `train_step(state, batch, number)`; the choice is made in Python, by `number`.

    Args:
        make: the step of a phase; called once for each phase that comes up.
        phase_at: number of a step -> its phase.
    """

    def __init__(
        self, make: Callable[[Phase | None], TrainStep], phase_at: Callable[[int], Phase | None]
    ):
        self._make = functools.cache(make)
        self._phase_at = phase_at

    def __call__(self, state: TrainState, batch: Batch, number: int) -> tuple[TrainState, Metrics]:
        """Takes the step with that number."""
        return self.compiled(number)(state, batch)

    def compiled(self, number: int) -> TrainStep:
        """The jitted function of the step with that number."""
        return self._make(self._phase_at(number))


class Evaluator:
    """Loss and accuracy over a whole split, each example counted exactly once.

    Args:
        definition: the model's definition in evaluation mode, from `split_model`.
        prepare: makes of a batch's inputs what the network takes.
        solves: the model is a DEQ and returns statistics of its solve.
        memory: `memory(size)` is the memory before the first of a split's batches, of that size;
            None for a model without memory.
        mesh: devices over which the batches are split; their number divides the size of each.
    """

    def __init__(
        self,
        definition: Any,
        *,
        prepare: Callable[[jax.Array], jax.Array] = unchanged,
        solves: bool,
        memory: Callable[[int], PyTree] = lambda size: None,
        mesh: Mesh | None = None,
    ):
        self._solves = solves
        self._memory = memory

        def evaluate_batch(carry, params, rest, batch, counts):
            totals, memory = carry
            model = nnx.merge(definition, params, rest, copy=True)
            options = {"return_stats": True} if solves else {}
            if memory is not None:
                options["return_memory"] = True
            returned = model(_given(prepare, batch, memory), **options)
            returned = list(returned) if options else [returned]
            logits = returned.pop(0)
            stats = returned.pop(0) if solves else None
            memory = returned.pop() if returned else None
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
            loss = jnp.where(counts, losses, 0).sum()
            correct = logits.argmax(-1) == batch.targets
            return totals.add(loss, correct, counts, stats, None), memory

        arguments = ("same", "same", "same", "batch", "batch")
        self._evaluate_batch = devices.jit(evaluate_batch, arguments, mesh)

    def __call__(
        self,
        state: TrainState,
        batches: Iterable[CountedBatch],
        stop: StopRequested = lambda: False,
    ) -> Totals | None:
        """Totals over the batches, all of one size; None if `stop` asked to give up on the way."""
        totals, memory = Totals.zeros(solves=self._solves, gradients=False), None
        for number, (batch, counts) in enumerate(batches):
            if stop():
                return None
            if number == 0:
                memory = self._memory(len(batch.inputs))
            carry = totals, memory
            totals, memory = self._evaluate_batch(carry, state.params, state.rest, batch, counts)
        return jax.device_get(totals)
