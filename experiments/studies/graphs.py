"""Implicit graph networks beside graph convolutions, on citations, web pages, mines and chains.

Part `nodes`: each network is tuned alike, over the same learning rates and penalties, by the
validation score of split 0 of the ten splits of a graph, and again by that of Planetoid's split
where there is one. The best setting is trained on all splits. Reported is the test score at the
epoch with the best validation score. A finished training is kept in the folder of the runs, and is
not repeated.

Part `chains`: the class of a chain of nodes is told at its first node only. Reported is the share
of all nodes of unseen chains that are classified right.

    python -m experiments.studies.graphs --data-dir DIR --write
    python -m experiments.studies.graphs chains --write
"""

import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import tyro

from deq_jax import Picard
from experiments.graph_classification import (
    Config,
    GraphData,
    Network,
    RunOptions,
    fit,
    load_data,
)
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin
from experiments.train.runs import write_atomically

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGC": ("sgc", {"steps": 2}),
    "GCN": ("gcn", {"depth": 2}),
    "APPNP": ("appnp", {"steps": 10, "alpha": 0.1}),
    "IGNN": ("ignn", {"kappa": 0.9}),
    "EIGNN": ("eignn", {"gamma": 0.9}),
    "monotone": ("monotone", {"monotonicity": 0.2}),
}
"""The networks of the part `nodes`: model, and settings that differ."""

GRAPHS = {
    "cora": "Cora",
    "citeseer": "Citeseer",
    "chameleon_filtered": "Chameleon, filtered",
    "minesweeper": "Minesweeper",
}
PLANETOID = ("cora", "citeseer")
"""Graphs that have the split of Planetoid too."""
KINDS = {True: ("planetoid", "splits"), False: ("splits",)}
"""Kinds of splits, by whether there is that of Planetoid."""

RATES, DECAYS = (0.01, 0.05), (5e-6, 5e-4, 5e-3)
"""Learning rates and penalties that are tried."""

CHAIN_MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "IGNN": ("ignn", {"kappa": 0.99}),
    "EIGNN": ("eignn", {"gamma": 0.99}),
    "GCN, 2 layers": ("gcn", {"depth": 2}),
    "GCN, 4 layers": ("gcn", {"depth": 4}),
    "GCN, 8 layers": ("gcn", {"depth": 8}),
    "SGC, 10 steps": ("sgc", {"steps": 10}),
    "APPNP, 10 steps": ("appnp", {"steps": 10, "alpha": 0.1}),
}
LENGTHS = (10, 50, 100, 200)
"""Nodes of a chain."""


@dataclasses.dataclass(frozen=True)
class GraphsConfig(Command):
    """What to study.

    Attributes:
        data_dir: folder of the files of graphs.
        runs: folder in which the figures of finished trainings are kept.
        epochs: epochs of each training.
        seeds: trainings on the split of Planetoid.
        splits: splits of each graph.
        features: width of hidden layers and states.
        graphs: measure only these graphs; the figures of the others stay as they are.
    """

    data_dir: str | None = None
    runs: str = "runs/graphs"
    epochs: int = 100
    seeds: int = 3
    splits: int = 10
    features: int = 16
    graphs: tuple[str, ...] = ()


def measure_nodes(config: GraphsConfig) -> Part:
    """Tunes and trains all networks on all graphs."""
    graphs: dict[str, Any] = {}
    if unknown := [graph for graph in config.graphs if graph not in GRAPHS]:
        raise SystemExit(f"unknown graphs {unknown}; known are: {', '.join(GRAPHS)}")
    measured = config.graphs or tuple(GRAPHS)
    for graph, (name, (model, options)) in itertools.product(measured, MODELS.items()):
        network = Network(
            features=config.features,
            dropout=0.2 if graph == "minesweeper" else 0.5,
            **options,
        )

        def settings(
            rate: float,
            decay: float,
            split: int | None,
            seed: int,
            *,
            graph: str = graph,
            model: Any = model,
            network: Network = network,
        ) -> Config:
            return Config(
                model=model,
                epochs=config.epochs,
                eval_every=4,
                seed=seed,
                lr=rate,
                weight_decay=decay,
                solver=Picard(tol=3e-3, max_iter=200),
                data=GraphData(graph, config.data_dir, split),
                network=network,
                run=RunOptions(progress=False),
            )

        row: dict[str, Any] = {}
        for kind in KINDS[graph in PLANETOID]:
            split = None if kind == "planetoid" else 0
            trials = {
                pair: run(config, settings(*pair, split, 0))
                for pair in itertools.product(RATES, DECAYS)
            }
            best = max(trials, key=lambda pair: trials[pair]["validation"])
            if kind == "planetoid":
                finals = [settings(*best, None, seed) for seed in range(config.seeds)]
            else:
                finals = [settings(*best, number, 0) for number in range(config.splits)]
            row[kind] = {
                "lr": best[0],
                "weight_decay": best[1],
                "trials": {f"{r} {d}": trial["validation"] for (r, d), trial in trials.items()},
                "finals": [run(config, final) for final in finals],
            }
        graphs.setdefault(graph, {})[name] = row
    others = STUDY.load().get("nodes", {"graphs": {}})["graphs"] if config.graphs else {}
    known = {graph: graphs.get(graph) or others.get(graph) for graph in GRAPHS}
    return {
        "epochs": config.epochs,
        "features": config.features,
        "graphs": {graph: rows for graph, rows in known.items() if rows is not None},
    }


def measure_chains(config: GraphsConfig) -> Part:
    """Trains networks on chains of all lengths."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for (name, (model, options)), length in itertools.product(CHAIN_MODELS.items(), LENGTHS):
        settings = Config(
            model=model,
            epochs=config.epochs,
            eval_every=10,
            solver=Picard(tol=1e-6, max_iter=3000),
            data=GraphData(length=length, chains=10, directed=True),
            network=Network(features=16, normalize=True, **options),
            run=RunOptions(progress=False),
        )
        rows.setdefault(name, []).append(run(config, settings))
    return {"epochs": config.epochs, "lengths": list(LENGTHS), "rows": rows}


def run(config: GraphsConfig, settings: Config) -> dict[str, Any]:
    """The figures of a training, from its file if it is finished."""
    data, network = settings.data, settings.network
    words = [settings.model, data.name, data.split, data.length, settings.seed, settings.lr]
    words += [settings.weight_decay, settings.epochs, network.features, network.depth]
    words += [network.steps, network.kappa, network.monotonicity, network.dropout]
    words += [network.gamma] if settings.model == "eignn" else []
    path = pathlib.Path(config.runs, "_".join(map(str, words)) + ".json")
    if path.exists():
        figures = json.loads(path.read_text(encoding="utf-8"))
        return {name: float(f"{value:.5g}") for name, value in figures.items()}
    dataset = load_data(data, settings.seed)
    _, history, result = fit(settings, dataset)
    figures = {
        "validation": result[f"validation_{dataset.metric}"],
        "test": result[f"test_{dataset.metric}"],
        "last": result["last_test"],
        "epoch": result["epoch"],
        "parameters": result["parameters"],
        "seconds": float(np.median([record["seconds"] for record in history])),
        **{key: value for key, value in result.items() if key.startswith("mean_")},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(figures))
    print(f"{path.stem}: {figures['test']:.4f}", flush=True)
    return run(config, settings)


def render(document: Document) -> dict[str, str]:
    """The Markdown of each part."""
    tables = {"nodes": _nodes_table, "chains": _chains_table}
    return {part: tables[part](measured) for part, measured in document.items()}


def _nodes_table(part: Part) -> str:
    graphs = part["graphs"]
    kinds = [(graph, kind) for graph in graphs for kind in KINDS[graph in PLANETOID]]
    words = {"planetoid": "Planetoid's split", "splits": "ten splits"}
    columns = ["network", *(f"{GRAPHS[graph]}, {words[kind]}" for graph, kind in kinds)]
    scores, solves = [], []
    for name in MODELS:
        rows = [graphs[graph][name][kind] for graph, kind in kinds]
        scores.append([name, *(_mean(row["finals"]) for row in rows)])
        for (graph, kind), row in zip(kinds, rows, strict=True):
            finals = row["finals"]
            cells = [name, f"{GRAPHS[graph]}, {words[kind]}", f"{row['lr']:g}"]
            cells += [f"{row['weight_decay']:g}", f"{finals[0]['parameters']:,.0f}"]
            cells += [_solves(finals, way) for way in ("forward", "backward")]
            cells.append(f"{1e3 * np.median([figures['seconds'] for figures in finals]):.0f}")
            solves.append(cells)
    heads = ["network", "graph", "rate", "penalty", "parameters", "forwards", "backwards"]
    heads.append("ms an epoch")
    text = f"{markdown_table(columns, scores)}\n\n"
    text += (
        "Test accuracies in per cent, for Minesweeper the area under the ROC curve: means and "
        "standard deviations over the seeds or splits, at the epoch with the best validation "
        f"score of {part['epochs']} epochs. States and hidden layers are {part['features']} wide.\n"
    )
    text += f"\n{markdown_table(heads, solves)}\n\n"
    text += (
        "The chosen settings, and the solves of all trainings: mean number of evaluations, and "
        "share of the solves that converged. Other processes ran on the same cores, so the times "
        "are upper bounds. "
    )
    return text + origin(part["context"])


def _solves(finals: list[dict[str, Any]], way: str) -> str:
    key = f"mean_{way}_evaluations"
    if key not in finals[0]:
        return "-"
    evaluations = np.mean([figures[key] for figures in finals])
    converged = np.mean([figures[f"mean_{way}_converged"] for figures in finals])
    return f"{evaluations:.0f}, {converged:.1%}"


def _chains_table(part: Part) -> str:
    columns = ["network", *(f"{length} nodes" for length in part["lengths"])]
    rows = [
        [name, *(f"{100 * figures['test']:.1f}" for figures in row)]
        for name, row in part["rows"].items()
    ]
    text = f"{markdown_table(columns, rows)}\n\n"
    text += (
        "Test accuracies in per cent, over all nodes of the unseen chains, of one training of "
        f"{part['epochs']} epochs each. Guessing gives 50. "
    )
    return text + origin(part["context"])


def _mean(figures: list[dict[str, Any]]) -> str:
    scores = [100 * each["test"] for each in figures]
    return f"{np.mean(scores):.1f} ± {np.std(scores, ddof=1):.1f}"


STUDY = Study("graphs", render)


def main() -> None:
    """Measures and prints the tables, see `Command`."""
    config = tyro.cli(GraphsConfig, description=__doc__)
    STUDY.run(config, {"nodes": measure_nodes, "chains": measure_chains})


if __name__ == "__main__":
    main()
