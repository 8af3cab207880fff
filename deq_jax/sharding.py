"""A solve for each shard of the batch: each shard has its own loop and waits for no other.

Plain `jit` over a sharded batch has one loop for all of it, and in each trip (a pass through the
loop) all devices agree whether any sample is unfinished. Here the solve runs in `jax.shard_map`
over the mesh axes of the batch instead. Arrays that all shards share enter it replicated, and are
made to vary over the axes before the solve, so that their cotangents are summed over the shards
once, after all loops.
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

from deq_jax import _compat, checks, draws, tree
from deq_jax.closure import Closure, Held, Static
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any


def solution_specs(
    f: Closure, z0: PyTree, shapes: Solution, *, batched: bool, trace: bool, products: bool
) -> Solution:
    """Partition specs of a solution on a mesh with explicit axes: the batch is sharded as in z0.

    Args:
        f: the equation.
        z0: the start.
        shapes: a solution of shapes, of which `samples`, `aux` and `stats.fold` are read.
        batched: whether axis 0 is the batch.
        trace: whether the solver keeps a trace.
        products: whether the solver counts products.
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
    """The mesh axes that an option names, as a tuple: one, several or none."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value


def check_axes(name: str, value: Any) -> None:
    """Raises a TypeError, about what is called `name`, unless it names mesh axes or is None."""
    many = isinstance(value, tuple) and len(value) == len(set(value)) > 0
    if value is None or isinstance(value, str) or (many and all(isinstance(v, str) for v in value)):
        return
    raise TypeError(
        f"{name} must be the name of a mesh axis or a tuple of different names, got {value!r}"
    )


def find_mesh(
    axes: tuple[str, ...],
    x: PyTree,
    z0: PyTree,
    batched: bool,
    option: str = "Execution.shard_axis",
) -> tuple[AbstractMesh | None, tuple[str, ...]]:
    """The mesh over whose axes `axes` the solve is split.

    This is the mesh of the context (`jax.set_mesh`), or that of the sharding of a leaf of x or z0.
    Messages call the axes `option`.

    Returns:
        The mesh, and those of `axes` that no surrounding `shard_map` has split already. If none are
        left, None and no axes.

    Raises:
        ValueError: no mesh has these axes, the batch cannot be split over them, or another axis of
            the mesh is of JAX's explicit type.
    """
    context = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in axes if axis not in context.manual_axes)
    if not axes:
        return None, ()
    name = f"{option}={draws.shown(axes)}"
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
            f"{name} has {shards} shards, which must divide the batch, got a batch of {batch}; "
            f"a batch of {batch + shards - batch % shards} would fit"
        )
    check_batch(f"{name} splits axis 0 of x", x, batch)
    _warn_of_other_axes(name, axes, mesh, x)
    return mesh, axes


def _warn_of_other_axes(name: str, axes: tuple[str, ...], mesh: AbstractMesh, x: PyTree) -> None:
    """Warns if XLA shards the batch over axes of the mesh that are not named."""
    others = {axis for axis, size in mesh.shape.items() if size > 1}
    others -= {*axes, *_compat.manual_axes()}
    if not others:
        return

    def look(sharding: Any) -> None:
        spec = sharding.spec if isinstance(sharding, NamedSharding) else P()
        first = spec[0] if len(spec) else None
        found = others.intersection(as_axes(first))
        if found:
            warnings.warn(
                f"{name}, but the batch is also sharded over {sorted(found)}: devices along it "
                f"solve the same samples twice. Write shard_axis={(*axes, *sorted(found))}",
                stacklevel=2,
            )

    for leaf in jax.tree.leaves(x):
        jax.debug.inspect_array_sharding(leaf, callback=look)


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
    """Gathers parameters that are sharded over a mesh axis to save memory (FSDP).

    If batch and parameters are sharded over the same axis, XLA exchanges weights or activations
    wherever the parameters are used: in each trip of a solve. If the parameters are gathered
    before, they are sent once a step. Their cotangents come back sharded as `params` are. A
    sharding over other axes, as for tensor parallelism, stays. The whole parameters stay in memory
    between the forward and the backward pass, as the layer needs those of its cell anyway.

    Args:
        params: a pytree. Leaves that are not arrays stay as they are.
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
    mesh = _mesh_with(axes, arrays, f"gather_params(..., {draws.shown(axes)})")
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
        solve: a hashable function that solves for a batch.
        arguments: its arguments: f, params, x, z0, the solver with its policies, and the probe.
        axes: the mesh axes.
        mesh: their mesh, from `find_mesh`.

    Returns:
        The solution. `evaluations` and `products`, in the statistics and in the probe, are those
        of the shard with the most.
    """
    if arguments[0].is_certain:
        return _over_shards_compiled(solve, axes, mesh, *arguments)
    # For an f whose contents cannot be compared, a compiled solve is not kept for the next call.
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
    mapped = map_shards(local, axes, mesh, Solution(across, stats, samples, aux=across))
    if probe is not None:
        shards = math.prod(mesh.shape[axis] for axis in axes)
        probe = probe._replace(evaluations=_one_each(probe.evaluations, shards))
    return _with_counts(mapped((f, params, held), x, z0, probe), jnp.max)


_over_shards_compiled = jax.jit(_over_shards, static_argnums=(0, 1, 2))


def map_shards(
    local: Callable[..., PyTree],
    axes: tuple[str, ...],
    mesh: AbstractMesh,
    out_specs: PyTree,
    varies: Callable[[Any], bool] | None = None,
) -> Callable[..., PyTree]:
    """`local(params, *batched)` on each shard. `axes` are manual, all other axes automatic.

    Leaves of `params` for whose dtype `varies` returns True are made to vary over `axes`.
    """
    vary = functools.partial(_vary, axes=axes, varies=varies or _is_own)

    def varying(params: PyTree, *batched: PyTree) -> PyTree:
        return local(jax.tree.map(vary, params), *batched)

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


def _vary(leaf: Any, axes: tuple[str, ...], varies: Callable[[Any], bool]) -> Any:
    return lax.pcast(leaf, axes, to="varying") if varies(jnp.result_type(leaf)) else leaf


def _is_own(kind: Any) -> bool:
    """Whether arrays of a dtype vary over the shards: random keys, and those with cotangents."""
    return jnp.issubdtype(kind, jnp.inexact) or _is_key(kind)


def _is_key(kind: Any) -> bool:
    return jnp.issubdtype(kind, jax.dtypes.prng_key)


def _with_counts(solution: Solution, change: Callable[[jax.Array], jax.Array]) -> Solution:
    stats = solution.stats
    products = None if stats.products is None else change(stats.products)
    stats = stats._replace(evaluations=change(stats.evaluations), products=products)
    return dataclasses.replace(solution, stats=stats)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _one_each(count: jax.Array, shards: int) -> jax.Array:
    """A count for each shard, `[shards]`; its cotangent is the largest of theirs, not the sum."""
    return jnp.broadcast_to(count, (shards,))


_one_each.defvjp(
    lambda count, shards: (_one_each(count, shards), None),
    lambda shards, _, counts: (counts.max(),),
)


def call_on_shards(
    function: Callable[..., PyTree],
    shared: PyTree,
    batched: tuple[PyTree, ...],
    axes: tuple[str, ...],
    mesh: AbstractMesh,
) -> PyTree:
    """Calls `function(shared, *batched)` on each shard of the batch and joins the results.

    Random numbers are those that the function draws for the whole batch. Leaves of its results are
    joined by these rules:

    - A leaf of `shared` that the function returns unchanged comes back as it is.
    - A leaf that grows with the batch has an axis of samples, and is sharded on this axis.
    - A leaf that collectives made the same on all shards comes back once.
    - Of other floating leaves the mean over the shards comes back.
    - Of other integers, booleans and random keys the largest comes back.

    Args:
        function: a function of pytrees of arrays.
        shared: a pytree that is the same on all shards.
        batched: pytrees with the batch on axis 0 of each leaf.
        axes: the mesh axes.
        mesh: their mesh, from `find_mesh`.
    """
    held = Held(function)
    if held.is_certain:
        leaves, static = _call_on_shards_compiled(axes, mesh, held, shared, batched)
    else:
        call = functools.partial(_call_on_shards, axes, mesh)
        leaves, static = jax.jit(call)(held, shared, batched)
    structure, places = static.value
    given, made = jax.tree.leaves(shared), iter(leaves)
    leaves = [next(made) if place is None else given[place] for place in places]
    return jax.tree.unflatten(structure, leaves)


def _call_on_shards(
    axes: tuple[str, ...],
    mesh: AbstractMesh,
    held: Held,
    shared: PyTree,
    batched: tuple[PyTree, ...],
) -> tuple[list[jax.Array], Static]:
    """The new leaves; the structure of the result, and the place of each leaf in `shared`."""

    def made(held: Held, shared: PyTree, *batched: PyTree) -> tuple[list[jax.Array], Static]:
        leaves, structure = jax.tree.flatten(held.value(shared, *batched))
        given = {id(leaf): place for place, leaf in enumerate(jax.tree.leaves(shared))}
        places = tuple(given.get(id(leaf)) for leaf in leaves)
        new = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
        return new, Static((structure, places))

    def widen(held: Held, shared: PyTree, *batched: PyTree) -> tuple[PyTree, ...]:
        return held, shared, *draws.repeated(batched, axes)

    found: Any = None

    def local(both: tuple[Held, PyTree], *batched: PyTree) -> list[jax.Array]:
        nonlocal found
        leaves, static = draws.as_on_one_device(made, widen, axes)(*both, *batched)
        whole, _ = jax.eval_shape(lambda: made(*widen(*both, *batched)))
        grown = [draws.grown(*map(jnp.shape, pair)) for pair in zip(leaves, whole, strict=True)]
        specs = [P() if axis is None else P(*[None] * axis, axes) for axis in grown]
        found = specs, static
        return [
            _agreed(leaf, axes) if axis is None else tree.vary_over(leaf, frozenset(axes))
            for leaf, axis in zip(leaves, grown, strict=True)
        ]

    def look(*args: PyTree) -> tuple[()]:
        local(*args)
        return ()

    arguments = (held, shared), *batched
    # In JAX's types `shared` stays the same on all shards. If that fails, the function has a loop
    # whose carry starts from `shared` and is mixed with samples; then it varies over the shards.
    for varies in (_is_key, _is_own):
        try:
            jax.eval_shape(lambda: map_shards(look, axes, mesh, P(), varies)(*arguments))  # noqa: B023
            break
        except TypeError:
            if varies is _is_own:
                raise
    specs, static = found
    return map_shards(local, axes, mesh, specs, varies)(*arguments), static


_call_on_shards_compiled = jax.jit(_call_on_shards, static_argnums=(0, 1))


def _agreed(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The mean over the shards, or the largest where there is no mean, if they may differ."""
    axes = tuple(axis for axis in axes if axis in _compat.varying_axes(leaf))
    if not axes:
        return leaf
    if _is_key(leaf.dtype):
        data = lax.pmax(jax.random.key_data(leaf), axes)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    if leaf.dtype == jnp.bool_:
        return lax.pmax(leaf.astype(jnp.int32), axes) > 0
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return lax.pmean(leaf, axes)
    return lax.pmax(leaf, axes)
