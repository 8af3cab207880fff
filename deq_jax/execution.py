"""How a solve is carried out."""

import dataclasses
from typing import Any

from deq_jax import checks, precision, sharding


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a solve is carried out.

    The solution and its gradient stay the same up to rounding, if f treats samples independently. A
    trip is one pass through the loop of a solver.

    Attributes:
        shrink_to: finished samples leave the batch, forwards and in the backward solve. Once no
            more than half of the batch is unfinished, the loop goes on with these samples alone,
            and so on down to this many. The cost then follows the mean number of evaluations and
            not the largest (`stats.evaluations` is still the largest). Answers are the same up to
            the rounding of products of another size. With None, finished samples never leave. A
            batch that is already this small runs unchanged.

            f must treat samples independently, and all that belongs to one sample must be in z or
            x. Every leaf of x has the batch on axis 0 and is gathered; `params` and closures are
            the same for all samples. A batch norm over the batch, or dropout drawn inside f, gives
            other answers. An f that sums over the batch or draws numbers for it is refused where
            its jaxpr shows that; loops, maxima and indexing can hide it.

            Each size is traced and compiled by itself, forwards and backwards, which costs about as
            much for each size as for the loops without `shrink_to`, and more for sizes below 8. A
            tenth of the batch is a good choice. `GMRES` and `BiCGStab` as backward solvers do not
            shrink. Under `vmap` the answers are right, but little is saved. With a batch sharded
            over devices, set `shard_axis` too; otherwise samples move between them.
        shard_axis: name of the mesh axis over which the batch is sharded, or a tuple of names if it
            is sharded over several. With None there is one loop for the whole batch, and its
            devices agree in each trip whether to go on. With a name, the solve runs in
            `jax.shard_map` over the axis: each device solves its shard of the batch and stops by
            itself. No trip waits for the device of another shard, forwards or backwards; only with
            `Unrolled` do they still agree in each trip. Reverse mode only.

            The mesh is that of `jax.set_mesh`, or that of the sharding of a leaf of x or z0; its
            other axes stay automatic. Every leaf of x and z is split on axis 0. `params` and
            closures are the same on all shards: if they are sharded over these axes, they are
            gathered once, before the loops. Gradients are summed over the shards. A warning says
            if the batch is sharded over an axis that is not named. Inside a `shard_map` over an
            axis, naming that axis changes nothing.

            An f that mixes samples mixes those of a shard, unless it uses collectives over the
            axes. Random numbers that f draws are those that it draws on one device: each shard
            takes its rows of a draw for the whole batch. Counts of evaluations and products, in
            `stats` and probe, are those of the shard with the most.
        state_axis: name of a mesh axis, or a tuple of names, of your own `shard_map` around the
            solve, along which devices hold parts of the same samples: blocks of features, or of a
            sequence. f exchanges the parts by collectives. Norms, inner products, histories and
            stops are then those of whole samples. Without it each device would measure its part
            alone. Under `jit` leave it out: XLA knows how a state is sharded. `Dense` refuses it.
        cell_dtype: real floating dtype in which f is evaluated. Floating leaves of params, x and z
            are cast to it, and complex ones to complex64, or complex128 for float64. f must return
            this dtype; its result is cast back to the dtype of the state. Gradients reach params
            and x in their own dtypes (`Phantom` and `Unrolled` add them up in this one first).
            Arrays that f closes over are not cast. With None nothing is cast. docs/precision.md
            says which tolerance half precision can reach.
        state_dtype: real floating dtype of the state. `z0`, or the zeros in its place, are cast to
            it. The value, histories and the backward solve have this dtype (residuals at least
            float32). With None the state has the dtype of `z0`.
        check_every: evaluations between two checks whether any sample is unfinished, forwards and
            in a backward solve by a fixed-point solver. Over a sharded batch all devices agree at
            each check, so larger values make fewer all-reduces. Up to `check_every - 1` evaluations
            may be made for nothing; answers stay the same. A solver with `tol=0` never checks, and
            always makes `max_iter` evaluations. `Unrolled` checks after each evaluation.
        progress: shows a tqdm meter while the solve runs, also inside `jax.jit`: evaluations, how
            many samples are unfinished, and the largest residual among them. An integer is the
            number of evaluations between two updates; True is 1. Each update is an ordered callback
            to the host, which JAX does not allow under `vmap`, in `shard_map`, or on several
            devices. For the forward solve only.

    Raises:
        ValueError, TypeError: a field is out of its range; the message names it. In the solve, with
            `shrink_to`: `batched=False`, `Unrolled`, an f that communicates over mesh axes, that
            fails on fewer samples, or that is seen to mix them; a leaf of x without the batch. With
            `shard_axis`: no mesh with that axis, another axis of explicit type, `batched=False`, a
            number of shards that does not divide the batch, a leaf of x without the batch, an f
            that draws random numbers for each sample in a loop. With `state_axis`: no `shard_map`
            over that axis around the solve.
    """

    shrink_to: int | None = None
    shard_axis: str | tuple[str, ...] | None = None
    state_axis: str | tuple[str, ...] | None = None
    cell_dtype: Any = None
    state_dtype: Any = None
    check_every: int = 1
    progress: bool | int = False

    def __post_init__(self) -> None:
        if self.shrink_to is not None:
            checks.check_count(self, "shrink_to")
        for name in ("shard_axis", "state_axis"):
            sharding.check_axes(f"Execution.{name}", getattr(self, name))
        checks.check_count(self, "check_every")
        if not isinstance(self.progress, bool):
            checks.check_count(self, "progress")
        for name in ("cell_dtype", "state_dtype"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, precision.check_floating(self, name))
