"""Settings of the training commands: dataclasses that become the command line.

Solvers, gradient policies and penalties are the library's own dataclasses. A setting that is one of
several of them is a choice, `solver:picard`, whose fields are then flags, `--solver.damping 0.5`.
Their range checks are those of the library.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from deq_jax import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Execution,
    GradientPolicy,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Solver,
    Unrolled,
)
from deq_jax.stability import JacobianRegularization, Normalization, SpectralNorm, WeightNorm
from experiments.train.errors import UsageError

DATA_AXIS = "data"
"""Name of the mesh axis over which batches are split."""

PyTree = Any
AnyConfig = TypeVar("AnyConfig", bound="TrainingConfig")


def choice(name: str, default: Any) -> Any:
    """One of the dataclasses that a setting may be, under its name on the command line."""
    return Annotated[type(default), tyro.conf.subcommand(name, default=default, description=" ")]


def group(kind: Any) -> Any:
    """Settings with a heading of their own in the help, and nothing but them below it."""
    return Annotated[kind, tyro.conf.arg(help=" ")]


_LIMITS: dict[str, Any] = {"tol": 1e-2, "max_iter": 25}

ANDERSON = choice("anderson", Anderson(**_LIMITS))
SolverChoice = (
    ANDERSON
    | choice("picard", Picard(**_LIMITS))
    | choice("broyden", Broyden(**_LIMITS))
    | choice("newton", NewtonKrylov(**_LIMITS))
)
GradientChoice = (
    choice("implicit", Implicit())
    | choice("one_step", OneStep())
    | choice("neumann", Neumann())
    | choice("phantom", Phantom())
    | choice("unrolled", Unrolled())
)
BackwardChoice = (
    choice("same", None)
    | ANDERSON
    | choice("gmres", GMRES(**_LIMITS))
    | choice("bicgstab", BiCGStab(**_LIMITS))
)
NormalizationChoice = (
    choice("none", None) | choice("weight", WeightNorm()) | choice("spectral", SpectralNorm())
)


def require(ok: bool, flag: str, allowed: str, value: object) -> None:
    """Raises a UsageError that names the flag unless its value is allowed."""
    if not ok:
        raise UsageError(f"--{flag.replace('_', '-')} must be {allowed}, got {value}")


def require_all(
    settings: Any, names: Sequence[str], is_good: Callable[[Any], bool], allowed: str, group: str
) -> None:
    """`require` for several fields of a dataclass; None is always allowed."""
    for name in names:
        value = getattr(settings, name)
        require(value is None or is_good(value), f"{group}{name}", allowed, value)


@dataclasses.dataclass(frozen=True)
class Optim:
    """The optimiser, and its learning rate: a linear rise and a cosine.

    Attributes:
        lr: largest learning rate.
        final_lr: the rate at the end of the cosine.
        warmup: steps in which the rate rises to its largest.
        clip: largest norm of the gradient.
        weight_decay: of matrices (AdamW).
        beta2: Adam's second decay rate.
    """

    lr: float = 1e-3
    final_lr: float = 1e-6
    warmup: int = 0
    clip: float | None = None
    weight_decay: float = 0.0
    beta2: float = 0.999

    def __post_init__(self) -> None:
        positive = ("lr", "final_lr", "clip")
        require_all(self, positive, lambda v: 0 < v < math.inf, "positive and finite", "optim.")
        require(self.final_lr <= self.lr, "optim.final-lr", "at most --optim.lr", self.final_lr)
        require_all(
            self,
            ("warmup", "weight_decay"),
            lambda v: 0 <= v < math.inf,
            "at least 0 and finite",
            "optim.",
        )
        require(0 <= self.beta2 < 1, "optim.beta2", "at least 0 and below 1", self.beta2)

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each of so many steps."""
        warmup = min(self.warmup, steps - 1)
        return optax.warmup_cosine_decay_schedule(
            self.lr / (warmup + 1), self.lr, warmup, steps, self.final_lr
        )

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """AdamW, which decays matrices alone, behind the clipping of the gradient's norm."""

        def matrices(params: PyTree) -> PyTree:
            return jax.tree.map(lambda leaf: leaf.ndim > 1, params)

        schedule = self.schedule(steps)
        adam = optax.adamw(schedule, b2=self.beta2, weight_decay=self.weight_decay, mask=matrices)
        if self.clip is None:
            return adam
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(frozen=True)
class Stability:
    """What keeps equilibria findable while the weights change; see docs/stability.md.

    Attributes:
        jacobian: penalty on the size of the cell's Jacobian; without one its weight is 0.
        normalization: of the cell's kernels, once a step.
        correction_states: states of the solver's trajectory that the loss looks at, the last one
            being the answer; those before it are differentiated through one step.
        correction_gamma: each of them weighs this much less than the one after it.
        start: start of a training solve: zeros; cell, one application of it; mixed, random normal
            entries or zeros; learned, a layer of its own. Evaluation starts from that layer or
            from zeros.
        start_weight: weight of the distance from a learned start to the equilibrium in the loss.
        pretrain_steps: train so many steps by backpropagation through a stack of cells before the
            solver takes over.
        pretrain_depth: cells in that stack.
        budget_drop: draw the solver's budget of a step from its max_iter less up to so many
            evaluations. Each budget is compiled once.
        first_tol: tolerance of the first stage of training, from which it falls geometrically to
            that of the solver. None: one tolerance.
        tol_stages: stages of equal length in which it falls.
        eval_max_iter: budget of the solver in evaluation. None: that of training.
    """

    jacobian: JacobianRegularization = JacobianRegularization(0.0)
    normalization: NormalizationChoice = None
    correction_states: int = 1
    correction_gamma: float = 0.8
    start: Literal["zeros", "cell", "mixed", "learned"] = "zeros"
    start_weight: float = 0.1
    pretrain_steps: int = 0
    pretrain_depth: int = 8
    budget_drop: int = 0
    first_tol: float | None = None
    tol_stages: int = 4
    eval_max_iter: int | None = None

    def __post_init__(self) -> None:
        counts = ("correction_states", "pretrain_depth", "tol_stages", "eval_max_iter")
        require_all(self, counts, lambda v: v >= 1, "at least 1", "stability.")
        counts = ("pretrain_steps", "budget_drop")
        require_all(self, counts, lambda v: v >= 0, "at least 0", "stability.")
        gamma, weight = self.correction_gamma, self.start_weight
        require(0 <= gamma <= 1, "stability.correction-gamma", "from 0 to 1", gamma)
        require(0 <= weight < math.inf, "stability.start-weight", "at least 0 and finite", weight)


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """The folder of a run, and what is shown of it.

    Attributes:
        dir: folder of the run. None: one in runs/.
        fresh: delete the run that is there.
        elastic: go on with another number of devices.
        save_every: seconds between two checkpoints.
        tensorboard: write TensorBoard events too.
        progress: show progress bars.
        warn_below: share of converged solves to warn at.
    """

    dir: str | None = None
    fresh: bool = False
    elastic: bool = False
    save_every: float = 30.0
    tensorboard: bool = False
    progress: bool = True
    warn_below: float = 0.5

    def __post_init__(self) -> None:
        require(self.save_every >= 0, "run.save-every", "at least 0", self.save_every)
        require(0 <= self.warn_below <= 1, "run.warn-below", "from 0 to 1", self.warn_below)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """What all training commands have in common.

    Attributes:
        depth: cells of a control.
        epochs: passes over the training data.
        batch_size: examples in a step.
        eval_batch_size: examples evaluated at once.
        eval_every: epochs between evaluations.
        seed: seed of weights, order and dropout.
        devices: split each batch over so many.
        precision: of the solve.
        shrink_to: let finished samples leave, down to this.
        solver: how the equilibrium is found.
        gradient: how gradients pass through it.
        backward: solver of gradient:implicit; same as forwards.
        stability: penalties and phases, see docs/stability.md.
    """

    depth: int = 8
    epochs: int = 12
    batch_size: int = 32
    eval_batch_size: int = 128
    eval_every: int = 1
    seed: int = 0
    devices: int = 1
    precision: Literal["float32", "mixed", "bfloat16"] = "float32"
    shrink_to: int | None = None
    optim: group(Optim) = Optim()
    solver: SolverChoice = Anderson(**_LIMITS)
    gradient: GradientChoice = Implicit()
    backward: BackwardChoice = None
    stability: choice("off", None) | choice("on", Stability()) = None
    run: group(RunOptions) = RunOptions()

    model: typing.ClassVar[str]

    def __post_init__(self) -> None:
        counts = ("depth", "epochs", "batch_size", "eval_batch_size", "eval_every", "devices")
        require_all(self, (*counts, "shrink_to"), lambda v: v >= 1, "at least 1", "")
        require(self.seed >= 0, "seed", "at least 0", self.seed)
        divided = f"a multiple of --devices, {self.devices}"
        sizes = ("batch_size", "eval_batch_size")
        require_all(self, sizes, lambda v: v % self.devices == 0, divided, "")
        if self.backward is not None and not isinstance(self.gradient, Implicit):
            raise UsageError("backward: is the solver of gradient:implicit, not of others")
        try:
            policy = self.gradient_policy()
            if isinstance(policy, Implicit):
                policy.backward_solver(self.solver)
        except ValueError as error:  # such as SHINE with another solver than Broyden's
            raise UsageError(f"solver:, gradient: and backward: do not fit: {error}") from error
        self._check_stability()

    def _check_stability(self) -> None:
        tools, solver = self.tools, self.solver
        budget = solver.max_iter - tools.budget_drop
        require(
            budget >= tools.correction_states,
            "stability.correction-states",
            f"at most --solver.max-iter less --stability.budget-drop, {budget}",
            tools.correction_states,
        )
        require(
            tools.first_tol is None or tools.first_tol >= solver.tol > 0,
            "stability.first-tol",
            "at least --solver.tol, which is above 0",
            tools.first_tol,
        )
        if self.shrink_to is not None:
            unrolls = isinstance(self.gradient, Unrolled) or tools.pretrain_steps > 0
            require(not unrolls, "shrink-to", "left out where a loop is unrolled", self.shrink_to)

    @property
    def is_deq(self) -> bool:
        """Whether the model has a solver."""
        return self.model == "deq"

    @property
    def tools(self) -> Stability:
        """The stability tools; with `stability:off` they do nothing."""
        return Stability() if self.stability is None else self.stability

    @property
    def reports_backward(self) -> bool:
        """Whether the backward pass has something to report."""
        return self.is_deq and not isinstance(self.gradient, Phantom | Unrolled)

    def gradient_policy(self) -> GradientPolicy:
        """How gradients pass through the layer, with the backward solver in it."""
        if self.backward is None:
            return self.gradient
        return dataclasses.replace(self.gradient, solver=self.backward)

    def layer(self) -> dict[str, Any]:
        """The arguments of the equilibrium layer: solver, gradient, execution, normalization."""
        execution = Execution(
            shrink_to=self.shrink_to,
            shard_axis=None if self.devices == 1 else DATA_AXIS,
            cell_dtype=None if self.precision == "float32" else jnp.bfloat16,
            state_dtype=jnp.bfloat16 if self.precision == "bfloat16" else None,
        )
        normalization: Normalization | None = self.tools.normalization
        solver: Solver = self.solver
        gradient = self.gradient_policy()
        return {
            "solver": solver,
            "gradient": gradient,
            "execution": execution,
            "normalization": normalization,
        }


_registry = tyro.constructors.ConstructorRegistry()
_METAVARS = {int: "INT", float: "FLOAT", str: "TEXT"}


@_registry.primitive_rule
def _number_or_none(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Flags for `int | None` and for the library's real numbers, which may be arrays as well."""
    kinds = typing.get_args(info.type)
    kind = float if jax.Array in kinds else next((k for k in _METAVARS if k in kinds), None)
    if kind is None or not ({jax.Array, type(None)} & set(kinds)):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=_METAVARS[kind],
        instance_from_str=lambda words: None if words[0] == "None" else kind(words[0]),
        is_instance=lambda value: value is None or isinstance(value, kind | int),
        str_from_instance=lambda value: [str(value)],
    )


def parse(
    presets: Mapping[str, AnyConfig], script: str, arguments: Sequence[str] | None, doc: str
) -> AnyConfig:
    """Reads a command line: first a preset's name (or none, for the first preset), then flags.

    `tyro.extras.overridable_config_cli` reads presets too, but fixes every choice to the preset's:
    `solver:picard` would be refused.

    Args:
        presets: the settings of each, by its name.
        script: name of the command in `experiments`.
        arguments: the command line behind the program's name; None for that of this process.
        doc: what the command does.

    Raises:
        SystemExit: after `--help`; or with code 2, after a message that names what is wrong.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    preset = words.pop(0) if words and words[0] in presets else next(iter(presets))
    names = " | ".join(presets)
    # With help for a choice its flags come after it; otherwise flags and choices mix in any order.
    asks_help = {"-h", "--help"} & set(words)
    mixed = () if asks_help else (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(
        type(presets[preset]),
        prog=f"python -m experiments.{script} [{names}]",
        description=doc.partition("\n\n")[0],
        default=presets[preset],
        args=words,
        registry=_registry,
        compact_help=True,
        config=(*mixed, tyro.conf.SuppressFixed, tyro.conf.FlagCreatePairsOff),
    )
