"""Random weights do not break a guarantee of docs/guarantees.md: a few of the study's draws."""

import dataclasses
import functools

import numpy as np
import pytest

from deq_jax import Status
from deq_jax.cells.multiscale import Lipschitz, MultiscaleCell
from experiments.studies.guarantees import FAMILIES, draw

DRAWS = 30


@pytest.mark.parametrize("name", FAMILIES)
def test_every_draw_converges_within_the_bound(name):
    stats, excess = draw(FAMILIES[name], DRAWS, seed=1)
    assert stats.status.size == DRAWS
    assert (stats.status == Status.CONVERGED).all()
    assert np.isfinite(excess).all()
    assert excess.max() <= 1 + 1e-9


def test_a_projection_that_bounds_nothing_is_found_out():
    published = Lipschitz(projection="matrix", kernel_norm=8.0)
    build = functools.partial(MultiscaleCell, (2, 2), expansion=1, groups=1, lipschitz=published)
    _, excess = draw(dataclasses.replace(FAMILIES["Lipschitz MDEQ"], build=build), DRAWS)
    assert excess.max() > 1
