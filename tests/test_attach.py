"""`attach_gradient` and `implicit`: SciPy's solutions, dense derivatives and differences."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_jax import (
    GMRES,
    BackwardProbe,
    Broyden,
    Implicit,
    OneStep,
    Status,
    Unrolled,
    attach_gradient,
    implicit,
)
from tests.reference import flatten

pytestmark = pytest.mark.usefixtures("x64")

N = 4
EXACT = Implicit(GMRES(tol=1e-13, max_iter=200))
W = np.random.default_rng(0).normal(size=(N, N))
W = W @ W.T / N + np.eye(N)
X = np.random.default_rng(1).normal(size=N)
PARAMS = {"a": np.float64(0.7), "b": np.random.default_rng(2).normal(size=2)}
DIRECTION = {"a": np.float64(0.3), "b": np.array([1.0, -0.4])}


def f(params, z, x):
    """A map whose Jacobian has a spectral radius above 1, so that no plain iteration solves it."""
    b = jnp.concatenate([params["b"], params["b"] ** 2])
    return jnp.sin(params["a"] * z) - z @ W + b * x


def F(params, z, x):
    return 1e3 * (f(params, z, x) - z)


EQUATIONS = {"fixed_point": f, "root": F}


class Host:
    """SciPy's solution on the host, through a callback, and the number of times it was asked."""

    def __init__(self, vmap_method=None):
        self.calls, self.vmap_method = 0, vmap_method

    def solve(self, params, x):
        self.calls += 1
        a, b, x = (np.asarray(leaf) for leaf in (params["a"], params["b"], x))
        residual = lambda z: np.sin(a * z) - W @ z + np.concatenate([b, b**2]) * x - z  # noqa: E731
        slope = lambda z: np.diag(a * np.cos(a * z)) - W - np.eye(N)  # noqa: E731
        z = scipy.optimize.root(residual, np.zeros(N), jac=slope, tol=1e-14).x
        return z - np.linalg.solve(slope(z), residual(z))  # to rounding

    def __call__(self, params, x):
        like = jax.ShapeDtypeStruct((N,), jnp.float64)
        return jax.pure_callback(self.solve, like, params, x, vmap_method=self.vmap_method)


def layer_by(door, host, form, gradient=EXACT):
    if door == "implicit":
        return implicit(EQUATIONS[form], form=form, gradient=gradient)(host)

    def layer(params, x):
        z = host(*jax.lax.stop_gradient((params, x)))
        return attach_gradient(EQUATIONS[form], params, x, z, form=form, gradient=gradient)

    return layer


def newton_steps(params, x, z, steps):
    """From a solution z: k dense Newton steps have the solution's first k derivatives."""
    z = jax.lax.stop_gradient(z)
    for _ in range(steps):
        g = lambda z: f(params, z, x) - z  # noqa: E731
        z = z - jnp.linalg.solve(jax.jacfwd(g)(z), g(z))
    return z


@jax.jit
def dense_jacobian(params, x, z):
    """The derivative of the solution z."""
    return jax.jacobian(lambda params: newton_steps(params, x, z, 1))(params)


@jax.jit
def dense_hessian(params, x, z):
    """The second derivatives of `loss_of` at the solution z."""
    return jax.hessian(lambda params: loss_of(newton_steps(params, x, z, 2)))(params)


def dense_gradient(params, x, z):
    """That of `loss_of`, flat."""
    slope = np.arange(1.0, N + 1) + 2 * z
    jacobian = dense_jacobian(params, x, z)
    return flatten(jax.tree.map(lambda leaf: np.tensordot(slope, leaf, 1), jacobian))


def difference(function, params, direction, h=1e-3):
    """Derivative along a direction, by central differences of fourth order."""
    at = lambda t: function(jax.tree.map(lambda p, d: p + t * h * d, params, direction))  # noqa: E731
    return (8 * (at(1) - at(-1)) - (at(2) - at(-2))) / (12 * h)


def loss_of(z):
    return (jnp.arange(1.0, N + 1) * z + z**2).sum()


@pytest.mark.slow
@pytest.mark.parametrize(("door", "form"), [("attach", "fixed_point"), ("implicit", "root")])
def test_scipys_root_in_all_modes(door, form):
    host = Host()
    layer = layer_by(door, host, form)
    loss = lambda params: loss_of(layer(params, X))  # noqa: E731
    solve = lambda params: Host().solve(params, X)  # noqa: E731
    z = solve(PARAMS)

    # The value is SciPy's own, and the callback runs once in a forward and a backward pass.
    value, gradient = jax.value_and_grad(loss)(PARAMS)
    assert host.calls == 1
    np.testing.assert_array_equal(value, loss_of(z))
    np.testing.assert_allclose(flatten(gradient), dense_gradient(PARAMS, X, z), rtol=1e-8)
    expected = difference(lambda params: loss_of(solve(params)), PARAMS, DIRECTION)
    np.testing.assert_allclose(flatten(gradient) @ flatten(DIRECTION), expected, rtol=1e-8)

    # Under jit, where the callback is part of the program.
    host.calls = 0
    by_jit = jax.jit(jax.grad(loss))(PARAMS)
    assert host.calls == 1
    np.testing.assert_allclose(flatten(by_jit), flatten(gradient), rtol=1e-10)

    # Forward mode.
    z_dot = jax.jvp(lambda params: layer(params, X), (PARAMS,), (DIRECTION,))[1]
    np.testing.assert_allclose(z_dot, difference(solve, PARAMS, DIRECTION), rtol=1e-8)

    # Second derivatives: forward over reverse, against Newton and against differences of both.
    host.calls = 0
    hessian = jax.hessian(loss)(PARAMS)
    assert host.calls == 1
    np.testing.assert_allclose(flatten(hessian), flatten(dense_hessian(PARAMS, X, z)), rtol=1e-8)
    row = flatten(jax.jvp(jax.grad(loss), (PARAMS,), (DIRECTION,))[1])
    expected = difference(
        lambda params: dense_gradient(params, X, solve(params)), PARAMS, DIRECTION
    )
    np.testing.assert_allclose(row, expected, rtol=1e-8)


@pytest.mark.slow
def test_under_vmap():
    host = Host(vmap_method="sequential")
    layer = layer_by("implicit", host, "fixed_point")
    x = np.stack([X, 0.5 * X, -X])
    gradients = jax.vmap(jax.grad(lambda params, x: loss_of(layer(params, x))), (None, 0))(
        PARAMS, x
    )
    assert host.calls == 3
    for i in range(3):
        expected = dense_gradient(PARAMS, x[i], Host().solve(PARAMS, x[i]))
        got = jax.tree.map(lambda leaf, i=i: leaf[i], gradients)
        np.testing.assert_allclose(flatten(got), expected, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_what_equation_and_solve_close_over(jit):
    """The equation's closure has a gradient, and no tangent reaches the callback of the solve."""

    def loss(a):
        like = jax.ShapeDtypeStruct((), jnp.float64)

        @implicit(lambda params, z, x: z**3 + a * z - x, form="root", gradient=EXACT)
        def solve(params, x):
            def host(a, x):
                a, x = float(a), float(x)
                return np.float64(scipy.optimize.brentq(lambda z: z**3 + a * z - x, -10, 10))

            return jax.pure_callback(host, like, a, x)

        return solve(None, 2.0)

    derivative = jax.jit(jax.grad(loss)) if jit else jax.grad(loss)
    z = loss(0.7)
    np.testing.assert_allclose(derivative(0.7), -z / (3 * z**2 + 0.7), rtol=1e-8)
    if not jit:
        z_a = lambda a: -loss(a) / (3 * loss(a) ** 2 + a)  # noqa: E731
        np.testing.assert_allclose(jax.grad(derivative)(0.7), difference(z_a, 0.7, 1.0), rtol=1e-8)


def test_a_solve_in_numpy_needs_no_callback_outside_of_jit():
    @implicit(lambda a, z, x: z**3 + a * z - x, form="root", gradient=EXACT)
    def solve(a, x, low=-10.0):
        return np.float64(scipy.optimize.brentq(lambda z: z**3 + a * z - x, float(low), 10.0))

    z = solve(0.7, 2.0)
    np.testing.assert_allclose(z**3 + 0.7 * z, 2.0)
    np.testing.assert_allclose(jax.grad(solve)(0.7, 2.0), -z / (3 * z**2 + 0.7), rtol=1e-8)
    # A start is no part of the equation.
    assert jax.grad(solve, argnums=2)(0.7, 2.0, -9.0) == 0
    with pytest.raises(TypeError) as error:
        jax.jit(solve)(0.7, 2.0)
    assert "jax.pure_callback" in error.value.__notes__[0]


def test_a_loop_that_jax_cannot_transpose():
    @implicit(lambda a, z, x: jnp.sqrt(a + x * z), gradient=EXACT)
    def solve(a, x):
        step = lambda z: jnp.sqrt(a + x * z)  # noqa: E731
        return jax.lax.while_loop(lambda z: abs(step(z) - z) > 1e-15, step, jnp.ones(()))

    # z² = a + x z.
    exact = lambda a, x: (x + jnp.sqrt(x**2 + 4 * a)) / 2  # noqa: E731
    got, expected = (jax.jit(jax.grad(g, argnums=(0, 1)))(2.0, 0.5) for g in (solve, exact))
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def relative_residual(z, fz):
    return np.linalg.norm(fz - z) / np.linalg.norm(fz)


def test_the_status_of_a_solution():
    z = Host().solve(PARAMS, X)
    bad = z.copy()
    bad[1] = np.nan
    attach = jax.jit(lambda z: attach_gradient(f, PARAMS, X, z, tol=1e-3, return_stats=True))
    for point, status in ((z, "CONVERGED"), (z + 0.01, "MAX_ITER"), (bad, "DIVERGED")):
        value, stats = attach(point)
        np.testing.assert_array_equal(value, point)
        assert Status(int(stats.status)).name == status
        assert stats.iterations == stats.evaluations == 1
        assert stats.residual.shape == ()
        if status == "MAX_ITER":
            expected = relative_residual(point, np.asarray(f(PARAMS, point, X)))
            np.testing.assert_allclose(stats.residual, expected, rtol=1e-12)
    # An absolute bound is enough as well.
    stats = attach_gradient(
        f, PARAMS, X, z + 0.01, tol=1e-3, atol=jnp.asarray(0.1), return_stats=True
    )[1]
    assert stats.converged


@pytest.mark.slow
def test_a_roots_unit_and_sign_do_not_matter():
    @jax.jit
    def attach(params, z, factor):
        G = lambda params, z, x: factor * (f(params, z, x) - z)  # noqa: E731
        return attach_gradient(
            G, params, X, z, form="root", gradient=EXACT, return_stats=True, tol=1e-3
        )

    jacobian = jax.jit(jax.jacrev(lambda *args: attach(*args)[0]))
    z = Host().solve(PARAMS, X)
    expected = dense_jacobian(PARAMS, X, z)
    for factor in (1e-9, -1.0, 1e9):
        # The residual estimates the relative error of z, whatever the unit.
        assert attach(PARAMS, z, factor)[1].converged
        off = attach(PARAMS, z + 0.01, factor)[1]
        assert off.status == Status.MAX_ITER
        error = 0.02 / np.linalg.norm(z)  # four entries are off by 0.01
        assert error / 4 < off.residual < 4 * error
        got = jacobian(PARAMS, z, factor)
        np.testing.assert_allclose(flatten(got), flatten(expected), rtol=1e-8)


@pytest.mark.slow
def test_samples_and_their_probe():
    """With a batch each sample has a status, and its own backward report."""
    batch = np.stack([Host().solve(PARAMS, x) for x in (X, 2 * X, 3 * X)])
    batch[1] += 0.1
    x = np.stack([X, 2 * X, 3 * X])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def differentiate(params, probe):
        z, stats = attach_gradient(
            f, params, x, batch, batched=True, return_stats=True, backward_probe=probe
        )
        return loss_of(z[::2]), stats

    (gradient, report), stats = differentiate(PARAMS, BackwardProbe.zeros(3))
    assert stats.status.tolist() == [Status.CONVERGED, Status.MAX_ITER, Status.CONVERGED]
    assert report.status.tolist() == [0, 0, 0]
    assert report.iterations[1] == 0
    assert (report.residual <= 1e-4).all()
    expected = sum(dense_gradient(PARAMS, x[i], batch[i]) for i in (0, 2))
    np.testing.assert_allclose(flatten(gradient), expected, rtol=1e-3)


@pytest.mark.slow
def test_in_shard_map():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    x = np.stack([X, 2 * X])
    z = np.stack([Host().solve(PARAMS, row) for row in x])

    def loss(params, x, z):
        layer = jax.shard_map(
            lambda params, x, z: attach_gradient(
                F, params, x[0], z[0], form="root", gradient=EXACT
            )[None],
            mesh=mesh,
            in_specs=(P(), P("data"), P("data")),
            out_specs=P("data"),
        )
        return loss_of(layer(params, x, z))

    gradient = jax.jit(jax.grad(loss))(PARAMS, x, z)
    expected = sum(dense_gradient(PARAMS, x[i], z[i]) for i in range(2))
    np.testing.assert_allclose(flatten(gradient), expected, rtol=1e-8)


@pytest.mark.slow
def test_one_application_of_f():
    """`OneStep` is the derivative of f alone: ∂f/∂params at z*."""
    z = Host().solve(PARAMS, X)
    got = jax.jacobian(lambda p: attach_gradient(f, p, X, z, gradient=OneStep()))(PARAMS)
    expected = jax.jacobian(lambda p: f(p, z, X))(PARAMS)
    np.testing.assert_allclose(flatten(got), flatten(expected), rtol=1e-10)


@pytest.mark.slow
def test_a_record_of_the_solve():
    @implicit(lambda a, z, x: {"z": jnp.cos(a * z["z"]) + x}, has_aux=True, gradient=EXACT)
    def solve(a, x, count):
        z = x
        for _ in range(count):  # a Python loop: count stays a number
            z = jnp.cos(a * z) + x
        return {"z": z}, {"count": count, "solver": "plain", "last": z}

    z, stats, aux = solve(0.5, 0.1, 60, return_stats=True)
    assert stats.converged
    assert aux["count"] == 60
    assert aux["solver"] == "plain"

    def loss(a):
        z, aux = solve(a, 0.1, count=60)
        return z["z"] + aux["last"], aux["solver"]

    (derivative, name) = jax.grad(loss, has_aux=True)(0.5)
    assert name == "plain"
    s = np.sin(0.5 * z["z"])  # the record adds nothing to -z s / (1 + a s)
    np.testing.assert_allclose(derivative, -z["z"] * s / (1 + 0.5 * s), rtol=1e-8)


def attach(f=f, z=X, **options):
    return attach_gradient(f, PARAMS, X, z, **options)


BAD = {
    "integer solution": (
        lambda: attach(z=np.arange(N)),
        TypeError,
        ["z_star", "int64", "floating"],
    ),
    "no solution": (lambda: attach(z=None), TypeError, ["z_star", "None"]),
    "f returns another shape": (
        lambda: attach(lambda params, z, x: z[:2]),
        ValueError,
        ["f must return", r"\(2,\)", r"\(4,\)"],
    ),
    "F returns another shape": (
        lambda: attach(lambda params, z, x: z[:2], form="root"),
        ValueError,
        ["F must return", r"\(2,\)", r"\(4,\)"],
    ),
    "a leaf of f has another dtype": (
        lambda: attach(
            lambda params, z, x: {"u": z["u"], "v": z["v"].astype(jnp.float32)},
            z={"u": np.zeros(2), "v": np.ones(2)},
        ),
        ValueError,
        [r"\['v'\]", "float32", "float64"],
    ),
    "unknown form": (lambda: attach(form="zero"), ValueError, ["form", "fixed_point", "zero"]),
    "f is no function": (lambda: attach(3), TypeError, ["f must be a function", "3"]),
    "negative tol": (lambda: attach(tol=-1.0), ValueError, ["tol", "-1.0"]),
    "batched is a number": (lambda: attach(batched=1), TypeError, ["batched"]),
    "unrolled": (
        lambda: attach(gradient=Unrolled()),
        TypeError,
        ["Unrolled", "z_star was found elsewhere", "Implicit"],
    ),
    "reuse": (
        lambda: attach(gradient=Implicit(Broyden(), reuse=True)),
        TypeError,
        ["reuse", "z_star was found elsewhere"],
    ),
    "no policy": (lambda: attach(gradient="implicit"), TypeError, ["gradient"]),
    "probe of a batch": (
        lambda: attach(backward_probe=BackwardProbe.zeros(4)),
        ValueError,
        ["backward_probe", r"zeros\(\)"],
    ),
    "implicit without the equation": (
        lambda: implicit(lambda params, x: x)(PARAMS, X),
        TypeError,
        ["write @implicit"],
    ),
    "equation is no function": (lambda: implicit(3), TypeError, ["equation", "3"]),
    "a taken name": (
        lambda: implicit(f)(lambda params, x, return_stats: x),
        TypeError,
        ["return_stats", "rename"],
    ),
    "no pair": (
        lambda: implicit(f, has_aux=True)(lambda params, x: x)(PARAMS, X),
        ValueError,
        ["has_aux", "pair"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, error, words = BAD[case]
    with pytest.raises(error) as raised:
        call()
    for word in words:
        assert re.search(word, str(raised.value)), (word, str(raised.value))


@pytest.mark.slow
def test_implicit_without_a_solver_takes_gmres():
    z = Host().solve(PARAMS, X)
    for gradient in (Implicit(tol=1e-12), Implicit()):
        loss = lambda p: loss_of(attach_gradient(f, p, X, z, gradient=gradient))  # noqa: E731
        error = np.abs(flatten(jax.grad(loss)(PARAMS)) - dense_gradient(PARAMS, X, z)).max()
        assert error < (1e-10 if gradient.tol else 1e-3)


GUIDE = (Path(__file__).parent.parent / "docs" / "any_solution.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_the_guide_runs():
    with jax.enable_x64(False):
        names = []
        for number, block in enumerate(BLOCKS):
            names.append({})
            exec(compile(block, f"docs/any_solution.md, block {number}", "exec"), names[-1])
    rod, kepler, ridge, probe, gas = names

    assert rod["stats"].converged
    wide = {name: np.float64(value) for name, value in rod["params"].items()}
    x = np.asarray(rod["x"], np.float64)

    def mean(params):
        residual = lambda z: rod["F"](params, z, x, np)  # noqa: E731
        return scipy.optimize.root(residual, np.ones(8), tol=1e-13).x.mean()

    got = jax.grad(rod["mean"])(rod["params"])
    for name in wide:
        direction = {other: float(other == name) for other in wide}
        np.testing.assert_allclose(got[name], difference(mean, wide, direction), rtol=1e-3)

    z = kepler["z"]
    assert kepler["stats"].converged
    np.testing.assert_allclose(kepler["derivative"], np.sin(z) / (1 - 0.3 * np.cos(z)), rtol=1e-4)

    penalty, (A, b) = ridge["theta"]
    inverse = np.linalg.inv(np.asarray(A.T @ A + penalty * np.eye(3)))
    loss = lambda penalty: ridge["solver"](  # noqa: E731
        (penalty, (A, b)), None, np.zeros(3, np.float32)
    ).sum()
    expected = -(inverse @ inverse @ np.asarray(A.T @ b)).sum()
    np.testing.assert_allclose(jax.jvp(loss, (0.5,), (1.0,))[1], expected, rtol=1e-3)

    assert probe["report"].status == Status.CONVERGED

    assert gas["stats"].converged.all()
    a, b, temperature = (np.float64(p) for p in gas["params"])
    for volume, pressure in zip(gas["volume"][:, 0], gas["pressure"][:, 0], strict=True):
        roots = np.roots([pressure, -(pressure * b + 8.314 * temperature), a, -a * b])
        np.testing.assert_allclose(volume, roots[np.isreal(roots)].real.max(), rtol=1e-4)
