"""The differentiation rules of a solution, shared by all policies that only need the solution.

Two rules, chosen once, by whether a `BackwardProbe` is there:

- with one, a `jax.custom_vjp`: only a rule that sees the cotangents can put a report into the
  cotangent of the probe. A forward derivative of the layer is refused by JAX; there would be no
  backward pass to report on.
- without one, a `jax.custom_jvp` whose tangent is `solve_system`. JAX transposes that to obtain
  reverse mode, so `jvp`, `grad`, `hessian` and any mixture of them follow from one rule. Inside
  `shard_map`, and for an f that has no forward derivative, JAX cannot do that, and the first rule
  serves, in reverse mode only.

The forward part of the first calls the second, so that what is derived from a gradient with a probe
is right too, forwards or in reverse.

Neither stores anything but captured arrays and the solution between the passes: f is linearised in
the backward pass. Neither solves anything for an output that nothing depends on.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from deq_jax.equation import Captured, Traced
from deq_jax.gradients.linear import Inverse, reverse_only, solve_system
from deq_jax.solvers.broyden import InverseJacobian
from deq_jax.stats import BackwardProbe

PyTree = Any


def at_solution(
    equation: Traced,
    inverse: Inverse,
    captured: Captured,
    z: PyTree,
    estimate: InverseJacobian | None,
    probe: BackwardProbe | None,
) -> PyTree:
    """`z`, differentiated as a solution of `equation` with respect to `captured.variables`.

    Args:
        equation: f.
        inverse: what solves the linear system, or approximates its solution.
        captured: the arrays f uses.
        z: the solution, without derivatives.
        estimate: the forward solver's estimate of `(J - I)⁻¹`, to start from.
        probe: its cotangent becomes the report of the backward solve.
    """
    if probe is None and not reverse_only(equation):
        return _solution(equation, inverse, *captured, z, estimate)
    return _reverse_solution(equation, inverse, *captured, z, estimate, probe)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _solution(equation, inverse, variables, constants, z, estimate):
    return z


@functools.partial(_solution.defjvp, symbolic_zeros=True)
def _solution_tangent(equation, inverse, primals, tangents):
    variables, constants, z, estimate = primals
    # By the rule again, not as it came: second derivatives see that it depends on the variables.
    z = _solution(equation, inverse, variables, constants, z, estimate)
    perturbed = [not isinstance(tangent, SymbolicZero) for tangent in tangents[0]]
    if not any(perturbed):
        return z, jax.tree.map(jnp.zeros_like, z)
    moving = [v for v, moves in zip(variables, perturbed, strict=True) if moves]
    directions = [t for t, moves in zip(tangents[0], perturbed, strict=True) if moves]

    # Checkpointed: in reverse mode the linearisation is done in the backward pass, not stored
    # from the forward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def push(moving, fixed, constants, z, directions):
        def f(moving):
            both = {True: iter(moving), False: iter(fixed)}
            variables = tuple(next(both[moves]) for moves in perturbed)
            return equation(Captured(variables, constants), z)

        return jax.jvp(f, (moving,), (directions,))[1]

    fixed = [v for v, moves in zip(variables, perturbed, strict=True) if not moves]
    b = push(moving, fixed, constants, z, directions)
    tangent, _ = solve_system(equation, Captured(variables, constants), z, b, inverse, estimate)
    return z, tangent


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _reverse_solution(equation, inverse, variables, constants, z, estimate, probe):
    return z


def _reverse_forward(equation, inverse, variables, constants, z, estimate, probe):
    variables, constants, z, estimate = jax.tree.map(
        lambda primal: primal.value, (variables, constants, z, estimate), is_leaf=_is_primal
    )
    z = at_solution(equation, inverse, Captured(variables, constants), z, estimate, None)
    return z, (variables, constants, z, estimate, probe is not None)


def _reverse_backward(equation, inverse, saved, cotangent):
    variables, constants, z, estimate, probed = saved
    if all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(cotangent, is_leaf=_is_zero)):
        return (None,) * 5
    y = jax.tree.map(
        lambda leaf, z: jnp.zeros_like(z) if _is_zero(leaf) else leaf,
        cotangent,
        z,
        is_leaf=_is_zero,
    )
    u, report = solve_system(
        equation,
        Captured(variables, constants),
        z,
        y,
        inverse,
        estimate,
        transposed=True,
        report=probed,
    )
    _, pullback = jax.vjp(lambda variables: equation(Captured(variables, constants), z), variables)
    return *pullback(u), None, None, None, report if probed else None


def _is_primal(value: Any) -> bool:
    return hasattr(value, "perturbed")


def _is_zero(value: Any) -> bool:
    return isinstance(value, SymbolicZero)


_reverse_solution.defvjp(_reverse_forward, _reverse_backward, symbolic_zeros=True)
