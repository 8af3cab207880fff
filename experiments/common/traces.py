"""How the solver of a trained network converges on given images, forward and backward."""

import dataclasses

import jax
import numpy as np
import optax
from flax import nnx

from deq_jax import solve_adjoint
from deq_jax.models.conv_deq import ConvDEQ


def residual_traces(
    model: ConvDEQ, images: jax.Array, labels: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Residuals at each evaluation of the forward and of the backward solve.

    The backward solve is that of the mean cross-entropy, at the equilibria of the forward solve.

    Args:
        model: the network in evaluation mode; left as it is.
        images: `[B, H, W, C]` float32 in [0, 1].
        labels: `[B]` int32.

    Returns:
        Residuals `[max_iter, B]`, NaN after a sample's stop, and tolerances, each under `forward`
        and `backward`.
    """
    definition, state = nnx.split(model)
    core = model.core
    solver = dataclasses.replace(core.solver, trace=True)
    backward = dataclasses.replace(core.gradient.backward_solver(core.solver), trace=True)

    @jax.jit
    def solve_both(state, images, labels):
        seen = {}

        def observed(injection, **_):
            layer = nnx.merge(definition, state, copy=True).core
            layer.solver = solver
            z, stats = layer(injection, return_stats=True)
            seen.update(injection=injection, z=z, trace=stats.trace)
            return z, stats

        def loss_of(core):
            network = nnx.merge(definition, state, copy=True)
            network.core = core
            logits, _ = network(images, return_stats=True)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss_of(observed)
        # The loss as a function of the equilibrium: its gradient is where a backward pass starts.
        cotangent = jax.grad(lambda z: loss_of(lambda injection, **_: (z, None)))(seen["z"])

        cell = nnx.merge(definition, state, copy=True).core.cell
        cell_definition, cell_state = nnx.split(cell)
        injection = seen["injection"]
        if callable(getattr(type(cell), "inject", None)):
            injection = cell.inject(injection)

        def apply(state, z, x):
            return nnx.merge(cell_definition, state, copy=True)(z, x)

        adjoint = solve_adjoint(apply, cell_state, injection, seen["z"], cotangent, solver=backward)
        return seen["trace"], adjoint.stats.trace

    # Named outside of jit, which would put the names into alphabetical order.
    names = ("forward", "backward")
    traces = jax.device_get(solve_both(state, images, labels))
    tolerances = (solver.tol, backward.tol)
    return dict(zip(names, traces, strict=True)), dict(zip(names, tolerances, strict=True))
