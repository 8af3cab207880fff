"""The contract of `deq_fixed_point`: checks, errors, tracing, leaves of every kind."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax
from deq_jax import Anderson, BackwardProbe, Implicit, deq_fixed_point, solve_fixed_point


def cell(params, z, x):
    return jnp.tanh(params * z) + x


X = jnp.ones((3, 4))


@pytest.mark.museum(
    "torchdeq T13: a wrong shape that broadcasts was accepted and mixed precisions were promoted "
    "silently"
)
@pytest.mark.museum(
    "JAX, carry dtypes: a bfloat16 state with float32 parameters: an error about the loop's carry"
)
@pytest.mark.parametrize(
    ("f", "x", "z0", "error", "words"),
    [
        (lambda p, z, x: (z,), X, None, ValueError, ["structure", "got", "expected"]),
        (lambda p, z, x: z[:, :1], X, None, ValueError, ["shapes", "(3, 1)", "(3, 4)"]),
        (lambda p, z, x: z[0], X, None, ValueError, ["shapes", "(4,)", "(3, 4)"]),
        (lambda p, z, x: z.sum(), X, None, ValueError, ["shapes", "got ()"]),
        (
            lambda p, z, x: {"a": z["a"], "b": z["b"].astype(jnp.bfloat16)},
            {"a": X, "b": X},
            None,
            ValueError,
            ["dtypes", "['b']", "bfloat16", "float32", "cast"],
        ),
        (cell, X, jnp.ones((3, 5)), (ValueError, TypeError), ["(3, 4)", "(3, 5)"]),
        (lambda p, z, x: x, X, jnp.ones((2, 4)), ValueError, ["(3, 4)", "(2, 4)"]),
        (cell, jnp.ones((0, 4)), None, ValueError, ["batch is empty", "axis 0"]),
        (cell, jnp.ones(()), None, ValueError, ["scalar", "batched=False"]),
        (cell, jnp.ones((3, 4), int), None, TypeError, ["int32", "floating", "pass z0"]),
        (cell, X, X > 0, TypeError, ["bool", "floating"]),
        (cell, jax.random.key(0), None, TypeError, ["key", "pass z0"]),
        (cell, (), None, ValueError, ["no leaves"]),
        (cell, None, None, ValueError, ["no leaves", "z0 was left out"]),
        (cell, X, {"a": X, "b": X[:2]}, ValueError, ["same batch", "['a']", "3", "2"]),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_bad_input_is_named(f, x, z0, error, words, jit):
    def run(x, z0):
        return deq_fixed_point(f, 0.5, x, z0)

    with pytest.raises(error) as raised:
        (jax.jit(run) if jit else run)(x, z0)
    for word in words:
        assert word in str(raised.value)


def test_bad_input_is_found_before_any_solve():
    runs = []

    def f(params, z, x):
        jax.debug.callback(lambda: runs.append(None))
        return z[:, :2]

    with pytest.raises(ValueError, match="shapes"):
        deq_fixed_point(f, None, X)
    jax.effects_barrier()
    assert runs == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "anderson"}, ["solver must be", "'anderson'"]),
        ({"solver": Anderson}, ["solver must be"]),
        ({"gradient": "implicit"}, ["gradient must be", "'implicit'"]),
        ({"gradient": Anderson()}, ["gradient must be"]),
        ({"backward_probe": jnp.zeros(3)}, ["backward_probe must be a BackwardProbe"]),
        ({"backward_probe": BackwardProbe.zeros(4)}, ["does not fit", "(4,)", "zeros(3)"]),
        ({"backward_probe": BackwardProbe.zeros()}, ["does not fit", "zeros(3)"]),
        ({"iterations": 3}, ["iterations"]),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises((TypeError, ValueError)) as raised:
        deq_fixed_point(cell, 0.5, X, **options)
    for word in words:
        assert word in str(raised.value)


class Traces:
    """A cell that counts how often Python runs it."""

    def __init__(self):
        self.count = 0

    def __call__(self, params, z, x):
        self.count += 1
        return jnp.tanh(params * z) + x


@pytest.mark.museum(
    "JAX, retracing: a lambda made anew at every call is traced and compiled anew: 230 to 340 ms "
    "each"
)
@pytest.mark.slow
def test_a_second_eager_call_does_not_trace_again():
    f = Traces()
    first = deq_fixed_point(f, jnp.float32(0.5), X)
    assert f.count == 1
    second = deq_fixed_point(f, jnp.float32(0.6), 2 * X)
    assert f.count == 1
    assert (first != second).all()
    deq_fixed_point(f, jnp.float32(0.5), X[:2])
    assert f.count == 2
    solve_fixed_point(f, jnp.float32(0.5), X)
    assert f.count == 3


@pytest.mark.slow
def test_a_second_eager_gradient_does_not_compile_again():
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    def loss(params):
        return deq_fixed_point(cell, params, X).sum()

    jax.grad(loss)(jnp.float32(0.5))
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        again = jax.grad(loss)(jnp.float32(0.6))
        assert compiled == []
        deq_fixed_point(lambda p, z, x: 0.25 * z + x, None, X)
        assert compiled  # the listener does hear
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    step = 1e-2
    difference = (loss(0.6 + step) - loss(0.6 - step)) / (2 * step)
    np.testing.assert_allclose(again, difference, rtol=1e-2)


@pytest.mark.slow
def test_a_closure_over_another_transformations_array_is_not_kept():
    """The same function object, holding a new traced array at every call."""

    class Held:
        def f(self, params, z, x):
            return jnp.tanh(self.weight * z) + x

    held = Held()

    def loss(weight):
        held.weight = weight
        return deq_fixed_point(held.f, None, X).sum()

    first, second = jax.grad(loss)(0.3), jax.grad(loss)(0.5)
    expected = [jax.grad(lambda p: deq_fixed_point(cell, p, X).sum())(p) for p in (0.3, 0.5)]
    np.testing.assert_allclose([first, second], expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), expected[1], rtol=1e-5)


def test_an_unhashable_cell_is_solved_all_the_same():
    class Cell:
        __hash__ = None

        def __call__(self, params, z, x):
            return cell(params, z, x)

    np.testing.assert_allclose(deq_fixed_point(Cell(), 0.5, X), deq_fixed_point(cell, 0.5, X))


@pytest.mark.slow
def test_leaves_without_a_gradient():
    params = {
        "gain": jnp.float32(0.5),
        "index": jnp.array([2, 0, 1, 3]),
        "flag": jnp.array(True),
        "key": jax.random.key(3),
        "raw_key": jax.random.PRNGKey(3),
        "none": None,
        "number": 0.25,
    }

    def f(params, z, x):
        noise = jax.random.normal(params["key"], z.shape)
        noise += jax.random.normal(params["raw_key"], z.shape)
        z = jnp.where(params["flag"], z[:, params["index"]], z)
        return jnp.tanh(params["gain"] * z) + x["data"] + params["number"] * noise

    def loss(gain, x):
        return deq_fixed_point(f, {**params, "gain": gain}, x, jnp.zeros((3, 4))).sum()

    x = {"data": X, "steps": jnp.arange(3)}
    gradient = jax.jit(jax.grad(lambda gain: loss(gain, x)))(params["gain"])
    step = 1e-2
    difference = (loss(0.5 + step, x) - loss(0.5 - step, x)) / (2 * step)
    np.testing.assert_allclose(gradient, difference, rtol=2e-3)
    whole = jax.grad(lambda p: deq_fixed_point(f, p, x, jnp.zeros((3, 4))).sum(), allow_int=True)
    by_params = whole(params)
    np.testing.assert_allclose(by_params["gain"], gradient, rtol=1e-5)
    assert by_params["index"].dtype == by_params["key"].dtype == jax.dtypes.float0


@pytest.mark.slow
def test_what_is_returned():
    z = deq_fixed_point(cell, 0.5, X)
    pair = deq_fixed_point(cell, 0.5, X, return_stats=True)
    assert type(pair) is tuple
    np.testing.assert_array_equal(pair[0], z)
    mapped = jax.vmap(
        lambda x: deq_fixed_point(cell, 0.5, x, batched=False, return_stats=True), out_axes=(1, 0)
    )(X)
    np.testing.assert_allclose(mapped[0].T, z, rtol=1e-4)


def test_python_numbers_and_numpy_arrays_are_taken():
    z = deq_fixed_point(cell, 0.5, np.ones((3, 4), np.float32), np.zeros((3, 4), np.float32))
    np.testing.assert_allclose(z, deq_fixed_point(cell, jnp.float32(0.5), X), rtol=1e-6)


@pytest.mark.museum(
    "torchdeq T9: some solver options could not be set, and tol and max_iter of one call raised"
)
@pytest.mark.slow
def test_gradient_policy_limits_reach_the_backward_solve():
    def report(gradient):
        def loss(probe):
            return deq_fixed_point(
                cell, 0.9, X, solver=Anderson(tol=1e-6), gradient=gradient, backward_probe=probe
            ).sum()

        return jax.grad(loss)(BackwardProbe.zeros(3))

    # Elementwise and equal for all elements: one dimension, in which Anderson needs few steps.
    assert report(Implicit(max_iter=1)).evaluations == 1
    assert report(Implicit()).evaluations > 1


@pytest.mark.slow
def test_import_is_light():
    """Neither Flax nor TFDS nor matplotlib, and nothing of the top level missing."""
    script = (
        "import sys, deq_jax; "
        "heavy = {'flax', 'tensorflow_datasets', 'matplotlib', 'optax', 'orbax', 'sklearn'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == "[]"
    for name in ("deq_fixed_point", "Anderson", "Picard", "Implicit", "SolveStats", "Status"):
        assert hasattr(deq_jax, name)
