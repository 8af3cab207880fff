"""A solve for each shard of the batch: one loop a device, and no device waits for another.

Plain `jit` over a sharded batch has one loop for all of it, and each trip asks all devices whether
any sample is left. Here the solve runs in `jax.shard_map` over the batch's mesh axis instead. What
all shards share goes in replicated, and is made to vary over the axis at once, so that its
cotangent is summed over the shards at one place, behind all loops.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import _compat, checks
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


def as_axes(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The axes that a field names: one, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def check_axes(owner: object, name: str) -> None:
    """Raises a TypeError unless field `name` of `owner` names a mesh axis, or several or none."""
    value = getattr(owner, name)
    many = isinstance(value, tuple) and len(value) == len(set(value)) > 0
    if value is None or isinstance(value, str) or (many and all(isinstance(v, str) for v in value)):
        return
    raise TypeError(
        f"{type(owner).__name__}.{name} must be the name of a mesh axis or a tuple of different "
        f"names, got {value!r}"
    )


def find_mesh(
    axes: tuple[str, ...], x: PyTree, z0: PyTree, batched: bool
) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh over whose axes `axes` the solve is to be split.

    It is the mesh of the context (`jax.set_mesh`) or that of the sharding of a leaf of x or z0.

    Returns:
        The mesh, and those of the axes over which this is not inside a `shard_map` already. None
        and no axes where there is nothing to split.

    Raises:
        ValueError: there is no such axis, the batch cannot be split over them, or another axis of
            the mesh is of JAX's explicit type.
    """
    context = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis not in context.manual_axes)
    if not axes:
        return None, ()
    name = f"Execution.shard_axis={_shown(axes)}"
    if not batched:
        raise ValueError(f"{name} splits a batch; it does not go with batched=False")
    mesh = _mesh_with(axes, (x, z0), name)
    explicit = [other for other in _explicit_axes(mesh) if other not in axes]
    if explicit:
        raise ValueError(
            f"{name} needs all other axes of its mesh to be of type AxisType.Auto, but {explicit} "
            "are AxisType.Explicit; make the mesh with axis_types=..."
        )
    batch, shards = jax.tree.leaves(z0)[0].shape[0], math.prod(mesh.shape[axis] for axis in axes)
    if batch % shards:
        raise ValueError(
            f"{name} has {shards} shards, which must divide the batch, got a batch of {batch}"
        )
    check_batch(f"{name} splits axis 0 of x", x, batch)
    _warn_of_other_axes(axes, mesh, x)
    return mesh, axes


def _shown(axes: tuple[str, ...]) -> str:
    return repr(axes if len(axes) > 1 else axes[0])


def _warn_of_other_axes(axes: tuple[str, ...], mesh: AbstractMesh, x: PyTree) -> None:
    """Warns if the batch turns out to be sharded over axes of the mesh that are not named."""
    others = {axis for axis, size in mesh.shape.items() if size > 1}
    others -= {*axes, *_compat.manual_axes()}
    leaves = jax.tree.leaves(x)
    if not others or not leaves:
        return

    def look(sharding: Any) -> None:
        spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
        first = spec[0] if len(spec) else None
        found = others.intersection(as_axes(first))
        if found:
            warnings.warn(
                f"Execution.shard_axis={_shown(axes)}, but the batch is also sharded over "
                f"{sorted(found)}: devices along it solve the same samples twice. Write "
                f"shard_axis={(*axes, *sorted(found))}",
                stacklevel=2,
            )

    jax.debug.inspect_array_sharding(leaves[0], callback=look)


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


def gather_params(params: PyTree, axis: str | tuple[str, ...]) -> PyTree:
    """The parameters, whole along a mesh axis over which they are sharded to save memory (FSDP).

    Where batch and parameters are sharded over the same axis, XLA gathers the parameters at each
    use: in each trip of a solve. Gathered before, they are sent once a step. The cotangents of what
    is returned come back sharded as `params` are. A sharding over other axes stays, as tensor
    parallelism needs it. It costs the memory of the whole parameters between the forward and the
    backward pass, which the layer needs anyway for those of its cell.

    Args:
        params: a pytree; what is no array stays as it is.
        axis: the name of the mesh axis, or a tuple of names.

    Returns:
        The same values, replicated over the axis.

    Raises:
        ValueError: no mesh with this axis is known here: call under `jax.set_mesh(mesh)`.

    Example: the loss of a training step whose state is sharded over `fsdp`.

        def loss(params, batch):
            params = gather_params(params, "fsdp")
            return jnp.mean((deq_fixed_point(f, params, batch.x) - batch.y) ** 2)

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models", 2020.
    """
    axes = as_axes(axis)
    context = jax.sharding.get_abstract_mesh()
    leaves, structure = jax.tree.flatten(params)
    arrays = [leaf for leaf in leaves if checks.is_array(leaf)]
    mesh = _mesh_with(axes, arrays, f"gather_params(..., {_shown(axes)})")
    if set(axes).intersection(_explicit_axes(mesh)):
        whole = [_reshard_without(leaf, axes) for leaf in arrays]
    else:
        whole = jax.shard_map(
            lambda *arrays: arrays,
            mesh=None if set(axes) <= set(context.axis_names) else mesh,
            in_specs=P(),
            out_specs=P(),
            axis_names=set(axes),
        )(*arrays)
    given = iter(whole)
    leaves = [next(given) if checks.is_array(leaf) else leaf for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def _reshard_without(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """An array that is whole along these explicit axes and sharded as before along all others."""
    spec = jax.typeof(leaf).sharding.spec
    kept = (tuple(axis for axis in as_axes(part) if axis not in axes) for part in spec)
    return jax.sharding.reshard(leaf, P(*(part or None for part in kept)))


def _mesh_with(axes: tuple[str, ...], arrays: PyTree, name: str) -> AbstractMesh:
    """The mesh of the context, or that of the sharding of an array, that has these axes."""
    context = jax.sharding.get_abstract_mesh()
    meshes = [context, *(jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays))]
    mesh = next((mesh for mesh in meshes if set(axes) <= set(mesh.axis_names)), None)
    if mesh is None:
        raise ValueError(
            f"{name} is no axis of a mesh that is known here: the mesh of the context has the axes "
            f"{context.axis_names}, and no argument is sharded over it; call under "
            "jax.set_mesh(mesh)"
        )
    return mesh


def solve_shards(
    solve: Callable[..., Solution], arguments: Any, axes: tuple[str, ...], mesh: AbstractMesh
) -> Solution:
    """`solve(*arguments)` for each shard of the batch by itself.

    Args:
        solve: solves for a batch, given f, params, x, z0, solver and policies, and the probe;
            hashable.
        arguments: these.
        axes: the mesh axes.
        mesh: their mesh, from `find_mesh`.

    Returns:
        The solution. `evaluations` and `products`, in the statistics and in the probe, are those
        of the shard with the most.
    """
    if arguments[0].is_certain:
        return _over_shards_compiled(solve, axes, mesh, *arguments)
    # Nothing is kept of an f that holds arrays.
    return jax.jit(functools.partial(_over_shards, solve, axes, mesh))(*arguments)


def _over_shards(
    solve: Callable[..., Solution], axes: tuple[str, ...], mesh: AbstractMesh,
    f: PyTree, params: PyTree, x: PyTree, z0: PyTree, held: PyTree, probe: BackwardProbe | None,
) -> Solution:  # fmt: skip
    across = P(axes)

    def local(shared: PyTree, x: PyTree, z0: PyTree, probe: BackwardProbe | None) -> Solution:
        if probe is not None:
            probe = probe._replace(evaluations=probe.evaluations[0])
        f, params, held = shared
        solution = solve(f, params, x, z0, held, probe)
        return _with_counts(solution, lambda count: count[None])

    of_stats: Any = SolveStats
    stats = of_stats(across, across, across, across, P(None, axes), across, across)
    samples: Any = across
    mapped = _mapped(local, axes, mesh, Solution(across, stats, samples, aux=across))
    if probe is not None:
        shards = math.prod(mesh.shape[axis] for axis in axes)
        probe = probe._replace(evaluations=_one_each(probe.evaluations, shards))
    return _with_counts(mapped((f, params, held), x, z0, probe), jnp.max)


_over_shards_compiled = jax.jit(_over_shards, static_argnums=(0, 1, 2))


def _mapped(
    local: Callable[..., PyTree], axes: tuple[str, ...], mesh: AbstractMesh, out_specs: PyTree
) -> Callable[..., PyTree]:
    """`local(params, *batched)` on each shard; only `axes` are manual, all others automatic."""

    def varying(params: PyTree, *batched: PyTree) -> PyTree:
        return local(jax.tree.map(lambda leaf: _vary(leaf, axes), params), *batched)

    def mapped(params: PyTree, *batched: PyTree) -> PyTree:
        if set(axes).intersection(_explicit_axes(mesh)):  # JAX wants them as the specs say already
            params = jax.sharding.reshard(params, NamedSharding(mesh, P()))
            batched = jax.sharding.reshard(batched, NamedSharding(mesh, P(axes)))
        context = jax.sharding.get_abstract_mesh()
        function = jax.shard_map(
            varying,
            mesh=None if set(axes) <= set(context.axis_names) else mesh,
            in_specs=(P(), *[P(axes)] * len(batched)),
            out_specs=out_specs,
            axis_names=set(axes),
        )
        return function(params, *batched)

    return mapped


def _vary(leaf: Any, axes: tuple[str, ...]) -> Any:
    """What a shard makes its own: arrays whose cotangents are to be summed, and random keys."""
    kind = jnp.result_type(leaf)
    own = jnp.issubdtype(kind, jnp.inexact) or jnp.issubdtype(kind, jax.dtypes.prng_key)
    return lax.pcast(leaf, axes, to="varying") if own else leaf


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
