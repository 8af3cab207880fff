"""deq_jax beside its peers: time, evaluations, accuracy and memory in interleaved runs.

    python -m experiments.benchmark solve step --rounds 5
    python -m experiments.benchmark --render

Workloads: solve, step, dense, heterogeneous, transformer, batch, width, nchw, shrinking, precision,
eager, preparation. Peers that are not installed are skipped; requirements-peers.txt says how to
install them.
"""

import contextlib
import dataclasses
import datetime
import pathlib
import shlex
import sys
import tempfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import tyro

from experiments.benchmark import page, referee
from experiments.benchmark.problems import Arrays, Problem
from experiments.benchmark.worker import WorkerFailedError, WorkerProcess
from experiments.benchmark.workloads import IMPLEMENTATIONS, INSTALL, WORKLOADS, Case, missing
from experiments.studies.tables import ROOT, processor, revision, versions
from experiments.train.errors import ExperimentError, UsageError

PACKAGES = ("jax", "jaxlib", "torch", "torchdeq", "jaxopt", "optimistix", "lineax")
SHORTEST_TURN = 0.2
"""Seconds; calls that are shorter are repeated in a turn, and the mean is taken."""
REFERENCE_LIMIT = 3600.0
"""Seconds that a float64 reference may take."""


@dataclasses.dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        workloads: their names. None: all.
        implementations: only these, by the names of the tables' rows.
        rounds: turns of each implementation.
        limit: seconds that a call may take, compilation included, before it counts as failed.
        quick: tiny problems and one round: to see that everything works.
        write: keep the results in docs/data, and render docs/benchmarks.md and its pictures from
            them and from those kept for other workloads.
        render: measure nothing, and render the page and its pictures from the results in docs/data.
    """

    workloads: tyro.conf.Positional[tuple[str, ...]] = ()
    implementations: tuple[str, ...] = ()
    rounds: int = 5
    limit: float = 600.0
    quick: bool = False
    write: bool = False
    render: bool = False

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
    if config.render:
        page.STUDY.publish()
        return
    absent = missing(config.implementations or IMPLEMENTATIONS)
    for package, needed in absent.items():
        say(f"{package} is not installed ({INSTALL[package]}); skipped: {'; '.join(needed)}")
    skipped = {name for needed in absent.values() for name in needed}
    wanted = set(config.implementations or IMPLEMENTATIONS) - skipped
    for name in config.workloads or WORKLOADS:
        cases = {}
        for case_name, case in WORKLOADS[name](config.quick).items():
            chosen = [n for n in dict.fromkeys(case.implementations) if n in wanted]
            if chosen:
                cases[case_name] = run_case(f"{name}, {case_name}", case, chosen, config)
            else:
                say(f"{name}, {case_name}: none of the chosen implementations takes part")
        if not cases:
            continue
        part = {"context": _context(config, name), "cases": cases}
        print(f"### {name}\n\n{page.workload_text(name, part)}\n", flush=True)
        if config.write:
            page.STUDY.keep(name, part)
            page.STUDY.publish()


def run_case(name: str, case: Case, implementations: list[str], config: Config) -> dict[str, Any]:
    """The case's record: settings, and a row for each implementation.

    Workers are made ready one by one, are timed in turns, and what they return is judged.
    """
    problem = case.problem()
    rows: dict[str, Any] = {}

    def fail(implementation: str, error: WorkerFailedError) -> None:
        rows[implementation] = {"failed": str(error)}
        say(f"{name}: {implementation} failed: {error}\n{error.trouble.strip()[-1500:]}")

    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        files = {what: pathlib.Path(folder) / f"{what}.npz" for what in ("problem", "result")}
        problem.save(files["problem"])
        say(f"{name}: float64 reference")
        files["reference"], reference = reference_of(problem, files["problem"])
        workers = {}
        for implementation in implementations:
            say(f"{name}: {implementation} gets ready")
            environment = IMPLEMENTATIONS[implementation].environment()
            worker = stack.enter_context(WorkerProcess(environment, config.limit))
            try:
                row = prepare(worker, implementation, case, files, repeat=not config.quick)
                rows[implementation] = row | judge(problem, files["result"], reference)
                workers[implementation] = worker
            except WorkerFailedError as error:
                fail(implementation, error)
        rounds = 1 if config.quick else config.rounds
        for number in range(rounds):
            start = number % max(1, len(workers))
            for implementation in (*list(workers)[start:], *list(workers)[:start]):
                row = rows[implementation]
                if "failed" in row:
                    continue
                say(f"{name}: round {number + 1} of {rounds}, {implementation}")
                try:
                    for what, repeats in row["repeats"].items():
                        answer = workers[implementation].ask("time", what=what, repeats=repeats)
                        row["seconds"][what].append(answer["seconds"])
                except WorkerFailedError as error:
                    fail(implementation, error)
    return {
        "mode": case.mode,
        "size": case.size,
        "tol": problem.tol,
        "max_iter": problem.max_iter,
        "reference_residual": float(referee.residuals(problem, reference["z"]).max()),
        "rows": rows,
    }


def reference_of(problem: Problem, path: pathlib.Path) -> tuple[pathlib.Path, Arrays]:
    """The float64 reference of the problem in a file, from the cache where it is there."""
    sources = (ROOT / "experiments/benchmark" / f"{n}.py" for n in ("jax_calls", "reference"))
    digest = problem.digest(*(source.read_bytes() for source in sources))
    cached = ROOT / ".cache" / "benchmark" / f"{digest}.npz"
    if not cached.exists():
        cached.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_name("reference.npz")
        with WorkerProcess({}, REFERENCE_LIMIT) as worker:
            worker.ask("reference", problem=str(path), path=str(made))
        cached.write_bytes(made.read_bytes())
    with np.load(cached) as data:
        return cached, dict(data)


def prepare(
    worker: WorkerProcess,
    implementation: str,
    case: Case,
    files: dict[str, pathlib.Path],
    *,
    repeat: bool,
) -> dict[str, Any]:
    """Loads and first calls; what the worker reports, and how often calls are repeated."""
    how = IMPLEMENTATIONS[implementation]
    loaded = worker.ask(
        "load",
        problem=str(files["problem"]),
        reference=str(files["reference"]),
        module=how.module,
        calls=how.calls,
        case=case.settings(),
        options=how.options,
    )
    first = worker.ask("first")["seconds"]
    report = worker.ask("report", result=str(files["result"]))
    repeats = {}
    for what in loaded["timed"]:
        worker.ask("time", what=what, repeats=1)  # compiles, or warms up
        seconds = worker.ask("time", what=what, repeats=1)["seconds"]
        short = repeat and seconds < SHORTEST_TURN
        repeats[what] = int(np.ceil(SHORTEST_TURN / seconds)) if short else 1
    return {"first": first, **report, "repeats": repeats, "seconds": {w: [] for w in repeats}}


def judge(problem: Problem, result: pathlib.Path, reference: Arrays) -> dict[str, Any]:
    """What the referee says of a worker's result."""
    with np.load(result) as data:
        return referee.judge(problem, dict(data), reference)


def _context(config: Config, workload: str) -> dict[str, Any]:
    command = ["python", "-m", "experiments.benchmark", workload, f"--rounds={config.rounds}"]
    command += ["--quick"] * config.quick + ["--write"] * config.write
    if config.implementations:
        command += ["--implementations", *config.implementations]
    return {
        "date": datetime.date.today().isoformat(),
        "machine": processor(),
        "versions": versions(PACKAGES),
        "revision": revision(),
        "rounds": 1 if config.quick else config.rounds,
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
