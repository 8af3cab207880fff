"""The parent's side of a worker: a child process that is asked one thing at a time."""

import contextlib
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]


class WorkerFailedError(Exception):
    """A worker raised, died or was too slow; the message says which.

    Attributes:
        trouble: what it had written to its standard error.
    """

    def __init__(self, message: str, trouble: str):
        super().__init__(message)
        self.trouble = trouble


class WorkerProcess:
    """A worker; ended on leaving its context.

    Args:
        environment: variables set in addition to this process's.
        limit: seconds within which every request has to be answered.
    """

    def __init__(self, environment: Mapping[str, str], limit: float):
        self.limit = limit
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.benchmark.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=ROOT,
            env=child_environment(environment),
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


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without what would change timings, and `extra`."""
    unwanted = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_X64")
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    return kept | dict(extra)
