"""A solve for each shard of the batch: one loop a device, and no device waits for another.

Plain `jit` over a sharded batch has one loop for all of it, and each trip asks all devices whether
any sample is left. Here the solve runs in `jax.shard_map` over the batch's mesh axis instead. What
all shards share goes in replicated, and is made to vary over the axis at once, so that its
cotangent is summed over the shards at one place, behind all loops.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import checks
from deq_jax.closure import Closure
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any


def solution_specs(
    f: Closure, z0: PyTree, shapes: Solution, *, batched: bool, trace: bool, products: bool
) -> Solution:
    """Partition specs of a solution on a mesh with explicit axes: the batch is sharded as it was.

    Args:
        f: the equation.
        z0: the start.
        shapes: of the parts that f and its user make: shapes of `aux` and `stats.fold`.
        batched: axis 0 is the batch.
        trace: the solver keeps a trace.
        products: the solver counts products.
    """
    own = [a for a, mine in zip(f.arrays, f.program.per_sample, strict=True) if mine]
    specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves((z0, own))]
    batch = next((spec[0] for spec in specs if batched and len(spec) and spec[0]), None)
    per_sample = P(batch) if batched else P()
    size = jax.tree.leaves(z0)[0].shape[:1]

    def of_state(start: jax.Array) -> P:
        spec = jax.typeof(start).sharding.spec
        return P(batch, *spec[1:]) if batched else spec

    state = jax.tree.map(of_state, z0)
    of_stats: Any = SolveStats
    stats = of_stats(
        per_sample,
        per_sample,
        per_sample,
        P(),
        P(None, *per_sample) if trace else None,
        P() if products else None,
        per_sample if f.takes_step else None,
        jax.tree.map(lambda _: P(), shapes.stats.fold),
    )
    aux = jax.tree.map(lambda leaf: per_sample if leaf.shape[:1] == size else P(), shapes.aux)
    return Solution(state, stats, (state,) * len(shapes.samples), aux=aux)


def check_axis(owner: object, name: str) -> None:
    """Raises a TypeError unless field `name` of `owner` is the name of an axis."""
    value = getattr(owner, name)
    if not isinstance(value, str):
        raise TypeError(
            f"{type(owner).__name__}.{name} must be the name of a mesh axis, got {value!r}"
        )


def find_mesh(axis: str | None, x: PyTree, z0: PyTree, batched: bool) -> AbstractMesh | None:
    """The mesh over whose axis `axis` the solve is to be split.

    It is the mesh of the context (`jax.set_mesh`) or that of the sharding of a leaf of x or z0.

    Returns:
        The mesh; None where there is nothing to split: no axis was named, or this is inside a
        `shard_map` over it already.

    Raises:
        ValueError: there is no such axis, the batch cannot be split over it, or another axis of
            the mesh is of JAX's explicit type.
    """
    if axis is None:
        return None
    name = f"Execution.shard_axis={axis!r}"
    context = jax.sharding.get_abstract_mesh()
    if axis in context.manual_axes:
        return None
    if not batched:
        raise ValueError(f"{name} splits a batch; it does not go with batched=False")
    meshes = [context, *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves((x, z0)))]
    mesh = next((mesh for mesh in meshes if axis in mesh.axis_names), None)
    if mesh is None:
        raise ValueError(
            f"{name} is no axis of a mesh that is known here: the mesh of the context has the axes "
            f"{context.axis_names}, and no leaf of x or z0 is sharded over it; call under "
            "jax.set_mesh(mesh)"
        )
    explicit = [other for other in _explicit_axes(mesh) if other != axis]
    if explicit:
        raise ValueError(
            f"{name} needs all other axes of its mesh to be of type AxisType.Auto, but {explicit} "
            "are AxisType.Explicit; make the mesh with axis_types=..."
        )
    batch, shards = jax.tree.leaves(z0)[0].shape[0], mesh.shape[axis]
    if batch % shards:
        raise ValueError(
            f"{name} has {shards} shards, which must divide the batch, got a batch of {batch}"
        )
    check_batch(f"{name} splits axis 0 of x", x, batch)
    return mesh


def _explicit_axes(mesh: AbstractMesh) -> list[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]


def check_batch(why: str, x: PyTree, batch: int) -> None:
    """Raises a ValueError that begins with `why` unless axis 0 of all leaves of x is the batch."""
    for name, leaf in checks.named_leaves(x):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"{why}, so every leaf of x must have the batch on axis 0: leaf {name}: got shape "
                f"{jnp.shape(leaf)}, expected ({batch}, ...); what is the same for all samples "
                "belongs in params"
            )


def solve_shards(
    solve: Callable[..., Solution], arguments: Any, axis: str, mesh: AbstractMesh
) -> Solution:
    """`solve(*arguments)` for each shard of the batch by itself.

    Args:
        solve: solves for a batch, given f, params, x, z0, solver and policies, and the probe;
            hashable.
        arguments: these.
        axis: the mesh axis.
        mesh: its mesh, from `find_mesh`.

    Returns:
        The solution. `evaluations` and `products`, in the statistics and in the probe, are those
        of the shard with the most.
    """
    if arguments[0].is_certain:
        return _over_shards_compiled(solve, axis, mesh, *arguments)
    # Nothing is kept of an f that holds arrays.
    return jax.jit(functools.partial(_over_shards, solve, axis, mesh))(*arguments)


def _over_shards(
    solve: Callable[..., Solution], axis: str, mesh: AbstractMesh,
    f: PyTree, params: PyTree, x: PyTree, z0: PyTree, held: PyTree, probe: BackwardProbe | None,
) -> Solution:  # fmt: skip
    across = P(axis)

    def local(shared: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Solution:
        if probe is not None:
            probe = probe._replace(evaluations=probe.evaluations[0])
        f, params, held = jax.tree.map(lambda leaf: _own_key(leaf, axis), shared)
        solution = solve(f, params, x, z0, held, probe)
        return _with_counts(solution, lambda count: count[None])

    of_stats: Any = SolveStats
    stats = of_stats(across, across, across, across, P(None, axis), across, across)
    samples: Any = across
    mapped = _mapped(local, axis, mesh, Solution(across, stats, samples, aux=across))
    if probe is not None:
        probe = probe._replace(evaluations=_one_each(probe.evaluations, mesh.shape[axis]))
    return _with_counts(mapped((f, params, held), x, z0, probe), jnp.max)


_over_shards_compiled = jax.jit(_over_shards, static_argnums=(0, 1, 2))


def _mapped(
    local: Callable[..., PyTree], axis: str, mesh: AbstractMesh, out_specs: PyTree
) -> Callable[..., PyTree]:
    """`local(params, *batched)` on each shard; only `axis` is manual, all others stay automatic."""

    def varying(params: PyTree, *batched: PyTree) -> PyTree:
        return local(jax.tree.map(lambda leaf: _vary(leaf, axis), params), *batched)

    def mapped(params: PyTree, *batched: PyTree) -> PyTree:
        if axis in _explicit_axes(mesh):  # JAX wants them to be as the specs say already
            params = jax.sharding.reshard(params, NamedSharding(mesh, P()))
            batched = jax.sharding.reshard(batched, NamedSharding(mesh, P(axis)))
        context = jax.sharding.get_abstract_mesh()
        function = jax.shard_map(
            varying,
            mesh=None if axis in context.axis_names else mesh,
            in_specs=(P(), *[P(axis)] * len(batched)),
            out_specs=out_specs,
            axis_names={axis},
        )
        return function(params, *batched)

    return mapped


def _vary(leaf: Any, axis: str) -> Any:
    """Where nothing is differentiated there is no cotangent to be summed."""
    inexact = jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    return lax.pcast(leaf, axis, to="varying") if inexact else leaf


def _own_key(leaf: Any, axis: str) -> Any:
    """A PRNG key of each shard's own, so that two shards draw different dropout masks."""
    if not jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key):
        return leaf
    fold_in = jax.random.fold_in
    for _ in range(leaf.ndim):
        fold_in = jax.vmap(fold_in, (0, None))
    return fold_in(leaf, lax.axis_index(axis))


def _with_counts(solution: Solution, change: Callable[[jax.Array], jax.Array]) -> Solution:
    stats = solution.stats
    products = None if stats.products is None else change(stats.products)
    stats = stats._replace(evaluations=change(stats.evaluations), products=products)
    return dataclasses.replace(solution, stats=stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _one_each(count: jax.Array, shards: int) -> jax.Array:
    """A count for each shard, `[shards]`, whose cotangent is the largest of theirs, not the sum."""
    return jnp.broadcast_to(count, (shards,))


_one_each.defvjp(
    lambda count, shards: (_one_each(count, shards), None),
    lambda shards, _, counts: (counts.max(),),
)
