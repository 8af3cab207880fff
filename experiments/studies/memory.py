"""Activation memory of a gradient step over depth: equilibria, unrolled networks, explicit ones.

Compiles the gradient of a training loss at several depths and reads off how much memory XLA has
reserved for temporaries: what is alive between the forward and the backward pass, and the room to
work in. Parameters, their gradients and the inputs are not among them. Nothing is run, except
where the device reports live bytes: there the measured peak is shown as well. The depth of an
equilibrium is its budget of evaluations, forwards and backwards; its tolerance is 0.

    python -m experiments.studies.memory
    python -m experiments.studies.memory --write
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import tyro
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from deq_jax import Anderson, Implicit, Picard
from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from deq_jax.models.deq_transformer import (
    DEQTransformer,
    ExplicitTransformer,
    WeightTiedTransformer,
)
from experiments.benchmark.plots import save
from experiments.studies.tables import DOCS, machine, markdown_head, markdown_row, write_below

PyTree = Any
Build = Callable[[int], nnx.Module]
"""A model of a depth."""

PAGE = DOCS / "memory.md"
MARKER = "<!-- Below: written by `python -m experiments.studies.memory --write`. -->"
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure.

    Attributes:
        depths: depths of the networks, and budgets of the equilibria.
        vocabulary: tokens of the language model.
        width: of its state; its feed-forward block is four times as wide.
        heads: attention heads.
        length: tokens of a sequence.
        batch: sequences.
        images: size of the image network's batch; 0 to leave that network out.
        write: put the tables into docs/memory.md and the figure into docs/figures as well.
        page: the page.
        figure: the figure.
    """

    depths: tuple[int, ...] = (4, 8, 16, 30, 64)
    vocabulary: int = 100
    width: int = 128
    heads: int = 4
    length: int = 64
    batch: int = 16
    images: int = 16
    write: bool = False
    page: pathlib.Path = PAGE
    figure: pathlib.Path = DOCS / "figures" / "memory.png"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Memory of one gradient step.

    Attributes:
        temporaries: bytes that XLA has reserved besides arguments and results.
        peak: bytes alive at most in the process so far, all counted, once it had run; None where
            no device says so. Equilibria come first, so that a flat line shows.
    """

    temporaries: int
    peak: int | None = None


Costs = dict[str, dict[int, Cost]]
"""By model and depth."""


def language_models(config: Config) -> dict[str, Build]:
    """The DEQ-Transformer with two solvers, and its controls."""
    sizes = config.vocabulary, config.width, config.heads, 4 * config.width
    anderson, picard = (functools.partial(solver, tol=0.0) for solver in (Anderson, Picard))

    def equilibrium(solver: Callable[..., Any], depth: int) -> nnx.Module:
        own = {"solver": solver(max_iter=depth), "gradient": Implicit()}
        return DEQTransformer(*sizes, **own, rngs=nnx.Rngs(0))

    def unrolled(network: type[nnx.Module], remat: bool, depth: int) -> nnx.Module:
        return network(*sizes, depth=depth, remat=remat, rngs=nnx.Rngs(0))

    return {
        "DEQ, Anderson": functools.partial(equilibrium, anderson),
        "DEQ, Picard": functools.partial(equilibrium, picard),
        "weight-tied": functools.partial(unrolled, WeightTiedTransformer, False),
        "weight-tied, remat": functools.partial(unrolled, WeightTiedTransformer, True),
        "explicit": functools.partial(unrolled, ExplicitTransformer, False),
    }


def image_models(config: Config) -> dict[str, Build]:
    """The tutorial's network in its CIFAR-10 form, and its controls."""

    def equilibrium(depth: int) -> nnx.Module:
        return ConvDEQ(solver=Anderson(tol=0.0, max_iter=depth), rngs=nnx.Rngs(0))

    return {
        "DEQ, Anderson": equilibrium,
        "weight-tied": lambda depth: WeightTiedConvNet(depth=depth, rngs=nnx.Rngs(0)),
        "explicit": lambda depth: ExplicitConvNet(depth=depth, rngs=nnx.Rngs(0)),
    }


def measure(builds: dict[str, Build], inputs: jax.Array, depths: Sequence[int]) -> Costs:
    """All models at all depths; says what it has found as it goes."""
    costs: Costs = {}
    for name, build in builds.items():
        for depth in depths:
            cost = gradient_cost(functools.partial(build, depth), inputs)
            print(f"{name}, depth {depth}: {cost.temporaries / MIB:.2f} MiB", flush=True)
            costs.setdefault(name, {})[depth] = cost
    return costs


def gradient_cost(build: Callable[[], nnx.Module], inputs: jax.Array) -> Cost:
    """Compiles the gradient by the parameters; runs it where that can be measured."""
    definition, params, rest = nnx.split(nnx.eval_shape(build), nnx.Param, ...)

    def loss(params: PyTree, rest: PyTree, inputs: jax.Array) -> jax.Array:
        logits = nnx.merge(definition, params, rest, copy=True)(inputs)
        # Of a language model at every position the next token, of images a class.
        targets = inputs[:, 1:] if logits.ndim == 3 else jnp.zeros(len(logits), jnp.int32)
        logits = logits[:, :-1] if logits.ndim == 3 else logits
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
        return -chosen.mean()

    step = jax.jit(jax.grad(loss)).lower(params, rest, inputs).compile()
    temporaries = step.memory_analysis().temp_size_in_bytes
    device = jax.local_devices()[0]
    if device.memory_stats() is None:
        return Cost(temporaries)
    _, *state = nnx.split(build(), nnx.Param, ...)
    jax.block_until_ready(step(*state, inputs))
    return Cost(temporaries, device.memory_stats().get("peak_bytes_in_use"))


def table(costs: Costs, depths: Sequence[int]) -> str:
    """The Markdown table, in MiB, with what each application adds between the outer depths."""
    columns = ["model", *(f"depth {depth}" for depth in depths), "each application"]
    lines = [markdown_head(columns)]
    for name, by_depth in costs.items():
        few, many = by_depth[depths[0]].temporaries, by_depth[depths[-1]].temporaries
        each = (many - few) / max(1, depths[-1] - depths[0])
        cells = [_mebibytes(by_depth[depth].temporaries) for depth in depths]
        lines.append(markdown_row([name, *cells, f"{each / MIB:.2f}"]))
        if by_depth[depths[0]].peak is not None:
            cells = [_mebibytes(by_depth[depth].peak or 0) for depth in depths]
            lines.append(markdown_row([f"{name}: peak of the process so far", *cells, ""]))
    return "\n".join(lines)


def ratios(costs: Costs, depth: int) -> str:
    """What the controls need at a depth, over what the first equilibrium needs."""
    first, *others = costs
    own = costs[first][depth].temporaries
    parts = [f"{name} {costs[name][depth].temporaries / own:.1f}" for name in others]
    return f"At depth {depth}, over {first}: {'; '.join(parts)}."


def draw(studies: dict[str, Costs]) -> Figure:
    """MiB over depth, both logarithmic: a panel a study, a line a model."""
    figure, panels = plt.subplots(
        1, len(studies), figsize=(5.6 * len(studies), 4.2), layout="constrained", squeeze=False
    )
    for axes, (title, costs) in zip(panels[0], studies.items(), strict=True):
        for name, by_depth in costs.items():
            depths = list(by_depth)
            own = name.startswith("DEQ")
            axes.plot(
                depths,
                [cost.temporaries / MIB for cost in by_depth.values()],
                marker="o",
                markersize=4,
                linewidth=2.2 if own else 1.4,
                label=name,
                **_STYLES[name],
            )
        axes.set(xscale="log", yscale="log", title=title, xlabel="depth, or budget of evaluations")
        axes.set_ylabel("temporaries of a gradient step, MiB")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(which="major", alpha=0.3)
        axes.legend()
    return figure


_STYLES: dict[str, dict[str, Any]] = {
    "DEQ, Anderson": {"color": "black"},
    "DEQ, Picard": {"color": "black", "linestyle": "--"},
    "weight-tied": {"color": "tab:blue"},
    "weight-tied, remat": {"color": "tab:blue", "linestyle": "--"},
    "explicit": {"color": "tab:orange", "linestyle": ":"},
}


def _mebibytes(count: int) -> str:
    return f"{count / MIB:.1f}"


def main() -> None:
    """Prints the tables; with `--write` puts them into the page and the figure beside it."""
    config = tyro.cli(Config, description=__doc__)
    tokens = jnp.zeros((config.batch, config.length), jnp.int32)
    what = f"width {config.width}, {config.batch} sequences of {config.length} tokens"
    studies = {f"language model, {what}": measure(language_models(config), tokens, config.depths)}
    if config.images:
        images = jnp.zeros((config.images, 32, 32, 3))
        title = f"image network, {config.images} images of 32x32"
        studies[title] = measure(image_models(config), images, config.depths)
    at = 30 if 30 in config.depths else config.depths[-1]
    parts = [
        f"### {title[0].upper()}{title[1:]}\n\n{table(costs, config.depths)}\n\n{ratios(costs, at)}"
        for title, costs in studies.items()
    ]
    print("\n\n".join(["", *parts]))
    if config.write:
        write_below(config.page, MARKER, [f"{machine()}. MiB.", *parts])
        save(draw(studies), config.figure)
        print(f"wrote {config.figure}")


if __name__ == "__main__":
    main()
