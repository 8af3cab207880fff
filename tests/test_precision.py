"""`Execution(cell_dtype=..., state_dtype=...)`: against dense float64, and what is cast where."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.extend import core

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    Anderson,
    BackwardProbe,
    Execution,
    Picard,
    Status,
    deq_fixed_point,
    solve_fixed_point,
)
from deq_jax.cells import FeedForwardCell
from tests.reference import newton_equilibrium, relative_error
from tests.test_half_precision import (
    CASES,
    TOL,
    flat_cell,
    name,
    problem,
    pulled_back,
    solved,
    through_steps,
)
from tests.test_half_precision import cell as half_cell
from tests.test_half_precision import join as join_leaves
from tests.test_half_precision import split as split_leaves

pytestmark = pytest.mark.slow

HALF = jnp.dtype(jnp.bfloat16)
MIXED = Execution(cell_dtype=HALF)
NARROW = Execution(cell_dtype=HALF, state_dtype=HALF)
ROUNDING = float(jnp.finfo(HALF).eps)


def _name(value):
    if isinstance(value, Execution):
        return "mixed" if value == MIXED else "narrow"
    return name(value)


SOME = [CASES[1], CASES[2], CASES[6], CASES[9], CASES[10]]  # the others: test_half_precision


@pytest.mark.parametrize(
    ("solver", "policy", "u", "execution"),
    [(*case, MIXED) for case in CASES] + [(*case, NARROW) for case in SOME],
    ids=_name,
)
def test_forwards_and_backwards(solver, policy, u, execution):
    """Weights, inputs and cotangents in float32 throughout; z* and gradients against float64."""
    given = problem(jnp.float32)
    w, x, y = given["w"], given["x"], given["y"]
    with jax.enable_x64(True):
        exact = np.asarray(newton_equilibrium(lambda z: flat_cell(given, z, x), 0 * x))
    arrays = {key: jnp.asarray(a, jnp.float32) for key, a in given.items()}
    params, cotangent = {"w": arrays["w"], "b": arrays["b"]}, split_leaves(arrays["y"])

    def f(params, z, x):
        for leaf in jax.tree.leaves((params, z, x)):
            assert leaf.dtype == HALF
        return half_cell(params, z, x)

    def loss(params, x):
        z, stats = deq_fixed_point(
            f, params, x, solver=solver, gradient=policy, return_stats=True, execution=execution
        )
        products = jax.tree.map(lambda z, y: (z.astype(jnp.float32) * y).sum(), z, cotangent)
        return products["a"] + products["b"], (z, stats)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (by_params, by_x), (z, stats) = gradient(params, split_leaves(arrays["x"]))

    for leaf in jax.tree.leaves(z):
        assert leaf.dtype == (execution.state_dtype or jnp.float32)
    for leaf in jax.tree.leaves((by_params, by_x, stats.residual)):
        assert leaf.dtype == jnp.float32
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    reached = join_leaves(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), z))
    # ‖(I - J)⁻¹‖ <= 1 / (1 - 0.7); f is off by roundings of the weights, of tanh and of sums.
    assert relative_error(reached, exact) <= (TOL + 4 * ROUNDING) / 0.3

    got = {"w": by_params["w"], "b": by_params["b"], "x": join_leaves(by_x)}
    if u is not None:
        z = exact if u is solved else reached
        expected = pulled_back(w, z, u(w, z, y))
    elif hasattr(policy, "damping"):
        steps = np.full(len(x), policy.steps)
        expected = through_steps(given, reached, steps, policy.damping)
    else:
        expected = through_steps(given, 0 * x, np.asarray(stats.iterations) - 1, 1.0)
    bound = 3 * TOL if u is solved else 4 * ROUNDING
    for key in expected:
        assert relative_error(np.asarray(got[key], np.float64), expected[key]) <= bound, key


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def tanh_cell(params, z, x):
    return jnp.tanh(z @ params + x)


def test_only_floating_leaves_are_cast():
    seen = {}

    def f(params, z, x):
        seen.update(params | {"x": x, "z": z})
        noise = jax.random.normal(params["key"], z.shape, z.dtype)
        return z / 2 + x + 0 * noise

    params = {
        "w": normal(2),
        "narrower": jnp.ones(2, jnp.float16),
        "complex": jnp.ones(2, jnp.complex64),
        "count": jnp.int32(3),
        "flag": jnp.bool_(True),
        "key": jax.random.key(0),
    }
    z = deq_fixed_point(f, params, normal(3, 2), execution=MIXED)
    dtypes = {key: value.dtype for key, value in seen.items()}
    assert dtypes.pop("key") == params["key"].dtype
    assert dtypes == {
        "w": HALF,
        "narrower": HALF,
        "complex": np.complex64,
        "count": np.int32,
        "flag": np.bool_,
        "x": HALF,
        "z": HALF,
    }
    assert z.dtype == jnp.float32


@pytest.mark.usefixtures("x64")
def test_complex_states_take_the_complex_dtype_of_that_precision():
    z0 = jnp.zeros((2, 3), jnp.complex128)
    execution = Execution(cell_dtype=jnp.float32)
    dtypes = []

    def f(params, z, x):
        dtypes.append((params.dtype, z.dtype, x.dtype))
        return params * z + x

    params, x = jnp.complex128(0.3 + 0.4j), jnp.asarray(normal(2, 3), jnp.complex128)
    solver = Picard(tol=1e-6)
    z, by_x = jax.value_and_grad(
        lambda x: deq_fixed_point(f, params, x, z0, solver=solver, execution=execution).real.sum()
    )(x)
    assert set(dtypes) == {(np.dtype(np.complex64),) * 3}
    assert by_x.dtype == np.complex128
    np.testing.assert_allclose(z, (x / (0.7 - 0.4j)).real.sum(), rtol=1e-4)
    np.testing.assert_allclose(by_x, np.full((2, 3), 1 / (0.7 - 0.4j)), rtol=1e-4)


def test_state_dtype_alone():
    params, x = 0.1 * normal(4, 4).astype(jnp.bfloat16), normal(2, 4).astype(jnp.bfloat16)

    def f(params, z, x):
        assert z.dtype == jnp.float32
        return tanh_cell(params.astype(z.dtype), z, x.astype(z.dtype))

    solution = solve_fixed_point(f, params, x, execution=Execution(state_dtype=jnp.float32))
    assert solution.value.dtype == jnp.float32
    params, x = (jnp.asarray(a, jnp.float32) for a in (params, x))
    assert relative_error(tanh_cell(params, solution.value, x), solution.value) < 1e-4


def loops(jaxpr, inside=False):
    """The equations in bodies of loops."""
    for equation in jaxpr.eqns:
        if inside:
            yield equation
        looping = inside or equation.primitive.name in ("while", "scan")
        for inner in core.jaxprs_in_params(equation.params):
            yield from loops(getattr(inner, "jaxpr", inner), looping)


def test_weights_are_cast_before_the_loops():
    params, x = 0.1 * normal(24, 24), normal(3, 24)

    def loss(params, x):
        return deq_fixed_point(tanh_cell, params, x, execution=MIXED).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, x)
    equations = list(loops(jaxpr.jaxpr))
    products = [e for e in equations if e.primitive.name == "dot_general"]
    weights = [atom.aval for e in products for atom in e.invars if atom.aval.shape == params.shape]
    assert len(weights) >= 2  # forwards and backwards
    assert {aval.dtype for aval in weights} == {HALF}
    casts = [e for e in equations if e.primitive.name == "convert_element_type"]
    assert x.shape in [e.invars[0].aval.shape for e in casts]  # z, forth and back
    assert params.shape not in [e.invars[0].aval.shape for e in casts]


def test_probe_and_derivatives_of_any_mode():
    params, x, y = 0.1 * normal(4, 4), normal(3, 4, seed=1), normal(3, 4, seed=2)

    def loss(x, probe, execution, tol):
        options = {"solver": Picard(tol=tol), "execution": execution}
        return jnp.vdot(y, deq_fixed_point(tanh_cell, params, x, backward_probe=probe, **options))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def derivatives(x, execution, tol):
        gradient = jax.grad(lambda x: loss(x, None, execution, tol))
        _, tangent = jax.jvp(lambda x: loss(x, None, execution, tol), (x,), (y,))
        curvature = jax.grad(lambda x: jnp.sin(gradient(x)).sum())(x)
        _, report = jax.grad(loss, (0, 1))(x, BackwardProbe.zeros(3), execution, tol)
        return gradient(x), tangent, curvature, report

    by_x, tangent, curvature, report = derivatives(x, MIXED, 1e-2)
    assert (report.status == Status.CONVERGED).all()
    assert (report.residual <= 1e-2).all()
    exact, exact_tangent, exact_curvature, _ = derivatives(x, Execution(), 1e-6)
    assert relative_error(by_x, exact) < 0.05
    assert abs(tangent - exact_tangent) < 0.05 * jnp.linalg.norm(exact) * jnp.linalg.norm(y)
    assert relative_error(curvature, exact_curvature) < 0.05


def test_unbatched():
    params, x = 0.1 * normal(4, 4), normal(3, 4)
    solver = Picard(tol=1e-2)
    z, stats = deq_fixed_point(
        tanh_cell, params, x, solver=solver, batched=False, return_stats=True, execution=NARROW
    )
    assert (z.dtype, z.shape, stats.status) == (HALF, (3, 4), Status.CONVERGED)


def test_closed_over_tracers_and_no_second_trace():
    params, x = 0.1 * normal(4, 4), normal(3, 4)

    @jax.jit
    def by_closure(params):
        def f(_, z, x):
            return tanh_cell(params.astype(z.dtype), z, x)

        return deq_fixed_point(f, (), x, execution=MIXED).sum()

    def by_argument(params):
        return deq_fixed_point(tanh_cell, params, x, execution=MIXED).sum()

    got, expected = jax.grad(by_closure)(params), jax.grad(by_argument)(params)
    assert got.dtype == jnp.float32
    assert relative_error(got, expected) < 1e-2

    traces = []

    def counted(params, z, x):
        traces.append(z.dtype)
        return tanh_cell(params, z, x)

    for _ in range(2):
        deq_fixed_point(counted, params, x, execution=Execution(cell_dtype="bfloat16"))
    count = len(traces)
    deq_fixed_point(counted, params, x, execution=MIXED)
    assert len(traces) == count


def test_fields_are_normalised():
    spellings = [Execution(cell_dtype=dtype) for dtype in ("bfloat16", jnp.bfloat16, HALF)]
    assert len({*spellings}) == 1
    assert spellings[0].cell_dtype == HALF
    assert isinstance(spellings[0].cell_dtype, np.dtype)


@pytest.mark.parametrize("field", ["cell_dtype", "state_dtype"])
@pytest.mark.parametrize("value", [jnp.int32, "nothing", jnp.complex64, 3])
def test_dtypes_that_are_none(field, value):
    with pytest.raises(TypeError, match=f"Execution.{field} must be a real floating dtype.*, got "):
        Execution(**{field: value})


def test_errors():
    x = normal(2, 4)
    for field in ("cell_dtype", "state_dtype"):
        with pytest.raises(ValueError, match="float64, which needs jax_enable_x64"):
            deq_fixed_point(tanh_cell, x, x, execution=Execution(**{field: "float64"}))

    def wide(params, z, x):
        return tanh_cell(params, z, x).astype(jnp.float32)

    with pytest.raises(
        ValueError, match=r"got float32, expected bfloat16; .*Execution\.cell_dtype"
    ):
        deq_fixed_point(wide, 0.1 * normal(4, 4), x, execution=MIXED)


def test_nnx_layer():
    execution = NARROW
    cell = FeedForwardCell(5, 4, rngs=nnx.Rngs(0))
    x = normal(3, 5)

    def loss(cell, x, execution, tol):
        z = deq_jax.nnx.DEQ(cell, solver=Anderson(tol=tol), execution=execution)(x)
        return (z.astype(jnp.float32) ** 2).sum(), z

    gradient = nnx.grad(loss, has_aux=True)
    got, z = gradient(cell, x, execution, 1e-2)
    expected, exact = gradient(cell, x, Execution(), 1e-6)
    assert z.dtype == (execution.state_dtype or jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {np.dtype(np.float32)}
    assert relative_error(z.astype(jnp.float32), exact) < 0.02
    assert relative_error(nnx.as_pure(got), nnx.as_pure(expected)) < 0.05


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        hidden = nn.Dense(4, kernel_init=nn.initializers.normal(0.1))(z)
        return nn.tanh(nn.BatchNorm(use_running_average=False, axis=(0, -1))(hidden) + x)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("execution", [MIXED, NARROW], ids=["mixed", "narrow"])
def test_linen_layer_with_statistics(execution):
    x = normal(3, 4)
    layer = deq_jax.linen.DEQ(LinenCell(), solver=Anderson(tol=1e-2), execution=execution)
    variables = layer.init(jax.random.key(0), x)
    exact_layer = deq_jax.linen.DEQ(LinenCell(), solver=Anderson(tol=1e-6))

    def loss(params, layer):
        given = variables | {"params": params}
        z, changed = layer.apply(given, x, mutable=["batch_stats"])
        return (z.astype(jnp.float32) ** 2).sum(), changed

    gradient = jax.grad(loss, has_aux=True)
    got, changed = gradient(variables["params"], layer)
    expected, expected_changed = gradient(variables["params"], exact_layer)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((got, changed))}
    assert dtypes == {np.dtype(np.float32)}
    assert relative_error(got, expected) < 0.05
    assert relative_error(changed, expected_changed) < 0.02
