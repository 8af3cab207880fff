"""Flags of XLA for the tests; imports no JAX, which reads them once."""

import os
import subprocess
import sys

FASTER = ["--xla_backend_optimization_level=0", "--xla_cpu_use_fusion_emitters=false"]
"""Fewer passes of LLVM, and no fusion emitters, without which older releases of XLA generate code
for the CPU in an older and quicker way. Compiling is most of what the tests do; what is computed is
the same up to rounding, and the optimised HLO and the plan of the memory do not depend on LLVM."""


def flags() -> list[str]:
    """Four virtual devices, and faster compilation where this XLA knows how."""
    return ["--xla_force_host_platform_device_count=4", *filter(_known, FASTER)]


def _known(flag: str) -> bool:
    """Whether XLA has this flag. It ends the process at one that it does not know."""
    reads_flags = "from jaxlib import xla_client; xla_client.CompileOptions()"
    command = [sys.executable, "-c", reads_flags]
    environment = {**os.environ, "XLA_FLAGS": flag}
    return subprocess.run(command, env=environment, capture_output=True).returncode == 0
