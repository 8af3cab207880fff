"""The implicit gradient: differentiate the equation at its solution, not the solver.

At z* = f(params, z*, x), with J = ∂f/∂z there, a cotangent y of z* goes back to params and x as

    u = Jᵀ u + y,        (params̄, x̄) = (∂f/∂(params, x))ᵀ u.

f is linearised once at z* (`jax.vjp`); the transposed system is a linear fixed point and runs in
the solver's own loop; one last product serves params, x and all that f closes over. Memory is that
of one linearisation of f and of the solver, whatever the number of iterations.

Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019, theorem 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import checks, tree
from deq_jax.equation import Captured, Traced, trace
from deq_jax.gradients.prepared import prepare
from deq_jax.solvers.loop import Solver, check_solver, iterate
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Implicit:
    """Gradient by the implicit function theorem: exact up to the tolerance of its linear solve.

    Bias: that of z* and of u, each bounded by its tolerance; the gradient's error is roughly the
    error in z* (its square root where f has kinks, as with ReLU). Cost: one linearisation of f,
    and one transposed product for every iteration of the backward solve.

    The backward residual of a sample is `‖Jᵀ u + y - u‖ / ‖y‖`, so gradients of any scale are
    solved to the same relative accuracy. The backward pass never raises; pass a `BackwardProbe` to
    learn what it reached.

    Attributes:
        solver: solver of the transposed system; None takes the forward solver. Anderson finds u
            also where the spectral radius of J exceeds 1; Picard diverges there.
        tol: tolerance of the backward solve; None takes that of its solver.
        max_iter: most transposed products; None takes that of its solver.

    Raises:
        TypeError, ValueError: `solver` is no solver, `tol` or `max_iter` out of range.
    """

    solver: Solver | None = None
    tol: float | None = None
    max_iter: int | None = None

    def __post_init__(self) -> None:
        if self.solver is not None:
            check_solver("Implicit.solver", self.solver)
        if self.tol is not None:
            checks.check_number(self, "tol", at_least=0.0)
        if self.max_iter is not None:
            checks.check_count(self, "max_iter")

    def backward_solver(self, forward: Solver) -> Solver:
        """The solver of the transposed system when `forward` solved the equation."""
        solver = forward if self.solver is None else self.solver
        limits = {"tol": self.tol, "max_iter": self.max_iter}
        changes = {name: value for name, value in limits.items() if value is not None}
        if not changes:
            return solver
        if not dataclasses.is_dataclass(solver):
            raise TypeError(
                f"Implicit can set {sorted(changes)} only on a solver that is a dataclass, "
                f"got {type(solver).__name__}; set them on the solver itself"
            )
        return dataclasses.replace(solver, **changes)

    def solve(
        self,
        equation: Traced,
        captured: Captured,
        z0: PyTree,
        solver: Solver,
        probe: BackwardProbe | None,
    ) -> Solution:
        """Solves the traced equation, with the implicit gradient attached to the solution."""
        backward = self.backward_solver(solver)
        return _solve(equation, solver, backward, *captured, z0, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _solve(
    equation: Traced,
    solver: Solver,
    backward: Solver,
    variables: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...],
    z0: PyTree,
    probe: BackwardProbe | None,
) -> Solution:
    f = prepare(equation, Captured(variables, constants))
    return iterate(f, z0, solver, mesh_axes=f.mesh_axes)


def _solve_forward(equation, solver, backward, variables, constants, z0, probe):
    # It calls the rule, not the loop: a second reverse pass over this one then finds the rule
    # again instead of a while_loop, which cannot be differentiated in reverse.
    solution = _solve(equation, solver, backward, variables, constants, z0, probe)
    return solution, (variables, constants, solution.value, probe is not None)


def _solve_backward(equation, solver, backward, saved, cotangent):
    variables, constants, z, with_probe = saved
    y = cotangent.value
    _, pullback = jax.vjp(
        lambda variables, z: equation(Captured(variables, constants), z), variables, z
    )
    product, residuals = trace(lambda u: pullback(u)[1], y)
    u, stats = linear_fixed_point(product, backward, *residuals, y)
    variables_bar, _ = pullback(u)
    report = BackwardProbe.of(stats) if with_probe else None
    return variables_bar, None, jax.tree.map(jnp.zeros_like, z), report


_solve.defvjp(_solve_forward, _solve_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def linear_fixed_point(
    product: Traced,
    solver: Solver,
    variables: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...],
    y: PyTree,
) -> Solution:
    """Solves `u = A u + y`, where `product` is `u -> A u` and A depends on its captured arrays.

    Differentiable in reverse to any order, in y and in A: with v = Aᵀ v + ū,

        ȳ = v,        Ā = v uᵀ,

    the latter pulled back to the captured arrays; the residuals of the linearisation are among
    them, which is what makes second derivatives of the layer come out right.

    Samples with y = 0 return u = 0 after their first evaluation.
    """
    apply = prepare(product, Captured(variables, constants))
    # A power of two brings y to unit size without rounding: squares of a small cotangent (a mean
    # over batch and pixels, half precision) would underflow in the norms. One factor for the whole
    # batch, on all devices: A may mix samples (a BatchNorm), and u = A u + y has one scale.
    size = tree.largest(y)
    size = jnp.max(jnp.where(jnp.isfinite(size), size, 0))
    if apply.mesh_axes:
        size = lax.pmax(size, apply.mesh_axes)
    limits = jnp.finfo(size.dtype)
    _, exponent = jnp.frexp(jnp.where(size > 0, size, 1))
    exponent = jnp.clip(exponent, limits.minexp + 2, limits.maxexp - 2)
    one = jnp.ones((), size.dtype)
    y = tree.scale(jnp.ldexp(one, -exponent), y)
    solution = iterate(
        lambda u: tree.add(apply(u), y),
        y,
        solver,
        reference=tree.norm(y),
        mesh_axes=apply.mesh_axes,
    )
    return Solution(tree.scale(jnp.ldexp(one, exponent), solution.value), solution.stats)


def _linear_forward(product, solver, variables, constants, y):
    solution = linear_fixed_point(product, solver, variables, constants, y)
    return solution, (variables, constants, solution.value)


def _linear_backward(product, solver, saved, cotangent):
    variables, constants, u = saved
    u_bar = cotangent.value
    _, transpose = jax.vjp(lambda u: product(Captured(variables, constants), u), u)
    transposed, captured = trace(lambda v: transpose(v)[0], u_bar)
    v, _ = linear_fixed_point(transposed, solver, *captured, u_bar)
    _, pullback = jax.vjp(lambda variables: product(Captured(variables, constants), u), variables)
    (variables_bar,) = pullback(v)
    return variables_bar, None, v


linear_fixed_point.defvjp(_linear_forward, _linear_backward)
