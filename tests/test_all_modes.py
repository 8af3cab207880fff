"""Forward, reverse and mixed derivatives of the layer against a loop of 400 steps, float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    Picard,
    Unrolled,
    deq_fixed_point,
)
from tests.reference import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("x64")]

TIGHT = {"tol": 1e-13, "max_iter": 200}
CHOICES = {
    "Picard": (Picard(**TIGHT), Implicit()),
    "Anderson, GMRES": (Anderson(**TIGHT), Implicit(GMRES(**TIGHT))),
    "Newton, BiCGStab": (NewtonKrylov(tol=1e-13), Implicit(BiCGStab(**TIGHT))),
    "Picard, Newton": (Picard(**TIGHT), Implicit(NewtonKrylov(tol=1e-13))),
    "SHINE, refined": (Broyden(**TIGHT), Implicit(reuse=True)),
    "Unrolled": (Picard(tol=1e-14, max_iter=60), Unrolled()),
}


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape))


def layer(choice, f, params, x, z0, **options):
    solver, policy = CHOICES[choice]
    return deq_fixed_point(f, params, x, z0, solver=solver, gradient=policy, **options)


def unrolled(f, params, x, z0):
    """The equilibrium by plain iteration, differentiable by ordinary rules in any mode."""
    return jax.lax.scan(lambda z, _: (f(params, z, x), None), z0, length=400)[0]


# One problem: params and x are passed, the bias is closed over. `solve` is the layer or the loop.


def inputs():
    return {
        "W": normal(3, 3, scale=0.25),
        "x": normal(2, 3, seed=1),
        "bias": normal(3, seed=2, scale=0.5),
    }


def equilibrium(solve, inputs):
    def f(W, z, x):
        return jnp.tanh(z @ W.T + x) + 0.1 * jnp.sin(inputs["bias"] * z)

    return solve(f, inputs["W"], inputs["x"], jnp.zeros_like(inputs["x"]))


def loss(solve, inputs):
    return (equilibrium(solve, inputs) ** 3).sum()


def direction(seed=5):
    return jax.tree.map(lambda leaf: normal(*leaf.shape, seed=seed), inputs())


def slope(function):
    """The derivative of a scalar function along a fixed direction, forwards."""
    return lambda inputs: jax.jvp(function, (inputs,), (direction(),))[1]


MODES = {
    "jvp": lambda solve: (
        lambda a: jax.jvp(functools.partial(equilibrium, solve), (a,), (direction(),))
    ),
    "linearize": lambda solve: (
        lambda a: jax.linearize(functools.partial(equilibrium, solve), a)[1](direction())
    ),
    "jacfwd": lambda solve: jax.jacfwd(functools.partial(equilibrium, solve)),
    "jacrev": lambda solve: jax.jacrev(functools.partial(equilibrium, solve)),
    "hessian": lambda solve: jax.hessian(functools.partial(loss, solve)),
    "grad of grad": lambda solve: jax.jacrev(jax.grad(functools.partial(loss, solve))),
    "forward over reverse": lambda solve: (
        lambda a: jax.jvp(jax.grad(functools.partial(loss, solve)), (a,), (direction(),))
    ),
    "reverse over forward": lambda solve: jax.grad(slope(functools.partial(loss, solve))),
    "forward over forward": lambda solve: slope(slope(functools.partial(loss, solve))),
    "reverse over reverse": lambda solve: jax.grad(
        lambda a: sum(
            jnp.sin(leaf).sum()
            for leaf in jax.tree.leaves(jax.grad(functools.partial(loss, solve))(a))
        )
    ),
}


@functools.lru_cache
def expected(mode):
    return jax.jit(MODES[mode](unrolled))(inputs())


EVERY_MODE = [("Picard", mode) for mode in MODES]
# Elsewhere the modes of which the others are made.
SOME_MODES = [
    (choice, mode) for choice in list(CHOICES)[1:] for mode in ("jvp", "reverse over reverse")
]


@pytest.mark.museum(
    "torchdeq T14: compilation, vmap, functional gradients, jacrev and jvp all failed"
)
@pytest.mark.museum(
    "jaxopt J3 (google/jaxopt#474): jvp and jax.hessian were a TypeError, since custom_vjp has no"
    " forward mode"
)
@pytest.mark.museum("JAX, custom_vjp: custom_vjp blocks jvp, and with it forward over reverse")
@pytest.mark.parametrize(("choice", "mode"), EVERY_MODE + SOME_MODES)
def test_every_mode_agrees_with_the_loop(choice, mode):
    got = jax.jit(MODES[mode](functools.partial(layer, choice)))(inputs())
    assert relative_error(got, expected(mode)) < 1e-9


def test_without_jit():
    got = MODES["reverse over forward"](functools.partial(layer, "Picard"))(inputs())
    assert relative_error(got, expected("reverse over forward")) < 1e-9


def test_hessian_with_a_probe():
    def probed(inputs, probe):
        solve = functools.partial(layer, "Picard", backward_probe=probe)
        return loss(solve, inputs)

    probe = BackwardProbe.zeros(2)
    got = jax.jit(jax.hessian(probed))(inputs(), probe)
    assert relative_error(got, expected("hessian")) < 1e-9


@pytest.mark.museum(
    "locuslab/deq#12, #15, #24: the backward hook had to remove itself: without that a run hung, "
    "with it some crashed"
)
def test_a_linearisation_and_a_pullback_serve_twice():
    """One forward pass: `vjp` and `linearize` keep what they need for any number of calls."""
    function = functools.partial(equilibrium, functools.partial(layer, "Picard"))
    jacobian = expected("jacrev")
    value, pullback = jax.vjp(function, inputs())
    _, push = jax.linearize(function, inputs())
    for seed in (7, 8):
        y, along = normal(2, 3, seed=seed), direction(seed)
        rows = jax.tree.map(lambda leaf: jnp.tensordot(y, leaf, 2), jacobian)
        assert relative_error(pullback(y)[0], rows) < 1e-9
        moved = jax.tree.map(lambda j, d: jnp.tensordot(j, d, d.ndim), jacobian, along)
        assert relative_error(push(along), sum(moved.values())) < 1e-9
    assert relative_error(value, expected("jvp")[0]) < 1e-12


# A state of several leaves.


def tree_inputs():
    return {
        "a": {"W": normal(3, 3, scale=0.3), "u": normal(3, seed=3)},
        "x": normal(2, 3, seed=1),
    }


def tree_equilibrium(solve, inputs, dtype=jnp.float64):
    """Leaf `still` depends on no input at all, `late` on them only through the others."""

    extra = {"key": jax.random.key(0), "shift": jnp.asarray(1), "flag": jnp.asarray(True)}

    def f(params, z, x):
        noise = jax.random.normal(params["key"], (3,), jnp.float64)
        fast = z["fast"].astype(jnp.float64)
        out = jnp.tanh(jnp.roll(fast, params["shift"], 1) @ params["W"] + x + 0.1 * noise)
        out = 0.8 * jnp.where(params["flag"], out, jnp.nan) + 0.1 * z["still"][:, :1]
        return {
            "fast": out.astype(dtype),
            "late": 0.3 * z["late"] + 0.2 * fast[:, None, :2] ** 2,
            "still": 0.5 * jnp.cos(z["still"]),
            "used": 0.5 * jnp.sin(z["used"]) + 0.1 * params["u"] * fast,
        }

    z0 = {
        "fast": jnp.zeros((2, 3), dtype),
        "late": jnp.zeros((2, 1, 2)),
        "still": jnp.zeros((2, 4)),
        "used": jnp.zeros((2, 3)),
    }
    return solve(f, inputs["a"] | extra, inputs["x"], z0)


def tree_loss(solve, inputs, **options):
    z = tree_equilibrium(solve, inputs, **options)
    return sum((leaf.astype(jnp.float64) ** 3).sum() for leaf in jax.tree.leaves(z))


TREE_MODES = {
    "jvp": lambda solve, **options: (
        lambda a: jax.jvp(
            functools.partial(tree_equilibrium, solve, **options),
            (a,),
            (jax.tree.map(lambda leaf: normal(*leaf.shape, seed=5), a),),
        )[1]
    ),
    "grad": lambda solve, **options: jax.grad(functools.partial(tree_loss, solve, **options)),
    "grad of grad": lambda solve, **options: jax.jacrev(
        jax.grad(functools.partial(tree_loss, solve, **options))
    ),
    # Only W is differentiated: `still` and x are constants to it.
    "of one input": lambda solve, **options: (
        lambda a: jax.hessian(
            lambda W: tree_loss(solve, {**a, "a": {**a["a"], "W": W}}, **options)
        )(a["a"]["W"])
    ),
    # Cotangents reach only a leaf that depends on no input: a zero of the right shape.
    "of the still leaf": lambda solve, **options: jax.grad(
        lambda a: (tree_equilibrium(solve, a, **options)["still"] ** 2).sum()
    ),
}


@functools.lru_cache
def tree_expected(mode):
    return jax.jit(TREE_MODES[mode](unrolled))(tree_inputs())


@pytest.mark.museum(
    "JAX, custom_root (jax#10929): a leaf of the state that no differentiated input reaches: a "
    "bare AssertionError"
)
@pytest.mark.parametrize(
    ("choice", "mode"),
    [("Picard", mode) for mode in TREE_MODES] + [("Anderson, GMRES", "grad")],
)
def test_pytrees_with_leaves_that_nothing_differentiated_reaches(choice, mode):
    got = jax.jit(TREE_MODES[mode](functools.partial(layer, choice)))(tree_inputs())
    if mode == "of the still leaf":
        assert all((leaf == 0).all() for leaf in jax.tree.leaves((got, tree_expected(mode))))
    else:
        assert relative_error(got, tree_expected(mode)) < 1e-9


@pytest.mark.parametrize("mode", ["jvp", "grad"])
def test_leaves_of_two_precisions(mode):
    solver = Picard(tol=1e-7, max_iter=100)

    def solve(f, params, x, z0):
        return deq_fixed_point(f, params, x, z0, solver=solver)

    got = jax.jit(TREE_MODES[mode](solve, dtype=jnp.float32))(tree_inputs())
    if mode == "jvp":
        assert [got[name].dtype for name in ("fast", "late")] == [jnp.float32, jnp.float64]
    got = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), got)
    assert relative_error(got, tree_expected(mode)) < 1e-5


# Combinations with other transformations.


def stacked_inputs(over):
    """Three problems; the parts not in `over` are the same in all and are not mapped."""
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf, -leaf]), inputs())
    picked = {name: (several if name in over else inputs())[name] for name in several}
    return picked, {name: 0 if name in over else None for name in picked}


@pytest.mark.parametrize(
    ("over", "mode"),
    [(("x",), "jvp"), (("W", "x", "bias"), "forward over reverse")],
)
def test_vmap_over_inputs(over, mode):
    mapped, axes = stacked_inputs(over)
    got = jax.jit(jax.vmap(MODES[mode](functools.partial(layer, "Picard")), (axes,)))(mapped)
    single = jax.jit(MODES[mode](unrolled))
    for i in range(3):
        one = {name: leaf[i] if name in over else leaf for name, leaf in mapped.items()}
        picked = jax.tree.map(lambda leaf: leaf[i], got)
        assert relative_error(picked, single(one)) < 1e-9


@pytest.mark.museum(
    "torchdeq T14: compilation, vmap, functional gradients, jacrev and jvp all failed"
)
def test_vmap_of_directions():
    """Several tangents and cotangents through one solution."""
    function = functools.partial(equilibrium, functools.partial(layer, "Anderson, GMRES"))
    several = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(direction, (5, 6, 7)))
    got = jax.jit(jax.vmap(lambda d: jax.jvp(function, (inputs(),), (d,))[1]))(several)
    jacobian = expected("jacrev")
    for i, seed in enumerate((5, 6, 7)):
        moved = jax.tree.map(lambda j, d: jnp.tensordot(j, d, d.ndim), jacobian, direction(seed))
        assert relative_error(got[i], sum(moved.values())) < 1e-9


@pytest.mark.parametrize("mode", ["reverse over reverse"])
def test_second_derivatives_of_a_checkpointed_layer(mode):
    def solve(*args):
        return layer("Picard", *args)

    def checkpointed(f, params, x, z0):
        return jax.checkpoint(functools.partial(solve, f))(params, x, z0)

    got = jax.jit(MODES[mode](checkpointed))(inputs())
    assert relative_error(got, expected(mode)) < 1e-9


def recurrence(solve, inputs):
    """Three steps of time; each starts at the last equilibrium and takes it as input, too."""

    def f(W, z, x):
        return jnp.tanh(z @ W.T + x)

    def advance(z, x):
        z = solve(f, inputs["W"], x + inputs["bias"] * z, z)
        return z, z

    steps = jnp.stack([inputs["x"], 0.5 * inputs["x"], -inputs["x"]])
    return (jax.lax.scan(advance, jnp.zeros_like(inputs["x"]), steps)[1] ** 2).sum()


@functools.lru_cache
def expected_of_recurrence():
    return jax.jit(jax.grad(functools.partial(recurrence, unrolled)))(inputs())


@pytest.mark.parametrize("choice", ["SHINE, refined", "Unrolled"])
def test_scan_over_time_with_warm_starts(choice):
    solve = functools.partial(layer, choice)
    got = jax.jit(jax.grad(functools.partial(recurrence, solve)))(inputs())
    assert relative_error(got, expected_of_recurrence()) < 1e-9


def test_forward_mode_through_scan_over_time():
    got = jax.jit(slope(functools.partial(recurrence, functools.partial(layer, "Picard"))))(
        inputs()
    )
    products = jax.tree.map(jnp.vdot, expected_of_recurrence(), direction())
    np.testing.assert_allclose(got, sum(products.values()), rtol=1e-9)


@pytest.mark.parametrize("policy", [Neumann(3), Unrolled()], ids=["Neumann", "Unrolled"])
def test_two_forward_passes_before_one_backward_pass(policy):
    """A siamese loss: the gradient is the sum of those of the branches, each at its own state."""
    solve = functools.partial(
        deq_fixed_point, solver=Picard(tol=1e-14, max_iter=60), gradient=policy
    )
    left, right = inputs(), inputs() | {"x": normal(2, 3, seed=11)}
    y = normal(2, 3, seed=12)

    def siamese(left, right):
        return jnp.vdot(y, (equilibrium(solve, left) - equilibrium(solve, right)) ** 2)

    got = jax.jit(jax.grad(siamese, argnums=(0, 1)))(left, right)

    a, b = (jax.jit(functools.partial(equilibrium, unrolled))(given) for given in (left, right))
    if policy == Unrolled():
        branch = functools.partial(equilibrium, unrolled)
    else:  # three explicit steps from the state, which are the series there

        def branch(given):
            z = jax.lax.stop_gradient(equilibrium(unrolled, given))
            steps = lambda f, W, x, z: f(W, f(W, f(W, z, x), x), x)  # noqa: E731
            return equilibrium(lambda f, W, x, _: steps(f, W, x, z), given)

    pulled = jax.jit(jax.grad(lambda given, u: jnp.vdot(u, branch(given))))
    u = 2 * y * (a - b)
    assert relative_error(got, (pulled(left, u), pulled(right, -u))) < 1e-9


# Cells with a derivative of their own.


@jax.custom_vjp
def softened(v):
    return jnp.tanh(v)


softened.defvjp(lambda v: (jnp.tanh(v),) * 2, lambda t, cotangent: ((1 - t**2) * cotangent,))


def with_activation(activation, solve, inputs):
    def f(W, z, x):
        return activation(z @ W.T + x + inputs["bias"])

    return (solve(f, inputs["W"], inputs["x"], jnp.zeros_like(inputs["x"])) ** 3).sum()


@functools.lru_cache
def expected_with_tanh():
    return jax.jit(jax.grad(functools.partial(with_activation, jnp.tanh, unrolled)))(inputs())


@pytest.mark.parametrize("choice", ["Anderson, GMRES", "SHINE, refined", "Unrolled"])
def test_reverse_mode_of_a_cell_with_a_reverse_rule_only(choice):
    total = functools.partial(with_activation, softened, functools.partial(layer, choice))
    assert relative_error(jax.jit(jax.grad(total))(inputs()), expected_with_tanh()) < 1e-9


@pytest.mark.parametrize(
    "choice",
    [
        "Picard",
        "Unrolled",
    ],
)
def test_vmap_of_a_cell_with_a_reverse_rule_only(choice):
    total = functools.partial(with_activation, softened, functools.partial(layer, choice))
    got = jax.vmap(jax.grad(total))(jax.tree.map(lambda leaf: leaf[None], inputs()))
    got = jax.tree.map(lambda leaf: leaf[0], got)
    assert relative_error(got, expected_with_tanh()) < 1e-9
