"""Broyden's method ("good"): root finding with an inverse Jacobian built up from rank-one terms.

Sources: Broyden, "A class of methods for solving nonlinear simultaneous equations", 1965; Bai,
Kolter and Koltun, "Deep equilibrium models", 2019, section 3.1.3, the solver of that paper.

Differs from other libraries: a sample is one vector, all leaves together (applied leaf by leaf the
low-rank terms break the secant condition), and a full memory is emptied
rather than overwritten column by column: each rank-one term was built on those before it, so that
no single one can be dropped.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, columns, tree
from deq_jax.checks import Real

PyTree = Any

_BLOW_UP = 1e3
"""A residual this many times the lowest one seen empties the memory."""

_DECREASE = 1e-4
"""Armijo's constant c: a step of length s is accepted below (1 - c s) times the old residual."""

_SHORTEST = 1 / 32
"""A step this fraction of the full one is accepted whatever it does."""


class InverseJacobian(NamedTuple):
    """`B = -I + U Vᵀ ≈ (J - I)⁻¹` of each sample, J = ∂f/∂z.

    Attributes:
        left: the columns of U, `[B, L, D]`, at least float32.
        right: the columns of V, likewise.
        filled: `[B, L]`, the column is part of this sample's estimate.
    """

    left: jax.Array
    right: jax.Array
    filled: jax.Array

    def apply(self, x: jax.Array) -> jax.Array:
        """`B x = -x + U (Vᵀ x)` for x `[B, D]`."""
        return self._low_rank(self.left, self.right, x)

    def apply_transposed(self, x: jax.Array) -> jax.Array:
        """`Bᵀ x = -x + V (Uᵀ x)`."""
        return self._low_rank(self.right, self.left, x)

    def transposed(self) -> "InverseJacobian":
        """`Bᵀ`."""
        return InverseJacobian(self.right, self.left, self.filled)

    def _low_rank(self, out: jax.Array, into: jax.Array, x: jax.Array) -> jax.Array:
        weights = jnp.where(self.filled, columns.inner_products(into, x), 0)
        return columns.combine(weights, out) - x


class BroydenState(NamedTuple):
    """What is remembered between evaluations; vectors are packed, `[B, D]`, at least float32.

    Attributes:
        inverse: the estimate B.
        base: the last accepted point.
        residual: g = f(z) - z there.
        direction: `-B g` there.
        length: `[B]`, length of the step that was taken from there.
        size: `[B]`, `‖g‖` there; infinite before the first point.
        lowest: `[B]`, lowest `‖g‖` so far.
        slot: int32, column to write next.
    """

    inverse: InverseJacobian
    base: jax.Array
    residual: jax.Array
    direction: jax.Array
    length: jax.Array
    size: jax.Array
    lowest: jax.Array
    slot: jax.Array


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Broyden:
    """Good Broyden on `g(z) = f(z) - z = 0`, each sample with an inverse Jacobian of its own.

    From B_0 = -I (so that the first step is Picard's), with Δz and Δg the last changes,

        v = Bᵀ Δz,   u = (Δz - B Δg) / ⟨v, Δg⟩,   B <- B + u vᵀ   (then B Δg = Δz)
        z <- z - s B g

    which converges superlinearly near a solution and finds equilibria at which the spectral radius
    of ∂f/∂z exceeds 1. One evaluation and four low-rank products an iteration.

    Guards, each per sample: an update whose denominator vanishes is left out; a residual far above
    the best one, or a step that is not finite, empties the memory. Nothing raises.

    Memory: 2 L states in float32 or wider, L = `memory`.

    Attributes:
        memory: L, the most rank-one terms kept. When they are used up, all go and the newest pair
            alone is applied to -I: the operator is at any time exactly that of the recursion on
            the pairs retained. None keeps all, `max_iter` of them.
        step_size: s > 0, the paper's α.
        line_search: halve the step until the residual decreases (Armijo, at most five times), each
            sample by itself. A trial costs an evaluation like any other and counts as one.
        tol: bound on the relative residual.
        max_iter: most evaluations of f.
        atol: bound on the absolute residual; 0 leaves it out.
        trace: keep the residual of every evaluation.
        bound: bound on what counts of B: a step is at most `bound · ‖g‖` long, along the same
            direction. If f contracts by a factor L < 1, a solution is at most `‖g‖ / (1 - L)` away,
            so that `1 / (1 - L)` shortens no step that is right. It helps where the estimate goes
            astray: far from a solution, and where the slope of g nearly vanishes. None leaves it
            out.

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it.
    """

    memory: int | None = None
    step_size: Real = 1.0
    line_search: bool = False
    tol: Real = 1e-4
    max_iter: int = 50
    atol: Real = 0.0
    trace: bool = False
    bound: Real | None = None

    scale_free: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.memory is not None:
            checks.check_count(self, "memory")
        checks.check_number(self, "step_size", above=0.0)
        if self.bound is not None:
            checks.check_number(self, "bound", above=0.0)
        checks.check_flag(self, "line_search")
        checks.check_stopping(self)

    def init(self, z: PyTree, fz: PyTree, inverse: InverseJacobian | None = None) -> BroydenState:
        """A base from which nothing has been learned yet, and B = `inverse`, -I if left out."""
        zeros = tree.zeros_per_sample(z)
        # The first evaluation brings no pair, the others one each.
        slots = max(1, self.max_iter - 1) if self.memory is None else self.memory
        start = tree.pack(z)
        vacant = zeros[:, None] + jnp.zeros((1, slots), zeros.dtype)
        room = InverseJacobian(columns.empty(start, slots), columns.empty(start, slots), vacant > 0)
        last = slots - 1
        if inverse is not None:  # its terms stay, new ones come behind them
            room = InverseJacobian(
                *(jnp.concatenate(pair, axis=1) for pair in zip(inverse, room, strict=True))
            )
            last = room.filled.shape[1] - slots - 1
        return BroydenState(
            inverse=room,
            base=start,
            residual=0 * start,
            direction=0 * start,
            length=zeros + jnp.asarray(self.step_size, zeros.dtype),
            size=zeros + jnp.inf,
            lowest=zeros + jnp.inf,
            slot=zeros.sum().astype(jnp.int32) + last,
        )

    def step(self, z: PyTree, fz: PyTree, state: BroydenState) -> tuple[PyTree, BroydenState]:
        """Learns from the step that led to `z`, and takes the next one."""
        point = tree.pack(z)
        g = tree.pack(fz) - point
        size = tree.norm(lax.stop_gradient(g))
        rejected = self._rejected(size, state)

        # Nothing has been learned at the first point, whose scale `init` did not know.
        state = state._replace(base=tree.where(jnp.isinf(state.size), point, state.base))
        # B <- B + u vᵀ from the change of z and g since the last accepted point.
        change, g_change = point - state.base, g - state.residual
        # A sample that has stopped rests, and keeps the estimate that its gradient may start from.
        resting = tree.norm(lax.stop_gradient(change)) == 0
        emptied = ~resting & ((state.slot == 0) | (size > _BLOW_UP * state.lowest))
        filled = state.inverse.filled & ~emptied[:, None]
        inverse = state.inverse._replace(filled=filled)
        bg = inverse.apply(g)
        if self.line_search:
            b_change = inverse.apply(g_change)
        else:  # B applied to the old residual is known, unless B has just been emptied
            b_change = tree.where(emptied, -g_change, bg + state.direction)
        v = inverse.apply_transposed(change)
        u, v, learned = _rank_one(change, b_change, v, g_change, ~rejected)
        direction = -(bg + tree.scale(tree.dot(v, g), u))
        # A step to infinity is not taken: start over from here with B = -I.
        sound = jnp.isfinite(tree.norm(lax.stop_gradient(direction)))
        # It also makes the columns to be written depend on all that was read from them. Where they
        # do not, XLA copies one of the factors, twice an iteration, to read it after the write.
        u, v = (tree.where(sound, column, jnp.zeros_like(column)) for column in (u, v))
        slot = state.slot
        u = tree.where(resting, columns.read(inverse.left, slot), u)
        v = tree.where(resting, columns.read(inverse.right, slot), v)
        learned |= resting & lax.dynamic_index_in_dim(filled, slot, 1, keepdims=False)
        inverse = InverseJacobian(
            columns.store(inverse.left, u, slot),
            columns.store(inverse.right, v, slot),
            lax.dynamic_update_index_in_dim(filled, learned, slot, 1),
        )
        direction = tree.where(sound, direction, g)
        inverse = inverse._replace(filled=inverse.filled & sound[:, None])

        # The next step -s B g from here, or half of the last one from the old base.
        base = tree.where(rejected, state.base, point)
        direction = tree.where(rejected, state.direction, direction)
        length = jnp.where(rejected, state.length / 2, self._full_length(direction, size))
        proposal = tree.unpack(base + tree.scale(length, direction), z)
        return proposal, BroydenState(
            inverse=inverse,
            base=base,
            residual=tree.where(rejected, state.residual, g),
            direction=direction,
            length=length,
            size=jnp.where(rejected, state.size, size),
            lowest=jnp.minimum(state.lowest, size),
            slot=(slot + 1) % filled.shape[1],
        )

    def _full_length(self, direction: jax.Array, size: jax.Array) -> jax.Array:
        """`[B]`: s, or less where `s ‖B g‖` is more than the bound times `‖g‖`."""
        full = jnp.full_like(size, jnp.asarray(self.step_size, size.dtype))
        if self.bound is None:
            return full
        most = checks.in_dtype(self.bound, size.dtype) * size
        step = tree.norm(lax.stop_gradient(direction))
        return jnp.minimum(full, jnp.where(step > 0, most / jnp.where(step > 0, step, 1), full))

    def _rejected(self, size: jax.Array, state: BroydenState) -> jax.Array:
        """`[B]`: the step was too long and is to be halved."""
        if not self.line_search:
            return size < 0
        acceptable = size <= (1 - _DECREASE * state.length) * state.size
        return ~acceptable & (state.length > _SHORTEST * self.step_size)


def _rank_one(
    change: jax.Array, b_change: jax.Array, v: jax.Array, g_change: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`u = (Δz - B Δg) / ⟨v, Δg⟩` and v, both zero where `[B]` the update is to be left out.

    v and Δg are brought to unit length first, which leaves u vᵀ as it is. Their lengths cancel, so
    they need no derivative.
    """
    lengths = [tree.norm(lax.stop_gradient(a)) for a in (v, g_change)]
    usable = wanted & (lengths[0] > 0) & (lengths[1] > 0)
    per_v, per_g = (jnp.where(usable, 1 / jnp.where(usable, n, 1), 0) for n in lengths)
    v, error = tree.scale(per_v, v), tree.scale(per_g, change - b_change)
    denominator = tree.dot(v, tree.scale(per_g, g_change))
    smallest = jnp.finfo(denominator.dtype).eps
    learned = usable & (jnp.abs(lax.stop_gradient(denominator)) > smallest)
    factor = jnp.where(learned, 1 / jnp.where(learned, denominator, 1), 0)
    nothing = jnp.zeros_like(v)
    u = tree.where(learned, tree.scale(factor, error), nothing)
    return u, tree.where(learned, v, nothing), learned
