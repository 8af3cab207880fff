"""What is compared: implementations by name, the module that runs each, and its options."""

import dataclasses
import importlib.util
from collections.abc import Iterable
from typing import Any

RIDGE = 1e-4
"""The ridge of the tutorial and of torchdeq; that of all in the table at equal ridge."""


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One row.

    Attributes:
        module: module of this package whose `Calls` runs it.
        options: for that module.
        requires: packages that have to be installed.
    """

    module: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def environment(self) -> dict[str, str]:
        """Variables that its process needs."""
        devices = self.options.get("devices")
        if devices is None:
            return {}
        return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}


def _deq_jax(**options: Any) -> Implementation:
    return Implementation("run_deq_jax", options)


def _torch(layer: str, *requires: str, **options: Any) -> Implementation:
    return Implementation("run_torch", {"layer": layer, **options}, ("torch", *requires))


def _jaxopt(**options: Any) -> Implementation:
    return Implementation("run_jaxopt", options, ("jaxopt",))


IMPLEMENTATIONS = {
    "deq_jax": _deq_jax(),
    "deq_jax, 2 devices": _deq_jax(devices=2),
    "deq_jax, tolerance / 2": _deq_jax(stricter=2),
    "deq_jax, 2 devices, tolerance / 2": _deq_jax(devices=2, stricter=2),
    "deq_jax, Picard": _deq_jax(solver="picard"),
    "deq_jax, shrinking": _deq_jax(shrink_to=8),
    "deq_jax, shrinking, tolerance / 3": _deq_jax(shrink_to=8, stricter=3),
    "deq_jax, Picard, shrinking": _deq_jax(solver="picard", shrink_to=8),
    "deq_jax, NCHW": _deq_jax(layout="NCHW"),
    "deq_jax, cell in bfloat16": _deq_jax(cell_dtype="bfloat16"),
    "deq_jax, all in bfloat16": _deq_jax(dtype="bfloat16"),
    "deq_jax, absolute ridge": _deq_jax(ridge=RIDGE),
    "deq_jax, absolute ridge, 2 devices": _deq_jax(ridge=RIDGE, devices=2),
    "tutorial": _torch("tutorial"),
    "tutorial, relative ridge": _torch("tutorial", relative=True),
    "torchdeq": _torch("torchdeq", "torchdeq"),
    "jaxopt": _jaxopt(),
    "jaxopt, ridge 1e-4": _jaxopt(ridge=RIDGE),
    "jaxopt, Picard": _jaxopt(solver="picard"),
    "optimistix": Implementation("run_optimistix", {}, ("optimistix",)),
}

INSTALL = {
    "torch": "pip install -r requirements-peers.txt",
    "torchdeq": "pip install --no-deps torchdeq==0.1.0",
    "jaxopt": "pip install -r requirements-peers.txt",
    "optimistix": "pip install -r requirements-peers.txt",
}
"""How to install what an implementation may require."""


def missing(names: Iterable[str]) -> dict[str, list[str]]:
    """Packages that are not installed, and the implementations that need each."""
    absent: dict[str, list[str]] = {}
    for name in names:
        for package in IMPLEMENTATIONS[name].requires:
            if importlib.util.find_spec(package) is None:
                absent.setdefault(package, []).append(name)
    return absent
