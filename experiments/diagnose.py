"""Looks at the solves of a network trained by `experiments.image_classification`.

    python -m experiments.diagnose --run runs/digits

Writes `diagnosis/index.html` into the run's folder, a page that needs nothing else, and the figures
in it as PNG files beside it. The run may be finished, interrupted, or still going on.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from deq_jax import Execution, Solver
from deq_jax.models.conv_deq import count_parameters
from experiments.common import advice
from experiments.common.errors import ExperimentError, UsageError
from experiments.common.runs import flag_of, write_atomically
from experiments.common.splits import fixed_split
from experiments.common.studies import machine
from experiments.common.traces import residual_traces
from experiments.common.training import to_float
from experiments.diagnosis import confidence, figures, measure
from experiments.diagnosis.page import Report, render
from experiments.diagnosis.run import Run, read_run
from experiments.image_config import Config

_TRACED = 64
"""Images whose residuals are drawn."""

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship")
_CLASSES = {"cifar10": (*_CIFAR10, "truck")}
"""Names of classes, where they are not numbers."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a report on the solves of a trained network: residuals, spectra, warnings.

    Attributes:
        run: folder of a run of experiments.image_classification.
        data_dir: folder of prepared data sets. None: that of the run.
        images: look at so many images of those that the run is evaluated on.
        output: folder for the report. None: diagnosis/ in the run's folder.
    """

    run: pathlib.Path
    data_dir: str | None = None
    images: int = 256
    output: pathlib.Path | None = None


def diagnose(arguments: Arguments) -> pathlib.Path:
    """Writes the report and returns its file.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    if arguments.images < 1:
        raise UsageError(f"--images must be at least 1, got {arguments.images}")
    run = _timed("read the run", lambda: read_run(arguments.run, arguments.data_dir))
    experiment = run.experiment
    config, dataset, state = experiment.config, experiment.dataset, experiment.state
    model = nnx.merge(experiment.evaluation_definition, state.params, state.rest, copy=True)
    numbers = _chosen(dataset.evaluation.labels, arguments.images)
    examples = dataset.evaluation.take(numbers)
    network = measure.Network(model, examples, dataset.white)

    solves = _timed(f"solved {len(examples)} images", network.solves)
    traced = examples.take(np.arange(min(_TRACED, len(examples))))
    images = to_float(jnp.asarray(traced.images), dataset.white)
    traces, tolerances = _timed(
        "traced residuals", lambda: residual_traces(model, images, jnp.asarray(traced.labels))
    )
    spectra = _timed("found spectra", lambda: network.spectra(solves.hardest_first()))
    budgets = _timed("tried other budgets", lambda: network.budgets(measure.BUDGETS))
    judged = confidence.confidence(solves)
    history = run.progress.history
    drawn = _timed(
        "drew figures",
        lambda: {
            **figures.residuals(traces, tolerances),
            **figures.evaluations(solves, network.solver.max_iter),
            **figures.spectra(spectra),
            **figures.budgets(budgets, config.tol),
            **figures.confidence(solves, judged),
            **figures.epochs(history),
        },
    )
    report = Report(
        title=f"Diagnosis of {arguments.run}",
        facts=_facts(run, network.solver, len(examples)),
        troubles=_troubles(run, solves, traces, spectra, budgets),
        examples=examples,
        numbers=numbers,
        white=dataset.white,
        classes=_CLASSES.get(dataset.name, range(dataset.num_classes)),
        tol=config.tol,
        solves=solves,
        traced=len(traced),
        spectra=spectra,
        budgets=budgets,
        confidence=judged,
        backward="" if "backward" in traces else _no_backward(config),
        figures=drawn,
    )
    output = arguments.output or arguments.run / "diagnosis"
    output.mkdir(parents=True, exist_ok=True)
    for name, png in drawn.items():
        (output / f"{name}.png").write_bytes(png)
    write_atomically(output / "index.html", render(report))
    for trouble in report.troubles:
        print(advice.text(trouble))
    if not report.troubles:
        print("nothing to worry about")
    return output / "index.html"


def _chosen(labels: np.ndarray, count: int) -> np.ndarray:
    """Indices of a stratified subset, the same one for each run; all if there are no more."""
    return np.arange(len(labels)) if count >= len(labels) else fixed_split(labels, count)[0]


def _facts(run: Run, solver: Solver, count: int) -> dict[str, str]:
    experiment, progress = run.experiment, run.progress
    config, dataset = experiment.config, experiment.dataset
    core = experiment.model.core
    stability = (f"{flag_of(name)} {getattr(config, name)}" for name in config.changed())
    split = dataset.evaluation_name
    part = f"{count:,} of the {len(dataset.evaluation):,} {split} images"
    if count < len(dataset.evaluation):
        part += ", a stratified subset"
    if split == "validation":
        part += " (--validation-fraction: the test set is not looked at)"
    epochs = f"{progress.epoch} of {config.epochs}"
    if progress.position:
        epochs += f", and {progress.position} steps"
    facts = {
        "run": str(run.path),
        "data": f"{dataset.name}, trained on {len(dataset.train):,} images",
        "looked at": part,
        "model": f"{config.model}, {count_parameters(experiment.model):,} parameters",
        "solver": repr(solver),
        "gradient": repr(core.gradient),
        "stability": ", ".join(stability),
        "execution": "" if core.execution == Execution() else repr(core.execution),
        "epochs trained": epochs,
        "machine": machine(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _troubles(
    run: Run,
    solves: measure.Solves,
    traces: Mapping[str, np.ndarray],
    spectra: measure.Spectra,
    budgets: measure.Budgets,
) -> list[advice.Trouble]:
    """Troubles with these images; where nothing was traced backwards, those of the newest epoch."""
    config, history = run.experiment.config, run.progress.history
    backward_tol = config.tol if config.backward_tol is None else config.backward_tol
    record = solves.record()
    tolerances = {"forward": config.tol, "backward": backward_tol}
    if "backward" in traces:
        record |= measure.backward_record(traces["backward"], backward_tol)
    limits = advice.Limits(converged=config.warn_converged)
    found = advice.of_record(record, limits, tolerances=tolerances)
    if "backward" not in traces and history:
        newest = {name: value for name, value in history[-1].items() if "backward" in name}
        approximate = config.gradient in ("one_step", "neumann")
        then = advice.of_record(newest, limits, tolerances=tolerances, approximate=approximate)
        when = f"in epoch {history[-1]['epoch']} of the training: "
        found += [
            dataclasses.replace(trouble, evidence=when + trouble.evidence) for trouble in then
        ]
    found += advice.of_spectrum(spectra.radius, spectra.error, spectra.converged)
    tried = (budgets.budgets, budgets.accuracy, budgets.trained, len(solves.labels))
    return found + advice.of_budget(*tried)


def _no_backward(config: Config) -> str:
    """Why there is no residual of a backward solve."""
    if config.gradient not in ("implicit", "shine"):
        return f"Nothing is solved backwards: --gradient {config.gradient}."
    return f"--backward-solver {config.backward_solver} keeps no trace of its residuals."


def _timed(done: str, work: Callable[[], T]) -> T:
    """Does a part of the work and says how long it took."""
    started = time.monotonic()
    result = work()
    print(f"{done} ({time.monotonic() - started:.1f} s)", flush=True)
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line `arguments` and returns the exit code.

    0: the report is written; 2: a bad flag, no such run, no checkpoint, a run without a solver, or
    missing data; 130: stopped by Ctrl-C.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    parsed = tyro.cli(Arguments, prog="python -m experiments.diagnose", args=arguments)
    try:
        print(f"wrote {diagnose(parsed)}")
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
