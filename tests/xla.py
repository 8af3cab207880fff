"""Flags of XLA for the tests; imports no JAX, which reads them once."""

import os
import subprocess
import sys

DEVICES = "--xla_force_host_platform_device_count=4"
FASTER = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_use_fusion_emitters=false",
]
"""Fewer passes of LLVM; one LLVM module for each function and not 32, which take a thread and
memory mappings each; and no fusion emitters, without which older releases of XLA generate code for
the CPU in an older and quicker way. Compiling is most of what the tests do, and these flags halve
it. What is computed is the same up to rounding, and the optimised HLO and the plan of the memory,
which some tests read, do not depend on LLVM."""


def flags() -> list[str]:
    """Four virtual devices, and faster compilation where this XLA knows how.

    A worker of pytest-xdist inherits the flags that the main process has found.
    """
    wanted = [DEVICES, *FASTER]
    given = os.environ.get("XLA_FLAGS", "").split()
    if DEVICES in given:
        return []
    return wanted if _known(wanted) else [flag for flag in wanted if _known([flag])]


def _known(flags: list[str]) -> bool:
    """Whether XLA has all these flags. It ends the process at one that it does not know."""
    reads_flags = "from jaxlib import xla_client; xla_client.CompileOptions()"
    command = [sys.executable, "-c", reads_flags]
    environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0
