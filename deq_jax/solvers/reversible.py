"""The reversible pair of RevDEQ: an iteration that can be run backwards, in closed form.

Source: McCallum, Arora and Foster, "Reversible deep equilibrium models", 2025, arXiv 2509.12917.

Differs from the paper: the two states of its pair are evaluated in turn, so that here they are one
sequence of points and a step is one evaluation. The state is kept in several floats for each entry
(`deq_jax/expansions.py`) in place of float64, and f is evaluated in the dtype of z.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax import checks, expansions, tree
from deq_jax.checks import Real

PyTree = Any
Expansion = list[jax.Array]

_SMALL = 24
"""Entries of the state above 2⁻²⁴ have all their components."""

_MOST_UNIT = 96
"""The state is kept times at most 2⁹⁶, which leaves float32 numbers of 2³¹."""


class ReversibleState(NamedTuple):
    """Two neighbouring points of the sequence, after n steps.

    Attributes:
        before: s_n; for each real array of the state its expansion, leaves `[B, ...]`, times a
            power of two.
        current: s_{n+1}, likewise. It is the point that was proposed last.
        steps: int32 `[B]`, n.
    """

    before: list[Expansion]
    current: list[Expansion]
    steps: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Reversible:
    """Damped iteration on two states in turn, which `Reversed()` differentiates backwards.

    The pair of states y, z of the paper goes from y_0 = z_0 as

        y_{n+1} = (1 - β) y_n + β f(z_n),      z_{n+1} = (1 - β) z_n + β f(y_{n+1}),

    which is one sequence s = z_0, z_0, y_1, z_1, y_2, ... with one evaluation a step:

        s_{k+1} = (1 - β) s_{k-1} + β f(s_k)   and back   s_{k-1} = (s_{k+1} - β f(s_k)) / (1 - β).

    With `gradient=Reversed()` the gradient is that of the returned iterate, exact like that of
    `Unrolled()`, and no iterate is stored: the backward pass computes them again from the last two.
    With any other policy it is a solver like the others; Anderson needs fewer evaluations.

    Converges locally if and only if both roots of `s² = (1 - β) + β μ s` lie inside the unit circle
    for every eigenvalue μ of ∂f/∂z: for every real μ in (-1, 1).

    Rounding. The sequence forgets where it came from, and the way back has to know it: an error
    made there grows by 1 / √(1 - β) an evaluation in directions where ∂f/∂z is small, and by up to
    1 / (1 - β) where its norm is 1. So each entry of the state is the sum of several floats, 24
    bits each in float32 (a half-precision state is kept in float32, too). By default they are as
    many as f with a norm of ∂f/∂z of at most 1 can need in `max_iter` evaluations, which is 2 in
    float32 for 36 evaluations at β = 0.5 or 15 at β = 0.8. The exponents of float32 reach for 8.
    The table in docs/gradients.md shows what fewer do. A `BackwardProbe` measures the rounding in
    each backward pass. The values of f need no more precision, but they must be the same bits in
    both passes; on a CPU they are.

    Memory: 2 `components` states, whatever the number of evaluations was.

    Attributes:
        damping: β in (0, 1), rounded to a multiple of 2⁻¹¹, by which floats can be multiplied
            exactly. The paper has 0.8 for images and 0.5 for language.
        components: floats for each entry of the state; None takes as many as `max_iter` asks for.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deq_jax import Reversed, Reversible, deq_fixed_point
        >>> def loss(a):
        ...     f = lambda a, z, x: jnp.tanh(a * z) + x
        ...     options = {"solver": Reversible(0.8, max_iter=12), "gradient": Reversed()}
        ...     return deq_fixed_point(f, a, jnp.ones((2, 3)), **options).sum()
        >>> gradient = jax.grad(loss)(0.5)
    """

    damping: Real = 0.5
    components: int | None = None
    tol: Real = 1e-4
    max_iter: int = 32
    atol: Real = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        checks.check_number(self, "damping", above=0.0, at_most=1.0)
        if checks.is_exactly(self.damping, 1):
            raise ValueError("Reversible.damping must be below 1, where no way back is left; got 1")
        if self.components is not None:
            checks.check_count(self, "components")
        checks.check_stopping(self)

    def factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """β and 1 - β in this dtype, multiples of 2⁻¹¹ as `expansions.products` needs them."""
        parts = 1 << expansions.FACTOR_BITS
        beta = jnp.asarray(lax.stop_gradient(self.damping), dtype)
        beta = jnp.clip(jnp.round(beta * parts), 1, parts - 1) / parts
        return beta, 1 - beta

    def components_in(self, dtype: Any) -> int:
        """The floats for each entry of a state that is kept in this real dtype.

        Raises:
            ValueError: they are more than the dtype has exponents for, or cannot be known.
        """
        count = self.components
        if count is None:
            count = self._chosen_components(dtype)
        most = (_MOST_UNIT - _SMALL - int(jnp.finfo(dtype).minexp)) // _bits(dtype)
        if count > most:
            raise ValueError(
                f"{self!r} takes {count} components in {dtype}, whose exponents reach for {most}; "
                "take a smaller damping or max_iter, or a state in float64"
            )
        return count

    def _chosen_components(self, dtype: Any) -> int:
        if isinstance(self.damping, jax.core.Tracer):
            raise ValueError(
                "Reversible.components=None is chosen from damping, whose value is not known while "
                "it is traced; give components, or damping as a Python number"
            )
        return self.components_needed(dtype, most=True)

    def components_needed(self, dtype: Any, most: bool) -> int:
        """Floats for each entry, so that some bits are left of it after `max_iter` steps.

        Args:
            dtype: of the floats.
            most: half the bits of a float are left at the fastest growth of an error where the norm
                of ∂f/∂z is at most 1. If false, 8 bits are left at the slowest growth, which is
                that of ∂f/∂z = 0.
        """
        kept = float(np.clip(1 - float(self.damping), 2.0**-11, 1))
        lost = self.max_iter * -math.log2(kept) * (1 if most else 0.5)
        bits = _bits(dtype)
        return math.ceil((lost + (bits / 2 if most else 8)) / bits)

    def init(self, z: PyTree, fz: PyTree) -> ReversibleState:
        """s_0 = s_1 = z_0."""
        start = []
        for part in real_parts(z):
            count = self.components_in(part.dtype)
            first = part * _unit(count, part.dtype)
            start.append([first, *[jnp.zeros_like(part)] * (count - 1)])
        steps = tree.zeros_per_sample(z).astype(jnp.int32)
        return ReversibleState(start, start, steps)

    def step(self, z: PyTree, fz: PyTree, state: ReversibleState) -> tuple[PyTree, ReversibleState]:
        """`(1 - β) s_{k-1} + β f(s_k)`.

        A sample that has stopped rests at another point than was proposed, or its f is not finite.
        Its pair stays as it was, for the way back. (A compiler that computes f(z) again for each
        use may round the proposal differently here and there; that is no rest.)
        """
        resting = _near(z, rounded_state(state.before, z), 0)
        proposed = rounded_state(state.current, z)
        moving = _near(z, proposed, 0) | (~resting & _near(z, proposed, 8))
        moving &= jnp.isfinite(tree.largest(fz))
        following = [
            _advance(before, image * _unit(len(before), image.dtype), *self.factors(image.dtype))
            for before, image in zip(state.before, real_parts(fz), strict=True)
        ]
        before = tree.where(moving, state.current, state.before)
        current = tree.where(moving, following, state.current)
        steps = state.steps + moving.astype(jnp.int32)
        return rounded_state(current, z), ReversibleState(before, current, steps)

    def step_back(self, fz: PyTree, state: ReversibleState) -> list[Expansion]:
        """`s_{n-1} = (s_{n+1} - β f(s_n)) / (1 - β)` from s_n, s_{n+1} and `fz = f(s_n)`."""
        earlier = []
        for current, image in zip(state.current, real_parts(fz), strict=True):
            beta, kept = self.factors(image.dtype)
            scaled = image * _unit(len(current), image.dtype)
            terms = [*current, *expansions.products(-beta, [scaled])]
            earlier.append(expansions.quotient(terms, kept, len(current)))
        return earlier


def real_parts(a: PyTree) -> list[jax.Array]:
    """The leaves as real arrays, float32 or wider; the two parts of complex ones."""
    parts = []
    for leaf in jax.tree.leaves(a):
        wide = leaf.astype(tree.working_dtype(leaf.dtype))
        parts += [wide.real, wide.imag] if jnp.iscomplexobj(wide) else [wide]
    return parts


def _bits(dtype: Any) -> int:
    """Significant bits of a float."""
    return int(jnp.finfo(dtype).nmant) + 1


def _unit(count: int, dtype: Any) -> float:
    """The power of two that keeps `count` components of numbers above `2 ** -_SMALL` normal.

    It is 1 for up to four components in float32. A product with it is exact.
    """
    return 2.0 ** max(0, count * _bits(dtype) + _SMALL + int(jnp.finfo(dtype).minexp))


def rounded_state(parts: list[Expansion], like: PyTree) -> PyTree:
    """The state that the expansions stand for, in the dtypes of `like`."""
    leaves, structure = jax.tree.flatten(like)
    values = iter([c[0] / _unit(len(c), c[0].dtype) for c in parts])
    restored = [
        lax.complex(next(values), next(values)) if jnp.iscomplexobj(leaf) else next(values)
        for leaf in leaves
    ]
    pairs = zip(restored, leaves, strict=True)
    return jax.tree.unflatten(structure, [value.astype(leaf.dtype) for value, leaf in pairs])


def _near(z: PyTree, point: PyTree, ulps: int) -> jax.Array:
    """`[B]`: z is the point, up to so many units of rounding of the largest entry."""

    def far(z: jax.Array, point: jax.Array) -> jax.Array:
        distance, size = tree.largest(z - point), tree.largest(point)
        return (distance > ulps * float(jnp.finfo(z.dtype).eps) * size).astype(jnp.int32)

    return jnp.stack(jax.tree.leaves(jax.tree.map(far, z, point))).max(0) == 0


@jax.custom_jvp
def _advance(before: Expansion, image: jax.Array, beta: jax.Array, kept: jax.Array) -> Expansion:
    """`(1 - β) before + β image`."""
    terms = expansions.products(kept, before) + expansions.products(beta, [image])
    return expansions.rounded(terms, len(before))


@_advance.defjvp
def _advance_tangent(primals: Any, tangents: Any) -> Any:
    """The tangent of a sum of floats is one float."""
    before, _, beta, kept = primals
    before_moved, image_moved, *_ = tangents
    moved = kept * sum(before_moved[1:], start=before_moved[0]) + beta * image_moved
    rest = [jnp.zeros_like(moved)] * (len(before) - 1)
    return _advance(*primals), [moved, *rest]
