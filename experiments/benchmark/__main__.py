"""deq_jax beside its peers: time, evaluations, accuracy and memory in interleaved runs.

    python -m experiments.benchmark solve step --rounds 5

Workloads: solve, step, dense, heterogeneous, transformer, batch, width, nchw, shrinking, precision.
Peers that are not installed are skipped; requirements-peers.txt says how to install them.
"""

import dataclasses
import datetime
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import tyro

from experiments.benchmark import document, store
from experiments.benchmark.implementations import IMPLEMENTATIONS, INSTALL, missing
from experiments.benchmark.processes import ROOT
from experiments.benchmark.rounds import Runner
from experiments.benchmark.workloads import WORKLOADS
from experiments.studies import machine
from experiments.train.errors import ExperimentError, UsageError

PAGE = ROOT / "docs" / "benchmarks.md"


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        workloads: their names. None: all.
        implementations: only these, by the names of the tables' rows.
        rounds: turns of each implementation.
        limit: seconds that a call may take, compilation included, before it counts as failed.
        quick: tiny problems and one round: to see that everything works.
        write: keep the results and write docs/benchmarks.md and its figures, with those kept from
            earlier runs for other workloads.
    """

    workloads: tyro.conf.Positional[tuple[str, ...]] = ()
    implementations: tuple[str, ...] = ()
    rounds: int = 5
    limit: float = 600.0
    quick: bool = False
    write: bool = False

    def check(self) -> None:
        """Raises a UsageError that names what is unknown and what is known."""
        _check_known("workload", self.workloads, WORKLOADS)
        _check_known("implementation", self.implementations, IMPLEMENTATIONS)
        if self.rounds < 1:
            raise UsageError(f"--rounds must be at least 1, got {self.rounds}")
        if self.limit <= 0:
            raise UsageError(f"--limit must be positive, got {self.limit}")
        if self.quick and self.write:
            raise UsageError("--quick measures nothing that --write could write")


def _check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            raise UsageError(f"unknown {what} {name!r}; known are: {'; '.join(known)}")


def say(line: str) -> None:
    """A line about progress, on standard error."""
    print(line, file=sys.stderr, flush=True)


def run(config: Config) -> None:
    """Runs the workloads; prints each one's tables when it is done."""
    absent = missing(config.implementations or IMPLEMENTATIONS)
    for package, needed in absent.items():
        say(f"{package} is not installed ({INSTALL[package]}); skipped: {'; '.join(needed)}")
    skipped = {name for needed in absent.values() for name in needed}
    rounds = 1 if config.quick else config.rounds
    for name in config.workloads or WORKLOADS:
        workload, cases = WORKLOADS[name], {}
        for case_name, case in workload.cases(config.quick).items():
            chosen = [
                implementation
                for implementation in case.implementations
                if implementation not in skipped
                and (not config.implementations or implementation in config.implementations)
            ]
            if not chosen:
                say(f"{name}, {case_name}: none of the chosen implementations takes part")
                continue
            with tempfile.TemporaryDirectory() as folder:
                runner = Runner(
                    pathlib.Path(folder), rounds, config.limit, repeat=not config.quick, say=say
                )
                cases[case_name] = runner.run(f"{name}, {case_name}", case, chosen)
        if not cases:
            continue
        result = {"context": _context(config, name, rounds), "cases": cases}
        print(document.section(name, workload, result), end="\n\n", flush=True)
        if config.write:
            write(store.keep(name, result))


def write(results: dict[str, Any]) -> None:
    """Writes the page and its figures."""
    from experiments.benchmark import plots  # Matplotlib, for this alone

    for name, result in results.items():
        axis = WORKLOADS[name].axis
        if axis:
            path = PAGE.parent / "figures" / f"benchmark_{name}.png"
            plots.save(plots.growth(axis, result["cases"]), path)
    PAGE.write_text(document.render(results, store.remarks()), encoding="utf-8")
    say(f"written: {PAGE.relative_to(ROOT)}")


def _context(config: Config, workload: str, rounds: int) -> dict[str, Any]:
    command = ["python", "-m", "experiments.benchmark", workload, f"--rounds={config.rounds}"]
    command += ["--quick"] * config.quick + ["--write"] * config.write
    if config.implementations:
        command += ["--implementations", *config.implementations]
    return {
        "when": datetime.date.today().isoformat(),
        "machine": machine.processor(),
        "versions": machine.versions(),
        "revision": machine.revision(),
        "rounds": rounds,
        "command": shlex.join(command) + " (tiny problems, not those described)" * config.quick,
    }


def main() -> None:
    """Parses the command line and runs; errors of usage end with code 2."""
    config = tyro.cli(Config, description=__doc__)
    try:
        config.check()
        run(config)
    except ExperimentError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
