"""Nothing is stale, nothing is kept for ever, and nothing is compiled twice.

A call that the user did not put under `jit` himself sees everything that f reads as it is now. The
references are NumPy solves with the values at the time of the call.
"""

import contextlib
import dataclasses
import gc
import sys
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import deq_jax.nnx
from deq_jax import Anderson, Picard, Status, deq_fixed_point, solve_fixed_point

pytestmark = pytest.mark.usefixtures("x64")

SOLVER = Picard(tol=1e-12, max_iter=400)  # quick to compile
X = np.array([[0.3, -1.2], [0.8, 0.1], [-0.4, 2.0]])
GAINS = 0.2, 0.7, 0.45


def solution(gain, x):
    """`z = tanh(gain z + x)` in NumPy, elementwise."""
    z = np.zeros_like(x)
    for _ in range(500):
        z = np.tanh(gain * z + x)
    return z


def derivative_by_x(gain, x):
    """`dz/dx` of the same, elementwise."""
    slope = 1 - solution(gain, x) ** 2
    return slope / (1 - gain * slope)


def check_close(got, expected, rtol=1e-9):
    np.testing.assert_allclose(np.asarray(got), expected, rtol=rtol, atol=1e-12)


# Where f finds its gain. Each entry returns f and a function that changes the gain in place.


class Net(nnx.Module):
    def __init__(self):
        self.gain = nnx.Param(jnp.asarray(GAINS[0]))

    def f(self, _, z, x):
        return jnp.tanh(self.gain[...] * z + x)

    def __call__(self, x):
        return deq_fixed_point(self.f, None, x, solver=SOLVER)


class Holder:
    def __init__(self, gain):
        self.gain = gain

    def f(self, _, z, x):
        return jnp.tanh(self.gain * z + x)


class Outer:
    def __init__(self, inner):
        self.inner = inner


def bound_method_of_an_nnx_module():
    net = Net()

    def change(gain):
        net.gain[...] = jnp.asarray(gain)

    return net.f, change


def closure_over_an_nnx_module():
    net = Net()

    def change(gain):
        net.gain[...] = jnp.asarray(gain)

    return lambda _, z, x: net.f(_, z, x), change


def nnx_module_with_another_variable():
    net = Net()

    def change(gain):
        net.gain = nnx.Param(jnp.asarray(gain))

    return net.f, change


def bound_method_of_a_plain_object():
    holder = Holder(GAINS[0])
    return holder.f, lambda gain: setattr(holder, "gain", gain)


def plain_object_with_an_array():
    holder = Holder(jnp.asarray(GAINS[0]))
    return holder.f, lambda gain: setattr(holder, "gain", jnp.asarray(gain))


def object_within_an_object():
    outer = Outer(Holder(GAINS[0]))

    def f(_, z, x):
        return jnp.tanh(outer.inner.gain * z + x)

    return f, lambda gain: setattr(outer.inner, "gain", gain)


def item_of_a_list():
    gains = [GAINS[0]]

    def f(_, z, x):
        return jnp.tanh(gains[0] * z + x)

    return f, lambda gain: gains.__setitem__(0, gain)


def item_of_a_dictionary():
    settings = {"gain": jnp.asarray(GAINS[0])}

    def f(_, z, x):
        return jnp.tanh(settings["gain"] * z + x)

    return f, lambda gain: settings.__setitem__("gain", jnp.asarray(gain))


def numpy_array():
    gain = np.array(GAINS[0])

    def f(_, z, x):
        return jnp.tanh(gain * z + x)

    return f, lambda value: gain.__setitem__((), value)


def nonlocal_number():
    gain = GAINS[0]

    def f(_, z, x):
        return jnp.tanh(gain * z + x)

    def change(value):
        nonlocal gain
        gain = value

    return f, change


GLOBAL_GAIN = GAINS[0]
GLOBAL_ARRAY = None
GLOBAL_MODEL = None


def f_of_a_global_number(_, z, x):
    return jnp.tanh(GLOBAL_GAIN * z + x)


def f_of_a_global_array(_, z, x):
    return jnp.tanh(GLOBAL_ARRAY * z + x)


def f_of_a_global_model(_, z, x):
    return GLOBAL_MODEL.f(_, z, x)


def _change_global(name, make):
    def change(gain):
        globals()[name] = make(gain)

    change(GAINS[0])
    return change


def global_number():
    return f_of_a_global_number, _change_global("GLOBAL_GAIN", float)


def global_array():
    return f_of_a_global_array, _change_global("GLOBAL_ARRAY", jnp.asarray)


def global_model():
    return f_of_a_global_model, _change_global("GLOBAL_MODEL", Holder)


def default_argument():
    gains = [GAINS[0]]

    def f(_, z, x, gains=gains):
        return jnp.tanh(gains[0] * z + x)

    return f, lambda gain: gains.__setitem__(0, gain)


@dataclasses.dataclass
class UnhashableGain:
    gain: float

    def __call__(self, _, z, x):
        return jnp.tanh(self.gain * z + x)


class HashableGain:
    def __init__(self, gain):
        self.gain = gain

    def __call__(self, _, z, x):
        return jnp.tanh(self.gain * z + x)


def callable_dataclass():
    f = UnhashableGain(GAINS[0])
    return f, lambda gain: setattr(f, "gain", gain)


def callable_object():
    f = HashableGain(GAINS[0])
    return f, lambda gain: setattr(f, "gain", gain)


PLACES = [
    bound_method_of_an_nnx_module,
    closure_over_an_nnx_module,
    nnx_module_with_another_variable,
    bound_method_of_a_plain_object,
    plain_object_with_an_array,
    object_within_an_object,
    item_of_a_list,
    item_of_a_dictionary,
    numpy_array,
    nonlocal_number,
    global_number,
    global_array,
    global_model,
    default_argument,
    callable_dataclass,
    callable_object,
]


def _solve(f, x):
    return deq_fixed_point(f, None, x, solver=SOLVER)


# How the layer is called. Each entry gets f, anew each time, and gives what it is and should be.


def eagerly(f, gain):
    value, stats = deq_fixed_point(f, None, jnp.asarray(X), solver=SOLVER, return_stats=True)
    np.testing.assert_array_equal(stats.status, Status.CONVERGED)
    image = np.tanh(gain * np.asarray(value) + X)
    residual = np.linalg.norm(image - value, axis=1) / np.linalg.norm(image, axis=1)
    assert (residual <= 1.01 * SOLVER.tol).all()
    return value, solution(gain, X)


def without_a_gradient(f, gain):
    return solve_fixed_point(f, None, jnp.asarray(X), solver=SOLVER).value, solution(gain, X)


def under_jit_made_anew(f, gain):
    return jax.jit(lambda x: _solve(f, x))(jnp.asarray(X)), solution(gain, X)


def under_grad(f, gain):
    got = jax.grad(lambda x: _solve(f, x).sum())(jnp.asarray(X))
    return got, derivative_by_x(gain, X)


def under_value_and_grad_and_jit(f, gain):
    value, got = jax.jit(jax.value_and_grad(lambda x: _solve(f, x).sum()))(jnp.asarray(X))
    check_close(value, solution(gain, X).sum())
    return got, derivative_by_x(gain, X)


def under_vmap(f, gain):
    stacked = np.stack([X, 2 * X])
    return jax.vmap(lambda x: _solve(f, x))(jnp.asarray(stacked)), solution(gain, stacked)


def under_jacrev(f, gain):
    got = jax.jacrev(lambda x: _solve(f, x))(jnp.asarray(X))
    expected = np.zeros((*X.shape, *X.shape))
    rows, columns = np.indices(X.shape)
    expected[rows, columns, rows, columns] = derivative_by_x(gain, X)
    return got, expected


def under_jvp(f, gain):
    x = jnp.asarray(X)
    value, tangent = jax.jvp(lambda x: _solve(f, x), (x,), (jnp.ones_like(x),))
    check_close(value, solution(gain, X))
    return tangent, derivative_by_x(gain, X)


def under_checkpoint(f, gain):
    got = jax.grad(jax.checkpoint(lambda x: _solve(f, x).sum()))(jnp.asarray(X))
    return got, derivative_by_x(gain, X)


def under_scan(f, gain):
    stacked = np.stack([X, 2 * X])

    def body(carry, x):
        return carry, _solve(f, x)

    return jax.lax.scan(body, 0, jnp.asarray(stacked))[1], solution(gain, stacked)


@pytest.mark.parametrize("call", [eagerly, under_jit_made_anew, under_grad])
@pytest.mark.parametrize("place", PLACES)
def test_what_f_reads_is_read_now(place, call):
    f, change = place()
    for gain in GAINS:
        change(gain)
        check_close(*call(f, gain))


@pytest.mark.parametrize(
    "call",
    [
        without_a_gradient,
        under_value_and_grad_and_jit,
        under_vmap,
        under_jacrev,
        under_jvp,
        under_checkpoint,
        under_scan,
    ],
)
@pytest.mark.parametrize("place", [bound_method_of_an_nnx_module, item_of_a_list])
@pytest.mark.slow
def test_every_way_of_calling_is_fresh(place, call):
    f, change = place()
    for gain in GAINS:
        change(gain)
        check_close(*call(f, gain))


def test_an_eager_call_does_not_spoil_other_ways_of_calling():
    """What an eager call keeps for f must not be found by a transformation, and vice versa."""
    f, change = bound_method_of_an_nnx_module()
    calls = [eagerly, under_grad, under_jit_made_anew, under_vmap, eagerly]
    for gain, call in zip((*GAINS, *GAINS), calls, strict=False):
        change(gain)
        check_close(*call(f, gain))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.jacrev], ids=["eager", "jit", "jacrev"])
def test_the_module_itself_as_the_function(wrap):
    """`jax.jit(lambda x: m(x))` made anew, and `m(x)`."""
    net = Net()
    for gain in GAINS:
        net.gain[...] = jnp.asarray(gain)
        got = wrap(lambda x: net(x))(jnp.asarray(X))
        if wrap is jax.jacrev:
            rows, columns = np.indices(X.shape)
            check_close(got[rows, columns, rows, columns], derivative_by_x(gain, X))
        else:
            check_close(got, solution(gain, X))


class Trained(nnx.Module):
    """An NNX model that is not made of the library's layer, and calls it with a method."""

    def __init__(self):
        kernel = np.random.default_rng(0).normal(size=(2, 2)) * 0.3
        self.kernel = nnx.Param(jnp.asarray(kernel))

    def f(self, _, z, x):
        return jnp.tanh(z @ self.kernel[...] + x)

    def __call__(self, x):
        return deq_fixed_point(self.f, None, x, solver=SOLVER)


class Cell(nnx.Module):
    def __init__(self):
        kernel = np.random.default_rng(0).normal(size=(2, 2)) * 0.3
        self.kernel = nnx.Param(jnp.asarray(kernel))

    def __call__(self, z, x):
        return jnp.tanh(z @ self.kernel[...] + x)


@pytest.mark.museum(
    "torchdeq T12: a forgotten reset of the normalisation was an error in the second step"
)
@pytest.mark.parametrize("kind", ["method", "layer"])
@pytest.mark.slow
def test_training_and_evaluating_eagerly_between_the_steps(kind):
    model = Trained() if kind == "method" else deq_jax.nnx.DEQ(Cell(), solver=SOLVER)
    x, target = jnp.asarray(X), jnp.asarray(X[::-1].copy())

    def loss(model):
        return jnp.mean((model(x) - target) ** 2)

    @nnx.jit
    def train_step(model):
        gradients = nnx.grad(loss)(model)
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - 0.3 * g, weights, gradients))

    def true_loss():
        kernel = np.asarray((model if kind == "method" else model.cell).kernel[...])
        z = np.zeros_like(X)
        for _ in range(500):
            z = np.tanh(z @ kernel + X)
        return np.mean((z - X[::-1]) ** 2)

    seen = []
    for _ in range(4):
        check_close(loss(model), true_loss())
        check_close(jax.jit(lambda: loss(model))(), true_loss())
        seen.append(true_loss())
        train_step(model)
    assert (np.diff(seen) < -1e-3).all()


# Work that is not done twice.


@contextlib.contextmanager
def counting_calls(code):
    """Counts how often Python enters the function with this code; f itself holds nothing."""
    calls = []

    def hook(frame, event, _):
        if event == "call" and frame.f_code is code:
            calls.append(frame.f_lineno)

    before = sys.getprofile()
    sys.setprofile(hook)
    try:
        yield calls
    finally:
        sys.setprofile(before)


@pytest.fixture
def compilations():
    """A list that grows by one whenever XLA compiles something."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


def plain(params, z, x):
    return jnp.tanh(params * z + x)


def test_a_second_call_with_a_plain_function_does_not_trace_again():
    params, x = jnp.asarray(0.4), jnp.asarray(X)
    with counting_calls(plain.__code__) as calls:
        first = deq_fixed_point(plain, params, x, solver=SOLVER)
        assert len(calls) == 1
        second = deq_fixed_point(plain, params + 0.1, x, solver=SOLVER)
        assert len(calls) == 1
    check_close(first, solution(0.4, X))
    check_close(second, solution(0.5, X))


def test_a_second_call_with_a_function_that_counts_does_not_trace_again():
    calls = []

    def f(params, z, x):
        calls.append(None)
        return jnp.tanh(params * z + x)

    x = jnp.asarray(X)
    deq_fixed_point(f, jnp.asarray(0.4), x, solver=SOLVER)
    made = len(calls)
    assert made >= 1
    check_close(deq_fixed_point(f, jnp.asarray(0.5), x, solver=SOLVER), solution(0.5, X))
    assert len(calls) == made


def test_another_shape_is_traced_anew():
    with counting_calls(plain.__code__) as calls:
        for rows in (1, 2):
            x = X[:rows]
            got = deq_fixed_point(plain, jnp.asarray(0.3), jnp.asarray(x), solver=Picard(tol=1e-11))
            check_close(got, solution(0.3, x))
    assert len(calls) == 2


def test_the_listener_sees_compilations(compilations):
    jax.jit(lambda x: x * 3 + 1)(jnp.asarray(X))
    assert compilations


def made_anew_as_a_lambda(gain):
    gain = jnp.asarray(gain)
    return lambda _, z, x: jnp.tanh(gain * z + x)


def made_anew_as_an_unhashable_object(gain):
    return UnhashableGain(jnp.asarray(gain))


def made_anew_as_a_bound_method(gain):
    return Holder(jnp.asarray(gain)).f


@pytest.mark.museum(
    "JAX, retracing: a lambda made anew at every call is traced and compiled anew: 230 to 340 ms "
    "each"
)
@pytest.mark.parametrize("solver", [SOLVER, Anderson(tol=1e-12, max_iter=100)], ids=["P", "A"])
@pytest.mark.parametrize(
    "make",
    [made_anew_as_a_lambda, made_anew_as_an_unhashable_object, made_anew_as_a_bound_method],
)
def test_a_function_made_anew_around_arrays_is_not_compiled_again(make, solver, compilations):
    x = jnp.asarray(X)
    check_close(deq_fixed_point(make(np.float64(0.1)), None, x, solver=solver), solution(0.1, X))
    gains = np.linspace(0.2, 0.6, 4)
    functions = [make(gain) for gain in gains]
    before = len(compilations)
    values = [deq_fixed_point(f, None, x, solver=solver) for f in functions]
    jax.block_until_ready(values)
    assert len(compilations) == before
    for gain, value in zip(gains, values, strict=True):
        check_close(value, solution(gain, X))


def test_an_unhashable_function_is_not_compiled_at_each_call(compilations):
    f, x = UnhashableGain(0.3), jnp.asarray(X)
    first = deq_fixed_point(f, None, x, solver=SOLVER)
    before = len(compilations)
    again = [deq_fixed_point(f, None, x, solver=SOLVER) for _ in range(3)]
    jax.block_until_ready(again)
    assert len(compilations) == before
    for value in (first, *again):
        check_close(value, solution(0.3, X))


def test_an_unhashable_solver_setting_is_not_compiled_at_each_call(compilations):
    """A solver of the user's own that cannot be hashed works, and is compiled once an object."""
    solver = OwnSolver()
    x = jnp.asarray(X)
    first = deq_fixed_point(plain, jnp.asarray(0.3), x, solver=solver)
    before = len(compilations)
    again = deq_fixed_point(plain, jnp.asarray(0.3), x, solver=solver)
    jax.block_until_ready(again)
    assert len(compilations) == before
    check_close(first, solution(0.3, X))
    check_close(again, solution(0.3, X))


def test_another_setting_of_a_users_own_solver_is_seen():
    """Two objects of one class, which JAX could take for the same static argument."""
    x = jnp.asarray(X)
    for evaluations in (3, 200, 2):
        solver = OwnSolver(max_iter=evaluations)
        z = deq_fixed_point(plain, jnp.asarray(0.3), x, solver=solver)
        expected = np.zeros_like(X)
        for _ in range(evaluations - 1):  # the point of the last evaluation is the best
            expected = np.tanh(0.3 * expected + X)
        check_close(z, expected)


@dataclasses.dataclass
class OwnSolver:
    """Plain iteration; `eq=True` without `frozen` makes it unhashable."""

    tol: float = 1e-12
    atol: float = 0.0
    max_iter: int = 200
    trace: bool = False

    def init(self, z, fz):
        return ()

    def step(self, z, fz, state):
        return fz, state


# Nothing is kept for ever.

MIB_8 = 2**20  # float64 numbers


def big_arrays(size):
    """How many arrays of this many numbers are alive; each test takes a size of its own."""
    return sum(array.shape == (size,) for array in jax.live_arrays())


def big_arrays_after_collecting(size):
    gc.collect()
    return big_arrays(size)


class BigNet(nnx.Module):
    def __init__(self, big):
        self.big = nnx.Param(big)

    def f(self, _, z, x):
        return jnp.tanh(self.big[...][0] * z + x)


class BigHolder:
    def __init__(self, big):
        self.big = big

    def f(self, _, z, x):
        return jnp.tanh(self.big[0] * z + x)


def big_lambda(big):
    return lambda _, z, x: jnp.tanh(big[0] * z + x)


BIG = {
    "lambda": big_lambda,
    "method": lambda big: BigHolder(big).f,
    "module": lambda big: BigNet(big).f,
}


@pytest.mark.parametrize("kind", BIG)
@pytest.mark.slow
def test_functions_made_anew_do_not_pile_up(kind):
    x, size = jnp.asarray(X), MIB_8 + len(kind)
    for index in range(12):
        gain = 0.05 * index
        f = BIG[kind](jnp.asarray(np.full(size, gain)))
        check_close(deq_fixed_point(f, None, x, solver=SOLVER), solution(gain, X))
        assert big_arrays(size) >= 1
        del f
    assert big_arrays_after_collecting(size) <= 2


def gradient_by_x(f, x):
    return jax.grad(lambda x: deq_fixed_point(f, None, x, solver=SOLVER).sum())(x)


@pytest.mark.slow
def test_functions_made_anew_under_grad_do_not_pile_up():
    x, size = jnp.asarray(X), MIB_8 + 1
    for index in range(6):
        gain = 0.05 * index
        got = gradient_by_x(big_lambda(jnp.asarray(np.full(size, gain))), x)
        check_close(got, derivative_by_x(gain, X))
    assert big_arrays_after_collecting(size) <= 2


@pytest.mark.slow
def test_clearing_jaxs_caches_frees_what_f_holds():
    size = MIB_8 + 2
    f = big_lambda(jnp.asarray(np.full(size, 0.3)))
    got = deq_fixed_point(f, None, jnp.asarray(X), solver=SOLVER)
    check_close(got, solution(0.3, X))
    assert big_arrays(size) >= 1
    del f
    jax.clear_caches()
    assert big_arrays_after_collecting(size) == 0


@pytest.mark.slow
def test_clearing_jaxs_caches_makes_f_be_traced_anew():
    params, x = jnp.asarray(0.35), jnp.asarray(X)

    def run():
        value = deq_fixed_point(plain, params, x, solver=SOLVER)
        gradient = jax.grad(lambda p: deq_fixed_point(plain, p, x, solver=SOLVER).sum())(params)
        return value, gradient

    slope = 1 - solution(0.35, X) ** 2
    expected = (slope * solution(0.35, X) / (1 - 0.35 * slope)).sum()
    for _ in range(2):
        with counting_calls(plain.__code__) as calls:
            value, gradient = run()
        assert calls
        check_close(value, solution(0.35, X))
        check_close(gradient, expected)
        jax.clear_caches()
    with counting_calls(plain.__code__) as calls:
        check_close(deq_fixed_point(plain, params, x, solver=SOLVER), solution(0.35, X))
    assert calls


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.slow
def test_a_tracer_that_is_an_argument_and_closed_over_is_not_kept(jit):
    kept = []

    def loss(gain, x):
        f = lambda params, z, x: jnp.tanh(0.5 * (gain + params) * z + x)  # noqa: E731
        kept.append(weakref.ref(f))
        return deq_fixed_point(f, gain, x, solver=SOLVER).sum()

    slope = 1 - solution(0.4, X) ** 2
    expected = (slope * solution(0.4, X) / (1 - 0.4 * slope)).sum()
    for _ in range(2):
        with jax.checking_leaks():
            gradient = jax.grad(loss)
            got = (jax.jit(gradient) if jit else gradient)(jnp.asarray(0.4), jnp.asarray(X))
        check_close(got, expected)
    del gradient
    gc.collect()
    assert len(kept) >= 2
    assert all(reference() is None for reference in kept)
