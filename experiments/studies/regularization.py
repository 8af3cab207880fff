"""What Jacobian regularisation buys: evaluations needed at equal accuracy, with and without it.

Trains the image network with several weights of the penalty and several seeds, and evaluates each
trained network with budgets from 1 evaluation on, at a tolerance of 0. Accuracy is that on images
held out of the training set, the same for all runs; test images are not looked at. A run that was
interrupted goes on where it was.

    python -m experiments.studies.regularization digits
    python -m experiments.studies.regularization cifar10 --data-dir DIR
    python -m experiments.studies.regularization digits cifar10 --data-dir DIR --write
"""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import tyro

from experiments import image_classification
from experiments.report.examples import ImageExamples
from experiments.report.measure import Network
from experiments.report.trained import read_run
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin
from experiments.train.runs import write_atomically

FLAGS: dict[str, tuple[str, ...]] = {
    "digits": ("digits", "--data.validation=0.2"),
    "cifar10": (
        "cifar10",
        "--data.train=5000",
        "--data.validation=0.02",
        "--epochs=3",
        "--batch-size=50",
        "--network.channels=24",
        "--network.inner-channels=32",
        "--solver.max-iter=40",
        "--devices=2",
    ),
}
"""What each study trains."""

WEIGHTS: dict[str, tuple[float, ...]] = {"digits": (0, 4, 20, 100), "cifar10": (0, 20)}
"""Weights of the penalty, none first. It is there in half of the steps."""

BUDGETS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 40)
SLACK = 0.005
"""Accuracies that differ by less are called equal."""


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to study.

    Attributes:
        seeds: runs of each weight.
        data_dir: folder of prepared data sets, for cifar10.
        runs: folder for the runs.
    """

    seeds: int = 2
    data_dir: str | None = None
    runs: str = "runs/regularization"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one run.

    Attributes:
        accuracy: with the trained budget and tolerance.
        evaluations: mean over the samples until the tolerance.
        backward: mean products of a backward solve in the last epoch.
        converged: share of the samples.
        by_budget: accuracy at each of `BUDGETS`.
    """

    accuracy: float
    evaluations: float
    backward: float
    converged: float
    by_budget: list[float]


def flags(study: str, weight: float, seed: int, config: Config) -> list[str]:
    """The command line of one run."""
    chosen = [*FLAGS[study], f"--seed={seed}", f"--run.dir={folder(study, weight, seed, config)}"]
    if weight:
        chosen += ["stability:on", f"--stability.jacobian.weight={weight:g}"]
        chosen.append("--stability.jacobian.probability=0.5")
    if config.data_dir is not None:
        chosen.append(f"--data.dir={config.data_dir}")
    return chosen


def folder(study: str, weight: float, seed: int, config: Config) -> pathlib.Path:
    """Where one run is kept."""
    return pathlib.Path(config.runs) / f"{study}-{weight:g}-{seed}"


def outcome(study: str, weight: float, seed: int, config: Config) -> Outcome:
    """Trains, or goes on, and evaluates; what was evaluated is kept with the run."""
    path = folder(study, weight, seed, config)
    kept = path / "budgets.json"
    if kept.exists():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    if code := image_classification.main(flags(study, weight, seed, config)):
        raise SystemExit(code)
    found = evaluate(path)
    write_atomically(kept, json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def evaluate(path: pathlib.Path) -> Outcome:
    """Looks at a finished run."""
    run = read_run(path)
    dataset: Any = run.dataset
    examples = dataset.evaluation_examples(np.arange(dataset.evaluation_size))
    network = Network(run.model, ImageExamples(*examples, white=dataset.white))
    solves, budgets = network.solves(), network.budgets(BUDGETS)
    return Outcome(
        accuracy=float(solves.correct.mean()),
        evaluations=float(solves.iterations.mean()),
        backward=run.progress.history[-1]["backward_iterations"],
        converged=float(solves.converged.mean()),
        by_budget=[
            float(budgets.accuracy[list(budgets.budgets).index(budget)]) for budget in BUDGETS
        ],
    )


def needed(found: Outcome, accuracy: float) -> int | None:
    """The smallest budget from which on the accuracy stays at `accuracy`, up to `SLACK`."""
    enough = np.array(found.by_budget) >= accuracy - SLACK
    if not enough[-1]:
        return None
    first = len(enough) - int(np.argmin(enough[::-1])) if not enough.all() else 0
    return BUDGETS[first]


def measure(study: str, config: Config) -> Part:
    """Trains and evaluates all runs of a part."""
    rows = {
        weight: [outcome(study, weight, seed, config) for seed in range(config.seeds)]
        for weight in WEIGHTS[study]
    }
    figures = []
    for weight, found in rows.items():
        row: dict[str, Any] = {"weight": weight}
        for name in ("accuracy", "evaluations", "backward", "converged"):
            row[name] = [getattr(one, name) for one in found]
        pairs = zip(found, rows[0], strict=True)
        row["budget"] = [needed(one, without.accuracy) for one, without in pairs]
        figures.append(row)
    return {"flags": list(FLAGS[study]), "rows": figures}


def render(document: Document) -> dict[str, str]:
    """The Markdown of each part."""
    return {study: _table(part) for study, part in document.items()}


def _table(part: Part) -> str:
    columns = ["weight", "accuracy", "evaluations to the tolerance", "products backwards"]
    columns += ["converged", "budget for the accuracy without penalty"]
    table = []
    for row in part["rows"]:
        cells = [f"{row['weight']:g}", _spread(row["accuracy"], 3)]
        cells += [_spread(row["evaluations"], 1), _spread(row["backward"], 1)]
        cells.append(" / ".join(f"{one:.1%}" for one in row["converged"]))
        budgets = ("not reached" if one is None else str(one) for one in row["budget"])
        table.append([*cells, " / ".join(budgets)])
    text = markdown_table(columns, table)
    return f"`{' '.join(part['flags'])}`\n\n{text}\n\n{origin(part['context'])}"


STUDY = Study("regularization", render)


def _spread(values: list[float], digits: int) -> str:
    """Mean and, behind it, the value of each seed."""
    each = " / ".join(f"{value:.{digits}f}" for value in values)
    return f"{np.mean(values):.{digits}f} ({each})"


def main() -> None:
    """Measures and prints the tables, see `Command`."""
    config = tyro.cli(Config, description=__doc__)
    measures = {study: lambda config, study=study: measure(study, config) for study in FLAGS}
    STUDY.run(config, measures)


if __name__ == "__main__":
    main()
