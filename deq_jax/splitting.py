"""Operator splittings: monotone equations `z = relu(W z + c)` as other fixed-point equations.

If `I - W` is strongly monotone, `I - W + (I - W)ᵀ ≥ 2 m I` with m > 0, then `z = relu(W z + c)` has
exactly one solution z* for every c. Plain iteration of the equation may diverge all the same. A
splitting changes the equation into `u = T(u)`, which has the same solution and which iteration
solves. Every solver, gradient policy and report of the library then works on T as on any other
function.

| | T(u) | converges for | rate | z* |
| --- | --- | --- | --- | --- |
| `ForwardBackward` | `relu(u + α (W u + c - u))` | `α < 2 m / L²` | `√(1 - 2 α m + α² L²)` | u* |
| `PeacemanRachford` | `R (w + α c) + α c` | α > 0 | `√(1 - 4 α m / (1 + α L)²)` | relu(u*) |

The rate bounds the factor by which an iteration shrinks the error, in the Euclidean norm, and
`L = ‖I - W‖` is a spectral norm. In the second line `w = 2 relu(u) - u` and `R = 2 V - I`, where
`V = (I + α (I - W))⁻¹` is the resolvent. It depends on weights alone, so it is computed once,
outside of the loop, and is part of the `params` of T: every evaluation uses it, forwards and
backwards, and the derivative with respect to W passes through it once.

Anything with the four methods of `MonotoneOperator` can be split. With plain arrays:

    class DenseOperator(NamedTuple):
        w: jax.Array  # [n, n]

        def multiply(self, z):
            return z @ self.w.T

        def resolvent(self, alpha):
            identity = jnp.eye(len(self.w))
            return jnp.linalg.inv((1 + alpha) * identity - alpha * self.w)

        def apply_resolvent(self, resolvent, z):
            return z @ resolvent.T

        def activation(self, z):
            return jax.nn.relu(z)

    splitting = PeacemanRachford(alpha=1.0)

    def f(params, u, c):
        operator, resolvent = params
        return splitting.step(operator, resolvent, u, c)

    def equilibrium(w, c):  # c: [B, n]
        operator = DenseOperator(w)
        params = operator, splitting.prepare(operator)
        u = deq_fixed_point(f, params, c, solver=Picard())
        return splitting.solution(operator, u)

Source: Winston and Kolter, "Monotone operator equilibrium networks", 2020; Ryu and Boyd, "A primer
on monotone operator methods", 2016.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

import jax

from deq_jax import checks
from deq_jax.checks import Real

PyTree = Any


class MonotoneOperator(Protocol):
    """What a splitting needs of the equation `z = activation(W z + c)`; states are any pytrees.

    The activation has to be a projection onto a convex set, entry by entry: ReLU, or a clip to an
    interval. Only then is it its own proximal operator for every α.
    """

    def multiply(self, z: Any, /) -> Any:
        """`W z`, like z, `[B, ...]`."""
        ...

    def resolvent(self, alpha: Any, /) -> Any:
        """`V = (I + α (I - W))⁻¹` as a pytree of arrays."""
        ...

    def apply_resolvent(self, resolvent: Any, z: Any, /) -> Any:
        """`V z`, like z, `[B, ...]`."""
        ...

    def activation(self, z: Any, /) -> Any:
        """The activation at every entry of z."""
        ...


@runtime_checkable
class Splitting(Protocol):
    """A fixed-point equation `u = T(u)` that solves `z = activation(W z + c)`; a dataclass.

    Attributes:
        alpha: the step size α > 0. The solution does not depend on α; the number of iterations
            does.
    """

    @property
    def alpha(self) -> Any: ...  # noqa: D102

    def prepare(self, operator: MonotoneOperator, /) -> Any:
        """What all evaluations of T share, a pytree of arrays."""
        ...

    def step(self, operator: MonotoneOperator, resolvent: Any, u: Any, c: Any, /) -> Any:
        """`T(u)`, like u and c, `[B, ...]`; `resolvent` is what `prepare` returned."""
        ...

    def solution(self, operator: MonotoneOperator, u: Any, /) -> Any:
        """z* from u*."""
        ...

    def start(self, operator: MonotoneOperator, z: Any, c: Any, /) -> Any:
        """The u that belongs to a state z; exactly u* if z is z*."""
        ...


def check_splitting(splitting: Any) -> None:
    """Raises a TypeError unless the argument is a splitting."""
    fits = isinstance(splitting, Splitting) and dataclasses.is_dataclass(splitting)
    if isinstance(splitting, type) or not fits:
        raise TypeError(
            "splitting must be PeacemanRachford(...), ForwardBackward(...) or a frozen dataclass "
            f"with alpha, prepare, step, solution and start; got {splitting!r}"
        )


@checks.register_options
@dataclasses.dataclass(frozen=True)
class ForwardBackward:
    """Forward-backward splitting, `T(z) = activation((1 - α) z + α (W z + c))`.

    Iteration converges for `α < 2 m / L²` with `L = ‖I - W‖`, and shrinks an error by a factor of
    at most √(1 - 2 α m + α² L²). One evaluation costs one product with W. With α = 1 it is the
    equation itself.

    With a larger α the solve may report `DIVERGED` or use up its budget. L is seldom known and
    changes in training, so look for α by halving it until the solve converges:
    `deq_jax.monotone.tune_alpha(layer, x)` does this for a `MonotoneDEQ`.

    Attributes:
        alpha: α, a number above 0; it may be traced.

    Raises:
        ValueError, TypeError: `alpha` is not positive or no number.
    """

    alpha: Real = 1.0

    def __post_init__(self) -> None:
        checks.check_number(self, "alpha", above=0.0)

    def prepare(self, operator: MonotoneOperator) -> tuple[()]:
        """Nothing: it needs products with W alone."""
        del operator
        return ()

    def step(self, operator: MonotoneOperator, resolvent: Any, u: PyTree, c: PyTree) -> PyTree:
        """`activation((1 - α) u + α (W u + c))`."""
        del resolvent
        return operator.activation(_forward_step(self.alpha, operator, u, c))

    def solution(self, operator: MonotoneOperator, u: PyTree) -> PyTree:
        """The state u itself."""
        del operator
        return u

    def start(self, operator: MonotoneOperator, z: PyTree, c: PyTree) -> PyTree:
        """The state z itself."""
        del operator, c
        return z


@checks.register_options
@dataclasses.dataclass(frozen=True)
class PeacemanRachford:
    """Peaceman-Rachford splitting, `T(u) = 2 V (w + α c) - w` with `w = 2 activation(u) - u`.

    T is computed as `R (w + α c) + α c` with `R = 2 V - I`, which is the same. Differences of u do
    not grow in w, and R shrinks them. With m the strong monotonicity and `L = ‖I - W‖`, an error
    shrinks in each iteration by a factor of at most

        √(1 - 4 α m / (1 + α L)²),

    so that iteration converges for every α > 0. This bound is smallest for α = 1/L, where it is
    √(1 - m/L). With `Picard(damping=0.5)` the iteration is Douglas-Rachford splitting.

    Backwards `Implicit` solves `v = Jᵀ v + y` with `J = R (2 D - I)`, D the derivative of the
    activation. The published backward iteration, `q = Rᵀ (2 D (q + α g) - q)`, computes the same
    vectors in other variables, `v = ((2 D - I) q + 2 α D g) / (2 α)`.

    Attributes:
        alpha: α, a number above 0; it may be traced.

    Raises:
        ValueError, TypeError: `alpha` is not positive or no number.
    """

    alpha: Real = 1.0

    def __post_init__(self) -> None:
        checks.check_number(self, "alpha", above=0.0)

    def prepare(self, operator: MonotoneOperator) -> PyTree:
        """The arrays of the resolvent V."""
        return operator.resolvent(self.alpha)

    def step(self, operator: MonotoneOperator, resolvent: PyTree, u: PyTree, c: PyTree) -> PyTree:
        """`2 V (w + α c) - w` with `w = 2 activation(u) - u`."""
        scaled = _scale(self.alpha, c)
        reflected = jax.tree.map(lambda z, u: 2 * z - u, operator.activation(u), u)
        w = jax.tree.map(lambda w, c: w + c, reflected, scaled)
        halved = operator.apply_resolvent(resolvent, w)
        return jax.tree.map(lambda v, w, c: 2 * v - w + c, halved, w, scaled)

    def solution(self, operator: MonotoneOperator, u: PyTree) -> PyTree:
        """`activation(u)`."""
        return operator.activation(u)

    def start(self, operator: MonotoneOperator, z: PyTree, c: PyTree) -> PyTree:
        """`(1 - α) z + α (W z + c)`, since `z* = activation` of this at z*."""
        return _forward_step(self.alpha, operator, z, c)


def _scale(alpha: Any, c: PyTree) -> PyTree:
    """`α c`."""
    return jax.tree.map(lambda leaf: checks.in_dtype(alpha, leaf.dtype) * leaf, c)


def _forward_step(alpha: Any, operator: MonotoneOperator, z: PyTree, c: PyTree) -> PyTree:
    """`(1 - α) z + α (W z + c)`."""
    change = jax.tree.map(lambda wz, c, z: wz + c - z, operator.multiply(z), c, z)
    return jax.tree.map(lambda z, d: z + d, z, _scale(alpha, change))
