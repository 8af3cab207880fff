"""Residual plots: what is drawn is what the trace holds."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from deq_jax.plotting import hold_after_stop, plot_residuals

NAN = np.nan
TRACE = np.array([[1.0, 0.8], [0.1, 0.4], [NAN, 0.2], [NAN, 0.05], [NAN, NAN]])


def test_a_stopped_sample_keeps_its_last_residual():
    held = hold_after_stop(TRACE)
    np.testing.assert_array_equal(held, [[1.0, 0.8], [0.1, 0.4], [0.1, 0.2], [0.1, 0.05]])


@pytest.mark.parametrize(
    ("trace", "error"),
    [
        (np.ones(3), r"\[evaluations, B\], got shape \(3,\)"),
        (np.zeros((0, 2)), "finite first residual"),
        (np.array([[1.0, NAN]]), "finite first residual"),
    ],
)
def test_bad_traces_are_named(trace, error):
    with pytest.raises(ValueError, match=error):
        hold_after_stop(trace)


def test_curves_are_the_medians():
    axes = Figure().subplots()
    plot_residuals(axes, {"ours": TRACE, "other": TRACE[:, :1]}, tol=1e-2, title="forward")
    ours, other, tolerance = axes.lines
    np.testing.assert_array_equal(ours.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(ours.get_ydata(), [0.9, 0.25, 0.15, 0.075])
    np.testing.assert_allclose(other.get_ydata(), [1.0, 0.1])
    assert set(tolerance.get_ydata()) == {1e-2}
    assert axes.get_yscale() == "log"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["ours", "other"]
    assert len(axes.collections) == 1  # a band only where there is more than one sample
