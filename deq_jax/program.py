"""A traced function without its arrays: what a closure does, and when two do the same.

Tracing a function twice gives two jaxprs. They are compared by what they compute, so that code
compiled for the first serves the second.
"""

import functools
from collections.abc import Hashable, Iterator
from typing import Any

import jax
import numpy as np

from deq_jax import _compat
from deq_jax.kept import Same
from deq_jax.mixing import seen_to_mix

PyTree = Any


class Program:
    """A jaxpr and the structure of its outputs: the static part of a `Closure`.

    Two programs are equal if they run the same operations, so that a function that is traced again
    finds what was compiled for the trace before.

    Attributes:
        jaxpr: a jaxpr without constants. Its inputs are the closure's arrays, then the leaves of
            the state.
        out_tree: the structure of the outputs.
        mesh_axes: names of the axes over which it communicates. A loop around it has to make as
            many trips on every device along them.
        per_sample: for each of the closure's arrays, whether its axis 0 is the batch.
        specs: partition specs of all inputs if the mesh has explicit axes, otherwise None.
        reverse_only: it contains a `custom_vjp` (a fused kernel, say), which has no forward mode.
        value_only: no derivative will be taken, so that the derivative rules in it do not matter.
    """

    def __init__(
        self,
        jaxpr: Any,
        out_tree: Any,
        per_sample: tuple[bool, ...] = (),
        value_only: bool = False,
    ):
        self.jaxpr = jaxpr
        self.out_tree = out_tree
        self.per_sample = per_sample
        self.value_only = value_only
        self.mesh_axes = _compat.mesh_axes(jaxpr)
        self.reverse_only = _compat.contains(jaxpr, "custom_vjp_call")
        self.specs = None
        if _compat.explicit_axes():
            self.specs = tuple(variable.aval.sharding.spec for variable in jaxpr.invars)

    def __call__(self, *values: Any) -> PyTree:
        """Evaluates the jaxpr."""

        def evaluate(*values: Any) -> list[Any]:
            return _compat.evaluate(self.jaxpr, values)

        run: Any = evaluate

        if self.specs is not None and not _compat.explicit_axes():
            # The solve runs under automatic sharding; f runs in the types it was traced in.
            run = jax.sharding.explicit_axes(evaluate, in_sharding=self.specs)
        return jax.tree.unflatten(self.out_tree, run(*values))

    def output(self, index: int) -> "Program":
        """The program of the item `index` of the tuple that this one returns."""
        trees: list[Any] = jax.tree_util.treedef_children(self.out_tree)
        begin = sum(tree.num_leaves for tree in trees[:index])
        outvars = self.jaxpr.outvars[begin : begin + trees[index].num_leaves]
        jaxpr = _compat.without_dead_code(self.jaxpr, outvars)
        return self._with(jaxpr, trees[index], self.per_sample)

    def with_array(self, per_sample: bool) -> "Program":
        """The same program, of whose inputs one more is an array of the closure."""
        return self._with(self.jaxpr, self.out_tree, (*self.per_sample, per_sample))

    def rewritten(self, jaxpr: Any) -> "Program":
        """The same function, computed by other operations."""
        return self._with(jaxpr, self.out_tree, self.per_sample)

    def _with(self, jaxpr: Any, out_tree: Any, per_sample: tuple[bool, ...]) -> "Program":
        program = Program(jaxpr, out_tree, per_sample, self.value_only)
        program.specs = self.specs  # those of the context in which it was traced
        return program

    @functools.cached_property
    def mixes(self) -> bool:
        """Whether it can be seen to mix the samples of the state."""
        inputs = len(self.jaxpr.invars)
        arrays = self.per_sample or (False,) * (inputs - self.out_tree.num_leaves)
        return bool(seen_to_mix(self.jaxpr, (*arrays, *[True] * (inputs - len(arrays)))))

    @functools.cached_property
    def _rest(self) -> Hashable:
        return self.out_tree, self.per_sample, self.value_only, self.mesh_axes, self.specs

    @functools.cached_property
    def _operations(self) -> Hashable:
        return tuple(_describe(self.jaxpr, with_rules=not self.value_only))

    def __hash__(self) -> int:
        return hash((len(self.jaxpr.eqns), len(self.jaxpr.invars), self.out_tree))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Program) or self._rest != other._rest:
            return False
        return self.jaxpr is other.jaxpr or self._operations == other._operations


_RULES = frozenset({"jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd", "out_trees"})
"""Parameters that hold derivative rules. Tracing makes them anew, so they are never equal."""


def _describe(jaxpr: Any, with_rules: bool) -> Iterator[Hashable]:
    """The types of the inputs, the operations and the outputs of a jaxpr, without its names."""
    numbers: dict[Any, int] = {}

    def atom(atom: Any) -> Hashable:
        if isinstance(atom, _compat.Literal):
            return atom.aval, _constant(atom.val)
        return numbers[atom]

    def define(variable: Any) -> Hashable:
        numbers[variable] = len(numbers)
        return variable.aval

    def parameter(value: Any) -> Hashable:
        opened, constants = _compat.opened(value)
        if isinstance(opened, _compat.Jaxpr):
            described = tuple(_describe(opened, with_rules))
            return described, tuple(map(Same, constants))
        if isinstance(value, tuple | list):
            return tuple(map(parameter, value))
        if isinstance(value, dict):
            return tuple((key, parameter(item)) for key, item in value.items())
        return _constant(value)

    yield tuple(map(define, [*jaxpr.constvars, *jaxpr.invars]))
    for equation in jaxpr.eqns:
        yield equation.primitive, equation.ctx
        yield tuple(map(atom, equation.invars))
        for name, value in equation.params.items():
            if with_rules or name not in _RULES:
                yield name, parameter(value)
        yield tuple(map(define, equation.outvars))
    yield tuple(map(atom, jaxpr.outvars))


def _constant(value: Any) -> Hashable:
    """A key for a constant that tells 1 from 1.0 and True, and 0.0 from -0.0."""
    if isinstance(value, np.generic | np.ndarray | float | complex):
        return (
            type(value),
            str(np.asarray(value).dtype),
            np.shape(value),
            np.asarray(value).tobytes(),
        )
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return type(value), value
