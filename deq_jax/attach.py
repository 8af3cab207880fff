"""Solutions from elsewhere, differentiated: `attach_gradient` and the decorator `implicit`.

The derivative of a solution belongs to the equation and not to the method that solved it. So z* may
come from SciPy, from C++, from a bisection, from a checkpoint. Here the library's own loop gets z*
as its start and evaluates the equation there once, which measures the residual; the gradient
policy then treats z* as if a solver of this library had found it.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
from jax import lax

from deq_jax import _compat, checks
from deq_jax.checks import Real
from deq_jax.closure import Cell, Held, initial_state
from deq_jax.execution import Execution
from deq_jax.fixed_point import deq_fixed_point
from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.policy import GradientPolicy, check_policy, differentiates_solver
from deq_jax.linear.gmres import GMRES
from deq_jax.root_form import RootForm
from deq_jax.stats import BackwardProbe, SolveStats

PyTree = Any
State = TypeVar("State")
Form = Literal["fixed_point", "root"]

_FORMS: dict[str, Callable[[Cell], Cell]] = {"fixed_point": lambda f: f, "root": RootForm}


class _Options(TypedDict, total=False):
    """The keyword arguments of `attach_gradient` that do not change its return type."""

    gradient: GradientPolicy
    form: Form
    tol: Real
    atol: Real
    batched: bool
    backward_probe: BackwardProbe | None
    execution: Execution


@overload
def attach_gradient(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z_star: State,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> State: ...


@overload
def attach_gradient(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z_star: State,
    *,
    return_stats: Literal[True],
    **options: Unpack[_Options],
) -> tuple[State, SolveStats]: ...


@overload
def attach_gradient(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z_star: State,
    *,
    return_stats: bool = False,
    **options: Unpack[_Options],
) -> Any: ...


def attach_gradient(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z_star: PyTree,
    *,
    gradient: GradientPolicy = Implicit(solver=GMRES()),  # noqa: B008  (frozen)
    form: Form = "fixed_point",
    tol: Real = 1e-4,
    atol: Real = 0.0,
    batched: bool = False,
    return_stats: bool = False,
    backward_probe: BackwardProbe | None = None,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Any:
    """Gives a solution that you already have the derivative of the equation that it solves.

    The value stays z*. Its derivative with respect to params, x, and what f closes over is

        dz* = (I - ∂f/∂z)⁻¹ ∂f/∂(params, x) d(params, x)         for `z = f(params, z, x)`,
        dz* = -(∂F/∂z)⁻¹ ∂F/∂(params, x) d(params, x)            for `0 = F(params, z, x)`,

    at z*, in forward and in reverse mode and to any order. How z* was computed is not
    differentiated: z* itself enters as a constant. If z* comes from a host function, keep JAX from
    differentiating the callback, with `stop_gradient` around its inputs, or use `implicit`, which
    does so.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np, scipy.optimize
        >>> from deq_jax import attach_gradient
        >>> def f(a, z, x):
        ...     return jnp.cos(a * z) + x
        >>> def layer(a, x):
        ...     def host(a, x):  # NumPy alone
        ...         a, x = np.asarray(a), np.asarray(x)
        ...         found = scipy.optimize.root(lambda z: np.cos(a * z) + x - z, np.zeros_like(x))
        ...         return found.x.astype(x.dtype)
        ...     z = jax.pure_callback(host, x, *jax.lax.stop_gradient((a, x)))
        ...     return attach_gradient(f, a, x, z)
        >>> x = jnp.array([0.0, 0.5])
        >>> [round(float(slope), 2) for slope in jax.jacobian(layer)(1.0, x)]
        [-0.3, -0.47]

    Args:
        f: the equation, `f(params, z, x)` of pytrees. It returns the structure, shapes and dtypes
            of z. It is linearised in the backward pass, and evaluated once in the forward pass.
        params: parameters; as for `deq_fixed_point`.
        x: input; as for `deq_fixed_point`.
        z_star: the solution, floating or complex leaves, `[...]`, or `[B, ...]` with `batched`.
        gradient: how z* is differentiated. `Implicit` takes `GMRES()` where it would take the
            forward solver, since there is none. `OneStep`, `Neumann` and `Phantom` serve too. They
            are powers of ∂f/∂z, or of `I - s ∂F/∂z` in root form, and good only if these contract.
        form: `"fixed_point"` for `z = f(params, z, x)`, `"root"` for `0 = f(params, z, x)`.
        tol: bound on the relative residual for the status `CONVERGED`.
        atol: bound on the absolute residual, which is enough as well; 0 leaves it out.
        batched: with False the whole of z is one system, which is right for every equation. With
            True axis 0 of every leaf is a batch, and a sample's equation must not depend on other
            samples; each then has a status and a linear solve of its own. The linear solve fails
            for coupled samples, which only a `backward_probe` reports.
        return_stats: also return `SolveStats`: how well z* solves the equation. The residual is
            `‖f(z*) - z*‖ / (ε + ‖f(z*)‖)`, and in root form `‖s F(z*)‖ / (ε + ‖z* - s F(z*)‖)`,
            where the number s, an estimate of 1 / ‖∂F/∂z‖, makes the unit of F arbitrary
            (`deq_jax.root_form`); `atol` bounds the numerators. The status is `CONVERGED`,
            `MAX_ITER` for a residual that is too large, and `DIVERGED` if f is not finite at z*.
        backward_probe: its cotangent reports the linear solve of the backward pass; see
            `BackwardProbe`.
        execution: as for `deq_fixed_point`.

    Returns:
        `z*`, unchanged and with a derivative; with `return_stats` the pair `(z*, stats)`.

    Raises:
        ValueError: f returns another structure, shape or dtype than z*; `form`, `tol`, `atol` or
            the probe does not fit.
        TypeError: z* is not floating; an argument is of the wrong type; the policy needs the solver
            that found z* (`Unrolled`, `Implicit(reuse=True)`).

    Source: Blondel et al., "Efficient and modular implicit differentiation", 2022.
    """
    if not callable(f):
        raise TypeError(f"f must be a function f(params, z, x), got {f!r}")
    if form not in tuple(_FORMS):
        raise ValueError(f'form must be "fixed_point" or "root", got {form!r}')
    checks.check_bool("batched", batched)
    z_star = lax.stop_gradient(initial_state(x, _given(z_star), batched, "z_star"))
    return deq_fixed_point(
        _FORMS[form](f),
        params,
        x,
        z_star,
        solver=_Evaluation(tol, atol),
        gradient=_without_solver(gradient),
        batched=batched,
        return_stats=return_stats,
        backward_probe=backward_probe,
        execution=execution,
    )


def implicit(
    equation: Cell,
    *,
    gradient: GradientPolicy = Implicit(solver=GMRES()),  # noqa: B008  (frozen)
    form: Form = "fixed_point",
    tol: Real = 1e-4,
    atol: Real = 0.0,
    batched: bool = False,
    has_aux: bool = False,
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: differentiates a solve of your own by the equation that its result solves.

    `solve(params, x, ...)` returns z*. Decorated, it returns `attach_gradient(equation, params, x,
    z*)`. Nothing inside of `solve` is differentiated: its arguments, and the arrays that it closes
    over, reach it without tangents. So it may call a host function through `jax.pure_callback`,
    which has no derivative, or run a `while_loop`. It runs once in the forward pass and never in
    the backward pass. Outside of `jax.jit` and `jax.vmap`, also under `jax.grad`, it may be plain
    NumPy.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from deq_jax import implicit
        >>> @implicit(lambda a, z, x: z**3 + a * z - x, form="root")
        ... def solve(a, x):  # bisection, for a > 0
        ...     def halve(_, bounds):
        ...         low, high = bounds
        ...         z = (low + high) / 2
        ...         below = z**3 + a * z < x
        ...         return jnp.where(below, z, low), jnp.where(below, high, z)
        ...     low, high = jax.lax.fori_loop(0, 30, halve, (-jnp.abs(x / a), jnp.abs(x / a)))
        ...     return (low + high) / 2
        >>> jax.grad(solve)(1.0, jnp.float32(2.0)).round(4)
        Array(-0.25, dtype=float32, weak_type=True)

    Args:
        equation: `f(params, z, x)`, see `attach_gradient`. Arrays that the equation closes over
            get gradients, unlike those that `solve` closes over. For a function of
            `(z, *arguments)`, as jaxopt's `custom_root` took it, write
            `lambda params, z, x: optimality_fun(z, *params)`, and call the decorated
            `solve(params, x)` with the tuple of arguments as params and None as x.
        gradient: see `attach_gradient`.
        form: see `attach_gradient`.
        tol: see `attach_gradient`.
        atol: see `attach_gradient`.
        batched: see `attach_gradient`.
        has_aux: `solve` returns a pair, z* and a record of the solve (counts, messages). Like the
            stats, the record has no derivative.
        execution: see `attach_gradient`.

    Returns:
        A decorator for `solve(params, x, *args, **kwargs)`. More arguments go to `solve` alone
        (a start, say) and get a zero gradient. The decorated function has the same arguments, and
        two keyword arguments of its own, `return_stats=False` and `backward_probe=None`, see
        `attach_gradient`. It returns z*, and behind it the stats if they were asked for, and the
        record if `has_aux`. To decorate a method, decorate the bound one:
        `implicit(equation)(self.solve)`.

    Raises:
        TypeError: the equation or `solve` is no function, or `solve` has an argument with one of
            the two names.
        ValueError, TypeError: when it is called, as for `attach_gradient`.
    """
    if not callable(equation):
        raise TypeError(f"equation must be a function f(params, z, x), got {equation!r}")
    checks.check_bool("has_aux", has_aux)

    def decorate(solve: Callable[..., Any], /, *others: Any) -> Callable[..., Any]:
        if others or not callable(solve):
            raise TypeError(
                "implicit needs the equation first: write @implicit(equation) above the function "
                "solve(params, x, ...), not @implicit"
            )
        _check_names(solve)

        @functools.wraps(solve)
        def solve_and_attach(
            params: PyTree,
            x: PyTree,
            *args: Any,
            return_stats: bool = False,
            backward_probe: BackwardProbe | None = None,
            **kwargs: Any,
        ) -> Any:
            z_star = _undifferentiated(solve, (params, x, *args), kwargs)
            aux: list[Any] = []
            if has_aux:
                if not isinstance(z_star, tuple) or len(z_star) != 2:
                    raise ValueError(
                        f"with has_aux=True {_name(solve)} must return a pair, the solution and "
                        f"the record, got {jax.tree.structure(z_star)}"
                    )
                z_star, *aux = z_star
            attached = attach_gradient(
                equation,
                params,
                x,
                z_star,
                gradient=gradient,
                form=form,
                tol=tol,
                atol=atol,
                batched=batched,
                return_stats=return_stats,
                backward_probe=backward_probe,
                execution=execution,
            )
            if not has_aux:
                return attached
            return (*attached, *aux) if return_stats else (attached, *aux)

        return solve_and_attach

    return decorate


@checks.register_options
@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """A solver that stays where it is: the loop evaluates the equation once, at the start."""

    tol: Real
    atol: Real
    max_iter: int = 1
    trace: bool = False

    def init(self, z: PyTree, fz: PyTree) -> tuple[()]:
        """Nothing to remember."""
        return ()

    def step(self, z: PyTree, fz: PyTree, state: tuple[()]) -> tuple[PyTree, tuple[()]]:
        """The same point."""
        return z, state


def _given(z_star: PyTree) -> PyTree:
    if z_star is None:
        raise TypeError("z_star must be the solution, arrays like z, got None")
    return z_star


def _without_solver(gradient: Any) -> Any:
    """The policy for a solution that no solver of the library found.

    Raises:
        TypeError: it needs that solver.
    """
    check_policy("gradient", gradient)
    if differentiates_solver(gradient):
        raise TypeError(
            f"gradient={gradient!r} differentiates the solver, but z_star was found elsewhere; "
            "take Implicit(), or let deq_fixed_point or deq_root solve the equation"
        )
    if not isinstance(gradient, Implicit):
        return gradient
    if gradient.reuse:
        raise TypeError(
            "Implicit(reuse=True) starts from the inverse estimate of the forward solver, but "
            "z_star was found elsewhere; leave reuse out"
        )
    if gradient.solver is None:
        return dataclasses.replace(gradient, solver=GMRES())
    return gradient


def _undifferentiated(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`function(*args, **kwargs)`, where nothing inside of it is differentiated.

    Under a transformation it is traced, so that the arrays that it closes over can be stripped of
    their tangents. A function that needs numbers (NumPy) cannot be traced and is called.
    """
    if _compat.at_top_level():
        return function(*args, **kwargs)
    args, kwargs = jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if isinstance(leaf, jax.Array) else leaf,
        (args, kwargs),
    )
    try:
        traced = _compat.trace(lambda: Held(function(*args, **kwargs)))
    except Exception:  # whatever it was, the call below raises it if it is the function's own
        traced = None
    if traced is not None:
        jaxpr, captured, out_tree = traced
        values = _compat.evaluate(jaxpr, lax.stop_gradient(captured))
        return jax.tree.unflatten(out_tree, values).value
    try:
        return function(*args, **kwargs)
    except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
        error.add_note(
            f"{_name(function)} needs numbers, and under jax.jit and jax.vmap there are none: wrap "
            "what it computes outside of JAX in jax.pure_callback."
        )
        raise


def _check_names(solve: Callable[..., Any]) -> None:
    """Raises if `solve` has an argument with a name that the decorated function uses itself."""
    try:
        names = inspect.signature(solve).parameters
    except (TypeError, ValueError):  # a builtin may have none
        return
    for name in ("return_stats", "backward_probe"):
        if name in names:
            raise TypeError(
                f"{_name(solve)} has an argument {name}, which implicit adds itself; rename it"
            )


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))
