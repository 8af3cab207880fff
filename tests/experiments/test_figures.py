import numpy as np

from experiments.report.curves import draw_curves, draw_residuals

PNG = b"\x89PNG"


def test_figures_draw_gaps_zeros_and_infinities(tmp_path):
    trace = np.array([[1.0, 1.0, np.inf], [0.1, 0.0, np.nan], [np.nan, np.nan, np.nan]])
    draw_residuals({"forward": trace}, tmp_path / "residuals.png", tolerances={"forward": 0.0})
    history = [
        {"epoch": 1, "train_loss": 1.0, "forward_residual_worst": np.inf},
        {"epoch": 2, "train_loss": 0.5, "forward_residual_worst": 0.0, "test_loss": 0.7},
    ]
    draw_curves(history, tmp_path / "curves.png")
    for name in ("residuals.png", "curves.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
