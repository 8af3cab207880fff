"""What a pass through a network gives, and its sums over an epoch.

The sums are kept on the device: no step waits for them, and a checkpoint holds them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deq_jax import BackwardProbe, SolveStats, Status
from deq_jax.stability import SolveSummary

Record = dict[str, float | int]
"""Figures of an epoch, as `metrics.jsonl` holds them."""

Totals = dict[str, jax.Array]
"""Sums by name. Those of a solve are named `forward.samples`, `backward.residual` and so on."""

NEVER = np.iinfo(np.int32).max
"""Value of `failed` while every step was finite."""


class Outcome(NamedTuple):
    """What a pass through a network gave.

    Attributes:
        loss: mean cross-entropy of the answer.
        extra: penalties that are added to the loss for the gradient.
        logits: `[B, classes]`; `[B, L, classes]` for sequences.
        stats: of the solve; None for a model without one.
        memory: for the next segment of the sequences; None without memory.
    """

    loss: jax.Array
    extra: jax.Array
    logits: jax.Array
    stats: SolveStats | None
    memory: Any


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean cross-entropy over all predictions."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def batch_totals(
    loss: jax.Array,
    correct: jax.Array,
    counts: jax.Array,
    forward: SolveStats | None = None,
    backward: BackwardProbe | None = None,
) -> Totals:
    """What one batch adds to the totals.

    Args:
        loss: sum of the losses of the predictions that count.
        correct: `[B]` boolean, or `[B, L]` where an example is a position of a sequence.
        counts: likewise, the predictions that count. The solve of a sequence counts if one of its
            positions does.
        forward: statistics of the forward solve, if there was one.
        backward: report of the backward solve, if there was one.
    """
    totals = {"loss": loss, "correct": _count(correct & counts), "predictions": _count(counts)}
    counted = counts.reshape(counts.shape[0], -1).any(1)
    for name, stats in (("forward", forward), ("backward", backward)):
        if stats is not None:
            sums = _solve_totals(stats, counted)
            totals |= {f"{name}.{key}": value for key, value in sums.items()}
    return totals


def _solve_totals(stats: SolveStats | BackwardProbe, counts: jax.Array) -> Totals:
    """Sums over the samples of one solve that count, `[B]` boolean."""
    residual = stats.residual.astype(jnp.float32)
    finite = counts & jnp.isfinite(residual)
    return {
        "solves": jnp.ones((), jnp.int32),
        "samples": _count(counts),
        "evaluations": stats.evaluations.astype(jnp.int32),
        "iterations": jnp.where(counts, stats.iterations, 0).sum(dtype=jnp.int32),
        "residual": jnp.where(finite, residual, 0).sum(),
        "worst": jnp.where(counts, residual, 0).max(),
        "finite": _count(finite),
        "converged": _count(counts & (stats.status == Status.CONVERGED)),
        "diverged": _count(counts & (stats.status == Status.DIVERGED)),
    }


def zeros(*, forward: bool, backward: bool = False) -> Totals:
    """Zero totals, with entries for the forward and the backward solve on request."""
    solve = SolveStats(jnp.zeros(1), jnp.zeros(1, int), jnp.zeros(1, int), jnp.zeros((), int), None)
    batch = batch_totals(
        jnp.zeros(()),
        jnp.zeros(1, bool),
        jnp.zeros(1, bool),
        solve if forward else None,
        solve if backward else None,
    )
    batch |= {"extra": jnp.zeros(()), "failed": jnp.zeros((), jnp.int32)}
    # One buffer each: the state is donated, and no buffer can be donated twice.
    return {
        name: jnp.array(NEVER if name == "failed" else 0, value.dtype)
        for name, value in batch.items()
    }


def add(totals: Totals, batch: Totals) -> Totals:
    """The totals with one more batch; what the batch lacks stays as it is."""

    def combined(name: str, total: jax.Array) -> jax.Array:
        if name not in batch:
            return total
        if name == "failed":
            return jnp.minimum(total, batch[name])
        return jnp.maximum(total, batch[name]) if name.endswith("worst") else total + batch[name]

    return {name: combined(name, total) for name, total in totals.items()}


def loss_record(totals: Totals, name: str) -> Record:
    """Mean loss and accuracy as `{name}_loss` and `{name}_accuracy`; waits for the device.

    And `{name}_extra`, the mean of what was added to the loss, where that is not zero.
    """
    count = max(1, int(totals["predictions"]))
    record = {
        f"{name}_loss": float(totals["loss"]) / count,
        f"{name}_accuracy": float(totals["correct"]) / count,
    }
    if float(totals["extra"]):
        record[f"{name}_extra"] = float(totals["extra"]) / count
    return record


def solve_summary(totals: Totals, name: str) -> SolveSummary | None:
    """Means over the solves `forward` or `backward`; None if there was none."""
    if not int(totals.get(f"{name}.solves", 0)):
        return None
    sums = {key.partition(".")[2]: float(v) for key, v in totals.items() if key.startswith(name)}
    samples = max(1.0, sums["samples"])
    return SolveSummary(
        samples=sums["samples"],
        converged=sums["converged"] / samples,
        diverged=sums["diverged"],
        residual_mean=sums["residual"] / max(1.0, sums["finite"]),
        residual_worst=sums["worst"],
        evaluations=sums["evaluations"] / sums["solves"],
        iterations=sums["iterations"] / samples,
    )


def solve_record(totals: Totals, prefix: str = "") -> Record:
    """The figures of `solve_summary` as `{prefix}forward_...` and `{prefix}backward_...`."""
    record: Record = {}
    for name in ("forward", "backward"):
        if (summary := solve_summary(totals, name)) is not None:
            figures = dataclasses.asdict(summary) | {"diverged": int(summary.diverged)}
            del figures["samples"]
            record |= {f"{prefix}{name}_{key}": value for key, value in figures.items()}
    return record


def _count(marks: jax.Array) -> jax.Array:
    return marks.sum(dtype=jnp.int32)
