"""The doors: an equation, a solver and a gradient policy become a layer."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deq_jax import _compat, checks, precision, sharding, tree
from deq_jax.adjoint import Affine, Solved
from deq_jax.closure import (
    Cell,
    Closure,
    Held,
    add_batch_axis,
    close,
    drop_batch_axis,
    initial_state,
)
from deq_jax.control import Control, Watch
from deq_jax.execution import Execution
from deq_jax.gradients.implicit import Implicit, is_linear_solver
from deq_jax.gradients.policy import GradientPolicy, check_policy, differentiates_solver
from deq_jax.linear.krylov import LinearSolver
from deq_jax.passes import LoopBody
from deq_jax.progress import Progress
from deq_jax.root_form import RootForm
from deq_jax.shrinking import sizes
from deq_jax.solve import Solver, check_samples, check_solver, solve
from deq_jax.solvers.anderson import Anderson
from deq_jax.stats import BackwardProbe, Solution, SolveStats

PyTree = Any
State = TypeVar("State")


class _Options(TypedDict, total=False):
    """The keyword arguments of `deq_fixed_point` that do not change its return type."""

    solver: Solver
    gradient: GradientPolicy
    batched: bool
    backward_probe: BackwardProbe | None
    sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None
    control: Control
    execution: Execution


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[False] = False,
    sample_at: tuple[()] = (),
    **options: Unpack[_Options],
) -> State: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[True],
    sample_at: tuple[()] = (),
    **options: Unpack[_Options],
) -> tuple[State, SolveStats]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[False] = False,
    sample_at: tuple[int, *tuple[int, ...]],
    **options: Unpack[_Options],
) -> tuple[State, tuple[State, ...]]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: Literal[True],
    sample_at: tuple[int, *tuple[int, ...]],
    **options: Unpack[_Options],
) -> tuple[State, SolveStats, tuple[State, ...]]: ...


@overload
def deq_fixed_point(
    f: Callable[[Any, State, Any], State],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    return_stats: bool = False,
    sample_at: tuple[int, ...] = (),
    **options: Unpack[_Options],
) -> Any: ...


@overload
def deq_fixed_point(
    f: Callable[..., Any],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    has_aux: bool,
    pass_step: bool = False,
    return_stats: bool = False,
    sample_at: tuple[int, ...] = (),
    **options: Unpack[_Options],
) -> Any: ...


@overload
def deq_fixed_point(
    f: Callable[..., Any],
    params: Any,
    x: Any,
    z0: Any = None,
    *,
    pass_step: bool,
    return_stats: bool = False,
    sample_at: tuple[int, ...] = (),
    **options: Unpack[_Options],
) -> Any: ...


def deq_fixed_point(
    f: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    gradient: GradientPolicy = Implicit(),  # noqa: B008  (frozen)
    batched: bool = True,
    return_stats: bool = False,
    backward_probe: BackwardProbe | None = None,
    sample_at: tuple[int, ...] = (),
    sample_gradient: GradientPolicy | tuple[GradientPolicy, ...] | None = None,
    has_aux: bool = False,
    pass_step: bool = False,
    control: Control = Control(),  # noqa: B008  (frozen)
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Any:
    """The solution `z*` of `z* = f(params, z*, x)`, differentiable in params and x.

    Found by `solver` in one `lax.while_loop` and differentiated as `gradient` says, by default
    with the implicit function theorem: memory does not grow with the number of iterations. Arrays
    that f closes over get the same gradient as if they were passed in. Works under `jit`, `grad`,
    `jvp`, `hessian` and derivatives of derivatives, `vmap`, `checkpoint`, `scan`, `shard_map`.

    Args:
        f: `f(params, z, x) -> z`, traceable; returns the structure, shapes and dtypes of z. A call
            outside of `jax.jit` always sees f, and what f uses, as they are now: f is traced again
            unless it certainly holds no arrays or objects and all else that it holds is unchanged.
            What was compiled is used again wherever the traced operations are the same.
        params: any pytree. Integer, boolean and key leaves are fine and get no gradient; functions,
            strings and other objects in it are static.
        x: the input, any pytree, likewise.
        z0: the start, floating or complex leaves `[B, ...]`; zeros shaped like `x` when left out.
            Its gradient is zero: a solution does not depend on where the search began.
        solver: `Anderson(...)`, `Picard(...)`, `Broyden(...)`, `NewtonKrylov(...)` or an object of
            your own with `init` and `step`.
        gradient: the gradient policy: `Implicit(...)`, `OneStep()`, `Neumann(...)`, `Phantom(...)`
            or `Unrolled(...)`. It belongs to the state that is returned, whenever the solver stops.
        batched: axis 0 of every leaf of z is the batch, and each sample is an equation of its own,
            with its own residual, history, stop and status, so that its answer does not depend on
            its batch mates (unless f mixes them). False: the whole of z is one equation.
        return_stats: also return `SolveStats`.
        backward_probe: see `BackwardProbe`.
        sample_at: numbers of evaluations, increasing, counted from 1: return the states evaluated
            then as well, for losses along the way. A sample that had stopped gives its final state.
        sample_gradient: the gradient policy of these states, one for all or one each; None is
            `gradient`.
        has_aux: f returns a pair `(z, aux)`. `aux`, any pytree of arrays, is returned as f returns
            it at the returned z, and is differentiable. It costs one more evaluation of f.
        pass_step: f takes a fourth argument, `f(params, z, x, step)`: the number of the evaluation,
            counted from 0, int32 `[B]` (a scalar with `batched=False`). Fold it into a random key,
            and each evaluation draws its own noise. The derivative is that of the evaluations that
            were made: `Implicit` and the like take f as it was when it was given the returned z.
        control: when to go on and what to return: `Control(budget=..., stop=..., norm=..., ...)`.
        execution: how the work is done: `Execution(shrink_to=..., shard_axis=..., ...)`.

    Returns:
        `z*`: per sample the iterate with the lowest residual
        `‖f(z) - z‖₂ / (ε + ‖f(z)‖₂)`; with `return_stats` the pair `(z*, stats)`. With `sample_at`
        there is one more at the end, the tuple of states, and with `has_aux` one more behind it,
        `aux`. A tolerance that was not reached or a sample that became NaN raises nothing: see
        `stats.status`.

    Raises:
        ValueError: f returns another structure, shape or dtype than z; the batch is empty; leaves
            disagree about it; the probe does not fit the batch or the policy; `sample_at` is not
            increasing or beyond `max_iter`.
        TypeError: the state is not floating; `solver`, `gradient` or the probe is something else,
            or they do not go together.

    Source: Bai, Kolter and Koltun, "Deep equilibrium models", 2019; "Deep Implicit Layers", ch. 4.
    """
    checks.check_bool("return_stats", return_stats)
    if not isinstance(sample_at, tuple | list):
        raise TypeError(f"sample_at must be a tuple of integers, got {sample_at!r}")
    sample_at = tuple(sample_at)
    policies = (gradient, *_sample_policies(sample_at, sample_gradient, gradient))
    setup = Setup(batched, sample_at, has_aux, pass_step, execution)
    task = Task(solver, policies, control, setup)
    solution = _run(f, params, x, z0, task, backward_probe)
    aux = (solution.aux,) if has_aux else ()
    return returned(solution.value, solution.stats, solution.samples, return_stats, aux)


def solve_fixed_point(
    f: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree | None = None,
    *,
    solver: Solver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
    has_aux: bool = False,
    pass_step: bool = False,
    control: Control = Control(),  # noqa: B008  (frozen)
    execution: Execution = Execution(),  # noqa: B008  (frozen)
) -> Solution:
    """Solves `z = f(params, z, x)` without a gradient rule; arguments as `deq_fixed_point`.

    Returns:
        `Solution` with `value`, like `z0`, `stats`, and `aux` with `has_aux`. No gradient flows
        through any of them.
    """
    setup = Setup(batched, (), has_aux, pass_step, execution)
    return _run(f, params, x, z0, Task(solver, (), control, setup), None)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The options of a solve that are part of the compiled program.

    Attributes:
        batched: axis 0 is the batch.
        sample_at: see `solve`.
        has_aux: see `deq_fixed_point`.
        pass_step: see `deq_fixed_point`.
        execution: how to do it.
    """

    batched: bool
    sample_at: tuple[int, ...]
    has_aux: bool
    pass_step: bool
    execution: Execution

    def __post_init__(self) -> None:
        for name in ("batched", "has_aux", "pass_step"):
            checks.check_bool(name, getattr(self, name))
        if not isinstance(self.execution, Execution):
            raise TypeError(f"execution must be an Execution(...), got {self.execution!r}")
        if self.execution.shrink_to is not None and not self.batched:
            raise ValueError(
                f"Execution(shrink_to={self.execution.shrink_to}) needs samples that can leave, "
                "but batched=False has none"
            )

    def split_axes(self) -> tuple[str, ...]:
        """The mesh axes along which devices hold parts of the same samples.

        Raises:
            ValueError: this is not inside a `shard_map` over them.
        """
        axes = sharding.as_axes(self.execution.state_axis)
        if not _compat.manual_axes() >= set(axes):
            raise ValueError(
                f"Execution(state_axis={self.execution.state_axis!r}) is for a solve inside your "
                f"own shard_map over it, here one over {sorted(_compat.manual_axes())}; under jit "
                "leave it out"
            )
        return axes


@dataclasses.dataclass(frozen=True)
class Task:
    """What is to be done with an equation.

    Attributes:
        solver: the solver.
        policies: gradient policies of the value and of each sample; empty for no gradient.
        control: when to go on.
        setup: all else.
    """

    solver: Solver
    policies: tuple[GradientPolicy, ...]
    control: Control
    setup: Setup

    def __post_init__(self) -> None:
        check_solver("solver", self.solver)
        check_samples(self.setup.sample_at, self.solver)
        if not isinstance(self.control, Control):
            raise TypeError(f"control must be a Control(...), got {self.control!r}")
        self.control.check(self.solver.max_iter)
        for policy in self.policies:
            check_policy("gradient", policy)
            policy.check(self.solver)
        shrink_to, axis = self.setup.execution.shrink_to, self.setup.execution.shard_axis
        if shrink_to is not None and any(map(differentiates_solver, self.policies)):
            raise ValueError(
                f"Execution(shrink_to={shrink_to}) does not go with gradient={self.policies[0]!r}, "
                "which differentiates the solver itself, in a loop of scans"
            )
        if shrink_to is not None and not self.control.is_local:
            raise ValueError(
                f"Execution(shrink_to={shrink_to}) goes on with some samples alone; it does not go "
                "with functions or scales in Control(norm, scales, stop, fold), which are those of "
                "the whole batch"
            )
        if axis is not None and self.control.fold is not None:
            raise ValueError(
                f"Execution(shard_axis={axis!r}) makes one loop on each device; it does not go "
                "with Control(fold=...), which has one result"
            )


def _run(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z0: PyTree | None,
    task: Task,
    probe: BackwardProbe | None,
) -> Solution:
    """Checks and casts the arguments, closes f and solves."""
    setup = task.setup
    z0 = checked_start(x, z0, setup)
    _check_probe(probe, z0, setup.batched)
    held = Held((task.solver, task.policies, task.control))
    arguments = (Held(f), Held(params), Held(x), z0, held, probe)
    named = sharding.as_axes(setup.execution.shard_axis)
    mesh, axes = sharding.find_mesh(named, x, z0, setup.batched)
    solve_closed = _CloseAndSolve(setup, _compat.at_top_level(), axes)
    with tree.samples_split_over(setup.split_axes()):
        if mesh is None:
            return solve_closed(*arguments)
        return sharding.solve_shards(solve_closed, arguments, axes, mesh)


def checked_start(x: PyTree, z0: PyTree | None, setup: Setup) -> PyTree:
    """The start of a solve; checks that it and x fit the options.

    Raises:
        ValueError, TypeError: see `deq_fixed_point`.
    """
    z0 = precision.cast(initial_state(x, z0, setup.batched), setup.execution.state_dtype)
    shrink_to = setup.execution.shrink_to
    if shrink_to is not None:
        batch = jax.tree.leaves(z0)[0].shape[0]
        why = f"Execution(shrink_to={shrink_to}) gathers samples of x"
        sharding.check_batch(why, x, batch)
    return z0


@dataclasses.dataclass(frozen=True)
class _CloseAndSolve:
    """Closes f over the arguments and solves, for a batch or a shard of one.

    Attributes:
        setup: the static options.
        value_only: see `Program`.
        shard_axes: the mesh axes over whose shards the batch is split.
    """

    setup: Setup
    value_only: bool
    shard_axes: tuple[str, ...]

    def __call__(
        self, f: Held, params: Held, x: Held, z0: PyTree, held: Held, probe: BackwardProbe | None
    ) -> Solution:
        """The solution by the solver, the policies and the control that are `held`."""
        solver, policies, control = held.value
        closed, watch = closed_problem(
            f.value,
            params.value,
            x.value,
            z0,
            control,
            self.setup,
            value_only=self.value_only,
            shard_axes=self.shard_axes,
        )
        plain = control.without_functions()
        if plain is not control:
            held = Held((solver, policies, plain))
        return _solve_compiled(closed, z0, held, watch, probe, self.setup)


def closed_problem(
    f: Callable[..., PyTree],
    params: PyTree,
    x: PyTree,
    z0: PyTree,
    control: Control,
    setup: Setup,
    *,
    value_only: bool,
    shard_axes: tuple[str, ...] = (),
) -> tuple[Closure, Watch]:
    """The traces of f and of the functions of `control`."""
    execution = setup.execution
    fewer: tuple[int, ...] = ()
    if execution.shrink_to is not None:
        fewer = sizes(jax.tree.leaves(z0)[0].shape[0], execution.shrink_to)
    # Cast before f is traced, so that no trip of a loop casts params and x.
    params, x = precision.cast((params, x), execution.cell_dtype)
    if isinstance(f, RootForm):
        x = f.input_with_scale(
            params,
            x,
            z0,
            batched=setup.batched,
            cell_dtype=execution.cell_dtype,
            value_only=value_only,
            shard_axes=shard_axes,
        )
    closed = close(
        f,
        params,
        x,
        z0,
        batched=setup.batched,
        cell_dtype=execution.cell_dtype,
        has_aux=setup.has_aux,
        pass_step=setup.pass_step,
        sizes=fewer,
        value_only=value_only,
        shard_axes=shard_axes,
    )
    closed = dataclasses.replace(closed, check_every=execution.check_every)
    return closed, _watch(closed, control, z0, setup)


def _watch(f: Closure, control: Control, z0: PyTree, setup: Setup) -> Watch:
    """The functions of `control`, traced for the states that the loop will have."""
    if control.is_local and control.budget is None and control.norm == "l2":
        return Watch()
    z = z0 if setup.batched else add_batch_axis(z0)
    z = jax.lax.stop_gradient(tree.vary_over(z, f.state_axes))
    aux = _aux_shapes(f, z, setup) if control.watches else None
    return Watch.of(control, z, aux, setup.batched)


def _aux_shapes(f: Closure, z: PyTree, setup: Setup) -> PyTree:
    """Shapes of what f returns beside z; None without such."""
    if not setup.has_aux:
        return None
    step = tree.zeros_per_sample(z).astype(jnp.int32)
    return jax.eval_shape(f, (step, z) if setup.pass_step else z)[1]


def _solve(
    closed: Closure,
    z0: PyTree,
    held: Held,
    watch: Watch,
    probe: BackwardProbe | None,
    setup: Setup,
) -> Solution:
    """Solves, and gives the solution its derivative; compiled once for equal programs."""
    batched = setup.batched

    def run(
        closed: Closure, z0: PyTree, held: Held, watch: Watch, probe: BackwardProbe | None
    ) -> Solution:
        if not batched:
            z0 = add_batch_axis(z0)
            if probe is not None:
                per_sample = {k: jnp.atleast_1d(a) for k, a in probe._asdict().items()}
                probe = BackwardProbe(**per_sample)._replace(evaluations=probe.evaluations)
        z0 = jax.lax.stop_gradient(tree.vary_over(z0, closed.state_axes))
        solution = _solve_and_attach(closed, z0, held, watch, probe, setup)
        stats = tree.same_on_parts(solution.stats)
        solution = dataclasses.replace(solution, stats=stats, state=None, sample_steps=())
        if batched:
            return solution
        return dataclasses.replace(
            solution,
            value=drop_batch_axis(solution.value),
            stats=solution.stats.single(),
            samples=tuple(map(drop_batch_axis, solution.samples)),
        )

    if _compat.explicit_axes():
        # The loop's own arrays carry no shardings. JAX distributes them; f runs in its own types.
        solver = held.value[0]
        aux = _aux_shapes(closed, z0 if batched else add_batch_axis(z0), setup)
        stats: Any = SolveStats
        shapes = Solution(
            None, stats(*[None] * 7, watch.init), (None,) * len(setup.sample_at), aux=aux
        )
        specs = sharding.solution_specs(
            closed,
            z0,
            shapes,
            batched=batched,
            trace=solver.trace,
            products=getattr(solver, "linearizes", False),
        )
        spread: Any = jax.sharding.auto_axes(run, out_sharding=specs)
        return spread(closed, z0, held, watch, probe)
    return run(closed, z0, held, watch, probe)


_solve_compiled = jax.jit(_solve, static_argnames=("setup",))


def _solve_and_attach(
    closed: Closure,
    z0: PyTree,
    held: Held,
    watch: Watch,
    probe: BackwardProbe | None,
    setup: Setup,
) -> Solution:
    solver, policies, control = held.value
    f = closed.output(0) if setup.has_aux else closed
    observed = None
    if setup.has_aux and (watch.stop is not None or watch.fold is not None):
        observed = LoopBody(jax.lax.stop_gradient(closed))
    progress = None
    if setup.execution.progress:
        progress = Progress(int(setup.execution.progress), solver.max_iter)
    options: Any = {"observed": observed, "sample_at": setup.sample_at, "progress": progress}
    if policies and differentiates_solver(policies[0]):
        policy: Any = policies[0]
        solution = policy.solve(f, z0, solver, control, watch, probe=probe, **options)
        stats = jax.lax.stop_gradient(solution.stats)
        solution = dataclasses.replace(solution, stats=stats)
    else:
        body = LoopBody(jax.lax.stop_gradient(f))
        solution = solve(body, z0, solver, control, watch, **options)
        solution = jax.lax.stop_gradient(solution)
        if policies:
            solution = _attached(f, solution, solver, policies, probe)
    if progress is not None:
        progress.close(solution.stats.evaluations)
    if setup.has_aux:
        at = closed.bound(solution.stats.step).output(1)
        aux = at(solution.value)
        solution = dataclasses.replace(
            solution, aux=aux if policies else jax.lax.stop_gradient(aux)
        )
    return solution


def _attached(
    f: Closure,
    solution: Solution,
    solver: Solver,
    policies: tuple[GradientPolicy, ...],
    probe: BackwardProbe | None,
) -> Solution:
    """The solution whose value and samples have the derivatives that the policies give them."""
    # A checkpoint around the layer that saves this name does not solve again.
    value = jax.tree.map(lambda leaf: checkpoint_name(leaf, "equilibrium"), solution.value)
    solution = dataclasses.replace(solution, value=value)
    states = (solution.value, *solution.samples)
    steps = (solution.stats.step, *solution.sample_steps)
    value, *samples = (
        policy.attach(
            f.bound(step),
            dataclasses.replace(solution, value=state),
            solver=solver,
            probe=None if i else probe,
        )
        for i, (policy, state, step) in enumerate(itertools.zip_longest(policies, states, steps))
    )
    return dataclasses.replace(solution, value=value, samples=tuple(samples))


def solve_adjoint(
    f: Cell,
    params: PyTree,
    x: PyTree,
    z: PyTree,
    cotangent: PyTree,
    *,
    solver: Solver | LinearSolver = Anderson(),  # noqa: B008  (frozen)
    batched: bool = True,
) -> Solution:
    """Solves `u = Jᵀ u + y`, J = ∂f/∂z at `z`: the backward pass by itself, to look at.

    No gradient flows through it.

    Args:
        f: as for `deq_fixed_point`.
        params: as for `deq_fixed_point`.
        x: as for `deq_fixed_point`.
        z: the point of linearisation, usually a solution; leaves `[B, ...]`.
        cotangent: y, like `z`.
        solver: solver of the linear system, `GMRES(...)` and `BiCGStab(...)` among them; where it
            has `trace=True` the stats hold its residuals.
        batched: as for `deq_fixed_point`.

    Returns:
        `value` u, and `stats` with residuals `‖Jᵀ u + y - u‖ / ‖y‖`.

    Raises:
        ValueError, TypeError: as for `deq_fixed_point`, and if `cotangent` is not like `z`.
    """
    if not is_linear_solver(solver):
        check_solver("solver", solver)
    checks.check_bool("batched", batched)
    z = initial_state(x, z, batched)
    shapes: list[Any] = [jax.tree.map(jnp.shape, tree) for tree in (z, cotangent)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"cotangent must be like z: got {shapes[1]}, expected {shapes[0]}")
    for (name, leaf), y in zip(checks.named_leaves(z), jax.tree.leaves(cotangent), strict=True):
        got = jnp.result_type(y) if checks.is_array(y) else type(y).__name__
        complex_to_real = jnp.iscomplexobj(y) and not jnp.iscomplexobj(leaf)
        if not checks.is_array(y) or complex_to_real:
            raise ValueError(
                f"cotangent must be real where z is real, and of numbers: leaf {name}: got {got}, "
                f"expected {leaf.dtype}"
            )
    cotangent = jax.tree.map(lambda y, z: jnp.asarray(y, z.dtype), cotangent, z)
    z = tree.vary_over(z, tree.varying_axes(cotangent))
    closed = close(f, params, x, z, batched=batched)
    return _solve_adjoint_compiled(closed, z, cotangent, Held(solver), batched)


def _solve_adjoint(f: Closure, z: PyTree, cotangent: PyTree, held: Held, batched: bool) -> Solution:
    if not batched:
        z, cotangent = add_batch_axis(z), add_batch_axis(cotangent)
    f, z, cotangent = jax.lax.stop_gradient((f, z, cotangent))
    z, cotangent = tree.vary_over((z, cotangent), f.state_axes)
    system = Affine.of(f, z, cotangent, transposed=True)
    u, stats = Solved(held)(system, report=True)
    return Solution(u, stats) if batched else Solution(drop_batch_axis(u), stats.single())


_solve_adjoint_compiled = jax.jit(_solve_adjoint, static_argnames=("batched",))


def returned(
    value: PyTree,
    stats: SolveStats,
    samples: tuple[PyTree, ...],
    return_stats: bool,
    aux: tuple[PyTree] | tuple[()] = (),
) -> Any:
    """What a layer returns: the value, and behind it what else was asked for."""
    if not (return_stats or samples or aux):
        return value
    return (value, *[stats] * return_stats, *[samples] * bool(samples), *aux)


def has_injection(cell: Any, asked: bool | None) -> bool:
    """Whether a layer computes `cell.inject(x)`, from its option `inject` and the cell's class.

    Raises:
        TypeError: the option is no bool, or the class of the cell has no such method.
    """
    found = callable(getattr(type(cell), "inject", None))
    if asked is not None:
        checks.check_bool("inject", asked)
    if asked and not found:
        raise TypeError(f"inject=True, but {type(cell).__name__} has no method inject(self, x)")
    return found if asked is None else asked


def is_batched(cell: Any, asked: bool | None) -> bool:
    """Whether a layer takes axis 0 as the batch, from its option `batched` and the cell's class.

    Raises:
        TypeError: the option is no bool.
        ValueError: it is True, and the class of the cell says that it is False.
    """
    whole = getattr(type(cell), "batched", None) is False
    if asked is None:
        return not whole
    checks.check_bool("batched", asked)
    if asked and whole:
        raise ValueError(
            f"batched=True, but the whole input of {type(cell).__name__} is one equation; leave "
            "batched out, or pass batched=False"
        )
    return asked


def start_of(cell: Any, x: PyTree, z0: PyTree | None) -> PyTree | None:
    """Where a layer starts: z0, or `cell.zeros(x)` if the class of the cell has that method."""
    if z0 is None and callable(getattr(type(cell), "zeros", None)):
        return cell.zeros(x)
    return z0


def _check_probe(probe: Any, z0: PyTree, batched: bool) -> None:
    if probe is None:
        return
    if not isinstance(probe, BackwardProbe):
        raise TypeError(f"backward_probe must be a BackwardProbe, got {type(probe).__name__}")
    batch: tuple[Any, ...] = jax.tree.leaves(z0)[0].shape[:1] if batched else ()
    expected = {"residual": batch, "iterations": batch, "status": batch, "evaluations": ()}
    got = {name: jnp.shape(field) for name, field in probe._asdict().items()}
    if got != expected:
        raise ValueError(
            f"backward_probe does not fit: got shapes {got}, expected {expected}; "
            f"make it with BackwardProbe.zeros({batch[0] if batched else ''})"
        )


def _sample_policies(
    sample_at: tuple[int, ...], given: Any, default: GradientPolicy
) -> tuple[GradientPolicy, ...]:
    """One policy for each sample."""
    if not isinstance(given, tuple | list):
        policies = (default if given is None else given,) * len(sample_at)
    elif len(given) != len(sample_at):
        raise ValueError(
            f"sample_gradient must hold one policy for each of the {len(sample_at)} samples, "
            f"got {len(given)}"
        )
    else:
        policies = tuple(given)
    for policy in policies:
        check_policy("sample_gradient", policy)
        if differentiates_solver(default) and policy != default:
            raise ValueError(
                f"with gradient={default!r} the samples are differentiated in the same way; leave "
                "sample_gradient out"
            )
        if differentiates_solver(policy) and not differentiates_solver(default):
            raise TypeError(
                f"sample_gradient={policy!r} differentiates the solver itself and goes only with "
                f"the same gradient, got gradient={default!r}"
            )
    return policies
