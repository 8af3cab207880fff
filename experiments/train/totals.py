"""Sums over an epoch, kept on the device: no step waits for them, and a checkpoint holds them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import BackwardProbe, SolveStats, Status

Record = dict[str, float | int]


class SolveTotals(NamedTuple):
    """Sums over the solves of an epoch, one solve a batch.

    Attributes:
        solves: int32, number of solves.
        samples: int32, samples in them.
        evaluations: int32, sum over solves.
        iterations: int32, sum over samples.
        residual: float32, sum over the samples whose residual is finite.
        worst_residual: float32, largest over all samples; infinite if one never was finite.
        finite: int32, samples whose residual is finite.
        converged: int32, samples that met the tolerance.
        diverged: int32, samples that became non-finite.
    """

    solves: jax.Array
    samples: jax.Array
    evaluations: jax.Array
    iterations: jax.Array
    residual: jax.Array
    worst_residual: jax.Array
    finite: jax.Array
    converged: jax.Array
    diverged: jax.Array

    @classmethod
    def zeros(cls) -> "SolveTotals":
        """Totals of nothing."""
        # One buffer each: the state is donated, and no buffer can be donated twice.
        types = cls(*[jnp.int32] * 9)._replace(residual=jnp.float32, worst_residual=jnp.float32)
        return cls(*(jnp.zeros((), dtype) for dtype in types))

    def add(self, stats: SolveStats | BackwardProbe, counts: jax.Array) -> "SolveTotals":
        """Adds one solve, of which the samples marked in `counts` `[B]` count."""
        finite = counts & jnp.isfinite(stats.residual)
        residual = stats.residual.astype(jnp.float32)
        iterations = jnp.where(counts, stats.iterations, 0).astype(jnp.int32)
        worst = jnp.where(counts, residual, 0).max()
        return SolveTotals(
            solves=self.solves + 1,
            samples=self.samples + _count(counts),
            evaluations=self.evaluations + stats.evaluations.astype(jnp.int32),
            iterations=self.iterations + iterations.sum(),
            residual=self.residual + jnp.where(finite, residual, 0).sum(),
            worst_residual=jnp.maximum(self.worst_residual, worst),
            finite=self.finite + _count(finite),
            converged=self.converged + _count(counts & (stats.status == Status.CONVERGED)),
            diverged=self.diverged + _count(counts & (stats.status == Status.DIVERGED)),
        )

    def record(self, prefix: str) -> Record:
        """Means over solves and samples, with `prefix` before each name; empty without a solve."""
        if not int(self.solves):
            return {}
        samples = max(1, int(self.samples))
        values = {
            "evaluations": float(self.evaluations) / int(self.solves),
            "iterations": float(self.iterations) / samples,
            "residual_mean": float(self.residual) / max(1, int(self.finite)),
            "residual_worst": float(self.worst_residual),
            "converged": float(self.converged) / samples,
            "diverged": int(self.diverged),
        }
        return {f"{prefix}_{name}": value for name, value in values.items()}


class Totals(NamedTuple):
    """Sums over the batches of an epoch or of an evaluation.

    Attributes:
        batches: int32.
        examples: int32.
        loss: float32, sum over examples.
        extra: float32, sum over examples of what was added to the loss.
        correct: int32.
        failed_step: int32, the first step whose loss or gradient was not finite; -1 for none.
        forward: sums over the forward solves; None for a model without solver.
        backward: sums over the backward solves; None without solver or without gradients.
    """

    batches: jax.Array
    examples: jax.Array
    loss: jax.Array
    extra: jax.Array
    correct: jax.Array
    failed_step: jax.Array
    forward: SolveTotals | None
    backward: SolveTotals | None

    @classmethod
    def zeros(cls, *, solves: bool, gradients: bool) -> "Totals":
        """Totals of nothing, with room for solver statistics if `solves`."""
        return cls(
            batches=jnp.zeros((), jnp.int32),
            examples=jnp.zeros((), jnp.int32),
            loss=jnp.zeros((), jnp.float32),
            extra=jnp.zeros((), jnp.float32),
            correct=jnp.zeros((), jnp.int32),
            # Not `jnp.full`: like the zeros it must be a buffer of its own.
            failed_step=jnp.array(np.int32(-1)),
            forward=SolveTotals.zeros() if solves else None,
            backward=SolveTotals.zeros() if solves and gradients else None,
        )

    def add(
        self,
        loss: jax.Array,
        correct: jax.Array,
        counts: jax.Array,
        forward: SolveStats | None,
        backward: BackwardProbe | None,
        *,
        extra: jax.Array | float = 0.0,
    ) -> "Totals":
        """Adds one batch.

        Args:
            loss: sum of the losses of the examples that count.
            correct: `[B]` boolean; `[B, L]` where an example is a position of a sequence.
            counts: likewise, the examples that count. The solve of a sequence counts if one of its
                positions does.
            forward: statistics of the forward solve; None if there was none.
            backward: report of the backward solve; None if there was none.
            extra: sum of what was added to the losses.
        """
        solved = counts.reshape(counts.shape[0], -1).any(1)
        return self._replace(
            batches=self.batches + 1,
            examples=self.examples + _count(counts),
            loss=self.loss + loss,
            extra=self.extra + extra,
            correct=self.correct + _count(correct & counts),
            forward=self.forward if forward is None else self.forward.add(forward, solved),
            backward=self.backward if backward is None else self.backward.add(backward, solved),
        )

    def note_step(self, step: jax.Array, finite: jax.Array) -> "Totals":
        """Remembers `step` as the failed one unless it was `finite` or an earlier one failed."""
        failed = ~finite & (self.failed_step < 0)
        return self._replace(failed_step=jnp.where(failed, step, self.failed_step))

    def record(self, name: str) -> Record:
        """Mean loss and accuracy as `{name}_loss` and `{name}_accuracy`; waits for the device.

        And `{name}_extra`, the mean of what was added to the loss, where that is not zero.
        """
        examples = max(1, int(self.examples))
        record = {
            f"{name}_loss": float(self.loss) / examples,
            f"{name}_accuracy": float(self.correct) / examples,
        }
        if float(self.extra):
            record[f"{name}_extra"] = float(self.extra) / examples
        return record

    def solver_record(self, prefix: str = "") -> Record:
        """Figures of the solves as `{prefix}forward_...` and `{prefix}backward_...`."""
        record = {}
        for name, solves in (("forward", self.forward), ("backward", self.backward)):
            if solves is not None:
                record |= solves.record(prefix + name)
        return record


def _count(marks: jax.Array) -> jax.Array:
    return marks.sum(dtype=jnp.int32)
