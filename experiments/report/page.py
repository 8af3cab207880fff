"""A diagnosis as one HTML page that needs nothing else."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from experiments.report.confidence import ENOUGH, Confidence
from experiments.report.examples import Examples
from experiments.report.figures import Figures
from experiments.report.markup import charts, escape, flagged, paragraph
from experiments.report.results import Budgets, Solves, Spectra
from experiments.report.style import STYLE
from experiments.train.advice import Trouble

SHOWN = 12
"""Examples shown of the slowest, and of the fastest."""


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page tells.

    Attributes:
        title: its heading.
        script: name of the script that the run is of.
        facts: what was looked at, by name.
        troubles: what is wrong.
        examples: the examples.
        tol: tolerance of the forward solve.
        solves: the answers to the examples.
        traced: examples whose residuals are drawn.
        spectra: eigenvalues.
        budgets: other budgets.
        confidence: residual against what went well.
        backward: why there is no backward residual; empty where there is one.
        figures: the figures.
    """

    title: str
    script: str
    facts: Mapping[str, str]
    troubles: Sequence[Trouble]
    examples: Examples
    tol: float
    solves: Solves
    traced: int
    spectra: Spectra
    budgets: Budgets
    confidence: Confidence
    backward: str
    figures: Figures


def render(report: Report) -> str:
    """The page."""
    words = report.examples.words
    sections = (
        ("warnings", "Warnings", _warnings(report)),
        ("residuals", "Residuals of the solves", _residuals(report)),
        ("evaluations", f"Evaluations, slow and fast {words.many}", _evaluations(report)),
        ("spectrum", "Spectral radius", _spectrum(report)),
        ("budget", "Accuracy against the solver's budget", _budget(report)),
        ("confidence", f"Residual against {words.against}", _confidence(report)),
        ("epochs", "Training", _epochs(report)),
    )
    links = " ".join(f'<a href="#{name}">{escape(title)}</a>' for name, title, _ in sections)
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{flagged(value)}</dd>" for name, value in report.facts.items()
    )
    body = "\n".join(
        f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{content}\n</section>'
        for name, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(report.title)}</h1>
<dl>{facts}</dl>
<nav>{links}</nav>
{body}
</main>
</body>
</html>
"""


def _warnings(report: Report) -> str:
    if not report.troubles:
        return '<p class="good">Nothing to worry about.</p>'
    rows = "".join(
        f'<tr><th scope="row">{escape(trouble.title)}</th><td>{flagged(trouble.evidence)}</td>'
        f"<td><ul>{''.join(f'<li>{flagged(advice)}</li>' for advice in trouble.advice)}</ul>"
        "</td></tr>"
        for trouble in report.troubles
    )
    return (
        '<table class="warnings"><thead><tr><th scope="col">what</th><th scope="col">evidence</th>'
        f'<th scope="col">what to try</th></tr></thead><tbody>{rows}</tbody></table>'
        + paragraph(f"Flags are those of experiments.{report.script}. A run with other settings "
                    "is another run: give it another --run-dir, or start over with --fresh.")
    )  # fmt: skip


def _residuals(report: Report) -> str:
    text = (
        f"Relative residual against evaluations of the cell, for {report.traced} of the "
        f"{report.examples.words.many}: "
        "median, band from best to worst, and tolerance (dashed). A sample that has stopped "
        f"counts with its last residual. {report.backward}"
    )
    return paragraph(text) + charts(report.figures, "residuals_")


def _evaluations(report: Report) -> str:
    solves, order = report.solves, report.solves.hardest_first()
    examples, words = report.examples, report.examples.words
    finite = solves.residual[np.isfinite(solves.residual)]
    text = (
        f"{solves.converged.mean():.1%} of {len(order)} {words.many} converge, in a mean of "
        f"{solves.iterations.mean():.1f} evaluations (median {np.median(solves.iterations):g}, "
        f"from {solves.iterations.min()} to {solves.iterations.max()}). "
    )
    if finite.size:
        text += f"Mean residual {finite.mean():.2g}, worst {finite.max():.2g}. "
    if (diverged := len(order) - finite.size) > 0:
        text += f"{words.many.capitalize()} that never had a finite one: {diverged}. "
    text += examples.score(solves)
    shown = min(SHOWN, -(-len(order) // 2))
    return "\n".join(
        (
            paragraph(text),
            charts(report.figures, "evaluations"),
            "<h3>Slowest</h3>",
            paragraph(
                "Diverged ones first, then those that did not converge, then by evaluations."
            ),
            examples.gallery(solves, order[:shown]),
            "<h3>Fastest</h3>",
            examples.gallery(solves, order[::-1][:shown]),
        )
    )


def _spectrum(report: Report) -> str:
    radius = report.spectra.radius
    known = np.isfinite(radius)
    words = report.examples.words
    text = f"Of {len(radius)} {words.many}, taken evenly from the slowest to the fastest: "
    if known.any():
        share = (radius[known] > 1).mean()
        text += (
            f"{share:.0%} have a spectral radius of the cell's Jacobian above 1; it is "
            f"{np.median(radius[known]):.3f} in the median, from {radius[known].min():.3f} to "
            f"{radius[known].max():.3f}. "
        )
    if (broken := int((~known).sum())) > 0:
        text += f"Jacobians that are not finite: {broken}. "
    inaccurate = int((known & ~report.spectra.converged).sum())
    text += f"Estimates that did not converge: {inaccurate}. "
    text += (
        "Plain iteration finds a solution only where the radius is below 1, and the sooner the "
        "smaller it is; anderson and broyden cope with more. Below: Ritz values in the complex "
        "plane. Filled ones are eigenvalues, hollow ones only outline the spectrum. "
    )
    text += words.spectrum
    return "\n".join(
        (
            paragraph(text),
            charts(report.figures, "radius"),
            charts(report.figures, "spectrum_"),
        )
    )


def _budget(report: Report) -> str:
    budgets = report.budgets
    words = report.examples.words
    text = (
        f"The same network and {words.many} with other values of --max-iter at test time. Here the "
        "tolerance is 0, so that each solve uses all of its evaluations; everything else of the "
        "solver is as in the run. Converged are residuals of at most the run's tolerance, "
        f"{report.tol:g}. With one evaluation the answer is where the solve starts."
    )
    columns = {
        "at most": (budgets.budgets, "d"),
        "accuracy": (budgets.accuracy, ".1%"),
        "converged": (budgets.converged, ".1%"),
        "mean residual": (budgets.residual, ".1e"),
    }
    if words.loss:
        columns["loss"] = budgets.loss, ".4f"
    heads = "".join(f'<th scope="col">{name}</th>' for name in columns)
    here = ' class="here"'
    rows = "".join(
        f"<tr{here if budget == budgets.trained else ''}>"
        + "".join(f"<td>{values[row]:{form}}</td>" for values, form in columns.values())
        + "</tr>"
        for row, budget in enumerate(budgets.budgets)
    )
    table = f'<table class="numbers"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'
    return paragraph(text) + charts(report.figures, "budget_") + table


def _confidence(report: Report) -> str:
    confidence, words = report.confidence, report.examples.words
    total, good = len(confidence.good), int(confidence.good.sum())
    tally = words.tally.format(good=good, bad=total - good, total=total)
    text = f"{words.question} {tally}"
    if not confidence.auroc:
        kind = words.few_bad if total - good < ENOUGH else words.few_good
        text += f" That is not enough {kind} to tell: it takes {ENOUGH}."
        return paragraph(text) + charts(report.figures, "confidence_")
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{value:.3f}</td></tr>"
        for name, value in confidence.auroc.items()
    )
    table = (
        '<table class="numbers"><thead><tr><th scope="col">score</th><th scope="col">AUROC</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )
    return paragraph(text) + table + charts(report.figures, "confidence_")


def _epochs(report: Report) -> str:
    drawn = charts(report.figures, "epochs_")
    if not drawn:
        return paragraph("No epoch is finished yet.")
    text = (
        "As metrics.jsonl has them: forward and backward over the training examples of each epoch, "
        f"and forward over the {report.examples.words.many} that it is evaluated on."
    )
    return paragraph(text) + drawn
