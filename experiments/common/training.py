"""The training step and the evaluation of a classifier, as pure functions of split NNX state."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from deq_jax import BackwardProbe
from experiments.common import devices
from experiments.common.data import Images
from experiments.common.objective import Objective
from experiments.common.stability import Phase
from experiments.common.totals import Totals

PyTree = Any
Metrics = dict[str, jax.Array]
StopRequested = Callable[[], bool]


class Batch(NamedTuple):
    """Images and labels of one step.

    Attributes:
        images: `[B, H, W, C]` uint8.
        labels: `[B]` int32.
    """

    images: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


class TrainState(NamedTuple):
    """All that a training step changes; a checkpoint of it is enough to go on from.

    Attributes:
        params: the model's `nnx.Param` values.
        rest: all its other values: batch statistics, random streams.
        optimizer_state: state of the optax optimiser.
        step: int32, steps taken.
        totals: sums over the epoch so far.
    """

    params: PyTree
    rest: PyTree
    optimizer_state: PyTree
    step: jax.Array
    totals: Totals


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
NumberedTrainStep = Callable[[TrainState, Batch, int], tuple[TrainState, Metrics]]


def split_model(model: nnx.Module) -> tuple[Any, PyTree, PyTree]:
    """The model as its static definition, the values of its parameters and all other values."""
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    return definition, nnx.as_pure(params), nnx.as_pure(rest)


def cosine_schedule(learning_rate: float, final: float, steps: int) -> optax.Schedule:
    """Cosine decay per step from `learning_rate` to `final` at step `steps`."""
    return optax.cosine_decay_schedule(learning_rate, steps, alpha=final / learning_rate)


def initial_state(
    params: PyTree,
    rest: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    solves: bool,
    probes: bool,
) -> TrainState:
    """The state before the first step; `solves` and `probes` as for `make_train_step`."""
    return TrainState(
        params=params,
        rest=rest,
        optimizer_state=optimizer.init(params),
        step=jnp.zeros((), jnp.int32),
        totals=Totals.zeros(solves=solves, gradients=probes),
    )


def to_float(images: jax.Array, white: int) -> jax.Array:
    """Images as float32 with `white` scaled to 1."""
    return images.astype(jnp.float32) / white


def make_train_step(
    definition: Any,
    optimizer: optax.GradientTransformation,
    *,
    white: int,
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
        white: pixel value that becomes 1.
        objective: the loss.
        phase: how its layer is solved, as it is in `definition`; None for a model without a solver.
        probes: its gradient is one that can report on its backward solve.
        mesh: devices over which the batch is split, see `devices.provide`.

    Returns:
        `train_step(state, batch) -> (state, metrics)`; metrics are `loss` and `accuracy` of this
        batch. The state's totals remember the first step whose loss or gradient is not finite.
    """

    def loss_of(params, probe, rest, batch, step):
        # A copy: the batch statistics that the call updates are to be those of this trace level.
        model = nnx.merge(definition, params, rest, copy=True)
        images = to_float(batch.images, white)
        if phase is None:
            outcome = objective.plain(model, images, batch.labels)
        else:
            outcome = objective(
                model,
                images,
                batch.labels,
                step=step,
                sample_at=phase.sample_at,
                sample_gradient=phase.sample_gradient,
                probe=probe,
            )
        _, _, rest = split_model(model)
        return outcome.loss + outcome.extra, (outcome, rest)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        size = batch.labels.shape[0]
        probe = BackwardProbe.zeros(size) if probes else None
        (loss, (outcome, rest)), (gradient, report) = jax.value_and_grad(
            loss_of, argnums=(0, 1), has_aux=True
        )(state.params, probe, state.rest, batch, state.step)
        updates, optimizer_state = optimizer.update(gradient, state.optimizer_state, state.params)
        correct = outcome.logits.argmax(-1) == batch.labels
        counted = phase is not None and phase.reports
        totals = state.totals.add(
            outcome.loss * size,
            correct,
            jnp.ones(size, bool),
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
        )
        return state, {"loss": outcome.loss, "accuracy": correct.mean()}

    return devices.jit(train_step, ("same", "batch"), mesh)


def phased(
    make: Callable[[Phase | None], TrainStep], phase_at: Callable[[int], Phase | None]
) -> NumberedTrainStep:
    """A training step that is another compiled function in each phase.

    Args:
        make: the step of a phase; called once for each phase that comes up.
        phase_at: number of a step -> its phase.

    Returns:
        `train_step(state, batch, number)`. The choice is made in Python, by `number`.
    """
    made = functools.cache(make)
    return lambda state, batch, number: made(phase_at(number))(state, batch)


class Evaluator:
    """Loss and accuracy over a whole split, each example counted exactly once.

    The last batch is filled up with repeated examples that do not count, so that one compiled
    function serves all batches. They repeat examples of the same batch: a sample's solve does not
    depend on its batch mates, hence even the batch's number of evaluations stays what it was.

    Args:
        definition: the model's definition in evaluation mode, from `split_model`.
        white: pixel value that becomes 1.
        solves: the model is a DEQ and returns statistics of its solve.
        batch_size: examples in a batch.
        mesh: devices over which the batch is split; their number divides `batch_size`.
    """

    def __init__(
        self,
        definition: Any,
        *,
        white: int,
        solves: bool,
        batch_size: int,
        mesh: Mesh | None = None,
    ):
        self._batch_size = batch_size
        self._devices = 1 if mesh is None else mesh.size
        self._solves = solves

        def evaluate_batch(totals, params, rest, batch, counts):
            model = nnx.merge(definition, params, rest, copy=True)
            images = to_float(batch.images, white)
            stats = None
            if solves:
                logits, stats = model(images, return_stats=True)
            else:
                logits = model(images)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
            loss = jnp.where(counts, losses, 0).sum()
            correct = logits.argmax(-1) == batch.labels
            return totals.add(loss, correct, counts, stats, None)

        arguments = ("same", "same", "same", "batch", "batch")
        self._evaluate_batch = devices.jit(evaluate_batch, arguments, mesh)

    def __call__(
        self, state: TrainState, examples: Images, stop: StopRequested = lambda: False
    ) -> Totals | None:
        """Totals over `examples`; None if `stop` asked to give up on the way."""
        totals = Totals.zeros(solves=self._solves, gradients=False)
        size = min(self._batch_size, len(examples))
        size += -size % self._devices
        for start in range(0, len(examples), size):
            if stop():
                return None
            count = min(size, len(examples) - start)
            taken = examples.take(start + np.arange(size) % count)
            batch = Batch(taken.images, taken.labels)
            counts = np.arange(size) < count
            totals = self._evaluate_batch(totals, state.params, state.rest, batch, counts)
        return jax.device_get(totals)
