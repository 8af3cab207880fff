"""When a solve goes on, what it measures, and which iterate it returns."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deq_jax import checks, tree
from deq_jax.closure import Closure, drop_batch_axis

PyTree = Any
Norm = Literal["l2", "max", "rms"] | Callable[[Any], jax.Array]
"""A norm per sample: a name, or a function of a state `[B, ...]` that returns `[B]`."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["function", "init"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Fold:
    """A function that is folded over the evaluations of a solve, and where it begins."""

    function: Callable[[Any, Any, Any, Any], Any]
    init: PyTree


@checks.register_options(data=("budget", "norm", "scales", "stop", "fold"))
@dataclasses.dataclass(frozen=True)
class Control:
    """When a solve goes on, what it measures, and which iterate it returns.

    A sample stops when its residual

        r = ‖(f(z) - z) / s‖ / (ε + ‖f(z) / s‖)

    is at most the solver's `tol`, or when `stop(z, f(z), aux)` says so. Norm and scales s are those
    given here; the solver's `atol` bounds the numerator. The functions given here may close over
    arrays, traced ones too. No gradient flows through them.

    With `batched=False` the functions get states without a batch axis, and return scalars.

    Attributes:
        budget: most evaluations of f, at most the solver's `max_iter`; a Python integer or a traced
            one, which is clipped to that range. It is an input of the compiled program, so that one
            program serves every depth. None is `max_iter`.
        min_iter: no sample stops as converged before this many evaluations.
        norm: `"l2"` is the Euclidean norm over all entries of a sample, `"max"` the largest
            magnitude, `"rms"` the root of the mean square; or a function that takes a state, leaves
            `[B, ...]`, and returns norms `[B]`. The backward solve keeps the Euclidean norm.
        scales: s, a pytree like the state, of numbers or of arrays that broadcast against its
            leaves: the size at which a difference counts, for leaves of different units. None is 1.
        stop: `stop(z, fz, aux)` returns a boolean `[B]`, the samples that may stop (as `CONVERGED`)
            whatever their residual is. `aux` is what f returns beside z with `has_aux=True`, and
            otherwise None.
        fold: a pair `(function, init)`. `function(carry, z, fz, aux)` is called with each
            evaluation, on the whole batch, stopped samples included, and returns the next carry, a
            pytree of the shapes and dtypes of `init`. The last one is `stats.fold`.
        select: `"best"` returns each sample's iterate with the lowest residual. `"last"` returns
            the point that the solver proposed after its last evaluation, which is f(z) for
            `Picard()`: after N evaluations a loop of N applications. The reported residual is then
            that of the point before, since f was not evaluated on this one. A stopped sample never
            wakes up then.

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; the message names
            it. In the solve: `budget` or `min_iter` is larger than `max_iter`; a function returns
            something else than described.

    Example:
        >>> import jax.numpy as jnp
        >>> from deq_jax import Control, Picard, deq_fixed_point
        >>> f = lambda a, z, x: a * z + x
        >>> control = Control(budget=3, select="last")
        >>> deq_fixed_point(f, 0.5, jnp.ones((1, 1)), solver=Picard(tol=0), control=control)
        Array([[1.75]], dtype=float32)
    """

    budget: Any = None
    min_iter: int = 1
    norm: Norm = "l2"
    scales: PyTree = None
    stop: Callable[[Any, Any, Any], jax.Array] | None = None
    fold: Any = None
    select: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        if self.budget is not None:
            _check_budget(self.budget)
        checks.check_count(self, "min_iter")
        if not (callable(self.norm) or self.norm in ("l2", "max", "rms")):
            raise ValueError(
                f'Control.norm must be "l2", "max", "rms" or a function, got {self.norm!r}'
            )
        if self.select not in ("best", "last"):
            raise ValueError(f'Control.select must be "best" or "last", got {self.select!r}')
        if self.stop is not None and not callable(self.stop):
            raise TypeError(f"Control.stop must be a function stop(z, fz, aux), got {self.stop!r}")
        if self.fold is not None and not isinstance(self.fold, Fold):
            pair = self.fold
            if not isinstance(pair, tuple | list) or len(pair) != 2 or not callable(pair[0]):
                raise TypeError(f"Control.fold must be a pair (function, init), got {pair!r}")
            object.__setattr__(self, "fold", Fold(*pair))

    def check(self, max_iter: int) -> None:
        """Raises a ValueError if a bound is larger than the solver's `max_iter`."""
        for name in ("budget", "min_iter"):
            value = getattr(self, name)
            if isinstance(value, int) and value > max_iter:
                raise ValueError(
                    f"Control.{name} must be at most the solver's max_iter = {max_iter}, got "
                    f"{value}; give the solver a larger max_iter"
                )

    def without_functions(self) -> "Control":
        """The static part, which a `Watch` does not hold."""
        plain = self.is_local and self.budget is None and self.norm == "l2"
        return self if plain else Control(min_iter=self.min_iter, select=self.select)

    @property
    def watches(self) -> bool:
        """Whether it needs what f returns beside z in each evaluation."""
        return self.stop is not None or self.fold is not None

    @property
    def is_local(self) -> bool:
        """Whether it holds no function of the whole batch and no scales of its shape."""
        return not (self.watches or callable(self.norm)) and self.scales is None


def _check_budget(budget: Any) -> None:
    if isinstance(budget, bool) or not checks.is_array(budget):
        raise TypeError(f"Control.budget must be an integer, got {budget!r}")
    if np.shape(budget) != () or not jnp.issubdtype(jnp.result_type(budget), jnp.integer):
        raise TypeError(
            f"Control.budget must be an integer scalar, got {jnp.result_type(budget)} of shape "
            f"{np.shape(budget)}"
        )
    if isinstance(budget, int) and budget < 1:
        raise ValueError(f"Control.budget must be at least 1, got {budget}")


class Watch(NamedTuple):
    """A `Control` with its functions traced: a pytree of arrays, for a loop.

    Attributes:
        budget: int32, most evaluations; None for `max_iter`.
        norm: `z -> [B]`, from differences divided by the scales; None for the Euclidean norm.
        stop: `(z, fz, aux) -> [B]` boolean.
        fold: `(carry, z, fz, aux) -> carry`.
        init: the first carry.
    """

    budget: jax.Array | None = None
    norm: Closure | None = None
    stop: Closure | None = None
    fold: Closure | None = None
    init: PyTree = None

    @classmethod
    def of(cls, control: Control, z: PyTree, aux: PyTree, batched: bool) -> "Watch":
        """Traces the functions of `control`.

        Args:
            control: the functions.
            z: the state, leaves `[B, ...]`, with a batch axis in any case.
            aux: what f returns beside z, or its shapes; None without.
            batched: False gives the functions states without the batch axis.

        Raises:
            ValueError: a function returns something else than `Control` says.
        """
        budget = None if control.budget is None else jnp.asarray(control.budget, jnp.int32)
        norm, stop, fold, init = None, None, None, None
        batch = jax.tree.leaves(z)[0].shape[0]

        def seen(states: PyTree) -> PyTree:
            return states if batched else drop_batch_axis(states)

        def per_sample(value: Any, name: str, kind: Any) -> jax.Array:
            wanted = (batch,) if batched else ()
            if np.shape(value) != wanted or not jnp.issubdtype(jnp.result_type(value), kind):
                raise ValueError(
                    f"Control.{name} must return {'one value a sample' if batched else 'a scalar'} "
                    f"of kind {kind.__name__}, shape {wanted}: got {jnp.result_type(value)} of "
                    f"shape {np.shape(value)}"
                )
            return jnp.reshape(value, (batch,))

        measure = _named_norm(control.norm)
        if measure is not None or control.scales is not None:

            def scaled_norm(z: PyTree) -> jax.Array:
                if control.scales is not None:
                    z = seen(z)
                    z = jax.tree.map(_divide, z, _scales_like(control.scales, z))
                    z = z if batched else jax.tree.map(lambda leaf: leaf[None], z)
                if measure is None:
                    return tree.safe_norm(z)
                if callable(control.norm):
                    return per_sample(measure(seen(z)), "norm", jnp.floating)
                return measure(z)

            norm = Closure.of(scaled_norm, z)
        if control.stop is not None:
            decide = control.stop

            def stops(evaluation: tuple[PyTree, PyTree, PyTree]) -> jax.Array:
                z, fz, aux = evaluation
                return per_sample(decide(seen(z), seen(fz), aux), "stop", jnp.bool_)

            stop = Closure.of(stops, (z, z, aux))
        if control.fold is not None:
            combine, init = control.fold.function, control.fold.init
            init = jax.tree.map(jnp.asarray, init)

            def folds(evaluation: tuple[PyTree, PyTree, PyTree, PyTree]) -> PyTree:
                carry, z, fz, aux = evaluation
                new = combine(carry, seen(z), seen(fz), aux)
                checks.check_same_form("Control.fold must return", "its init", new, carry)
                return new

            fold = Closure.of(folds, (init, z, z, aux))
        return jax.lax.stop_gradient(cls(budget, norm, stop, fold, init))

    def measure(self, z: PyTree, fz: PyTree) -> tuple[jax.Array, jax.Array]:
        """`‖(f(z) - z) / s‖` and `‖f(z) / s‖`, `[B]`, where there is a norm."""
        assert self.norm is not None
        return self.norm(tree.subtract(fz, z)), self.norm(fz)


def _named_norm(norm: Norm) -> Callable[[PyTree], jax.Array] | None:
    """The norm of each sample; None for the Euclidean one."""
    if norm == "l2":
        return None
    if norm == "max":
        return tree.largest
    if norm == "rms":
        return lambda z: tree.safe_norm(z) / np.sqrt(tree.unknowns(z))
    return norm


def _divide(leaf: jax.Array, scale: jax.Array) -> jax.Array:
    return leaf.astype(scale.dtype) / scale


def _scales_like(scales: PyTree, z: PyTree) -> PyTree:
    """The scales in the dtypes of the leaves of `z`; checks that they fit."""
    structures: list[Any] = [jax.tree.structure(scales), jax.tree.structure(z)]
    if structures[0] != structures[1]:
        raise ValueError(
            f"Control.scales must have the structure of the state: got {structures[0]}, "
            f"expected {structures[1]}"
        )

    def cast(name: str, scale: Any, leaf: jax.Array) -> jax.Array:
        shape = np.shape(scale)
        fits = len(shape) <= leaf.ndim and all(
            n in (1, m) for n, m in zip(shape[::-1], leaf.shape[::-1], strict=False)
        )
        if not fits:
            raise ValueError(
                f"Control.scales must broadcast against the state: leaf {name} has shape {shape}, "
                f"the state's leaf {leaf.shape}"
            )
        return jnp.asarray(scale, tree.working_dtype(leaf.dtype))

    names = [name for name, _ in checks.named_leaves(scales)]
    leaves = map(cast, names, jax.tree.leaves(scales), jax.tree.leaves(z))
    return jax.tree.unflatten(jax.tree.structure(z), leaves)
