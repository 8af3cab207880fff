"""Flags of XLA for the tests; imports no JAX, which reads them once."""

import math
import os
import re
import subprocess
import sys
from typing import NamedTuple

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


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4,
          "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_COLLECTIVE = re.compile(
    r" = (?P<result>.*?) (?P<name>all-gather|all-reduce|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast)(-start)?\("
)


class Collective(NamedTuple):
    """One communication of a compiled program.

    Attributes:
        name: `all-gather`, `all-reduce` and so on.
        shapes: dtype and shape of each array that it makes on a device, `f32[4,16]`.
        size: bytes of these.
        in_loop: it stands in the body or the condition of a loop, or in what these call.
    """

    name: str
    shapes: tuple[str, ...]
    size: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Those of an optimised HLO module, `jax.jit(f).lower(...).compile().as_text()`."""
    lines, calls, loops = {}, {}, set()
    name = None
    for line in text.splitlines():
        if match := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*-> .*\{$", line):
            name = match[1]
            lines[name], calls[name] = [], set()
        elif name is not None and " = " in line:
            lines[name].append(line)
            called = set(
                re.findall(r"(?:calls|to_apply|body|condition|computation)=%?([\w.\-]+)", line)
            )
            for group in re.findall(r"(?:branch_computations|called_computations)=\{(.*?)\}", line):
                called |= set(re.findall(r"%?([\w.\-]+)", group))
            calls[name] |= called
            if " while(" in line:
                loops |= set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", line))
    pending = list(loops)
    while pending:
        new = calls.get(pending.pop(), set()) - loops
        loops |= new
        pending += new
    found = []
    for computation, body in lines.items():
        for match in filter(None, map(_COLLECTIVE.search, body)):
            shapes = re.findall(r"(\w+)\[([\d,]*)\]", match["result"])
            size = sum(
                _BYTES[dtype] * math.prod(int(n) for n in shape.split(",") if n)
                for dtype, shape in shapes
            )
            names = tuple(f"{dtype}[{shape}]" for dtype, shape in shapes)
            found.append(Collective(match["name"], names, size, computation in loops))
    return found
