"""Checkpoints of a training run: a pytree of arrays and what is known about them as JSON."""

import os
import pathlib
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

PyTree = Any

_KEPT = 2


class Checkpoints:
    """The newest checkpoints of one run.

    A checkpoint appears under its name only once all of it is written, so that a process killed
    while it writes leaves the one before as the newest. They are numbered in the order of writing:
    the state between the last step of an epoch and the evaluation, and the one after it, have the
    same step but are not the same.

    Arrays come back bit for bit; typed PRNG keys are stored as their data.

    Args:
        directory: folder for the checkpoints, created if it is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        options = ocp.CheckpointManagerOptions(
            max_to_keep=_KEPT,
            cleanup_tmp_directories=True,
            # The next step donates the buffers that a background thread would still be reading.
            enable_async_checkpointing=False,
        )
        self._manager = ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)

    def save(self, state: PyTree, progress: dict[str, Any]) -> None:
        """Writes a checkpoint; on return it is on disk.

        Args:
            state: pytree of arrays.
            progress: anything that JSON can hold.
        """
        newest = self._manager.latest_step()
        self._manager.save(
            0 if newest is None else newest + 1,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_named_arrays(state)),
                progress=ocp.args.JsonSave(progress),
            ),
        )

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint.

        Args:
            template: a pytree like the one saved; its arrays give shapes, dtypes and devices.

        Returns:
            The state and its progress, or None if there is no checkpoint.

        Raises:
            ValueError: the checkpoint's arrays are not those of `template`.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return None
        arrays = _named_arrays(template)
        restored = self._manager.restore(
            newest,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(arrays), progress=ocp.args.JsonRestore()
            ),
        )
        leaves, structure = jax.tree.flatten(template)
        values = [
            jax.random.wrap_key_data(value, impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else value
            for leaf, value in zip(leaves, (restored.state[name] for name in arrays), strict=True)
        ]
        return jax.tree.unflatten(structure, values), restored.progress

    def close(self) -> None:
        """Releases what Orbax holds."""
        self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _is_key(leaf: jax.Array) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_arrays(tree: PyTree) -> dict[str, jax.Array]:
    """The leaves in their order, under names that somebody looking into a checkpoint can read."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): (
            jax.random.key_data(leaf) if _is_key(leaf) else leaf
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
