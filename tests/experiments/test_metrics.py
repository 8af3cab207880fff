"""Sums over an epoch and what is reported of them, against sums that are written out here."""

import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import BackwardProbe, SolveStats
from experiments.train import metrics

FORWARD = SolveStats(
    residual=jnp.asarray([0.5, np.inf, 9.0, 0.1]),
    iterations=jnp.asarray([3, 4, 9, 2]),
    status=jnp.asarray([1, 2, 1, 0]),
    evaluations=jnp.asarray(9),
    trace=None,
)
BACKWARD = BackwardProbe(
    residual=jnp.asarray([0.2, 0.1, 0.0, np.nan]),
    iterations=jnp.asarray([3.0, 4.0, 9.0, 5.0]),
    status=jnp.asarray([1.0, 0.0, 0.0, 2.0]),
    evaluations=jnp.asarray(6.0),
)


def test_a_diverged_and_a_padded_sample():
    counts = jnp.asarray([True, True, False, True])
    correct = jnp.asarray([True, False, True, True])
    one = metrics.batch_totals(jnp.asarray(3.0), correct, counts, FORWARD, BACKWARD)
    totals = metrics.add(metrics.zeros(forward=True, backward=True), one)
    assert metrics.loss_record(totals, "train") == {
        "train_loss": pytest.approx(1.0),
        "train_accuracy": pytest.approx(2 / 3),
    }
    record = metrics.solve_record(totals, "x_")
    assert np.isnan(record.pop("x_backward_residual_worst"))
    assert record == {
        "x_forward_evaluations": 9.0,
        "x_forward_iterations": 3.0,
        "x_forward_residual_mean": pytest.approx(0.3),
        "x_forward_residual_worst": np.inf,
        "x_forward_converged": pytest.approx(1 / 3),
        "x_forward_diverged": 1,
        "x_backward_evaluations": 6.0,
        "x_backward_iterations": 4.0,
        "x_backward_residual_mean": pytest.approx(0.15),
        "x_backward_converged": pytest.approx(1 / 3),
        "x_backward_diverged": 1,
    }


def test_batches_add_up():
    """Two batches, and one without a solve, such as one of pretraining."""
    counts = jnp.ones(4, bool)
    finite = FORWARD._replace(residual=jnp.asarray([0.5, 0.25, 1.0, 0.25]))
    totals = metrics.zeros(forward=True, backward=True)
    for stats, extra in ((finite, 1.0), (finite._replace(evaluations=jnp.asarray(4)), 2.0)):
        batch = metrics.batch_totals(jnp.asarray(2.0), counts, counts, stats)
        totals = metrics.add(totals, batch | {"extra": jnp.asarray(extra)})
    totals = metrics.add(totals, metrics.batch_totals(jnp.asarray(8.0), ~counts, counts))
    assert metrics.loss_record(totals, "test") == {
        "test_loss": pytest.approx(12 / 12),
        "test_accuracy": pytest.approx(8 / 12),
        "test_extra": pytest.approx(3 / 12),
    }
    summary = metrics.solve_summary(totals, "forward")
    assert (summary.samples, summary.diverged) == (8, 2)
    assert (summary.evaluations, summary.iterations) == ((9 + 4) / 2, 18 / 4)
    assert (summary.residual_mean, summary.residual_worst) == (0.5, 1.0)
    assert summary.converged == 0.25
    # Nothing solved is nothing to report.
    assert metrics.solve_summary(totals, "backward") is None
    assert not [name for name in metrics.solve_record(totals) if "backward" in name]


def test_the_first_failed_step_is_remembered():
    totals = metrics.zeros(forward=False)
    assert totals["failed"] == metrics.NEVER
    for step in (metrics.NEVER, 7, 3, metrics.NEVER):
        batch = metrics.batch_totals(jnp.zeros(()), jnp.ones(1, bool), jnp.ones(1, bool))
        totals = metrics.add(totals, batch | {"failed": jnp.asarray(step, jnp.int32)})
    assert totals["failed"] == 3


def test_positions_of_a_sequence_count_and_its_solve_once():
    """Two sequences of three positions, of which one is all filling."""
    counts = jnp.asarray([[True, True, False], [False] * 3])
    stats = FORWARD._replace(
        residual=jnp.asarray([0.5, 9.0]),
        iterations=jnp.asarray([3, 9]),
        status=jnp.asarray([0, 2]),
    )
    totals = metrics.batch_totals(jnp.asarray(1.0), jnp.ones((2, 3), bool), counts, stats)
    assert (totals["predictions"], totals["correct"]) == (2, 2)
    assert (totals["forward.samples"], totals["forward.iterations"]) == (1, 3)
    assert (totals["forward.converged"], totals["forward.diverged"]) == (1, 0)
    assert totals["forward.worst"] == 0.5
