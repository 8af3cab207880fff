"""Settings that all training scripts have: the flags of training, solver and gradient, checked."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp

from deq_jax import (
    GMRES,
    Anderson,
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
    Solver,
    Unrolled,
)
from experiments.train import devices
from experiments.train.errors import UsageError
from experiments.train.runs import flag_of
from experiments.train.stability import StabilityConfig

SolverName = Literal["anderson", "picard", "broyden", "newton_krylov"]
LinearSolverName = Literal["anderson", "picard", "broyden", "newton_krylov", "gmres", "bicgstab"]
PrecisionName = Literal["float32", "mixed", "bfloat16"]
GradientName = Literal["implicit", "shine", "one_step", "neumann", "phantom", "unrolled"]

_FLAGS_OF_GRADIENTS = {
    "gradient_steps": ("neumann", "phantom"),
    "gradient_damping": ("neumann", "phantom"),
    "backward_solver": ("implicit", "shine"),
    "backward_tol": ("implicit", "shine"),
    "backward_max_iter": ("implicit", "shine"),
}
"""Flags that only some values of --gradient look at."""

FOR_CONTROLS = ("dropout", "kernel_std")
"""The flags of `StabilityConfig` that say something to a network without a solver."""

IRRELEVANT = frozenset(
    {"data_dir", "run_dir", "checkpoint_every_seconds", "fresh", "tensorboard", "progress"}
)
"""Settings with which a run may be gone on with although they differ: the result does not depend
on them. What `data_dir` holds is compared by its checksum."""


@dataclasses.dataclass(frozen=True)
class TrainingConfig(StabilityConfig):
    """Flags that every training script has.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples in a step. What is left over at the end of an epoch is dropped; it is
            other examples in each epoch.
        learning_rate: Adam's largest step size; decays along a cosine, step by step.
        final_learning_rate: where the cosine ends.
        seed: seed of the initial weights, the order of examples and all else that is drawn.
        model: deq, or a control.
        depth: cells in a control.
        solver: fixed-point solver of the forward pass.
        tol: relative residual at which a sample has converged.
        max_iter: most evaluations of the cell in a solve.
        history: Anderson's window.
        mixing: Anderson's beta: below 1 damped, above 1 overprojected.
        ridge: Anderson's ridge, relative to its Gram matrix.
        damping: Picard's damping, in (0, 1].
        memory: rank-one terms that Broyden keeps. None: all.
        restart: dimension at which GMRES starts over, and that of Newton-Krylov's inner solve.
        gradient: gradient of the layer: implicit differentiation; shine, which starts its backward
            solve from the inverse estimate of --solver broyden; or an approximation: one_step,
            neumann, phantom; or unrolled, backpropagation through the solver.
        gradient_steps: terms of neumann, steps of phantom. None: 5.
        gradient_damping: damping of neumann and phantom. None: 1 and 0.5.
        backward_solver: solver of the backward pass of implicit and shine. None: that of the
            forward pass.
        backward_tol: tolerance of the backward pass. None: --tol.
        backward_max_iter: most transposed products in a backward pass. None: --max-iter.
        shrink_to: let samples leave the solve as they finish, down to this many. None: all stay.
        precision: of the solve: float32; mixed, the cell in bfloat16; or bfloat16 throughout.
            Weights and all around the solve stay in float32. bfloat16 cannot reach a --tol much
            below 1e-2.
        devices: devices to split each batch over; on a CPU that many virtual ones.
        eval_batch_size: examples evaluated at once.
        eval_every: epochs between evaluations; the last one is always evaluated.
        run_dir: folder for what the run writes. None: runs/PRESET.
        checkpoint_every_seconds: save this often, besides each epoch's end.
        fresh: delete the run in --run-dir and start over.
        tensorboard: write TensorBoard events too (needs the extra [tensorboard]).
        progress: show progress bars.
    """

    epochs: int = 12
    batch_size: int = 32
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-6
    seed: int = 0
    model: str = "deq"
    depth: int = 8
    solver: SolverName = "anderson"
    tol: float = 1e-2
    max_iter: int = 25
    history: int = 5
    mixing: float = 1.0
    ridge: float = 1e-4
    damping: float = 1.0
    memory: int | None = None
    restart: int = 20
    gradient: GradientName = "implicit"
    gradient_steps: int | None = None
    gradient_damping: float | None = None
    backward_solver: LinearSolverName | None = None
    backward_tol: float | None = None
    backward_max_iter: int | None = None
    shrink_to: int | None = None
    precision: PrecisionName = "float32"
    devices: int = 1
    eval_batch_size: int = 128
    eval_every: int = 1
    run_dir: str | None = None
    checkpoint_every_seconds: float = 30.0
    fresh: bool = False
    tensorboard: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        counts = ("epochs", "batch_size", "depth", "max_iter", "history", "eval_batch_size")
        counts += ("eval_every", "memory", "restart", "gradient_steps", "shrink_to", "devices")
        for name in (*counts, "backward_max_iter"):
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in ("learning_rate", "final_learning_rate", "mixing"):
            self._check(name, lambda value: 0 < value < math.inf, "positive and finite")
        self._check("seed", lambda value: value >= 0, "at least 0")
        for name in ("tol", "backward_tol", "ridge", "checkpoint_every_seconds"):
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("damping", "gradient_damping"):
            self._check(name, lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check_gradient()
        self._check_execution()
        self._check_stability()
        limit = self.learning_rate
        self._check(
            "final_learning_rate", lambda value: value <= limit, f"at most --learning-rate, {limit}"
        )

    def _check(self, name: str, is_good: Callable[[Any], bool], allowed: str) -> None:
        value = getattr(self, name)
        if value is not None and not is_good(value):
            raise UsageError(f"{flag_of(name)} must be {allowed}, got {value}")

    def _check_gradient(self) -> None:
        """Raises a UsageError where a flag says something about another gradient than chosen."""
        if self.gradient == "shine" and self.solver != "broyden":
            raise UsageError(f"--gradient shine needs --solver broyden, got {self.solver}")
        for name, gradients in _FLAGS_OF_GRADIENTS.items():
            if getattr(self, name) is not None and self.gradient not in gradients:
                raise UsageError(
                    f"{flag_of(name)} is for --gradient {' or '.join(gradients)}, "
                    f"got --gradient {self.gradient}"
                )
        try:
            policy = self.gradient_policy()
            if isinstance(policy, Implicit):
                policy.backward_solver(self.forward_solver())
        except ValueError as error:  # such as GMRES with room for one product
            raise UsageError(f"these flags do not go together: {error}") from error

    def _check_execution(self) -> None:
        """Raises a UsageError where a flag does not go with the model, gradient or batch."""
        for name, absent in (("shrink_to", None), ("precision", "float32")):
            if getattr(self, name) != absent and not self.is_deq:
                raise UsageError(f"{flag_of(name)} is for --model deq, got --model {self.model}")
        for name in ("batch_size", "eval_batch_size"):
            allowed = f"a multiple of --devices, {self.devices}"
            self._check(name, lambda value: value % self.devices == 0, allowed)

    def _check_stability(self) -> None:
        """Raises a UsageError where a flag of the stability tools does not fit."""
        self.check_stability(self.max_iter, self.tol)
        for name in self.changed():
            if not self.is_deq and name not in FOR_CONTROLS:
                raise UsageError(f"{flag_of(name)} is for --model deq, got --model {self.model}")
        if self.gradient == "unrolled" and self.shrink_to is not None:
            raise UsageError("--shrink-to does not go with --gradient unrolled")
        if self.pretrain_steps and self.shrink_to is not None:
            raise UsageError("--shrink-to does not go with --pretrain-steps")

    @property
    def is_deq(self) -> bool:
        """Whether the model has a solver."""
        return self.model == "deq"

    @property
    def reports_backward(self) -> bool:
        """Whether the backward pass has something to report."""
        return self.is_deq and self.gradient not in ("phantom", "unrolled")

    def forward_solver(self) -> Solver:
        """The solver of the forward pass."""
        return self._solver(self.solver)

    def gradient_policy(self) -> GradientPolicy:
        """How gradients pass through the layer."""
        steps = 5 if self.gradient_steps is None else self.gradient_steps
        if self.gradient == "one_step":
            return OneStep()
        if self.gradient == "neumann":
            return Neumann(steps, 1.0 if self.gradient_damping is None else self.gradient_damping)
        if self.gradient == "phantom":
            return Phantom(steps, 0.5 if self.gradient_damping is None else self.gradient_damping)
        if self.gradient == "unrolled":
            return Unrolled()
        solver = None if self.backward_solver is None else self._solver(self.backward_solver)
        return Implicit(
            solver=solver,
            tol=self.backward_tol,
            max_iter=self.backward_max_iter,
            reuse=self.gradient == "shine",
        )

    def execution(self) -> Execution:
        """How the layer's solves are carried out."""
        return Execution(
            shrink_to=self.shrink_to,
            shard_axis=None if self.devices == 1 else devices.AXIS,
            cell_dtype=None if self.precision == "float32" else jnp.bfloat16,
            state_dtype=jnp.bfloat16 if self.precision == "bfloat16" else None,
        )

    def _solver(self, name: LinearSolverName) -> Any:
        limits = {"tol": self.tol, "max_iter": self.max_iter}
        solvers: dict[str, Callable[[], Solver | LinearSolver]] = {
            "anderson": lambda: Anderson(self.history, self.mixing, self.ridge, **limits),
            "picard": lambda: Picard(self.damping, **limits),
            "broyden": lambda: Broyden(self.memory, **limits),
            "newton_krylov": lambda: NewtonKrylov(GMRES(self.restart), **limits),
            "gmres": lambda: GMRES(self.restart, **limits),
            "bicgstab": lambda: BiCGStab(**limits),
        }
        return solvers[name]()
