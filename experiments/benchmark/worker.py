"""One implementation of one problem in a process of its own; obeys the parent's JSON lines.

    python -m experiments.benchmark.worker

Requests come one a line and are answered by one line each, in this order: `load` reads the problem
and imports the implementation, `first` makes the first call, `report` writes what it returned and
counts, `time` makes timed calls, any number of times.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
import traceback
from typing import Any

import numpy as np

from experiments.benchmark.problems import Problem


class Worker:
    """Answers requests."""

    def __init__(self) -> None:
        self.calls: Any = None
        self.loaded = 0

    def load(
        self,
        problem: str,
        reference: str,
        module: str,
        task: dict[str, Any],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Reads the data and makes the implementation ready."""
        run = importlib.import_module(f"experiments.benchmark.{module}")
        with np.load(reference) as data:
            arrays = {name: data[name] for name in ("size", "cotangent_size")}
        loaded = Problem.load(problem)
        self.loaded = _peak()
        self.calls = run.Calls(loaded, task, arrays, options)
        return {"timed": list(self.calls.timed)}

    def first(self) -> dict[str, Any]:
        """Seconds of the first call."""
        return self.time("call", 1, warm_up=False)

    def report(self, result: str) -> dict[str, Any]:
        """Writes the result; evaluations forward and backward, and how it was set."""
        memory = _peak() - self.loaded  # before what only counts
        np.savez(result, **self.calls.result())
        return {
            "memory": memory,
            "forward": self.calls.evaluations(),
            "backward": self.calls.backward_products(),
            "notes": self.calls.notes(),
        }

    def time(self, what: str, repeats: int, warm_up: bool = True) -> dict[str, Any]:
        """Seconds of one call, the mean of `repeats`."""
        call = self.calls.timed[what]
        if warm_up:  # the process has slept while others had their turn
            call()
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        seconds = time.perf_counter() - started
        return {"seconds": seconds / repeats / self.calls.divisors[what]}


def _peak() -> int:
    """The process's peak resident memory so far, in bytes."""
    # Linux keeps the parent's peak in `ru_maxrss` of a process that it starts.
    with contextlib.suppress(OSError), open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Answers until the parent ends it or is gone."""
    # Nothing but answers may reach the parent's pipe.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        try:
            answer = getattr(worker, command)(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
