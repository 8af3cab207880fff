"""Several starts for one equation: the solution that is found best, or most often."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deq_jax import checks, sharding, tree
from deq_jax.closure import drop_batch_axis
from deq_jax.execution import Execution
from deq_jax.fixed_point import deq_fixed_point, solve_fixed_point
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy, check_policy, differentiates_solver
from deq_jax.solve import Solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.stats import SolveStats

PyTree = Any


class MultiStart(NamedTuple):
    """The solution of `multi_start`. With `batched=False` the axis `[B]` is absent.

    Attributes:
        value: the chosen solution, leaves `[B, ...]`, differentiable in params and x.
        stats: its report. `iterations` counts from the start that was chosen; `evaluations` is how
            often f was evaluated, first on all S · B samples and in the end on B.
        winner: int32 `[B]`, the number of the start that was chosen.
        residuals: `[S, B]`, the residual that each start reached; infinite where f was not finite.
        votes: int32 `[S, B]`, how many starts converged to the solution of this one, itself
            included; 0 where it did not converge.
    """

    value: Any
    stats: SolveStats
    winner: jax.Array
    residuals: jax.Array
    votes: jax.Array


def multi_start(
    f: Callable[[Any, Any, Any], Any],
    params: PyTree,
    x: PyTree,
    starts: PyTree,
    *,
    select: Literal["residual", "votes"] = "residual",
    same: float = 1e-2,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
    batched: bool = True,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> MultiStart:
    """Solves `z = f(params, z, x)` from S starts, and returns one solution for each sample.

    An equation may have several solutions, and a solver may miss all of them from a bad start. All
    starts are samples of one larger batch of S · B, each with its own stop, so that the search is
    one loop. Of the solutions of a sample one is chosen:

    - `select="residual"`: that with the lowest residual.
    - `select="votes"`: that to which most starts converged, the lowest residual among equals. Two
      starts converged to the same solution if `‖z_i - z_j‖ <= same · max(‖z_i‖, ‖z_j‖)`.

    The chosen solutions are handed to `deq_fixed_point` as starts, which gives them their
    derivative. It evaluates f once more, on B samples, and goes on with those that had not
    converged. No gradient flows through the choice.

    Args:
        f: as for `deq_fixed_point`.
        params: likewise.
        x: likewise; with `batched=True` axis 0 of each leaf is the batch, and is repeated.
        starts: leaves `[S, B, ...]`; `[S, ...]` with `batched=False`.
        select: how to choose.
        same: the relative distance up to which solutions count as the same one.
        solver: as for `deq_fixed_point`.
        gradient: likewise; `Unrolled()` and `Reversed()` do not go with it, because the solution
            was found before.
        batched: as for `deq_fixed_point`. Where f mixes samples, use False: in a batch of S · B it
            would mix the starts too.
        execution: as for `deq_fixed_point`.

    Returns:
        `MultiStart`: `value`, `stats`, `winner`, `residuals` and `votes`.

    Raises:
        ValueError: `starts` has no leaves or leaves that disagree about S and B; `same` is
            negative; `select` is neither of the two.
        TypeError: `gradient` differentiates the solver. Else as for `deq_fixed_point`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deq_jax import multi_start
        >>> x = jnp.zeros((4, 8))
        >>> starts = jax.random.normal(jax.random.key(0), (5, 4, 8))
        >>> found = multi_start(lambda a, z, x: jnp.tanh(a * z) + x, 2.0, x, starts)
        >>> found.value.shape, found.winner.shape
        ((4, 8), (4,))
    """
    checks.check_bool("batched", batched)
    check_policy("gradient", gradient)
    if differentiates_solver(gradient):
        raise TypeError(
            f"multi_start chooses a solution that was found before, so gradient={gradient!r}, "
            "which differentiates the search itself, has nothing to differentiate; take Implicit()"
        )
    if select not in ("residual", "votes"):
        raise ValueError(f"select must be 'residual' or 'votes', got {select!r}")
    if not same >= 0:
        raise ValueError(f"same must be at least 0, got {same!r}")
    count, batch = _counts(starts, batched)
    options: dict[str, Any] = {"solver": solver, "execution": execution}

    if batched:
        sharding.check_batch("multi_start repeats x for each start", x, batch)
        many = jax.tree.map(lambda leaf: jnp.reshape(leaf, (-1, *jnp.shape(leaf)[2:])), starts)
        repeated = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * count), x)
        found, stats = solve_fixed_point(f, params, repeated, many, **options)
        found = jax.tree.map(lambda leaf: leaf.reshape(count, batch, *leaf.shape[1:]), found)
        per_start = stats
    else:

        def search(z0: PyTree) -> tuple[PyTree, SolveStats]:
            return tuple(solve_fixed_point(f, params, x, z0, batched=False, **options))

        found, per_start = jax.vmap(search)(starts)
        stats = per_start._replace(evaluations=per_start.evaluations.max())
        if stats.products is not None:
            stats = stats._replace(products=stats.products.max())
        found = jax.tree.map(lambda leaf: leaf[:, None], found)
    residuals, iterations, converged = (
        a.reshape(count, batch)
        for a in (per_start.residual, per_start.iterations, per_start.converged)
    )

    votes = _votes(found, converged, same)
    candidates = votes == votes.max(0) if select == "votes" else votes >= 0
    winner = jnp.argmin(jnp.where(candidates, residuals, jnp.inf), axis=0).astype(jnp.int32)
    places = winner, jnp.arange(batch)
    best = jax.tree.map(lambda leaf: leaf[places], found)
    best = best if batched else drop_batch_axis(best)

    value, final = deq_fixed_point(
        f, params, x, best, gradient=gradient, batched=batched, return_stats=True, **options
    )
    before = iterations[places]
    final = final._replace(
        iterations=final.iterations + (before if batched else before[0]),
        evaluations=final.evaluations + stats.evaluations,
        products=None if final.products is None else final.products + stats.products,
    )
    if batched:
        return MultiStart(value, final, winner, residuals, votes)
    return MultiStart(value, final, winner[0], residuals[:, 0], votes[:, 0])


def _counts(starts: PyTree, batched: bool) -> tuple[int, int]:
    """S and B; B is 1 with `batched=False`."""
    leading = {name: np.shape(leaf)[: 1 + batched] for name, leaf in checks.named_leaves(starts)}
    expected = "[S, B, ...]" if batched else "[S, ...]"
    if not leading:
        raise ValueError(f"starts must have leaves {expected}, got {starts!r}")
    first = next(iter(leading.values()))
    short = len(first) < 1 + batched or 0 in first
    if short or any(shape != first for shape in leading.values()):
        raise ValueError(
            f"every leaf of starts must have the shape {expected} with the same axes in front, "
            f"none of them 0; got {leading}"
        )
    return (first[0], first[1]) if batched else (first[0], 1)


def _votes(found: PyTree, converged: jax.Array, same: float) -> jax.Array:
    """`[S, B]`: to how many converged solutions each converged solution is close, itself included.

    Args:
        found: leaves `[S, B, ...]`.
        converged: `[S, B]`.
        same: relative distance.
    """
    sizes = jax.vmap(tree.norm)(found)

    def of_one(one: tuple[PyTree, jax.Array]) -> jax.Array:
        mine, size = one
        distances = jax.vmap(lambda z: tree.norm(tree.subtract(z, mine)))(found)
        close = (distances <= same * jnp.maximum(sizes, size)) & converged
        return close.sum(0, dtype=jnp.int32)

    return jnp.where(converged, lax.map(of_one, (found, sizes)), 0)
