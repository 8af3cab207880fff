"""Folders of runs that nothing was trained in, which is quick."""

import dataclasses

from experiments.train.checkpoints import Checkpoints

from experiments.report.trained import SCRIPTS
from experiments.train.loop import Progress
from experiments.train.runs import RunDirectory


def untrained(folder, script, *flags):
    """The folder of a run of `script` that was saved before its first step, and the experiment."""
    module = SCRIPTS[script]
    config = module.parse([*flags, "--no-progress"])
    directory = RunDirectory(folder)
    directory.open(dataclasses.asdict(config), script=script)
    experiment = module.load(config, directory)
    with Checkpoints(directory.checkpoints) as checkpoints:
        progress = Progress(data=experiment.dataset.checksum())
        checkpoints.save(experiment.state, dataclasses.asdict(progress))
    return experiment
