"""What the library's types tell a user: pyright and mypy on code that uses it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
USER_CODE = ROOT / "tests" / "typing" / "user_code.py"

WRONG = """\
import jax
import jax.numpy as jnp
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import GMRES, Anderson, Execution, Implicit, deq_fixed_point, solve_fixed_point
from deq_jax.cells import FeedForwardCell


def cell(params: jax.Array, z: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.tanh(z @ params + x)


def pair(params: jax.Array, z: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return z, x


params, x = jnp.zeros((4, 4)), jnp.ones((3, 4))
deq_fixed_point(cell, params, x)
deq_fixed_point(cell, params, x, solver=3)  # wrong
deq_fixed_point(cell, params, x, solver=GMRES())  # wrong
deq_fixed_point(cell, params, x, gradient="implicit")  # wrong
deq_fixed_point(cell, params, x, return_stats="yes")  # wrong
deq_fixed_point(cell, params, x, sample_at=(0.5,))  # wrong
deq_fixed_point(cell, params, x, execution={"shrink_to": 2})  # wrong
deq_fixed_point(cell, params, x, tol=1e-3)  # wrong
deq_fixed_point(pair, params, x)  # wrong
deq_fixed_point(cell, params, x).residual  # wrong
state, stats = deq_fixed_point(cell, params, x, return_stats=True)
state.converged  # wrong
stats.convergd  # wrong
solve_fixed_point(cell, params, x)
solve_fixed_point(cell, params, x, solver=Implicit())  # wrong
solve_fixed_point(cell, params, x).residual  # wrong
Anderson(tol=1e-3)
Anderson(tol="small")  # wrong
Anderson(history=2.5)  # wrong
Implicit(solver=3)  # wrong
Execution(shrink_to="2")  # wrong
layer = deq_jax.nnx.DEQ(FeedForwardCell(4, 4, rngs=nnx.Rngs(0)))
layer(x, return_stats=True)[1].converged
layer(x, return_stats=True)[1].convergd  # wrong
deq_jax.nnx.DEQ(FeedForwardCell(4, 4, rngs=nnx.Rngs(0)), solver=3)  # wrong
deq_jax.linen.DEQ(cell=3)  # wrong
"""


def pyright(paths):
    """For each file the lines at which pyright finds an error, and the messages."""
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}
    command = ["pyright", "--outputjson", "--pythonpath", sys.executable, *map(str, paths)]
    report = json.loads(run(command, environment))
    assert report["summary"]["filesAnalyzed"] == len(paths)
    errors = [
        (Path(found["file"]), found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    return by_file(paths, errors)


def mypy(paths):
    """The same for mypy. What it finds in other files on the way is for `make lint` to report."""
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = ["mypy", "--output=json", *map(str, paths)]  # with the cache of `make lint`
    found = [json.loads(line) for line in run(command, environment).split("\n") if line]
    errors = [
        (ROOT / entry["file"], entry["line"], entry["message"])
        for entry in found
        if entry["severity"] == "error"
    ]
    return by_file(paths, errors)


def by_file(paths, errors):
    # By name: mypy repeats what it has kept of an equal file, with the folder that this was in.
    return [
        {line: message for file, line, message in errors if file.name == path.name}
        for path in paths
    ]


def run(command, environment):
    name, *arguments = command
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr + done.stdout
    return done.stdout


@pytest.mark.parametrize("checker", [pyright, mypy])
@pytest.mark.slow
def test_user_code_has_no_errors_and_wrong_code_has_all(checker, tmp_path):
    """One run of each checker, which takes seconds to begin, for both files."""
    path = tmp_path / "wrong.py"
    path.write_text(WRONG, encoding="utf-8")
    lines = WRONG.splitlines()
    wrong = {lines[number] for number in range(len(lines)) if lines[number].endswith("# wrong")}
    of_user_code, of_wrong_code = checker([USER_CODE, path])
    assert of_user_code == {}
    assert {lines[number - 1] for number in of_wrong_code} == wrong


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_user_code_runs():
    """As far as tracing goes; what the solves return is for other tests."""
    jax.eval_shape(runpy.run_path(str(USER_CODE))["main"])
