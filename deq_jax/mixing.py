"""Whether f can be seen to mix samples, from its jaxprs at two batch sizes."""

from typing import Any

import jax.numpy as jnp

from deq_jax import _compat

_ACROSS = {
    "reduce_sum": lambda params: params["axes"],
    "dot_general": lambda params: params["dimension_numbers"][0][0],
    "cumsum": lambda params: (params["axis"],),
    "cumprod": lambda params: (params["axis"],),
    "cumlogsumexp": lambda params: (params["axis"],),
}
"""Operations that join entries of their first argument, and along which axes."""

_RANDOM = frozenset({"random_bits", "random_split", "random_gamma"})


def check_apart(jaxpr: Any, smaller: Any, shrink_to: int) -> None:
    """Raises where f can be seen to mix samples; not every f that does so is seen.

    Axes whose lengths depend on the batch are found by comparing both jaxprs. `while` and `cond`
    are not looked into, nor are booleans, integers, largest entries and indexing judged. What
    nobody reads does not count, nor do sums over no entries.
    """
    found = _mixing(jaxpr, smaller, [True] * len(jaxpr.outvars), [True] * len(jaxpr.invars))[0]
    if found:
        raise ValueError(
            f"Execution(shrink_to={shrink_to}) goes on with some samples alone, so f must treat "
            f"samples independently, but it {found}"
        )


def _mixing(
    jaxpr: Any, smaller: Any, wanted: list[bool], carries: list[bool]
) -> tuple[str | None, list[bool]]:
    """What mixes samples, if anything; and which outputs may carry data of samples.

    Args:
        jaxpr: of the whole batch.
        smaller: of a part of it.
        wanted: the outputs that somebody reads.
        carries: the inputs that may carry data of samples.
    """
    everything = None, [True] * len(jaxpr.outvars)
    names = [[equation.primitive.name for equation in j.eqns] for j in (jaxpr, smaller)]
    if names[0] != names[1]:
        return everything
    needed = {v for v, used in zip(jaxpr.outvars, wanted, strict=True) if used and _is_var(v)}
    live = []
    for pair in reversed(list(zip(jaxpr.eqns, smaller.eqns, strict=True))):
        if any(v in needed and v.aval.size > 0 for v in pair[0].outvars):
            live.append(pair)
            needed.update(v for v in pair[0].invars if _is_var(v))
    data = {v for v, carried in zip(jaxpr.invars, carries, strict=True) if carried}

    def holds_data(atom: Any) -> bool:
        return _is_var(atom) and atom in data and atom.aval.size > 0

    for one, other in reversed(live):
        given = [holds_data(atom) for atom in one.invars]
        results = [any(given)] * len(one.outvars)
        bodies = [_compat.nested(equation) for equation in (one, other)]
        if len(bodies[0]) == len(bodies[1]) == 1 and _is_call(one, bodies[0][0]):
            read = [v in needed for v in one.outvars]
            found, results = _mixing(bodies[0][0], bodies[1][0], read, given)
        else:
            found = _mixes(one, other, any(given))
        if found:
            return found, results
        data.update(v for v, carried in zip(one.outvars, results, strict=True) if carried)
    return None, [holds_data(atom) for atom in jaxpr.outvars]


def _mixes(one: Any, other: Any, of_samples: bool) -> str | None:
    """How one operation, seen at two batch sizes, mixes samples; `of_samples`: it reads some."""
    name = one.primitive.name
    if name in _RANDOM:
        shapes = [equation.params["shape"] for equation in (one, other)]
        if shapes[0] != shapes[1]:
            return (
                f"draws random numbers for the whole batch from one key ({name} of shape "
                f"{shapes[0]}); draw them before the solve and pass them in x, or pass a key for "
                "each sample"
            )
    if name in _ACROSS and of_samples and jnp.issubdtype(one.invars[0].aval.dtype, jnp.inexact):
        shapes = [equation.invars[0].aval.shape for equation in (one, other)]
        same_rank = len(shapes[0]) == len(shapes[1])
        if same_rank and any(
            shapes[0][axis] != shapes[1][axis] for axis in _ACROSS[name](one.params)
        ):
            return (
                f"sums over the batch ({name} of shape {shapes[0]}, {shapes[1]} for fewer "
                "samples), as a BatchNorm in training mode does"
            )
    return None


def _is_call(equation: Any, body: Any) -> bool:
    """`equation` is one call of `body`, or several in a row."""
    arguments = len(body.invars) == len(equation.invars) and not body.constvars
    return arguments and len(body.outvars) == len(equation.outvars)


def _is_var(atom: Any) -> bool:
    return isinstance(atom, _compat.Var)

