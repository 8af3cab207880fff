"""Wegstein's method: a secant of each entry of the state by itself.

Source: Wegstein, "Accelerating convergence of iterative processes", 1958. The bounds on its factor
are those that flowsheet simulators of chemical plants use it with.
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
"""A step after which the residual is this many times as large is followed by a plain one."""


class WegsteinState(NamedTuple):
    """The last evaluation.

    Attributes:
        point: z.
        image: f(z).
        size: `[B]`, `‖f(z) - z‖`; infinite before the first evaluation.
    """

    point: PyTree
    image: PyTree
    size: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Wegstein:
    """Fixed-point iteration with a slope estimated for each entry of the state.

    With s = Δf / Δz, the quotient of the last changes of an entry of f(z) and z, the next point is

        z <- q z + (1 - q) f(z),     q = s / (s - 1),     lower <= q <= upper,

    entry by entry. For an equation in one number this is the secant method. It suits maps in which
    each entry depends mostly on itself; the entries of others move under each other's feet, and the
    bounds hold them. q = 0 is the plain step, q < 0 goes beyond it (slopes between 0 and 1), q > 0
    stays behind it (negative slopes). A complex entry is two real ones.

    Safeguards: an entry that did not move, or whose slope is 1, takes the plain step. So does a
    sample whose residual has grown by a factor of ten.

    Memory: 2 states.

    Attributes:
        lower: least q, at most 0. -5 is usual: at most 6 plain steps at once.
        upper: largest q, at least 0 and below 1. 0 is usual where no slope is negative.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example:
        >>> import jax.numpy as jnp
        >>> from deq_jax import Wegstein, deq_fixed_point
        >>> z = deq_fixed_point(lambda a, z, x: jnp.cos(a * z) + x, 0.9, jnp.ones((4, 8)),
        ...                     solver=Wegstein())
    """

    lower: Real = -5.0
    upper: Real = 0.5
    tol: Real = 1e-4
    max_iter: int = 100
    atol: Real = 0.0
    trace: bool = False

    scale_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.check_number(self, "lower", at_most=0.0)
        checks.check_number(self, "upper", at_least=0.0, at_most=1.0)
        if checks.is_exactly(self.upper, 1):
            raise ValueError("Wegstein.upper must be below 1, at which no entry moves; got 1")
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree) -> WegsteinState:
        """Nothing has been evaluated."""
        zeros = jax.tree.map(jnp.zeros_like, z)
        return WegsteinState(zeros, zeros, tree.zeros_per_sample(z) + jnp.inf)

    def step(self, z: PyTree, fz: PyTree, state: WegsteinState) -> tuple[PyTree, WegsteinState]:
        """`q z + (1 - q) f(z)`."""
        size = tree.norm(lax.stop_gradient(tree.subtract(fz, z)))
        plain = jnp.isinf(state.size) | (size > _GROWTH * state.size)

        def of_leaf(z: jax.Array, fz: jax.Array, point: jax.Array, image: jax.Array) -> jax.Array:
            dtype = z.dtype
            if jnp.iscomplexobj(z):
                parts = [(a.real, a.imag) for a in (z, fz, point, image)]
                return lax.complex(*(of_leaf(*part) for part in zip(*parts, strict=True)))
            wide = tree.accumulation_dtype(dtype)
            z, fz, point, image = (a.astype(wide) for a in (z, fz, point, image))
            # q = s / (s - 1) = Δf / (Δf - Δz).
            rise = fz - image
            change = rise - (z - point)
            usable = (change != 0) & (z != point) & ~tree.over_samples(plain, z)
            lower, upper = (checks.in_dtype(o, wide) for o in (self.lower, self.upper))
            q = jnp.where(usable, rise / jnp.where(usable, change, 1), 0)
            q = jnp.clip(q, lower, upper)
            return (fz + q * (z - fz)).astype(dtype)

        return jax.tree.map(of_leaf, z, fz, state.point, state.image), WegsteinState(z, fz, size)
