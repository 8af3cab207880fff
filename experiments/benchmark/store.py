"""What is kept between runs: the results of each workload, and the remarks about them."""

import json
import pathlib
from typing import Any

from experiments.benchmark.processes import ROOT
from experiments.train.runs import write_atomically

RESULTS = ROOT / "docs" / "benchmarks.json"
REMARKS = pathlib.Path(__file__).with_name("remarks.md")


def load() -> dict[str, Any]:
    """Results by workload."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


def keep(workload: str, result: dict[str, Any]) -> dict[str, Any]:
    """Puts the result of a workload in the place of an older one; returns all."""
    results = load() | {workload: result}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(RESULTS, json.dumps(results, indent=1))
    return results


def remarks(text: str | None = None) -> dict[str, str]:
    """Texts by the `## NAME` they stand under."""
    text = REMARKS.read_text(encoding="utf-8") if text is None else text
    parts = text.split("\n## ")[1:]
    named = (part.partition("\n") for part in parts)
    return {name.strip(): body.strip() for name, _, body in named}
