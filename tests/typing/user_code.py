"""Ordinary user code: what pyright and mypy must accept, with the types they must find.

`tests/test_typing.py` has both check this file, and traces it: so no value is looked at here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, assert_type

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import deq_jax
import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Execution,
    GradientPolicy,
    Implicit,
    LinearSolver,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Solution,
    Solver,
    SolveStats,
    Status,
    Unrolled,
    attach_gradient,
    deq_fixed_point,
    deq_root,
    implicit,
    solve_adjoint,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from deq_jax.stability import WeightNorm

version: str = deq_jax.__version__

Params = dict[str, jax.Array]


def cell(params: Params, z: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(z @ params["w"] + x + params["b"])


def untyped_cell(params, z, x):  # type: ignore[no-untyped-def]  # as much user code is written
    return jnp.tanh(z @ params["w"] + x + params["b"])


class State(NamedTuple):
    position: jax.Array
    velocity: jax.Array


def coupled(params: Params, z: State, x: jax.Array) -> State:
    return State(jnp.tanh(z.velocity @ params["w"] + x), jnp.tanh(z.position @ params["w"]))


def numbers() -> tuple[Params, jax.Array]:
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4), scale=0.2), jnp.float32)
    return {"w": w, "b": jnp.zeros(4)}, jnp.ones((3, 4))


def results_of_a_solve(params: Params, x: jax.Array) -> None:
    """The result is the state; what else is asked for stands behind it."""
    z0 = jnp.zeros_like(x)
    assert_type(deq_fixed_point(cell, params, x), jax.Array)
    assert_type(deq_fixed_point(cell, params, x, z0, return_stats=False), jax.Array)

    z, stats = deq_fixed_point(cell, params, x, z0, return_stats=True)
    assert_type(z, jax.Array)
    assert_type(stats, SolveStats)
    assert_type(stats.converged, jax.Array)
    assert_type(stats.trace, jax.Array | None)

    z, samples = deq_fixed_point(cell, params, x, sample_at=(2, 4))
    assert_type(z, jax.Array)
    assert_type(samples, tuple[jax.Array, ...])

    z, stats, samples = deq_fixed_point(
        cell, params, x, return_stats=True, sample_at=(2,), sample_gradient=OneStep()
    )
    assert_type(z, jax.Array)
    assert_type(stats, SolveStats)
    assert_type(samples, tuple[jax.Array, ...])
    sampled: jax.Array = sum(((z - sample) ** 2).mean() for sample in samples) + jnp.float32(0)
    assert sampled.shape == ()


def states_of_any_structure(params: Params, x: jax.Array) -> None:
    zeros = State(jnp.zeros_like(x), jnp.zeros_like(x))
    state, stats = deq_fixed_point(coupled, params, x, zeros, return_stats=True)
    assert_type(state, State)
    assert_type(stats, SolveStats)
    assert_type(deq_fixed_point(coupled, params, x, zeros).velocity, jax.Array)

    # Without annotations nothing is known, and nothing is reported.
    z = deq_fixed_point(untyped_cell, params, x)
    z, stats = deq_fixed_point(untyped_cell, params, x, return_stats=True)
    assert_type(stats, SolveStats)
    assert z.shape == x.shape

    # NumPy arrays are as good as others.
    array = np.ones((3, 4), np.float32)
    assert_type(deq_fixed_point(cell, params, array, np.zeros_like(array)), jax.Array)


def lambdas(params: Params, x: jax.Array) -> None:
    w = params["w"]
    z = deq_fixed_point(lambda w, z, x: jnp.tanh(z @ w + x), w, x)
    again, stats = deq_fixed_point(lambda w, z, x: jnp.tanh(z @ w + x), w, x, return_stats=True)
    assert z.shape == again.shape
    assert_type(stats, SolveStats)
    gradient = jax.grad(lambda w: deq_fixed_point(lambda w, z, x: 0.5 * z @ w + x, w, x).sum())(w)
    assert gradient.shape == w.shape


def either(params: Params, x: jax.Array, return_stats: bool, sample_at: tuple[int, ...]) -> int:
    """Flags that are not literals."""
    result = deq_fixed_point(cell, params, x, return_stats=return_stats, sample_at=sample_at)
    return len(jax.tree.leaves(result))


def other_solves(params: Params, x: jax.Array) -> None:
    solution = solve_fixed_point(cell, params, x, solver=Broyden(), execution=Execution())
    assert_type(solution, Solution)
    assert_type(solution.stats, SolveStats)
    value: jax.Array = solution.value
    value, stats = solve_fixed_point(cell, params, x, jnp.zeros_like(x))
    assert stats.converged.shape == (3,)

    adjoint = solve_adjoint(cell, params, x, value, jnp.ones_like(value), solver=GMRES())
    assert_type(adjoint, Solution)
    adjoint = solve_adjoint(cell, params, x, value, jnp.ones_like(value), solver=Anderson())
    assert (adjoint.stats.status == Status.CONVERGED).shape == (3,)


def solvers_and_gradients(params: Params, x: jax.Array) -> None:
    solvers: list[Solver] = [
        Anderson(history=3, mixing=0.9, ridge=1e-6, tol=1e-5, max_iter=40, atol=1e-8, trace=True),
        Broyden(memory=10, line_search=True),
        NewtonKrylov(krylov=BiCGStab(), forcing=0.2),
        Picard(damping=0.8, max_iter=200),
    ]
    linear_solvers: list[LinearSolver] = [GMRES(restart=5), BiCGStab(tol=1e-5)]
    gradients: list[GradientPolicy] = [
        Implicit(),
        Implicit(solver=GMRES()),
        Implicit(Picard(), tol=1e-3, max_iter=30),
        Neumann(terms=3),
        OneStep(),
        Phantom(steps=3, damping=0.5),
        Unrolled(steps=10),
    ]
    for solver in solvers:
        assert_type(deq_fixed_point(cell, params, x, solver=solver), jax.Array)
    for gradient in gradients:
        assert_type(deq_fixed_point(cell, params, x, gradient=gradient), jax.Array)
    for linear in linear_solvers:
        deq_fixed_point(cell, params, x, gradient=Implicit(solver=linear))
    deq_fixed_point(cell, params, x, solver=Anderson(), gradient=Implicit())
    deq_fixed_point(cell, params, x, solver=Broyden(), gradient=Implicit(reuse=True, max_iter=2))
    deq_fixed_point(cell, params, x, solver=NewtonKrylov(), gradient=Neumann())
    deq_fixed_point(cell, params, x, solver=Picard(), gradient=Phantom())
    deq_fixed_point(
        cell, params, x, sample_at=(2, 4), sample_gradient=(OneStep(), Neumann(terms=2))
    )


def executions(params: Params, x: jax.Array) -> None:
    for execution in (
        Execution(shrink_to=1),
        Execution(cell_dtype=jnp.bfloat16, state_dtype=jnp.float32),
    ):
        z, stats = deq_fixed_point(
            cell, params, x, solver=Anderson(tol=1e-2), return_stats=True, execution=execution
        )
        assert_type(z, jax.Array)
        assert_type(stats.evaluations, jax.Array)
    axis: str | tuple[str, ...] | None = Execution(shard_axis="data").shard_axis
    assert axis == "data"
    single = deq_fixed_point(cell, params, x, jnp.zeros((3, 4)), batched=False)
    assert_type(single, jax.Array)


def tolerances_as_data(params: Params, x: jax.Array) -> None:
    """A tolerance may be a NumPy scalar, an array, or a traced number."""
    deq_fixed_point(cell, params, x, solver=Anderson(tol=np.float32(1e-3), atol=np.float64(0)))
    deq_fixed_point(cell, params, x, solver=Picard(tol=jnp.float32(1e-3)))
    deq_fixed_point(cell, params, x, gradient=Implicit(tol=np.float32(1e-3)))

    @jax.jit
    def solved(tol: jax.Array) -> jax.Array:
        solver = Anderson(tol=tol)
        gradient = Implicit(solver=GMRES(tol=tol))
        return deq_fixed_point(cell, params, x, solver=solver, gradient=gradient)

    assert solved(jnp.float32(1e-3)).shape == x.shape


def backward_reports(params: Params, x: jax.Array) -> None:
    def loss(params: Params, probe: BackwardProbe) -> jax.Array:
        z = deq_fixed_point(cell, params, x, backward_probe=probe)
        return (z**2).mean()

    probe = BackwardProbe.zeros(3)
    assert_type(probe, BackwardProbe)
    gradient, report = jax.grad(loss, argnums=(0, 1))(params, probe)
    report = BackwardProbe(*report)
    assert_type(report.residual, jax.Array)
    assert report.status.shape == (3,)
    assert gradient["w"].shape == params["w"].shape
    assert BackwardProbe.zeros().residual.shape == ()


class MomentumState(NamedTuple):
    velocity: jax.Array


@dataclasses.dataclass(frozen=True)
class Momentum:
    """A solver of one's own."""

    tol: float = 1e-3
    atol: float = 0.0
    max_iter: int = 100
    trace: bool = False

    def init(self, z: jax.Array, fz: Any) -> MomentumState:
        return MomentumState(0 * z)

    def step(
        self, point: jax.Array, value: jax.Array, state: MomentumState
    ) -> tuple[jax.Array, MomentumState]:
        velocity = 0.2 * state.velocity + value - point
        return point + velocity, MomentumState(velocity)


@dataclasses.dataclass(frozen=True)
class Straight:
    """A gradient policy of one's own: that of one application of f, times a factor."""

    factor: float = 1.0

    def check(self, solver: Solver) -> None:
        if self.factor == 0:
            raise ValueError("there would be no gradient")

    def attach(
        self,
        f: Callable[[jax.Array], jax.Array],
        solution: Solution,
        *,
        solver: Solver,
        probe: BackwardProbe | None,
    ) -> jax.Array:
        z: jax.Array = solution.value
        change = self.factor * f(z)
        return z + (change - jax.lax.stop_gradient(change))


def ones_own(params: Params, x: jax.Array) -> None:
    solver: Solver = Momentum()
    z, stats = deq_fixed_point(cell, params, x, solver=Momentum(tol=1e-4), return_stats=True)
    assert_type(z, jax.Array)
    assert_type(stats, SolveStats)
    deq_fixed_point(cell, params, x, solver=solver, gradient=Implicit(solver=Momentum()))
    gradient: GradientPolicy = Straight()
    assert_type(deq_fixed_point(cell, params, x, gradient=gradient), jax.Array)
    assert_type(deq_fixed_point(cell, params, x, gradient=Straight(0.5)), jax.Array)


class Classifier(nnx.Module):
    """The layer of NNX in a network."""

    def __init__(self, rngs: nnx.Rngs):
        self.equilibrium = deq_jax.nnx.DEQ(
            FeedForwardCell(4, 8, rngs=rngs),
            solver=Anderson(tol=1e-3),
            gradient=Implicit(solver=GMRES()),
            execution=Execution(shrink_to=2),
            normalization=WeightNorm(),
        )
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.equilibrium(x))


def nnx_layers(x: jax.Array) -> None:
    assert_type(Classifier(nnx.Rngs(0))(x), jax.Array)
    layer = deq_jax.nnx.DEQ(FeedForwardCell(4, 8, rngs=nnx.Rngs(0)))
    z: jax.Array = layer(x)
    z, stats = layer(x, return_stats=True)
    assert_type(stats, SolveStats)
    z, samples = layer(x, z, sample_at=(2,))
    z, stats, samples = layer(
        x, z, return_stats=True, sample_at=(1,), backward_probe=BackwardProbe.zeros(3)
    )
    assert_type(stats, SolveStats)
    assert samples[0].shape == z.shape
    f, params, injection = layer.equation(x)
    assert solve_fixed_point(f, params, injection).value.shape == z.shape


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z: jax.Array, x: jax.Array) -> jax.Array:
        return nn.tanh(nn.Dense(4, kernel_init=nn.initializers.normal(0.05))(z) + x)


class LinenNetwork(nn.Module):
    """The layer of Linen in a network."""

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, SolveStats]:
        first: jax.Array = deq_jax.linen.DEQ(LinenCell())(x)
        layer = deq_jax.linen.DEQ(cell=LinenCell(), solver=Broyden(), gradient=OneStep())
        z, stats = layer(first, return_stats=True)
        assert_type(stats, SolveStats)
        return z, stats


def linen_layers(x: jax.Array) -> None:
    model = nn.Sequential([nn.Dense(4), deq_jax.linen.DEQ(LinenCell()), nn.Dense(2)])
    variables = model.init(jax.random.key(0), x)
    logits: Any = model.apply(variables, x)
    assert logits.shape == (3, 2)
    network = LinenNetwork()
    outputs: Any = network.apply(network.init(jax.random.key(0), x), x)
    assert outputs[0].shape == x.shape


def solutions_from_elsewhere(params: Params, x: jax.Array) -> None:
    """A function that solves, a solution that was found elsewhere, and roots."""

    @implicit(cell)
    def solve(params: Params, x: jax.Array) -> jax.Array:
        return solve_fixed_point(cell, params, x).value

    found: jax.Array = solve(params, x)
    assert_type(attach_gradient(cell, params, x, found), jax.Array)
    z, stats = attach_gradient(cell, params, x, found, return_stats=True, tol=1e-3)
    assert_type(stats, SolveStats)

    def difference(params: Params, z: jax.Array, x: jax.Array) -> jax.Array:
        return z - cell(params, z, x)

    assert_type(deq_root(difference, params, x), jax.Array)
    z, stats = deq_root(difference, params, x, solver=Broyden(), return_stats=True)
    assert_type(stats, SolveStats)
    assert z.shape == found.shape


def main() -> None:
    params, x = numbers()
    solutions_from_elsewhere(params, x)
    results_of_a_solve(params, x)
    states_of_any_structure(params, x)
    lambdas(params, x)
    assert either(params, x, True, (2,)) > 1
    other_solves(params, x)
    solvers_and_gradients(params, x)
    executions(params, x)
    tolerances_as_data(params, x)
    backward_reports(params, x)
    ones_own(params, x)
    nnx_layers(x)
    linen_layers(x)


if __name__ == "__main__":
    main()
