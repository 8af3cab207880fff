"""f and all that it uses, as one pytree.

`close` traces f once and makes a `Closure` of it: a function of the state alone whose arrays
(`params`, `x` and whatever f closes over) are leaves and whose program is static. A closure can be
passed to `jit`, `jvp`, `vmap` and custom rules like any other argument, and all that comes after
(the solve, the linearisation, the passes) works on the one trace.

The idea of functions as pytrees is that of Equinox (`filter_closure_convert`); here the state is
the only argument, and programs are equal where their operations are.
"""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from deq_jax import _compat, checks, draws, kept, tree
from deq_jax.mixing import check_apart
from deq_jax.precision import cast, cast_like
from deq_jax.program import Program

PyTree = Any
Cell = Callable[[Any, Any, Any], Any]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays", "parts"],
    meta_fields=["program", "key_impls", "takes_step", "check_every", "split_axes"],
)
@dataclasses.dataclass(frozen=True, eq=False)
class Closure:
    """A function of the state, with the arrays it uses as leaves.

    Attributes:
        arrays: the arrays that the function closes over.
        program: the operations of the function, without the arrays.
        key_impls: for each array that holds random keys their implementation, else None.
        parts: the same function for fewer samples, sizes decreasing. They too hold the arrays of
            all samples, until `at` picks those of some.
        takes_step: it is a function of the pair of the number of the evaluation, int32 `[B]`, and
            the state, until `bound` sets the number.
        check_every: see `Execution`.
        split_axes: mesh axes along which devices hold parts of the same samples.
    """

    arrays: tuple[Any, ...]
    program: Program
    key_impls: tuple[Any, ...]
    parts: tuple["Closure", ...] = ()
    takes_step: bool = False
    check_every: int = 1
    split_axes: tuple[str, ...] = ()

    differentiable: ClassVar[bool] = True

    @classmethod
    def of(cls, function: Callable[[PyTree], PyTree], z: PyTree) -> "Closure":
        """Traces a function of the state at the shapes of `z`."""
        jaxpr, arrays, out_tree = _compat.trace(function, z)
        return cls.around(arrays, jaxpr, out_tree)

    @classmethod
    def around(cls, arrays: Sequence[Any], *program: Any) -> "Closure":
        """The closure of a program, given as the arguments of `Program`, over these arrays.

        Random keys are kept as the numbers they are made of. f draws the same from a key in every
        evaluation, which is meant, and which `jax.debug_key_reuse` would take for a mistake.
        """
        impls = tuple(jax.random.key_impl(a) if _is_key(a) else None for a in arrays)
        data = (
            a if i is None else jax.random.key_data(a) for a, i in zip(arrays, impls, strict=True)
        )
        return cls(tuple(data), Program(*program), impls)

    def __call__(self, z: PyTree) -> PyTree:
        """The function at `z`, differentiable in `arrays` and `z`."""
        return self.program(*self.values(), *jax.tree.leaves(z))

    def bound(self, step: jax.Array | None) -> "Closure":
        """The function of the state alone, for evaluations of these numbers, int32 `[B]`."""
        if step is None or not self.takes_step:
            return self
        return dataclasses.replace(
            self,
            arrays=(*self.arrays, step),
            program=self.program.with_array(per_sample=True),
            key_impls=(*self.key_impls, None),
            parts=tuple(part.bound(step) for part in self.parts),
            takes_step=False,
        )

    def output(self, index: int) -> "Closure":
        """The function that returns only the item `index` of the tuple that this one returns."""
        program = self.program.output(index)
        parts = tuple(part.output(index) for part in self.parts)
        return dataclasses.replace(self, program=program, parts=parts)

    def values(self) -> list[Any]:
        """The arrays as the program takes them, random keys as keys."""
        return [
            a if i is None else jax.random.wrap_key_data(a, impl=i)
            for a, i in zip(self.arrays, self.key_impls, strict=True)
        ]

    def used(self) -> list[Any]:
        """The arrays that the program reads and that can have a derivative."""
        jaxpr = self.program.jaxpr
        read = {v for e in jaxpr.eqns for v in e.invars if isinstance(v, _compat.Var)}
        read.update(v for v in jaxpr.outvars if isinstance(v, _compat.Var))
        pairs = zip(self.arrays, jaxpr.invars, strict=False)
        return [array for array, v in pairs if v in read and _is_inexact(array)]

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Names of the axes over which it communicates."""
        return self.program.mesh_axes

    @property
    def state_axes(self) -> frozenset[str]:
        """The mesh axes of a `shard_map` over which the state varies."""
        state = self.program.jaxpr.invars[len(self.arrays) :]
        return frozenset().union(*map(_compat.varying_axes_of, state))

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.program.jaxpr.invars[-1].aval.shape[0]

    @property
    def mixes(self) -> bool:
        """Whether f can be seen to mix the samples of the batch."""
        return self.program.mixes

    def at(self, index: jax.Array) -> "Closure":
        """The function for the samples `index` `[n]`, where `self` is one of `parts`."""
        pairs = zip(self.arrays, self.program.per_sample, strict=True)
        arrays = tuple(tree.take(a, index) if mine else a for a, mine in pairs)
        return dataclasses.replace(self, arrays=arrays)

    def linearize(self, z: PyTree) -> tuple[PyTree, "Closure"]:
        """`f(z)`, and the product `v -> J v` with J = ∂f/∂z there."""
        if self.takes_step:
            step, z = z
            return self.bound(step).linearize(z)
        if not self.program.reverse_only:
            fz, push = jax.linearize(self, z)
            return fz, Closure.of(push, z)
        # J v is the transpose of the linear map u -> Jᵀ u.
        fz, pullback = jax.vjp(self, z)
        _, push = jax.vjp(lambda u: pullback(u)[0], z)
        return fz, Closure.of(lambda v: push(v)[0], z)

    def product(self, z: PyTree, transposed: bool) -> "Closure":
        """The product `v -> J v`, or `u -> Jᵀ u`, with J = ∂f/∂z at `z`."""
        if not transposed:
            return self.linearize(z)[1]
        _, pullback = jax.vjp(self, z)
        return Closure.of(lambda u: pullback(u)[0], z)

    def inexact(self) -> list[bool]:
        """For each leaf, whether it can have a derivative."""
        return [_is_inexact(leaf) for leaf in jax.tree.leaves(self)]

    def variables(
        self, chosen: Sequence[bool] | None = None
    ) -> tuple[list[Any], Callable[..., Any]]:
        """The arrays with derivatives, or those `chosen`, and a function that puts others there."""
        leaves, structure = jax.tree.flatten(self)
        chosen = self.inexact() if chosen is None else chosen

        def rebuild(variables: Sequence[Any]) -> "Closure":
            given = iter(variables)
            pairs = zip(leaves, chosen, strict=True)
            new = (next(given) if mine else leaf for leaf, mine in pairs)
            return jax.tree.unflatten(structure, new)

        return [leaf for leaf, mine in zip(leaves, chosen, strict=True) if mine], rebuild


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(jax.dtypes.result_type(value), jax.dtypes.prng_key)


@functools.partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["value"])
@dataclasses.dataclass(frozen=True)
class Static:
    """A hashable value as a pytree without leaves."""

    value: Any


class Held:
    """Any pytree as one whose leaves are arrays; functions, strings and objects in it are static.

    Attributes:
        arrays: the leaves that are arrays.
    """

    def __init__(self, value: PyTree):
        leaves, structure = jax.tree.flatten(value)
        self.arrays = [leaf for leaf in leaves if checks.is_array(leaf)]
        others = (None if checks.is_array(leaf) else _Object(leaf) for leaf in leaves)
        self._static = structure, tuple(others)

    @property
    def value(self) -> PyTree:
        """The pytree."""
        structure, others = self._static
        arrays = iter(self.arrays)
        leaves = (next(arrays) if other is None else other.value for other in others)
        return jax.tree.unflatten(structure, leaves)

    @property
    def is_certain(self) -> bool:
        """Whether all that is static can be told from something else later."""
        return all(other is None or other.contents is not None for other in self._static[1])

    def _flatten(self) -> tuple[list[Any], Any]:
        return self.arrays, self._static

    @classmethod
    def _unflatten(cls, static: Any, arrays: Sequence[Any]) -> "Held":
        held = object.__new__(cls)
        held._static, held.arrays = static, list(arrays)
        return held


jax.tree_util.register_pytree_node(Held, Held._flatten, Held._unflatten)


class _Object:
    """An object in a static place; equal to another if both certainly hold the same."""

    def __init__(self, value: Any):
        self.value = value
        self.contents = kept.contents(value)

    def __hash__(self) -> int:
        return hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        same = isinstance(other, _Object) and self.contents == other.contents
        return same and self.contents is not None


def close(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    *,
    batched: bool = True,
    cell_dtype: Any = None,
    has_aux: bool = False,
    pass_step: bool = False,
    sizes: Sequence[int] = (),
    value_only: bool = False,
    shard_axes: tuple[str, ...] = (),
) -> Closure:
    """Traces `z -> f(params, z, x)` and checks that f returns the form of z.

    With `batched=False` the closure takes and returns z with a batch axis of length 1, so that
    everything behind it has only one case.

    Args:
        f: the cell.
        params: its parameters.
        x: its input.
        z: the state, leaves `[B, ...]` (`[...]` with `batched=False`).
        batched: axis 0 is the batch.
        cell_dtype: give f the floating leaves of z in this dtype, and cast the value of f back.
            The caller casts params and x.
        has_aux: f returns a pair `(z, aux)`, and so does the closure.
        pass_step: f takes the number of the evaluation as a fourth argument; see
            `Closure.takes_step`.
        sizes: also trace f for these numbers of samples, as `Closure.parts`.
        value_only: see `Program`.
        shard_axes: mesh axes over whose shards the batch is split: random numbers are drawn as for
            the whole batch.

    Raises:
        ValueError: f returns another structure, shape or dtype; names the leaf, got and expected.
            Or f fails on fewer samples.
    """
    if not callable(f):
        raise TypeError(f"f must be a function f(params, z, x), got {f!r}")
    for argument, value in (("params", params), ("x", x)):
        for name, leaf in checks.named_leaves(value):
            if isinstance(leaf, Iterator):
                kind = type(leaf).__name__
                raise TypeError(f"leaf {name} of {argument} is a {kind}; make a list of its items")
    held = Held((params, x))
    start = z if batched else add_batch_axis(z)

    def function(arguments: Held, step: jax.Array | None, z: PyTree) -> PyTree:
        params, x = arguments.value
        if batched:
            return call_checked(f, params, z, x, step, cell_dtype, has_aux)
        step = None if step is None else step[0]
        fz = call_checked(f, params, drop_batch_axis(z), x, step, cell_dtype, has_aux)
        return (add_batch_axis(fz[0]), fz[1]) if has_aux else add_batch_axis(fz)

    def widen(arguments: Held, step: jax.Array | None, z: PyTree) -> tuple[PyTree, ...]:
        params, x = arguments.value
        x, step, z = draws.repeated((Held(x), step, z), shard_axes)
        return Held((params, x.value)), step, z

    drawn = draws.as_on_one_device(function, widen, shard_axes) if shard_axes else function

    def traced(arguments: Held, z: PyTree, *, casts: bool = False) -> Any:
        step = tree.zeros_per_sample(z).astype(jnp.int32) if pass_step else None

        def varying(arguments: Held, step: jax.Array | None, z: PyTree) -> PyTree:
            value = drawn(arguments, step, z)
            fz, *aux = value if has_aux else (value,)
            fz = tree.vary_over(fz, tree.varying_axes(z))
            return (fz, *aux) if has_aux else fz

        options = f, batched, cell_dtype, has_aux, casts, shard_axes
        return _trace(varying if casts else drawn, options, arguments, step, z)

    def closed(arguments: Held, z: PyTree) -> Closure:
        jaxpr, captured, out_tree = _trace_over_mesh(traced, arguments, z)
        arrays = (*captured, *arguments.arrays)
        shared = len(arrays) - len(Held(x).arrays)
        per_sample = tuple(batched and i >= shared for i in range(len(arrays)))
        found = Closure.around(arrays, jaxpr, out_tree, per_sample, value_only)
        return dataclasses.replace(found, takes_step=pass_step)

    whole = closed(held, start)
    start = tree.vary_over(start, whole.state_axes)
    parts = tuple(_closed_for(closed, params, x, start, size, sizes[-1]) for size in sizes)
    for part in parts:
        _check_uses(whole, part, sizes[-1])
        of_state = len(whole.program.jaxpr.invars) - len(whole.arrays)
        inputs = (*whole.program.per_sample, *[True] * of_state)
        check_apart(whole.program.jaxpr, part.program.jaxpr, inputs, sizes[-1])
    return dataclasses.replace(whole, parts=parts, split_axes=tree.split_axes())


def _closed_for(
    closed: Callable[[Held, PyTree], Closure],
    params: PyTree,
    x: PyTree,
    z: PyTree,
    size: int,
    shrink_to: int,
) -> Closure:
    """The closure for `size` samples, to which `Closure.at` gives theirs."""
    batch = jax.tree.leaves(z)[0].shape[0]
    # An index made from z, as in the loop, so that mesh axes vary as they will there.
    index = tree.zeros_per_sample(z)[:size].astype(jnp.int32)
    try:
        part = closed(Held((params, tree.take(x, index))), tree.take(z, index))
    except Exception as error:
        raise ValueError(
            f"Execution(shrink_to={shrink_to}): f on {size} of the {batch} samples fails. It must "
            "treat each sample by itself, at any batch size; what belongs to a sample, like a mask "
            "`[B, ...]`, has to come in z or x, which are gathered, and not in params or a "
            f"closure. The error: {error}"
        ) from error
    # The samples of x are gathered in the loop, from all of x.
    inputs = Held(x).arrays
    arrays = [*part.values()[: len(part.arrays) - len(inputs)], *inputs]
    program = part.program
    rest = program.jaxpr, program.out_tree, program.per_sample, program.value_only
    return dataclasses.replace(Closure.around(arrays, *rest), takes_step=part.takes_step)


def _check_uses(whole: Closure, part: Closure, shrink_to: int) -> None:
    """Raises if f uses an array for fewer samples that it does not use for all of them."""
    used = {id(array) for array in whole.used()}
    for array in part.used():
        if id(array) not in used:
            raise ValueError(
                f"Execution(shrink_to={shrink_to}): f on {part.size} of the {whole.size} samples "
                f"uses an array {jax.typeof(array)} that it does not use on all samples"
            )


def _trace_over_mesh(traced: Callable[..., Any], arguments: Held, z: PyTree) -> Any:
    """`traced(arguments, z)`, with z varying over the same mesh axes of a `shard_map` as f(z).

    They are the axes of all that f uses, without those that f sums away: with w split over the axis
    `model`, `tanh(psum(z @ w, "model"))` is the same on all devices along it.
    """
    if not _compat.manual_axes():
        return traced(arguments, z)

    def value_axes(found: Any) -> list[frozenset[str]]:
        outputs = found[0].outvars[: len(jax.tree.leaves(z))]
        return [_compat.varying_axes_of(atom) for atom in outputs]

    own = tree.varying_axes(z)
    axes = own | tree.varying_axes(arguments)
    found = traced(arguments, tree.vary_over(z, axes))
    # Along an axis over which f communicates, f(z) may vary only because z was made to.
    communicates = axes.intersection(_compat.mesh_axes(found[0])) - own
    if communicates:
        try:
            found = traced(arguments, tree.vary_over(z, axes - communicates))
            axes -= communicates
        except TypeError:
            pass  # f has a loop, whose carry has to vary as the arrays that it meets
    while (needed := own.union(*value_axes(found))) != axes:
        axes = needed
        found = traced(arguments, tree.vary_over(z, axes))
    if set(value_axes(found)) != {axes}:
        found = traced(arguments, tree.vary_over(z, axes), casts=True)
    return found


_traces: dict[Hashable, tuple[Hashable, Any]] = {}
_MOST_TRACES = 256


def _trace(function: Callable[..., PyTree], source: tuple[Any, ...], *args: PyTree) -> Any:
    """`_compat.trace(function, *args)`, found again where f certainly does the same as before.

    Nothing is kept of an f that closes over arrays, so that none is kept alive.
    """
    if _compat.caches_were_cleared():
        _traces.clear()
    f, *options = source
    leaves, structure = jax.tree.flatten(args)
    code = getattr(f, "__code__", type(f))
    avals = tuple(map(jax.typeof, leaves))
    key = (code, str(options), structure, avals, _compat.trace_context())
    before, traced = _traces.get(key, (None, None))
    if before is not None and before == kept.contents(f):
        return traced
    traced = _compat.trace(function, *args)
    holds = kept.contents(f)  # after the trace, which may count itself, say
    if holds is not None and not traced[1]:
        if len(_traces) >= _MOST_TRACES:
            _traces.pop(next(iter(_traces)))
        _traces[key] = holds, traced
    return traced


def call_checked(
    f: Callable[..., PyTree],
    params: PyTree,
    z: PyTree,
    x: PyTree,
    step: jax.Array | None = None,
    cell_dtype: Any = None,
    has_aux: bool = False,
) -> PyTree:
    """`f(params, z, x)`, with z given in `cell_dtype` and the value cast back to the dtypes of z.

    Args:
        f: the cell.
        params: its parameters.
        z: the state.
        x: the input.
        step: a fourth argument of f, unless None.
        cell_dtype: see `close`.
        has_aux: see `close`.

    Raises:
        ValueError: f returns something else than it was given.
        TypeError: f returns no pair although it `has_aux`.
    """
    given = cast(z, cell_dtype)
    value = f(params, given, x) if step is None else f(params, given, x, step)
    if has_aux and (not isinstance(value, tuple) or len(value) != 2):
        raise TypeError(
            f"with has_aux=True f must return a pair (z, aux), got a {type(value).__name__}"
        )
    fz, aux = value if has_aux else (value, None)
    remedy = "; cast what f returns, or start from a z0 of that dtype"
    if cell_dtype is not None:
        remedy = (
            f"; f is given params, z and x in Execution.cell_dtype={cell_dtype}, and has to cast "
            "the arrays it closes over"
        )
    checks.check_same_form("f must return", "z", fz, given, remedy)
    fz = fz if cell_dtype is None else cast_like(fz, z)
    return (fz, aux) if has_aux else fz


def initial_state(x: PyTree, z0: PyTree | None, batched: bool, name: str = "z0") -> PyTree:
    """The checked start of a solve, as arrays: `z0`, or zeros shaped like `x`.

    Messages call it `name`.

    Raises:
        TypeError: a leaf is neither floating nor complex.
        ValueError: no leaves, no batch axis, batch axes that disagree, or an empty batch.
    """
    origin = name if z0 is not None else "x (z0 was left out, so z starts as zeros shaped like x)"
    source = x if z0 is None else z0
    sizes = {}
    for path, leaf in checks.named_leaves(source):
        label = f"leaf {path} of {origin}"
        if not checks.is_array(leaf) or not _is_inexact(leaf):
            kind = jnp.result_type(leaf) if checks.is_array(leaf) else type(leaf).__name__
            raise TypeError(
                f"{label} has dtype {kind}, but a state must be floating or complex"
                + ("; pass z0" if z0 is None else "")
            )
        shape = jnp.shape(leaf)
        if batched and not shape:
            raise ValueError(f"{label} is a scalar without a batch axis; pass batched=False")
        sizes[label] = shape[0] if batched else None
    if not sizes:
        raise ValueError(f"{origin} has no leaves; the state needs at least one array")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"axis 0 must be the same batch in every leaf of the state, got {sizes}")
    if 0 in sizes.values():
        raise ValueError(f"the batch is empty: axis 0 of {next(iter(sizes))} has length 0")
    if z0 is None:
        return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=jnp.result_type(leaf)), x)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.result_type(leaf)), z0)


def _is_inexact(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def add_batch_axis(z: PyTree) -> PyTree:
    """A batch of one."""
    return jax.tree.map(lambda leaf: leaf[None], z)


def drop_batch_axis(z: PyTree) -> PyTree:
    """The only sample of a batch of one."""
    return jax.tree.map(lambda leaf: leaf[0], z)
