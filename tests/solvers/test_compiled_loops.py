"""What XLA makes of the loops: stacks of states are updated in place, not copied every trip."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import GMRES, Anderson, Broyden, NewtonKrylov, deq_fixed_point

BATCH, WIDTH = 7, 1000

SOLVERS = {
    "Anderson": Anderson(history=6),
    "Broyden, all columns": Broyden(),
    "Broyden, 6 columns": Broyden(memory=6),
    "Broyden with a line search": Broyden(line_search=True),
    "NewtonKrylov": NewtonKrylov(krylov=GMRES(6)),
}


def cell(w, z, x):
    return jnp.tanh(z @ w + x)


def loop_bodies(text):
    """The lines of all computations that a `while` runs, in compiled HLO."""
    computations, name = {}, None
    for line in text.splitlines():
        header = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if header:
            name = header.group(1)
            computations[name] = []
        elif name:
            computations[name].append(line)
    reached = set()
    pending = re.findall(r"body=%?([\w.\-]+)", text)
    while pending:
        name = pending.pop()
        if name in reached or name not in computations:
            continue
        reached.add(name)
        for line in computations[name]:
            called = re.search(r"branch_computations=\{([^}]*)\}", line)
            pending += re.findall(r"%?([\w.\-]+)", called.group(1)) if called else []
    return [line for name in reached for line in computations[name]]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.slow
def test_no_stack_of_states_is_copied_in_a_loop(name):
    rng = np.random.default_rng(0)
    w = jnp.asarray(0.01 * rng.normal(size=(WIDTH, WIDTH)), jnp.float32)
    x = jnp.asarray(rng.normal(size=(BATCH, WIDTH)), jnp.float32)

    def loss(w, x):
        return (deq_fixed_point(cell, w, x, solver=SOLVERS[name]) * x).sum()

    lines = loop_bodies(jax.jit(jax.value_and_grad(loss)).lower(w, x).compile().as_text())
    stacks = [line for line in lines if re.search(rf"\[{BATCH},\d+,{WIDTH}\]", line)]
    assert any("dynamic-update-slice" in line for line in stacks)  # they are where we look
    assert not [line for line in stacks if re.search(r"\} copy\(", line)]
