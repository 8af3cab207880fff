"""How the parameters of cells and models are laid out over the devices of a mesh.

The metadata of a parameter name its axes, in words that T5X and MaxText use too. `RULES` say over
which axes of a mesh an axis with such a name is sharded, for each kind of parallelism.
`partition_specs` applies rules to a model, which need not change for them:

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
| `gates` | the gates of all channels of a recurrent cell, concatenated |

Activations have two more names: `batch`, and `length`, the positions of a sequence.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

PyTree = Any
MeshAxes = str | tuple[str, ...]
"""An axis of a mesh, or several over which one axis of an array is sharded."""
Rules = Mapping[str, MeshAxes | None]
"""From names of axes of arrays to axes of the mesh; None for an axis that stays whole."""

ANY = "*"
"""In rules: a named axis that the other rules leave whole; see `partition_spec`."""

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
"""Rules for one kind of parallelism each, to be joined by `|`.

The order does not matter, except that `replicated` must come first.

- `replicated`: all arrays are whole. It maps every name to None.
- `data`: each device has samples of its own, and all parameters.
- `fsdp`: each device has samples of its own, and a part of each parameter and of the optimiser's
  state. XLA gathers a parameter, or exchanges activations instead, where the parameter is used;
  `gather_params` gathers parameters once a step.
- `tensor`: each device has some attention heads and some channels of each feed-forward block, as
  in Megatron-LM. Each block ends with one all-reduce.
- `sequence`: each device has some positions of each sequence. Parameters are whole.

If a mesh lacks one of the axes `data`, `fsdp`, `tensor` and `sequence`, rules for it do nothing.
"""


def logical_axes(*names: str | None) -> dict[str, Any]:
    """Metadata of a Flax variable whose axes have these names; None for an axis without one.

    For the options `kernel_metadata` of Flax's modules and for `nnx.Param`:

        nnx.Linear(8, 32, kernel_metadata=logical_axes("embed", "mlp"), rngs=rngs)

    Flax's own functions, such as `nnx.get_partition_spec`, read this metadata. The names are not
    axes of a mesh, so variables are not sharded when they are created, which Flax otherwise does
    under `jax.set_mesh`. One function of Flax 0.12 needs a rule for each name: `nnx.eval_shape`
    under `jax.set_mesh` with a mesh of type `AxisType.Auto`,

        with nnx.logical_axis_rules(tuple(RULES["replicated"].items())):
            abstract = nnx.eval_shape(build_model)

    `jax.eval_shape(lambda: nnx.split(build_model())[1])` needs no rules.

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
    """The axes of the mesh over which an array with named axes is sharded.

    Each axis of the array follows the rule for its name. A name without a rule that is an axis of
    the mesh stands for that axis. Then a rule for `ANY`, as in `RULES["fsdp"]`, applies to the
    longest named axis that is still whole and can be divided. An axis stays whole if

    - it has no name, or its name has no rule or the rule None,
    - the mesh has none of the axes in the rule (a rule for several uses those that the mesh has),
    - the number of devices along these does not divide its length, or
    - another axis of the array is sharded over one of them already.

        partition_spec(("batch", "length"), mesh, RULES["data"] | RULES["sequence"])  # of tokens

    Args:
        names: a name for each axis of the array; None for an axis without one.
        mesh: the mesh.
        rules: entries of `RULES`, joined by `|`, or your own.
        shape: shape of the array. With None all lengths count as divisible.

    Raises:
        TypeError: `rules` is not a mapping of names to mesh axes.
        ValueError: there are more or fewer names than axes.
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
    models of this library these are biases, scales of norms, and variables that are not parameters.
    An axis that the mesh cannot divide stays whole too, see `partition_spec`.

    Args:
        tree: a module; or its state, as `nnx.state` or `nnx.split` returns it, of arrays or of
            `jax.ShapeDtypeStruct`; or a pytree that contains such states, such as the state that an
            optimiser of Optax makes from them.
        mesh: the mesh.
        rules: entries of `RULES`, joined by `|`, or your own.

    Returns:
        A tree like the state, with a PartitionSpec in the place of each array. Under
        `jax.set_mesh(mesh)`, `jax.device_put`, `jax.jit` and `jax.lax.with_sharding_constraint`
        accept it. `nnx.as_pure` removes the variables from it, for a state of plain arrays.

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
