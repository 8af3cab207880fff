"""Settings of the training commands: dataclasses that become the command line.

Solvers, gradient policies and penalties are the library's own dataclasses, with the library's range
checks. `solver:picard` chooses one of several, and its fields are flags, such as
`--solver.damping 0.5`.
"""

import dataclasses
import math
import sys
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import optax
import tyro
from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from deq_jax import (
    GMRES,
    SQUAREM,
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
    Reversed,
    Reversible,
    Unrolled,
    Wegstein,
)
from deq_jax.stability import JacobianRegularization, SpectralNorm, WeightNorm
from experiments.train.errors import UsageError

AnyConfig = TypeVar("AnyConfig", bound="TrainingConfig")


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a setting may have, besides None: `Annotated[int, Range(1)]`."""

    least: float = -math.inf
    below: float = math.inf
    above: float = -math.inf
    most: float = math.inf

    def __contains__(self, value: float) -> bool:
        return self.least <= value < self.below and self.above < value <= self.most

    def __str__(self) -> str:
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"from {self.least:g} to {self.most:g}"
        words = {"at least": self.least, "above": self.above, "below": self.below}
        words["at most"] = self.most
        return " and ".join(f"{word} {v:g}" for word, v in words.items() if math.isfinite(v))


Count = Annotated[int, Range(least=1)]
Amount = Annotated[float, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(least=0, most=1)]
Rate = Annotated[float, Range(least=0, below=1)]


class Settings:
    """Base of dataclasses whose fields are checked against the `Range` in their annotation.

    Attributes:
        prefix: what stands before the names of these settings on the command line.
    """

    prefix: typing.ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, kind in typing.get_type_hints(type(self), include_extras=True).items():
            value = getattr(self, name)
            for part in (kind, *typing.get_args(kind)):  # `Count` or `Count | None`
                for allowed in getattr(part, "__metadata__", ()):
                    values = value if isinstance(value, tuple) else (value,)
                    for one in values if isinstance(allowed, Range) else ():
                        if one is not None and one not in allowed:
                            flag = self.prefix + name.replace("_", "-")
                            raise UsageError(f"--{flag} must be {allowed}, got {one}")


def choice(name: str, default: Any) -> Any:
    """One alternative of a choice, with its name on the command line."""
    return Annotated[type(default), tyro.conf.subcommand(name, default=default, description=" ")]


def group(kind: Any) -> Any:
    """Settings with a heading of their own in the help, and no description below it."""
    return Annotated[kind, tyro.conf.arg(help=" ")]


CONTROLS = ("weight_tied", "explicit", "lstm", "gru")
"""Values of `--model` that are networks without a solver."""

_LIMITS: dict[str, Any] = {"tol": 1e-2, "max_iter": 25}

ANDERSON = choice("anderson", Anderson(**_LIMITS))
SolverChoice = (
    ANDERSON
    | choice("picard", Picard(**_LIMITS))
    | choice("broyden", Broyden(**_LIMITS))
    | choice("newton", NewtonKrylov(**_LIMITS))
    | choice("squarem", SQUAREM(**_LIMITS))
    | choice("wegstein", Wegstein(**_LIMITS))
    | choice("reversible", Reversible(**_LIMITS))
)
GradientChoice = (
    choice("implicit", Implicit())
    | choice("one_step", OneStep())
    | choice("neumann", Neumann())
    | choice("phantom", Phantom())
    | choice("unrolled", Unrolled())
    | choice("reversed", Reversed())
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


@dataclasses.dataclass(frozen=True)
class Optim(Settings):
    """AdamW, with a learning rate that rises linearly and falls along a cosine or in steps.

    Attributes:
        lr: largest learning rate.
        final_lr: the rate at the end of the cosine.
        drops: shares of the training after which the rate is divided by ten, instead of the cosine.
        warmup: steps in which the rate rises to its largest.
        clip: largest norm of the gradient. With None the gradient is never clipped.
        weight_decay: of matrices and convolution kernels.
        beta2: Adam's second decay rate.
    """

    prefix = "optim."

    lr: Positive = 1e-3
    final_lr: Positive = 1e-6
    drops: tuple[Rate, ...] = ()
    warmup: Annotated[int, Range(0)] = 0
    clip: Positive | None = None
    weight_decay: Amount = 0.0
    beta2: Rate = 0.999

    def schedule(self, steps: int) -> optax.Schedule:
        """The learning rate at each step of a training of `steps` steps."""
        warmup = min(self.warmup, steps - 1)
        if self.drops:
            falls = {max(1, round(share * steps) - warmup): 0.1 for share in self.drops}
            rise = optax.linear_schedule(self.lr / (warmup + 1), self.lr, warmup)
            constant = optax.piecewise_constant_schedule(self.lr, falls)
            return optax.join_schedules([rise, constant], [warmup]) if warmup else constant
        return optax.warmup_cosine_decay_schedule(
            self.lr / (warmup + 1), self.lr, warmup, steps, self.final_lr
        )

    def optimizer(self, steps: int) -> optax.GradientTransformation:
        """The optimiser of a training of `steps` steps."""
        adam = optax.adamw(
            self.schedule(steps),
            b2=self.beta2,
            weight_decay=self.weight_decay,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        )
        if self.clip is None:
            return adam
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(frozen=True)
class Stability(Settings):
    """What keeps equilibria findable while the weights change; see docs/stability.md.

    Attributes:
        jacobian: penalty on the size of the cell's Jacobian. Weight 0 switches it off.
        normalization: how the cell's kernels are normalised, once a step.
        correction_states: number of solver states in the loss. The last is the equilibrium; earlier
            ones get one-step gradients.
        correction_gamma: weight of a state relative to the one after it.
        start: start of a training solve: zeros; cell, one application of it; mixed, random normal
            entries or zeros; learned, a layer of its own. Evaluation starts from that layer or
            from zeros.
        start_weight: weight of the distance from a learned start to the equilibrium in the loss.
        pretrain_steps: number of first steps that are trained by backpropagation through a stack of
            cells, before the solver takes over.
        pretrain_depth: cells in that stack.
        budget_drop: in each step the solver's max_iter is lowered at random by at most this much.
            Each value of max_iter is compiled once.
        first_tol: tolerance of the first stage of training, from which the tolerance falls
            geometrically to that of the solver. With None it is constant.
        tol_stages: number of stages of equal length in which the tolerance falls.
        eval_max_iter: the solver's max_iter in evaluation. With None it is that of training.
    """

    prefix = "stability."

    jacobian: JacobianRegularization = JacobianRegularization(0.0)
    normalization: NormalizationChoice = None
    correction_states: Count = 1
    correction_gamma: Share = 0.8
    start: Literal["zeros", "cell", "mixed", "learned"] = "zeros"
    start_weight: Amount = 0.1
    pretrain_steps: Annotated[int, Range(0)] = 0
    pretrain_depth: Count = 8
    budget_drop: Annotated[int, Range(0)] = 0
    first_tol: Positive | None = None
    tol_stages: Count = 4
    eval_max_iter: Count | None = None


@dataclasses.dataclass(frozen=True)
class RunOptions(Settings):
    """The folder of a run, and what the run shows.

    Attributes:
        dir: folder of the run, which all processes must share. With None a folder in runs/.
        fresh: delete the run that is in the folder, and start again.
        elastic: allow a run to go on with other --devices, --fsdp, --tensor or processes.
        save_every: steps between two checkpoints. The end of an epoch is always saved.
        tensorboard: write TensorBoard events too.
        progress: show progress bars.
        warn_below: warn if a smaller share of the solves converges.
    """

    prefix = "run."

    dir: str | None = None
    fresh: bool = False
    elastic: bool = False
    save_every: Count = 100
    tensorboard: bool = False
    progress: bool = True
    warn_below: Share = 0.5


@dataclasses.dataclass(frozen=True)
class Processes(Settings):
    """The processes of a run on several machines; see docs/scaling.md.

    Attributes:
        coordinator: HOST:PORT of process 0; or auto: jax.distributed finds address, count and
            index; or off: this process is alone. With None, auto if SLURM or Open MPI started
            several tasks, otherwise off.
        count: number of processes.
        index: number of this process, from 0.
        lost_after: seconds without a sign of life after which a process counts as lost.
    """

    prefix = "processes."

    coordinator: str | None = None
    count: Count | None = None
    index: Annotated[int, Range(0)] | None = None
    lost_after: Count = 30


@dataclasses.dataclass(frozen=True)
class TrainingConfig(Settings):
    """Settings that all training commands have in common.

    Attributes:
        depth: number of cells in a control, a network without a solver.
        epochs: passes over the training data.
        batch_size: examples in a step, of all devices together.
        eval_batch_size: examples evaluated at once, on all devices together.
        eval_every: epochs between evaluations.
        seed: seed of weights, order of the examples and dropout.
        devices: number of devices of all processes together, a multiple of fsdp times tensor.
        fsdp: number of devices over which parameters and the optimizer's state are split. They also
            split the batch.
        tensor: number of devices over which attention heads and feed-forward channels are split.
        precision: float32; mixed (cell in bfloat16); bfloat16 (state too).
        shrink_to: remove finished samples from the solve until this many are left.
        solver: how the equilibrium is found.
        gradient: how gradients pass through it.
        backward: solver of the backward pass, for gradient:implicit. With same, that of solver:.
        stability: penalties and phases, see docs/stability.md.
    """

    depth: Count = 8
    epochs: Count = 12
    batch_size: Count = 32
    eval_batch_size: Count = 128
    eval_every: Count = 1
    seed: Annotated[int, Range(0)] = 0
    devices: Count = 1
    fsdp: Count = 1
    tensor: Count = 1
    precision: Literal["float32", "mixed", "bfloat16"] = "float32"
    shrink_to: Count | None = None
    optim: group(Optim) = Optim()
    solver: SolverChoice = Anderson(**_LIMITS)
    gradient: GradientChoice = Implicit()
    backward: BackwardChoice = None
    stability: choice("off", None) | choice("on", Stability()) = None
    run: group(RunOptions) = RunOptions()
    processes: group(Processes) = Processes()

    model: typing.ClassVar[str]

    def __post_init__(self) -> None:
        super().__post_init__()
        tools, most = self.stability or Stability(), self.solver.max_iter
        unrolls = isinstance(self.gradient, Unrolled | Reversed) or tools.pretrain_steps > 0
        budget = most - tools.budget_drop
        rules = [
            (
                self.optim.final_lr <= self.optim.lr,
                f"--optim.final-lr must be at most --optim.lr, {self.optim.lr:g}, "
                f"got {self.optim.final_lr:g}",
            ),
            (
                self.backward is None or isinstance(self.gradient, Implicit),
                "backward: is the solver of gradient:implicit, not of other gradients",
            ),
            (
                budget >= tools.correction_states,
                "--stability.correction-states must be at most --solver.max-iter less "
                f"--stability.budget-drop, {budget}, got {tools.correction_states}",
            ),
            (
                tools.first_tol is None or tools.first_tol >= self.solver.tol > 0,
                "--stability.first-tol must be at least --solver.tol, which is above 0, "
                f"got {tools.first_tol}",
            ),
            (
                self.shrink_to is None or not unrolls,
                "--shrink-to must be left out where a loop is differentiated, by "
                "gradient:unrolled, gradient:reversed or --stability.pretrain-steps, got "
                f"{self.shrink_to}",
            ),
            (
                self.devices % (self.fsdp * self.tensor) == 0,
                "--devices must be a multiple of --fsdp times --tensor, "
                f"{self.fsdp * self.tensor}, got {self.devices}",
            ),
            *(
                (
                    size % self.data_shards == 0,
                    f"--{name} must be a multiple of the devices that share a batch, "
                    f"{self.data_shards}, got {size}",
                )
                for name, size in (
                    ("batch-size", self.batch_size),
                    ("eval-batch-size", self.eval_batch_size),
                )
            ),
        ]
        for holds, message in rules:
            if not holds:
                raise UsageError(message)
        try:
            policy = self.gradient_policy()
            policy.check(self.solver)
            if isinstance(policy, Implicit):
                policy.backward_solver(self.solver)
        except (TypeError, ValueError) as error:  # such as SHINE without Broyden's method
            raise UsageError(f"solver:, gradient: and backward: do not fit: {error}") from error

    @property
    def data_shards(self) -> int:
        """Into how many parts each batch is split."""
        return max(1, self.devices // self.tensor)

    @property
    def is_deq(self) -> bool:
        """Whether the model has a solver."""
        return self.model not in CONTROLS

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
        """The arguments of the equilibrium layer."""
        axes = None if self.data_shards == 1 else "data" if self.fsdp == 1 else ("data", "fsdp")
        execution = Execution(
            shrink_to=self.shrink_to,
            shard_axis=axes,
            cell_dtype=None if self.precision == "float32" else jnp.bfloat16,
            state_dtype=jnp.bfloat16 if self.precision == "bfloat16" else None,
        )
        return {
            "solver": self.solver,
            "gradient": self.gradient_policy(),
            "execution": execution,
            "normalization": None if self.stability is None else self.stability.normalization,
        }


_registry = tyro.constructors.ConstructorRegistry()


@_registry.primitive_rule
def _real_number(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Flags for the library's real numbers, which may be arrays as well, or None."""
    if jax.Array not in typing.get_args(info.type):
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda words: None if words[0] == "None" else float(words[0]),
        is_instance=lambda value: value is None or isinstance(value, float | int),
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
    # With --help, tyro shows the flags of a choice only if they follow it.
    asks_help = {"-h", "--help", "-H", "--help-verbose"} & set(words)
    mixed = () if asks_help else (tyro.conf.CascadeSubcommandArgs,)
    return tyro.cli(
        type(presets[preset]),
        prog=f"python -m experiments.{script} [{' | '.join(presets)}]",
        description=doc.partition("\n\n")[0],
        default=presets[preset],
        args=words,
        registry=_registry,
        compact_help=True,
        config=(*mixed, tyro.conf.SuppressFixed, tyro.conf.FlagCreatePairsOff),
    )
