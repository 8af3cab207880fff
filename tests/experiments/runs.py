"""Folders of runs that nothing was trained in, which is quick."""

import dataclasses

from experiments.report.trained import SCRIPTS
from experiments.train.loop import Progress
from experiments.train.runs import Checkpoints, RunFolder
from tests.experiments.training import Parts


def untrained(folder, script, *flags) -> Parts:
    """The folder of a run of `script` that was saved before its first step, and its parts."""
    module, run = SCRIPTS[script], RunFolder(folder)
    words = [*flags, "--run.no-progress"]
    with run.open(script, module.parse_arguments(words), words, {}):
        parts = Parts(module, *words, folder=folder)
        with Checkpoints(run.checkpoints) as checkpoints:
            progress = Progress(data=parts.dataset.checksum())
            checkpoints.save(parts.state, dataclasses.asdict(progress))
    return parts
