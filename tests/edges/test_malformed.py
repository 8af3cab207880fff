"""Wrong calls: each ends in an error that names the argument, what came, and what was expected.

In a case stand the call, the type of the error, and what its message has to contain.
"""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Execution,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Status,
    Unrolled,
    deq_fixed_point,
    solve_adjoint,
    solve_fixed_point,
)
from deq_jax.stability import dropout_mask

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32))
PARAMS = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)).astype(np.float32) * 0.3)
SHORT = Picard(max_iter=3)


def cell(params, z, x):
    return jnp.tanh(z @ params + x)


def two_arguments(z, x):
    return z


def solve(f=cell, params=PARAMS, x=X, *args, **options):
    return deq_fixed_point(f, params, x, *args, **{"solver": SHORT, **options})


def adjoint(cotangent, **options):
    return solve_adjoint(cell, PARAMS, X, 0 * X, cotangent, **options)


@dataclasses.dataclass(frozen=True)
class Own:
    """A solver of the user's own: plain iteration, with one thing wrong."""

    propose: Callable = lambda z, fz: fz
    first: Callable = lambda z: jnp.zeros(z.shape[0])
    later: Callable = lambda state: state
    tol: float = 1e-3
    atol: float = 0.0
    max_iter: int = 5
    trace: bool = False

    def init(self, z, fz):
        return self.first(z)

    def step(self, z, fz, state):
        return self.propose(z, fz), self.later(state)


class ReturnsOneThing(Own):
    def step(self, z, fz, state):
        return fz


class InitOfOneArgument(Own):
    def init(self, z):
        return ()


class StepOfTwoArguments(Own):
    def step(self, z, fz):
        return fz, ()


class NNXCell(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(PARAMS)

    def __call__(self, z, x):
        return cell(self.w[...], z, x)


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        return cell(self.param("w", lambda _: PARAMS), z, x)


def nnx_layer(**options):
    return deq_jax.nnx.DEQ(NNXCell(), **{"solver": SHORT, **options})(X)


def linen_layer(**options):
    layer = deq_jax.linen.DEQ(cell=LinenCell(), **{"solver": SHORT, **options})
    return layer.apply(layer.init(jax.random.key(0), X), X)


def numbers():
    yield PARAMS


EITHER = (TypeError, ValueError)

OWN_SOLVERS = {
    "step returns another shape": (
        lambda: solve(solver=Own(propose=lambda z, fz: fz[:, :2])),
        ValueError,
        ["Own", r"step", r"\(4, 2\)", r"\(4, 3\)"],
    ),
    "step returns a shape that would broadcast": (
        lambda: solve(solver=Own(propose=lambda z, fz: fz[:, :1])),
        ValueError,
        ["Own", r"step", r"\(4, 1\)", r"\(4, 3\)"],
    ),
    "step returns one sample for all": (
        lambda: solve(solver=Own(propose=lambda z, fz: fz[0])),
        ValueError,
        ["Own", r"step", r"\(3,\)", r"\(4, 3\)"],
    ),
    "step returns another tree": (
        lambda: solve(solver=Own(propose=lambda z, fz: {"z": fz})),
        ValueError,
        ["Own", r"step", r"'z'"],
    ),
    "step returns None for the proposal": (
        lambda: solve(solver=Own(propose=lambda z, fz: None)),
        EITHER,
        ["Own", r"step"],
    ),
    "step returns another dtype": (
        lambda: solve(solver=Own(propose=lambda z, fz: fz.astype(jnp.float16))),
        ValueError,
        ["Own", r"step", r"float16", r"float32"],
    ),
    "step returns integers": (
        lambda: solve(solver=Own(propose=lambda z, fz: fz.astype(jnp.int32))),
        ValueError,
        ["Own", r"step", r"int32", r"float32"],
    ),
    "step returns one thing": (
        lambda: solve(solver=ReturnsOneThing()),
        EITHER,
        ["ReturnsOneThing", r"step", r"pair|two|state"],
    ),
    "the state changes its structure": (
        lambda: solve(solver=Own(later=lambda state: (state, state))),
        ValueError,
        ["Own", r"step", r"state"],
    ),
    "the state changes its shape": (
        lambda: solve(solver=Own(later=lambda state: state[:2])),
        ValueError,
        ["Own", r"step", r"state", r"\(2,\)", r"\(4,\)"],
    ),
    "the state changes its dtype": (
        lambda: solve(solver=Own(later=lambda state: state.astype(jnp.int32))),
        ValueError,
        ["Own", r"step", r"state", r"int32", r"float32"],
    ),
    "init returns what is no array": (
        lambda: solve(solver=Own(first=lambda z: "nothing")),
        EITHER,
        ["Own", r"init", r"nothing|str"],
    ),
    "init takes one argument": (
        lambda: solve(solver=InitOfOneArgument()),
        TypeError,
        [r"init\(\)", r"argument"],
    ),
    "step takes two arguments": (
        lambda: solve(solver=StepOfTwoArguments()),
        TypeError,
        [r"step\(\)", r"argument"],
    ),
    "max_iter is no integer": (
        lambda: solve(solver=Own(max_iter=2.5)),
        EITHER,
        ["Own", r"max_iter", r"2\.5"],
    ),
    "tol is no number": (lambda: solve(solver=Own(tol="a")), EITHER, ["Own", r"tol", r"'a'"]),
}

ARGUMENTS = {
    "f is None": (lambda: solve(f=None), TypeError, [r"\bf\b must be", r"None"]),
    "f is a number": (lambda: solve(f=3), TypeError, [r"\bf\b must be", r"3|int"]),
    "f is a string": (lambda: solve(f="f"), TypeError, [r"\bf\b must be", r"'f'|str"]),
    "f is an array": (lambda: solve(f=X), TypeError, [r"\bf\b must be"]),
    "f is None, no gradient": (
        lambda: solve_fixed_point(None, PARAMS, X),
        TypeError,
        [r"\bf\b must be", r"None"],
    ),
    "f is None, adjoint": (
        lambda: solve_adjoint(None, PARAMS, X, X, X),
        TypeError,
        [r"\bf\b must be", r"None"],
    ),
    "f takes two arguments": (
        lambda: solve(f=two_arguments),
        TypeError,
        [r"positional argument"],
    ),
    "f returns None": (
        lambda: solve(f=lambda p, z, x: None),
        EITHER,
        [r"\bf must return"],
    ),
    "f returns a string": (lambda: solve(f=lambda p, z, x: "z"), EITHER, [r"\bf must return"]),
    "f returns another shape": (
        lambda: solve(f=lambda p, z, x: z[:, :1]),
        ValueError,
        [r"\bf must return", r"\(4, 1\)", r"\(4, 3\)"],
    ),
    "z0 of strings in an array": (
        lambda: solve(cell, PARAMS, X, np.array([["a"] * 3] * 4)),
        TypeError,
        [r"\bz0\b"],
    ),
    "z0 a string": (lambda: solve(cell, PARAMS, X, "start"), TypeError, [r"\bz0\b", "start|str"]),
    "z0 a tree of strings": (
        lambda: solve(cell, PARAMS, X, {"a": "b"}),
        TypeError,
        [r"\bz0\b", r"'a'"],
    ),
    "z0 a function": (lambda: solve(cell, PARAMS, X, cell), TypeError, [r"\bz0\b"]),
    "z0 of objects": (
        lambda: solve(cell, PARAMS, X, np.array([object()])),
        TypeError,
        [r"\bz0\b"],
    ),
    "z0 of integers": (
        lambda: solve(cell, PARAMS, X, jnp.zeros((4, 3), jnp.int32)),
        TypeError,
        [r"\bz0\b|state", r"int32"],
    ),
    "x of strings without z0": (
        lambda: solve(cell, PARAMS, np.array([["a"] * 3] * 4)),
        TypeError,
        [r"\bx\b"],
    ),
    "x a string without z0": (lambda: solve(cell, PARAMS, "input"), TypeError, [r"\bx\b"]),
    "params a generator": (lambda: solve(cell, numbers(), X), TypeError, [r"params", r"generator"]),
    "x a generator": (
        lambda: solve(cell, PARAMS, numbers(), X),
        TypeError,
        [r"\bx\b", r"generator"],
    ),
    "solver a class": (lambda: solve(solver=Anderson), TypeError, [r"solver must be", "Anderson"]),
    "solver None": (lambda: solve(solver=None), TypeError, [r"solver must be", "None"]),
    "solver a string": (lambda: solve(solver="anderson"), TypeError, [r"solver must be"]),
    "solver a gradient": (lambda: solve(solver=Implicit()), TypeError, [r"solver must be"]),
    "solver for linear systems only": (
        lambda: solve(solver=GMRES()),
        TypeError,
        ["solver must be"],
    ),
    "gradient a solver": (
        lambda: solve(gradient=Anderson()),
        TypeError,
        [r"gradient must be", r"Anderson"],
    ),
    "gradient a class": (lambda: solve(gradient=Implicit), TypeError, [r"gradient must be"]),
    "gradient None": (lambda: solve(gradient=None), TypeError, [r"gradient must be", r"None"]),
    "batched 1": (lambda: solve(batched=1), TypeError, [r"batched", r"bool", r"1"]),
    "batched a string": (lambda: solve(batched="yes"), TypeError, [r"batched", r"'yes'"]),
    "batched None": (lambda: solve(batched=None), TypeError, [r"batched", r"None"]),
    "batched 1, no gradient": (
        lambda: solve_fixed_point(cell, PARAMS, X, batched=1),
        TypeError,
        [r"batched", r"bool"],
    ),
    "batched 1, adjoint": (lambda: adjoint(X, batched=1), TypeError, [r"batched", r"bool"]),
    "return_stats a string": (
        lambda: solve(return_stats="yes"),
        TypeError,
        [r"return_stats", r"'yes'"],
    ),
    "return_stats 1": (lambda: solve(return_stats=1), TypeError, [r"return_stats", r"bool"]),
    "execution None": (lambda: solve(execution=None), TypeError, [r"execution", r"None"]),
    "execution a dictionary": (
        lambda: solve(execution={"shrink_to": 1}),
        TypeError,
        [r"execution must be", r"Execution"],
    ),
    "execution None, no gradient": (
        lambda: solve_fixed_point(cell, PARAMS, X, execution=None),
        TypeError,
        [r"execution", r"None"],
    ),
    "probe of another batch": (
        lambda: solve(backward_probe=BackwardProbe.zeros(3)),
        ValueError,
        [r"backward_probe", r"\(3,\)", r"\(4,\)"],
    ),
    "probe True": (lambda: solve(backward_probe=True), TypeError, [r"backward_probe", r"bool"]),
    "sample_at a float": (lambda: solve(sample_at=[1.5]), TypeError, [r"sample_at", r"1\.5"]),
    "sample_at a number": (lambda: solve(sample_at=2), TypeError, [r"sample_at", r"2"]),
    "sample_at a string": (lambda: solve(sample_at="12"), TypeError, [r"sample_at"]),
    "sample_at decreasing": (lambda: solve(sample_at=(2, 1)), ValueError, [r"sample_at"]),
    "cotangent complex": (
        lambda: adjoint(X.astype(jnp.complex64)),
        EITHER,
        [r"cotangent", r"complex64", r"float32"],
    ),
    "cotangent of another shape": (
        lambda: adjoint(X[:, :2]),
        ValueError,
        [r"cotangent", r"\(4, 2\)|4, 2"],
    ),
    "cotangent a string": (lambda: adjoint("y"), EITHER, [r"cotangent"]),
    "cotangent of strings": (
        lambda: adjoint(np.array([["a"] * 3] * 4)),
        EITHER,
        [r"cotangent"],
    ),
    "normalization a string, nnx": (
        lambda: nnx_layer(normalization="weight"),
        TypeError,
        [r"normalization must be", r"'weight'"],
    ),
    "normalization a string, linen": (
        lambda: linen_layer(normalization="weight"),
        TypeError,
        [r"normalization must be", r"'weight'"],
    ),
    "normalization a class, nnx": (
        lambda: nnx_layer(normalization=deq_jax.stability.WeightNorm),
        TypeError,
        [r"normalization must be", r"WeightNorm"],
    ),
    "normalization a class, linen": (
        lambda: linen_layer(normalization=deq_jax.stability.WeightNorm),
        TypeError,
        [r"normalization must be", r"WeightNorm"],
    ),
    "cell None, nnx": (lambda: deq_jax.nnx.DEQ(None), TypeError, [r"cell must be", r"None"]),
    "cell None, linen": (
        lambda: deq_jax.linen.DEQ(cell=None).init(jax.random.key(0), X),
        TypeError,
        [r"cell must be", r"None"],
    ),
    "solver a class, nnx": (lambda: nnx_layer(solver=Anderson), TypeError, [r"solver must be"]),
    "solver a class, linen": (
        lambda: linen_layer(solver=Anderson),
        TypeError,
        [r"solver must be"],
    ),
    "dropout_mask of a string": (
        lambda: dropout_mask(jax.random.key(0), "a", (4, 3)),
        EITHER,
        [r"rate", r"'a'"],
    ),
    "dropout_mask of None": (
        lambda: dropout_mask(jax.random.key(0), None, (4, 3)),
        EITHER,
        [r"rate", r"None"],
    ),
    "dropout_mask of nan": (
        lambda: dropout_mask(jax.random.key(0), float("nan"), (4, 3)),
        ValueError,
        [r"rate", r"nan"],
    ),
}

FORWARD = [Picard, Anderson, Broyden, NewtonKrylov]
LINEAR = [GMRES, BiCGStab]
FIELDS = {
    **{
        f"{kind.__name__}.tol={value!r}": (
            lambda kind=kind, value=value: kind(tol=value),
            error,
            [rf"{kind.__name__}\.tol", re.escape(repr(value))],
        )
        for kind in [*FORWARD, *LINEAR]
        for value, error in [(float("nan"), ValueError), ("a", TypeError), (True, TypeError)]
    },
    **{
        f"{kind.__name__}.max_iter={value!r}": (
            lambda kind=kind, value=value: kind(max_iter=value),
            error,
            [rf"{kind.__name__}\.max_iter", re.escape(repr(value))],
        )
        for kind in [*FORWARD, *LINEAR]
        for value, error in [(2.5, TypeError), (0, ValueError), (True, TypeError)]
    },
    "tol of an array": (
        lambda: Picard(tol=np.ones(3)),
        EITHER,
        [r"Picard\.tol", r"scalar|\(3,\)"],
    ),
    "tol of a complex number": (lambda: Picard(tol=1j), TypeError, [r"Picard\.tol", r"1j"]),
    "tol a negative NumPy number": (
        lambda: Picard(tol=np.float32(-1)),
        ValueError,
        [r"Picard\.tol", r"-1"],
    ),
    "history=0": (lambda: Anderson(history=0), ValueError, [r"Anderson\.history", r"0"]),
    "mixing=-1": (lambda: Anderson(mixing=-1), ValueError, [r"Anderson\.mixing", r"-1"]),
    "mixing an array": (
        lambda: Anderson(mixing=jnp.ones(3)),
        EITHER,
        [r"Anderson\.mixing", r"scalar|\(3,\)"],
    ),
    "mixing of integers": (
        lambda: Anderson(mixing=jnp.asarray(0)),
        ValueError,
        [r"Anderson\.mixing", r"0"],
    ),
    "ridge=-1": (lambda: Anderson(ridge=-1.0), ValueError, [r"Anderson\.ridge", r"-1"]),
    "trace=1": (lambda: Anderson(trace=1), TypeError, [r"Anderson\.trace", r"bool"]),
    "damping a NumPy number above 1": (
        lambda: Picard(damping=np.float32(2.0)),
        ValueError,
        [r"Picard\.damping", r"2", r"<= 1"],
    ),
    "damping an array above 1": (
        lambda: Picard(damping=jnp.asarray(2.0)),
        ValueError,
        [r"Picard\.damping", r"2", r"<= 1"],
    ),
    "damping a NumPy bool": (
        lambda: Picard(damping=np.bool_(True)),
        TypeError,
        [r"Picard\.damping"],
    ),
    "memory=0": (lambda: Broyden(memory=0), ValueError, [r"Broyden\.memory", r"0"]),
    "restart=0": (lambda: GMRES(restart=0), ValueError, [r"GMRES\.restart", r"0"]),
    "krylov a solver": (
        lambda: NewtonKrylov(krylov=Anderson()),
        TypeError,
        [r"NewtonKrylov\.krylov", r"Anderson"],
    ),
    "Implicit of a string": (
        lambda: Implicit("gmres"),
        TypeError,
        [r"Implicit\.solver must be", r"'gmres'"],
    ),
    "Implicit of a class": (
        lambda: Implicit(GMRES),
        TypeError,
        [r"Implicit\.solver must be", r"GMRES"],
    ),
    "Implicit of a gradient": (
        lambda: Implicit(OneStep()),
        TypeError,
        [r"Implicit\.solver must be", r"OneStep"],
    ),
    "Implicit with tol a string": (lambda: Implicit(tol="a"), TypeError, [r"Implicit\.tol", "'a'"]),
    "reuse a string": (lambda: Implicit(reuse="yes"), TypeError, [r"Implicit\.reuse", r"'yes'"]),
    "Neumann of 0 terms": (lambda: Neumann(0), ValueError, [r"Neumann\.terms", r"0"]),
    "Phantom of 2.5 steps": (lambda: Phantom(2.5), TypeError, [r"Phantom\.steps", r"2\.5"]),
    "Unrolled of 0 steps": (lambda: Unrolled(0), ValueError, [r"Unrolled\.steps", r"0"]),
    "shrink_to a string": (
        lambda: Execution(shrink_to="a"),
        TypeError,
        [r"Execution\.shrink_to", r"'a'"],
    ),
}


def check(case):
    call, error, patterns = case
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"no {pattern!r} in {message!r}"
    # Names from inside the library help nobody.
    assert "<locals>" not in message, message


@pytest.mark.parametrize("name", OWN_SOLVERS)
def test_own_solvers(name):
    check(OWN_SOLVERS[name])


# JAX itself warns where a generator is flattened, before or after the library has looked at it.
@pytest.mark.filterwarnings("ignore:Python iterable type")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    check(ARGUMENTS[name])


@pytest.mark.parametrize("name", FIELDS)
def test_fields(name):
    check(FIELDS[name])


@pytest.mark.parametrize("name", ["step returns another shape", "the state changes its dtype"])
def test_the_error_is_the_same_under_jit(name):
    call, error, patterns = OWN_SOLVERS[name]
    check((lambda: jax.jit(call)(), error, patterns))


def test_the_error_of_the_users_own_init_comes_through():
    def fail(z):
        raise RuntimeError("the file of starts is missing")

    with pytest.raises(RuntimeError, match="the file of starts is missing"):
        solve(solver=Own(first=fail))


def test_the_error_of_the_users_own_f_comes_through():
    def fail(params, z, x):
        raise RuntimeError("no such weights")

    with pytest.raises(RuntimeError, match="no such weights"):
        solve(f=fail)


def test_the_own_solver_of_these_tests_is_right_where_nothing_is_wrong():
    """Or the cases above would prove nothing."""
    z, stats = solve(solver=Own(max_iter=100), return_stats=True)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    expected = np.zeros((4, 3))
    for _ in range(200):
        expected = np.tanh(expected @ np.asarray(PARAMS, np.float64) + np.asarray(X, np.float64))
    np.testing.assert_allclose(z, expected, rtol=0, atol=1e-2)
