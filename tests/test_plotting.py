"""Plots: what is drawn is what the reports of a solve hold."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from deq_jax.plotting import hold_after_stop, plot_iterations, plot_residuals, plot_spectrum

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


def test_a_bar_for_each_number_of_evaluations():
    axes = Figure().subplots()
    plot_iterations(axes, np.array([3, 5, 3, 9]), max_iter=25, title="forward")
    bars = {round(bar.get_x() + bar.get_width() / 2, 6): bar.get_height() for bar in axes.patches}
    assert bars == {3: 2, 5: 1, 9: 1}
    assert [set(line.get_xdata()) for line in axes.lines] == [{4.0}, {25}]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["median 4", "at most 25"]


def test_samples_that_all_took_as_many_have_whole_numbers_below():
    axes = Figure().subplots()
    plot_iterations(axes, np.full(4, 25, np.int32))
    assert all(tick == int(tick) for tick in axes.get_xticks())


@pytest.mark.parametrize(
    ("iterations", "error"),
    [
        (np.ones((2, 2), int), r"\[B\] with B >= 1, got shape \(2, 2\)"),
        (np.zeros(0, int), r"got shape \(0,\)"),
        (np.array([1.5]), "counts, got float64"),
        (np.array([-1]), "counts, got int64"),
    ],
)
def test_bad_iterations_are_named(iterations, error):
    with pytest.raises(ValueError, match=error):
        plot_iterations(Figure().subplots(), iterations)


def test_spectrum_has_the_unit_circle_and_hollow_outlines():
    axes = Figure().subplots()
    values = np.array([2 + 1j, 2 - 1j, 0.5, complex(np.nan, np.nan), complex(np.inf, 0)])
    errors = np.array([0.1, 0.12, NAN, NAN, 0.0])
    plot_spectrum(axes, values, errors=errors, title="one sample")
    (circle,) = axes.lines
    np.testing.assert_allclose(np.hypot(*circle.get_data()), 1)
    sharp, outline = axes.collections
    # 0.1 is within, 0.12 beyond 0.05 · |2 + i| = 0.1118; an unknown error is not a small one.
    np.testing.assert_array_equal(sharp.get_offsets(), [[2, 1]])
    np.testing.assert_array_equal(outline.get_offsets(), [[2, -1], [0.5, 0]])
    assert len(outline.get_facecolors()) == 0
    assert axes.get_aspect() == 1


def test_spectrum_without_errors_or_values():
    axes = Figure().subplots()
    plot_spectrum(axes, np.array([[0.5, 0.1j]]))
    assert len(axes.collections[0].get_offsets()) == 2
    axes = Figure().subplots()
    plot_spectrum(axes, np.full(3, np.nan))
    assert len(axes.collections) == 0
    with pytest.raises(ValueError, match=r"errors must have the shape \(2,\), got \(3,\)"):
        plot_spectrum(axes, np.zeros(2), errors=np.zeros(3))
