"""Flags for what keeps equilibria stable in training, and the phases that training goes through."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from deq_jax import GradientPolicy, OneStep, Phantom, Picard, Solver, Unrolled
from deq_jax.stability import (
    JacobianRegularization,
    Normalization,
    SpectralNorm,
    WeightNorm,
    evenly_spaced,
)
from experiments.train.errors import UsageError
from experiments.train.runs import flag_of

NormalizationName = Literal["none", "weight", "spectral"]
StartName = Literal["zeros", "cell", "mixed", "learned"]

_BUDGET_STREAM = 3
"""Last word of the seed of the budgets' draws; see `splits`."""

_JACOBIAN = ("jacobian_probability", "jacobian_increment", "jacobian_increment_every")
_JACOBIAN += ("jacobian_stop", "jacobian_samples")


@dataclasses.dataclass(frozen=True)
class StabilityConfig:
    """Flags that a training script with an equilibrium layer has besides its own.

    Attributes:
        jacobian_weight: weight of the penalty on the squared Frobenius norm of the cell's Jacobian
            over the size of the state. 0: none.
        jacobian_probability: share of the steps that have the penalty.
        jacobian_increment: added to the weight every --jacobian-increment-every steps.
        jacobian_increment_every: see there.
        jacobian_stop: step from which on there is no penalty. None: never.
        jacobian_samples: random vectors in each estimate of the norm.
        normalization: of the cell's kernels, once a step: none; weight, `v g / ‖v‖` with a
            learned g a channel; spectral, scaled down to a spectral norm of --normalization-bound
            where it is larger (of the kernel as a matrix).
        normalization_clip: upper bound of the factor g / ‖v‖ of weight. None: none.
        normalization_bound: bound of spectral.
        dropout: rate of variational dropout inside the cell, one mask a solve.
        correction_states: states of the solver's trajectory that the loss looks at, the last one
            being the answer; those before it are differentiated through one step.
        correction_gamma: each of them weighs this much less than the one after it.
        start: start of a training solve: zeros; cell, one application of it; mixed, random normal
            entries or zeros; learned, a layer of its own. Evaluation starts from that layer or
            from zeros.
        start_weight: weight of the distance from a learned start to the equilibrium in the loss.
        pretrain_steps: train so many steps by backpropagation through --pretrain-depth
            applications of the cell before the solver takes over.
        pretrain_depth: see there.
        budget_drop: the solver's budget in a training step is drawn from --max-iter less up to so
            many evaluations. Each budget is compiled once.
        first_tol: tolerance of the first stage of training, from which it is lowered to --tol
            geometrically, in --tol-stages of equal length. None: --tol throughout.
        tol_stages: see there.
        eval_max_iter: budget of the solver in evaluation. None: --max-iter.
        kernel_std: standard deviation of the cell's initial kernels. None: what the cell chooses.
        warn_converged: say so if a smaller share of the samples converges, forwards or backwards.
    """

    jacobian_weight: float = 0.0
    jacobian_probability: float = 1.0
    jacobian_increment: float = 0.0
    jacobian_increment_every: int | None = None
    jacobian_stop: int | None = None
    jacobian_samples: int = 1
    normalization: NormalizationName = "none"
    normalization_clip: float | None = None
    normalization_bound: float = 1.0
    dropout: float = 0.0
    correction_states: int = 1
    correction_gamma: float = 0.8
    start: StartName = "zeros"
    start_weight: float = 0.1
    pretrain_steps: int = 0
    pretrain_depth: int = 8
    budget_drop: int = 0
    first_tol: float | None = None
    tol_stages: int = 4
    eval_max_iter: int | None = None
    kernel_std: float | None = 0.01
    warn_converged: float = 0.5

    def check_stability(self, max_iter: int, tol: float) -> None:
        """Raises a UsageError that names a flag which is out of range or goes without another."""
        for name in ("jacobian_weight", "jacobian_increment", "start_weight"):
            self._demand(name, lambda value: 0 <= value < math.inf, "at least 0 and finite")
        self._demand("dropout", lambda value: 0 <= value < 1, "at least 0 and below 1")
        for name in ("jacobian_probability", "correction_gamma", "warn_converged"):
            self._demand(name, lambda value: 0 <= value <= 1, "from 0 to 1")
        for name in ("pretrain_steps", "budget_drop"):
            self._demand(name, lambda value: value >= 0, "at least 0")
        counts = ("jacobian_samples", "jacobian_increment_every", "jacobian_stop", "tol_stages")
        for name in (*counts, "correction_states", "pretrain_depth", "eval_max_iter"):
            self._demand(name, lambda value: value >= 1, "at least 1")
        for name in ("kernel_std", "normalization_clip", "normalization_bound"):
            self._demand(name, lambda value: 0 < value < math.inf, "positive and finite")
        self._demand("budget_drop", lambda value: value < max_iter, "below --max-iter")
        limit = max_iter - self.budget_drop
        allowed = f"at most --max-iter less --budget-drop, {limit}"
        self._demand("correction_states", lambda value: value <= limit, allowed)
        self._demand(
            "first_tol", lambda value: value >= tol > 0, "at least --tol, which is above 0"
        )
        if self.jacobian_increment and self.jacobian_increment_every is None:
            raise UsageError("--jacobian-increment needs --jacobian-increment-every")
        for name, needed in (("clip", "weight"), ("bound", "spectral")):
            name = f"normalization_{name}"
            if self._changed(name) and self.normalization != needed:
                raise UsageError(f"{flag_of(name)} needs --normalization {needed}")
        for name in _JACOBIAN:
            if not self.jacobian_weight and self._changed(name):
                raise UsageError(f"{flag_of(name)} needs --jacobian-weight")

    def changed(self) -> list[str]:
        """Names of the flags that are not at their defaults."""
        names = [field.name for field in dataclasses.fields(StabilityConfig)]
        return [name for name in names if self._changed(name)]

    def regularization(self) -> JacobianRegularization | None:
        """The penalty on the Jacobian, if there is one."""
        if not self.jacobian_weight:
            return None
        names = ("weight", "probability", "increment", "increment_every", "stop", "samples")
        return JacobianRegularization(*(getattr(self, f"jacobian_{name}") for name in names))

    def normalizer(self) -> Normalization | None:
        """The normalisation of the cell's kernels, if there is one."""
        if self.normalization == "weight":
            return WeightNorm(clip=self.normalization_clip)
        if self.normalization == "spectral":
            return SpectralNorm(scale=self.normalization_bound)
        return None

    def _changed(self, name: str) -> bool:
        return getattr(self, name) != type(self).__dataclass_fields__[name].default

    def _demand(self, name: str, is_good: Any, allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_good(value):
            raise UsageError(f"{flag_of(name)} must be {allowed}, got {value}")


@dataclasses.dataclass(frozen=True)
class Phase:
    """How the layer is solved and differentiated in a step; each phase is compiled by itself.

    Attributes:
        solver: its solver.
        gradient: its gradient policy.
        sample_at: evaluations whose states the loss looks at.
        sample_gradient: gradient policy of these states; None: `gradient`.
        pretraining: the solver stands in for a stack of weight-tied layers.
    """

    solver: Solver
    gradient: GradientPolicy
    sample_at: tuple[int, ...] = ()
    sample_gradient: GradientPolicy | None = None
    pretraining: bool = False

    @property
    def reports(self) -> bool:
        """Whether its solves are worth counting."""
        return not self.pretraining


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The phase of each step, a function of its number alone, so that a run can be resumed.

    Attributes:
        config: the flags.
        solver: the solver as it is in the end.
        gradient: the gradient policy.
        steps: steps of the whole training.
        seed: seed of the budgets' draws.
    """

    config: StabilityConfig
    solver: Solver
    gradient: GradientPolicy
    steps: int
    seed: int

    def training(self, step: int) -> Phase:
        """The phase of the training step with this number, from 0."""
        if step < self.config.pretrain_steps:
            return self._pretraining()
        solver = dataclasses.replace(self.solver, tol=self.tol(step), max_iter=self.budget(step))
        sample_at = evenly_spaced(solver.max_iter, self.config.correction_states)
        # A state along the way solves nothing, so that an exact solve for its gradient is wasted.
        cheap = not isinstance(self.gradient, Phantom | Unrolled)
        return Phase(solver, self.gradient, sample_at, OneStep() if cheap else None)

    def evaluation(self, step: int) -> Phase:
        """The phase of an evaluation after so many steps."""
        if 0 < step <= self.config.pretrain_steps:
            return self._pretraining()
        budget = self.config.eval_max_iter or self.solver.max_iter
        return Phase(dataclasses.replace(self.solver, max_iter=budget), self.gradient)

    def budget(self, step: int) -> int:
        """`max_iter` of a step."""
        if not self.config.budget_drop:
            return self.solver.max_iter
        generator = np.random.default_rng([self.seed, step, _BUDGET_STREAM])
        return self.solver.max_iter - int(generator.integers(self.config.budget_drop + 1))

    def tol(self, step: int) -> float:
        """`tol` of a step."""
        first, last, stages = self.config.first_tol, self.solver.tol, self.config.tol_stages
        if first is None or stages == 1:
            return last
        stage = min(stages - 1, step * stages // max(1, self.steps))
        return float(first * (last / first) ** (stage / (stages - 1)))

    def _pretraining(self) -> Phase:
        # Picard from zeros evaluates the cell at f^0(0), ..., f^k(0) and returns the last of them,
        # or one before it if that is closer to an equilibrium.
        depth = self.config.pretrain_depth + 1
        return Phase(Picard(tol=0.0, max_iter=depth), Unrolled(), pretraining=True)
