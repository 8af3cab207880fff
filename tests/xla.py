"""Flags of XLA for the tests; imports no JAX, which reads them once."""

import importlib.util
import mmap
from pathlib import Path

FASTER = {"xla_cpu_use_fusion_emitters": "false", "xla_backend_optimization_level": "1"}
"""Without fusion emitters XLA's CPU compiler generates code in an older way, in half to three
quarters of the time, and with fewer passes of LLVM in half of that again. Compiling is most of what
the tests do; what is computed is the same up to rounding."""


def flags() -> list[str]:
    """Four virtual devices, and faster compilation where this XLA knows how."""
    found = ["--xla_force_host_platform_device_count=4"]
    return found + [f"--{flag}={value}" for flag, value in FASTER.items() if _known(flag)]


def _known(flag: str) -> bool:
    """Whether XLA has this flag; it ends the process at one that it does not know."""
    origin = importlib.util.find_spec("jaxlib").origin
    for library in Path(origin).parent.glob("*.so"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            if content.find(flag.encode()) >= 0:
                return True
    return False
