"""Anderson acceleration (type II) with a ridge relative to the Gram matrix.

Sources: Walker and Ni, "Anderson acceleration for fixed-point iterations", 2011; the DEQ chapter
of the Deep Implicit Layers tutorial, whose absolute ridge is what this file does not do: as soon
as squared residuals fall below such a ridge, the weights tend to 1/n and the method averages its
window instead of extrapolating.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import cho_solve

from deq_jax import checks, columns, tree
from deq_jax.checks import Real

PyTree = Any

_STAGNATION = 0.01
"""A proposal closer to z than this times ‖g‖ is replaced by the plain step z + β g."""

_BLOW_UP = 1e3
"""A residual this many times the lowest one seen empties the window."""


class AndersonState(NamedTuple):
    """The window, a ring of n slots in any order.

    Attributes:
        residuals: leaves `[B, n, D]`, `g_i = f(z_i) - z_i`.
        targets: leaves `[B, n, D]`, `z_i + β g_i`.
        gram: `[n, n, B]`, `⟨g_i, g_j⟩`, at least float32.
        filled: `[n, B]`, the slot holds a pair of this sample's window.
        lowest: `[B]`, lowest `‖g‖` so far.
        slot: int32, the slot to overwrite next.
    """

    residuals: PyTree
    targets: PyTree
    gram: jax.Array
    filled: jax.Array
    lowest: jax.Array
    slot: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: the best combination of the last m points, then a mixed step.

    With g_i = f(z_i) - z_i over the window of the last n = min(k + 1, m) points, per sample,

        α = argmin ‖Σ α_i g_i‖² + ρ Σ α_i² ‖g_i‖²   subject to   Σ α_i = 1
        z_{k+1} = Σ α_i (z_i + β g_i)

    in closed form: `(H + ρ diag H) w = 1`, `α = w / Σ w` with the Gram matrix `H_ij = ⟨g_i, g_j⟩`.
    The ridge is proportional to H, so f and its rescaled twin `s f(z / s)` take the same steps at
    every scale s; scaled to unit diagonal, the matrix is factorised as L D Lᵀ. One new pair
    changes one row of H: m inner products an iteration. Acceleration starts at the second point.

    Guards, each per sample: a proposal that hardly moves gives way to the plain step `z + β g`; a
    factorisation that fails, or a residual far above the best one, empties the window down to
    its newest pair. Nothing raises.

    Memory: 2 m states.

    Attributes:
        history: m, at least 1; 1 is the plain step `z + β g`. A sample of D real numbers has a
            window of at most D + 1 points: the differences of more are linearly dependent.
        mixing: β > 0; below 1 damped, above 1 overprojected.
        ridge: ρ >= 0, dimensionless; raised to the rounding level of the Gram matrix where it is
            smaller.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    history: int = 5
    mixing: Real = 1.0
    ridge: Real = 1e-4
    tol: Real = 1e-4
    max_iter: int = 50
    atol: Real = 0.0
    trace: bool = False

    def __post_init__(self) -> None:
        checks.check_count(self, "history")
        checks.check_number(self, "mixing", above=0.0)
        checks.check_number(self, "ridge", at_least=0.0)
        checks.check_stopping(self)

    scale_free: ClassVar[bool] = True

    def init(self, z: PyTree, fz: PyTree) -> AndersonState:
        """An empty window."""
        zeros = tree.zeros_per_sample(z)
        flat = tree.flatten_samples(z)
        slots = min(self.history, tree.unknowns(z) + 1)
        row = jnp.stack([zeros] * slots)
        return AndersonState(
            residuals=columns.empty(flat, slots),
            targets=columns.empty(flat, slots),
            gram=jnp.stack([row] * slots),
            filled=row > 0,
            lowest=zeros + jnp.inf,
            slot=zeros.sum().astype(jnp.int32),
        )

    def step(self, z: PyTree, fz: PyTree, state: AndersonState) -> tuple[PyTree, AndersonState]:
        """Stores the pair of `z` and proposes the minimiser of the window, mixed."""
        original = z
        z, fz = tree.flatten_samples(z), tree.flatten_samples(fz)
        # The new pair: g = f(z) - z and z + β g take the place of the oldest.
        g = tree.subtract(fz, z)
        one = checks.is_exactly(self.mixing, 1)
        plain = fz if one else tree.add(z, tree.scale(self.mixing, g))
        residuals = columns.store(state.residuals, g, state.slot)
        targets = columns.store(state.targets, plain, state.slot)

        # Its row and column of the Gram matrix, H_ij = ⟨g_i, g_j⟩.
        row = columns.inner_products(residuals, g).T
        gram = lax.dynamic_update_index_in_dim(state.gram, row, state.slot, 0)
        gram = lax.dynamic_update_index_in_dim(gram, row, state.slot, 1)

        # Which pairs count: the newest, and the others unless the residual has blown up. What only
        # decides has no derivative: that of a root at zero would be infinite.
        size = lax.stop_gradient(row)
        size = jnp.sqrt(lax.dynamic_index_in_dim(size, state.slot, 0, keepdims=False))
        slots = len(gram)
        newest = (jnp.arange(slots, dtype=state.slot.dtype) == state.slot)[:, None]
        blown_up = size > _BLOW_UP * state.lowest
        filled = newest | (state.filled & ~blown_up[None])

        # α from (H + ρ diag H) w = 1, α = w / Σ w; then z_{k+1} = Σ α_i (z_i + β g_i).
        weights, solved = _minimiser(gram, filled, self.ridge)
        weights = jnp.where(solved[None], weights, newest.astype(weights.dtype))
        proposal = columns.combine(weights.T, targets)

        # A proposal that hardly moves gives way to the plain step.
        moved = tree.norm(lax.stop_gradient(tree.subtract(proposal, z)))
        proposal = tree.where(moved < _STAGNATION * size, plain, proposal)
        proposal = jax.tree.map(lambda p, z: p.reshape(z.shape), proposal, original)
        return proposal, AndersonState(
            residuals=residuals,
            targets=targets,
            gram=gram,
            filled=newest | (filled & solved[None]),
            lowest=jnp.minimum(state.lowest, size),
            slot=(state.slot + 1) % slots,
        )


def _minimiser(gram: jax.Array, filled: jax.Array, ridge: Any) -> tuple[jax.Array, jax.Array]:
    """Weights `[m, B]` of the window's smallest residual, and where `[B]` they could be had.

    Rows and columns are scaled to a unit diagonal, which makes the ridge relative and keeps pairs
    of very different size apart from rounding. An empty slot becomes a row of the identity with
    right-hand side 0: weight 0 at a static shape.
    """
    slots = len(gram)
    # That 1 / √H_ii is a change of variables, which does not move the solution, so it needs no
    # derivative; below the smallest normal numbers a square carries nothing.
    least = 1e3 * float(jnp.finfo(gram.dtype).tiny)
    diagonal = [gram[i, i] for i in range(slots)]
    usable = [filled[i] & (diagonal[i] > least) for i in range(slots)]
    scale = [
        lax.stop_gradient(jnp.where(u, lax.rsqrt(jnp.where(u, d, 1)), 0))
        for u, d in zip(usable, diagonal, strict=True)
    ]
    # Rounding leaves an error of about m ε in the scaled matrix; below it a ridge does nothing.
    rounding = 2 * slots * float(jnp.finfo(gram.dtype).eps)
    ridge = jnp.maximum(jnp.asarray(ridge, gram.dtype), rounding)

    def entry(i: int, j: int) -> jax.Array:
        scaled = gram[i, j] * scale[i] * scale[j]
        if i == j:  # exactly 1 + ρ, with the derivative of (1 + ρ) H_ii / H_ii by H_ii
            return (1 + ridge) * (1 + (scaled - lax.stop_gradient(scaled)))
        return jnp.where(usable[i] & usable[j], scaled, 0)

    solve = _solve_unrolled if slots <= _UNROLLED else _solve_by_cholesky
    w, solved = solve(entry, scale)
    w = [s * w for s, w in zip(scale, w, strict=True)]
    total = functools.reduce(jnp.add, w)
    positive = total > 0
    weights = jnp.stack(w) / jnp.where(positive, total, 1)[None]
    return weights, solved & positive & jnp.isfinite(weights).all(0)


_UNROLLED = 10
"""Up to this history the factorisation is written out, elementwise over the batch."""


def _solve_unrolled(
    entry: Callable[[int, int], jax.Array], rhs: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """Solves `A w = rhs` by A = L D Lᵀ, and says where `[B]` all pivots are sound.

    `entry(i, j)` is A_ij `[B]`. A pivot that fails is replaced by 1, so that neither the solution
    nor its derivative is NaN.
    """
    count = len(rhs)
    matrix = [[entry(i, j) for j in range(i + 1)] for i in range(count)]
    lower, pivots, solved = _factorise(lax.stop_gradient(matrix))
    return _substitute(matrix, lower, pivots, rhs), solved


def _factorise(matrix: list[list[jax.Array]]) -> tuple[Any, list[jax.Array], jax.Array]:
    """L below its diagonal of ones, D, and where all of D is sound."""
    lower: list[list[jax.Array]] = []
    pivots: list[jax.Array] = []
    sound: list[jax.Array] = []
    for i, given in enumerate(matrix):
        row: list[jax.Array] = []  # L_ij d_j = A_ij - Σ_k L_ik d_k L_jk
        for j in range(i):
            row.append(given[j] - _sum_of_products(row, lower[j]))
        lower.append([r / d for r, d in zip(row, pivots, strict=True)])
        pivot = given[i] - _sum_of_products(row, lower[i])
        sound.append(pivot > 0)
        pivots.append(jnp.where(sound[i], pivot, 1))
    return lower, pivots, functools.reduce(jnp.logical_and, sound)


@jax.custom_jvp
def _substitute(
    matrix: list[list[jax.Array]], lower: Any, pivots: list[jax.Array], rhs: list[jax.Array]
) -> list[jax.Array]:
    """The solution from the factors: L y = rhs, then Lᵀ w = y / d.

    Differentiated as a solution, `A ẇ = ṙ - Ȧ w`: through the factorisation itself the derivative
    would lose twice as many digits.
    """
    count = len(rhs)
    w: list[jax.Array] = []
    for i in range(count):
        w.append(rhs[i] - _sum_of_products(lower[i], w))
    w = [y / d for y, d in zip(w, pivots, strict=True)]
    for i in reversed(range(count)):
        w[i] = w[i] - _sum_of_products([lower[k][i] for k in range(i + 1, count)], w[i + 1 :])
    return w


@_substitute.defjvp
def _substitute_tangent(primals: Any, tangents: Any) -> Any:
    matrix, lower, pivots, rhs = primals
    moved, _, _, rhs_moved = tangents
    w = _substitute(matrix, lower, pivots, rhs)
    count = range(len(rhs))
    change = [_sum_of_products([moved[max(i, j)][min(i, j)] for j in count], w) for i in count]
    right = [r - c for r, c in zip(rhs_moved, change, strict=True)]
    return w, _substitute(matrix, lower, pivots, right)


def _sum_of_products(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> Any:
    return sum((x * y for x, y in zip(a, b, strict=False)), start=0.0)


def _solve_by_cholesky(
    entry: Callable[[int, int], jax.Array], rhs: list[jax.Array]
) -> tuple[list[jax.Array], jax.Array]:
    """`_solve_unrolled` for larger systems, by JAX's batched factorisation."""
    count = len(rhs)
    rows = [[entry(i, j) for j in range(count)] for i in range(count)]
    matrix = jnp.stack([jnp.stack(row, 1) for row in rows], 1)
    factor = lax.linalg.cholesky(matrix, symmetrize_input=False)
    w = cho_solve((factor, True), jnp.stack(rhs, 1)[..., None])[..., 0]
    return list(w.T), jnp.isfinite(w).all(1)
