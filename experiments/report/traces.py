"""How the solver of a trained network converges on given inputs, forward and backward."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

from deq_jax import Implicit, Solver, solve_adjoint, solve_fixed_point
from experiments.train.step import cross_entropy

PyTree = Any


def residual_traces(
    model: Any, inputs: PyTree, targets: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Residuals at each evaluation of the forward and, where it keeps a trace, the backward solve.

    The backward solve is that of the mean cross-entropy, at the equilibria of the forward solve,
    and in the precision of the weights.

    Args:
        model: the network in evaluation mode; left as it is.
        inputs: what the network takes, `[B, ...]`.
        targets: `[B]` int32, or `[B, L]`.

    Returns:
        Residuals `[max_iter, B]`, NaN after a sample's stop, and tolerances, each under `forward`
        and `backward`. The latter is missing where no solver with a trace runs backwards.
    """
    definition, state = nnx.split(model)
    core = model.core
    solver = dataclasses.replace(core.solver, trace=True)
    backward = None
    if isinstance(core.gradient, Implicit):
        backward = core.gradient.backward_solver(core.solver)
        traced = isinstance(backward, Solver)
        backward = dataclasses.replace(backward, trace=True) if traced else None
    # The precision of the training; the batch is in one piece here.
    execution = dataclasses.replace(core.execution, shard_axis=None, shrink_to=None)

    @jax.jit
    def solve_both(state, inputs, targets):
        def loss_of(z):
            return cross_entropy(nnx.merge(definition, state, copy=True).classify(z), targets)

        network = nnx.merge(definition, state, copy=True)
        injection = network.injection(inputs)
        equation, start = network.core.equation(injection), network.start(injection)
        z, stats = solve_fixed_point(*equation, start, solver=solver, execution=execution)
        like = network.zeros(injection)
        z = jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), z, like)
        if backward is None:
            return (stats.trace,)
        # The gradient of the loss at the equilibrium is where a backward pass starts.
        cotangent = jax.grad(loss_of)(z)
        f, params, given = equation
        adjoint = solve_adjoint(f, params, given, z, cotangent, solver=backward)
        return stats.trace, adjoint.stats.trace

    # Named outside of jit, which would put the names into alphabetical order.
    names = ("forward", "backward")
    traces = jax.device_get(solve_both(state, inputs, targets))
    tolerances = (solver.tol, getattr(backward, "tol", None))
    count = len(traces)
    return dict(zip(names[:count], traces, strict=True)), dict(
        zip(names[:count], tolerances[:count], strict=True)
    )
