"""The unrolled phantom gradient: backpropagation through a few damped steps from the solution.

Source: Geng et al., "On training implicit models", 2021.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.checks import Real
from deq_jax.closure import Closure
from deq_jax.gradients.policy import refuse_probe
from deq_jax.passes import LoopBody
from deq_jax.solve import Solver
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@checks.register_options
@dataclasses.dataclass(frozen=True)
class Phantom:
    """Gradient of k damped steps `z_{t+1} = (1 - τ) z_t + τ f(params, z_t, x)` from `z_0 = z*`.

    The gradient is that of z_k, the value stays z*. At an exact solution it equals
    `Neumann(k, τ)`; where the solver stopped early it sees f along the way instead of at one
    point. Bias: as for `Neumann`, the terms beyond k, of the order of the k-th power of the
    spectral radius of `(1 - τ) I + τ J`.

    Cost: k products and k linearisations. No step is stored: each is computed again from z* when
    its turn comes, which makes k (k - 1) / 2 evaluations more, and memory does not depend on k.

    For first derivatives in reverse mode.

    Attributes:
        steps: k, at least 1.
        damping: τ in (0, 1].

    Raises:
        ValueError, TypeError: a field is out of its range or no number; the message names it. Also
            a ValueError if a `BackwardProbe` is passed: there is no linear solve to report on.
    """

    steps: int = 5
    damping: Real = 0.5

    def __post_init__(self) -> None:
        checks.check_count(self, "steps")
        checks.check_number(self, "damping", above=0.0, at_most=1.0)

    def check(self, solver: Solver) -> None:
        """See `GradientPolicy`."""

    def attach(
        self, f: Closure, solution: Solution, *, solver: Solver, probe: BackwardProbe | None
    ) -> PyTree:
        """See `GradientPolicy`."""
        refuse_probe(self, probe)
        f = dataclasses.replace(f, parts=())
        return _stepped(f, solution.value, self)


@jax.custom_vjp
def _stepped(f: Closure, z: PyTree, policy: Phantom) -> PyTree:
    return z


def _stepped_forward(f: Closure, z: PyTree, policy: Phantom) -> Any:
    return z, (f, z, policy)


def _stepped_backward(saved: Any, cotangent: PyTree) -> Any:
    f, z, policy = saved
    total = iter(_pull_back(f, z, policy, cotangent))
    leaves = [next(total) if mine else None for mine in f.inexact()]
    return jax.tree.unflatten(jax.tree.structure(f), leaves), None, None


_stepped.defvjp(_stepped_forward, _stepped_backward)


@jax.custom_jvp
def _pull_back(f: Closure, z: PyTree, policy: Phantom, cotangent: PyTree) -> list[Any]:
    """The cotangents of the variables of f."""
    variables, rebuild = f.variables()
    ready = LoopBody(f)

    def step(f_z: PyTree, z: PyTree) -> PyTree:
        # (1 - τ) z + τ f(z).
        return tree.add(tree.scale(1 - policy.damping, z), tree.scale(policy.damping, f_z))

    def pull(point_and_cotangent: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """One step backwards: cotangents of the variables and of the step's start."""
        point, cotangent = point_and_cotangent
        _, pullback = jax.vjp(lambda variables, z: step(rebuild(variables)(z), z), variables, point)
        return pullback(cotangent)

    # Traced as a function of the point, and what depends on the variables alone taken out.
    pull_one = LoopBody(Closure.of(pull, (z, cotangent)))

    def body(done: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        cotangent, total = carry
        before = policy.steps - 1 - done
        point = lax.fori_loop(0, before, lambda _, z: step(ready(z), z), z)
        added, cotangent = pull_one((point, cotangent))
        return cotangent, tree.add(total, added)

    nothing = jax.tree.map(jnp.zeros_like, variables)
    return lax.fori_loop(0, policy.steps, body, (cotangent, nothing))[1]


@_pull_back.defjvp
def _no_second_derivatives(primals: Any, tangents: Any) -> Any:
    raise TypeError(
        f"{primals[2]!r} has first derivatives only; take Implicit() or Unrolled() for second ones"
    )
