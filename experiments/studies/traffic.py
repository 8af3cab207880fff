"""What solves over several devices send: collectives and bytes in a trip and in a step.

The part `layouts` takes each way of splitting parameters and states over four devices, in each of
JAX's three modes, with three solvers. It compares values and gradients with one device in float64,
and reads from the compiled gradient what a trip of each loop sends, and whether it gathers arrays
that f by itself does not gather. The part `scale` compiles a training step of a
DEQ-Transformer of 15.8M parameters for 64 devices. Nothing of it is run.

    python -m experiments.studies.traffic
    python -m experiments.studies.traffic layouts --write
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, Broyden, Execution, NewtonKrylov, deq_fixed_point
from deq_jax.cells.attention import Norm
from experiments.studies.collectives import Collective, Loop, program
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

PyTree = Any

SOLVERS = {
    "Anderson": Anderson(tol=1e-13, max_iter=60),
    "Broyden": Broyden(tol=1e-13, memory=8, max_iter=60),
    "NewtonKrylov": NewtonKrylov(tol=1e-13),
}
MODES = {
    "auto": "jit, automatic axes",
    "shard_axis": "jit, automatic axes, `shard_axis`",
    "explicit": "jit, explicit axes",
    "shard_map": "`shard_map`, manual axes",
}

# ---------------------------------------------------------------------------------------- layouts


@dataclasses.dataclass(frozen=True)
class Layout:
    """A way to split a cell and its state over a mesh.

    Attributes:
        axes: the axes of the mesh and their lengths.
        cell: `cell(ops)` is f; `ops` moves arrays between devices as the mode wants it.
        params: the partition specs of its parameters.
        state: the partition spec of state and input.
        batch: the mesh axes over which the batch is split.
        model: the mesh axis over which products of the cell are split.
        gathers: the mesh axes over which the parameters are split only to save memory.
    """

    axes: dict[str, int]
    cell: Callable[["Ops"], Callable[..., jax.Array]]
    params: dict[str, P]
    state: P
    batch: tuple[str, ...] = ()
    model: str | None = None
    gathers: tuple[str, ...] = ()

    def modes(self) -> list[str]:
        """The modes in which it is measured."""
        return [mode for mode in MODES if mode != "shard_axis" or self.batch]


@dataclasses.dataclass(frozen=True)
class Ops:
    """What f does to work on split arrays: nothing where the compiler does it.

    Attributes:
        whole: the state, whole along the axis `model`.
        product: the product of two arrays that are split along what is summed.
    """

    whole: Callable[[jax.Array, int], jax.Array] = lambda z, axis: z
    product: Callable[[jax.Array, jax.Array], jax.Array] = jnp.matmul


def dense(ops: Ops) -> Callable[..., jax.Array]:
    """`tanh(z W + x) / 2` on `[B, D]`."""
    return lambda p, z, x: 0.5 * jnp.tanh(ops.whole(z, 1) @ p["w"] + x)


def feed_forward(ops: Ops) -> Callable[..., jax.Array]:
    """`tanh(softplus(z W) V + x) / 2` on `[B, D]`."""
    return lambda p, z, x: 0.5 * jnp.tanh(ops.product(jax.nn.softplus(z @ p["w"]), p["v"]) + x)


def mixer(of_features: bool) -> Callable[[Ops], Callable[..., jax.Array]]:
    """`tanh(z W + A z + x) / 2` on `[B, L, D]`; A mixes positions, W features."""

    def cell(ops: Ops) -> Callable[..., jax.Array]:
        def f(p: Any, z: jax.Array, x: jax.Array) -> jax.Array:
            features, positions = (ops.whole(z, 2), z) if of_features else (z, ops.whole(z, 1))
            mixed = jnp.einsum("lk,bkd->bld", p["a"], positions)
            return 0.5 * jnp.tanh(features @ p["w"] + mixed + x)

        return f

    return cell


_COLUMNS = {"w": P(None, "model")}
_PAIR = {"w": P(None, "model"), "v": P("model")}
_BOTH = ("data", "fsdp")
LAYOUTS = {
    "data": Layout({"data": 4}, dense, {"w": P()}, P("data"), ("data",)),
    "FSDP": Layout({"data": 4}, dense, {"w": P("data")}, P("data"), ("data",), gathers=("data",)),
    "tensor, columns": Layout({"model": 4}, dense, _COLUMNS, P(None, "model"), model="model"),
    "tensor, columns then rows": Layout({"model": 4}, feed_forward, _PAIR, P(), model="model"),
    "features": Layout(
        {"model": 4},
        mixer(of_features=True),
        {"w": P(None, "model"), "a": P()},
        P(None, None, "model"),
        model="model",
    ),
    "sequence": Layout(
        {"model": 4},
        mixer(of_features=False),
        {"w": P(), "a": P("model")},
        P(None, "model"),
        model="model",
    ),
    "data x tensor": Layout(
        {"data": 2, "model": 2}, feed_forward, _PAIR, P("data"), ("data",), model="model"
    ),
    "data x FSDP": Layout(
        {"data": 2, "fsdp": 2}, dense, {"w": P("fsdp")}, P(_BOTH), _BOTH, gathers=("fsdp",)
    ),
}

BATCH, LENGTH, FEATURES, HIDDEN = 8, 8, 8, 16


def problem(layout: Layout) -> tuple[dict[str, jax.Array], jax.Array, jax.Array]:
    """Parameters, input and a cotangent of the solution, in float64."""
    shapes = {"w": (FEATURES, FEATURES), "a": (LENGTH, LENGTH)}
    if "v" in layout.params:
        shapes |= {"w": (FEATURES, HIDDEN), "v": (HIDDEN, FEATURES)}
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=shapes[name])) / 4 for name in layout.params}
    shape = (BATCH, LENGTH, FEATURES) if "a" in layout.params else (BATCH, FEATURES)
    x, cotangent = (jnp.asarray(rng.normal(size=shape)) for _ in range(2))
    return params, x, cotangent


def ops_for(layout: Layout, mode: str) -> Ops:
    """How f moves arrays in a mode."""
    axis, batch = layout.model, P(layout.batch or None)
    if axis is None or mode in ("one device", "auto", "shard_axis"):
        return Ops()
    if mode == "explicit":
        return Ops(
            lambda z, _: jax.sharding.reshard(z, batch),
            lambda a, b: jnp.einsum("bh,hd->bd", a, b, out_sharding=batch),
        )
    return Ops(
        lambda z, dimension: lax.all_gather(z, axis, axis=dimension, tiled=True),
        lambda a, b: lax.psum(a @ b, axis),
    )


def loss_of(layout: Layout, mode: str, solver: Any) -> Callable[..., jax.Array]:
    """The loss `⟨cotangent, z*⟩` in a mode."""
    f = layout.cell(ops_for(layout, mode))
    if mode == "shard_map":
        return _by_hand(layout, f, solver)
    execution = Execution()
    if mode == "shard_axis":
        execution = Execution(shard_axis=layout.batch)
    elif mode != "one device":
        execution = Execution(gather_axis=layout.gathers or None)

    def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        z = deq_fixed_point(f, params, x, solver=solver, execution=execution)
        return jnp.sum(cotangent * z)

    return loss


def _by_hand(layout: Layout, f: Callable[..., jax.Array], solver: Any) -> Callable[..., jax.Array]:
    def local(params: Any, x: jax.Array) -> jax.Array:
        for axis in layout.gathers:
            params = {k: lax.all_gather(p, axis, tiled=True) for k, p in params.items()}
        split = layout.model if layout.model in jax.tree.leaves(tuple(layout.state)) else None
        execution = Execution(state_axis=split)
        return deq_fixed_point(f, params, x, solver=solver, execution=execution)

    solve = jax.shard_map(local, in_specs=(layout.params, layout.state), out_specs=layout.state)

    def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jnp.sum(cotangent * solve(params, x))

    return loss


def mesh_of(layout: Layout, mode: str) -> Mesh:
    """The mesh of a layout."""
    kind = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    sizes = tuple(layout.axes.values())
    return jax.make_mesh(sizes, tuple(layout.axes), axis_types=(kind,) * len(sizes))


def measure_layout(layout: Layout, mode: str, solver: Any) -> dict[str, Any]:
    """The error against one device, and what the loops of the gradient send."""
    arguments = problem(layout)
    expected = _gradient(loss_of(layout, "one device", solver))(*arguments)
    mesh = mesh_of(layout, mode)
    with jax.set_mesh(mesh):
        specs = layout.params, layout.state, layout.state
        placed = jax.tree.map(
            lambda array, spec: jax.device_put(array, NamedSharding(mesh, spec)), arguments, specs
        )
        compiled = _gradient(loss_of(layout, mode, solver)).lower(*placed).compile()
        error = relative_error(compiled(*placed), expected)
        asked = _asked_by_f(layout, mode, placed)
    # The programs of `device_get` aside, the outermost loops are the solve and the backward solve.
    loops = program(compiled.as_text()).inner
    found = [collective for loop in loops for collective in loop.everywhere()]
    needless = {c.shapes for c in found if c.kind == "all-gather"} - asked
    forward, backward = loops[0], loops[-1]
    return {
        "error": error,
        "forward": _sizes(forward),
        "backward": _sizes(backward),
        "needless gathers": sorted(map(list, needless)),
    }


def _gradient(loss: Callable[..., jax.Array]) -> Any:
    return jax.jit(jax.value_and_grad(loss, (0, 1)))


def _asked_by_f(layout: Layout, mode: str, arguments: Any) -> set[tuple[str, ...]]:
    """The arrays that f alone gathers, forwards and in its derivatives."""
    f = layout.cell(ops_for(layout, mode))
    params, x, _ = arguments

    def value_and_products(params: Any, z: jax.Array, x: jax.Array) -> Any:
        fz, pullback = jax.vjp(lambda z: f(params, z, x), z)
        return fz, pullback(fz)[0], jax.jvp(lambda z: f(params, z, x), (z,), (fz,))[1]

    if mode == "shard_map":
        value_and_products = jax.shard_map(
            value_and_products,
            in_specs=({k: P() if layout.gathers else s for k, s in layout.params.items()},)
            + (layout.state,) * 2,
            out_specs=layout.state,
        )
    if layout.gathers:
        params = jax.device_put(params, NamedSharding(mesh_of(layout, mode), P()))
    text = jax.jit(value_and_products).lower(params, x, x).compile().as_text()
    return {c.shapes for c in program(text).everywhere() if c.kind == "all-gather"}


def relative_error(got: PyTree, expected: PyTree) -> float:
    """The largest `‖a - b‖ / ‖b‖` over the leaves."""
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(
        float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))
        for a, b in pairs
    )


def _sizes(loop: Loop) -> dict[str, Any]:
    """Collectives and bytes of a trip, and of a trip of the costliest loop in it."""
    inner = max((_total(inner) for inner in loop.inner), key=lambda total: total[1], default=None)
    number, size = _total(loop, deep=False)
    return {"collectives": number, "bytes": size, "inner": inner}


def _total(loop: Loop, *, deep: bool = True) -> tuple[int, int]:
    found = list(loop.everywhere() if deep else loop.collectives)
    return len(found), sum(collective.size for collective in found)
