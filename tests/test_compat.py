"""What `deq_jax._compat` takes from JAX without a promise, name by name."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deq_jax import _compat

X = jnp.arange(1.0, 4.0)


def mesh(*kinds):
    return jax.make_mesh((4,), ("data",), axis_types=kinds or (AxisType.Auto,))


def in_shard_map(function):
    """What `function` returns while a `shard_map` over `data` is traced."""
    seen = []

    def local(x):
        seen.append(function(x))
        return x

    mapped = jax.shard_map(local, mesh=mesh(), in_specs=P("data"), out_specs=P("data"))
    jax.eval_shape(mapped, jnp.ones(4))
    return seen[0]


def test_trace_and_evaluate_hand_captured_arrays_over():
    captured = 2 * X
    jaxpr, arrays, structure = _compat.trace(lambda z: {"a": jnp.sin(z) * captured}, X)
    assert arrays[0] is captured
    assert not jaxpr.constvars
    assert len(jaxpr.invars) == 2
    (got,) = _compat.evaluate(jaxpr, [3 * X, X])
    np.testing.assert_allclose(got, np.sin(X) * 3 * X, rtol=1e-6)
    assert structure == jax.tree.structure({"a": 0})


def test_trace_does_not_find_an_older_trace():
    gain = [1.0]
    f = lambda z: gain[0] * z  # noqa: E731
    values = []
    for gain[0] in (1.0, 2.0):
        jaxpr, arrays, _ = _compat.trace(f, X)
        values.append(_compat.evaluate(jaxpr, [*arrays, X])[0])
    np.testing.assert_allclose(values[1], 2 * values[0])


def test_with_equations_and_new_variables():
    jaxpr, _, _ = _compat.trace(lambda z: jnp.cos(jnp.sin(z)), X)
    first = jaxpr.eqns[0]
    renamed = first.replace(outvars=[_compat.new_variable(first.outvars[0])])
    part = _compat.with_equations(jaxpr, jaxpr.invars, [renamed], renamed.outvars)
    np.testing.assert_allclose(_compat.evaluate(part, [X])[0], np.sin(X), rtol=1e-6)


def test_trace_types_and_literals():
    jaxpr, _, _ = _compat.trace(lambda z: z + 2.0, X)
    (equation,) = jaxpr.eqns
    assert isinstance(equation.invars[0], _compat.Var)
    assert isinstance(equation.invars[1], _compat.Literal)
    again = _compat.trace_types(lambda a: a * 2, equation.outvars)
    np.testing.assert_allclose(_compat.evaluate(again, [X])[0], 2 * X)


def test_nested_jaxprs_are_found_in_every_kind_of_call():
    def f(z):
        z = jax.jit(jnp.sin)(z)
        z = lax.scan(lambda c, _: (jnp.cos(c), None), z, length=2)[0]
        z = lax.cond(z[0] > 0, jnp.tan, jnp.exp, z)
        return lax.while_loop(lambda z: z[0] > 9, jnp.log, z)

    jaxpr, _, _ = _compat.trace(f, X)
    for name in ("sin", "cos", "tan", "exp", "log"):
        assert _compat.contains(jaxpr, name)
    assert not _compat.contains(jaxpr, "tanh")
    (call,) = [e for e in jaxpr.eqns if e.primitive.name in ("jit", "pjit")]
    opened, constants = _compat.opened(call.params["jaxpr"])
    assert constants == []
    assert isinstance(opened, _compat.Jaxpr)
    assert _compat.nested(call) == [opened]


@pytest.mark.parametrize(
    ("operation", "expected"),
    [
        (lambda x: lax.psum(x, "data"), ("data",)),
        (lambda x: lax.all_gather(x, "data"), ("data",)),
        (lambda x: lax.ppermute(x, "data", [(0, 1)]), ("data",)),
        (lambda x: jax.jit(functools.partial(lax.pmax, axis_name="data"))(x), ("data",)),
        (lambda x: x * lax.axis_index("data").astype(x.dtype), ()),
        (lambda x: x + lax.pcast(jnp.ones(1), "data", to="varying"), ()),
        (jnp.sin, ()),
    ],
    ids=["psum", "all_gather", "ppermute", "pmax in jit", "axis_index", "pcast", "sin"],
)
def test_mesh_axes_are_those_that_an_operation_names(operation, expected):
    assert in_shard_map(lambda x: _compat.mesh_axes(_compat.trace(operation, x)[0])) == expected


def test_axes_of_the_context():
    assert _compat.manual_axes() == _compat.explicit_axes() == frozenset()
    assert in_shard_map(lambda x: _compat.manual_axes()) == {"data"}
    assert in_shard_map(_compat.varying_axes) == {"data"}
    assert _compat.varying_axes(X) == frozenset()
    with jax.set_mesh(mesh(AxisType.Explicit)):
        assert _compat.explicit_axes() == {"data"}


def test_top_level():
    assert _compat.at_top_level()
    inside = []
    jax.eval_shape(lambda: inside.append(_compat.at_top_level()))
    jax.grad(lambda x: inside.append(_compat.at_top_level()) or x)(1.0)
    jax.vmap(lambda x: inside.append(_compat.at_top_level()) or x)(X)
    assert inside == [False, False, False]
    assert _compat.at_top_level()


@pytest.mark.slow
def test_cleared_caches_are_noticed_once():
    _compat.caches_were_cleared()
    assert not _compat.caches_were_cleared()
    jax.clear_caches()
    assert _compat.caches_were_cleared()
    assert not _compat.caches_were_cleared()


def test_the_trace_context_tells_settings_apart():
    plain = _compat.trace_context()
    assert plain == _compat.trace_context()
    hash(plain)
    with jax.enable_x64(True):
        assert _compat.trace_context() != plain
    with jax.numpy_rank_promotion("raise"):
        assert _compat.trace_context() != plain
    seen = []
    jax.eval_shape(jax.vmap(lambda x: seen.append(_compat.trace_context()) or x, axis_name="i"), X)
    assert seen[0] != plain


def test_a_cond_saves_what_an_explicit_f_makes():
    def loss(w, x):
        def branch(z):
            run = jax.sharding.explicit_axes(
                lambda z, w: jnp.sin(z * w), in_sharding=(P("data"), P())
            )
            return run(z, w)

        if not _compat.cond_saves():
            branch = jax.checkpoint(branch)
        return lax.cond(x[0] > 0, branch, lambda z: z, x).sum()

    x = jnp.arange(1.0, 5.0)
    gradient = jax.grad(loss)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        run = jax.sharding.auto_axes(gradient, out_sharding=P(), axes="data")
        got = jax.jit(run)(jnp.asarray(0.5), x)
    np.testing.assert_allclose(got, np.sum(x * np.cos(0.5 * x)), rtol=1e-6)
