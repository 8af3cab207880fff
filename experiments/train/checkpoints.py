"""Checkpoints of a training run: a pytree of arrays and what is known about them as JSON."""

import os
import pathlib
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from experiments.train.errors import CheckpointError

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

        Raises:
            CheckpointError: it could not be written; those before it are whole.
        """
        newest = self._manager.latest_step()
        try:
            self._manager.save(
                0 if newest is None else newest + 1,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(_named_arrays(state)),
                    progress=ocp.args.JsonSave(progress),
                ),
            )
        except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
            raise CheckpointError(
                f"cannot write a checkpoint to {self._manager.directory}: {_first_line(error)}. "
                "Those before it are whole: the same command goes on from the newest of them"
            ) from error

    def restore(self, template: PyTree) -> tuple[PyTree, dict[str, Any]] | None:
        """Reads the newest checkpoint, or, with a warning, the one before if it is damaged.

        Args:
            template: a pytree like the one saved; its arrays give shapes, dtypes and devices.

        Returns:
            The state and its progress, or None if there is no checkpoint.

        Raises:
            CheckpointError: there are checkpoints, but none can be read, or their arrays are not
                those of `template`.
        """
        failures: list[tuple[int, Exception]] = []
        for number in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._restore(number, template)
            # Orbax and tensorstore raise errors of many classes for damaged files.
            except Exception as error:
                failures.append((number, error))
                continue
            for damaged, error in failures:
                print(
                    f"warning: checkpoint {damaged} in {self._manager.directory} cannot be read "
                    f"({_first_line(error)}); it is deleted, and checkpoint {number} is used",
                    flush=True,
                )
                self._manager.delete(damaged)
            return restored
        if failures:
            number, error = failures[0]
            raise CheckpointError(
                f"no checkpoint in {self._manager.directory} can be read with these settings; of "
                f"checkpoint {number}: {_first_line(error)}"
            ) from error
        return None

    def _restore(self, number: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        arrays = _named_arrays(template)
        restored = self._manager.restore(
            number,
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


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
