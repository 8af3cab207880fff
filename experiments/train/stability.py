"""Training with `stability:on`: the phases that it goes through, and what is added to the loss.

A phase is a function of the step's number alone, so that a run can be resumed at any step. Each
different phase is compiled by itself; budgets and tolerances are inputs of the compiled step.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_jax import (
    BackwardProbe,
    Control,
    GradientPolicy,
    OneStep,
    Phantom,
    Picard,
    Solver,
    Unrolled,
)
from deq_jax.models.sequence import Segment
from deq_jax.stability import (
    corrected_loss,
    evenly_spaced,
    initializer_loss,
    mixed_initial,
    one_application,
)
from experiments.train.config import Stability, TrainingConfig
from experiments.train.metrics import Outcome, cross_entropy

PyTree = Any

_BUDGET_STREAM = 3
"""Last word of the seed of the budgets' draws; without it two uses of a seed draw the same."""


class Limits(NamedTuple):
    """What ends a solve in one training step, in the place of the solver's own bounds.

    Attributes:
        budget: most evaluations.
        tol: tolerance.
    """

    budget: Any
    tol: Any


@dataclasses.dataclass(frozen=True)
class Phase:
    """How the layer is solved and differentiated.

    Attributes:
        solver: its solver.
        gradient: its gradient policy.
        sample_at: evaluations whose states the loss looks at.
        sample_gradient: gradient policy of these states; None for `gradient`.
        pretraining: the solver stands in for a stack of weight-tied layers.
        limits: bounds of this step; None for those of the solver. Phases that differ in nothing
            else are equal, and share a compiled step.
    """

    solver: Solver
    gradient: GradientPolicy
    sample_at: tuple[int, ...] = ()
    sample_gradient: GradientPolicy | None = None
    pretraining: bool = False
    limits: Limits | None = dataclasses.field(default=None, compare=False)


def training_phase(config: TrainingConfig, step: int, steps: int) -> Phase | None:
    """The phase of training step number `step` of `steps`; None where there are no phases."""
    tools, gradient = config.stability, config.gradient_policy()
    if tools is None or not config.is_deq:
        return None
    if step < tools.pretrain_steps:
        return _pretraining(tools.pretrain_depth)
    solver, limits = config.solver, None
    if tools.budget_drop or tools.first_tol is not None:
        draw = np.random.default_rng([config.seed, step, _BUDGET_STREAM])
        drop = int(draw.integers(tools.budget_drop + 1))
        tol = _tolerance(tools, solver.tol, step, steps)
        limits = Limits(np.int32(solver.max_iter - drop), np.float32(tol))
    sample_at = evenly_spaced(solver.max_iter, tools.correction_states)
    # Intermediate states are not equilibria: an exact implicit gradient is wasted on them.
    cheap = not isinstance(gradient, Phantom | Unrolled)
    return Phase(solver, gradient, sample_at, OneStep() if cheap else None, limits=limits)


def evaluation_phase(config: TrainingConfig, step: int) -> Phase | None:
    """The phase of an evaluation after so many steps; None where there are no phases."""
    tools = config.stability
    if tools is None or not config.is_deq:
        return None
    if 0 < step <= tools.pretrain_steps:
        return _pretraining(tools.pretrain_depth)
    budget = tools.eval_max_iter or config.solver.max_iter
    return Phase(dataclasses.replace(config.solver, max_iter=budget), config.gradient_policy())


def _tolerance(tools: Stability, last: float, step: int, steps: int) -> float:
    first, stages = tools.first_tol, tools.tol_stages
    if first is None or stages == 1:
        return last
    stage = min(stages - 1, step * stages // max(1, steps))
    return float(first * (last / first) ** (stage / (stages - 1)))


def _pretraining(depth: int) -> Phase:
    # Picard from zeros evaluates the cell at f^0(0), ..., f^k(0) and returns the last of them, or
    # one before it if that is closer to an equilibrium.
    return Phase(Picard(tol=0.0, max_iter=depth + 1), Unrolled(), pretraining=True)


def forward(
    config: TrainingConfig,
    phase: Phase,
    model: Any,
    inputs: PyTree,
    targets: jax.Array,
    probe: BackwardProbe | None,
    step: jax.Array,
    limits: Limits | None = None,
) -> Outcome:
    """One pass in training, like `step.forward`, and what the stability tools add to the loss.

    As far as the settings ask for them these are `Σ γ^k loss(z_k)` over states along the way,
    `weight ‖J‖² / D` and `weight |z_0 - z*|`.

    Args:
        config: the settings.
        phase: how the layer is solved.
        model: the network in training mode.
        inputs: what the network takes.
        targets: `[B]` classes, or `[B, L]`.
        probe: where the backward solve reports.
        step: number of the step; all that is random depends on it and the seed.
        limits: what ends the solve, in the place of the solver's own bounds.
    """
    # The equilibrium
    tools = config.stability
    assert tools is not None
    key = jax.random.fold_in(jax.random.key(config.seed), step)
    start_key, jacobian_key = jax.random.split(key)
    injection = model.injection(inputs)
    equation, like = model.core.equation(injection), model.zeros(injection)
    z0 = _start(tools, model, equation, injection, like, start_key)
    own, control = model.core.solver, Control()
    if limits is not None:
        model.core.solver = dataclasses.replace(own, tol=limits.tol)
        control = Control(budget=limits.budget)
    z, stats, *samples = model.core(
        injection,
        z0,
        return_stats=True,
        backward_probe=probe,
        sample_at=phase.sample_at,
        sample_gradient=phase.sample_gradient,
        control=control,
    )
    model.core.solver = own
    z = _cast_like(z, like)

    # The answer
    aside = nnx.merge(*nnx.split(model), copy=True)  # only z updates statistics
    logits = model.classify(z)
    loss = cross_entropy(logits, targets)
    memory = model.memory(injection, z) if isinstance(inputs, Segment) else None

    # What is added
    extra = jnp.zeros_like(loss)
    if samples:

        def loss_of(z: PyTree) -> jax.Array:
            return cross_entropy(aside.classify(_cast_like(z, like)), targets)

        gamma = tools.correction_gamma
        extra += gamma * corrected_loss(loss_of, samples[0], gamma)
    if tools.start == "learned":
        extra += tools.start_weight * initializer_loss(z0, z)
    if tools.jacobian.weight or tools.jacobian.increment:
        f, params, x = equation
        extra += tools.jacobian(f, params, z, x, key=jacobian_key, step=step)
    return Outcome(loss, extra, logits, stats, memory)


def _start(
    tools: Stability, model: Any, equation: Any, injection: PyTree, like: PyTree, key: jax.Array
) -> PyTree:
    """Where a training solve starts."""
    if tools.start == "learned":
        return model.start(injection)
    if tools.start == "mixed":
        return mixed_initial(key, like)
    return one_application(*equation, like) if tools.start == "cell" else like


def _cast_like(z: PyTree, like: PyTree) -> PyTree:
    """The state in the dtypes of another: a solve may be in a lower precision."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), z, like)
