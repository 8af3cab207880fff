"""The processes and devices of a run: how they start, share a batch, wait, stop and end.

A run on several machines is the same command in several processes: one on each machine, or one for
each GPU. `jax.distributed` connects them, and each process sees the devices of all. Process 0 does
what is done once for the run, such as printing and writing its files.
"""

import contextlib
import ctypes
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.data import WHOLE, Part
from experiments.train.config import TrainingConfig
from experiments.train.errors import LostProcessError, UsageError

PyTree = Any

BATCH = P(("data", "fsdp"))
"""How axis 0 of a batch is split over a mesh. The devices along `tensor` have the same rows."""

_LOST = re.compile(
    "gloo|nccl|coordination|heartbeat|barrier|unavailable|deadline_exceeded|socket|"
    "connection (closed|reset|refused)",
    re.IGNORECASE,
)
"""Words in the errors that JAX raises if another process does not answer."""

# ------------------------------------------------------------------------------------------- start


def start(config: TrainingConfig) -> None:
    """Connects the processes of a run. Must be called before JAX is first used.

    There are several processes if the flags `--processes` say so, or else if SLURM or Open MPI
    started several tasks. In a process that is alone it only makes as many virtual CPU devices as
    `--devices` asks for.

    Raises:
        UsageError: JAX cannot find the other processes, or the devices are not shared equally.
    """
    options, tasks = config.processes, _scheduled_tasks()
    found = options.coordinator or ("auto" if tasks > 1 else "off")
    if options.count is not None and found == "off":
        raise UsageError("--processes.count needs --processes.coordinator HOST:PORT")
    count = 1 if found == "off" else options.count or tasks
    if config.devices % count:
        raise UsageError(
            f"--devices must be a multiple of the number of processes, {count}, got "
            f"{config.devices}"
        )
    if config.devices > 1:
        with contextlib.suppress(RuntimeError):  # JAX is in use already and has its devices
            jax.config.update("jax_num_cpu_devices", config.devices // count)
    if found == "off" or jax.distributed.is_initialized():
        return
    _abort_in_words(
        b"error: JAX has ended this process, for the reason above. Most likely another process of "
        b"the run has ended, or cannot be reached. Start all of them again: they go on from the "
        b"newest checkpoint\n"
    )
    address = None if found == "auto" else found
    told = None not in (address, options.count, options.index)
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            address,
            options.count,
            options.index,
            # Under SLURM and Open MPI, JAX would leave this process one GPU of several.
            cluster_detection_method="deactivate" if told else None,
            heartbeat_timeout_seconds=options.lost_after,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise UsageError(
            f"jax.distributed cannot start: {error} Give all of --processes.coordinator HOST:PORT, "
            "--processes.count and --processes.index, or --processes.coordinator off for a process "
            "that is alone"
        ) from error
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _scheduled_tasks() -> int:
    """How many processes SLURM or Open MPI started together, this one included."""
    tasks = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
    if "SLURM_STEP_NODELIST" in os.environ:  # absent in a batch script, which is one process
        tasks = os.environ.get("SLURM_STEP_NUM_TASKS", os.environ.get("SLURM_NTASKS", tasks))
    return int(tasks)


def several() -> bool:
    """Whether the run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this is process 0, which prints and writes; also true of a process that is alone."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


# ------------------------------------------------------------------------------- devices and batch


def device_mesh(config: TrainingConfig) -> Mesh | None:
    """A mesh `data x fsdp x tensor` of the run's devices; None for a single device.

    Raises:
        UsageError: `--devices` is more than there are, or with several processes not all of them.
    """
    count = config.devices
    if count == 1 and not several():
        return None
    devices = jax.devices()
    if several() and count != len(devices):
        raise UsageError(
            f"--devices must be {len(devices)}, the number of {devices[0].platform} devices of all "
            f"{jax.process_count()} processes, got {count}"
        )
    if len(devices) < count:
        raise UsageError(
            f"--devices must be at most {len(devices)}, the number of {devices[0].platform} "
            f"devices here, got {count}"
        )
    shape = (config.data_shards // config.fsdp, config.fsdp, config.tensor)
    auto = (AxisType.Auto,) * 3
    axes = ("data", "fsdp", "tensor")
    return jax.make_mesh(shape, axes, axis_types=auto, devices=devices[:count])


def own_part(mesh: Mesh | None) -> Part:
    """The part of each batch that the devices of this process work on.

    Processes have the same part where the axis `tensor` goes across them.
    """
    if mesh is None:
        return WHOLE
    owners = [
        {device.process_index for device in row}
        for row in mesh.devices.reshape(-1, mesh.shape["tensor"])
    ]
    own = [row for row, owner in enumerate(owners) if jax.process_index() in owner]
    return Part(own[0] // len(own), len(owners) // len(own))


def place_batch(part: PyTree, mesh: Mesh | None) -> PyTree:
    """A batch on the devices of the mesh, split on axis 0, made of each process's part of it."""
    if mesh is None:
        return part
    sharding = NamedSharding(mesh, BATCH)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(sharding, leaf),
        part,
    )


def place(values: PyTree, shardings: PyTree) -> PyTree:
    """Puts arrays that every process has whole on the devices of the mesh.

    Args:
        values: the arrays.
        shardings: a sharding for each subtree of them. With None, for one device, they stay.
    """
    if shardings is None:
        return values

    def placed(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
        if not several():
            return jax.device_put(leaf, sharding)
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = placed(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        # A copy, because the new array may use the memory of the old, and a step may write there.
        whole = np.array(leaf)
        return jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)

    return jax.tree.map(placed, values, jax.tree.broadcast(shardings, values))


def gathered(values: PyTree) -> PyTree:
    """Gathers arrays from devices and processes: whole, on one device of each process."""

    def whole(leaf: jax.Array) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = whole(jax.random.key_data(leaf))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
        if not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return jax.numpy.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return jax.numpy.asarray(np.asarray(leaf))

    return jax.tree.map(whole, values)


# ------------------------------------------------------------------------------------ wait and stop


def wait_for_all(place: str) -> None:
    """Returns when every process has called this with the same `place`, a unique name."""
    if several():
        multihost_utils.sync_global_devices(place)


def all_say(yes: bool) -> bool:
    """Whether `yes` is true in every process. All of them must call this."""
    if not several():
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


class Stop:
    """Whether a signal asked the run to stop, and which one.

    Every process must call `requested` before each step. In the same step all of them get the same
    answer.

    Attributes:
        signal: the signal that this process received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._questions = 0

    def requested(self) -> bool:
        """Whether to stop now."""
        if not several():
            return self.signal is not None
        self._questions += 1
        return multihost_utils.reached_preemption_sync_point(self._questions)

    @property
    def exit_code(self) -> int:
        """The exit code of a process ended by the signal: 130 for SIGINT, 143 for SIGTERM.

        A process that received no signal, but stops because another one did, returns 143.
        """
        return 128 + (self.signal or signal.SIGTERM)


@contextlib.contextmanager
def graceful_stop() -> Iterator[Stop]:
    """While entered, the first SIGINT or SIGTERM only asks to stop; the second kills the process.

    With several processes JAX handles SIGTERM: it tells the other processes, and finds a step at
    which all can stop. A second SIGTERM then has no effect. The first SIGINT becomes a SIGTERM.
    """
    stop, previous = Stop(), {}

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        stop.signal = signal.Signals(number)
        for each in previous:
            signal.signal(each, signal.SIG_DFL)
        # Not `print`, because the signal may have interrupted another `print`.
        os.write(2, b"\nstopping after this step; once more to stop without saving\n")
        if several():
            signal.raise_signal(signal.SIGTERM)

    for number in (signal.SIGINT,) if several() else (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, note)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------- end


def lost_process(error: BaseException) -> LostProcessError | None:
    """An error to report if `error` says that another process does not answer, otherwise None."""
    if isinstance(error, LostProcessError):
        return error
    if not several() or not _LOST.search(str(error)):
        return None
    return LostProcessError(
        "another process of this run has ended, or cannot be reached any more "
        f"({str(error).strip().partition(chr(10))[0][:200]}). Start all of them again: they go on "
        "from the newest checkpoint"
    )


def leave(code: int) -> NoReturn:
    """Ends this process, one of several, at once.

    An ordinary exit would wait for the other processes, which may be waiting for this one in a
    step. They notice that this one is gone and end too, see `lost_process`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(1)  # so that processes with the same error can report it, and not a lost process
    os._exit(code)


def _abort_in_words(message: bytes) -> None:
    """If JAX aborts this process, prints a message and exits with the code of `LostProcessError`.

    JAX calls C's `abort` from a thread of its own if the heartbeats of another process are missing.
    Python calls signal handlers only between two instructions of the main thread, so a Python
    handler would not run. A C handler does.
    """

    def end(number: int) -> None:
        del number
        os.write(2, b"\n" + message)
        os._exit(LostProcessError.exit_code)

    global _abort_handler
    _abort_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(_abort_handler, ctypes.c_void_p))


_abort_handler: Any = None
"""Keeps the handler alive, because C only has its address."""
