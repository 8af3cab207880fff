"""Equilibrium networks beside others: losses, accuracies, evaluations, times and memory.

In the part `language` each network looks for its learning rate alike: it is trained for all steps
with 0.002 and with the rates next to it, then with those next to the best one, until both
neighbours of the best are worse on a validation part of the training text. The best rate is trained
with three seeds on the whole training text, and the end of the text, which no trial has seen, is
reported on. A training that was interrupted goes on where it was. Shorter trials mislead: after a
quarter of the steps, eight blocks with weights of their own are best at a rate of 0.008, at which
they end far behind their result at 0.004.

The time of a step is the median of interleaved rounds at the end of training, so that it does not
matter what else the machine did while the networks were trained. The memory is that of the
temporaries of the compiled step.

    python -m experiments.studies.controls copy
    python -m experiments.studies.controls language --data-dir DIR --write
    python -m experiments.studies.controls mnist --data-dir DIR --write --networks "monDEQ, dense"
"""

import dataclasses
import datetime
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tyro

from deq_jax.models.conv_deq import count_parameters
from experiments import copy_memory, image_classification, language_model
from experiments.report.trained import read_state
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin
from experiments.train.errors import NonFiniteError
from experiments.train.runs import RunFolder
from experiments.train.stability import training_phase
from experiments.train.step import make_train_step

ROUNDS, STEPS = 7, 3
"""Rounds of timing, and steps of each network in a round."""

Flags = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of a study.

    Attributes:
        flags: what makes it this network.
        trials: further flags by the trial's name, in order, of which the best are taken; the first
            where nothing is tuned.
    """

    flags: Flags
    trials: dict[str, Flags]


_TRIED = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)
_RATES = {f"lr {rate}": (f"--optim.lr={rate}",) for rate in _TRIED}
_EQUAL = ("--network.features=68", "--network.hidden-features=272", "--cell.heads=4")
_NARROW = ("--network.features=16", "--network.hidden-features=36")
_RECURRENT = ("--network.features=10",)

_ONE_EPOCH = "--epochs=1"
_CONSTANT = "--optim.drops=0.999"  # the first epoch of a longer training
# Evaluated once: three evaluations take an MDEQ as long as its training.
_FEW = ("--data.train=5000", "--epochs=3", "--eval-every=3", "--batch-size=50")

NETWORKS: dict[str, dict[str, Network]] = {
    "copy": {
        "DEQ": Network((), {"preset": ()}),
        "weight-tied, 4 times": Network(("--model=weight_tied",), {"preset": ()}),
        "explicit, 4 blocks, equal parameters": Network(
            ("--model=explicit", *_NARROW), {"preset": ()}
        ),
        "LSTM": Network(
            ("--model=lstm", *_RECURRENT, "--network.hidden-features=53"), {"preset": ()}
        ),
        "GRU": Network(
            ("--model=gru", *_RECURRENT, "--network.hidden-features=62"), {"preset": ()}
        ),
    },
    "language": {
        "DEQ": Network((), _RATES),
        "weight-tied, 8 times": Network(("--model=weight_tied",), _RATES),
        "explicit, 8 blocks, equal parameters": Network(("--model=explicit", *_EQUAL), _RATES),
        "explicit, 8 blocks of equal width": Network(("--model=explicit",), _RATES),
    },
    "mnist": {
        "monDEQ, dense": Network(("mondeq_dense",), {"preset": ()}),
        "monDEQ, convolution": Network(("mondeq_conv",), {"preset": ()}),
        "monDEQ, dense, one epoch": Network(
            ("mondeq_dense", _ONE_EPOCH, _CONSTANT), {"preset": ()}
        ),
        "monDEQ, convolution, one epoch": Network(
            ("mondeq_conv", _ONE_EPOCH, _CONSTANT), {"preset": ()}
        ),
        "pcDEQ-1, dense": Network(("pcdeq1_dense",), {"preset": ()}),
        "pcDEQ-2, dense": Network(("pcdeq1_dense", "--model=pcdeq2_dense"), {"preset": ()}),
        "pcDEQ-1, convolution, one epoch": Network(("pcdeq1", _ONE_EPOCH), {"preset": ()}),
        "pcDEQ-2, convolution, one epoch": Network(
            ("pcdeq1", "--model=pcdeq2", _ONE_EPOCH), {"preset": ()}
        ),
        "the tutorial's, one epoch": Network(("mnist", _ONE_EPOCH), {"preset": ()}),
    },
    "cifar10": {
        "MDEQ": Network(("mdeq", "--stability.pretrain-steps=60", *_FEW), {"preset": ()}),
        "ResDEQ": Network(("resdeq", *_FEW), {"preset": ()}),
        "the tutorial's": Network(("cifar10", *_FEW), {"preset": ()}),
    },
}
"""What each part of the study trains."""

SCRIPTS: dict[str, Any] = {
    "copy": copy_memory,
    "language": language_model,
    "mnist": image_classification,
    "cifar10": image_classification,
}
SPLITS = {"copy": "test", "language": "validation", "mnist": "test", "cifar10": "test"}

TRIAL: Flags = ("--data.validation=0.1",)
"""A trial in difference from a final training."""


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to study.

    Attributes:
        data_dir: folder of prepared data sets, for all parts but copy.
        runs: folder for the runs.
        seeds: seeds of the final trainings of each network.
        networks: measure only these networks; the rows of the others stay as they are.
    """

    data_dir: str | None = None
    runs: str = "runs/controls"
    seeds: int = 3
    networks: tuple[str, ...] = ()


def train(
    part: str, folder: pathlib.Path, flags: Sequence[str], config: Config
) -> dict[str, Any] | None:
    """The figures of a training, which begins, goes on, or is finished; None if it diverges.

    Raises:
        SystemExit: it was stopped, or the folder holds a run with other settings.
    """
    words = [*flags, f"--run.dir={folder}"]
    if part != "copy" and config.data_dir is not None:
        words.append(f"--data.dir={config.data_dir}")
    print(f"\n{folder}: {' '.join(flags)}", flush=True)
    code = SCRIPTS[part].main(words)
    if code not in (0, NonFiniteError.exit_code):
        raise SystemExit(code)
    return RunFolder(folder).read_result()


def tune(part: str, name: str, config: Config) -> dict[str, float | None]:
    """The validation loss of the trials of a network; none where nothing is tuned.

    A trial is trained with the first seed. One that diverges has no loss. The search begins in
    the middle and goes on until both neighbours of the best one are worse.
    """
    network = NETWORKS[part][name]
    names = list(network.trials)
    if len(names) == 1:
        return {}
    losses: dict[str, float | None] = {}

    def loss(trial: str) -> float:
        if trial not in losses:
            folder = pathlib.Path(config.runs, part, _slug(name), _slug(trial))
            flags = (*TRIAL, *network.flags, *network.trials[trial])
            result = train(part, folder, flags, config)
            losses[trial] = None if result is None else result["validation_loss"]
        found = losses[trial]
        return math.inf if found is None else found

    best = (len(names) - 1) // 2
    while True:
        near = range(max(best - 1, 0), min(best + 2, len(names)))
        better = min(near, key=lambda place: loss(names[place]))
        if better == best:
            return {trial: losses[trial] for trial in names if trial in losses}
        best = better


def measure(part: str, config: Config) -> Part:
    """Tunes, trains and times the networks of a part, those of `config.networks` if it names any.

    Raises:
        SystemExit: a name is that of no network, or a final training diverges.
    """
    if unknown := [name for name in config.networks if name not in NETWORKS[part]]:
        raise SystemExit(f"unknown networks {unknown}; known are: {', '.join(NETWORKS[part])}")
    rows: dict[str, dict[str, Any]] = {}
    timed: dict[str, Callable[[], list[float]]] = {}
    for name in config.networks or NETWORKS[part]:
        network = NETWORKS[part][name]
        trials = tune(part, name, config)
        losses = {trial: loss for trial, loss in trials.items() if loss is not None}
        chosen = min(losses, key=losses.__getitem__) if losses else next(iter(network.trials))
        finals, folders = [], []
        for seed in range(config.seeds):
            folders.append(pathlib.Path(config.runs, part, _slug(name), f"seed-{seed}"))
            flags = (*network.flags, *network.trials[chosen], f"--seed={seed}")
            final = train(part, folders[-1], flags, config)
            if final is None:
                raise SystemExit(f"{folders[-1]}: the loss became NaN or infinite")
            finals.append(final)
        split = SPLITS[part]
        row: dict[str, Any] = {
            "date": datetime.date.today().isoformat(),
            "trials": trials,
            "chosen": chosen if trials else None,
            "losses": [final[f"{split}_loss"] for final in finals],
            "steps": finals[0]["step"],
        }
        if SCRIPTS[part] is image_classification:
            row["accuracies"] = [final[f"{split}_accuracy"] for final in finals]
        if f"{split}_forward_iterations" in finals[0]:
            row["forward"] = [final[f"{split}_forward_iterations"] for final in finals]
            row["backward"] = [final["backward_iterations"] for final in finals]
        timed[name] = _timer(folders[0], row)
        rows[name] = row
    for _ in range(ROUNDS):
        for name, seconds in timed.items():
            rows[name].setdefault("seconds", []).extend(seconds())
    others = STUDY.load().get(part, {"rows": {}})["rows"] if config.networks else {}
    known = {name: rows.get(name) or others.get(name) for name in NETWORKS[part]}
    return {"rows": {name: row for name, row in known.items() if row is not None}}


def _timer(folder: pathlib.Path, row: dict[str, Any]) -> Callable[[], list[float]]:
    """What takes some steps of a trained network and says how long each took."""
    run, state = read_state(folder)
    config, dataset = run.config, run.dataset
    steps = config.epochs * dataset.steps_per_epoch(config.batch_size)
    phase = training_phase(config, steps - 1, steps)
    optimizer = config.optim.optimizer(steps)
    step = make_train_step(config, run.model, optimizer, phase, None, dataset.white)
    batch = next(dataset.train_batches(config.batch_size, seed=config.seed, epoch=0))
    limits = phase and phase.limits
    step = step.lower(state, batch, limits).compile()
    row["parameters"] = count_parameters(run.model)
    row["memory"] = step.memory_analysis().temp_size_in_bytes

    def seconds() -> list[float]:
        nonlocal state
        taken = []
        for _ in range(STEPS):
            started = time.perf_counter()
            state, loss = step(state, batch, limits)
            jax.block_until_ready((state, loss))
            taken.append(time.perf_counter() - started)
        return taken

    seconds()
    return seconds


def render(document: Document) -> dict[str, str]:
    """The Markdown of each part."""
    return {part: _table(measured) for part, measured in document.items()}


def _table(part: Part) -> str:
    rows = part["rows"].items()
    images = any("accuracies" in row for _, row in rows)
    columns = [
        "network",
        *(["accuracy, %"] if images else []),
        "loss",
        "seeds",
        "parameters",
        "evaluations forwards / backwards",
    ]
    columns += ["seconds a step", "memory of a step", "minutes for all steps", "measured"]
    table = []
    for name, row in rows:
        solves = "-"
        if "forward" in row:
            solves = f"{np.mean(row['forward']):.1f} / {np.mean(row['backward']):.1f}"
        seconds = statistics.median(row["seconds"])
        scores = [_mean(100 * np.array(row["accuracies"]), ".2f")] if images else []
        cells = [
            name,
            *scores,
            _mean(row["losses"], ".4g"),
            str(len(row["losses"])),
            f"{row['parameters']:,}",
            solves,
        ]
        cells += [f"{seconds:.3f}", f"{row['memory'] / 2**20:.0f} MiB"]
        cells += [f"{row['steps'] * seconds / 60:.1f}", row["date"]]
        table.append(cells)
    text = markdown_table(columns, table)
    if trials := {name: row["trials"] for name, row in part["rows"].items() if row["trials"]}:
        cells = [
            [name, ", ".join(f"{trial}: {_loss(loss)}" for trial, loss in losses.items())]
            for name, losses in trials.items()
        ]
        text += "\n\nLosses of the trials on the validation part of the training text, one seed:\n"
        text += f"\n{markdown_table(['network', 'trials'], cells)}"
    words = "Losses are means and standard deviations over the seeds."
    if images:
        words = words.replace("Losses", "Accuracies and losses of the last epoch")
    if len({row["date"] for row in part["rows"].values()}) > 1:
        words += " Times that were measured on different days are not to be compared."
    return f"{text}\n\n{words} {origin(part['context'])}"


def _mean(values: Any, form: str) -> str:
    """Mean, and where there are several values their standard deviation."""
    text = format(np.mean(values), form)
    return text if len(values) == 1 else f"{text} ± {np.std(values, ddof=1):.1g}"


def _loss(loss: float | None) -> str:
    return "diverged" if loss is None else f"{loss:.4f}"


STUDY = Study("controls", render)


def _slug(name: str) -> str:
    """A name as a folder: letters, digits and points, and single hyphens between them."""
    kept = "".join(letter if letter.isalnum() or letter == "." else " " for letter in name)
    return "-".join(kept.lower().split())


def main() -> None:
    """Measures and prints the tables, see `Command`."""
    config = tyro.cli(Config, description=__doc__)
    measures = {part: lambda config, part=part: measure(part, config) for part in NETWORKS}
    STUDY.run(config, measures)


if __name__ == "__main__":
    main()
