"""What a report needs of a run. No other file of the report knows the settings of a training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deq_jax import Execution, Finding, GradientPolicy, Implicit, diagnose
from deq_jax.models.conv_deq import count_parameters
from deq_jax.stability import Limits, SolveSummary, SpectralRadius, diagnose_budgets
from experiments.graph_classification import IMPLICIT
from experiments.report import measure
from experiments.report.examples import Examples, choose_copies, choose_images, choose_windows
from experiments.report.graphs import OneGraph, choose_graph
from experiments.report.trained import Run
from experiments.studies.tables import machine
from experiments.train.config import TrainingConfig
from experiments.train.reporter import described_stability


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


def unfit(script: str, config: Any) -> str:
    """Why a run has nothing to report on; empty if it has."""
    if config.is_deq:
        return ""
    others = ", ".join(IMPLICIT) if script == "graph_classification" else "deq"
    return (
        f"a control, --model {config.model}, which has no solver to diagnose; choose a run with "
        f"--model {others}"
    )


def subject_of(run: Run, count: int) -> Subject:
    """The network of a run, with at most `count` of the examples that the run is evaluated on."""
    config, core, progress = run.config, run.model.core, run.progress
    model, memory, stability = run.model, "", ""
    epochs = f"{progress.epoch} of {config.epochs}"
    if run.script == "graph_classification":
        model, examples = OneGraph(run.model, run.dataset), choose_graph(run.dataset)
        epochs = f"{len(progress.history)} of {config.epochs}; the parameters are those of epoch "
        epochs += f"{progress.epoch}, with the best score of the validation nodes"
    elif run.script == "image_classification":
        examples = choose_images(run.dataset, count)
    elif run.script == "language_model":
        examples = choose_windows(run.dataset.text, config.data.length, count)
        if config.network.memory:
            memory = "each window starts without what --network.memory keeps of the one before"
    else:
        examples = choose_copies(run.dataset, config.data.shown, count)
    if isinstance(config, TrainingConfig):
        stability = described_stability(config)
    if progress.position:
        epochs += f", and {progress.position} steps"
    facts = {
        "run": str(run.path),
        **examples.facts,
        "memory": memory,
        "model": f"{config.model}, {count_parameters(run.model):,} parameters",
        "solver": repr(core.solver),
        "gradient": repr(core.gradient),
        "stability": stability,
        "execution": "" if core.execution == Execution() else repr(core.execution),
        "epochs trained": epochs,
        "machine": machine(),
    }
    policy = _gradient_of(config)
    if isinstance(policy, Implicit):
        backward = policy.backward_solver(config.solver)
        no_backward = f"backward: {backward} keeps no trace of its residuals."
    else:
        no_backward = f"Nothing is solved backwards: the gradient is {policy}."
    return Subject(
        script=run.script,
        model=model,
        examples=examples,
        facts={name: fact for name, fact in facts.items() if fact},
        tol=config.solver.tol,
        history=progress.history,
        no_backward=no_backward,
    )


def _gradient_of(config: Any) -> GradientPolicy:
    return config.gradient_policy() if isinstance(config, TrainingConfig) else config.gradient


def findings(
    run: Run,
    solves: measure.Solves,
    traces: Mapping[str, np.ndarray],
    spectra: measure.Spectra,
    budgets: measure.Budgets,
) -> list[Finding]:
    """What is wrong with the solves.

    Where `traces` has no backward solve, the newest epoch says what is wrong with those.
    """
    config, history = run.config, run.progress.history
    options: dict[str, Any] = {
        "solver": config.solver,
        "gradient": _gradient_of(config),
        "limits": Limits(converged=config.run.warn_below),
    }
    backward = None
    if "backward" in traces:
        tol = options["gradient"].backward_solver(config.solver).tol
        backward = measure.backward_summary(traces["backward"], tol)
    # Evaluation may have another budget than training.
    found = diagnose(solves.summary(), backward, **options | {"solver": run.model.core.solver})
    if "backward" not in traces and history:
        names = ("converged", "diverged", "residual_mean", "residual_worst")
        newest = SolveSummary(**{name: history[-1].get(f"backward_{name}") for name in names})
        when = f"In epoch {history[-1]['epoch']} of the training: "
        found += [
            dataclasses.replace(finding, evidence=when + finding.evidence)
            for finding in diagnose(None, newest, **options)
        ]
    radii = SpectralRadius(spectra.radius, spectra.error, spectra.converged, np.int32(0))
    found += diagnose(spectrum=radii, **options)
    tried, accuracy = budgets.budgets.tolist(), budgets.accuracy.tolist()
    answers = solves.labels.size
    return found + diagnose_budgets(tried, accuracy, trained=budgets.trained, answers=answers)
