"""How the solver of a trained network converges on given images, forward and backward."""

import dataclasses

import jax
import numpy as np
import optax
from flax import nnx

from deq_jax import Implicit, Solver, solve_adjoint, solve_fixed_point
from deq_jax.models.conv_deq import ConvDEQ


def residual_traces(
    model: ConvDEQ, images: jax.Array, labels: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Residuals at each evaluation of the forward and, where it keeps a trace, the backward solve.

    The backward solve is that of the mean cross-entropy, at the equilibria of the forward solve,
    and in the precision of the weights.

    Args:
        model: the network in evaluation mode; left as it is.
        images: `[B, H, W, C]` float32 in [0, 1].
        labels: `[B]` int32.

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
    cell_definition, cell_state = nnx.split(core.cell)

    def cell(state, z, x):
        return nnx.merge(cell_definition, state, copy=True)(z, x)

    @jax.jit
    def solve_both(state, cell_state, images, labels):
        def loss_of(z):
            logits = nnx.merge(definition, state, copy=True).classify(z)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        injection = nnx.merge(definition, state, copy=True).injection(images)
        z, stats = solve_fixed_point(
            cell, cell_state, injection, solver=solver, execution=execution
        )
        z = z.astype(injection.dtype)
        if backward is None:
            return (stats.trace,)
        # The gradient of the loss at the equilibrium is where a backward pass starts.
        cotangent = jax.grad(loss_of)(z)
        adjoint = solve_adjoint(cell, cell_state, injection, z, cotangent, solver=backward)
        return stats.trace, adjoint.stats.trace

    # Named outside of jit, which would put the names into alphabetical order.
    names = ("forward", "backward")
    traces = jax.device_get(solve_both(state, cell_state, images, labels))
    tolerances = (solver.tol, getattr(backward, "tol", None))
    count = len(traces)
    return dict(zip(names[:count], traces, strict=True)), dict(
        zip(names[:count], tolerances[:count], strict=True)
    )
