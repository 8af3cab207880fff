"""The linear system behind a gradient, `w = A w + b` with A = J or Jᵀ, J = ∂f/∂z at the solution.

`solve_system` is one `lax.custom_linear_solve`: JAX derives from it the tangents, the transposes
and the derivatives of derivatives of the solution. (Where that does not work, see `reverse_only`,
it is a `custom_vjp`.) What solves the system, exactly or as a cheap approximation, is an `Inverse`;
the choice of it is what tells the gradient policies apart.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from deq_jax import tree
from deq_jax.equation import Captured, Part, Traced, trace
from deq_jax.gradients.operations import contains
from deq_jax.gradients.prepared import Prepared, prepare
from deq_jax.solvers.broyden import Broyden, BroydenState, InverseJacobian
from deq_jax.solvers.krylov import LinearSolver
from deq_jax.solvers.loop import Solver, iterate
from deq_jax.solvers.shrinking import Smaller
from deq_jax.stats import BackwardProbe, Solution

PyTree = Any


class Inverse(Protocol):
    """How `w = A w + b` is solved; hashable."""

    def __call__(
        self, product: Prepared, b: PyTree, estimate: InverseJacobian | None, report: bool
    ) -> Solution:
        """Solution w and its report, from products with A.

        Args:
            product: `w -> A w`.
            b: leaves `[B, ...]`.
            estimate: of `(A - I)⁻¹`, to start from, if there is one.
            report: the stats will be read; where they cost extra they may be left at NaN else.
        """


@dataclasses.dataclass(frozen=True)
class SolvedInverse:
    """The system solved by a fixed-point or a linear solver.

    Samples with b = 0 have w = 0 and are not iterated on.
    """

    solver: Solver | LinearSolver

    def __call__(
        self, product: Prepared, b: PyTree, estimate: InverseJacobian | None, report: bool
    ) -> Solution:
        """See `Inverse`."""
        # A power of two brings b to unit size without rounding: squares of a small cotangent (a
        # mean over batch and pixels, half precision) would underflow in the norms. One factor for
        # the whole batch, on all devices: A may mix samples, and w = A w + b has one scale.
        size = tree.largest(b)
        size = jnp.max(jnp.where(jnp.isfinite(size), size, 0))
        if product.mesh_axes:
            size = lax.pmax(size, product.mesh_axes)
        limits = jnp.finfo(size.dtype)
        _, exponent = jnp.frexp(jnp.where(size > 0, size, 1))
        exponent = jnp.clip(exponent, limits.minexp + 2, limits.maxexp - 2)
        one = jnp.ones((), size.dtype)
        shrink = jnp.ldexp(one, -exponent)
        b = tree.scale(shrink, b)
        solver, start = self.solver, None
        if estimate is not None:
            start = tree.unpack(-estimate.apply(tree.pack(b)), b)
        if isinstance(solver, LinearSolver):
            w, stats = solver.solve_linear(product, b, start, product.mesh_axes)
        else:
            if estimate is not None and isinstance(solver, Broyden):
                solver = _Continued(solver, estimate)
            affine = _Affine(product, b)
            w, stats, *_ = iterate(
                affine,
                b if start is None else start,
                solver,
                reference=tree.norm(b),
                mesh_axes=product.mesh_axes,
                smaller=affine.smaller,
            )
        return Solution(tree.scale(jnp.ldexp(one, exponent), w), stats)


class _Continued:
    """Broyden's method, begun with an estimate that another run left behind."""

    def __init__(self, solver: Broyden, estimate: InverseJacobian):
        self.tol, self.atol = solver.tol, solver.atol
        self.max_iter, self.trace = solver.max_iter, solver.trace
        self.step, self._begin, self._estimate = solver.step, solver.init, estimate

    def init(self, z: PyTree, fz: PyTree) -> BroydenState:
        batch, estimate = jax.tree.leaves(z)[0].shape[0], self._estimate
        if batch < estimate.filled.shape[0]:  # asked for the shapes of fewer samples
            estimate = jax.tree.map(lambda leaf: leaf[:batch], estimate)
        return self._begin(z, fz, estimate)


@dataclasses.dataclass(frozen=True)
class _Affine:
    """`w -> A w + b`, which is its own linearisation."""

    product: Prepared
    b: PyTree

    def __call__(self, w: PyTree) -> PyTree:
        return tree.add(self.product(w), self.b)

    def linearize(self, w: PyTree) -> tuple[PyTree, Prepared]:
        return self(w), self.product

    @property
    def smaller(self) -> tuple[Smaller, ...]:
        """On some of the samples; see `iterate`."""
        return tuple(
            Smaller(part.size, functools.partial(self._at, part)) for part in self.product.smaller
        )

    def _at(self, part: Smaller, index: jax.Array) -> "_Affine":
        return _Affine(part.at(index), tree.take(self.b, index))


def solve_system(
    equation: Traced,
    captured: Captured,
    z: PyTree,
    b: PyTree,
    inverse: Inverse,
    estimate: InverseJacobian | None,
    *,
    transposed: bool = False,
    report: bool = False,
) -> tuple[PyTree, BackwardProbe]:
    """Solves `w = A w + b` as `inverse` does, A = J or, `transposed`, Jᵀ; J = ∂f/∂z at `z`.

    Args:
        equation: f.
        captured: its captured arrays.
        z: the point of linearisation, leaves `[B, ...]`.
        b: like `z`.
        inverse: what solves the system.
        estimate: of `(J - I)⁻¹`, to start from.
        transposed: A = Jᵀ.
        report: see `Inverse`.

    Returns:
        w, differentiable in `b`, `z` and `captured`, forwards and in reverse to any order; and the
        report, which has no derivative.
    """

    def f(z: PyTree) -> PyTree:
        return equation(captured, z)

    def forwards(v: PyTree) -> PyTree:
        return jax.jvp(f, (z,), (v,))[1]

    def backwards(u: PyTree) -> PyTree:
        return jax.vjp(f, z)[1](u)[0]

    def solver(transposed: bool) -> Callable[[Any, jax.Array], tuple[jax.Array, BackwardProbe]]:
        def solve(_: Any, packed: jax.Array) -> tuple[jax.Array, BackwardProbe]:
            b = tree.unpack(packed, z)
            product, residuals = _linearised(equation, captured, z, transposed)
            known = estimate
            if known is not None and transposed:
                known = known.transposed()
            again = (equation, transposed) if equation.smaller else None
            point = (captured, z) if equation.smaller else None
            w, stats = _solve_traced(product, inverse, report, again, *residuals, b, known, point)
            return tree.pack(w), stats

        return solve

    def matvec(packed: jax.Array) -> jax.Array:
        w = tree.unpack(packed, z)
        return tree.pack(tree.subtract(w, backwards(w) if transposed else forwards(w)))

    # Packed into one array: custom_linear_solve fails on a leaf that no differentiated input
    # reaches (jax#10929).
    packed = tree.pack(b)
    if reverse_only(equation):
        packed, stats = solver(transposed)(None, packed)
    else:
        packed, stats = lax.custom_linear_solve(
            matvec, packed, solver(transposed), solver(not transposed), has_aux=True
        )
    return tree.unpack(packed, z), stats


def _linearised(
    equation: Traced, captured: Captured, z: PyTree, transposed: bool
) -> tuple[Traced, Captured]:
    """`w -> A w`, A = J or Jᵀ at `z`, traced: what is stored of f's linearisation is captured."""

    def f(z: PyTree) -> PyTree:
        return equation(captured, z)

    if transposed:
        _, pullback = jax.vjp(f, z)
        return trace(lambda u: pullback(u)[0], z)
    _, push = jax.linearize(f, z)
    return trace(push, z)


def reverse_only(equation: Traced) -> bool:
    """Whether JAX's all-modes linear solve cannot be used, so that forward mode is not to be had.

    - f contains a `custom_vjp` (a fused kernel, say) and has no forward derivative itself, which
      `custom_linear_solve` would trip over as soon as it is batched.
    - Inside `shard_map`, `custom_linear_solve` (0.10) makes its arguments vary over one set of mesh
      axes after it has traced its functions for the arguments as they were, and then fails.
    """
    in_shard_map = bool(jax.sharding.get_abstract_mesh().manual_axes)
    return in_shard_map or contains(equation.jaxpr, "custom_vjp_call")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _solve_traced(
    product: Traced,
    inverse: Inverse,
    report: bool,
    again: tuple[Traced, bool] | None,
    variables: tuple[jax.Array, ...],
    constants: tuple[jax.Array, ...],
    b: PyTree,
    estimate: InverseJacobian | None,
    point: tuple[Captured, PyTree] | None,
) -> tuple[PyTree, BackwardProbe]:
    """Solves `w = A w + b`, where `product` is `w -> A w` and A depends on its captured arrays.

    Differentiable in reverse to any order, in b and in A, which serves where `custom_linear_solve`
    does not: with v = Aᵀ v + w̄,  b̄ = v and Ā = v wᵀ, the latter pulled back to the captured arrays.

    Where samples may leave, `again` is the equation and whether A is transposed, and `point` what
    it captures and the point of linearisation: the equation is linearised again on the samples
    that stay, which costs less than one evaluation on all of them. That A is the same, so its
    derivatives are those by `variables`.
    """
    prepared = prepare(product, Captured(variables, constants))
    if again is not None:
        smaller = tuple(
            Smaller(part.size, functools.partial(_product_on, *again, *point, part))
            for part in again[0].smaller
        )
        prepared = dataclasses.replace(prepared, smaller=smaller)
    w, stats = inverse(prepared, b, estimate, report)
    return w, BackwardProbe.of(stats)


def _product_on(
    equation: Traced,
    transposed: bool,
    captured: Captured,
    z: PyTree,
    part: Part,
    index: jax.Array,
) -> Prepared:
    """The product with A on the samples `index` alone."""
    mine = part.captured(equation.values(captured), index)
    return prepare(*_linearised(part.traced, mine, tree.take(z, index), transposed))


def _traced_forward(product, inverse, report, again, variables, constants, b, estimate, point):
    w, stats = _solve_traced(
        product, inverse, report, again, variables, constants, b, estimate, point
    )
    return (w, stats), (variables, constants, w)


def _traced_backward(product, inverse, report, again, saved, cotangent):
    variables, constants, w = saved
    w_bar, _ = cotangent
    _, transpose = jax.vjp(lambda w: product(Captured(variables, constants), w), w)
    transposed, captured = trace(lambda v: transpose(v)[0], w_bar)
    v, _ = _solve_traced(transposed, inverse, False, None, *captured, w_bar, None, None)
    _, pullback = jax.vjp(lambda variables: product(Captured(variables, constants), w), variables)
    return *pullback(v), None, v, None, None


_solve_traced.defvjp(_traced_forward, _traced_backward)
