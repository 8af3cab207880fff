"""Gradients of a batch in microbatches, summed on each device and between devices once a step.

With `jax.value_and_grad` inside `lax.scan` over a sharded batch, XLA sums the gradient over the
devices in every trip of the scan. Here the scan runs inside `jax.shard_map`, where each device adds
up its own gradients, and one all-reduce after the scan sums them over the devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deq_jax import checks, sharding, tree

PyTree = Any


def accumulate_gradients(
    loss: Callable[..., Any],
    microbatches: int,
    *,
    shard_axis: str | tuple[str, ...] | None = None,
    has_aux: bool = False,
) -> Callable[..., tuple[Any, PyTree]]:
    """Computes what `jax.value_and_grad(loss)` does, in microbatches and so in less memory.

    The batch is split into microbatches of equal size, which pass through the loss and its gradient
    one after another. With losses ℓ of microbatches b and parameters p the result is

        1/n Σ ℓ(p, b)    and    1/n Σ ∂ℓ/∂p(p, b),

    where n is the number of microbatches on all devices. They are the loss and the gradient of the
    whole batch if the loss is a mean over samples that do not depend on each other. Sums are taken
    in float32, or wider if a leaf is. A batch norm has the statistics of a microbatch.

        step = jax.jit(accumulate_gradients(loss, 4, shard_axis="data"))
        with jax.set_mesh(mesh):
            value, gradient = step(params, batch)

    For random numbers, such as dropout, give each sample a key, as a leaf of the batch `[B]`. The
    numbers are then those of the whole batch. A loss that draws for a microbatch at once can take
    the first of its keys.

    Args:
        loss: `loss(params, microbatch, *shared)` is a scalar, the mean over the samples. With a
            `shard_axis` it is called inside a `shard_map` over that axis: collectives and
            `BatchNorm(axis_name=...)` may name the axis, and a layer whose
            `Execution(shard_axis=...)` names it solves its samples as it would alone.
        microbatches: how many microbatches each device makes of its part of the batch.
        shard_axis: the mesh axis over which the batch is sharded, or a tuple of names, as in
            `Execution`. Each device then sums the gradients of its own microbatches, and one
            all-reduce at the end of a step averages them, instead of one for each microbatch.
        has_aux: whether the loss returns a pair `(value, aux)`. `aux` is a pytree of floating
            arrays, such as an accuracy or new batch statistics. Their means come back too.

    Returns:
        A function `step(params, batch, *shared)` that returns what
        `jax.value_and_grad(loss, has_aux=has_aux)` returns. `batch` is a pytree whose leaves have
        the batch on axis 0, `[B, ...]`. `params` and `shared`, the other arguments of the loss
        such as batch statistics, are the same on all devices and in all microbatches.

    Raises:
        ValueError, TypeError: an argument is out of its range. In the call: the batch is not a
            multiple of the microbatches on all devices, no mesh has the axis, a leaf of aux is not
            floating.

    Source: the arithmetic is that of Goyal et al., "Accurate, large minibatch SGD", 2017.
    """
    if not callable(loss):
        raise TypeError(f"loss must be a function loss(params, batch), got {loss!r}")
    if isinstance(microbatches, bool) or not isinstance(microbatches, int) or microbatches < 1:
        raise ValueError(f"microbatches must be a positive integer, got {microbatches!r}")
    checks.check_bool("has_aux", has_aux)
    option = "accumulate_gradients: shard_axis"
    sharding.check_axes(option, shard_axis)
    named = sharding.as_axes(shard_axis)
    gradient = jax.value_and_grad(loss, has_aux=has_aux)

    def accumulated(params: PyTree, batch: PyTree, *shared: PyTree) -> tuple[Any, PyTree]:
        mesh, axes = sharding.find_mesh(named, batch, batch, True, option)

        def local(whole: tuple[PyTree, ...], batch: PyTree) -> tuple[Any, PyTree]:
            params, *shared = whole
            varies = tree.varying_axes((whole, batch)) | frozenset(axes)

            def added(total: PyTree, part: PyTree) -> tuple[PyTree, None]:
                result = tree.vary_over(gradient(params, part, *shared), varies)
                return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, result), None

            parts = jax.tree.map(lambda leaf: _split(leaf, microbatches), batch)
            part = jax.tree.map(lambda leaf: leaf[0], parts)
            shapes = jax.eval_shape(lambda: gradient(params, part, *shared))
            if has_aux:
                _check_aux(shapes[0][1])
            start = jax.tree.map(_zeros, shapes)
            total, _ = lax.scan(added, tree.vary_over(start, varies), parts)
            mean = jax.tree.map(lambda leaf: leaf / microbatches, total)
            mean = lax.pmean(mean, axes) if axes else mean
            return jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), mean, shapes)

        if mesh is None:
            return local((params, *shared), batch)
        return sharding.map_shards(local, axes, mesh, P())((params, *shared), batch)

    return accumulated


def _split(leaf: jax.Array, microbatches: int) -> jax.Array:
    if not leaf.ndim or leaf.shape[0] % microbatches:
        raise ValueError(
            f"{microbatches} microbatches must divide the batch of a device, which is axis 0 of "
            f"every leaf; got a leaf of shape {leaf.shape} on a device"
        )
    return leaf.reshape(microbatches, -1, *leaf.shape[1:])


def _zeros(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(leaf.shape, tree.working_dtype(leaf.dtype))


def _check_aux(aux: PyTree) -> None:
    for name, leaf in checks.named_leaves(aux):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            raise TypeError(
                f"aux is averaged over microbatches and must be floating: leaf {name} has dtype "
                f"{leaf.dtype}; cast it"
            )
