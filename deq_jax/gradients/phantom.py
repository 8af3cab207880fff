"""The unrolled phantom gradient: backpropagation through a few damped steps from the solution.

Source: Geng et al., "On training implicit models", 2021.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.equation import Captured, Traced, trace
from deq_jax.gradients.policy import AtSolution
from deq_jax.gradients.prepared import prepare
from deq_jax.solvers.loop import Run, Solver
from deq_jax.stats import BackwardProbe

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Phantom(AtSolution):
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
    damping: float = 0.5

    def __post_init__(self) -> None:
        checks.check_count(self, "steps")
        checks.check_number(self, "damping", above=0.0, at_most=1.0)

    def attach(
        self,
        equation: Traced,
        captured: Captured,
        run: Run,
        z: PyTree,
        solver: Solver,
        probe: BackwardProbe | None,
    ) -> PyTree:
        """See `AtSolution`."""
        refuse_probe(self, probe)
        return _stepped(equation, self, *captured, z)


def refuse_probe(policy: Any, probe: BackwardProbe | None) -> None:
    """Raises if a probe was passed to a policy that solves no linear system."""
    if probe is not None:
        raise ValueError(
            f"backward_probe reports a linear backward solve, but {policy!r} makes none; leave it "
            "out, or use Implicit, Neumann or OneStep"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _stepped(equation, policy, variables, constants, z):
    return z


def _stepped_forward(equation, policy, variables, constants, z):
    return z, (variables, constants, z)


def _stepped_backward(equation, policy, saved, cotangent):
    return *_pull_back(equation, policy, *saved, cotangent), None, None


_stepped.defvjp(_stepped_forward, _stepped_backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _pull_back(equation, policy, variables, constants, z, cotangent):
    """The cotangents of the variables, as a tuple of one."""
    captured = Captured(variables, constants)
    f = prepare(equation, captured)

    def step(f_z: PyTree, z: PyTree) -> PyTree:
        return tree.add(tree.scale(1 - policy.damping, z), tree.scale(policy.damping, f_z))

    def pull(point_and_cotangent: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        """One step backwards: cotangents of the variables and of the step's start."""
        point, cotangent = point_and_cotangent
        _, pullback = jax.vjp(
            lambda variables, z: step(equation(Captured(variables, constants), z), z),
            variables,
            point,
        )
        return pullback(cotangent)

    # Traced and prepared as a function of the point: what depends on the variables alone, kernels
    # among it, is made ready once, before the loop.
    pull = prepare(*trace(pull, (z, cotangent)))

    def body(done: jax.Array, carry: tuple[PyTree, PyTree]) -> tuple[PyTree, PyTree]:
        cotangent, total = carry
        before = policy.steps - 1 - done
        point = lax.fori_loop(0, before, lambda _, z: step(f(z), z), z)
        added, cotangent = pull((point, cotangent))
        return cotangent, tree.add(total, added)

    nothing = jax.tree.map(jnp.zeros_like, variables)
    _, total = lax.fori_loop(0, policy.steps, body, (cotangent, nothing))
    return (total,)


@_pull_back.defjvp
def _no_second_derivatives(equation, policy, primals, tangents):
    raise TypeError(
        f"{policy!r} has first derivatives only; take Implicit() or Unrolled() for second ones"
    )
