"""SQUAREM: squared extrapolation of two plain steps.

Source: Varadhan and Roland, "Simple and globally convergent methods for accelerating the
convergence of any EM algorithm", 2008, scheme S3; the bound on its step length is that of the
authors' R package.

Differs from the R package: there is no third, stabilising evaluation in a cycle. The first
evaluation of the next cycle judges the extrapolation.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real

PyTree = Any

_GROWTH = 10.0
"""An extrapolation is taken back where the residual has grown by more than this factor."""

_FIRST_BOUND = 4.0
"""The bound on the step length a in the first cycle."""

_BOUND_FACTOR = 4.0
"""The bound grows by this factor when it is met, and falls by it when a step is taken back."""


class SQUAREMState(NamedTuple):
    """Where each sample is in its cycle.

    Attributes:
        base: z, where the cycle began.
        change: r = f(z) - z there.
        plain: f(f(z)) of the last complete cycle, to which an extrapolation is taken back.
        size: `[B]`, `‖f(z) - z‖` at the second evaluation of that cycle; infinite without one.
        bound: `[B]`, bound on a.
        second: bool `[B]`, the second evaluation of the cycle comes next.
    """

    base: PyTree
    change: PyTree
    plain: PyTree
    size: jax.Array
    bound: jax.Array
    second: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class SQUAREM:
    """Squared extrapolation: two evaluations a cycle, no window, no linear system.

    With r = f(z) - z and v = (f(f(z)) - f(z)) - r, a cycle goes from z to

        z + 2 a r + a² v,     a = ‖r‖ / ‖v‖,     1 <= a <= bound,

    which for a = 1 is f(f(z)). It is meant for maps whose Jacobian has eigenvalues between 0 and 1,
    as those of EM algorithms have: there it needs a small part of Picard's evaluations, at its
    memory and cost. Negative eigenvalues keep a near 1, and little is won.

    Safeguards, each per sample: the bound on a is 4 in the first cycle and grows when it is met; if
    an extrapolation has made the residual ten times as large, f(f(z)) takes its place, and the
    bound falls.

    Memory: 3 states.

    Attributes:
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example:
        >>> import jax.numpy as jnp
        >>> from deq_jax import SQUAREM, deq_fixed_point
        >>> z = deq_fixed_point(lambda a, z, x: a * z + x, 0.9, jnp.ones((4, 8)), solver=SQUAREM())
    """

    tol: Real = 1e-4
    max_iter: int = 100
    atol: Real = 0.0
    trace: bool = False

    scale_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree) -> SQUAREMState:
        """The begin of the first cycle."""
        zeros = tree.zeros_per_sample(z)
        change = jax.tree.map(jnp.zeros_like, z)
        return SQUAREMState(z, change, z, zeros + jnp.inf, zeros + _FIRST_BOUND, zeros > 0)

    def step(self, z: PyTree, fz: PyTree, state: SQUAREMState) -> tuple[PyTree, SQUAREMState]:
        """The plain step, the extrapolation after a second one, or the way back from it."""
        second = state.second
        g = tree.subtract(fz, z)
        size = tree.norm(lax.stop_gradient(g))

        # After a first evaluation: f(z), or back to where the last cycle leads without a.
        rejected = ~second & (size > _GROWTH * state.size)
        first_proposal = tree.where(rejected, state.plain, fz)

        # After a second one: z + 2 a r + a² v from the begin of the cycle.
        r = state.change
        v = tree.subtract(g, r)
        longest = jnp.maximum(state.bound, 1)
        a = jnp.clip(_ratio_of_norms(r, v), 1, longest)
        moved = tree.add(tree.scale(2 * a, r), tree.scale(a**2, v))
        second_proposal = tree.add(state.base, moved)

        met = second & (lax.stop_gradient(a) >= longest)
        bound = jnp.where(met, _BOUND_FACTOR * longest, longest)
        bound = jnp.where(rejected, jnp.maximum(bound / _BOUND_FACTOR, 1), bound)
        return tree.where(second, second_proposal, first_proposal), SQUAREMState(
            base=tree.where(second, state.base, z),
            change=tree.where(second, r, g),
            plain=tree.where(second, fz, state.plain),
            # What follows a plain step in the place of an extrapolation is not judged again.
            size=jnp.where(second, size, jnp.where(rejected, jnp.inf, state.size)),
            bound=bound,
            second=~second & ~rejected,
        )


def _ratio_of_norms(r: PyTree, v: PyTree) -> jax.Array:
    """`‖r‖ / ‖v‖` `[B]`; 1, without a derivative, where one of them is zero."""
    usable = lax.stop_gradient((tree.norm(r) > 0) & (tree.norm(v) > 0))
    r, v = (tree.where(usable, a, jax.tree.map(jnp.ones_like, a)) for a in (r, v))
    return jnp.where(usable, tree.norm(r) / tree.norm(v), 1)
