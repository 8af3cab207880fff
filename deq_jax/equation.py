"""f, traced once: the equation `z = f(params, z, x)` as a jaxpr of the state alone.

Tracing f a single time, ahead of any solve, serves three ends: what f returns is checked before
anything runs; every traced array it uses, `params`, `x` and whatever it closes over, becomes an
explicit input and so gets its gradient; and later passes (the solve, the linearisation, the
preparation) work on the same jaxpr instead of calling f again.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from deq_jax import tree
from deq_jax.precision import cast, cast_like

PyTree = Any


class Captured(NamedTuple):
    """The arrays a traced function uses besides its argument.

    Attributes:
        variables: floating and complex arrays under trace; differentiable.
        constants: all others: integers, booleans, keys, and arrays no transformation looks at.
    """

    variables: tuple[jax.Array, ...]
    constants: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Traced:
    """A function `g(captured, z)` as a jaxpr; hashed by identity, so it can be a static argument.

    Attributes:
        jaxpr: a jaxpr without constants; its inputs are the captured arrays, then the leaves of z.
        is_variable: for each captured array, whether it stands in `Captured.variables`.
        out_tree: structure of what is returned.
        smaller: the same function for fewer samples, sizes decreasing (see `parts`).
    """

    jaxpr: Any
    is_variable: tuple[bool, ...]
    out_tree: Any
    smaller: tuple["Part", ...] = ()

    def __call__(self, captured: Captured, z: PyTree) -> PyTree:
        """Evaluates the function, differentiable in `captured.variables` and `z`."""
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, []))
        return self.out_tree.unflatten(function(*self.values(captured), *jax.tree.leaves(z)))

    def values(self, captured: Captured) -> list[jax.Array]:
        """The captured arrays in the order of the jaxpr's inputs."""
        variables, constants = iter(captured.variables), iter(captured.constants)
        return [next(variables if inexact else constants) for inexact in self.is_variable]

    def captured(self, values: Sequence[jax.Array]) -> Captured:
        """The inverse of `values`."""
        pairs = list(zip(values, self.is_variable, strict=True))
        return Captured(
            tuple(value for value, inexact in pairs if inexact),
            tuple(value for value, inexact in pairs if not inexact),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A traced function for a part of its samples.

    Attributes:
        size: number of samples, n.
        traced: the function for so many.
        origins: where its captured arrays come from.
    """

    size: int
    traced: Traced
    origins: tuple["Origin", ...]

    def captured(self, whole: Sequence[jax.Array], index: jax.Array) -> Captured:
        """What it captures, from the arrays of the whole batch and the samples `index` `[n]`."""
        return self.traced.captured([origin.read(whole, index) for origin in self.origins])


class Origin(NamedTuple):
    """Where a captured array of a `Part` comes from.

    Attributes:
        position: its place among the captured arrays of the whole batch; None if it is its own.
        per_sample: axis 0 is the batch; else it is the same for all samples.
        own: an array that is made anew whenever f is traced.
    """

    position: int | None
    per_sample: bool = False
    own: Any = None

    def read(self, whole: Sequence[jax.Array], index: jax.Array) -> Any:
        """The array, for the samples `index`."""
        if self.position is None:
            return self.own
        value = whole[self.position]
        return tree.take(value, index) if self.per_sample else value


def trace(g: Callable[[PyTree], PyTree], z: PyTree) -> tuple[Traced, Captured]:
    """Traces `g` at the shapes of `z`; what it captures becomes an explicit argument."""
    closed, out = jax.make_jaxpr(lambda z: g(z), return_shape=True)(z)
    is_variable = tuple(
        isinstance(value, jax.core.Tracer) and jnp.issubdtype(value.dtype, jnp.inexact)
        for value in closed.consts
    )
    # Constants become ordinary inputs: from JAX 0.12 on a jaxpr would carry their values with it.
    jaxpr = closed.jaxpr
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    traced = Traced(jaxpr, is_variable, jax.tree.structure(out))
    return traced, traced.captured(closed.consts)


def initial_state(x: PyTree, z0: PyTree | None, batched: bool) -> PyTree:
    """The checked start of a solve, as arrays: `z0`, or zeros shaped like `x`.

    Raises:
        TypeError: a leaf is neither floating nor complex.
        ValueError: no leaves, no batch axis, batch axes that disagree, or an empty batch.
    """
    origin = "z0" if z0 is not None else "x (z0 was left out, so z starts as zeros shaped like x)"
    source = x if z0 is None else z0
    leaves = jax.tree_util.tree_leaves_with_path(source)
    if not leaves:
        raise ValueError(f"{origin} has no leaves; the state needs at least one array")
    sizes = {}
    for path, leaf in leaves:
        name = f"leaf {jax.tree_util.keystr(path) or '(the whole)'} of {origin}"
        dtype = jnp.result_type(leaf)
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"{name} has dtype {dtype}, but a state must be floating or complex"
                + ("; pass z0" if z0 is None else "")
            )
        shape = jnp.shape(leaf)
        if batched and not shape:
            raise ValueError(f"{name} is a scalar without a batch axis; pass batched=False")
        if batched:
            sizes[name] = shape[0]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"axis 0 must be the same batch in every leaf of the state, got {sizes}")
    if 0 in sizes.values():
        raise ValueError(f"the batch is empty: axis 0 of {next(iter(sizes))} has length 0")
    if z0 is None:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.result_type(leaf)), x)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), z0)


def trace_equation(
    f: Callable[[PyTree, PyTree, PyTree], PyTree],
    params: PyTree,
    x: PyTree,
    z: PyTree,
    *,
    batched: bool,
    cell_dtype: Any = None,
) -> tuple[Traced, Captured]:
    """Traces `z -> f(params, z, x)` and checks that it returns what it was given.

    With `batched=False` the traced function takes and returns z with a batch axis of length 1, so
    that everything behind it has only one case.

    With a `cell_dtype` f is given z in that dtype, and the traced function returns what f returns
    in the dtypes of z. To have params and x in it as well is left to the caller.

    Raises:
        ValueError: f returns another structure, shape or dtype; names the leaf, got and expected.
    """
    checked = checked_cell(f, params, cell_dtype)

    def whole(z: PyTree) -> PyTree:
        return checked(z, x)

    def single(z: PyTree) -> PyTree:
        return add_batch_axis(checked(drop_batch_axis(z), x))

    g, start = (whole, z) if batched else (single, add_batch_axis(z))
    varied = tree.vary_with(start, (params, x))
    traced, captured = trace(g, varied)
    if varied is not start:  # inside shard_map; what f closes over may vary over more axes still
        traced, captured = trace(g, tree.vary_with(varied, captured))
    return traced, captured


def checked_cell(
    f: Callable[[PyTree, PyTree, PyTree], PyTree], params: PyTree, cell_dtype: Any
) -> Callable[[PyTree, PyTree], PyTree]:
    """`(z, x) -> f(params, z, x)`, which raises unless f returns what it was given."""

    def checked(z: PyTree, x: PyTree) -> PyTree:
        given = cast(z, cell_dtype)
        fz = f(params, given, x)
        _check_returned(fz, given, cell_dtype)
        return fz if cell_dtype is None else cast_like(fz, z)

    return checked


def add_batch_axis(z: PyTree) -> PyTree:
    """A batch of one."""
    return jax.tree.map(lambda leaf: leaf[None], z)


def drop_batch_axis(z: PyTree) -> PyTree:
    """The only sample of a batch of one."""
    return jax.tree.map(lambda leaf: leaf[0], z)


def _check_returned(fz: PyTree, z: PyTree, cell_dtype: Any) -> None:
    got, expected = jax.tree.structure(fz), jax.tree.structure(z)
    if got != expected:
        raise ValueError(f"f must return the structure of z: got {got}, expected {expected}")
    expected_leaves = jax.tree_util.tree_leaves_with_path(z)
    for (path, leaf), returned in zip(expected_leaves, jax.tree.leaves(fz), strict=True):
        name = jax.tree_util.keystr(path) or "(the whole of z)"
        if jnp.shape(returned) != leaf.shape:
            raise ValueError(
                f"f must return the shapes of z: leaf {name}: "
                f"got {jnp.shape(returned)}, expected {leaf.shape}"
            )
        if jnp.result_type(returned) != leaf.dtype:
            remedy = (
                "cast what f returns, or start from a z0 of that dtype"
                if cell_dtype is None
                else f"f is given params, z and x in Execution.cell_dtype={cell_dtype}, and has to "
                "cast the arrays it closes over"
            )
            raise ValueError(
                f"f must return the dtypes of z: leaf {name}: got {jnp.result_type(returned)}, "
                f"expected {leaf.dtype}; {remedy}"
            )
