"""Activation memory of a gradient step over depth: equilibria, unrolled networks, explicit ones.

Compiles the gradient of a training loss at several depths and reads off how much memory XLA has
reserved for temporaries: what is alive between the forward and the backward pass, and the room to
work in. Parameters, their gradients and the inputs are not among them. Nothing is run, except
where the device reports live bytes: there the measured peak is shown as well. The depth of an
equilibrium is its budget of evaluations, forwards and backwards; its tolerance is 0.

    python -m experiments.studies.memory
    python -m experiments.studies.memory language --write
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from deq_jax import Anderson, GradientPolicy, Implicit, Picard, Unrolled
from deq_jax.models.conv_deq import ConvDEQ, ExplicitConvNet, WeightTiedConvNet
from deq_jax.models.deq_transformer import (
    DEQTransformer,
    ExplicitTransformer,
    WeightTiedTransformer,
)
from deq_jax.models.mdeq import MDEQ, TINY
from experiments.studies.tables import Command, Document, Part, Study, markdown_table, origin

PyTree = Any
Build = Callable[[int], nnx.Module]
"""A model of a depth."""

MIB = 2**20
COMPARED = 30
"""The depth at which controls are compared with the first equilibrium."""


@dataclasses.dataclass(frozen=True)
class Config(Command):
    """What to measure.

    Attributes:
        depths: depths of the networks, and budgets of the equilibria.
        budgets: further budgets of the equilibria.
        vocabulary: tokens of the language model.
        width: of its state; its feed-forward block is four times as wide.
        heads: attention heads.
        length: tokens of a sequence.
        batch: sequences.
        images: size of the image network's batch.
    """

    depths: tuple[int, ...] = (4, 10, 16, COMPARED, 64)
    budgets: tuple[int, ...] = (200,)
    vocabulary: int = 100
    width: int = 128
    heads: int = 4
    length: int = 64
    batch: int = 16
    images: int = 32


def language(config: Config) -> Part:
    """The DEQ-Transformer with two solvers, and its controls."""
    sizes = config.vocabulary, config.width, config.heads, 4 * config.width

    def equilibrium(solver: Callable[..., Any], depth: int) -> nnx.Module:
        own = {"solver": solver(tol=0.0, max_iter=depth), "gradient": Implicit()}
        return DEQTransformer(*sizes, **own, rngs=nnx.Rngs(0))

    def unrolled(network: type[nnx.Module], remat: bool, depth: int) -> nnx.Module:
        return network(*sizes, depth=depth, remat=remat, rngs=nnx.Rngs(0))

    builds = {
        "DEQ, Anderson": functools.partial(equilibrium, Anderson),
        "DEQ, Picard": functools.partial(equilibrium, Picard),
        "weight-tied": functools.partial(unrolled, WeightTiedTransformer, False),
        "weight-tied, remat": functools.partial(unrolled, WeightTiedTransformer, True),
        "explicit": functools.partial(unrolled, ExplicitTransformer, False),
    }
    tokens = jnp.zeros((config.batch, config.length), jnp.int32)
    size = f"width {config.width}, {config.batch} sequences of {config.length} tokens"
    return {"title": f"Language model, {size}", **measure(builds, tokens, config)}


def images(config: Config) -> Part:
    """The tutorial's network in its CIFAR-10 form, and its controls."""

    def equilibrium(depth: int) -> nnx.Module:
        return ConvDEQ(solver=Anderson(tol=0.0, max_iter=depth), rngs=nnx.Rngs(0))

    builds: dict[str, Build] = {
        "DEQ, Anderson": equilibrium,
        "weight-tied": lambda depth: WeightTiedConvNet(depth=depth, rngs=nnx.Rngs(0)),
        "explicit": lambda depth: ExplicitConvNet(depth=depth, rngs=nnx.Rngs(0)),
    }
    inputs = jnp.zeros((config.images, 32, 32, 3))
    title = f"Image network, {config.images} images of 32x32"
    return {"title": title, **measure(builds, inputs, config)}


def multiscale(config: Config) -> Part:
    """The small MDEQ, its cell applied so many times, and the solvers unrolled.

    `Unrolled()` computes evaluations again in the backward pass, see `deq_jax.unrolling`.
    """

    def layer(depth: int, solver: Callable[..., Any], gradient: GradientPolicy) -> MDEQ:
        solver = solver(tol=0.0, max_iter=depth)
        return MDEQ(**TINY, solver=solver, gradient=gradient, rngs=nnx.Rngs(0))

    builds: dict[str, Build] = {
        "DEQ, Anderson": lambda depth: layer(depth, Anderson, Implicit()),
        "weight-tied": lambda depth: _Applied(layer(depth, Picard, Implicit()), depth),
        # Picard returns a point at which it evaluates the cell, and the first is zero.
        "weight-tied, remat": lambda depth: layer(depth + 1, Picard, Unrolled()),
        "Anderson, unrolled": lambda depth: layer(depth, Anderson, Unrolled()),
    }
    inputs = jnp.zeros((config.images, 32, 32, 3))
    title = f"Multiscale network (MDEQ tiny), {config.images} images of 32x32"
    return {"title": title, **measure(builds, inputs, config)}


class _Applied(nnx.Module):
    """A network whose core is the cell applied `depth` times, with ordinary backpropagation."""

    def __init__(self, model: MDEQ, depth: int):
        self.model, self.depth = model, depth

    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits `[B, classes]`."""
        injection = self.model.injection(images)
        f, params, x = self.model.core.equation(injection)
        z = self.model.zeros(injection)
        for _ in range(self.depth):
            z = f(params, z, x)
        return self.model.classify(z)


def measure(builds: Mapping[str, Build], inputs: jax.Array, config: Config) -> Part:
    """Bytes of temporaries, and of the peak where the device knows it, by model, a depth each."""
    temporaries: dict[str, list[int]] = {}
    peaks: dict[str, list[int]] = {}
    for name, build in builds.items():
        budgets = config.budgets if name.startswith("DEQ") else ()
        for depth in (*config.depths, *budgets):
            size, peak = gradient_memory(functools.partial(build, depth), inputs)
            print(f"{name}, depth {depth}: {size / MIB:.2f} MiB", flush=True)
            temporaries.setdefault(name, []).append(size)
            if peak is not None:
                peaks.setdefault(name, []).append(peak)
    depths = [*config.depths, *config.budgets]
    return {"depths": depths, "temporaries": temporaries, "peaks": peaks}


def gradient_memory(build: Callable[[], nnx.Module], inputs: jax.Array) -> tuple[int, int | None]:
    """Compiles the gradient by the parameters; runs it where the device counts live bytes.

    Returns:
        The bytes that XLA has reserved besides arguments and results, and the bytes alive at most
        in the process so far; None where the device does not count.
    """
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
        return temporaries, None
    _, *state = nnx.split(build(), nnx.Param, ...)
    jax.block_until_ready(step(*state, inputs))
    return temporaries, device.memory_stats().get("peak_bytes_in_use")


def render(document: Document) -> dict[str, str]:
    """A table for each network, in MiB, and the ratios at one depth."""
    return {
        name: "\n\n".join(
            [f"### {part['title']}", table(part), ratios(part), origin(part["context"])]
        )
        for name, part in document.items()
    }


def table(part: Part) -> str:
    """MiB by depth, and what each application adds between the outer depths."""
    depths = part["depths"]
    rows = []
    for name, sizes in part["temporaries"].items():
        each = (sizes[-1] - sizes[0]) / max(1, depths[len(sizes) - 1] - depths[0])
        rows.append([name, *_mebibytes(sizes, depths), f"{each / MIB:.2f}"])
        if name in part["peaks"]:
            peaks = _mebibytes(part["peaks"][name], depths)
            rows.append([f"{name}: peak of the process so far", *peaks, ""])
    columns = ["MiB", *(f"depth {depth}" for depth in depths), "each application"]
    return markdown_table(columns, rows)


def _mebibytes(sizes: Sequence[int], depths: Sequence[int]) -> list[str]:
    """A cell for each depth; a dash where a control was not measured."""
    return [f"{size / MIB:.1f}" for size in sizes] + ["-"] * (len(depths) - len(sizes))


def ratios(part: Part) -> str:
    """What the others need at one depth, over what the first equilibrium needs."""
    depths, temporaries = part["depths"], part["temporaries"]
    column = depths.index(COMPARED) if COMPARED in depths else 0
    first, *others = temporaries
    own = temporaries[first][column]
    parts = [f"{name} {temporaries[name][column] / own:.1f}" for name in others]
    return f"At depth {depths[column]}, over {first}: {'; '.join(parts)}."


_STYLES: dict[str, dict[str, Any]] = {
    "DEQ, Anderson": {"color": "black", "linewidth": 2.2},
    "DEQ, Picard": {"color": "black", "linewidth": 2.2, "linestyle": "--"},
    "Anderson, unrolled": {"color": "tab:green"},
    "weight-tied": {"color": "tab:blue"},
    "weight-tied, remat": {"color": "tab:blue", "linestyle": "--"},
    "explicit": {"color": "tab:orange", "linestyle": ":"},
}


def draw(document: Document) -> dict[str, Figure]:
    """MiB over depth, both logarithmic: a panel for each network, a line for each model."""
    figure = Figure(figsize=(5.6 * len(document), 4.2), layout="constrained")
    panels = figure.subplots(1, len(document), squeeze=False)[0]
    for axes, part in zip(panels, document.values(), strict=True):
        depths = part["depths"]
        for name, sizes in part["temporaries"].items():
            mebibytes = [size / MIB for size in sizes]
            axes.plot(
                depths[: len(sizes)],
                mebibytes,
                marker="o",
                markersize=4,
                label=name,
                **_STYLES[name],
            )
        axes.set(xscale="log", yscale="log", xlabel="depth, or budget of evaluations")
        axes.set(title=part["title"], ylabel="temporaries of a gradient step, MiB")
        axes.set_xticks(depths, [str(depth) for depth in depths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(which="major", alpha=0.3)
        axes.legend()
    return {"memory": figure}


STUDY = Study("memory", render, draw)
MEASURES = {"language": language, "images": images, "multiscale": multiscale}


if __name__ == "__main__":
    STUDY.run(tyro.cli(Config, description=__doc__), MEASURES)
