"""Looks at the solves of a network trained by any of the scripts: on images, sequences, a graph.

    python -m experiments.diagnose --run runs/digits

Writes `diagnosis/index.html` into the run's folder, a page that needs nothing else, and the figures
in it as PNG files beside it. The run may be finished, interrupted, or still going on.
"""

import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import jax.numpy as jnp
import tyro

from experiments.report import figures, measure, subject
from experiments.report.page import Report, render
from experiments.report.trained import read_run
from experiments.train.errors import UsageError
from experiments.train.reporter import reports_errors
from experiments.train.runs import write_atomically

_TRACED = 64
"""Number of examples whose residuals are drawn."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Write a report on the solves of a trained network: residuals, spectra, warnings.

    Attributes:
        run: folder of a run of experiments.image_classification, language_model, copy_memory or
            graph_classification.
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
    run = _timed("read the run", lambda: read_run(arguments.run, arguments.data_dir, subject.unfit))
    looked_at = subject.subject_of(run, arguments.examples)
    model, examples, words = looked_at.model, looked_at.examples, looked_at.examples.words
    network = measure.Network(model, examples)

    noun = words.many if len(examples) > 1 else words.one
    solves = _timed(f"solved {len(examples)} {noun}", network.solves)
    inputs, targets = (jnp.asarray(leaf[:_TRACED]) for leaf in (examples.inputs, examples.targets))
    traces, tolerances = _timed(
        "traced residuals",
        lambda: measure.residual_traces(model, examples.prepare(inputs), targets),
    )
    spectra = _timed("found spectra", lambda: network.spectra(solves.hardest_first()))
    budgets = _timed("tried other budgets", lambda: network.budgets(measure.BUDGETS))
    good = examples.good(solves)
    curves = measure.roc_curves(solves, good)

    def draw() -> dict[str, bytes]:
        compared = {}
        if len(examples) > 1:
            compared = figures.confidence_figures(solves, good, curves, words)
        drawn = {
            **figures.residual_figures(traces, tolerances, words.many),
            **figures.evaluation_figures(solves, network.solver.max_iter),
            **figures.spectrum_figures(spectra, words.one),
            **figures.budget_figures(budgets, looked_at.tol, words),
            **compared,
            **figures.epoch_figures(looked_at.history),
        }
        return {name: figures.png(figure) for name, figure in drawn.items()}

    report = Report(
        title=f"Diagnosis of {arguments.run}",
        subject=looked_at,
        findings=subject.findings(run, solves, traces, spectra, budgets),
        solves=solves,
        traces=traces,
        spectra=spectra,
        budgets=budgets,
        good=good,
        curves=curves,
        figures=_timed("drew figures", draw),
    )
    output = arguments.output or arguments.run / "diagnosis"
    output.mkdir(parents=True, exist_ok=True)
    for name, png in report.figures.items():
        (output / f"{name}.png").write_bytes(png)
    write_atomically(output / "index.html", render(report))
    for finding in report.findings:
        print(finding)
    if not report.findings:
        print("nothing to worry about")
    return output / "index.html"


def _timed(done: str, work: Callable[[], T]) -> T:
    """Does a part of the work and says how long it took."""
    started = time.monotonic()
    result = work()
    print(f"{done} ({time.monotonic() - started:.1f} s)", flush=True)
    return result


@reports_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments`, see `reports_errors`.

    Raises:
        SystemExit: with code 2, after a message, if the command line is bad.
    """
    parsed = tyro.cli(Arguments, prog="python -m experiments.diagnose", args=arguments)
    print(f"wrote {diagnose(parsed)}")


if __name__ == "__main__":
    sys.exit(main())
