"""Pieces of HTML that the page and the galleries of examples are made of."""

import base64
import html
import re
from typing import Any

from deq_jax import Status
from experiments.report.figures import Figures
from experiments.report.results import Solves

_STATUSES = {
    Status.CONVERGED: "converged",
    Status.MAX_ITER: "not converged",
    Status.DIVERGED: "diverged",
}


def charts(figures: Figures, prefix: str) -> str:
    """The figures whose names begin with `prefix`, in a grid; empty if there are none."""
    found = [(name, png) for name, png in figures.items() if name.startswith(prefix)]
    images = "".join(image(png, name.replace("_", " "), "chart") for name, png in found)
    return f'<div class="charts">{images}</div>' if found else ""


def image(png: bytes, alt: str, kind: str) -> str:
    """A PNG in the page itself; `kind` is its class."""
    data = base64.b64encode(png).decode("ascii")
    return f'<img class="{kind}" alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def solved(solves: Solves, index: int) -> tuple[str, ...]:
    """Lines about the solve of an example."""
    return (
        f"{solves.iterations[index]} evaluations",
        f"residual {solves.residual[index]:.1e}",
        _STATUSES[Status(int(solves.status[index]))],
    )


def paragraph(text: str) -> str:
    """Plain text as a paragraph."""
    return f"<p>{flagged(text.strip())}</p>\n"


def flagged(text: str) -> str:
    """Escaped text whose flags are set as code, and are not broken at their hyphens."""
    return re.sub(r"--[a-z][a-z-]*[a-z]", r"<code>\g<0></code>", escape(text))


def escape(text: Any) -> str:
    """Text as HTML."""
    return html.escape(str(text))
