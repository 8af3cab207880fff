"""What a report needs of a run. No other file of the report knows the settings of a training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deq_jax import Execution
from deq_jax.models.conv_deq import count_parameters
from experiments.report import measure
from experiments.report.examples import Examples, choose_copies, choose_images, choose_windows
from experiments.report.trained import Run
from experiments.studies.tables import machine
from experiments.train import advice
from experiments.train.config import TrainingConfig
from experiments.train.runs import flag_of


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained network, and what a report tells of its run.

    Attributes:
        script: name of the script that trained it.
        model: the network in evaluation mode.
        examples: the examples that it is looked at with.
        facts: the run, its settings and its examples, by name.
        tol: tolerance of the forward solve.
        history: the records of the training, one for each epoch.
        no_backward: why a backward solve may have no trace of its residuals.
    """

    script: str
    model: measure.EquilibriumModel
    examples: Examples
    facts: Mapping[str, str]
    tol: float
    history: Sequence[Mapping[str, Any]]
    no_backward: str


def unfit(script: str, config: TrainingConfig) -> str:
    """Why a run has nothing to report on; empty if it has."""
    if config.is_deq:
        return ""
    return (
        f"a control, --model {config.model}, which has no solver to diagnose; choose a run with "
        "--model deq"
    )


def subject_of(run: Run, count: int) -> Subject:
    """The network of a run, with at most `count` of the examples that the run is evaluated on."""
    experiment, progress = run.experiment, run.progress
    config, core = experiment.config, experiment.model.core
    if run.script == "image_classification":
        examples = choose_images(experiment.dataset, count)
    elif run.script == "language_model":
        examples = choose_windows(experiment.dataset, config.length, count)
    else:
        examples = choose_copies(experiment.dataset, config.shown, count)
    memory = ""
    if run.script == "language_model" and config.segment_memory:
        memory = "each window starts without what --segment-memory keeps of the one before"
    epochs = f"{progress.epoch} of {config.epochs}"
    if progress.position:
        epochs += f", and {progress.position} steps"
    facts = {
        "run": str(run.path),
        **examples.facts,
        "memory": memory,
        "model": f"{config.model}, {count_parameters(experiment.model):,} parameters",
        "solver": repr(core.solver),
        "gradient": repr(core.gradient),
        "stability": ", ".join(
            f"{flag_of(name)} {getattr(config, name)}" for name in config.changed()
        ),
        "execution": "" if core.execution == Execution() else repr(core.execution),
        "epochs trained": epochs,
        "machine": machine(),
    }
    no_backward = f"--backward-solver {config.backward_solver} keeps no trace of its residuals."
    if config.gradient not in ("implicit", "shine"):
        no_backward = f"Nothing is solved backwards: --gradient {config.gradient}."
    return Subject(
        script=run.script,
        model=run.model(),
        examples=examples,
        facts={name: fact for name, fact in facts.items() if fact},
        tol=config.tol,
        history=progress.history,
        no_backward=no_backward,
    )


def findings(
    run: Run,
    solves: measure.Solves,
    traces: Mapping[str, np.ndarray],
    spectra: measure.Spectra,
    budgets: measure.Budgets,
) -> list[advice.Trouble]:
    """What is wrong with the solves.

    Where `traces` has no backward solve, the newest epoch says what is wrong with those.
    """
    config, history = run.experiment.config, run.progress.history
    backward_tol = config.tol if config.backward_tol is None else config.backward_tol
    limits = advice.Limits(converged=config.warn_converged)
    options: dict[str, Any] = {
        "tolerances": {"forward": config.tol, "backward": backward_tol},
        "solver": config.solver,
        "backward_solver": config.backward_solver,
    }
    record = solves.record()
    if "backward" in traces:
        record |= measure.backward_record(traces["backward"], backward_tol)
    found = advice.of_record(record, limits, **options)
    if "backward" not in traces and history:
        newest = {name: value for name, value in history[-1].items() if "backward" in name}
        approximate = config.gradient in ("one_step", "neumann")
        when = f"in epoch {history[-1]['epoch']} of the training: "
        found += [
            dataclasses.replace(trouble, evidence=when + trouble.evidence)
            for trouble in advice.of_record(newest, limits, approximate=approximate, **options)
        ]
    found += advice.of_spectrum(
        spectra.radius, spectra.error, spectra.converged, solver=config.solver
    )
    tried, accuracy = budgets.budgets.tolist(), budgets.accuracy.tolist()
    return found + advice.of_budget(tried, accuracy, budgets.trained, solves.labels.size)
