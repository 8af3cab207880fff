"""One case: its workers, made ready one by one, timed in turns, judged at the end."""

import contextlib
import dataclasses
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmark import referee
from experiments.benchmark.implementations import IMPLEMENTATIONS
from experiments.benchmark.problems import Arrays, Problem
from experiments.benchmark.processes import (
    ROOT,
    WorkerFailedError,
    WorkerProcess,
    child_environment,
)
from experiments.benchmark.workloads import Case

SHORTEST_TURN = 0.2
"""Seconds; calls that are shorter are repeated in a turn, and the mean is taken."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """Runs cases.

    Attributes:
        folder: for files that workers are given and write.
        rounds: turns of each implementation.
        limit: seconds for an answer of a worker.
        repeat: repeat short calls in a turn.
        say: takes lines that tell what is going on.
    """

    folder: pathlib.Path
    rounds: int
    limit: float
    repeat: bool
    say: Callable[[str], None]

    def run(self, name: str, case: Case, implementations: list[str]) -> dict[str, Any]:
        """The case's record: settings, and a row for each implementation."""
        problem = case.problem()
        path = self.folder / "problem.npz"
        problem.save(path)
        self.say(f"{name}: float64 reference")
        reference_path, reference = self.reference(problem, path)
        rows: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            workers = {}
            for number, implementation in enumerate(implementations):
                self.say(f"{name}: {implementation} gets ready")
                environment = IMPLEMENTATIONS[implementation].environment()
                worker = stack.enter_context(WorkerProcess(environment, self.limit))
                result = self.folder / f"result{number}.npz"
                try:
                    rows[implementation] = self._prepare(
                        worker, implementation, case, path, reference_path, result
                    )
                    with np.load(result) as data:
                        rows[implementation] |= referee.judge(problem, dict(data), reference)
                    workers[implementation] = worker
                except WorkerFailedError as error:
                    self._fail(rows, name, implementation, error)
            self._take_turns(name, workers, rows)
        return {
            "mode": case.mode,
            "size": case.size,
            "tol": problem.tol,
            "max_iter": problem.max_iter,
            "reference_residual": float(referee.residuals(problem, reference["z"]).max()),
            "rows": rows,
        }

    def reference(self, problem: Problem, path: pathlib.Path) -> tuple[pathlib.Path, Arrays]:
        """The float64 reference, from the cache where it is there."""
        sources = (ROOT / "experiments/benchmark" / f"{n}.py" for n in ("cells_jax", "reference"))
        digest = problem.digest(*(source.read_bytes() for source in sources))
        cached = ROOT / ".cache" / "benchmark" / f"{digest}.npz"
        if not cached.exists():
            cached.parent.mkdir(parents=True, exist_ok=True)
            made = self.folder / "reference.npz"
            command = ["-m", "experiments.benchmark.reference", str(path), str(made)]
            subprocess.run(
                [sys.executable, *command], check=True, cwd=ROOT, env=child_environment({})
            )
            made.replace(cached)
        with np.load(cached) as data:
            return cached, dict(data)

    def _prepare(
        self,
        worker: WorkerProcess,
        implementation: str,
        case: Case,
        problem: pathlib.Path,
        reference: pathlib.Path,
        result: pathlib.Path,
    ) -> dict[str, Any]:
        how = IMPLEMENTATIONS[implementation]
        task = {
            "mode": case.mode,
            "time_cell": case.mode == "forward",
            "every_sample": case.every_sample,
        }
        loaded = worker.ask(
            "load",
            problem=str(problem),
            reference=str(reference),
            module=how.module,
            task=task,
            options=how.options,
        )
        first = worker.ask("first")["seconds"]
        report = worker.ask("report", result=str(result))
        repeats = {}
        for what in loaded["timed"]:
            worker.ask("time", what=what, repeats=1)  # compiles, or warms up
            seconds = worker.ask("time", what=what, repeats=1)["seconds"]
            short = self.repeat and seconds < SHORTEST_TURN
            repeats[what] = int(np.ceil(SHORTEST_TURN / seconds)) if short else 1
        return {"first": first, **report, "repeats": repeats, "seconds": {w: [] for w in repeats}}

    def _take_turns(
        self, name: str, workers: dict[str, WorkerProcess], rows: dict[str, Any]
    ) -> None:
        names = list(workers)
        for number in range(self.rounds):
            start = number % max(1, len(names))
            for implementation in (*names[start:], *names[:start]):
                row, worker = rows[implementation], workers[implementation]
                if "failed" in row:
                    continue
                self.say(f"{name}: round {number + 1} of {self.rounds}, {implementation}")
                try:
                    for what, repeats in row["repeats"].items():
                        answer = worker.ask("time", what=what, repeats=repeats)
                        row["seconds"][what].append(answer["seconds"])
                except WorkerFailedError as error:
                    self._fail(rows, name, implementation, error)

    def _fail(
        self, rows: dict[str, Any], name: str, implementation: str, error: WorkerFailedError
    ) -> None:
        rows[implementation] = {"failed": str(error)}
        self.say(f"{name}: {implementation} failed: {error}\n{error.trouble.strip()[-1500:]}")
