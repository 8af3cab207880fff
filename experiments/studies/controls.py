"""The DEQ-Transformer beside its controls, trained in the same way for the same steps.

Trains each network, or goes on where it was, and puts their losses beside what they cost:
parameters, evaluations of the cell, and of one training step its time and memory. The time is the
median of interleaved rounds at the end of training, so that it does not matter what else the
machine did while the networks were trained; the memory is that of the temporaries of the compiled
step.

    python -m experiments.studies.controls copy
    python -m experiments.studies.controls language --data-dir DIR
    python -m experiments.studies.controls copy language --data-dir DIR --write
"""

import dataclasses
import pathlib
import statistics
import time
from typing import Annotated, Any, Literal

import jax
import tyro

from deq_jax.models.conv_deq import count_parameters
from experiments import copy_memory, language_model
from experiments.studies.tables import DOCS, machine, markdown_head, markdown_row, write_below
from experiments.train import copy_config, language_config
from experiments.train.checkpoints import Checkpoints
from experiments.train.experiment import Experiment
from experiments.train.runs import RunDirectory
from experiments.train.script import resume
from experiments.train.training import TrainState

PAGE = DOCS / "sequences.md"
MARKER = "<!-- Below: written by `python -m experiments.studies.controls --write`. -->"

Name = Literal["copy", "language"]

ROUNDS, STEPS = 7, 3
"""Rounds of timing, and steps of each network in a round."""

CONTROLS: dict[str, dict[str, tuple[str, ...]]] = {
    "copy": {
        "DEQ": (),
        "weight-tied, 4 times": ("--model=weight_tied",),
        "explicit, 4 blocks, equal parameters": (
            "--model=explicit",
            "--features=16",
            "--hidden-features=36",
        ),
        "LSTM": ("--model=lstm", "--features=10", "--hidden-features=53"),
        "GRU": ("--model=gru", "--features=10", "--hidden-features=62"),
    },
    "language": {
        "DEQ": (),
        "weight-tied, 8 times": ("--model=weight_tied",),
        "explicit, 8 blocks, equal parameters": (
            "--model=explicit",
            "--features=68",
            "--hidden-features=272",
            "--heads=4",
        ),
        "explicit, 8 blocks of equal width": ("--model=explicit",),
    },
}
"""What each study trains, and the flags with which it does."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to study.

    Attributes:
        studies: copy, language.
        data_dir: folder of prepared data sets, for language.
        runs: folder for the runs.
        write: put the tables into docs/sequences.md as well.
    """

    studies: Annotated[tuple[Name, ...], tyro.conf.Positional] = ("copy",)
    data_dir: str | None = None
    runs: str = "runs/controls"
    write: bool = False


@dataclasses.dataclass
class Row:
    """A trained network.

    Attributes:
        name: what it is.
        loss: of the evaluation, after the last epoch.
        parameters: trainable numbers.
        evaluations: of the cell in a solve of the evaluation, and products backwards in the last
            epoch; empty for a network without a solver.
        steps: of the training.
        memory: bytes of the temporaries of a training step.
        seconds: that the timed steps took, one after another.
    """

    name: str
    loss: float
    parameters: int
    evaluations: str
    steps: int
    memory: int
    seconds: list[float] = dataclasses.field(default_factory=list)


class Timed:
    """A trained network whose training steps are timed.

    Args:
        experiment: the network and its data.
        state: as it was trained; used up.
    """

    def __init__(self, experiment: Experiment, state: TrainState):
        self._batches = experiment.task.batches(0, 0)
        self._batch = next(self._batches)
        number = experiment.config.epochs * experiment.task.steps_per_epoch - 1
        self._step = experiment.task.train_step.compiled(number)
        self._state = state
        compiled = self._step.lower(state, self._batch).compile()
        self.memory = compiled.memory_analysis().temp_size_in_bytes
        self.seconds()

    def seconds(self) -> list[float]:
        """Takes some steps and says how long each took."""
        taken = []
        for _ in range(STEPS):
            started = time.perf_counter()
            self._state, metrics = self._step(self._state, self._batch)
            jax.block_until_ready((self._state, metrics))
            taken.append(time.perf_counter() - started)
        return taken


def trained(study: Name, name: str, config: Config) -> tuple[Row, Timed]:
    """Trains one network, or goes on, or finds it finished."""
    modules: dict[str, Any] = {
        "copy": (copy_memory, copy_config),
        "language": (language_model, language_config),
    }
    script, settings = modules[study]
    short = "".join(letter if letter.isalnum() else "-" for letter in name)
    folder = pathlib.Path(config.runs) / f"{study}-{short}"
    flags = [*CONTROLS[study][name], f"--run-dir={folder}"]
    if study == "language" and config.data_dir is not None:
        flags.append(f"--data-dir={config.data_dir}")
    training = settings.parse(flags)
    print(f"\n{study}: {name}", flush=True)
    if code := script.run(training):
        raise SystemExit(code)
    directory = RunDirectory(folder)
    experiment = script.load(training, directory)
    with Checkpoints(directory.checkpoints) as checkpoints:
        state, progress = resume(experiment, checkpoints)
    timed = Timed(experiment, state)
    split, last = experiment.dataset.evaluation_name, progress.history[-1]
    evaluations = "-"
    if training.is_deq:
        evaluations = (
            f"{last[f'{split}_forward_iterations']:.1f} / {last['backward_iterations']:.1f}"
        )
    row = Row(
        name=name,
        loss=last[f"{split}_loss"],
        parameters=count_parameters(experiment.model),
        evaluations=evaluations,
        steps=last["step"],
        memory=timed.memory,
    )
    return row, timed


def table(study: Name, config: Config) -> str:
    """Trains and times all networks of a study; the Markdown table."""
    rows = [trained(study, name, config) for name in CONTROLS[study]]
    for _ in range(ROUNDS):
        for row, timed in rows:
            row.seconds += timed.seconds()
    columns = ["network", "loss", "parameters", "evaluations forwards / backwards"]
    columns += ["seconds a step", "memory of a step", "minutes for all steps"]
    lines = [markdown_head(columns)]
    for row, _ in rows:
        cells = [row.name, f"{row.loss:.4g}", f"{row.parameters:,}", row.evaluations]
        seconds = statistics.median(row.seconds)
        cells += [f"{seconds:.3g}", f"{row.memory / 2**20:.0f} MiB"]
        lines.append(markdown_row([*cells, f"{row.steps * seconds / 60:.1f}"]))
    return f"### {study}\n\n" + "\n".join(lines)


def main() -> None:
    """Prints the tables; with `--write` puts them into the page, below what is written there."""
    config = tyro.cli(Config, description=__doc__)
    tables = [table(study, config) for study in config.studies]
    print("\n\n".join(tables))
    if config.write:
        write_below(PAGE, MARKER, [f"{machine()}.", *tables])


if __name__ == "__main__":
    main()
