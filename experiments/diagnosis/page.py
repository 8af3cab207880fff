"""A diagnosis as one HTML page that needs nothing else."""

import base64
import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deq_jax import Status
from experiments.common.advice import Trouble
from experiments.common.sources import Images
from experiments.diagnosis.confidence import ENOUGH, Confidence
from experiments.diagnosis.figures import Figures, thumbnail
from experiments.diagnosis.measure import Budgets, Solves, Spectra
from experiments.diagnosis.style import STYLE

SHOWN = 12
"""Images shown of the slowest, and of the fastest."""

_STATUSES = {
    Status.CONVERGED: "converged",
    Status.MAX_ITER: "not converged",
    Status.DIVERGED: "diverged",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page tells.

    Attributes:
        title: its heading.
        facts: what was looked at, by name.
        troubles: what is wrong.
        examples: the images.
        numbers: `[N]`, their places in the split that they are from.
        white: pixel value that becomes 1.
        classes: names of the classes.
        tol: tolerance of the forward solve.
        solves: the answers to the images.
        traced: images whose residuals are drawn.
        spectra: eigenvalues.
        budgets: other budgets.
        confidence: residual against correctness.
        backward: why there is no backward residual; empty where there is one.
        figures: the figures.
    """

    title: str
    facts: Mapping[str, str]
    troubles: Sequence[Trouble]
    examples: Images
    numbers: np.ndarray
    white: int
    classes: Sequence[str]
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
    sections = (
        ("warnings", "Warnings", _warnings(report)),
        ("residuals", "Residuals of the solves", _residuals(report)),
        ("evaluations", "Evaluations, slow and fast images", _evaluations(report)),
        ("spectrum", "Spectral radius", _spectrum(report)),
        ("budget", "Accuracy against the solver's budget", _budget(report)),
        ("confidence", "Residual against correctness", _confidence(report)),
        ("epochs", "Training", _epochs(report)),
    )
    links = " ".join(f'<a href="#{name}">{_escape(title)}</a>' for name, title, _ in sections)
    facts = "".join(
        f"<dt>{_escape(name)}</dt><dd>{_flagged(value)}</dd>"
        for name, value in report.facts.items()
    )
    body = "\n".join(
        f'<section id="{name}">\n<h2>{_escape(title)}</h2>\n{content}\n</section>'
        for name, title, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{_escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{_escape(report.title)}</h1>
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
        f'<tr><th scope="row">{_escape(trouble.title)}</th><td>{_flagged(trouble.evidence)}</td>'
        f"<td><ul>{''.join(f'<li>{_flagged(advice)}</li>' for advice in trouble.advice)}</ul>"
        "</td></tr>"
        for trouble in report.troubles
    )
    return (
        '<table class="warnings"><thead><tr><th scope="col">what</th><th scope="col">evidence</th>'
        f'<th scope="col">what to try</th></tr></thead><tbody>{rows}</tbody></table>'
        + _text("Flags are those of experiments.image_classification. A run with other settings "
                "is another run: give it another --run-dir, or start over with --fresh.")
    )  # fmt: skip


def _residuals(report: Report) -> str:
    text = (
        f"Relative residual against evaluations of the cell, for {report.traced} of the images: "
        "median, band from best to worst, and tolerance (dashed). A sample that has stopped "
        f"counts with its last residual. {report.backward}"
    )
    return _text(text) + _charts(report.figures, "residuals_")


def _evaluations(report: Report) -> str:
    solves, order = report.solves, report.solves.hardest_first()
    finite = solves.residual[np.isfinite(solves.residual)]
    text = (
        f"{solves.converged.mean():.1%} of {len(order)} images converge, in a mean of "
        f"{solves.iterations.mean():.1f} evaluations (median {np.median(solves.iterations):g}, "
        f"from {solves.iterations.min()} to {solves.iterations.max()}). "
    )
    if finite.size:
        text += f"Mean residual {finite.mean():.2g}, worst {finite.max():.2g}. "
    if (diverged := len(order) - finite.size) > 0:
        text += f"Images that never had a finite one: {diverged}. "
    text += f"Accuracy {solves.correct.mean():.1%}."
    shown = min(SHOWN, -(-len(order) // 2))
    return "\n".join(
        (
            _text(text),
            _charts(report.figures, "evaluations"),
            "<h3>Slowest</h3>",
            _text("Diverged ones first, then those that did not converge, then by evaluations."),
            _gallery(report, order[:shown]),
            "<h3>Fastest</h3>",
            _gallery(report, order[::-1][:shown]),
        )
    )


def _spectrum(report: Report) -> str:
    radius = report.spectra.radius
    known = np.isfinite(radius)
    text = f"Of {len(radius)} images, taken evenly from the slowest to the fastest: "
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
        "plane. Filled ones are eigenvalues, hollow ones only outline the spectrum."
    )
    return "\n".join(
        (
            _text(text),
            _charts(report.figures, "radius"),
            _charts(report.figures, "spectrum_"),
        )
    )


def _budget(report: Report) -> str:
    budgets = report.budgets
    text = (
        "The same network and images with other values of --max-iter at test time. Here the "
        "tolerance is 0, so that each solve uses all of its evaluations; everything else of the "
        "solver is as in the run. Converged are residuals of at most the run's tolerance, "
        f"{report.tol:g}. With one evaluation the answer is where the solve starts."
    )
    here = ' class="here"'
    rows = "".join(
        f"<tr{here if budget == budgets.trained else ''}><td>{budget}</td>"
        f"<td>{accuracy:.1%}</td><td>{converged:.1%}</td><td>{residual:.1e}</td></tr>"
        for budget, accuracy, converged, residual in zip(
            budgets.budgets, budgets.accuracy, budgets.converged, budgets.residual, strict=True
        )
    )
    table = (
        '<table class="numbers"><thead><tr><th scope="col">at most</th><th scope="col">accuracy'
        '</th><th scope="col">converged</th><th scope="col">mean residual</th></tr></thead>'
        f"<tbody>{rows}</tbody></table>"
    )
    return _text(text) + _charts(report.figures, "budget_") + table


def _confidence(report: Report) -> str:
    confidence = report.confidence
    total = confidence.correct + confidence.wrong
    text = (
        "Does a small residual, or a short solve, mean that the answer is right? AUROC is the "
        "chance that a right answer has the better score of two, one right and one wrong: 1 is "
        "perfect, 0.5 says nothing. "
        f"{confidence.correct} of {total} answers are right, {confidence.wrong} wrong."
    )
    if not confidence.auroc:
        kind = "mistakes" if confidence.wrong < ENOUGH else "right answers"
        text += f" That is not enough {kind} to tell: it takes {ENOUGH}."
        return _text(text) + _charts(report.figures, "confidence_")
    rows = "".join(
        f"<tr><td>{_escape(name)}</td><td>{value:.3f}</td></tr>"
        for name, value in confidence.auroc.items()
    )
    table = (
        '<table class="numbers"><thead><tr><th scope="col">score</th><th scope="col">AUROC</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
    )
    return _text(text) + table + _charts(report.figures, "confidence_")


def _epochs(report: Report) -> str:
    charts = _charts(report.figures, "epochs_")
    if not charts:
        return _text("No epoch is finished yet.")
    text = (
        "As metrics.jsonl has them: forward and backward over the training examples of each epoch, "
        "and forward over the images that it is evaluated on."
    )
    return _text(text) + charts


def _gallery(report: Report, indices: np.ndarray) -> str:
    solves = report.solves
    cards = []
    for index in indices:
        name = f"image {report.numbers[index]}"
        true, guess = (report.classes[one[index]] for one in (solves.labels, solves.predicted))
        mark = "right" if solves.correct[index] else "wrong"
        lines = (
            name,
            f"true {_escape(true)}",
            f'<span class="{mark}">predicted {_escape(guess)}</span>',
            f"{solves.iterations[index]} evaluations",
            f"residual {solves.residual[index]:.1e}",
            _STATUSES[Status(int(solves.status[index]))],
        )
        png = thumbnail(report.examples.images[index], report.white)
        picture = _image(png, name, "thumbnail")
        cards.append(f"<figure>{picture}<figcaption>{'<br>'.join(lines)}</figcaption></figure>")
    return f'<div class="gallery">{"".join(cards)}</div>'


def _charts(figures: Figures, prefix: str) -> str:
    """The figures whose names begin with `prefix`, in a grid; empty if there are none."""
    found = [(name, png) for name, png in figures.items() if name.startswith(prefix)]
    images = "".join(_image(png, name.replace("_", " "), "chart") for name, png in found)
    return f'<div class="charts">{images}</div>' if found else ""


def _image(png: bytes, alt: str, kind: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{kind}" alt="{_escape(alt)}" src="data:image/png;base64,{data}">'


def _text(text: str) -> str:
    return f"<p>{_flagged(text.strip())}</p>\n"


def _flagged(text: str) -> str:
    """Escaped text whose flags are set as code, and are not broken at their hyphens."""
    return re.sub(r"--[a-z][a-z-]*[a-z]", r"<code>\g<0></code>", _escape(text))


def _escape(text: Any) -> str:
    return html.escape(str(text))
