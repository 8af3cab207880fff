"""A progress meter for a compiled solve: tqdm, told by a callback from the loop."""

import dataclasses
import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Progress:
    """Shows evaluations, unfinished samples and the largest residual while a solve runs.

    Attributes:
        every: evaluations between two reports.
        total: most evaluations.
    """

    every: int
    total: int

    def report(self, number: jax.Array, residual: jax.Array, active: jax.Array) -> None:
        """Reports evaluation `number`, counted from 1, from inside a loop, every so often."""

        def tell() -> None:
            worst = jnp.max(jnp.where(active, residual, 0))
            jax.debug.callback(self._show, number, worst, jnp.sum(active), ordered=True)

        jax.lax.cond(number % self.every == 0, tell, lambda: None)

    def close(self, evaluations: jax.Array) -> None:
        """Reports the end of the solve."""
        jax.debug.callback(self._close, evaluations, ordered=True)

    def _show(self, number: Any, worst: Any, active: Any) -> None:
        bar = _bars.get(self)
        if bar is None:
            bar = _bars[self] = _new_bar(self.total)
        bar.n = int(number)
        bar.set_postfix({"active": int(active), "residual": f"{float(worst):.1e}"}, refresh=False)
        bar.refresh()

    def _close(self, evaluations: Any) -> None:
        bar = _bars.pop(self, None) or _new_bar(self.total)
        bar.n = int(np.max(evaluations))
        bar.refresh()
        bar.close()


_bars: dict[Progress, Any] = {}
"""The meters of solves that are under way."""


def _new_bar(total: int) -> Any:
    try:
        tqdm = importlib.import_module("tqdm")
    except ImportError as error:
        raise ImportError("Execution(progress=...) needs tqdm; install it with pip") from error
    return tqdm.tqdm(total=total, desc="solve", unit="evaluation")
