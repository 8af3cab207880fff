"""Training in the tests: runs of the commands in this process, and the parts of a run."""

import contextlib
import dataclasses
import functools
import io
import json
from typing import Any

import jax
import numpy as np

from experiments.train import loop, metrics
from experiments.train.config import Optim, RunOptions
from experiments.train.loop import Progress
from experiments.train.runs import Checkpoints, RunFolder
from experiments.train.stability import evaluation_phase, training_phase
from experiments.train.step import (
    definition_of,
    initial_memory,
    initial_state,
    state_shardings,
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it wrote."""

    code: Any
    output: str
    errors: str

    @property
    def lines(self) -> list[str]:
        return self.output.splitlines()

    @property
    def complaint(self) -> str:
        """The errors in one line, without the box that Tyro draws around its own."""
        return " ".join(self.errors.replace("│", " ").split())


def command_line(*flags) -> list[str]:
    """Choices before flags, as Tyro wants them, and of each flag the last one.

    So that tests can add to flags that are common to them, and change some of these.
    """
    words = [str(flag) for flag in flags]
    choices = [word for word in words if not word.startswith("--")]
    last = {word.partition("=")[0]: word for word in words if word.startswith("--")}
    return [*choices, *last.values()]


def run(script, *flags) -> Ended:
    """Runs a command in this process, see `command_line`."""
    # With an encoding, or Tyro draws its boxes as where there is none.
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in range(2))
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            code = script.main(command_line(*flags))
        except SystemExit as stopped:
            code = stopped.code
    written = []
    for stream in (output, errors):
        stream.seek(0)
        written.append(stream.read())
    return Ended(code, *written)


def records(folder) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, without what differs between two runs."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def checkpoint_numbers(folder) -> list[int]:
    """Numbers of a run's whole checkpoints, ascending."""
    paths = (folder / "checkpoints").glob("*")
    return sorted(int(path.name) for path in paths if path.name.isdecimal())


def leaves(tree) -> dict[str, tuple[Any, bytes]]:
    """The dtype and the bits of each array, by its name."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        found[jax.tree_util.keystr(path)] = (leaf.dtype, np.asarray(leaf).tobytes())
    return found


class StopAfter:
    """In place of `graceful_stop`: a stop that is requested at the n-th question."""

    exit_code = 130

    def __init__(self, questions: float):
        self.left = questions

    def requested(self) -> bool:
        self.left -= 1
        return self.left < 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class Parts:
    """The parts of a run that is made here and not by the loop: data, network, state, one step.

    Args:
        script: the module of the command.
        flags: its command line, see `command_line`.
        folder: folder of the run, for a command that leaves something there while it loads.
    """

    def __init__(self, script, *flags, folder="nowhere"):
        self.config = script.parse_arguments(command_line(*flags))
        self.mesh = loop.device_mesh(self.config)
        self.dataset, self.model = script.load(self.config, RunFolder(folder))
        self.steps_per_epoch = self.dataset.steps_per_epoch(self.config.batch_size)
        self.steps = self.config.epochs * self.steps_per_epoch
        self.optimizer = self.config.optim.optimizer(self.steps)
        self.shardings = self.mesh and state_shardings(self.model, self.optimizer, self.mesh)
        self.state = self.place(initial_state(self.config, self.model, self.optimizer))

    def place(self, state):
        """A state of its own for a step, which uses it up, on the devices of the run."""
        return loop.place(jax.tree.map(lambda leaf: leaf.copy(), state), self.shardings)

    def batches(self, epoch=0, start=0):
        size, seed = self.config.batch_size, self.config.seed
        return self.dataset.train_batches(size, seed=seed, epoch=epoch, start=start)

    def definition(self, *, training):
        phase = training_phase(self.config, 0, self.steps)
        phase = phase if training else evaluation_phase(self.config, 0)
        return definition_of(self.model, phase, training=training)

    def step(self, state, batch, number=0):
        """One step of training, number `number`; the state given stays as it is."""
        phase = training_phase(self.config, number, self.steps)
        step = loop.make_train_step(
            self.config, self.model, self.optimizer, phase, self.mesh, self.dataset.white
        )
        with self._meshed():
            limits = phase and phase.limits
            return step(self.place(state), loop.place_batch(batch, self.mesh), limits)

    def evaluate(self, state, batches) -> dict[str, Any]:
        """The figures of an evaluation on some batches."""
        phase, name = evaluation_phase(self.config, 0), self.dataset.evaluation_name
        evaluate = loop.make_evaluate_batch(
            self.config, self.model, phase, self.mesh, self.dataset.white
        )
        size = self.config.eval_batch_size
        carry = metrics.zeros(forward=self.config.is_deq), initial_memory(self.model, size)
        shardings = self.shardings
        carry = loop.place(carry, shardings and (shardings.totals, shardings.memory))
        with self._meshed():
            for batch in batches:
                batch = loop.place_batch(batch, self.mesh)
                carry = evaluate(carry, state.params, state.rest, batch)
        totals = jax.device_get(carry[0])
        record = metrics.loss_record(totals, name) | metrics.solve_record(totals, f"{name}_")
        return record | self.dataset.figures(record)

    def restored(self, folder):
        """The state and the progress of the newest checkpoint of a run of these settings."""
        with Checkpoints(folder / "checkpoints") as checkpoints:
            state, progress = checkpoints.restore(self.state)
        return state, Progress(**progress)

    def _meshed(self):
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def compile_once(patch) -> None:
    """Lets runs whose steps and evaluations are the same share the compiled functions.

    Compiling is most of what a tiny run costs. The loop compiles its functions anew in each run, as
    a process trains only once.
    """
    make_step, make_evaluation = loop.make_train_step, loop.make_evaluate_batch
    made = {}

    def key_of(config, model, phase, mesh, white, training):
        # What a function depends on otherwise than through the phase and the optimiser.
        settings = dataclasses.replace(
            config,
            data=type(config.data)(),
            run=RunOptions(),
            epochs=1,
            batch_size=config.devices,
            eval_batch_size=config.devices,
            eval_every=1,
        )
        return settings, definition_of(model, phase, training=training), phase, mesh, white

    def make_shared_step(config, model, optimizer, phase, mesh, white):
        key = optimizer, *key_of(config, model, phase, mesh, white, training=True)
        if key not in made:
            made[key] = make_step(config, model, optimizer, phase, mesh, white)
        return made[key]

    def make_shared_evaluation(config, model, phase, mesh, white):
        key = key_of(config, model, phase, mesh, white, training=False)
        if key not in made:
            made[key] = make_evaluation(config, model, phase, mesh, white)
        return made[key]

    # The same object for the same schedule, since optimisers are equal only to themselves.
    patch.setattr(Optim, "optimizer", functools.cache(Optim.optimizer))
    patch.setattr(loop, "make_train_step", make_shared_step)
    patch.setattr(loop, "make_evaluate_batch", make_shared_evaluation)
