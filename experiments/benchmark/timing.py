"""Interleaved timing: what is compared takes turns, so that both see the same machine."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def interleaved(
    functions: Mapping[str, Callable[[], Any]], *, rounds: int, repeats: int = 1
) -> dict[str, list[float]]:
    """Seconds a call, by name, one entry a round; the functions take turns within each round.

    Args:
        functions: name -> function without arguments, returning arrays to wait for.
        rounds: number of turns of each; a first, untimed turn compiles.
        repeats: calls a turn, of which the mean is taken.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            started = time.perf_counter()
            for _ in range(repeats):
                jax.block_until_ready(function())
            seconds[name].append((time.perf_counter() - started) / repeats)
    return seconds


def report(seconds: Mapping[str, list[float]], baseline: str) -> str:
    """A line for each name: median, range and ratio to `baseline` in milliseconds."""
    reference = statistics.median(seconds[baseline])
    lines = []
    for name, times in seconds.items():
        median = statistics.median(times)
        lines.append(
            f"{name:28s} {1e3 * median:10.3f} ms  "
            f"({1e3 * min(times):.3f} - {1e3 * max(times):.3f})  x {median / reference:.3f}"
        )
    return "\n".join(lines)
