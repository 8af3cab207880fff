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
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import Anderson, Broyden, Execution, NewtonKrylov, deq_fixed_point, gather_params
from deq_jax.models.deq_transformer import DEQTransformer
from deq_jax.partitioning import RULES, partition_spec, partition_specs
from experiments.studies.collectives import Loop, program
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
    execution = Execution(shard_axis=layout.batch if mode == "shard_axis" else None)
    gathers = layout.gathers if mode in ("auto", "explicit") else ()

    def loss(params: Any, x: jax.Array, cotangent: jax.Array) -> jax.Array:
        params = gather_params(params, gathers) if gathers else params
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
    devices = jax.devices()[: math.prod(sizes)]
    kinds = (kind,) * len(sizes)
    return jax.make_mesh(sizes, tuple(layout.axes), axis_types=kinds, devices=devices)


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


# ------------------------------------------------------------------------------------------ scale

DEVICES = 64
"""Virtual devices for which `scale` compiles: eight hosts with eight each."""

WIDTH, LENGTH_OF_TEXT, SEQUENCES, TRIPS = 1024, 256, 512, 24


@dataclasses.dataclass(frozen=True)
class Scale:
    """A way to train the transformer on `DEVICES` devices.

    Attributes:
        axes: the axes of the mesh and their lengths.
        rules: names of the entries of `RULES` that lay parameters and data out.
        shard_axis: of the layer's `Execution`.
        gathers: the axes for `gather_params`.
    """

    axes: dict[str, int]
    rules: tuple[str, ...]
    shard_axis: tuple[str, ...] | None = None
    gathers: tuple[str, ...] = ()


_ALL = {"data": DEVICES}
_FSDP = {"fsdp": DEVICES}
SCALES = {
    "data": Scale(_ALL, ("data",)),
    "data, `shard_axis`": Scale(_ALL, ("data",), ("data",)),
    "FSDP": Scale(_FSDP, ("fsdp",)),
    "FSDP, `gather_params`": Scale(_FSDP, ("fsdp",), None, ("fsdp",)),
    "FSDP, `gather_params`, `shard_axis`": Scale(_FSDP, ("fsdp",), ("fsdp",), ("fsdp",)),
    "data 8 x tensor 8, `shard_axis`": Scale(
        {"data": 8, "tensor": 8}, ("data", "tensor"), ("data",)
    ),
    "data 8 x sequence 8, `shard_axis`": Scale(
        {"data": 8, "sequence": 8}, ("data", "sequence"), ("data",)
    ),
    "data 2 x FSDP 4 x tensor 8, `gather_params`, `shard_axis`": Scale(
        {"data": 2, "fsdp": 4, "tensor": 8}, ("fsdp", "tensor"), ("data", "fsdp"), ("fsdp",)
    ),
}


def measure_scale(scale: Scale) -> dict[str, Any]:
    """What a gradient of the transformer sends, in a trip of each loop and outside of them."""
    rules: dict[str, Any] = functools.reduce(lambda a, b: a | b, (RULES[r] for r in scale.rules))
    sizes = tuple(scale.axes.values())
    mesh = jax.make_mesh(sizes, tuple(scale.axes), axis_types=(AxisType.Auto,) * len(sizes))

    def build() -> DEQTransformer:
        solver = Anderson(tol=1e-3, max_iter=TRIPS)
        execution = Execution(shard_axis=scale.shard_axis)
        options: Any = {"solver": solver, "execution": execution, "positions": "rotary"}
        size = {"heads": 16, "hidden_features": 4 * WIDTH}
        return DEQTransformer(256, WIDTH, **size, **options, rngs=nnx.Rngs(0))

    # Shapes and shardings; no array is made.
    definition, abstract = nnx.split(nnx.eval_shape(build))
    specs = nnx.as_pure(partition_specs(abstract, mesh, rules))
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, P)
    )
    state = jax.tree.map(_with_sharding, nnx.as_pure(abstract), shardings)
    tokens = _with_sharding(
        jax.ShapeDtypeStruct((SEQUENCES, LENGTH_OF_TEXT), jnp.int32),
        NamedSharding(mesh, partition_spec(("batch", "length"), mesh, rules)),
    )

    def loss(state: Any, tokens: jax.Array) -> jax.Array:
        state = gather_params(state, scale.gathers) if scale.gathers else state
        logits = nnx.merge(definition, state, copy=True)(tokens)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens).mean()

    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        compiled = gradient.lower(state, tokens).compile()
    found = program(compiled.as_text())
    loops = [_total(loop)[1] for loop in found.inner]
    gathered = [c for loop in found.inner for c in loop.everywhere() if c.kind == "all-gather"]
    return {
        "forward": loops[0],
        "backward": loops[-1],
        "outside": _total(found, deep=False)[1],
        "gathers in loops": sorted({shape for c in gathered for shape in c.shapes}),
        "memory": compiled.memory_analysis().temp_size_in_bytes,
    }


def _with_sharding(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


# ----------------------------------------------------------------------------------------- tables


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to compile.

    Attributes:
        layouts: measure only these layouts; the rows of the others are dropped.
    """

    layouts: tuple[str, ...] = tuple(LAYOUTS)


def layouts(config: Config) -> Part:
    """All layouts, modes and solvers."""
    rows = []
    with jax.enable_x64(True):
        for name in config.layouts:
            for mode in LAYOUTS[name].modes():
                for solver in SOLVERS:
                    measured = measure_layout(LAYOUTS[name], mode, SOLVERS[solver])
                    rows.append({"layout": name, "mode": mode, "solver": solver, **measured})
                    print(name, mode, solver, measured, flush=True)
    return {"rows": rows}


def scales(config: Config) -> Part:
    """All ways to train the transformer."""
    del config
    rows = {}
    for name, scale in SCALES.items():
        rows[name] = measure_scale(scale)
        print(name, rows[name], flush=True)
    return {"rows": rows}


def render(document: Document) -> dict[str, str]:
    """The Markdown of each part."""
    tables = {"layouts": _layouts_table, "scale": _scale_table}
    return {part: tables[part](measured) for part, measured in document.items()}


def _layouts_table(part: Part) -> str:
    by_place: dict[tuple[str, str], dict[str, Any]] = {}
    for row in part["rows"]:
        by_place.setdefault((row["layout"], row["mode"]), {})[row["solver"]] = row
    table = []
    for (layout, mode), rows in by_place.items():
        error = max(row["error"] for row in rows.values())
        needless = sum(len(row["needless gathers"]) for row in rows.values())
        trips = [_trip_cell(rows[solver]) for solver in SOLVERS]
        table.append([layout, MODES[mode], *trips, str(needless), f"{error:.0e}"])
    columns = ["layout", "mode", *SOLVERS, "needless gathers", "largest error"]
    words = (
        "Collectives in a trip and, in brackets, the bytes that they return on a device: forwards "
        "/ backwards. For NewtonKrylov they are those of a trip of the outer loop + of the loop "
        "in it. A gather is needless if f and its derivatives by themselves do not make it."
    )
    return f"{markdown_table(columns, table)}\n\n{words} {origin(part['context'])}"


def _trip_cell(row: dict[str, Any]) -> str:
    words = []
    for trip in (row["forward"], row["backward"]):
        word = f"{trip['collectives']} ({trip['bytes']:,})"
        if trip["inner"] is not None:
            word += f" + {trip['inner'][0]} ({trip['inner'][1]:,})"
        words.append(word)
    return " / ".join(words)


def _scale_table(part: Part) -> str:
    table = []
    for name, row in part["rows"].items():
        trips = f"{_size(row['forward'])} / {_size(row['backward'])}"
        step = row["outside"] + TRIPS * (row["forward"] + row["backward"])
        gathers = ", ".join(row["gathers in loops"]) or "none"
        memory = f"{row['memory'] / 2**20:,.0f} MiB"
        table.append([name, trips, _size(row["outside"]), _size(step), gathers, memory])
    columns = ["layout", "in a trip, forwards / backwards", "outside of the loops"]
    columns += [f"in a step of {TRIPS} + {TRIPS} trips", "gathered in a trip", "temporaries"]
    words = (
        f"Bytes that the collectives of a gradient return on each of {DEVICES} devices; a ring "
        f"moves about twice as much for an all-reduce. A DEQ-Transformer {WIDTH} wide with "
        f"{SEQUENCES} sequences of {LENGTH_OF_TEXT} tokens in float32, Anderson's method."
    )
    return f"{markdown_table(columns, table)}\n\n{words} {origin(part['context'])}"


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


STUDY = Study("traffic", render)


def main() -> None:
    """Compiles and prints the tables, see `Command`."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    STUDY.run(tyro.cli(Config, description=__doc__), {"layouts": layouts, "scale": scales})


if __name__ == "__main__":
    main()
