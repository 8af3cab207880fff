"""Random weights do not break a guarantee of docs/guarantees.md: a few of the study's draws."""

import dataclasses
import functools

import numpy as np
import pytest

from deq_jax import Picard, Status
from deq_jax.cells import IGNNCell
from experiments.studies import guarantees
from experiments.studies.guarantees import FAMILIES, draw

DRAWS = 30


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.slow
def test_every_draw_converges_within_the_bound(name):
    stats, excess = draw(FAMILIES[name], DRAWS, seed=1)
    assert stats.status.size == DRAWS
    assert (stats.status == Status.CONVERGED).all()
    assert np.isfinite(excess).all()
    assert excess.max() <= 1 + 1e-9


def test_weights_outside_of_the_set_are_found_out(monkeypatch):
    monkeypatch.setattr(guarantees, "SOLVER", Picard(tol=1e-6, max_iter=100))

    class Unprojected(IGNNCell):
        def project(self, params):
            return params

    family = dataclasses.replace(FAMILIES["IGNN"], build=functools.partial(Unprojected, 4))
    stats, excess = draw(family, DRAWS)
    assert (stats.status != Status.CONVERGED).any()
    assert excess.max() > 1
