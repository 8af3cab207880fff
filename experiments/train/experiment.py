"""A run with all its parts, put together from a network, its data and its settings."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from experiments.train import advice, devices, training
from experiments.train.config import TrainingConfig
from experiments.train.loop import Task
from experiments.train.objective import Objective
from experiments.train.stability import Phase, Schedule
from experiments.train.totals import Record

PyTree = Any


class Dataset(Protocol):
    """What is trained on; any type that has these.

    Attributes:
        name: name of the data set.
        evaluation_name: what the examples are that are reported on, such as `test`.
    """

    name: str
    evaluation_name: str

    def checksum(self) -> int:
        """A number that tells it from other data."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A run with all its parts.

    Attributes:
        config: its settings.
        dataset: its data.
        model: the network as it was initialised, in training mode.
        evaluation_definition: definition of the trained network in evaluation mode.
        task: what the training loop needs.
        state: the state before the first step; used up by the first step.
        mesh: the devices it is trained on; None for one.
    """

    config: Any
    dataset: Any
    model: Any
    evaluation_definition: nnx.GraphDef
    task: Task
    state: training.TrainState
    mesh: Mesh | None


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


def assemble(
    config: TrainingConfig,
    dataset: Dataset,
    model: Any,
    *,
    steps_per_epoch: int,
    batches: Callable[[int, int], Iterator[training.Batch]],
    evaluation: Callable[[], Iterable[training.CountedBatch]],
    schedule: optax.Schedule,
    optimizer: optax.GradientTransformation,
    prepare: Callable[[jax.Array], jax.Array] = training.unchanged,
    memory: Callable[[int], PyTree] = lambda size: None,
    further: Callable[[Record], Record] = lambda record: {},
) -> Experiment:
    """Puts together what is trained and how.

    Args:
        config: the settings.
        dataset: the data.
        model: the network, in training mode. With `config.is_deq` it has a layer `core`.
        steps_per_epoch: steps in an epoch.
        batches: as for `Task`.
        evaluation: the batches to report on, all of one size.
        schedule: learning rate at a step, for the report.
        optimizer: the optimiser.
        prepare: makes of a batch's inputs what the network takes.
        memory: `memory(size)` is what a network with memory starts a batch of that size with.
        further: figures to report that follow from those of an evaluation.
    """
    mesh = devices.provide(config.devices)
    phases = None
    if config.is_deq:
        solver, gradient = config.forward_solver(), config.gradient_policy()
        steps = config.epochs * steps_per_epoch
        phases = Schedule(config, solver, gradient, steps, config.seed)
    objective = Objective(
        config.seed,
        config.regularization(),
        config.correction_gamma,
        config.start,
        config.start_weight,
    )

    def make_step(phase: Phase | None) -> training.TrainStep:
        return training.make_train_step(
            definition_of(model, phase, training=True),
            optimizer,
            prepare=prepare,
            objective=objective,
            phase=phase,
            probes=config.reports_backward and phase.reports,
            mesh=mesh,
        )

    @functools.cache
    def evaluator(phase: Phase | None) -> training.Evaluator:
        return training.Evaluator(
            definition_of(model, phase, training=False),
            prepare=prepare,
            solves=phase is not None and phase.reports,
            memory=memory,
            mesh=mesh,
        )

    def evaluate(state: training.TrainState, stop: training.StopRequested) -> Record | None:
        phase = phases and phases.evaluation(int(state.step))
        totals = evaluator(phase)(state, evaluation(), stop)
        if totals is None:
            return None
        name = dataset.evaluation_name
        record = totals.record(name)
        return record | further(record) | totals.solver_record(f"{name}_")

    limits = advice.Limits(converged=config.warn_converged)
    backward_tol = config.tol if config.backward_tol is None else config.backward_tol
    tolerances = {"forward": config.tol, "backward": backward_tol}
    approximate = config.gradient in ("one_step", "neumann")

    def troubles(record: Record) -> list[advice.Trouble]:
        return advice.of_record(
            record,
            limits,
            tolerances=tolerances,
            approximate=approximate,
            solver=config.solver,
            backward_solver=config.backward_solver,
        )

    task = Task(
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        batches=batches,
        train_step=training.Phased(make_step, phases.training if phases else lambda number: None),
        evaluate=evaluate,
        evaluate_every=config.eval_every,
        schedule=schedule,
        troubles=troubles,
    )
    # The optimiser's state is made from copies: the model keeps its arrays when the first step
    # donates those of the state.
    _, params, rest = training.split_model(model)
    params, rest = jax.tree.map(lambda leaf: leaf.copy(), (params, rest))
    state = training.initial_state(
        params,
        rest,
        optimizer,
        solves=config.is_deq,
        probes=config.reports_backward,
        memory=memory(config.batch_size),
    )
    state = devices.replicate(state, mesh)
    final = definition_of(model, phases and phases.evaluation(0), training=False)
    return Experiment(config, dataset, model, final, task, state, mesh)
