"""Data parallelism: batches split over devices, everything else the same on all of them."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.train.errors import UsageError

AXIS = "data"
"""Name of the mesh axis over which batches are split."""

PyTree = Any


def provide(count: int) -> Mesh | None:
    """A mesh of the first `count` devices with the axis `data`; None for a single one.

    On the CPU there are as many virtual devices as are asked for before JAX is first used.

    Raises:
        UsageError: there are not so many; the message names the flag.
    """
    if count == 1:
        return None
    with contextlib.suppress(RuntimeError):  # in use already: take what there is
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices()
    if len(devices) < count:
        raise UsageError(
            f"--devices must be at most {len(devices)}, the number of {devices[0].platform} "
            f"devices here, got {count}"
        )
    return jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices[:count])


def description(mesh: Mesh | None) -> str:
    """What the training runs on, in words."""
    device = jax.devices()[0]
    name = device.platform
    if device.device_kind != device.platform:
        name += f" ({device.device_kind})"
    return name if mesh is None else f"{mesh.size} x {name}"


def replicate(values: PyTree, mesh: Mesh | None) -> PyTree:
    """The arrays, whole on every device."""
    return values if mesh is None else jax.device_put(values, NamedSharding(mesh, P()))


def jit(
    function: Callable[..., PyTree], arguments: Sequence[str], mesh: Mesh | None
) -> Callable[..., PyTree]:
    """`jax.jit(function)`, which donates the first argument, over the devices of a mesh.

    Args:
        function: one device's program for the whole batch; its result becomes the same on all.
        arguments: for each argument `same` on all devices, or `batch`, split on axis 0.
        mesh: None for one device.
    """
    if mesh is None:
        return jax.jit(function, donate_argnums=0)
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    shardings = tuple({"same": whole, "batch": split}[argument] for argument in arguments)
    compiled = jax.jit(function, donate_argnums=0, out_shardings=whole)

    def run(*values: PyTree) -> PyTree:
        # What is not placed yet, such as new totals, would have the function compiled once more.
        values = jax.device_put(values, shardings)
        with jax.set_mesh(mesh):  # where a DEQ layer looks for the axis
            return compiled(*values)

    return run
