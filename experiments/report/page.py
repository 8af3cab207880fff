"""A report as one HTML page that needs no other file; `page.html.jinja` is its template."""

import base64
import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import jinja2
import markupsafe
import numpy as np

from deq_jax import Finding, Status
from experiments.report.measure import ENOUGH, Budgets, RocCurve, Solves, Spectra
from experiments.report.subject import Subject


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the page tells.

    Attributes:
        title: heading of the page.
        subject: the network, its run and its examples.
        findings: what is wrong.
        solves: the answers to the examples.
        traces: from `residual_traces`.
        spectra: eigenvalues of the cell's Jacobian.
        budgets: what other budgets of the solver come to.
        good: `[N]` boolean, from `Examples.good`.
        curves: from `roc_curves`.
        figures: PNG files by their names without `.png`. Each section shows the figures whose
            names begin with a certain word.
    """

    title: str
    subject: Subject
    findings: Sequence[Finding]
    solves: Solves
    traces: Mapping[str, np.ndarray]
    spectra: Spectra
    budgets: Budgets
    good: np.ndarray
    curves: Mapping[str, RocCurve]
    figures: Mapping[str, bytes]


def render(report: Report) -> str:
    """The page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"data_url": data_url, "with_code": with_code}
    statuses = {
        Status.CONVERGED: "converged",
        Status.MAX_ITER: "not converged",
        Status.DIVERGED: "diverged",
    }
    context = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    template = environment.get_template("page.html.jinja")
    return template.render(context, statuses=statuses, ENOUGH=ENOUGH, median=np.median)


def data_url(png: bytes) -> str:
    """A PNG as the address of an image that is in the page itself."""
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def with_code(text: str) -> markupsafe.Markup:
    """Escaped text, in which what stands in backticks is set as code."""
    code = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(markupsafe.escape(text)))
    return markupsafe.Markup(code)
