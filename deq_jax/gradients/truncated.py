"""Truncated backpropagation: the gradient of the last k steps of a loop.

Source: the deep recursion of Jolicoeur-Martineau, "Less is more: recursive reasoning with tiny
networks", 2025; truncated backpropagation through time is older (Williams and Peng, 1990).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks
from deq_jax.closure import Closure
from deq_jax.control import Control, Watch
from deq_jax.gradients.policy import refuse_attach, refuse_probe
from deq_jax.passes import LoopBody, ready_to_differentiate
from deq_jax.solve import Carry, Loop, Solver
from deq_jax.stats import BackwardProbe, Solution, Status

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Truncated:
    """Gradient of the last k steps of the solver; the value is the last iterate.

    With N = `max_iter` (or `Control.budget`) and one step T of the solver, for `Picard()` one
    application of f,

        z_{N-k} = stop_gradient(T^{N-k}(z0)),    z = T^k(z_{N-k}),

    and z is differentiated by ordinary backpropagation, in any mode. For loops whose last iterate
    counts and not their equilibrium: recursive reasoning, looped transformers. Set the solver's
    `tol` to 0 for exactly N applications. With a tolerance a sample that has stopped waits, and
    then makes the last k steps with all others, so that their number, where f is given it, is that
    of the slowest sample.

    Bias: with respect to backpropagation through all N steps, the terms that pass through more than
    k of them, of the order of the k-th power of the spectral radius of ∂f/∂z. `Control.select` is
    `"last"`: the reported residual is that of the point before the returned one. A sample that
    becomes NaN or infinite keeps its last finite point and has no gradient. The steps of Anderson
    and Broyden have derivatives of their own, which are rounding noise close to an equilibrium:
    take `Picard`, or `Implicit` where the equilibrium is what counts.

    Cost: N evaluations forwards, k products backwards, and with `remat` k more evaluations. Memory:
    k linearisations of f, or with `remat` k solver states and one linearisation; it does not depend
    on N.

    Attributes:
        steps: k, at least 1 and at most `max_iter`.
        remat: compute each of the k steps again in the backward pass instead of storing what is
            inside of them.

    Raises:
        ValueError, TypeError: a field is out of its range or of the wrong type; `steps` exceeds
            `max_iter`; a `BackwardProbe` or `sample_at` is passed.
    """

    steps: int
    remat: bool = False

    def __post_init__(self) -> None:
        checks.check_count(self, "steps")
        checks.check_flag(self, "remat")

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""
        if self.steps > solver.max_iter:
            raise ValueError(
                f"Truncated.steps must be at most the solver's max_iter = {solver.max_iter}, got "
                f"{self.steps}"
            )

    def solve(
        self,
        f: Closure,
        z0: PyTree,
        solver: Solver,
        control: Control,
        watch: Watch,
        *,
        probe: BackwardProbe | None = None,
        sample_at: tuple[int, ...] = (),
        **options: Any,
    ) -> Solution:
        """See `GradientPolicy`."""
        refuse_probe(self, probe)
        if sample_at:
            raise ValueError("gradient=Truncated(...) has no gradient for sample_at; leave it out")
        control = dataclasses.replace(control, select="last")

        # z_{N-k}, without derivatives.
        body = LoopBody(lax.stop_gradient(f))
        loop = Loop(body, solver, control, watch, leave=self.steps, **options)
        carry = lax.while_loop(
            loop.proceed, lambda carry: loop.body(body, None, carry), loop.begin(z0, None)
        )
        # Samples that had stopped go on with the others.
        status = jnp.where(carry.status == int(Status.DIVERGED), carry.status, int(Status.MAX_ITER))
        carry = lax.stop_gradient(carry._replace(status=status))

        # k steps with derivatives. Only the last asks whether a sample has converged.
        if not getattr(solver, "linearizes", False):  # its products are forward mode
            f = ready_to_differentiate(f)
        loop = Loop(f, solver, control, watch, differentiable=True, **options)

        def step(carry: Carry, index: jax.Array) -> tuple[Carry, None]:
            last = index == self.steps - 1
            if watch.budget is None:
                return loop.trip(f, None, carry, stops=last), None
            # A budget below k leaves no room for all of them.
            skipped = self.steps - index > loop.limit
            return lax.cond(
                skipped, lambda carry: carry, lambda carry: loop.trip(f, None, carry, last), carry
            ), None

        if self.remat:
            step = jax.checkpoint(step, prevent_cse=False)
        carry, _ = lax.scan(step, carry, jnp.arange(self.steps, dtype=jnp.int32))
        return loop.finish(carry)

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> Any:
        """Raises: a solution alone does not say how it was found."""
        refuse_attach(self)
