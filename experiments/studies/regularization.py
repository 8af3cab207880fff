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
from typing import Annotated, Literal

import numpy as np
import tyro
from flax import nnx

from experiments import image_classification
from experiments.data.images import load_dataset
from experiments.report.images import ImageExamples
from experiments.report.measure import Network
from experiments.studies.tables import DOCS, machine, markdown_head, markdown_row, write_below
from experiments.train.checkpoints import Checkpoints
from experiments.train.image_config import Config as Training
from experiments.train.image_experiment import prepare
from experiments.train.image_presets import parse
from experiments.train.runs import RunDirectory, write_atomically
from experiments.train.script import resume

PAGE = DOCS / "stability.md"
MARKER = "<!-- Below: written by `python -m experiments.studies.regularization --write`. -->"

Name = Literal["digits", "cifar10"]

FLAGS: dict[str, tuple[str, ...]] = {
    "digits": ("--preset=digits", "--validation-fraction=0.2"),
    "cifar10": (
        "--preset=cifar10",
        "--train-examples=5000",
        "--validation-fraction=0.02",
        "--epochs=3",
        "--batch-size=50",
        "--channels=24",
        "--inner-channels=32",
        "--max-iter=40",
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
class Config:
    """What to study.

    Attributes:
        studies: digits, cifar10.
        seeds: runs of each weight.
        data_dir: folder of prepared data sets, for cifar10.
        runs: folder for the runs.
        write: put the tables into docs/stability.md as well.
    """

    studies: Annotated[tuple[Name, ...], tyro.conf.Positional] = ("digits",)
    seeds: int = 2
    data_dir: str | None = None
    runs: str = "runs/regularization"
    write: bool = False


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
    chosen = [*FLAGS[study], f"--seed={seed}", f"--run-dir={folder(study, weight, seed, config)}"]
    if weight:
        chosen += [f"--jacobian-weight={weight:g}", "--jacobian-probability=0.5"]
    if config.data_dir is not None:
        chosen.append(f"--data-dir={config.data_dir}")
    return chosen


def folder(study: str, weight: float, seed: int, config: Config) -> pathlib.Path:
    """Where one run is kept."""
    return pathlib.Path(config.runs) / f"{study}-{weight:g}-{seed}"


def outcome(study: str, weight: float, seed: int, config: Config) -> Outcome:
    """Trains, or goes on, and evaluates; what was evaluated is kept with the run."""
    kept = folder(study, weight, seed, config) / "budgets.json"
    if kept.exists():
        return Outcome(**json.loads(kept.read_text(encoding="utf-8")))
    training = parse(flags(study, weight, seed, config))
    code = image_classification.run(training)
    if code:
        raise SystemExit(code)
    found = evaluate(training)
    write_atomically(kept, json.dumps(dataclasses.asdict(found)) + "\n")
    return found


def evaluate(training: Training) -> Outcome:
    """Looks at a finished run."""
    dataset = load_dataset(
        training.dataset,
        data_dir=training.data_dir,
        image_size=training.image_size,
        train_examples=training.train_examples,
        eval_examples=training.eval_examples,
        validation_fraction=training.validation_fraction,
        seed=training.seed,
    )
    directory = RunDirectory(training.run_dir)
    experiment = prepare(training, dataset)
    with Checkpoints(directory.checkpoints) as checkpoints:
        state, progress = resume(experiment, checkpoints)
    model = nnx.merge(experiment.evaluation_definition, state.params, state.rest, copy=True)
    network = Network(model, ImageExamples(dataset.evaluation, dataset.white))
    solves, budgets = network.solves(), network.budgets(BUDGETS)
    last = progress.history[-1]
    return Outcome(
        accuracy=float(solves.correct.mean()),
        evaluations=float(solves.iterations.mean()),
        backward=last["backward_iterations"],
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


def table(study: str, config: Config) -> str:
    """Trains and evaluates all runs of a study; the Markdown table."""
    rows = {
        weight: [outcome(study, weight, seed, config) for seed in range(config.seeds)]
        for weight in WEIGHTS[study]
    }
    columns = ["weight", "accuracy", "evaluations to the tolerance", "products backwards"]
    columns += ["converged", "budget for the accuracy without penalty"]
    lines = [markdown_head(columns)]
    for weight, found in rows.items():
        budgets = [
            needed(one, without.accuracy) for one, without in zip(found, rows[0], strict=True)
        ]
        cells = [f"{weight:g}"]
        cells.append(_spread([one.accuracy for one in found], 3))
        cells.append(_spread([one.evaluations for one in found], 1))
        cells.append(_spread([one.backward for one in found], 1))
        cells.append(" / ".join(f"{one.converged:.1%}" for one in found))
        cells.append(" / ".join("not reached" if b is None else str(b) for b in budgets))
        lines.append(markdown_row(cells))
    return f"### {study}\n\n`{' '.join(FLAGS[study])}`\n\n" + "\n".join(lines)


def _spread(values: list[float], digits: int) -> str:
    """Mean and, behind it, the value of each seed."""
    each = " / ".join(f"{value:.{digits}f}" for value in values)
    return f"{np.mean(values):.{digits}f} ({each})"


def main() -> None:
    """Prints the tables; with `--write` puts them into the page, below what is written there."""
    config = tyro.cli(Config, description=__doc__)
    tables = [table(study, config) for study in config.studies]
    print("\n\n".join(tables))
    if config.write:
        write_below(PAGE, MARKER, [f"{machine()}, {config.seeds} seeds.", *tables])


if __name__ == "__main__":
    main()
