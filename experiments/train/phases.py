"""How the equilibrium layer is solved and differentiated in a step of training.

A phase is a function of the step's number alone, so that a run can be resumed at any step. Each
different phase is compiled by itself.
"""

import dataclasses

import numpy as np

from deq_jax import GradientPolicy, OneStep, Phantom, Picard, Solver, Unrolled
from deq_jax.stability import evenly_spaced
from experiments.train.config import TrainingConfig

_BUDGET_STREAM = 3
"""Last word of the seed of the budgets' draws; without it two uses of a seed draw the same."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """How the layer is solved and differentiated.

    Attributes:
        solver: its solver.
        gradient: its gradient policy.
        sample_at: evaluations whose states the loss looks at.
        sample_gradient: gradient policy of these states; None for `gradient`.
        pretraining: the solver stands in for a stack of weight-tied layers.
    """

    solver: Solver
    gradient: GradientPolicy
    sample_at: tuple[int, ...] = ()
    sample_gradient: GradientPolicy | None = None
    pretraining: bool = False


def training_phase(config: TrainingConfig, step: int, steps: int) -> Phase | None:
    """The phase of training step number `step` of `steps`; None for a model without a solver."""
    if not config.is_deq:
        return None
    tools, gradient = config.tools, config.gradient_policy()
    if step < tools.pretrain_steps:
        return _pretraining(tools.pretrain_depth)
    solver = config.solver
    if tools.budget_drop:
        draw = np.random.default_rng([config.seed, step, _BUDGET_STREAM])
        drop = int(draw.integers(tools.budget_drop + 1))
        solver = dataclasses.replace(solver, max_iter=solver.max_iter - drop)
    solver = dataclasses.replace(solver, tol=_tolerance(config, step, steps))
    sample_at = evenly_spaced(solver.max_iter, tools.correction_states)
    # A state along the way solves nothing, so that an exact solve for its gradient is wasted.
    cheap = not isinstance(gradient, Phantom | Unrolled)
    return Phase(solver, gradient, sample_at, OneStep() if cheap else None)


def evaluation_phase(config: TrainingConfig, step: int) -> Phase | None:
    """The phase of an evaluation after so many steps; None for a model without a solver."""
    if not config.is_deq:
        return None
    tools = config.tools
    if 0 < step <= tools.pretrain_steps:
        return _pretraining(tools.pretrain_depth)
    budget = tools.eval_max_iter or config.solver.max_iter
    return Phase(dataclasses.replace(config.solver, max_iter=budget), config.gradient_policy())


def _tolerance(config: TrainingConfig, step: int, steps: int) -> float:
    first, last, stages = config.tools.first_tol, config.solver.tol, config.tools.tol_stages
    if first is None or stages == 1:
        return last
    stage = min(stages - 1, step * stages // max(1, steps))
    return float(first * (last / first) ** (stage / (stages - 1)))


def _pretraining(depth: int) -> Phase:
    # Picard from zeros evaluates the cell at f^0(0), ..., f^k(0) and returns the last of them, or
    # one before it if that is closer to an equilibrium.
    return Phase(Picard(tol=0.0, max_iter=depth + 1), Unrolled(), pretraining=True)
