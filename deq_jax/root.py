"""The door for equations in root form, `0 = F(params, z, x)`."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from deq_jax.closure import Cell
from deq_jax.control import Control
from deq_jax.execution import Execution
from deq_jax.fixed_point import deq_fixed_point
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy
from deq_jax.linear.gmres import GMRES
from deq_jax.root_form import RootForm
from deq_jax.solve import Solver
from deq_jax.solvers.newton_krylov import NewtonKrylov
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any
State = TypeVar("State")


class _Options(TypedDict, total=False):
    """The keyword arguments of `deq_root` that do not change its return type."""

    solver: Solver
    gradient: GradientPolicy
    batched: bool
    backward_probe: BackwardProbe | None
    control: Control
    execution: Execution


@overload
def deq_root(
    F: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> State: ...


@overload
def deq_root(
    F: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[State, SolveStats]: ...


@overload
def deq_root(
    F: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: bool = False,
    **options: Unpack[_Options],
) -> Any: ...


def deq_root(
    F: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = NewtonKrylov(max_iter=50),  # noqa: B008  (frozen)
    gradient: GradientPolicy = Implicit(solver=GMRES()),  # noqa: B008  (frozen)
    batched: bool = True,
    return_stats: bool = False,
    backward_probe: BackwardProbe | None = None,
    control: Control = Control(),  # noqa: B008  (frozen)
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Any:
    """Solves `0 = F(params, z, x)` for z, differentiable in params, x and what F closes over.

    It is `deq_fixed_point` for the equation `z = z - s F(params, z, x)`. The number s belongs to a
    sample. The library takes it from one product with ∂F/∂z at the start (`deq_jax.root_form` has
    the formula), so that the unit and the sign of F do not matter. A sample stops when

        ‖s F(z)‖₂ / (ε + ‖z - s F(z)‖₂) <= tol,     an estimate of the relative error of z.

    One unit serves a whole sample. If some equations of F are in a much larger unit than others,
    scale them alike yourself: solvers and residuals see the largest.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deq_jax import deq_root
        >>> def F(params, z, x):  # a cube root for each sample
        ...     return params * z**3 - x
        >>> x = jnp.array([[1.0], [8.0]])
        >>> deq_root(F, 1.0, x, z0=jnp.ones((2, 1))).round(3)
        Array([[1.],
               [2.]], dtype=float32)
        >>> jax.grad(lambda p: deq_root(F, p, x, z0=jnp.ones((2, 1))).sum())(1.0).round(3)
        Array(-1., dtype=float32, weak_type=True)

    Args:
        F: function `F(params, z, x)` of pytrees. It returns the structure, shapes and dtypes of z,
            one equation for each unknown.
        params: parameters; as for `deq_fixed_point`.
        x: input; as for `deq_fixed_point`.
        z0: the start, leaves `[B, ...]`; zeros shaped like `x` when left out. Its gradient is zero.
        solver: the default, Newton's method with a Krylov inner solve, is meant for a smooth F.
            `Broyden()` needs no products with ∂F/∂z, and often finds roots of an F with kinks.
            `Picard()` and `Anderson()` converge where s F contracts towards the root, and else do
            not. The absolute tolerance `atol` of a solver bounds `‖s F(z)‖`, which is in the unit
            of z; set it where the root may be zero.
        gradient: as for `deq_fixed_point`. A root has no reason to be stable under `z - s F(z)`, so
            `Neumann`, `OneStep` and `Phantom`, which are powers of `I - s ∂F/∂z`, are good only
            for an F close to `z - g(z)` with a contraction g.
        batched: as for `deq_fixed_point`: with True each sample has an F of its own, that depends
            on no other sample; with False the whole of z solves one system.
        return_stats: also return `SolveStats`, with the residuals above.
        backward_probe: see `BackwardProbe`.
        control: as for `deq_fixed_point`; its functions see `z - s F(z)` as f(z).
        execution: as for `deq_fixed_point`.

    Returns:
        `z*`; with `return_stats` the pair `(z*, stats)`.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`; F returns something else than z.

    Source: Blondel et al., "Efficient and modular implicit differentiation", 2022, for the
    derivative of a root; `NewtonKrylov` names the sources of the default solver.
    """
    if not callable(F):
        raise TypeError(f"F must be a function F(params, z, x), got {F!r}")
    return deq_fixed_point(
        RootForm(F),
        params,
        x,
        z0,
        solver=solver,
        gradient=gradient,
        batched=batched,
        return_stats=return_stats,
        backward_probe=backward_probe,
        control=control,
        execution=execution,
    )
