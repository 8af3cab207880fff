"""Cost as the work grows: milliseconds over size, both logarithmic."""

import pathlib
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from experiments.benchmark.figures import Record, seconds


def growth(axis: str, cases: dict[str, Record]) -> Figure:
    """A line for each implementation; what failed leaves a gap."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    names = dict.fromkeys(name for record in cases.values() for name in record["rows"])
    for name in names:
        points = [
            (record["size"], 1e3 * seconds(record["rows"][name]))
            for record in cases.values()
            if "failed" not in record["rows"].get(name, {"failed": ""})
        ]
        own = name.startswith("deq_jax")
        style: dict[str, Any] = {"linewidth": 2.2, "color": "black"} if own else {"linewidth": 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
    axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="milliseconds, forward and gradient")
    axes.grid(which="major", alpha=0.3)
    axes.legend()
    return figure


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes a PNG and lets go of the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
