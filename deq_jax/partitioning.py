"""How the parameters of cells and models are laid out over the devices of a mesh.

A parameter of a cell says what its axes are, in names that T5X and MaxText use too; `RULES` says
over which axes of a mesh they are sharded, for each kind of parallelism; `partition_specs` puts
the two together. A layout is a choice of the program and not of the model:

    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    rules = RULES["fsdp"] | RULES["tensor"]
    with jax.set_mesh(mesh):
        state = jax.device_put(state, partition_specs(state, mesh, rules))

| name | axis of a parameter |
| --- | --- |
| `embed` | channels of the residual stream: the state of a Transformer cell, an embedding |
| `heads` | attention heads |
| `kv` | channels of one head |
| `mlp` | channels inside a feed-forward block; outputs of the plain cell `tanh(W z + U x + b)` |
| `vocab` | tokens |
| `classes` | classes of an image classifier |
| `channels` | channels of images |
| `inner_channels` | channels inside the branch of a residual cell |
| `gates` | the gates of all channels of a recurrent cell, one behind the other |

Activations have two more: `batch` and `length`, the positions of a sequence.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

PyTree = Any
MeshAxes = str | tuple[str, ...]
"""An axis of a mesh, or several whose product an axis of an array is sharded over."""
Rules = Mapping[str, MeshAxes | None]
"""Axes of the mesh by the name of an array's axis; None for an axis that stays whole."""

ANY = "*"
"""In rules: any named axis of an array that its other rules leave whole."""

_BATCH = ("data", "fsdp")

_USUAL = ("batch", "length", "embed", "heads", "kv", "mlp", "vocab")
_NAMES = (*_USUAL, "classes", "channels", "inner_channels", "gates")

RULES: dict[str, dict[str, MeshAxes | None]] = {
    "replicated": dict.fromkeys(_NAMES),
    "data": {"batch": _BATCH},
    "fsdp": {"batch": _BATCH, "embed": "fsdp", ANY: "fsdp"},
    "tensor": {
        "heads": "tensor",
        "mlp": "tensor",
        "vocab": "tensor",
        "inner_channels": "tensor",
    },
    "sequence": {"length": "sequence"},
}
"""Rules for one kind of parallelism each, to be joined by `|` in any order.

- `replicated`: all is whole. It has all names, and stands first where it is joined to others.
- `data`: each device group has samples of its own, and all parameters.
- `fsdp`: likewise, and each parameter is sharded over the group too. It is gathered where it is
  used, and its optimiser's state never is.
- `tensor`: each device has some attention heads and some channels of each feed-forward block, as
  in Megatron-LM. Each block ends with one all-reduce.
- `sequence`: each device has some positions of each sequence. Parameters are whole.

A mesh without one of the axes `data`, `fsdp`, `tensor` and `sequence` is as if it had one device
along it.
"""


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a Flax variable whose axes have these names; None for an axis without one.

    For the options `kernel_metadata` of Flax's modules and for `nnx.Param`:

        nnx.Linear(8, 32, kernel_metadata=logical_axes("embed", "mlp"), rngs=rngs)

    Flax's own functions read it, `nnx.get_partition_spec` for one. The names are no axes of a mesh,
    so variables are not sharded where they are made, as Flax does by default under `jax.set_mesh`.
    One function of Flax 0.12 has to be told of that: `nnx.eval_shape`, under `jax.set_mesh` with a
    mesh of type `AxisType.Auto`, wants a rule for each name,

        with nnx.logical_axis_rules(tuple(RULES["replicated"].items())):
            abstract = nnx.eval_shape(build_model)

    `jax.eval_shape(lambda: nnx.split(build_model())[1])` needs none.

    Args:
        *names: one for each axis of the array.
    """
    return {"out_sharding": names, "eager_sharding": False}


def partition_spec(
    names: Sequence[str | None],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
    shape: Sequence[int] | None = None,
) -> PartitionSpec:
    """Over which axes of the mesh an array with named axes is sharded.

    Each axis goes by the rule for its name. Then a rule for `ANY`, the one in `RULES["fsdp"]`, goes
    to the longest of the named axes that are left, unless its mesh axis is in use by then. An axis
    of the array stays whole

    - if it has no name, or its name has no rule or the rule None,
    - if the mesh has no such axes: a rule for several takes those that there are,
    - if the number of devices along them does not divide its length,
    - or if an axis before it is sharded over one of them.

    A name without a rule that is an axis of the mesh stands for that axis.

        partition_spec(("batch", "length"), mesh, RULES["data"] | RULES["sequence"])  # of tokens

    Args:
        names: of the array's axes; None where an axis has no name.
        mesh: the mesh.
        rules: entries of `RULES`, joined by `|`, or your own.
        shape: of the array; None where all lengths are known to be divisible.

    Raises:
        TypeError: `rules` is not a mapping of names to mesh axes.
        ValueError: `names` are not as many as the array has axes.
    """
    _check_rules(rules)
    if shape is not None and len(names) != len(shape):
        raise ValueError(f"names must be one for each axis of {list(shape)}, got {tuple(names)}")
    entries: list[tuple[str, ...]] = [()] * len(names)

    def assign(axis: int, wanted: Any) -> None:
        wanted = (wanted,) if isinstance(wanted, str) else wanted or ()
        over = tuple(name for name in wanted if name in mesh.shape)
        in_use = {name for entry in entries for name in entry}
        count = math.prod(mesh.shape[name] for name in over)
        if in_use.isdisjoint(over) and (shape is None or shape[axis] % count == 0):
            entries[axis] = over

    for axis, name in enumerate(names):
        if name is not None:
            assign(axis, rules.get(name, name))
    if ANY in rules:
        left = [axis for axis, name in enumerate(names) if name is not None and not entries[axis]]
        for axis in sorted(left, key=lambda axis: 0 if shape is None else -shape[axis]):
            assign(axis, rules[ANY])
    whole: list[MeshAxes | None] = [
        entry[0] if len(entry) == 1 else entry or None for entry in entries
    ]
    while whole and whole[-1] is None:
        whole.pop()
    return PartitionSpec(*whole)


def partition_specs(tree: PyTree, mesh: Mesh | AbstractMesh, rules: Rules) -> PyTree:
    """`partition_spec` of each variable, by the names that its metadata gives to its axes.

    Variables without names have `PartitionSpec()`: they are whole on each device. In the cells and
    models of this library these are biases, norms and what is not a parameter. Where the axes of
    a parameter cannot be divided by the mesh, it is whole too, see `partition_spec`.

    Args:
        tree: a module; its state, as `nnx.state` or `nnx.split` returns it, of arrays or of
            `jax.ShapeDtypeStruct`; or a pytree with such states in it, as an optimiser of Optax
            makes it from a state.
        mesh: the mesh.
        rules: entries of `RULES`, joined by `|`, or your own.

    Returns:
        A tree like the state, with a PartitionSpec in the place of each array. Under
        `jax.set_mesh(mesh)`, `jax.device_put`, `jax.jit` and `jax.lax.with_sharding_constraint`
        take it as it is. For states without variables, `nnx.as_pure` takes these off it too.

    Raises:
        TypeError: `rules` is not a mapping of names to mesh axes.
        ValueError: a variable has more or fewer names than axes; the message says which one.

    Example:
        >>> definition, params, rest = nnx.split(model, nnx.Param, ...)
        >>> optimizer_state = optax.adam(1e-3).init(params)
        >>> with jax.set_mesh(mesh):
        ...     state = params, rest, optimizer_state
        ...     state = jax.device_put(state, partition_specs(state, mesh, RULES["fsdp"]))
    """
    _check_rules(rules)

    def of_leaf(path: Any, leaf: Any) -> Any:
        if not isinstance(leaf, nnx.Variable):
            return PartitionSpec()
        names = leaf.get_metadata("out_sharding", None)
        if not names:
            return jax.tree.map(lambda _: PartitionSpec(), leaf)
        try:
            names = getattr(names, "spec", names)  # of a NamedSharding
            return leaf.replace(partition_spec(names, mesh, rules, leaf.get_value().shape))
        except ValueError as error:
            raise ValueError(f"metadata of {jax.tree_util.keystr(path)}: {error}") from error

    state = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree_util.tree_map_with_path(of_leaf, state, is_leaf=is_variable)


def _check_rules(rules: Any) -> None:
    """Raises a TypeError unless the argument is a mapping of names to mesh axes."""
    if not isinstance(rules, Mapping):
        raise TypeError(
            f'rules must be a mapping, RULES["fsdp"] or {{"embed": "fsdp"}} say, got {rules!r}'
        )
    for name, axes in rules.items():
        several = axes if isinstance(axes, tuple) else (axes or "",)
        if not all(isinstance(axis, str) for axis in (name, *several)):
            raise TypeError(
                f"rules[{name!r}] must be a mesh axis, a tuple of mesh axes or None, got {axes!r}"
            )
