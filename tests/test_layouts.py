"""Parameters and states split over mesh axes other than the batch's: values, and what is sent."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    Broyden,
    Dense,
    Execution,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    Unrolled,
    deq_fixed_point,
    deq_root,
    gather_params,
    solve_fixed_point,
)
from experiments.studies import traffic
from experiments.studies.collectives import program
from tests.reference import implicit_gradient, newton_equilibrium, relative_error

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64", "compiled_anew")]


@pytest.fixture
def compiled_anew():
    """Without the compilation cache: XLA (0.10.2) often crashes in programs that it read there.

    It was seen with NewtonKrylov and sums over devices, in about half of the runs.
    """
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks once only whether there is one
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    ("layout", "mode", "solver"),
    [
        ("FSDP", "auto", "Anderson"),
        ("tensor, columns", "explicit", "Anderson"),
        ("tensor, columns then rows", "shard_map", "NewtonKrylov"),
        ("features", "auto", "Anderson"),
        ("features", "shard_map", "Broyden"),
        ("sequence", "shard_map", "NewtonKrylov"),
        ("data x tensor", "shard_axis", "Broyden"),
        ("data x FSDP", "shard_axis", "Anderson"),
    ],
)
def test_a_layout_is_like_one_device_and_gathers_what_f_gathers(layout, mode, solver):
    measured = traffic.measure_layout(traffic.LAYOUTS[layout], mode, traffic.SOLVERS[solver])
    assert measured["error"] < 1e-12
    assert measured["needless gathers"] == []
    if mode == "shard_axis" and "FSDP" in layout:
        assert measured["forward"]["collectives"] == measured["backward"]["collectives"] == 0


def test_the_kept_table_has_no_needless_gather():
    """Of all layouts, modes and solvers, and of the transformer on 64 devices."""
    document = traffic.STUDY.load()
    rows = document["layouts"]["rows"]
    places = {(row["layout"], row["mode"], row["solver"]) for row in rows}
    assert places == {
        (name, mode, solver)
        for name, layout in traffic.LAYOUTS.items()
        for mode in layout.modes()
        for solver in traffic.SOLVERS
    }
    assert all(row["error"] < 1e-12 and row["needless gathers"] == [] for row in rows)
    scales = document["scale"]["rows"]
    assert set(scales) == set(traffic.SCALES)
    for name in scales:
        if "gather_params" in name and "tensor" not in name:
            assert scales[name]["gathers in loops"] == []
            assert scales[name]["forward"] + scales[name]["backward"] < 10  # an agreement each
    assert json.dumps(document)


def test_collectives_are_read_from_a_program():
    module = """
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%inner_body (p: (f32[4])) -> (f32[4]) {
  %g = f32[4]{0} all-gather(%x), dimensions={0}
}

%inner_cond (p: (f32[4])) -> pred[] {
  ROOT %r = pred[] all-reduce(%q), to_apply=%sum
}

%branch (p: f32[4]) -> f32[4] {
  %b = bf16[2,3]{1,0} all-to-all(%p), dimensions={0}
}

%body (p: (f32[4])) -> (f32[4]) {
  %w = (f32[4]) while(%p), condition=%inner_cond, body=%inner_body
  %c = f32[4] conditional(%i, %p, %p), branch_computations={%branch, %sum}
  %r = (f32[4]{0}, f64[2]{0}) all-reduce(%a, %b), to_apply=%sum
}

%cond (p: (f32[4])) -> pred[] {
  ROOT %t = pred[] constant(true)
}

ENTRY %main (p: f32[4]) -> f32[4] {
  %s = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), dimensions={0}
  %w = (f32[4]) while(%p), condition=%cond, body=%body
}
"""
    found = program(module)
    assert [(c.kind, c.shapes, c.size) for c in found.collectives] == [
        ("all-gather", ("f32[8]",), 32)
    ]
    (loop,) = found.inner
    assert sorted((c.kind, c.size) for c in loop.collectives) == [
        ("all-reduce", 32),
        ("all-to-all", 12),
    ]
    assert [(c.kind, c.size) for c in loop.inner[0].collectives] == [
        ("all-reduce", 1),
        ("all-gather", 16),
    ]


# ---------------------------------------------------------------------- sums over devices in f

PAIR = {"w": P(None, "model"), "v": P("model")}


def grid(kind=AxisType.Auto):
    return jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)


def numbers(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def pair():
    params = {"w": numbers(6, 8, seed=0) / 3, "v": numbers(8, 6, seed=1) / 3}
    return params, numbers(4, 6, seed=2), numbers(4, 6, seed=3)


def block(params, z, x, add=lambda y: y):
    """With a term of z itself, along which a varying type would survive the sum."""
    return 0.2 * z + 0.4 * jnp.tanh(add(jax.nn.softplus(z @ params["w"]) @ params["v"]) + x)


@functools.cache
def expected_pair():
    params, x, cotangent = pair()
    z = newton_equilibrium(lambda z: block(params, z, x), jnp.zeros_like(x))
    gradient = implicit_gradient(
        lambda arguments, z: block(arguments[0], z, arguments[1]), (params, x), z, cotangent
    )
    return z, gradient


@pytest.mark.parametrize(
    ("solver", "gradient"),
    [
        (Picard(tol=1e-13, max_iter=300), Implicit()),
        (Broyden(tol=1e-13), Implicit(GMRES(tol=1e-13))),
        (NewtonKrylov(tol=1e-13), Implicit()),
        (Anderson(tol=1e-13), Implicit()),
        (Picard(tol=0, max_iter=80), Unrolled()),
        (Anderson(tol=1e-13), Phantom(60)),
    ],
    ids=lambda option: type(option).__name__,
)
def test_f_that_sums_over_a_mesh_axis(solver, gradient):
    params, x, cotangent = pair()
    f = functools.partial(block, add=lambda y: lax.psum(y, "model"))

    def local(params, x):
        options = {"solver": solver, "gradient": gradient, "return_stats": True}
        z, stats = deq_fixed_point(f, params, x, **options)
        return z, stats.evaluations[None], stats.residual

    def loss(params, x):
        specs = {"in_specs": (PAIR, P("data")), "out_specs": (P("data"),) * 3}
        mapped = jax.shard_map(local, mesh=grid(), **specs)
        z, evaluations, residual = mapped(params, x)
        return jnp.vdot(cotangent, z), (z, evaluations, residual)

    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    got, (z, evaluations, residual) = compiled(params, x)
    expected_z, expected = expected_pair()
    assert relative_error(z, expected_z) < 1e-12
    assert relative_error(got, expected) < 1e-11
    assert evaluations.shape == (2,)
    assert residual.shape == (4,)


def test_devices_with_the_same_state_do_not_ask_each_other():
    params, x, _ = pair()
    f = functools.partial(block, add=lambda y: lax.psum(y, "model"))
    specs = {"in_specs": (PAIR, P("data")), "out_specs": P("data")}
    solve = jax.shard_map(lambda params, x: deq_fixed_point(f, params, x), mesh=grid(), **specs)
    (loop,) = program(jax.jit(solve).lower(params, x).compile().as_text()).inner
    assert [c.kind for c in loop.everywhere()] == ["all-reduce"]  # that of f


# ------------------------------------------------------------------------------- gather_params


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_gathered_parameters(kind):
    params, x, cotangent = pair()
    mesh = grid(kind)
    specs = {"w": P("data", "model"), "v": P(("model", "data"))}

    def loss(params, x):
        whole = gather_params(params | {"name": "kept"}, "data")
        assert whole.pop("name") == "kept"
        return jnp.vdot(cotangent, 0.4 * jnp.tanh(x) @ whole["w"] @ whole["v"]), whole

    shardings = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        if kind == AxisType.Explicit:
            whole = jax.jit(lambda params: gather_params(params, "data"))(placed)
            assert whole["w"].sharding.spec == P(None, "model")
            assert whole["v"].sharding.spec[0] in ("model", ("model",))
        else:
            gradient, whole = jax.jit(
                jax.grad(loss, has_aux=True), out_shardings=(shardings, None)
            )(placed, x)
            assert gradient["w"].sharding == shardings["w"]
            expected = jax.grad(lambda p: loss_of_whole(p, x, cotangent))(params)
            assert relative_error(gradient, expected) < 1e-13
        assert relative_error(whole, params) == 0


def loss_of_whole(params, x, cotangent):
    return jnp.vdot(cotangent, 0.4 * jnp.tanh(x) @ params["w"] @ params["v"])


def test_no_mesh_to_gather_over():
    with pytest.raises(ValueError, match=r"gather_params\(..., 'fsdp'\) is no axis of a mesh"):
        gather_params(pair()[0], "fsdp")


# ------------------------------------------------------------------------------- state_axis


def test_statistics_of_split_samples_are_those_of_whole_ones():
    """Of a state split over one axis and a batch over the other; forwards and backwards."""
    params, x, cotangent = pair()
    weights = params["w"][:, :6]

    def f(w, z, x):
        return 0.5 * jnp.tanh(lax.all_gather(z, "model", axis=1, tiled=True) @ w + x)

    options = {"solver": Anderson(tol=1e-12), "return_stats": True}
    options["gradient"] = Implicit(GMRES(tol=1e-12, restart=3))

    def solved(f, weights, x, cotangent, probe, **more):
        """The gradients, and the reports of both solves."""

        def loss(weights, x, probe):
            z, stats = deq_fixed_point(f, weights, x, backward_probe=probe, **options, **more)
            return jnp.vdot(cotangent, z), (stats.residual, stats.iterations)

        gradients, stats = jax.grad(loss, (0, 1, 2), has_aux=True)(weights, x, probe)
        return *gradients[:2], *stats, gradients[2].iterations

    def local(weights, x, cotangent):
        probe = lax.pcast(BackwardProbe.zeros(2), "data", to="varying")
        execution = Execution(state_axis="model")
        weights = lax.pcast(weights, "data", to="varying")
        got = solved(f, weights, x, cotangent, probe, execution=execution)
        return lax.psum(got[0], "data"), *got[1:]

    split, columns, batch = P("data", "model"), P(None, "model"), P("data")
    specs = {"in_specs": (columns, split, split), "out_specs": (columns, split, *[batch] * 3)}
    got = jax.jit(jax.shard_map(local, mesh=grid(), **specs))(weights, x, cotangent)
    whole = lambda w, z, x: 0.5 * jnp.tanh(z @ w + x)  # noqa: E731
    expected = jax.jit(functools.partial(solved, whole))(
        weights, x, cotangent, BackwardProbe.zeros(4)
    )
    assert relative_error(got[:2], expected[:2]) < 1e-12
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-3)
    np.testing.assert_array_equal(got[3], expected[3])
    np.testing.assert_array_equal(got[4], expected[4])


def test_the_scale_of_a_root_is_that_of_whole_samples():
    """Also after the same equation was traced for parts as if they were samples."""
    _, x, _ = pair()
    params = numbers(6, 6, seed=5) / 4, jnp.asarray([3.0, 3, 3, 48, 48, 48])
    options = {"solver": Picard(tol=0, max_iter=9)}

    def residual(params, z, x, gather=lambda z: z):
        weights, gain = params
        return gain * (z - x - 0.5 * jnp.tanh(gather(z) @ weights))

    gathering = functools.partial(
        residual, gather=lambda z: lax.all_gather(z, "model", axis=1, tiled=True)
    )

    def local(params, x, axis):
        execution = Execution(state_axis=axis)
        start = jnp.zeros_like(x)
        return deq_root(gathering, params, x, start, **options, execution=execution)

    split = P("data", "model")
    specs = {"in_specs": ((P(None, "model"), P("model")), split), "out_specs": split}
    by_part, got = (
        jax.shard_map(functools.partial(local, axis=axis), mesh=grid(), **specs)(params, x)
        for axis in (None, "model")
    )
    expected = deq_root(residual, params, x, jnp.zeros_like(x), **options)
    assert relative_error(got, expected) < 1e-12
    assert relative_error(by_part, expected) > 1e-3


def test_bad_state_axes():
    params, x, _ = pair()
    f = lambda w, z, x: 0.5 * jnp.tanh(z @ w[:, :6] + x)  # noqa: E731
    with pytest.raises(ValueError, match="inside your own shard_map over it"):
        solve_fixed_point(f, params["w"], x, execution=Execution(state_axis="model"))
    with pytest.raises(TypeError, match=r"Execution.state_axis must be the name of a mesh axis"):
        Execution(state_axis=3)

    def dense(w, x):
        gather = lambda w, z, x: f(w, lax.all_gather(z, "model", axis=1, tiled=True), x)  # noqa: E731
        execution = Execution(state_axis="model")
        return solve_fixed_point(gather, w, x, solver=NewtonKrylov(Dense()), execution=execution)

    specs = {"in_specs": (P(None, "model"), P(None, "model")), "out_specs": P(None, "model")}
    with pytest.raises(ValueError, match="Dense needs whole samples on each device"):
        jax.shard_map(lambda w, x: dense(w, x).value, mesh=grid(), **specs)(params["w"][:, :6], x)
