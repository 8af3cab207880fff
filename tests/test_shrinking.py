"""`Execution(shrink_to=...)`: finished samples leave, and nothing but the cost changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import deq_jax.linen
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
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
    solve_fixed_point,
)
from deq_jax.shrinking import batch_axes, sizes
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

BATCH, WIDTH = 7, 4
SOLVERS = {
    "picard": Picard(tol=1e-11, max_iter=300, trace=True),
    "anderson": Anderson(tol=1e-11, max_iter=100),
    "broyden": Broyden(tol=1e-11, max_iter=60, memory=5),
    "newton": NewtonKrylov(tol=1e-11),
}
PICARD = SOLVERS["picard"]

each_solver = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
pytestmark = pytest.mark.usefixtures("x64")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def problem():
    """Params, x and cotangent; samples 2 and 5 need several times the iterations of the others."""
    w = normal(WIDTH, WIDTH)
    gains = np.full(BATCH, 0.2)
    gains[[2, 5]] = [0.93, 0.85]
    params = {"w": jnp.asarray(w / np.linalg.norm(w, 2)), "which": jnp.arange(3)}
    x = {
        "input": jnp.asarray(0.3 * normal(BATCH, WIDTH, seed=1)),
        "gain": jnp.asarray(gains),
        "row": jnp.arange(BATCH),
    }
    return params, x, jnp.asarray(normal(BATCH, WIDTH, seed=2))


def cell(params, z, x):
    return jnp.tanh(x["gain"][:, None] * (z @ params["w"])) + x["input"]


def start():
    return jnp.zeros((BATCH, WIDTH))


def compiled(function, *arguments):
    return jax.jit(function)(*arguments)


def same(a, b, tolerance=1e-11):
    """Equal trees up to rounding; NaNs and leaves without a gradient in the same places."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for got, expected in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert got.dtype == expected.dtype
        if got.dtype != jax.dtypes.float0:
            wide = np.complex128 if jnp.iscomplexobj(got) else np.float64
            got, expected = np.asarray(got, wide), np.asarray(expected, wide)
            np.testing.assert_allclose(got, expected, tolerance, tolerance)


def same_report(a, b):
    for name in ("iterations", "status", "evaluations", "products"):
        np.testing.assert_array_equal(getattr(a, name, None), getattr(b, name, None), name)
    for name in ("residual", "trace"):
        if getattr(b, name, None) is not None:  # of the order of the tolerance, far above rounding
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), 1e-2, 1e-14)


class Counter:
    """`cell`, counting the samples on which it really runs."""

    def __init__(self):
        self.samples = []

    def __call__(self, params, z, x):
        size = z.shape[0]
        jax.debug.callback(lambda: self.samples.append(size))
        return cell(params, z, x)

    def total(self):
        jax.effects_barrier()
        total, self.samples = sum(self.samples), []
        return total


def left_by_phases(iterations, smallest):
    """How many samples a loop evaluates in all, by the definition of its phases."""
    iterations, total, trip, size = np.asarray(iterations), 0, 0, iterations.size
    lower = iter([*sizes(size, smallest), 0])
    following = next(lower)
    while (iterations > trip).any():
        while following and (iterations > trip).sum() <= following:
            size, following = following, next(lower)
        total, trip = total + size, trip + 1
    return total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shrink_to"), [("picard", 1), ("anderson", 3), ("broyden", 2), ("newton", 3)]
)
def test_only_the_cost_changes(name, shrink_to):
    solver = SOLVERS[name]
    params, x, cotangent = problem()
    counter = Counter()
    counted = counter if name == "picard" else cell  # what counts is not found in the test cache

    def run(execution):
        def loss(params, x, closure, probe):
            def closed(params, z, x):
                return counted(params, z, x) + closure

            z, stats = deq_fixed_point(
                closed,
                params,
                x,
                start(),
                solver=solver,
                return_stats=True,
                backward_probe=probe,
                execution=execution,
            )
            return jnp.vdot(cotangent, z), (z, stats)

        gradient = jax.grad(loss, (0, 1, 2, 3), has_aux=True, allow_int=True)
        closure = 0.1 * jnp.asarray(normal(WIDTH, seed=3))
        return compiled(gradient, params, x, closure, BackwardProbe.zeros(BATCH))

    gradients, (z, stats) = run(Execution(shrink_to=shrink_to))
    samples = counter.total()
    *expected_gradients, expected_probe = (expected := run(Execution()))[0]
    full = counter.total()
    expected_z, expected_stats = expected[1]

    same(z, expected_z)
    same_report(stats, expected_stats)
    same_report(gradients[3], expected_probe)
    same(list(gradients[:3]), expected_gradients, 1e-9)

    floats = {name: x[name] for name in ("input", "gain")}
    closure = 0.1 * jnp.asarray(normal(WIDTH, seed=3))

    def f(inputs, z):
        w, x, closure = inputs
        return cell({"w": w}, z, x) + closure

    inputs = (params["w"], floats, closure)
    dense_z = newton_equilibrium(lambda z: f(inputs, z), start())
    dense = implicit_gradient(f, inputs, dense_z, cotangent)
    got = (gradients[0]["w"], {name: gradients[1][name] for name in floats}, gradients[2])
    assert relative_error(z, dense_z) < 1e-9
    assert relative_error(got, dense) < 1e-8

    if counted is counter:
        # Forwards by the phases of the loop. Backwards f runs for its linearisations: at the whole
        # batch, and once more at each smaller size.
        backward = full - BATCH * int(stats.evaluations)
        again = sum(sizes(BATCH, shrink_to))
        assert samples == left_by_phases(stats.iterations, shrink_to) + backward + again


@pytest.mark.slow
def test_the_cost_follows_the_mean_number_of_evaluations():
    params, x, _ = problem()
    counter = Counter()
    shrinking = {"solver": PICARD, "execution": Execution(shrink_to=1)}
    one = solve_fixed_point(counter, params, x, start(), **shrinking)
    assert counter.total() == left_by_phases(one.stats.iterations, 1)
    whole = {"solver": PICARD, "execution": Execution(shrink_to=BATCH)}
    solve_fixed_point(counter, params, x, start(), **whole)
    full = counter.total()
    assert full == BATCH * one.stats.evaluations
    assert left_by_phases(one.stats.iterations, 1) < 0.55 * full
    assert one.stats.evaluations == one.stats.iterations.max()
    at_once = x | {"gain": 0 * x["gain"]}
    two = solve_fixed_point(counter, params, at_once, start(), **shrinking)
    assert counter.total() == BATCH * 2
    np.testing.assert_array_equal(two.stats.iterations, 2)

    def gradient(execution):
        def loss(inputs):
            x = at_once | {"input": inputs}
            options = {"solver": PICARD, "execution": execution}
            return deq_fixed_point(counter, params, x, start(), **options).sum()

        compiled(jax.grad(loss), x["input"])
        return counter.total()

    # Where nobody is left, f is not linearised again for a part of the batch.
    assert gradient(Execution(shrink_to=4)) == gradient(Execution())


@pytest.mark.slow
def test_transposed_products_shrink_too():
    """The backward product is counted inside f's own reverse rule."""
    params, x, cotangent = problem()
    seen = []

    @jax.custom_vjp
    def watched(z):
        return z

    def backward(_, cotangent):
        size = cotangent.shape[0]
        jax.debug.callback(lambda: seen.append(size))
        return (cotangent,)

    watched.defvjp(lambda z: (z, None), backward)

    def f(params, z, x):
        return cell(params, watched(z), x)

    def report(execution):
        def loss(probe):
            options = {"solver": PICARD, "execution": execution, "backward_probe": probe}
            return jnp.vdot(cotangent, deq_fixed_point(f, params, x, start(), **options))

        seen.clear()
        found = compiled(jax.grad(loss), BackwardProbe.zeros(BATCH))
        jax.effects_barrier()
        return found, sum(seen)

    shrunk, products = report(Execution(shrink_to=1))
    assert products == left_by_phases(shrunk.iterations, 1)
    full, full_products = report(Execution())
    same_report(shrunk, full)
    assert full_products == BATCH * full.evaluations > products


@each_solver
@pytest.mark.slow
def test_samples_that_diverge_or_do_not_converge(solver):
    params, x, cotangent = problem()
    x["input"] = x["input"].at[3].set(jnp.nan)
    x["gain"] = x["gain"].at[6].set(-40.0)

    def solve(execution):
        def loss(x):
            z, stats = deq_fixed_point(
                cell, params, x, start(), solver=solver, return_stats=True, execution=execution
            )
            return jnp.vdot(cotangent, z), (z, stats)

        return compiled(jax.grad(loss, has_aux=True, allow_int=True), x)

    gradient, (z, stats) = solve(Execution(shrink_to=2))
    expected_gradient, (expected_z, expected) = solve(Execution())
    same_report(stats, expected)
    assert stats.status[3] == Status.DIVERGED
    if solver in (PICARD, SOLVERS["anderson"]):
        assert stats.status[6] == Status.MAX_ITER
    well = np.arange(BATCH - 1)  # the last one is chaotic: rounding grows there
    same(z[well], expected_z[well])
    well = well[well != 3]
    same(gradient["input"][well], expected_gradient["input"][well], 1e-9)


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("shrink_to", [1, 2, 3, 100])
def test_sizes(batch, shrink_to):
    got = sizes(batch, shrink_to)
    assert all(later < earlier for earlier, later in zip([batch, *got], got, strict=False))
    assert all(2 * n >= before for before, n in zip([batch, *got], got, strict=False))
    assert min([batch, *got]) == min(batch, shrink_to)


def mixes(params, z, x):
    return 0.5 * jnp.tanh(z - z.mean(0)) + x


def attends(params, z, x):
    return 0.5 * jax.nn.softmax(z @ z.T) @ z + x


def drops(params, z, x):
    return 0.5 * z * jax.random.bernoulli(jax.random.key(0), 0.5, z.shape) + x


def masks(params, z, x):
    return 0.5 * z * jnp.linspace(0, 1, 4)[:, None] + x


def batch_norm(params, z, x):
    return nn.BatchNorm(use_running_average=False).apply(params, z, mutable=["batch_stats"])[0] + x


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize(
    ("f", "x", "options", "message"),
    [
        (cell, "good", {"batched": False}, r"shrink_to=2\).*batched=False"),
        (cell, "good", {"gradient": Unrolled()}, r"shrink_to=2\).*Unrolled"),
        (mixes, "array", {}, r"shrink_to=2\).*sums over the batch.*\(4, 3\)"),
        (attends, "array", {}, r"shrink_to=2\).*multiplies samples with each other"),
        (batch_norm, "array", {}, r"shrink_to=2\).*sums over the batch"),
        (drops, "array", {}, r"shrink_to=2\).*draws random numbers.*\(4, 3\)"),
        (masks, "array", {}, r"shrink_to=2\).*2 of the 4 samples fails.*in z or x.*The error"),
        (lambda p, z, x: z + x[1], "shared", {}, r"leaf \[0\]: got shape \(3,\), expected \(4, "),
        (lambda p, z, x: z + x[1], "scalar", {}, r"leaf \[0\]: got shape \(\), expected \(4, "),
    ],
)
def test_errors(f, x, options, message):
    array = jnp.ones((4, 3))
    x = {
        "good": {"gain": jnp.ones(4), "input": array},
        "array": array,
        "shared": (jnp.ones(3), array),
        "scalar": (2.0, array),
    }[x]
    params = {"w": jnp.eye(3)}
    if f is batch_norm:
        params = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), array)
    z0 = jnp.zeros((4, 3))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        deq_fixed_point(f, params, x, z0, execution=Execution(shrink_to=2), **options)


def test_an_f_that_uses_other_arrays_at_other_sizes():
    def f(params, z, x):
        return 0.5 * z + x[0] + (x[1] if z.shape[0] < 4 else 0)

    array = jnp.ones((4, 3))
    with pytest.raises(ValueError, match="2 of the 4 samples uses an array"):
        solve_fixed_point(f, (), (array, 2 * array), array, execution=Execution(shrink_to=2))

    def closure(other):
        def f(params, z, x):
            return 0.5 * z + x + (other if z.shape[0] < 4 else 0)

        return solve_fixed_point(f, (), array, execution=Execution(shrink_to=2)).value

    with pytest.raises(ValueError, match=r"2 of the 4 samples uses an array.*\[3\]"):
        jax.jit(closure)(jnp.ones(3))


@pytest.mark.slow
def test_what_looks_like_mixing_and_is_not():
    """Sums of what is no sample's, sums nobody reads, and keys of each sample's own."""
    params, x, _ = problem()

    def f(params, z, x):
        unused, empty = z.mean(0), z.sum(0)[:0].sum()
        normalised = z - z.mean(1, keepdims=True) + params["w"].sum(0)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(params["key"], x["row"])
        mask = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (WIDTH,)))(keys)
        inner = deq_fixed_point(
            lambda p, u, v: 0.1 * jnp.tanh(u) + v, (), z, solver=Anderson(max_iter=5)
        )
        pairs = jnp.einsum("bi,bi->b", z, z)[:, None]
        del unused
        return 0.1 * jnp.where(mask, normalised + inner + pairs, x["input"]) + empty

    params["key"] = jax.random.key(7)
    options = {"solver": Picard(tol=1e-10)}
    got = solve_fixed_point(f, params, x, start(), **options, execution=Execution(shrink_to=4))
    expected = solve_fixed_point(f, params, x, start(), **options)
    same(got.value, expected.value)
    same_report(got.stats, expected.stats)


def layer(shrink_to, solver=PICARD, **options):
    def apply(w, x, z0=None):
        params, _, _ = problem()
        return deq_fixed_point(
            cell,
            params | {"w": w},
            x,
            start() if z0 is None else z0,
            solver=solver,
            execution=Execution(shrink_to=shrink_to),
            **options,
        )

    return apply


def both(function, *arguments, tolerance=1e-9, shrink_to=4):
    """`function(shrink_to, *arguments)` with and without shrinking."""
    got, expected = (
        compiled(lambda *arguments, n=n: function(n, *arguments), *arguments)
        for n in (shrink_to, None)
    )
    same(got, expected, tolerance)
    return got


def floats():
    params, x, cotangent = problem()
    return params["w"], x, cotangent


@pytest.mark.parametrize("mode", ["jvp", "hvp", "reverse_twice", "vmap", "scan", "checkpoint"])
@pytest.mark.slow
def test_modes(mode):
    w, x, cotangent = floats()
    direction = jnp.asarray(normal(WIDTH, WIDTH, seed=5))

    def loss(shrink_to, w, x):
        return jnp.sin(cotangent * layer(shrink_to)(w, x)).sum()

    def jvp(shrink_to, w, x):
        return jax.jvp(lambda w: layer(shrink_to)(w, x), (w,), (direction,))

    def hvp(shrink_to, w, x):
        return jax.jvp(jax.grad(lambda w: loss(shrink_to, w, x)), (w,), (direction,))

    def reverse_twice(shrink_to, w, x):
        gradient = jax.grad(lambda w: loss(shrink_to, w, x))
        return jax.grad(lambda w: jnp.vdot(direction, gradient(w)))(w)

    def vmap(shrink_to, w, x):
        inputs = jnp.stack([x["input"], 2 * x["input"]])
        rates = jnp.stack([x["gain"], x["gain"][::-1]])
        gradient = jax.grad(lambda w, i, g: loss(shrink_to, w, x | {"input": i, "gain": g}), (0, 1))
        return jax.vmap(gradient, (None, 0, 0))(w, inputs, rates)

    def scan(shrink_to, w, x):
        def step(z, _):
            return layer(shrink_to)(w, x | {"input": 0.5 * z + x["input"]}), None

        return jax.grad(lambda w: jax.lax.scan(step, start(), length=2)[0].sum())(w)

    def checkpoint(shrink_to, w, x):
        return jax.grad(jax.checkpoint(lambda w: loss(shrink_to, w, x)))(w)

    both(locals()[mode], w, x, tolerance=1e-8)


@pytest.mark.slow
def test_hessian():
    w, x, cotangent = floats()

    def hessian(shrink_to, input):
        def loss(scale):
            z = layer(shrink_to)(w, x | {"input": scale * input})
            return jnp.sin(cotangent * z).sum()

        return jax.hessian(loss)(jnp.linspace(0.5, 1, WIDTH))

    both(hessian, x["input"], tolerance=1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"solver": Broyden(tol=1e-6, max_iter=60), "gradient": Implicit(reuse=True, tol=1e-11)},
        {
            "solver": Broyden(tol=1e-6, max_iter=60),
            "gradient": Implicit(PICARD, reuse=True),
        },
        {"gradient": Implicit(GMRES(tol=1e-11))},
        {"gradient": OneStep()},
        {"gradient": Neumann(4)},
        {"gradient": Phantom(3)},
        {"sample_at": (2, 20, 40), "sample_gradient": (OneStep(), Implicit(), Implicit())},
    ],
    ids=["SHINE", "SHINE by Picard", "GMRES", "OneStep", "Neumann", "Phantom", "samples"],
)
@pytest.mark.slow
def test_policies_and_samples(options):
    w, x, cotangent = floats()
    with_probe = not isinstance(options.get("gradient"), Phantom)

    def gradient(shrink_to, w, x):
        def loss(w, x, probe):
            probe = probe if with_probe else None
            apply = layer(shrink_to, backward_probe=probe, return_stats=True, **options)
            z, stats, *samples = apply(w, x)
            states = jax.tree.leaves((z, samples))
            return sum(jnp.vdot(cotangent, state) for state in states), (states, stats)

        arguments = (w, x, BackwardProbe.zeros(BATCH))
        return jax.grad(loss, (0, 1, 2), has_aux=True, allow_int=True)(*arguments)

    both(gradient, w, x, tolerance=1e-8, shrink_to=2)


@pytest.mark.parametrize("dtype", ["bfloat16", "complex128", "mixed"])
@pytest.mark.slow
def test_dtypes_and_trees(dtype):
    """States of several leaves, of half precision, and complex; options of `Execution` together."""
    w, x, _ = floats()
    execution = {"state_dtype": "float32", "cell_dtype": "bfloat16"} if dtype == "mixed" else {}
    leaf = jnp.dtype("float32" if dtype == "mixed" else dtype)
    x = {"input": x["input"].astype(leaf), "gain": x["gain"].astype(leaf), "row": x["row"]}
    z0 = {"a": start()[:, :1].astype(leaf), "b": (start()[:, 1:].astype(leaf),)}

    def f(params, z, x):
        joined = cell(params, jnp.concatenate([z["a"], *z["b"]], 1), x)
        return {"a": joined[:, :1], "b": (joined[:, 1:],)}

    def gradient(shrink_to, w, x):
        def loss(w, x):
            z, stats = deq_fixed_point(
                f,
                {"w": w},
                x,
                z0,
                solver=Anderson(tol=1e-2 if leaf == jnp.bfloat16 or execution else 1e-10),
                execution=Execution(shrink_to=shrink_to, **execution),
                return_stats=True,
            )
            return jnp.real(z["a"].sum() + (z["b"][0] ** 2).sum()).astype(jnp.float32), (z, stats)

        return jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(w, x)

    run = both if leaf == jnp.complex128 else lambda *args: both(*args, tolerance=2e-2)
    (by_w, _), _ = run(gradient, w.astype(leaf), x)
    assert by_w.dtype == leaf


@pytest.mark.slow
def test_one_array_as_params_and_as_x():
    """The same tracer in both places: once it is shared, once it is gathered."""

    def loss(shrink_to, a):
        def f(params, z, x):
            return 0.4 * jnp.tanh(params @ z[:, :, None])[..., 0] + x[:, 0] * x[:, 1:2, 0]

        return deq_fixed_point(
            lambda params, z, x: f(params[3], z, x),
            a,
            a,
            jnp.zeros((BATCH, WIDTH)),
            solver=PICARD,
            execution=Execution(shrink_to=shrink_to),
        )

    a = jnp.asarray(normal(BATCH, WIDTH, WIDTH)) * jnp.linspace(0.01, 1, BATCH)[:, None, None]
    both(lambda n, a: jax.grad(lambda a: (loss(n, a) ** 2).sum())(a), a)


@pytest.mark.slow
def test_on_the_spot():
    """f closes over arrays of a transformation, so that nothing can be kept for it."""
    w, x, _ = floats()

    def closing(shrink_to, w):
        options = {"solver": PICARD, "execution": Execution(shrink_to=shrink_to)}
        z = deq_fixed_point(lambda _, z, x: cell({"w": w}, z, x), (), x, start(), **options)
        return (z**2).sum()

    same(jax.grad(closing, 1)(4, w), jax.grad(closing, 1)(None, w), 1e-9)


@pytest.mark.slow
def test_keys_of_samples_and_of_all():
    def solve(shrink_to, key, x):
        def f(params, z, x):
            data, keys = x
            noise = jax.vmap(lambda key: jax.random.uniform(key, (WIDTH,)))(keys)
            shared = jax.random.uniform(params, (WIDTH,))
            return data["gain"][:, None] * jnp.tanh(z * noise) + shared * data["input"]

        keys = jax.random.split(key, BATCH)
        options = {"solver": PICARD, "execution": Execution(shrink_to=shrink_to)}
        z = deq_fixed_point(f, key, (x, keys), start(), return_stats=True, **options)
        return z

    both(solve, jax.random.key(3), problem()[1])


def over_devices(function, in_specs, out_specs):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


@pytest.mark.parametrize(
    ("solver", "second"), [(PICARD, False), (PICARD, True), (SOLVERS["broyden"], False)]
)
@pytest.mark.slow
def test_shard_map(solver, second):
    """Every device lets its own samples leave."""
    batch = 12
    x = {
        "input": jnp.asarray(normal(batch, WIDTH)),
        "gain": jnp.linspace(0, 0.9, batch)[np.random.default_rng(0).permutation(batch)],
        "row": jnp.arange(batch),
    }
    w, _, _ = floats()

    def gradient(shrink_to, w, x):
        def total(w, x):
            def loss(w, x):
                apply = layer(shrink_to, solver, return_stats=True)
                z, stats = apply(w, x, jnp.zeros(x["input"].shape))
                return jnp.sin(z).sum(), stats.iterations

            (by_w, by_x), stops = jax.grad(loss, (0, 1), has_aux=True, allow_int=True)(w, x)
            return (by_w**2).sum() if second else (by_w, by_x["input"], stops)

        return jax.grad(total)(w, x) if second else total(w, x)

    specs = (P(), P("data")), P() if second else (P(), P("data"), P("data"))
    got, expected = (
        jax.jit(over_devices(lambda w, x, n=n: gradient(n, w, x), *specs))(w, x) for n in (1, None)
    )
    same(got, expected, 1e-8)


@pytest.mark.slow
def test_shard_map_of_arrays_that_vary_less_than_the_state():
    """x is the same on all devices, and so is the start; what f closes over is not."""
    w, x, _ = floats()

    def gradient(shrink_to, w, gain, shift):
        def loss(w):
            def f(w, z, gain):
                return jnp.tanh(gain[:, None] * (z @ w)) + shift[0]

            options = {"solver": PICARD, "execution": Execution(shrink_to=shrink_to)}
            z, stats = deq_fixed_point(f, w, gain, start(), return_stats=True, **options)
            return (z**2).sum(), (z, stats.iterations)

        return jax.grad(loss, has_aux=True)(w)

    shifts = jnp.asarray(0.3 * normal(4, WIDTH))
    specs = (P(), P(), P("data")), (P(), (P("data"), P("data")))
    got, expected = (
        jax.jit(over_devices(lambda *args, n=n: gradient(n, *args), *specs))(w, x["gain"], shifts)
        for n in (2, None)
    )
    same(got, expected, 1e-9)


@pytest.mark.slow
def test_an_f_that_communicates():
    def f(params, z, x):
        return 0.5 * jnp.tanh(z - jax.lax.pmean(z[:1], "data")) + x

    def solve(x):
        return deq_fixed_point(f, (), x, execution=Execution(shrink_to=1))

    message = r"shrink_to=.*communicates over the mesh axes \('data',\)"
    with pytest.raises(ValueError, match=message):
        over_devices(solve, P("data"), P("data"))(jnp.ones((8, 2)))


@pytest.mark.slow
def test_shard_axis():
    batch = 12
    _, x, _ = problem()
    x = {name: jnp.concatenate([leaf, leaf[:5]]) for name, leaf in x.items()}
    w, _, _ = floats()
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.device_put(x, jax.NamedSharding(mesh, P("data")))

    def gradient(execution):
        def loss(w):
            options = {"solver": PICARD, "execution": execution, "return_stats": True}
            z, stats = deq_fixed_point(cell, {"w": w}, x, jnp.zeros((batch, WIDTH)), **options)
            return jnp.sin(z).sum(), (z, stats.iterations)

        return jax.grad(loss, has_aux=True)(w)

    shrunk = gradient(Execution(shrink_to=1, shard_axis="data"))
    same(shrunk, gradient(Execution()), 1e-9)


class Cell(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, z, x):
        return x["gain"][:, None] * self.dropout(jnp.tanh(self.linear(z))) + x["input"]


class LinenCell(nn.Module):
    @nn.compact
    def __call__(self, z, x):
        return x["gain"][:, None] * jnp.tanh(nn.Dense(WIDTH)(z)) + x["input"]


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_layers():
    _, x, _ = problem()
    x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), x)
    z0 = jnp.zeros((BATCH, WIDTH), jnp.float32)
    got, linen = [], []
    for shrink_to in (4, None):
        execution = Execution(shrink_to=shrink_to)
        model = deq_jax.nnx.DEQ(Cell(nnx.Rngs(0)), execution=execution)

        def loss(model):
            z, stats = model(x, z0, return_stats=True)
            return (z**2).sum(), (z, stats)

        gradient, (z, stats) = nnx.jit(nnx.grad(loss, has_aux=True))(model)
        got.append((jax.tree.leaves(nnx.state(gradient, nnx.Param)), z, stats))
        model = deq_jax.linen.DEQ(LinenCell(), execution=execution)
        variables = model.init(jax.random.key(0), x, z0)
        linen.append(jax.grad(lambda v: (model.apply(v, x, z0) ** 2).sum())(variables))
    same(*got, tolerance=1e-3)
    same(*linen, tolerance=1e-3)
    # One mask for the batch cannot be had for a part of it.
    noisy = deq_jax.nnx.DEQ(Cell(nnx.Rngs(0), 0.5), execution=Execution(shrink_to=2))
    with pytest.raises(ValueError, match="draws random numbers for the whole batch"):
        noisy(x, z0)


def test_a_state_that_belongs_to_the_batch_as_a_whole():
    def begin(z):
        return {"gram": z @ z.T}

    with pytest.raises(ValueError, match=r"\['gram'\] has shape \(4, 4\), and \(2, 2\) for 2"):
        batch_axes(begin, (jnp.ones((4, 3)),), 2)


def test_off_or_nothing_to_shrink_is_the_loop_as_it_was():
    params, x, _ = problem()

    def jaxpr(execution):
        def loss(w):
            options = {"solver": SOLVERS["anderson"], "execution": execution}
            return deq_fixed_point(cell, {"w": w}, x, start(), **options).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(params["w"]))

    assert jaxpr(Execution(shrink_to=BATCH)) == jaxpr(Execution())
