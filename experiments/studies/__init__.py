"""Measurements behind the tables and pictures in docs/.

Each study measures, keeps its figures in `docs/data/STUDY.json`, and renders its tables and
pictures from them: `--write` does all of it, `--render` renders alone. `tests/experiments/
test_pages.py` compares the pages with the figures.

| study | command | pages | pictures in docs/figures |
| --- | --- | --- | --- |
| accuracy | `python -m experiments.studies.accuracy` | gradients.md, precision.md | |
| convergence | `python -m experiments.studies.convergence` | results.md | residuals.png |
| memory | `python -m experiments.studies.memory` | memory.md | memory.png |
| benchmarks | `python -m experiments.benchmark` | benchmarks.md | benchmark_batch.png, _width.png |
| controls | `python -m experiments.studies.controls` | sequences.md | |
| regularization | `python -m experiments.studies.regularization` | stability.md | |

The picture diagnosis.png is a screenshot of the report that `python -m experiments.diagnose --run
runs/digits` writes, taken by hand.
"""
