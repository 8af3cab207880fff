"""What a solve reports: one status a sample, and the numbers behind it."""

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Status(enum.IntEnum):
    """How a sample's solve ended; arrays of statuses hold these integers."""

    CONVERGED = 0
    """The residual is at or below the tolerance."""
    MAX_ITER = 1
    """The evaluations were used up first; the iterate with the lowest residual was returned."""
    DIVERGED = 2
    """f returned a NaN or an infinity; the best finite iterate seen before was returned."""


class SolveStats(NamedTuple):
    """Report of a fixed-point solve. With `batched=False` the axis `[B]` is absent.

    Attributes:
        residual: `[B]`, relative residual `‖f(z) - z‖ / (ε + ‖f(z)‖)` of exactly the returned z;
            infinite where no evaluation was finite. Statistics carry no gradient.
        iterations: `[B]` int32, evaluations until the sample stopped.
        status: `[B]` int32, values of `Status`.
        evaluations: int32, how often f was evaluated on the batch; the largest of `iterations`.
        trace: `[max_iter, B]`, the residual at each evaluation, NaN after the sample's stop;
            None unless the solver has `trace=True`.
        products: int32, how often a Jacobian-vector product was computed on the batch, apart from
            the evaluations; None for solvers that use none.
        step: `[B]` int32, the number, counted from 0, of the evaluation at which the returned z
            was the argument of f; None unless f is given such numbers.
        fold: what `Control.fold` came to; None without.
    """

    residual: jax.Array
    iterations: jax.Array
    status: jax.Array
    evaluations: jax.Array
    trace: jax.Array | None = None
    products: jax.Array | None = None
    step: jax.Array | None = None
    fold: Any = None

    @property
    def converged(self) -> jax.Array:
        """`[B]` boolean: the sample met its tolerance."""
        return self.status == Status.CONVERGED

    def single(self) -> "SolveStats":
        """The report of a batch of one without its batch axis."""
        return self._replace(
            residual=self.residual[0],
            iterations=self.iterations[0],
            status=self.status[0],
            trace=None if self.trace is None else self.trace[:, 0],
            step=None if self.step is None else self.step[0],
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Solution:
    """What every solve returns. `value, stats = solution` takes the first two.

    Attributes:
        value: the state, a pytree like `z0`.
        stats: the report.
        samples: the states at the evaluations asked for, a tuple of pytrees like `value`.
        state: what the solver remembers at the end; None where the solve does not give it away.
        aux: what f returns beside z, at `value`; None unless f has such.
        sample_steps: `stats.step` of each sample, where f is given numbers and this is inside of a
            solve.
    """

    value: Any
    stats: SolveStats
    samples: tuple[Any, ...] = ()
    state: Any = None
    aux: Any = None
    sample_steps: tuple[Any, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.value, self.stats))


class BackwardProbe(NamedTuple):
    """A dummy input whose *cotangent* is the report of the backward solve.

    A backward pass returns nothing but cotangents, so its report travels as one:

        probe = BackwardProbe.zeros(batch)
        gradients, report = jax.grad(loss, argnums=(0, 1))(params, probe)

    where `loss` hands the probe to `deq_fixed_point(..., backward_probe=probe)`. The value of the
    probe is never read. Give each solve a probe of its own: the cotangents of a probe that was
    used twice are added.

    Attributes:
        residual: `[B]` float32, `‖Jᵀu + y - u‖ / ‖y‖` of the returned u, y the incoming cotangent.
        iterations: `[B]` float32, transposed products until the sample stopped.
        status: `[B]` float32, values of `Status`.
        evaluations: float32, how often the transposed product was computed.
    """

    residual: jax.Array
    iterations: jax.Array
    status: jax.Array
    evaluations: jax.Array

    @classmethod
    def zeros(cls, batch: int | None = None) -> "BackwardProbe":
        """A probe for a batch of `batch` samples; None for a solve with `batched=False`."""
        shape = () if batch is None else (batch,)
        per_sample = np.zeros(shape, np.float32)
        return cls(*(jnp.asarray(a) for a in (*[per_sample] * 3, np.zeros((), np.float32))))

    @classmethod
    def of(cls, stats: SolveStats) -> "BackwardProbe":
        """The report `stats` in the form of a probe's cotangent."""
        total = stats.evaluations
        if stats.products is not None:
            total = total + stats.products
        fields = (stats.residual, stats.iterations, stats.status, total)
        return cls(*(field.astype(jnp.float32) for field in fields))
