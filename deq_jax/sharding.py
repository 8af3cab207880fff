"""A solve for each shard of the batch: one loop a device, and no device waits for another.

Plain `jit` over a sharded batch has one loop for all of it, and each trip asks all devices whether
any sample is left. Here the solve runs in `jax.shard_map` over the batch's mesh axis instead. What
all shards share goes in replicated, and is made to vary over the axis at once, so that its
cotangent is summed over the shards at one place, behind all loops.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax.solvers.loop import Run
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any
Solve = Callable[[PyTree, PyTree, PyTree, BackwardProbe | None], Run]


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
    _check_batch(name, x, z0, mesh.shape[axis])
    return mesh


def _explicit_axes(mesh: AbstractMesh) -> list[str]:
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [name for name, kind in kinds if kind == AxisType.Explicit]


def _check_batch(name: str, x: PyTree, z0: PyTree, shards: int) -> None:
    batch = jax.tree.leaves(z0)[0].shape[0]
    if batch % shards:
        raise ValueError(
            f"{name} has {shards} shards, which must divide the batch, got a batch of {batch}"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(x):
        if jnp.shape(leaf)[:1] != (batch,):
            raise ValueError(
                f"{name} splits axis 0 of every leaf of x, which must be the batch of {batch}: "
                f"leaf {jax.tree_util.keystr(path) or '(the whole of x)'} has shape "
                f"{jnp.shape(leaf)}; what all samples share belongs into params"
            )


def over_shards(solve: Solve, axis: str, mesh: AbstractMesh) -> Solve:
    """`solve(params, x, z0, probe)`, for each shard of the batch by itself.

    Args:
        solve: solves for a batch.
        axis: the mesh axis.
        mesh: its mesh, from `find_mesh`.

    Returns:
        A function with the same arguments and results for the whole batch. `evaluations` and
        `products`, in the statistics and in the probe, are those of the shard with the most.
    """
    across = P(axis)

    def local(params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Run:
        if probe is not None:
            probe = probe._replace(evaluations=probe.evaluations[0])
        run = solve(params, x, z0, probe)
        return run._replace(stats=_with_counts(run.stats, lambda count: count[None]))

    stats = SolveStats(across, across, across, across, P(None, axis), across)
    mapped = _mapped(local, axis, mesh, Run(across, stats, across, None))

    def whole(params: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Run:
        if probe is not None:
            probe = probe._replace(evaluations=_one_each(probe.evaluations, mesh.shape[axis]))
        run = mapped(params, x, z0, probe)
        return run._replace(stats=_with_counts(run.stats, jnp.max))

    return jax.jit(whole)


def captures(
    function: Callable[[PyTree, PyTree, PyTree], PyTree],
    axis: str,
    mesh: AbstractMesh,
    params: PyTree,
    x: PyTree,
    z0: PyTree,
) -> bool:
    """Whether `function(params, x, z0)` of a shard uses traced arrays besides its arguments."""
    mapped = _mapped(function, axis, mesh, P(axis))
    constants = jax.make_jaxpr(mapped)(params, x, z0).consts
    return any(isinstance(constant, jax.core.Tracer) for constant in constants)


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


def _with_counts(stats: SolveStats, change: Callable[[jax.Array], jax.Array]) -> SolveStats:
    products = None if stats.products is None else change(stats.products)
    return stats._replace(evaluations=change(stats.evaluations), products=products)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _one_each(count: jax.Array, shards: int) -> jax.Array:
    """A count for each shard, `[shards]`, whose cotangent is the largest of theirs, not the sum."""
    return jnp.broadcast_to(count, (shards,))


_one_each.defvjp(
    lambda count, shards: (_one_each(count, shards), None),
    lambda shards, _, counts: (counts.max(),),
)
