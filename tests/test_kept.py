"""`kept.contents`: descriptions that differ wherever tracing again could give another program."""

import numpy as np
import pytest

from deq_jax import Picard, deq_fixed_point, kept

X = np.array([[1.0, 2.0]], np.float32)


class Holder:
    """A plain object with attributes."""


def test_a_name_that_points_to_another_of_two_known_objects():
    """Both dicts are in the description already; only which of them `used` is has changed."""
    small, large = {"gain": 0.1}, {"gain": 0.5}
    used = small

    def f(_, z, x):
        known = (small, large)
        return used["gain"] * z + x if known else z

    for used in (small, large, small):
        z = deq_fixed_point(f, None, X, solver=Picard(tol=1e-6))
        np.testing.assert_allclose(z, X / (1 - used["gain"]), rtol=1e-5)


def test_every_attribute_of_many_objects_is_seen():
    """Descriptions are made of short-lived tuples, whose addresses Python uses again."""
    holders = [Holder() for _ in range(40)]
    for number, holder in enumerate(holders):
        holder.first, holder.second = number, (number, str(number))

    def f(_, z, x):
        return 0.1 * holders[0].first * z + x

    for holder in holders:
        before = kept.contents(f)
        assert before is not None
        assert before == kept.contents(f)
        holder.second = (holder.second[0] + 1, holder.second[1])
        assert before != kept.contents(f)


@pytest.mark.parametrize("value", [np.ones(2), [np.ones(2)], {"a": (np.float32(1),)}, iter([])])
def test_what_cannot_be_described(value):
    def f(_, z, x):
        return z + x if value is None else x

    assert kept.contents(f) is None
