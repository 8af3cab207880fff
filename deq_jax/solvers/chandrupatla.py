"""Chandrupatla's method: the root of one equation in one number, inside of a bracket.

Source: Chandrupatla, "A new hybrid quadratic/bisection algorithm for finding the zero of a
nonlinear function without using derivatives", 1997.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.solvers.broyden import Broyden

PyTree = Any

_GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, fill the unit interval evenly, however many there are."""


Point = tuple[jax.Array, jax.Array]
"""z and g(z) = f(z) - z of each sample, both `[B]`."""


class ChandrupatlaState(NamedTuple):
    """What is known of each sample's equation; all `[B]`.

    Attributes:
        lower: the lower end of the bracket that was given.
        upper: its upper end.
        start: the point evaluated first.
        last: the newest point of the bracket.
        other: its other end.
        before: the point that `last` took the place of.
        bracketed: bool, g has different signs at `last` and `other`.
        three: bool, `before` is known.
        number: int32, evaluations so far.
    """

    lower: jax.Array
    upper: jax.Array
    start: Point
    last: Point
    other: Point
    before: Point
    bracketed: jax.Array
    three: jax.Array
    number: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Chandrupatla:
    """Root finder for states of one real number a sample, sure to converge in a bracket.

    Looks for a zero of g(z) = f(z) - z with lower <= z <= upper, for each sample in its own
    bracket. The start, `lower` and `upper` are evaluated first. If g has different signs at two of
    them, each further evaluation shrinks the bracket: by inverse quadratic interpolation where the
    last three points allow it, else by half. For a continuous g it converges whatever the slope of
    f is, and nearly as fast as Newton's method where g is smooth. An equation g(z) = 0 is the fixed
    point of f(z) = z + g(z).

    If g has one sign at all of them, the bracket is searched at points that fill it evenly, until
    one of the other sign is found. If there is none, the status is `MAX_ITER`, and the point with
    the lowest residual is returned; nothing is `CONVERGED` that does not meet a tolerance.

    The residual is relative to f(z): for a solution near zero, set `atol`. f is also evaluated at
    the start, which is zero unless z0 is given; it must be finite there and in the bracket.

    `Implicit()` solves the linear system of the gradient by Broyden's method, since the bracket is
    not one of that system. `Unrolled()` is of no use: bisection has no derivative.

    Attributes:
        lower: lower end, a number or one for each sample, `[B]`. An `Execution` that splits or
            shrinks the batch takes a number only.
        upper: upper end, likewise, above `lower`.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it. Or
            the state has more than one real number a sample.

    Example:
        >>> import jax.numpy as jnp
        >>> from deq_jax import Chandrupatla, deq_fixed_point
        >>> # z³ = x, for three x at once
        >>> solver = Chandrupatla(0.0, 10.0, tol=1e-6)
        >>> z = deq_fixed_point(lambda _, z, x: z + x - z**3, None, jnp.array([1.0, 8.0, 27.0]),
        ...                     solver=solver)
    """

    lower: Real
    upper: Real
    tol: Real = 1e-4
    max_iter: int = 60
    atol: Real = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            value = getattr(self, name)
            number = checks.is_array(value) and not isinstance(value, bool)
            if not number or jnp.iscomplexobj(value) or np.ndim(value) > 1:
                raise TypeError(
                    f"Chandrupatla.{name} must be a real number, or one for each sample, "
                    f"got {value!r}"
                )
        known = not any(isinstance(v, jax.core.Tracer) for v in (self.lower, self.upper))
        if known and not np.all(np.asarray(self.lower) < np.asarray(self.upper)):
            raise ValueError(
                "Chandrupatla.lower must be below Chandrupatla.upper, got "
                f"lower={self.lower!r}, upper={self.upper!r}"
            )
        checks.check_stopping(self)

    @property
    def adjoint_solver(self) -> Broyden:
        """What solves the linear system of `Implicit()`."""
        return Broyden(tol=self.tol, max_iter=self.max_iter, memory=2)

    def init(self, z: PyTree, fz: PyTree) -> ChandrupatlaState:
        """Nothing has been evaluated.

        Raises:
            ValueError: the state is more than one real number a sample, or the ends of the bracket
                are not one for each sample.
        """
        size = tree.unknowns(z)
        if size != 1:
            raise ValueError(
                "Chandrupatla solves one equation in one real number for each sample, but the "
                f"state has {size} real numbers a sample"
            )
        zeros = tree.zeros_per_sample(z)
        ends = []
        for name in ("lower", "upper"):
            end = jnp.asarray(getattr(self, name), zeros.dtype)
            if end.shape not in ((), zeros.shape):
                raise ValueError(
                    f"Chandrupatla.{name} must be a number or of shape {zeros.shape}, one for each "
                    f"sample; got shape {end.shape}. Where Execution(shrink_to=..., "
                    "shard_axis=...) takes the batch apart, it must be a number"
                )
            ends.append(zeros + end)
        point = zeros, zeros
        number = zeros.astype(jnp.int32)
        return ChandrupatlaState(
            lower=ends[0],
            upper=ends[1],
            start=point,
            last=point,
            other=point,
            before=point,
            bracketed=zeros > 0,
            three=zeros > 0,
            number=number,
        )

    def step(
        self, z: PyTree, fz: PyTree, state: ChandrupatlaState
    ) -> tuple[PyTree, ChandrupatlaState]:
        """The next point inside of the smaller bracket."""
        (leaf,), structure = jax.tree.flatten(z)
        x = leaf.reshape(-1).astype(state.lower.dtype)
        point = x, jax.tree.leaves(fz)[0].reshape(-1).astype(x.dtype) - x

        # The first evaluations: of the start, the lower end and the upper end.
        number = state.number
        known = state._replace(
            start=tree.where(number == 0, point, state.start),
            last=tree.where(number == 1, point, state.last),
            other=tree.where(number == 2, point, state.other),
        )
        ends = known._replace(bracketed=_differ(known.last, known.other))
        inside = (state.lower < known.start[0]) & (known.start[0] < state.upper)
        ends = tree.where(inside, _narrowed(ends, known.start), ends)
        # Then of points inside of it.
        state = tree.where(number == 2, ends, known)
        state = tree.where(number > 2, _narrowed(known, point), state)

        # Into the bracket; without one, to where it has not been searched yet.
        fraction = jnp.mod(number.astype(x.dtype) * _GOLDEN, 1)
        search = state.lower + fraction * (state.upper - state.lower)
        proposal = jnp.where(state.bracketed, _next_point(state), search)
        proposal = jnp.where(number == 0, state.lower, proposal)
        proposal = jnp.where(number == 1, state.upper, proposal)
        proposal = proposal.astype(leaf.dtype).reshape(leaf.shape)
        return jax.tree.unflatten(structure, [proposal]), state._replace(number=number + 1)


def _differ(a: Point, b: Point) -> jax.Array:
    """Whether g is positive at one of the points and not at the other, `[B]`."""
    return (a[1] > 0) != (b[1] > 0)


def _narrowed(state: ChandrupatlaState, point: Point) -> ChandrupatlaState:
    """The smaller bracket with `point` as one of its ends, or the first bracket that there is."""
    differs = _differ(point, state.last)
    narrower = state._replace(
        last=point,
        other=tree.where(differs, state.last, state.other),
        before=tree.where(differs, state.other, state.last),
        three=jnp.ones_like(state.three),
    )
    first = state._replace(last=point, other=state.last, bracketed=differs)
    first = tree.where(differs, first, state)
    return tree.where(state.bracketed, narrower, first)


def _next_point(state: ChandrupatlaState) -> jax.Array:
    """A point between `last` and `other`, `[B]`."""
    (x1, g1), (x2, g2), (x3, g3) = state.last, state.other, state.before
    # Inverse quadratic interpolation if ξ and φ say that it is monotone between the points.
    usable = state.three & (x3 != x2) & (x3 != x1) & (g1 != g2) & (g1 != g3) & (g2 != g3)

    def over(a: jax.Array, b: jax.Array) -> jax.Array:
        return a / jnp.where(usable, b, 1)

    xi, phi = over(x1 - x2, x3 - x2), over(g1 - g2, g3 - g2)
    usable &= (phi**2 < xi) & ((1 - phi) ** 2 < 1 - xi)
    t = over(g1, g2 - g1) * over(g3, g2 - g3)
    t += over(x3 - x1, x2 - x1) * over(g1, g3 - g1) * over(g2, g3 - g2)
    # Not closer to an end than numbers can be told apart there.
    size = jnp.maximum(jnp.abs(x1), jnp.abs(x2))
    width = jnp.abs(x2 - x1)
    least = jnp.finfo(x1.dtype).eps * size / jnp.where(width > 0, width, 1)
    least = jnp.minimum(least, 0.5)
    t = jnp.clip(jnp.where(usable, t, 0.5), least, 1 - least)
    return x1 + t * (x2 - x1)
