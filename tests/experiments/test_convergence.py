"""The study of convergence, at a small size, against plain iterations in NumPy."""

import numpy as np
import pytest

from experiments.studies import convergence
from tests.reference import picard, relative_residual

SMALL = convergence.Config(
    channels=16, inner_channels=16, size=8, batch=2, histories=(5,), mixings=(2.0,)
)
CONTEXT = {"date": "2026-01-01", "machine": "m", "revision": "r", "versions": "v", "command": "c"}


def test_counts_are_read_off_the_trace():
    trace = np.array([[1.0, 1.0], [0.05, 0.2], [0.009, 0.02], [np.nan, 0.004]])
    assert convergence.evaluations_until(trace, 0.1) == 3
    assert convergence.evaluations_until(trace, 0.01) == 4
    assert convergence.evaluations_until(trace, 1e-3) is None


@pytest.mark.slow
def test_the_cell_is_solved_as_counted_by_a_plain_loop():
    part = convergence.cell(SMALL)
    f, params, x, _ = convergence.cell_problem(SMALL)
    apply = lambda z: np.asarray(f(params, z, x))  # noqa: E731
    points = picard(apply, np.zeros(x.shape, np.float32), steps=40)
    residuals = np.array([_residuals(apply, z) for z in points])
    plain = part["forward"]["Picard"]
    expected = [int((residuals <= tol).all(1).argmax()) + 1 for tol in (1e-2, 1e-3, 1e-4)]
    assert plain["evaluations"] == expected
    count = expected[-1]
    np.testing.assert_allclose(plain["largest"][: count - 1], residuals.max(1)[: count - 1], 2e-2)
    for way in ("forward", "backward"):
        curves = part[way]
        assert list(curves) == ["Picard", "Anderson(5)", "Anderson(5), mixing 2"]
        assert 1.4 * curves["Anderson(5)"]["evaluations"][-1] <= curves["Picard"]["evaluations"][-1]

    document = {"cell": {"context": CONTEXT, **part}}
    table = convergence.render(document)["cell"].splitlines()
    cells = [cell.strip() for cell in table[2].split("|")[1:-1]]
    assert cells[:4] == ["Picard", *map(str, expected)]
    forward, backward = convergence.draw(document)["residuals"].axes
    assert [axes.get_title() for axes in (forward, backward)] == ["forward", "backward"]
    np.testing.assert_array_equal(forward.lines[0].get_ydata(), plain["median"])


def _residuals(apply, z):
    """Relative residual of each sample."""
    fz = apply(z).astype(np.float64)
    difference = (fz - z).reshape(len(z), -1)
    return np.linalg.norm(difference, axis=1) / np.linalg.norm(fz.reshape(len(z), -1), axis=1)


@pytest.mark.slow
def test_the_ridges_are_counted_as_by_a_plain_loop(monkeypatch):
    kinds = {kind: convergence.KINDS[kind] for kind in (convergence.SLOW, "rotations 0.9")}
    monkeypatch.setattr(convergence, "KINDS", kinds)
    part = convergence.ridge(convergence.Config(seeds=2, ridges=(1e-4,)))
    slow, turning = part[convergence.SLOW], part["rotations 0.9"]
    default = "Anderson(5), ridge 0.0001 (default)"
    counts = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        matrix, b = convergence.rotations(rng, 0.9), rng.normal(size=100)
        f = lambda z, matrix=matrix, b=b: matrix @ z + b  # noqa: E731
        points = picard(f, np.zeros(100), steps=200)
        counts.append(1 + next(n for n, z in enumerate(points) if relative_residual(f, z) <= 1e-6))
    assert turning["Picard"] == [[np.mean(counts), max(counts)]]
    assert turning[default][0][1] < min(counts)
    assert all(5 * a[1] < p[1] for a, p in zip(slow[default], slow["Picard"], strict=True))

    text = convergence.render({"ridge": {"context": CONTEXT, **part}})["ridge"]
    assert f"| Picard | {np.mean(counts):.0f} ({max(counts)}) |" in text
    needed = " | ".join(f"{mean:.0f} ({most})" for mean, most in slow[default])
    assert f"| {default} | {needed} |" in text


@pytest.mark.parametrize("document", [{}, {"ridge": {"context": CONTEXT}}])
def test_without_the_cell_nothing_is_drawn(document):
    assert convergence.draw(document) == {}
