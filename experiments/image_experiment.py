"""What `experiments.image_classification` trains: a network, its optimiser, its steps."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from experiments.common import advice, devices, training
from experiments.common.data import ImageDataset
from experiments.common.errors import UsageError
from experiments.common.loop import Task
from experiments.common.objective import Objective
from experiments.common.splits import epoch_order
from experiments.common.stability import Phase, Schedule
from experiments.common.totals import Record
from experiments.image_config import Config

Model = ConvDEQ | WeightTiedConvNet | ExplicitConvNet


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


def definition_of(model: Model, phase: Phase | None, *, training: bool) -> nnx.GraphDef:
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

    config: Config
    dataset: ImageDataset
    model: Model
    evaluation_definition: nnx.GraphDef
    task: Task
    state: training.TrainState
    mesh: Mesh | None


def prepare(config: Config, dataset: ImageDataset) -> Experiment:
    """Builds the network, the optimiser and the steps.

    Raises:
        UsageError: a flag does not fit the data or the machine; the message names it.
    """
    mesh = devices.provide(config.devices)
    config.check_image(dataset.image_shape)
    steps_per_epoch = len(dataset.train) // config.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"--batch-size must be at most the {len(dataset.train)} training examples, "
            f"got {config.batch_size}"
        )
    model = build_model(config, dataset)
    steps = config.epochs * steps_per_epoch
    learning_rate = training.cosine_schedule(
        config.learning_rate, config.final_learning_rate, steps
    )
    optimizer = optax.adam(learning_rate)
    phases = None
    if config.is_deq:
        solver, gradient = config.forward_solver(), config.gradient_policy()
        phases = Schedule(config, solver, gradient, steps, config.seed)
    objective = Objective(
        config.seed,
        config.regularization(),
        config.correction_gamma,
        config.start,
        config.start_weight,
    )
    white = dataset.white

    def make_step(phase: Phase | None) -> training.TrainStep:
        return training.make_train_step(
            definition_of(model, phase, training=True),
            optimizer,
            white=white,
            objective=objective,
            phase=phase,
            probes=config.reports_backward and phase.reports,
            mesh=mesh,
        )

    @functools.cache
    def evaluator(phase: Phase | None) -> training.Evaluator:
        return training.Evaluator(
            definition_of(model, phase, training=False),
            white=white,
            solves=phase is not None and phase.reports,
            batch_size=config.eval_batch_size,
            mesh=mesh,
        )

    def batches(epoch: int, position: int) -> Iterator[training.Batch]:
        order = epoch_order(config.seed, epoch, len(dataset.train))
        for step in range(position, steps_per_epoch):
            taken = dataset.train.take(order[step * config.batch_size :][: config.batch_size])
            yield training.Batch(taken.images, taken.labels)

    def evaluate(state: training.TrainState, stop: training.StopRequested) -> Record | None:
        phase = phases and phases.evaluation(int(state.step))
        totals = evaluator(phase)(state, dataset.evaluation, stop)
        if totals is None:
            return None
        name = dataset.evaluation_name
        return totals.record(name) | totals.solver_record(f"{name}_")

    limits = advice.Limits(converged=config.warn_converged)
    tolerances = {"forward": config.tol, "backward": config.backward_tol or config.tol}
    approximate = config.gradient in ("one_step", "neumann")

    def troubles(record: Record) -> list[advice.Trouble]:
        return advice.of_record(record, limits, tolerances=tolerances, approximate=approximate)

    task = Task(
        epochs=config.epochs,
        steps_per_epoch=steps_per_epoch,
        batches=batches,
        train_step=training.phased(make_step, phases.training if phases else lambda number: None),
        evaluate=evaluate,
        evaluate_every=config.eval_every,
        schedule=learning_rate,
        troubles=troubles,
    )
    # The optimiser's state is made from copies: the model keeps its arrays when the first step
    # donates those of the state.
    _, params, rest = training.split_model(model)
    params, rest = jax.tree.map(lambda leaf: leaf.copy(), (params, rest))
    reports = {"solves": config.is_deq, "probes": config.reports_backward}
    state = training.initial_state(params, rest, optimizer, **reports)
    state = devices.replicate(state, mesh)
    final = definition_of(model, phases and phases.evaluation(0), training=False)
    return Experiment(config, dataset, model, final, task, state, mesh)
