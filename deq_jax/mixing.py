"""Whether f can be seen to mix the samples of a batch, from the operations of its jaxpr.

The batch axis of the state is followed from operation to operation. Where an operation joins
entries along it, f mixes samples. What is not known here (indexing, loops, branches) is not
judged, so that no answer is no promise.
"""

import math
from collections.abc import Sequence
from typing import Any

from deq_jax import _compat
from deq_jax.draws import draw_shapes

_ELEMENTWISE = frozenset(
    "abs add add_any and atan2 cbrt ceil clamp complex conj convert_element_type copy copy_p cos "  # noqa: SIM905
    "cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le lgamma "
    "log log1p logistic lt max min mul ne neg nextafter not optimization_barrier or pow real "
    "reduce_precision rem round rsqrt select_n sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin".split()  # noqa: SIM905
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())  # noqa: SIM905

_LOST = -1
"""The batch axis of a value that depends on samples in a way that is not known."""


def seen_to_mix(jaxpr: Any, per_sample: Sequence[bool]) -> str | None:
    """How f mixes samples, as the end of the sentence "f ..."; None where that is not seen.

    Args:
        jaxpr: of f.
        per_sample: for each of its inputs, whether axis 0 is the batch.
    """
    return _follow(jaxpr, [0 if mine else None for mine in per_sample])[0]


def check_apart(jaxpr: Any, smaller: Any, per_sample: Sequence[bool], shrink_to: int) -> None:
    """Raises where f can be seen to mix samples, or draws for all of them from one key.

    Args:
        jaxpr: of f for the whole batch.
        smaller: of f for a part of it.
        per_sample: see `seen_to_mix`.
        shrink_to: named in the message.
    """
    found = seen_to_mix(jaxpr, per_sample)
    if (shapes := draw_shapes(jaxpr)) != draw_shapes(smaller):
        found = (
            f"draws random numbers for the whole batch from one key, of shapes {shapes}; draw "
            "them before the solve and pass them in x, or pass a key for each sample"
        )
    if found:
        raise ValueError(
            f"Execution(shrink_to={shrink_to}) goes on with some samples alone, so f must treat "
            f"samples independently, but it {found}"
        )


def _follow(jaxpr: Any, axes: list[int | None]) -> tuple[str | None, list[int | None]]:
    """How the jaxpr mixes samples, if at all, and the batch axes of its outputs.

    Args:
        jaxpr: a jaxpr.
        axes: the batch axis of each input; None where it is the same for all samples.
    """
    results: list[int | None]
    axis_of: dict[Any, int | None] = dict(zip(jaxpr.invars, axes, strict=True))

    def axis(atom: Any) -> int | None:
        return None if isinstance(atom, _compat.Literal) else axis_of.get(atom)

    for equation in _live(jaxpr):
        given = [axis(atom) for atom in equation.invars]
        if all(a is None for a in given):
            continue
        bodies = _compat.nested(equation)
        if _LOST in given:
            found = None
            results = [_LOST for _ in equation.outvars]
        elif len(bodies) == 1 and _is_call(equation, bodies[0]):
            found, results = _follow(bodies[0], given)
        else:
            result = _through(equation, given)
            found = result if isinstance(result, str) else None
            results = [result if isinstance(result, int) else _LOST] * len(equation.outvars)
        if found:
            return found, []
        axis_of.update(zip(equation.outvars, results, strict=True))
    return None, [axis(atom) for atom in jaxpr.outvars]


def _live(jaxpr: Any) -> list[Any]:
    """The equations on which an output depends."""
    needed, live = set(_variables(jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if any(v in needed and math.prod(v.aval.shape) != 0 for v in equation.outvars):
            live.append(equation)
            needed.update(_variables(equation.invars))
    return live[::-1]


def _variables(atoms: Sequence[Any]) -> list[Any]:
    return [atom for atom in atoms if not isinstance(atom, _compat.Literal)]


def _is_call(equation: Any, body: Any) -> bool:
    """Whether the equation is one call of `body`."""
    same = len(body.invars) == len(equation.invars) and not body.constvars
    loop = equation.primitive.name in ("scan", "while", "cond", "shard_map")
    return same and len(body.outvars) == len(equation.outvars) and not loop


def _through(equation: Any, given: list[int | None]) -> int | str | None:
    """The batch axis of the result; or how samples are mixed; None where it is not known."""
    name, params = equation.primitive.name, equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    known = {a for a in given if a is not None}
    batch, first = next(iter(known)), shapes[0]
    if name in _ELEMENTWISE:
        return batch if len(known) == 1 else None
    if name == "dot_general":
        return _through_product(equation, given)
    if given[0] is None or batch >= len(first):
        return None
    if name in _REDUCTIONS or name in _CUMULATIVE:
        over = (params["axis"],) if name in _CUMULATIVE else params["axes"]
        if batch in over and first[batch] > 1 and math.prod(first) > 0:
            return f"sums over the batch or compares its samples ({name} of shape {first})"
        return batch if name in _CUMULATIVE else batch - sum(a < batch for a in over)
    if name == "broadcast_in_dim":
        return params["broadcast_dimensions"][batch]
    if name == "transpose":
        return params["permutation"].index(batch)
    if name == "squeeze" and batch not in params["dimensions"]:
        return batch - sum(a < batch for a in params["dimensions"])
    if name == "expand_dims":
        return batch + sum(a <= batch for a in params["dimensions"])
    if name == "reshape":
        lead, new = math.prod(first[:batch]), params["new_sizes"]
        fits = [i for i in range(len(new)) if math.prod(new[:i]) == lead and new[i] == first[batch]]
        return fits[0] if fits else None
    if name == "concatenate" and params["dimension"] != batch:
        return batch if len(known) == 1 else None
    if name == "conv_general_dilated" and given[1] is None:
        numbers = params["dimension_numbers"]
        return numbers.out_spec[0] if numbers.lhs_spec[0] == batch else None
    if name in ("slice", "pad", "rev", "sort", "split"):
        kept = name == "rev" and batch not in params["dimensions"]
        kept |= name == "sort" and params["dimension"] != batch
        kept |= name == "split" and params["axis"] != batch
        kept |= name == "pad" and params["padding_config"][batch] == (0, 0, 0)
        kept |= name == "slice" and equation.outvars[0].aval.shape[batch] == first[batch]
        return batch if kept else None
    return None


def _through_product(equation: Any, given: list[int | None]) -> int | str | None:
    """`_through` for `dot_general`."""
    contracted, batches = equation.params["dimension_numbers"]
    ranks = [len(atom.aval.shape) for atom in equation.invars]
    places = []
    for side in (0, 1):
        axis = given[side]
        if axis is None:
            continue
        if axis in contracted[side]:
            shape = equation.invars[side].aval.shape
            return f"sums over the batch (dot_general of shape {shape})"
        if axis in batches[side]:
            places.append(batches[side].index(axis))
            continue
        gone = set(contracted[side]) | set(batches[side])
        before = sum(a not in gone for a in range(axis))
        lhs_free = ranks[0] - len(contracted[0]) - len(batches[0])
        places.append(len(batches[0]) + before + (lhs_free if side else 0))
    if len(places) == 2 and places[0] != places[1]:
        return "multiplies samples with each other (dot_general)"
    return places[0]
