"""What a compiled program sends between devices, read from its optimised HLO."""

import dataclasses
import math
import re
from collections.abc import Iterator

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
_COLLECTIVE = re.compile(rf"= (?P<type>.+?) (?P<kind>{_KINDS})(?P<start>-start)?\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_WHILE = re.compile(r" while\(.*condition=%?(?P<condition>[\w.\-]+), body=%?(?P<body>[\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_ARRAY = re.compile(r"(?P<kind>pred|bf16|[a-z]+(?P<bits>\d+)\w*)\[(?P<shape>[\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An operation between devices.

    Attributes:
        kind: such as all-gather.
        shapes: of the arrays that it returns on each device, such as `f32[2,16]`.
        size: bytes of these arrays.
    """

    kind: str
    shapes: tuple[str, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Loop:
    """The collectives of one trip of a loop, and the loops in it."""

    collectives: tuple[Collective, ...]
    inner: tuple["Loop", ...]

    def everywhere(self) -> Iterator[Collective]:
        """The collectives of this loop and of those in it, each once."""
        yield from self.collectives
        for loop in self.inner:
            yield from loop.everywhere()


def program(text: str) -> Loop:
    """The collectives of a program outside of loops, and its loops, in the order they run.

    Args:
        text: the optimised HLO, `compiled.as_text()`.
    """
    computations: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found["name"]
            entry = name if line.startswith("ENTRY") else entry
            computations[name] = []
        elif name:
            computations[name].append(line)

    def read(names: list[str]) -> Loop:
        collectives: list[Collective] = []
        loops: list[Loop] = []
        for line in (line for name in names for line in computations[name]):
            if found := _WHILE.search(line):
                loops.append(read([found["condition"], found["body"]]))
                continue
            if found := _COLLECTIVE.search(line):
                collectives.append(_collective(found))
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip(" %") for branch in branches.split(",")]
            if called:
                inside = read(called)
                collectives += inside.collectives
                loops += inside.inner
        return Loop(tuple(collectives), tuple(loops))

    return read([entry])


def _collective(found: re.Match[str]) -> Collective:
    arrays = list(_ARRAY.finditer(found["type"]))
    if found["start"] and found["kind"] != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # behind the operands
    shapes, size = [], 0
    for array in arrays:
        bits = {"pred": 8, "bf16": 16}.get(array["kind"]) or int(array["bits"])
        size += math.prod(map(int, filter(None, array["shape"].split(",")))) * bits // 8
        shapes.append(f"{array['kind']}[{array['shape']}]")
    return Collective(found["kind"], tuple(shapes), size)
