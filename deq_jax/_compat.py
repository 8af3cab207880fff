"""All that the library uses of JAX without a promise in JAX's documentation.

Nothing else in `deq_jax` looks into a jaxpr's layout or asks JAX where it is. Each name has a test
in `tests/test_compat.py`, so that a new JAX release which changes one of them fails there first.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax import lax
from jax.extend import core

PyTree = Any

Literal = core.Literal
Var = core.Var
DropVar = core.DropVar
Jaxpr = core.Jaxpr


def trace(function: Callable[..., PyTree], *args: PyTree) -> tuple[Any, list[Any], Any]:
    """Traces `function(*args)`.

    Returns:
        A jaxpr whose first inputs are the arrays that the function closes over and whose other
        inputs are the leaves of `args`; these arrays; the structure of what the function returns.
    """
    # The wrapper keeps JAX from finding an older trace of the same function object.
    closed, out = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    jaxpr = closed.jaxpr
    # From JAX 0.12 on a jaxpr carries the values of its constants. As inputs they stay outside.
    jaxpr = jaxpr.replace(constvars=[], invars=[*jaxpr.constvars, *jaxpr.invars])
    return jaxpr, list(closed.consts), jax.tree.structure(out)


def trace_types(function: Callable[..., PyTree], atoms: Sequence[Any]) -> Any:
    """The jaxpr of a function without captured arrays, for inputs of the types of these atoms."""
    types: list[Any] = []
    for aval in (atom.aval for atom in atoms):
        if manual_axes():  # a shape cannot say over which axes an array varies; zeros can
            zeros = jnp.zeros(aval.shape, aval.dtype)
            axes = tuple(sorted(aval.manual_axis_type.varying))
            types.append(lax.pcast(zeros, axes, to="varying") if axes else zeros)
        else:
            sharding = aval.sharding if explicit_axes() else None
            types.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=sharding))
    jaxpr, captured, _ = trace(function, *types)
    assert not captured
    return jaxpr


def evaluate(jaxpr: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr without constants."""
    return jax.core.eval_jaxpr(jaxpr, [], *values)


def with_equations(
    jaxpr: Any, invars: Sequence[Any], equations: Sequence[Any], outvars: Sequence[Any]
) -> Any:
    """A jaxpr of these equations; `jaxpr` lends its debug information."""
    effects = frozenset().union(*(equation.effects for equation in equations))
    return jaxpr.replace(
        constvars=[],
        invars=list(invars),
        outvars=list(outvars),
        eqns=list(equations),
        effects=effects,
    )


def without_dead_code(jaxpr: Any, outvars: Sequence[Any]) -> Any:
    """`jaxpr` with these outputs, without the equations that nothing of them depends on."""
    needed = {atom for atom in outvars if not isinstance(atom, Literal)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or needed.intersection(equation.outvars):
            equations.append(equation)
            needed.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    return with_equations(jaxpr, jaxpr.invars, equations[::-1], outvars)


def bind(jaxpr: Any, equation: Any, values: Sequence[Any], **params: Any) -> list[Any]:
    """The outputs of an equation of `jaxpr` on these values; `params` replace some of its own."""
    invars = [new_variable(atom) for atom in equation.invars]
    outvars = [new_variable(variable) for variable in equation.outvars]
    params = {**equation.params, **params}
    equation = equation.replace(invars=invars, outvars=outvars, params=params)
    return evaluate(with_equations(jaxpr, invars, [equation], outvars), values)


def new_variable(like: Any) -> Any:
    """A variable of the type of `like` that occurs nowhere else."""
    return core.Var(like.aval)


def opened(jaxpr: Any) -> tuple[Any, list[Any]]:
    """A nested jaxpr without its wrapper, and the values of its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr), list(getattr(jaxpr, "consts", ()))


def nested(equation: Any) -> list[Any]:
    """The jaxprs in an equation's parameters, without their wrappers."""
    return [opened(inner)[0] for inner in core.jaxprs_in_params(equation.params)]


def all_equations(jaxpr: Any) -> Iterator[Any]:
    """The equations of a jaxpr and of all jaxprs nested in it."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in nested(equation):
            yield from all_equations(inner)


def contains(jaxpr: Any, *primitives: str) -> bool:
    """Whether one of the primitives occurs in the jaxpr or in those nested in it."""
    return any(equation.primitive.name in primitives for equation in all_equations(jaxpr))


_LOCAL = frozenset(
    {"axis_index", "pvary", "preduced", "reduced_vary_cast_p", "vary_unreduced_cast_p"}
)
"""Primitives that name mesh axes and move no data between devices."""


def mesh_axes(jaxpr: Any) -> tuple[str, ...]:
    """Names of the axes over which the operations of a jaxpr communicate.

    Any operation that names an axis of the surrounding `shard_map` or `vmap` counts, but for those
    known to be local: an operation that is taken for a collective costs an agreement in each trip
    of a loop, and a collective that is missed can make devices wait for ever.
    """
    known = set(_axis_names())
    found: set[str] = set()
    if known:
        for equation in all_equations(jaxpr):
            if equation.primitive.name not in _LOCAL:
                for value in equation.params.values():
                    values = value if isinstance(value, tuple) else (value,)
                    found.update(v for v in values if isinstance(v, str) and v in known)
    return tuple(sorted(found))


def _axis_names() -> list[str]:
    """Names of the axes of all surrounding `shard_map` and `vmap`."""
    untyped: Any = core
    return untyped.unsafe_get_axis_names_DO_NOT_USE()


def tracks_varying_axes(axis: str) -> bool:
    """Whether the `shard_map` over this axis keeps track of what varies (`check_vma=True`)."""
    return bool(varying_axes(lax.axis_index(axis)))


def varying_axes(leaf: Any) -> frozenset[str]:
    """The mesh axes of a `shard_map` over which an array varies; empty outside of one."""
    return jax.typeof(leaf).manual_axis_type.varying


def varying_axes_of(atom: Any) -> frozenset[str]:
    """`varying_axes` of a variable or literal in a jaxpr."""
    return atom.aval.manual_axis_type.varying


def manual_axes() -> frozenset[str]:
    """Mesh axes of the `shard_map` that is being traced; empty outside."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def explicit_axes() -> frozenset[str]:
    """Mesh axes of the context whose shardings are part of JAX's types."""
    return frozenset(jax.sharding.get_abstract_mesh().explicit_axes)


def shards_states() -> bool:
    """Whether the context has a mesh over whose axes JAX may shard a state, on any of its axes."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)


def cond_saves() -> bool:
    """Whether a `cond` may save the arrays inside it for its derivative.

    JAX 0.10.0 fails if these have shardings in their types, as an f under explicit axes makes them.
    """
    return jax.__version_info__ >= (0, 10, 2) or jax.sharding.get_abstract_mesh().empty


def at_top_level() -> bool:
    """Whether no transformation (`jit`, `grad`, `vmap`, ...) is under way."""
    here = core.get_opaque_trace_state()
    with jax.core.eval_context():
        return here == core.get_opaque_trace_state()


_generation_marker: Any = jax.jit(lambda: None)


def caches_were_cleared() -> bool:
    """Whether `jax.clear_caches()` was called since this function was called last."""
    cleared = _generation_marker._cache_size() == 0
    _generation_marker()
    return cleared


def trace_context() -> Any:
    """All settings of JAX that a trace depends on; hashable."""
    from jax._src import config

    return config.trace_context(), tuple(_axis_names())
