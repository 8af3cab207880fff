"""What every training command does around the loop: the run's folder, the figures, exit codes."""

import contextlib
import errno
import importlib.metadata
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deq_jax import Execution
from deq_jax.models.conv_deq import count_parameters
from experiments.report.curves import draw_curves, draw_residuals
from experiments.report.traces import residual_traces
from experiments.train.config import Stability, TrainingConfig
from experiments.train.errors import ExperimentError
from experiments.train.loop import Dataset, device_mesh, fit
from experiments.train.metrics import Record
from experiments.train.runs import RunFolder, flat_settings
from experiments.train.step import network_inputs

_TRACED = 64
"""Examples whose solves are drawn, at most."""

_NOT_WRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)

Load = Callable[[Any, RunFolder], tuple[Dataset, Any]]
"""`load(config, run)` gives the data and the network of a command."""


def train(
    script: str,
    config: TrainingConfig,
    arguments: Sequence[str] | None,
    load: Load,
    folder: str,
) -> Record:
    """Trains, or goes on with training, in the folder of the run, and leaves its figures there.

    Args:
        script: name of the command in `experiments`.
        config: its settings.
        arguments: its command line, from which the settings were read; None for this process's.
        load: loads the data and builds the network, once the run's folder is open.
        folder: folder of the run in runs/ where the settings name none.

    Returns:
        The figures of the last epoch, and under `evaluation` what they are of.

    Raises:
        ExperimentError: something the user can put right; the message says what.
    """
    device_mesh(config.devices)  # on a CPU it must be made before JAX is first used
    run = RunFolder(config.run.dir or pathlib.Path("runs") / folder)
    environment = {
        "deq_jax": importlib.metadata.version("deq_jax"),
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": device_name(config.devices),
    }
    words = sys.argv[1:] if arguments is None else arguments
    with run.open(script, config, words, environment):
        if (result := run.read_result()) is not None:
            print(f"{run.path} is finished; --run.fresh starts over")
            return result
        dataset, model = load(config, run)
        print(describe(config, model, dataset, run), flush=True)
        model, history = fit(config, model, dataset, run)
        draw_curves(history, run.curves)
        if config.is_deq:
            batch = next(dataset.evaluation_batches(min(_TRACED, config.eval_batch_size)))
            inputs = network_inputs(batch, None, dataset.white)
            traces, tolerances = residual_traces(model, inputs, jnp.asarray(batch.targets))
            draw_residuals(traces, run.residuals, tolerances=tolerances)
        result = {"evaluation": dataset.evaluation_name, **history[-1]}
        run.write_result(result)
        return result


@contextlib.contextmanager
def exit_code() -> Iterator[list[int]]:
    """Turns errors that the user can put right into a message and an exit code.

    0: finished; 1: the loss became non-finite; 2: a bad flag, missing data, a run with other
    settings, a folder that cannot be written; 130 and 143: stopped by Ctrl-C or SIGTERM.

    Yields:
        A list whose first element is the exit code, once the block has ended.
    """
    code = [0]
    try:
        yield code
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        code[0] = error.exit_code
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        print(
            f"error: cannot write {error.filename or 'to the folder of the run'}: "
            f"{error.strerror}. What was saved before is whole: the same command goes on from it",
            file=sys.stderr,
        )
        code[0] = 2
    except KeyboardInterrupt:  # before or after the training, where there is nothing to save
        code[0] = 130


def describe(config: TrainingConfig, model: Any, dataset: Dataset, run: RunFolder) -> str:
    """What is trained, on what and where."""
    lines = [
        f"data: {dataset.describe()}",
        f"model: {config.model}, {count_parameters(model):,} parameters",
    ]
    if config.is_deq:
        layer = config.layer()
        lines += [f"solver: {layer['solver']}", f"gradient: {layer['gradient']}"]
        if layer["execution"] != Execution():
            lines.append(f"execution: {layer['execution']}")
        tools, none = flat_settings(config.tools), flat_settings(Stability())
        changed = [f"{name} {value}" for name, value in tools.items() if none.get(name) != value]
        if changed:
            lines.append(f"stability: {', '.join(changed)}")
    else:
        lines.append("a control has no solver: solver, gradient, backward and stability are unused")
    return "\n".join([*lines, f"device: {device_name(config.devices)}", f"run: {run.path}"])


def device_name(count: int) -> str:
    """What the training runs on, in words."""
    device = jax.devices()[0]
    name = device.platform
    if device.device_kind != device.platform:
        name += f" ({device.device_kind})"
    return name if count == 1 else f"{count} x {name}"
