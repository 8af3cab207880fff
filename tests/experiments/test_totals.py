import jax
import numpy as np
import pytest
from experiments.train.totals import SolveTotals

from deq_jax import BackwardProbe


def test_totals_of_a_diverged_and_of_a_padded_sample():
    report = BackwardProbe(
        residual=np.array([0.5, np.inf, 9.0, 0.1], np.float32),
        iterations=np.array([3, 4, 9, 2], np.float32),
        status=np.array([1, 2, 1, 0], np.float32),
        evaluations=np.float32(9),
    )
    counts = jax.numpy.asarray([True, True, False, True])
    record = SolveTotals.zeros().add(report, counts).record("x")
    assert record == {
        "x_evaluations": 9.0,
        "x_iterations": 3.0,
        "x_residual_mean": pytest.approx(0.3),
        "x_residual_worst": np.inf,
        "x_converged": pytest.approx(1 / 3),
        "x_diverged": 1,
    }


def test_nothing_solved_is_nothing_to_report():
    assert SolveTotals.zeros().record("x") == {}
