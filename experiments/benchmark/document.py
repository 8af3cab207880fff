"""docs/benchmarks.md, made from the kept results."""

import pathlib
from typing import Any

from experiments.benchmark import tables
from experiments.benchmark.figures import Record
from experiments.benchmark.workloads import WORKLOADS, Workload

PAGE = pathlib.Path(__file__).with_name("page.md")
"""The page's text, with `{targets}`, `{workloads}` and `{equal_ridge}` where tables go."""


def render(results: dict[str, Any], remarks: dict[str, str]) -> str:
    """The page.

    Args:
        results: by workload: `context` and `cases`.
        remarks: what is to be said about a workload or a target, by its name.
    """
    known = {name: WORKLOADS[name] for name in WORKLOADS if name in results}
    workloads = [
        section(name, workload, results[name], remarks.get(name, ""))
        for name, workload in known.items()
    ]
    equal_ridge = [
        f"*{name}, {case}*\n\n{tables.case(record, equal_ridge=True)}"
        for name in known
        for case, record in results[name]["cases"].items()
        if any(row in tables.ONLY_EQUAL_RIDGE for row in record["rows"])
    ]
    page = PAGE.read_text(encoding="utf-8")
    page = page.replace("{targets}", tables.targets(results, remarks))
    page = page.replace("{workloads}", "\n\n".join(workloads))
    return page.replace("{equal_ridge}", "\n\n".join(equal_ridge))


def section(name: str, workload: Workload, result: dict[str, Any], remark: str = "") -> str:
    """What is said about one workload."""
    cases = result["cases"]
    parts = [f"### {name}", workload.text, limits(cases)]
    if workload.axis:
        parts.append(tables.series(workload.axis, cases))
        parts.append(
            "Milliseconds, evaluations forward/backward in brackets; a star marks a residual above "
            "the tolerance."
        )
        parts.append(f"![{name}](figures/benchmark_{name}.png)")
    else:
        for case, record in cases.items():
            parts += [f"*{case}*", tables.case(record)]
        parts.append(settings(cases))
    return "\n\n".join([*parts, *([remark] if remark else []), context(result["context"])])


def limits(cases: dict[str, Record]) -> str:
    """Tolerance and most evaluations; the same in all cases of a workload."""
    record = next(iter(cases.values()))
    return (
        f"Tolerance {record['tol']:g}, at most {record['max_iter']} evaluations; residual of the "
        f"reference {record['reference_residual']:.0e}."
    )


def settings(cases: dict[str, Record]) -> str:
    """How the implementations say they were set, each different line once."""
    lines = [
        f"- {name}: {row['notes']}"
        for record in cases.values()
        for name, row in record["rows"].items()
        if "failed" not in row
    ]
    return "\n".join(dict.fromkeys(lines))


def context(context: dict[str, Any]) -> str:
    """When, where and with what a workload was run."""
    return (
        f"<sub>{context['when']}, {context['machine']}; deq_jax {context['revision']}, "
        f"{context['versions']}; {context['rounds']} rounds; `{context['command']}`</sub>"
    )
