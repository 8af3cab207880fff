"""The derivative of a solution: what inverts `I - J`, and the two differentiation rules.

With J = ∂f/∂z at z* = f(z*), a tangent ḟ of f's arrays moves z* by ż, and a cotangent y of z* goes
back to them as p̄:

    ż = J ż + ∂f/∂p ṗ,        u = Jᵀ u + y,   p̄ = (∂f/∂p)ᵀ u.

`attach` gives z* this derivative by one of two rules:

- a `jax.custom_jvp` whose tangent is one `lax.custom_linear_solve`. JAX transposes that into the
  backward pass, so `jvp`, `grad`, `hessian` and any mixture of them follow from one rule.
- a `jax.custom_vjp`, in reverse mode only, which serves where the first cannot: with a
  `BackwardProbe`, because only a rule that sees cotangents can put a report into one; for an f
  that has no forward derivative; and inside `shard_map`. Its forward part calls the first rule
  where possible, so that what is derived from a gradient with a probe is right too.

Neither stores anything but f's arrays and z* between the passes: f is linearised in the backward
pass. Neither solves anything for an output that nothing depends on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from deq_jax import _compat, tree
from deq_jax.closure import Closure, Held, Static
from deq_jax.linear.krylov import LinearSolver, PreconditionerAt
from deq_jax.passes import LoopBody
from deq_jax.shrinking import Phase
from deq_jax.solve import solve
from deq_jax.solvers.broyden import Broyden, BroydenState, InverseJacobian
from deq_jax.stats import BackwardProbe, Solution, Status

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Affine:
    """The map `w -> A w + b` of a linear system, ready for a loop; A = J or Jᵀ at `z`.

    Attributes:
        product: `w -> A w`.
        b: the right-hand side, leaves `[B, ...]`.
        z: where f was linearised.
        transposed: A is Jᵀ.
        parts: the map on fewer samples.
        check_every: see `Map`.
    """

    product: LoopBody
    b: PyTree
    z: PyTree
    transposed: bool
    parts: tuple[Phase, ...] = ()
    check_every: int = 1

    @classmethod
    def of(cls, f: Closure, z: PyTree, b: PyTree, transposed: bool) -> "Affine":
        """The system at `z`. On fewer samples f is linearised again."""

        def at(part: Closure, index: jax.Array) -> "Affine":
            z_part, b_part = tree.take((z, b), index)
            return cls.of(part.at(index), z_part, b_part, transposed)

        parts = tuple(Phase(part.size, functools.partial(at, part)) for part in f.parts)
        return cls(LoopBody(f.product(z, transposed)), b, z, transposed, parts, f.check_every)

    def __call__(self, w: PyTree) -> PyTree:
        """`A w + b`."""
        return tree.add(self.product(w), self.b)

    @property
    def takes_step(self) -> bool:
        """A product is the same in every trip."""
        return False

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Names of the axes over which the product communicates."""
        return self.product.mesh_axes

    @property
    def mixes(self) -> bool:
        """Whether the product can be seen to mix samples."""
        return self.product.mixes

    def linearize(self, w: PyTree) -> tuple[PyTree, LoopBody]:
        """`A w + b` and A."""
        return self(w), self.product

    def scaled(self, factor: jax.Array) -> "Affine":
        """The map of the system with `factor * b`."""

        def at(part: Phase, index: jax.Array) -> "Affine":
            return part.at(index).scaled(factor)

        parts = tuple(Phase(part.size, functools.partial(at, part)) for part in self.parts)
        return dataclasses.replace(self, b=tree.scale(factor, self.b), parts=parts)


class _Preconditioned:
    """The map `w -> A' w + b` with `A' w = w - M w + A M w`, whose fixed point w gives `u = M w`.

    `b - (I - A) M w` is both its residual and that of u in the system of A, so that solvers of
    fixed points stop where u is right.
    """

    parts: ClassVar[tuple[Phase, ...]] = ()
    differentiable: ClassVar[bool] = False

    def __init__(self, system: Affine, precondition: Callable[[PyTree], PyTree]):
        self.system, self.precondition, self.b = system, precondition, system.b
        self.mesh_axes, self.mixes = system.mesh_axes, system.mixes
        self.takes_step, self.check_every = False, system.check_every

    def product(self, w: PyTree) -> PyTree:
        u = self.precondition(w)
        return tree.add(tree.subtract(w, u), self.system.product(u))

    def __call__(self, w: PyTree) -> PyTree:
        return tree.add(self.product(w), self.b)

    def linearize(self, w: PyTree) -> tuple[PyTree, Any]:
        return self(w), _Linear(self.product, self.mesh_axes)


@dataclasses.dataclass(frozen=True)
class _Linear:
    """A product as the step of a solver takes it."""

    function: Callable[[PyTree], PyTree]
    mesh_axes: tuple[str, ...]

    differentiable: ClassVar[bool] = False

    def __call__(self, w: PyTree) -> PyTree:
        return self.function(w)


class Inverse(Protocol):
    """What solves `w = A w + b`, exactly or as an approximation: a pytree.

    The choice of it is all that tells `Implicit`, `Neumann` and `OneStep` apart.
    """

    def __call__(self, system: Affine, report: bool) -> Solution:
        """The solution w of every sample.

        Args:
            system: the map `w -> A w + b`.
            report: the stats will be read; where they cost extra they may be left at NaN else.
        """
        ...

    def transposed(self) -> "Inverse":
        """The same for the system with Aᵀ in the place of A."""
        ...


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["held", "estimate", "preconditioner"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Solved:
    """The system solved by a fixed-point or a linear solver.

    Attributes:
        held: the solver.
        estimate: of `(A - I)⁻¹`, to start from (SHINE); None starts from b.
        preconditioner: `M(z, v)`, for a solver that has none of its own.
    """

    held: Held
    estimate: InverseJacobian | None = None
    preconditioner: Held | None = None

    def transposed(self) -> "Solved":
        """See `Inverse`."""
        estimate = self.estimate
        estimate = None if estimate is None else estimate.transposed()
        return dataclasses.replace(self, estimate=estimate)

    def __call__(self, system: Affine, report: bool) -> Solution:
        """See `Inverse`."""
        largest = tree.largest(system.b)
        unit = _unit(system, largest)
        system = system.scaled(unit)
        b, scale = system.b, tree.unit_scale(unit * largest)
        size = tree.norm(tree.scale(scale, b)) / scale
        solver, start = at(self.held.value, system), None
        if self.estimate is not None:
            start = tree.unpack(-self.estimate.apply(tree.pack(b)), b)
        equation: Any = system
        precondition = None
        if self.preconditioner is not None:
            function = self.preconditioner.value
            precondition = PreconditionerAt(function, system.z, system.transposed)
            equation = _Preconditioned(system, precondition)
        if isinstance(solver, LinearSolver):
            solution = solver.solve_linear(equation.product, b, start, system.mesh_axes)
        else:
            if self.estimate is not None and isinstance(solver, Broyden):
                solver = _Continued(solver, self.estimate)
            solution = solve(equation, b if start is None else start, solver, reference=size)
        if precondition is not None:
            solution = dataclasses.replace(solution, value=precondition(solution.value))
        # Along a direction in which I - A is singular w grows without bound, and cancellation makes
        # its residual vanish: no solution, whatever the residual says.
        stats = solution.stats
        most = size / jnp.sqrt(jnp.finfo(size.dtype).eps)
        length = tree.norm(tree.scale(scale, solution.value))
        grown = (stats.status == int(Status.CONVERGED)) & (length > most * scale)
        status = jnp.where(grown, int(Status.MAX_ITER), stats.status)
        # Such a residual is known to the rounding of w only.
        known = jnp.finfo(size.dtype).eps * length / jnp.where(size > 0, size * scale, 1)
        residual = jnp.where(grown, jnp.maximum(stats.residual, known), stats.residual)
        value = tree.scale(1 / unit, solution.value)
        return Solution(value, stats._replace(status=status, residual=residual))


def at(solver: Any, system: Affine) -> Any:
    """The solver, told which system it is to solve."""
    tell = getattr(solver, "at", None)
    return solver if tell is None else tell(system.z, system.transposed)


def _unit(system: Affine, largest: jax.Array) -> jax.Array:
    """A power of two that brings a small b to unit size; in half precision a large one too.

    `largest`, `[B]`, is the magnitude of the largest entry of each sample of b.

    A small cotangent, a mean over batch and pixels, would underflow in float16, and a solver with
    absolute bounds would take it for solved. One factor serves the whole batch, on all devices: A
    may mix samples, and the system has one scale.
    """
    size = jnp.max(jnp.where(jnp.isfinite(largest), largest, 0))
    if system.mesh_axes:
        size = lax.pmax(size, system.mesh_axes)
    _, exponent = jnp.frexp(jnp.where(size > 0, size, 1))
    if all(jnp.finfo(leaf.dtype).bits >= 32 for leaf in jax.tree.leaves(system.b)):
        exponent = jnp.minimum(exponent, 0)
    return tree.power_of_two(-exponent, size.dtype)


class _Continued:
    """Broyden's method, begun with an estimate that another run left behind."""

    scale_free = True

    def __init__(self, solver: Broyden, estimate: InverseJacobian):
        self.tol, self.atol = solver.tol, solver.atol
        self.max_iter, self.trace = solver.max_iter, solver.trace
        self.step, self._begin, self._estimate = solver.step, solver.init, estimate

    def init(self, z: PyTree, fz: PyTree) -> BroydenState:
        batch, estimate = jax.tree.leaves(z)[0].shape[0], self._estimate
        if batch < estimate.filled.shape[0]:  # asked for the shapes of fewer samples
            estimate = jax.tree.map(lambda leaf: leaf[:batch], estimate)
        return self._begin(z, fz, estimate)


def attach(f: Closure, z: PyTree, inverse: Inverse, probe: BackwardProbe | None) -> PyTree:
    """`z`, differentiated as a solution of `z = f(z)` with respect to the arrays of f.

    Args:
        f: the equation.
        z: the solution, without derivatives.
        inverse: what solves the linear system, or approximates its solution.
        probe: its cotangent becomes the report of the backward solve.
    """
    f = dataclasses.replace(f, parts=lax.stop_gradient(f.parts))
    if probe is None and not _reverse_only(f):
        return _solution(f, inverse, z)
    return _reverse_solution(f, inverse, z, probe)


def _reverse_only(f: Closure) -> bool:
    """Whether the rule of all modes cannot be used: f has no forward derivative, or `shard_map`.

    There `custom_linear_solve` (0.10) makes its arguments vary over one set of mesh axes after it
    has traced its functions for the arguments as they were, and then fails.
    """
    return f.program.reverse_only or bool(_compat.manual_axes())


@jax.custom_jvp
def _solution(f: Closure, inverse: Inverse, z: PyTree) -> PyTree:
    """The rule of all modes."""
    return z


def _solution_tangent(primals: Any, tangents: Any) -> tuple[PyTree, PyTree]:
    f, inverse, z = primals
    # By the rule again, not as it came: second derivatives see that it depends on f.
    z = _solution(f, inverse, z)
    moves = [not _is_zero(t) for t in jax.tree.leaves(tangents[0], is_leaf=_is_zero)]
    directions = [t for t in jax.tree.leaves(tangents[0], is_leaf=_is_zero) if not _is_zero(t)]
    if not directions:
        return z, jax.tree.map(jnp.zeros_like, z)
    variables, _ = f.variables(moves)

    # b = ∂f/∂p ṗ. Checkpointed: in reverse mode f is linearised in the backward pass, and nothing
    # of that is stored from the forward pass.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def push(f: Closure, variables: Any, z: PyTree, directions: Any) -> PyTree:
        rebuild = f.variables(moves)[1]
        return jax.jvp(lambda variables: rebuild(variables)(z), (variables,), (directions,))[1]

    b = push(f, variables, z, directions)
    # ż = J ż + b.
    return z, _solve_system(f, z, b, inverse, transposed=False, report=False)[0]


_solution.defjvp(_solution_tangent, symbolic_zeros=True)


@jax.custom_vjp
def _reverse_solution(
    f: Closure, inverse: Inverse, z: PyTree, probe: BackwardProbe | None
) -> PyTree:
    """The rule of reverse mode."""
    return z


def _reverse_forward(*primals: Any) -> tuple[PyTree, Any]:
    f, inverse, z, probe = jax.tree.map(lambda p: p.value, primals, is_leaf=_is_primal)
    perturbed = tuple(p.perturbed for p in jax.tree.leaves(primals[0], is_leaf=_is_primal))
    # Saved as it is differentiated, for derivatives of the backward pass.
    z = attach(f, z, inverse, None)
    return z, (f, inverse, z, Static((perturbed, probe is not None)))


def _reverse_backward(saved: Any, cotangent: PyTree) -> tuple[Any, ...]:
    f, inverse, z, how = saved
    perturbed, probed = how.value
    if all(map(_is_zero, jax.tree.leaves(cotangent, is_leaf=_is_zero))):
        return None, None, None, None
    y = jax.tree.map(
        lambda y, z: jnp.zeros_like(z) if _is_zero(y) else y, cotangent, z, is_leaf=_is_zero
    )
    # u = Jᵀ u + y.
    u, report = _solve_system(f, z, y, inverse.transposed(), transposed=True, report=probed)
    # p̄ = (∂f/∂p)ᵀ u.
    variables, rebuild = f.variables(perturbed)
    _, pullback = jax.vjp(lambda variables: rebuild(variables)(z), variables)
    return _cotangent(f, perturbed, pullback(u)[0]), None, None, report if probed else None


_reverse_solution.defvjp(_reverse_forward, _reverse_backward, symbolic_zeros=True)


def _cotangent(f: Closure, chosen: Any, values: list[Any]) -> Closure:
    """A cotangent of f: `values` for the arrays `chosen`, None for all others."""
    given = iter(values)
    leaves = [next(given) if mine else None for mine in chosen]
    return jax.tree.unflatten(jax.tree.structure(f), leaves)


def _solve_system(
    f: Closure, z: PyTree, b: PyTree, inverse: Inverse, *, transposed: bool, report: bool
) -> tuple[PyTree, BackwardProbe]:
    """Solves `w = A w + b` by `inverse`, A = J or, `transposed`, Jᵀ; J = ∂f/∂z at `z`.

    Returns:
        w, differentiable in `f`, `z` and `b`, forwards and in reverse to any order; in reverse
        only where `_reverse_only(f)`. And the report, which has no derivative.
    """
    if _reverse_only(f):
        w, stats = _reverse_system(f, z, b, inverse, Static((transposed, report)))
        return w, stats

    def matvec(packed: jax.Array) -> jax.Array:
        w = tree.unpack(packed, z)
        return tree.pack(tree.subtract(w, _apply(f, z, w, transposed)))

    def solver(transposed: bool, inverse: Inverse) -> Callable[[Any, jax.Array], Any]:
        def solved(_: Any, packed: jax.Array) -> tuple[jax.Array, BackwardProbe]:
            w, stats = _inverted(f, z, tree.unpack(packed, z), inverse, transposed, report)
            return tree.pack(w), BackwardProbe.of(stats)

        return solved

    # JAX can push a tangent through a `while` in f, but cannot transpose it.
    both_ways = not _compat.contains(f.program.jaxpr, "while")
    # Packed into one array: custom_linear_solve fails on a leaf that no differentiated input
    # reaches (jax#10929).
    packed, stats = lax.custom_linear_solve(
        matvec,
        tree.pack(b),
        solver(transposed, inverse),
        solver(not transposed, inverse.transposed()) if both_ways else None,
        has_aux=True,
    )
    return tree.unpack(packed, z), stats


def _apply(f: Closure, z: PyTree, w: PyTree, transposed: bool) -> PyTree:
    """`J w` or `Jᵀ w`."""
    if transposed:
        return jax.vjp(f, z)[1](w)[0]
    if f.program.reverse_only:
        return jax.vjp(lambda u: jax.vjp(f, z)[1](u)[0], w)[1](w)[0]
    return jax.jvp(f, (z,), (w,))[1]


@jax.custom_vjp
def _reverse_system(
    f: Closure, z: PyTree, b: PyTree, inverse: Inverse, how: Static
) -> tuple[PyTree, BackwardProbe]:
    """The solution of `_solve_system`, differentiable in reverse to any order.

    With v = Aᵀ v + w̄:  b̄ = v and Ā = v wᵀ, the latter pulled back to f and z.
    """
    transposed, report = how.value
    w, stats = _inverted(f, z, b, inverse, transposed, report)
    return w, BackwardProbe.of(stats)


def _inverted(
    f: Closure, z: PyTree, b: PyTree, inverse: Inverse, transposed: bool, report: bool
) -> Solution:
    with tree.samples_split_over(f.split_axes):
        w, stats = inverse(Affine.of(f, z, b, transposed), report)
        return Solution(w, tree.same_on_parts(stats))


def _system_forward(f: Any, z: Any, b: Any, inverse: Any, how: Any) -> tuple[Any, Any]:
    w, stats = _reverse_system(f, z, b, inverse, how)
    return (w, stats), (f, z, w, inverse, how)


def _system_backward(saved: Any, cotangent: Any) -> tuple[Any, ...]:
    f, z, w, inverse, how = saved
    transposed, _ = how.value
    other = Static((not transposed, False))
    v, _ = _reverse_system(f, z, cotangent[0], inverse.transposed(), other)
    variables, rebuild = f.variables()
    _, pullback = jax.vjp(
        lambda variables, z: _apply(rebuild(variables), z, w, transposed), variables, z
    )
    f_bar, z_bar = pullback(v)
    return _cotangent(f, f.inexact(), f_bar), z_bar, v, None, None


_reverse_system.defvjp(_system_forward, _system_backward)


def _is_primal(value: Any) -> bool:
    return hasattr(value, "perturbed")


def _is_zero(value: Any) -> bool:
    return isinstance(value, SymbolicZero)
