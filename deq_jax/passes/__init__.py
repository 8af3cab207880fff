"""A closure as a loop runs it, with optional rewritings of its program.

A loop runs right without the rewritings. They are there because XLA's CPU compiler runs some loop
bodies slowly. The docstring of each file says how much faster its rewriting is, and how that was
measured. On other platforms no program is rewritten.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax

from deq_jax import _compat
from deq_jax.closure import Closure
from deq_jax.passes.cpu import rewrite_operations, rewrite_to_differentiate
from deq_jax.passes.flatten import flatten
from deq_jax.passes.hoist import hoist
from deq_jax.shrinking import Phase

PyTree = Any


def ready_for_loop(f: Closure) -> Closure:
    """`f` for use in a loop's body: the same function, up to rounding."""
    if jax.default_backend() != "cpu" or f.program.specs is not None:
        return f
    return hoist(f, rewrite_operations(flatten(f.program.jaxpr), len(f.arrays)))


def ready_to_differentiate(f: Closure) -> Closure:
    """`f` for reverse mode in a loop: the same function, with the same derivatives."""
    convolves = _compat.contains(f.program.jaxpr, "conv_general_dilated")
    if not convolves or jax.default_backend() != "cpu" or f.program.specs is not None:
        return f
    flat = rewrite_to_differentiate(flatten(f.program.jaxpr, keep_rules=True))
    equations = [op.equation for op in flat.operations]
    jaxpr = _compat.with_equations(flat.jaxpr, flat.invars, equations, flat.outvars)
    return dataclasses.replace(f, program=f.program.rewritten(jaxpr))


class LoopBody:
    """A closure ready for a loop that is not differentiated; a `solve.Map`.

    Attributes:
        body: what the loop evaluates.
    """

    differentiable: ClassVar[bool] = False

    def __init__(self, f: Closure):
        self.body = ready_for_loop(f)
        self._source = f

    def __call__(self, z: PyTree) -> PyTree:
        """The function at `z`."""
        return self.body(z)

    @property
    def mesh_axes(self) -> tuple[str, ...]:
        """Names of the axes over which a trip communicates."""
        return self.body.mesh_axes

    @property
    def mixes(self) -> bool:
        """Whether it can be seen to mix samples."""
        return self._source.mixes

    @property
    def takes_step(self) -> bool:
        """See `Closure`."""
        return self._source.takes_step

    @property
    def check_every(self) -> int:
        """See `Closure`."""
        return self._source.check_every

    def linearize(self, z: PyTree) -> tuple[PyTree, "LoopBody"]:
        """The function at `z`, and its derivative there, ready for a loop in its turn."""
        fz, product = self._source.linearize(z)
        return fz, LoopBody(product)

    @property
    def parts(self) -> tuple[Phase, ...]:
        """The function on fewer samples."""

        def at(part: Closure, index: jax.Array) -> LoopBody:
            return LoopBody(part.at(index))

        return tuple(Phase(part.size, functools.partial(at, part)) for part in self._source.parts)
