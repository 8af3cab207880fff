"""The folder of a run: its files, whose settings they come from, and what may be continued."""

import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

from experiments.train.errors import RunMismatchError

_ABSENT = "absent"


def write_atomically(path: pathlib.Path, text: str) -> None:
    """Writes a text file that is never seen half-written."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def flag_of(field: str) -> str:
    """The flag on the command line that sets a field: `--batch-size` for `batch_size`."""
    return "--" + field.replace("_", "-")


class RunDirectory:
    """The files of one run.

    Args:
        path: the folder; created by `open`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = pathlib.Path(path)
        self.config = self.path / "config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.result = self.path / "result.json"
        self.vocabulary = self.path / "vocabulary.json"
        self.curves = self.path / "curves.png"
        self.residuals = self.path / "residuals.png"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def open(
        self,
        config: Mapping[str, Any],
        *,
        irrelevant: frozenset[str] = frozenset(),
        environment: Mapping[str, Any] | None = None,
        script: str | None = None,
        fresh: bool = False,
    ) -> None:
        """Starts a run here or checks that the one here has the same settings.

        Args:
            config: the settings, anything that JSON can hold.
            irrelevant: settings that do not change the result, which need not agree.
            environment: recorded next to the settings of a new run; need not agree.
            script: name of the script that the run is of, recorded likewise; None for none.
            fresh: delete the run that is here; only its own files go.

        Raises:
            RunMismatchError: the run here is of another script or has other settings; the message
                names them.
        """
        if fresh:
            self._delete()
        self.path.mkdir(parents=True, exist_ok=True)
        config = json.loads(json.dumps(config))
        if not self._has_checkpoint():
            # Nothing was trained here yet, or a deletion was cut short. In particular, somebody
            # who corrects a flag that was refused does not meet the refused one again.
            self._delete()
            document = {"config": config, "environment": dict(environment or {})}
            if script is not None:
                document = {"script": script, **document}
            write_atomically(self.config, json.dumps(document, indent=2) + "\n")
            return
        document = json.loads(self.config.read_text(encoding="utf-8"))
        # Runs from before scripts were recorded have no name of one.
        if script is not None and document.get("script", script) != script:
            raise RunMismatchError(
                f"{self.path} holds a run of experiments.{document['script']}, not of "
                f"experiments.{script}. Start over with --fresh, or choose another --run-dir"
            )
        earlier = document["config"]
        differing = [
            f"{flag_of(name)} was {earlier.get(name, _ABSENT)}, is now {config.get(name, _ABSENT)}"
            for name in sorted(earlier.keys() | config.keys())
            if name not in irrelevant and earlier.get(name, _ABSENT) != config.get(name, _ABSENT)
        ]
        if differing:
            raise RunMismatchError(
                f"{self.path} holds a run with other settings: {'; '.join(differing)}. Go on with "
                "its settings, start over with --fresh, or choose another --run-dir"
            )

    def read_result(self) -> dict[str, Any] | None:
        """What a finished run came to; None for a run that is not finished."""
        if not self.result.exists():
            return None
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Marks the run as finished."""
        write_atomically(self.result, json.dumps(result, indent=2) + "\n")

    def _has_checkpoint(self) -> bool:
        return self.config.exists() and any(
            folder.name.isdecimal() for folder in self.checkpoints.glob("*")
        )

    def _delete(self) -> None:
        # The result goes first, as it would mark the run as finished, and the settings last: while
        # they are there, the rest is theirs.
        self.result.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.metrics, self.curves, self.residuals, self.vocabulary, self.config):
            file.unlink(missing_ok=True)
