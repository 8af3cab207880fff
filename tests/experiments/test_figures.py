"""The figures of a run over its epochs, and of its solves: what their axes hold."""

import numpy as np

from experiments.report import figures

PNG = b"\x89PNG"

HISTORY = [
    {
        "epoch": 1,
        "train_loss": 1.0,
        "forward_residual_worst": np.inf,
        "forward_converged": 0.5,
        "forward_residual_mean": None,
    },
    {
        "epoch": 2,
        "train_loss": 0.5,
        "forward_residual_worst": 0.0,
        "forward_converged": np.nan,
        "forward_residual_mean": 0.2,
        "test_loss": 0.7,
    },
    {"epoch": 3, "train_loss": 0.4, "forward_residual_worst": 0.3},
]
"""Values that are missing, infinite, NaN, and zero on a logarithmic axis."""


def points(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def test_curves_leave_out_what_cannot_be_drawn(tmp_path):
    loss, residual = figures.curves_figure(HISTORY).axes
    assert (loss.get_ylabel(), loss.get_yscale()) == ("loss", "linear")
    assert points(loss) == {"train loss": [[1, 1], [2, 0.5], [3, 0.4]], "test loss": [[2, 0.7]]}
    assert (residual.get_ylabel(), residual.get_yscale()) == ("relative residual", "log")
    assert points(residual) == {
        "forward residual worst": [[3, 0.3]],
        "forward residual mean": [[2, 0.2]],
    }
    assert figures.curves_figure([{"epoch": 1}]) is None
    figures.draw_curves([{"epoch": 1}], tmp_path / "empty.png")
    figures.draw_curves(HISTORY, tmp_path / "curves.png")
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_figures_over_epochs():
    drawn = figures.epoch_figures(HISTORY)
    assert list(drawn) == ["epochs_converged", "epochs_residual"]
    assert points(drawn["epochs_converged"].axes[0]) == {"forward": [[1, 0.5]]}
    assert points(drawn["epochs_residual"].axes[0]) == {"forward": [[2, 0.2]]}
    assert figures.epoch_figures([]) == {}
    assert figures.epoch_figures([{"epoch": 1, "forward_converged": np.nan}]) == {}


def test_residuals_are_the_median_of_the_samples_that_can_be_drawn(tmp_path, monkeypatch):
    nan = np.nan
    trace = np.array([[1.0, 0.8, 0.6, np.inf], [0.1, 0.2, nan, nan], [nan, 0.0, nan, nan]])
    traces, tolerances = {"forward": trace, "backward": trace[:, :1]}, {"forward": 0.3}
    forward, backward = figures.residual_figures(traces, tolerances, "images").values()
    (axes,) = forward.axes
    assert axes.get_title() == "forward solve, 3 images, not 1"
    curve, tolerance = axes.lines
    # A sample that has stopped counts with its last residual.
    np.testing.assert_allclose(curve.get_xydata(), [[1, 0.8], [2, 0.2], [3, 0.1]])
    assert list(tolerance.get_ydata()) == [0.3, 0.3]
    (axes,) = backward.axes
    assert axes.get_title() == "backward solve, 1 images"
    (curve,) = axes.lines
    np.testing.assert_allclose(curve.get_ydata(), [1.0, 0.1])

    saved = []
    monkeypatch.setattr(figures, "png", lambda figure: saved.append(figure) or PNG)
    path = tmp_path / "residuals.png"
    figures.draw_residuals(traces, path, tolerances={"forward": 0.0})
    titles = [axes.get_title() for axes in saved[0].axes]
    assert titles == ["forward solve, 3 samples, not 1", "backward solve, 1 samples"]
    assert [len(axes.lines) for axes in saved[0].axes] == [1, 1]  # a tolerance of 0 is no line
    assert path.read_bytes() == PNG
