"""One implementation of one problem in a process of its own, and the parent's side of it.

Requests are JSON, one a line, and are answered by one line each. `load` reads the problem and
imports the implementation, `first` makes the first call, `report` writes what it returned and
counts, `time` makes timed calls, any number of times. `reference` is asked of a process that is
asked nothing else: it computes the float64 reference of a problem.
"""

import contextlib
import importlib
import json
import os
import resource
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiments.benchmark.problems import Problem
from experiments.studies.tables import ROOT


class WorkerFailedError(Exception):
    """A worker raised, died or was too slow; the message says which.

    Attributes:
        trouble: what it had written to its standard error.
    """

    def __init__(self, message: str, trouble: str):
        super().__init__(message)
        self.trouble = trouble


class WorkerProcess:
    """The parent's side of a worker; the process ends when its context is left.

    Args:
        environment: variables set in addition to this process's, without what changes timings.
        limit: seconds within which every request has to be answered.
    """

    def __init__(self, environment: Mapping[str, str], limit: float):
        self.limit = limit
        unwanted = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64")
        kept = {name: value for name, value in os.environ.items() if name not in unwanted}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=kept | dict(environment),
        )

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            WorkerFailedError: there is none, or it is an error; the process is gone afterwards.
        """
        request = json.dumps({"command": command, **arguments})
        line = ""
        with contextlib.suppress(BrokenPipeError):
            print(request, file=self._process.stdin, flush=True)
            if not select.select([self._process.stdout], [], [], self.limit)[0]:
                raise self._failed(f"no answer to `{command}` within {self.limit:g} s")
            line = self._process.stdout.readline()
        if not line:
            raise self._failed(f"the process ended with code {self._process.wait()} in `{command}`")
        answer = json.loads(line)
        if "error" in answer:
            raise self._failed(answer["error"])
        return answer

    def _failed(self, message: str) -> WorkerFailedError:
        self._errors.seek(0)
        trouble = self._errors.read()
        self.close()
        return WorkerFailedError(message, trouble)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Worker:
    """The process's own side: a method for each request."""

    def __init__(self) -> None:
        self.calls: Any = None
        self.loaded = 0

    def reference(self, problem: str, path: str) -> dict[str, Any]:
        """Writes the float64 reference of a problem."""
        from experiments.benchmark.reference import reference_of

        np.savez(path, **reference_of(Problem.load(problem)))
        return {}

    def load(
        self,
        problem: str,
        reference: str,
        module: str,
        calls: str,
        case: dict[str, Any],
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """Reads the data and makes the implementation ready."""
        run = importlib.import_module(f"experiments.benchmark.{module}")
        with np.load(reference) as data:
            arrays = {name: data[name] for name in ("size", "cotangent_size")}
        loaded = Problem.load(problem)
        self.loaded = _peak()
        self.calls = getattr(run, calls)(loaded, case, arrays, options)
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
