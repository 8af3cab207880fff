"""Trains an implicit graph network, or a control, to classify the nodes of a graph.

    python -m experiments.graph_classification --help
    python -m experiments.graph_classification
    python -m experiments.graph_classification cora --data.dir DIR --model monotone
    python -m experiments.graph_classification minesweeper --data.dir DIR --data.split 3
    python -m experiments.graph_classification chains --data.length 100 solver:picard

The first word is a preset: chains (the default, which needs no data), cora, citeseer, chameleon,
squirrel or minesweeper. `--help` lists the settings, and `--help-verbose` explains them.

The whole graph is one step of training. What is reported is the score of the test nodes at the
epoch with the best score of the validation nodes. The folder of the run gets `config.json`,
`metrics.jsonl` (a line per epoch), the parameters of that epoch in `checkpoints/`, and at the end
`result.json`. A run is short, so an interrupted one starts anew.
"""

import dataclasses
import functools
import importlib.metadata
import json
import math
import pathlib
import platform
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro
from flax import nnx

from deq_jax import BackwardProbe, GradientPolicy, Implicit, Picard, Solver, SolveStats, diagnose
from deq_jax.cells.graph import EIGNNCell, Graph, IGNNCell, MonotoneGraphCell
from deq_jax.models.conv_deq import count_parameters
from deq_jax.models.graph import APPNP, GCN, SGC, ImplicitGraphNet
from deq_jax.stability import Limits, summarize
from experiments.data.graphs import GraphDataset, load_graph, make_chains
from experiments.train.config import (
    Amount,
    Count,
    GradientChoice,
    Positive,
    Range,
    Rate,
    Settings,
    Share,
    SolverChoice,
    group,
    parse,
)
from experiments.train.errors import NonFiniteError, UsageError
from experiments.train.metrics import Record
from experiments.train.reporter import reports_errors
from experiments.train.runs import Checkpoints, RunFolder, write_atomically

IMPLICIT = ("ignn", "eignn", "monotone")
"""Models with an equilibrium. The others are controls."""

# ---------------------------------------------------------------------------------------- settings

Switch = Annotated[bool, tyro.conf.FlagConversionOff]
"""`--name True` or `--name False`. A flag `--no-name` shows the default of its opposite."""


@dataclasses.dataclass(frozen=True)
class GraphData(Settings):
    """The graph.

    Attributes:
        name: chains, which are generated, or a graph that is read from DIR/NAME.npz: cora,
            citeseer, chameleon_filtered, squirrel_filtered or minesweeper.
        dir: folder of these files. None: $GRAPH_DATA_DIR or ~/graphs.
        split: number of one of ten splits. None: for cora and citeseer the split of Planetoid, for
            the others split 0.
        directed: let the edges of chains lead away from the first node only. The monotone model
            needs --data.directed False. The graphs that are read have edges without a direction.
        length: nodes of a chain.
        chains: chains of each class. A fifth is trained on, and a fifth is for validation.
        classes: classes of chains.
    """

    prefix = "data."

    name: str = "chains"
    dir: str | None = None
    split: int | None = None
    directed: Switch = False
    length: Count = 10
    chains: Annotated[int, Range(3)] = 20
    classes: Annotated[int, Range(2)] = 2


@dataclasses.dataclass(frozen=True)
class Network(Settings):
    """The network. Each model uses some of these settings.

    Attributes:
        features: width of the state, or of hidden layers.
        dropout: rate of dropout in front of each linear layer.
        normalize: divide each node's state by its length in front of the head (implicit models).
        kappa: bound of the infinity norm of the matrix of ignn.
        gamma: factor of eignn.
        monotonicity: m of the monotone model.
        depth: layers of gcn.
        steps: steps of propagation of appnp and sgc.
        alpha: share of the prediction in each step of appnp.
    """

    prefix = "network."

    features: Count = 32
    dropout: Rate = 0.0
    normalize: Switch = False
    kappa: Rate = 0.95
    gamma: Rate = 0.95
    monotonicity: Share = 0.1
    depth: Count = 2
    steps: Count = 10
    alpha: Share = 0.1


@dataclasses.dataclass(frozen=True)
class RunOptions(Settings):
    """The folder of a run, and what the run shows.

    Attributes:
        dir: folder of the run. With None a folder in runs/.
        fresh: delete the run that is in the folder, and start again.
        progress: show a progress bar.
        warn_below: warn if a smaller share of the solves of 50 epochs converges.
    """

    prefix = "run."
    elastic: ClassVar[bool] = False  # a run has one device

    dir: str | None = None
    fresh: bool = False
    progress: bool = True
    warn_below: Share = 0.5


_SOLVER = Picard(tol=1e-3, max_iter=500)
_GRADIENT = Implicit()
_RUN = RunOptions()


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """The settings.

    Attributes:
        model: ignn, eignn or monotone, which are implicit, or a control: gcn, appnp or sgc.
        epochs: steps of training.
        eval_every: epochs between evaluations.
        lr: learning rate of Adam.
        weight_decay: factor of the L2 penalty on matrices, which is part of the gradient.
        seed: seed of weights, dropout and the split of chains.
        solver: how the equilibrium is found.
        gradient: how gradients pass through it.
        data: the graph.
        network: the network.
    """

    model: Literal["ignn", "eignn", "monotone", "gcn", "appnp", "sgc"] = "ignn"
    epochs: Count = 200
    eval_every: Count = 1
    seed: Annotated[int, Range(0)] = 0
    lr: Positive = 1e-2
    weight_decay: Amount = 5e-4
    solver: SolverChoice = _SOLVER
    gradient: GradientChoice = _GRADIENT
    data: group(GraphData) = GraphData()
    network: group(Network) = Network()
    run: group(RunOptions) = _RUN

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model == "monotone" and self.data.directed:
            raise UsageError("--model monotone needs --data.directed False: its graph is symmetric")
        if self.data.directed and self.data.name != "chains":
            raise UsageError(
                f"--data.directed is for chains; the edges of {self.data.name} have no direction"
            )
        if self.eval_every > self.epochs:
            raise UsageError(
                f"--eval-every must be at most --epochs, {self.epochs}, got {self.eval_every}"
            )

    @property
    def is_deq(self) -> bool:
        """Whether the model has a solver."""
        return self.model in IMPLICIT


_DROPOUT = Config(network=Network(dropout=0.5))
PRESETS = {
    # Information fades on its way, so that the last nodes of a chain ask for a small tolerance.
    "chains": Config(
        data=GraphData(directed=True),
        solver=Picard(tol=1e-6, max_iter=3000),
        network=Network(features=16, normalize=True),
    ),
    "cora": dataclasses.replace(_DROPOUT, data=GraphData("cora")),
    "citeseer": dataclasses.replace(_DROPOUT, data=GraphData("citeseer")),
    "chameleon": dataclasses.replace(_DROPOUT, data=GraphData("chameleon_filtered")),
    "squirrel": dataclasses.replace(_DROPOUT, data=GraphData("squirrel_filtered")),
    "minesweeper": dataclasses.replace(_DROPOUT, data=GraphData("minesweeper")),
}


def parse_arguments(arguments: Sequence[str] | None = None) -> Config:
    """Reads a command line, see `parse`."""
    return parse(cast(Any, PRESETS), "graph_classification", arguments, __doc__)


# ------------------------------------------------------------------------------- data and network


def load_data(data: GraphData, seed: int = 0) -> GraphDataset:
    """The graph. The seed is that of the split of chains."""
    if data.name == "chains":
        return make_chains(
            classes=data.classes,
            chains=data.chains,
            length=data.length,
            directed=data.directed,
            seed=seed,
        )
    return load_graph(data.name, data_dir=data.dir, split=data.split)


def load(config: Config, run: RunFolder) -> tuple[GraphDataset, Any]:
    """The graph and the untrained network of a run; `run` is not looked at.

    The signature is that of the other commands, whose runs keep a vocabulary in their folders.
    """
    del run
    dataset = load_data(config.data, config.seed)
    return dataset, build_model(config, dataset)


def build_model(config: Config, dataset: GraphDataset) -> ImplicitGraphNet | GCN | APPNP | SGC:
    """The network for a graph, initialised by the seed, in training mode."""
    network, rngs = config.network, nnx.Rngs(config.seed, dropout=config.seed + 1)
    sizes = dataset.features.shape[1], dataset.num_classes
    options: dict[str, Any] = {"dropout": network.dropout, "rngs": rngs}
    width = network.features
    try:
        if config.model == "gcn":
            return GCN(*sizes, features=width, depth=network.depth, **options)
        if config.model == "appnp":
            return APPNP(
                *sizes, features=width, steps=network.steps, alpha=network.alpha, **options
            )
        if config.model == "sgc":
            return SGC(*sizes, steps=network.steps, **options)
        cells = {
            "ignn": lambda: IGNNCell(width, kappa=network.kappa, rngs=rngs),
            "eignn": lambda: EIGNNCell(width, gamma=network.gamma, rngs=rngs),
            "monotone": lambda: MonotoneGraphCell(
                width, monotonicity=network.monotonicity, rngs=rngs
            ),
        }
        return ImplicitGraphNet(
            *sizes,
            cell=cells[config.model](),
            normalize=network.normalize,
            solver=config.solver,
            gradient=config.gradient,
            **options,
        )
    except ValueError as error:  # such as --network.kappa 0
        raise UsageError(f"--network does not fit --model {config.model}: {error}") from error


# ---------------------------------------------------------------------------------------- training


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def _adam(learning_rate: jax.Array, weight_decay: jax.Array) -> optax.GradientTransformation:
    """Adam with an L2 penalty on matrices, as in the papers on these graphs."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay, _matrices), optax.adam(learning_rate)
    )


# The rate and the penalty are part of the state, so that a step is compiled once for all of them.
_ADAM = optax.inject_hyperparams(_adam)(learning_rate=0.0, weight_decay=0.0)


@functools.partial(jax.jit, static_argnames=("definition",), donate_argnums=(1,))
def train_step(
    definition: Any,
    state: tuple[Any, Any, Any],
    graph: Graph,
    features: Any,
    labels: jax.Array,
    mask: jax.Array,
) -> tuple[tuple[Any, Any, Any], jax.Array, SolveStats | None, BackwardProbe | None]:
    """One step on the nodes of a mask.

    Returns:
        Parameters, other state and the optimiser's state; the loss, NaN if an update is not finite;
        and the reports of the forward and of the backward solve, None for a control.
    """
    params, rest, moments = state

    def loss(params: Any, probe: BackwardProbe | None) -> tuple[jax.Array, Any]:
        model = nnx.merge(definition, params, rest, copy=True)
        stats = None
        if probe is None:
            logits = model(graph, features)
        else:
            logits, stats = model(graph, features, return_stats=True, backward_probe=probe)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        mean = jnp.where(mask, losses, 0).sum() / mask.sum()
        return mean, (nnx.split(model, nnx.Param, ...)[2], stats)

    model = nnx.merge(definition, params, rest, copy=True)
    probe = BackwardProbe.zeros() if isinstance(model, ImplicitGraphNet) else None
    (value, (rest, stats)), (gradient, report) = jax.value_and_grad(
        loss, argnums=(0, 1), has_aux=True
    )(params, probe)
    updates, moments = _ADAM.update(gradient, moments, params)
    # A solve whose weights are not numbers returns its start, and the loss looks finite.
    value = jnp.where(jnp.isfinite(optax.tree.norm(updates)), value, jnp.nan)
    params = model.project(optax.apply_updates(params, updates))
    return (params, rest, moments), value, stats, report


@functools.partial(jax.jit, static_argnames=("definition",))
def predict(
    definition: Any, params: Any, rest: Any, graph: Graph, features: Any
) -> tuple[jax.Array, SolveStats | None]:
    """Logits `[N, classes]` in evaluation mode, and the report of the solve."""
    model = nnx.merge(definition, params, rest, copy=True)
    model.eval()
    if isinstance(model, ImplicitGraphNet):
        return model(graph, features, return_stats=True)
    return model(graph, features), None


def score(dataset: GraphDataset, logits: np.ndarray, part: str) -> float:
    """Accuracy, or the area under the ROC curve, of the nodes of a part."""
    mask = dataset.masks[part]
    logits, labels = logits[mask], dataset.labels[mask]
    if dataset.metric == "roc_auc":
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(labels, logits[:, 1] - logits[:, 0]))
    return float((logits.argmax(1) == labels).mean())


def fit(config: Config, dataset: GraphDataset) -> tuple[Any, list[Record], Record]:
    """Trains a network.

    Args:
        config: the settings.
        dataset: the graph.

    Returns:
        The parameters of the epoch with the best validation score, a record for each epoch, and
        the result: the scores of that epoch, and figures of all solves.

    Raises:
        NonFiniteError: the loss or an update became NaN or infinite.
    """
    model = build_model(config, dataset)
    definition, params, rest = nnx.split(model, nnx.Param, ...)
    moments = cast(Any, _ADAM.init(params))
    rates = {"learning_rate": config.lr, "weight_decay": config.weight_decay}
    moments.hyperparams.update({name: jnp.float32(rate) for name, rate in rates.items()})
    state = params, rest, moments
    labels, mask = jnp.asarray(dataset.labels), jnp.asarray(dataset.masks["train"])
    arrays = dataset.graph, dataset.features
    history: list[Record] = []
    best, best_params = -math.inf, params
    solves = _Solves(config)
    bar = tqdm.trange(
        config.epochs,
        desc=config.model,
        leave=False,
        disable=not config.run.progress,
        # In a file each refresh is a line.
        mininterval=0.1 if sys.stderr.isatty() else 10.0,
    )
    for epoch in bar:
        started = time.perf_counter()
        state, loss, stats, report = train_step(definition, state, *arrays, labels, mask)
        record: Record = {"epoch": epoch + 1, "train_loss": float(loss)}
        if not math.isfinite(record["train_loss"]):
            raise NonFiniteError(
                f"the loss or an update became NaN or infinite in epoch {epoch + 1}; try a smaller "
                "--lr"
            )
        record |= solves.add(stats, report)
        if (epoch + 1) % config.eval_every == 0:
            logits, _ = predict(definition, state[0], state[1], *arrays)
            logits = np.asarray(logits)
            record |= {
                f"{part}_{dataset.metric}": score(dataset, logits, part) for part in dataset.masks
            }
            validation = record[f"validation_{dataset.metric}"]
            bar.set_postfix(validation=f"{validation:.3f}", refresh=False)
            if validation > best:
                best = validation
                best_params = jax.tree.map(jnp.copy, state[0])  # the state is donated
        record["seconds"] = time.perf_counter() - started
        history.append(record)
        if (epoch + 1) % _DIAGNOSED == 0 or epoch + 1 == config.epochs:
            solves.diagnose()
    evaluated = [record for record in history if f"test_{dataset.metric}" in record]
    chosen = max(evaluated, key=lambda record: record[f"validation_{dataset.metric}"])
    figures = {"last_test": evaluated[-1][f"test_{dataset.metric}"], **solves.figures()}
    return best_params, history, {**chosen, **figures, "parameters": count_parameters(model)}


_DIAGNOSED = 50
"""Epochs whose solves are looked at together."""

_FIGURES = ("iterations", "residual_mean", "residual_worst", "converged", "diverged")
"""What is kept of each solve, under the names that the other commands give to it."""


class _Solves:
    """The reports of all solves of a training.

    Args:
        config: the settings.
    """

    def __init__(self, config: Config):
        self._config = config
        self._reports: list[tuple[SolveStats, BackwardProbe]] = []
        self._told: set[str] = set()

    def add(self, stats: SolveStats | None, report: BackwardProbe | None) -> Record:
        """Keeps the reports of an epoch, and returns its figures; none for a control."""
        if stats is None or report is None:
            return {}
        stats, report = jax.device_get((stats, report))
        self._reports.append((stats, report))
        record: Record = {}
        for name, solve in (("forward", stats), ("backward", report)):
            summary = summarize(solve)
            record |= {f"{name}_{figure}": getattr(summary, figure) for figure in _FIGURES}
        return record

    def diagnose(self) -> None:
        """Prints what is wrong with the latest solves, and what to try, each trouble once."""
        if not self._reports:
            return
        solver: Solver = self._config.solver
        gradient: GradientPolicy = self._config.gradient
        limits = Limits(converged=self._config.run.warn_below)
        stats, report = self._stacked(self._reports[-_DIAGNOSED:])
        for finding in diagnose(stats, report, solver=solver, gradient=gradient, limits=limits):
            if finding.title not in self._told:
                tqdm.tqdm.write(str(finding))
            self._told.add(finding.title)

    def figures(self) -> Record:
        """Means over all epochs."""
        if not self._reports:
            return {}
        figures: Record = {}
        for name, solves in zip(("forward", "backward"), self._stacked(self._reports), strict=True):
            summary = summarize(solves)
            figures[f"mean_{name}_evaluations"] = summary.evaluations
            figures[f"mean_{name}_converged"] = summary.converged
        return figures

    @staticmethod
    def _stacked(
        reports: list[tuple[SolveStats, BackwardProbe]],
    ) -> tuple[SolveStats, BackwardProbe]:
        return jax.tree.map(lambda *leaves: np.stack(leaves), *reports)


# --------------------------------------------------------------------------------------------- run


def train(config: Config, arguments: Sequence[str] | None) -> Record:
    """Trains, and leaves figures and parameters in the folder of the run.

    Returns:
        The result; see `fit`. That of an earlier run if it is finished.
    """
    run = RunFolder(config.run.dir or pathlib.Path("runs", f"{config.data.name}-{config.model}"))
    device = jax.devices()[0]
    environment = {
        "deq_jax": importlib.metadata.version("deq_jax"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
    }
    words = sys.argv[1:] if arguments is None else arguments
    with run.open("graph_classification", config, words, environment):
        if (result := run.read_result()) is not None:
            print(f"{run.path} is finished; --run.fresh starts over")
            return result
        dataset = load_data(config.data, config.seed)
        print(f"data: {dataset.describe()}\nmodel: {config.model}")
        if config.model in IMPLICIT:
            print(f"solver: {config.solver}\ngradient: {config.gradient}")
        print(f"run: {run.path}", flush=True)
        params, history, result = fit(config, dataset)
        lines = [json.dumps(_finite(record)) + "\n" for record in history]
        write_atomically(run.metrics, "".join(lines))
        with Checkpoints(run.checkpoints) as checkpoints:
            checkpoints.save(params, {"epoch": result["epoch"]})
        result = {"metric": dataset.metric, **_finite(result)}
        run.write_result(result)
        return result


def _finite(record: Record) -> dict[str, Any]:
    """The record as JSON, which has no NaN and no infinity."""
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    result = train(parse_arguments(arguments), arguments)
    metric = result["metric"]
    words = f"epoch {result['epoch']}: test {metric} {result[f'test_{metric}']:.4f}"
    words += f" at the best validation {metric} {result[f'validation_{metric}']:.4f}"
    if "mean_forward_converged" in result:
        for way in ("forward", "backward"):
            words += f" | {way} {result[f'mean_{way}_evaluations']:.1f} evaluations, "
            words += f"{result[f'mean_{way}_converged']:.1%} converged"
    print(words)


if __name__ == "__main__":
    sys.exit(main())
