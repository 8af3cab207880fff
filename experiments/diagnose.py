"""Looks at the solves of a network trained by any of the scripts, on images or on sequences.

    python -m experiments.diagnose --run runs/digits

Writes `diagnosis/index.html` into the run's folder, a page that needs nothing else, and the figures
in it as PNG files beside it. The run may be finished, interrupted, or still going on.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

import jax.numpy as jnp
import numpy as np
import tyro

from deq_jax import Execution, Solver
from deq_jax.models.conv_deq import count_parameters
from experiments.report import confidence, figures, images, measure, results, sequences
from experiments.report.page import Report, render
from experiments.report.traces import residual_traces
from experiments.report.trained import Run, read_run
from experiments.studies.tables import machine
from experiments.train import advice
from experiments.train.config import TrainingConfig
from experiments.train.errors import ExperimentError, UsageError
from experiments.train.runs import flag_of, write_atomically

_TRACED = 64
"""Examples whose residuals are drawn."""

_CHOOSE = {
    "image_classification": images.choose,
    "language_model": sequences.choose_text,
    "copy_memory": sequences.choose_copies,
}
"""What chooses the examples to look at, for a run of each script."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a report on the solves of a trained network: residuals, spectra, warnings.

    Attributes:
        run: folder of a run of experiments.image_classification, language_model or copy_memory.
        data_dir: folder of prepared data sets. None: that of the run.
        examples: look at so many images, or sequences, of those that the run is evaluated on.
        output: folder for the report. None: diagnosis/ in the run's folder.
    """

    run: pathlib.Path
    data_dir: str | None = None
    examples: Annotated[int, tyro.conf.arg(aliases=["--images"])] = 256
    output: pathlib.Path | None = None


def diagnose(arguments: Arguments) -> pathlib.Path:
    """Writes the report and returns its file.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    if arguments.examples < 1:
        raise UsageError(f"--examples must be at least 1, got {arguments.examples}")
    run = _timed("read the run", lambda: read_run(arguments.run, arguments.data_dir, _unfit))
    config, model = run.experiment.config, run.model()
    examples = _CHOOSE[run.script](run.experiment, arguments.examples)
    words = examples.words
    network = measure.Network(model, examples)

    solves = _timed(f"solved {len(examples)} {words.many}", network.solves)
    inputs, targets = (jnp.asarray(leaf[:_TRACED]) for leaf in (examples.inputs, examples.targets))
    traces, tolerances = _timed(
        "traced residuals", lambda: residual_traces(model, examples.prepare(inputs), targets)
    )
    spectra = _timed("found spectra", lambda: network.spectra(solves.hardest_first()))
    budgets = _timed("tried other budgets", lambda: network.budgets(measure.BUDGETS))
    judged = confidence.confidence(solves, examples.good(solves))
    history = run.progress.history
    drawn = _timed(
        "drew figures",
        lambda: {
            **figures.residuals(traces, tolerances, words),
            **figures.evaluations(solves, network.solver.max_iter),
            **figures.spectra(spectra, words),
            **figures.budgets(budgets, config.tol, words),
            **figures.confidence(solves, judged, words),
            **figures.epochs(history),
        },
    )
    report = Report(
        title=f"Diagnosis of {arguments.run}",
        script=run.script,
        facts=_facts(run, network.solver, examples.facts),
        troubles=_troubles(run, solves, traces, spectra, budgets),
        examples=examples,
        tol=config.tol,
        solves=solves,
        traced=len(inputs),
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


def _facts(run: Run, solver: Solver, examples: Mapping[str, str]) -> dict[str, str]:
    experiment, progress = run.experiment, run.progress
    config, core = experiment.config, experiment.model.core
    stability = (f"{flag_of(name)} {getattr(config, name)}" for name in config.changed())
    epochs = f"{progress.epoch} of {config.epochs}"
    if progress.position:
        epochs += f", and {progress.position} steps"
    facts = {
        "run": str(run.path),
        **examples,
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
    solves: results.Solves,
    traces: Mapping[str, np.ndarray],
    spectra: results.Spectra,
    budgets: results.Budgets,
) -> list[advice.Trouble]:
    """Troubles with the examples; where nothing was traced backwards, those of the newest epoch."""
    config, history = run.experiment.config, run.progress.history
    backward_tol = config.tol if config.backward_tol is None else config.backward_tol
    record = solves.record()
    tolerances = {"forward": config.tol, "backward": backward_tol}
    if "backward" in traces:
        record |= measure.backward_record(traces["backward"], backward_tol)
    limits = advice.Limits(converged=config.warn_converged)
    used = {"solver": config.solver, "backward_solver": config.backward_solver}
    found = advice.of_record(record, limits, tolerances=tolerances, **used)
    if "backward" not in traces and history:
        newest = {name: value for name, value in history[-1].items() if "backward" in name}
        approximate = config.gradient in ("one_step", "neumann")
        options = {"tolerances": tolerances, "approximate": approximate, **used}
        then = advice.of_record(newest, limits, **options)
        when = f"in epoch {history[-1]['epoch']} of the training: "
        found += [
            dataclasses.replace(trouble, evidence=when + trouble.evidence) for trouble in then
        ]
    radii = spectra.radius, spectra.error, spectra.converged
    found += advice.of_spectrum(*radii, solver=config.solver)
    tried = (budgets.budgets, budgets.accuracy, budgets.trained, solves.labels.size)
    return found + advice.of_budget(*tried)


def _unfit(script: str, config: TrainingConfig) -> str:
    """Why a run cannot be diagnosed; empty if it can."""
    if config.is_deq:
        return ""
    return (
        f"a control, --model {config.model}, which has no solver to diagnose; choose a run with "
        "--model deq"
    )


def _no_backward(config: TrainingConfig) -> str:
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
