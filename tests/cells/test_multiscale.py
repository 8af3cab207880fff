"""The multiscale cell: its formula, its equilibrium and gradients, and the Lipschitz bound."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deq_jax import Anderson, Implicit, Picard
from deq_jax.cells.multiscale import WEIGHT_NORM, Lipschitz, MultiscaleCell
from deq_jax.nnx import DEQ
from tests.cells import formulas
from tests.cells.formulas import conv, group_norm, randomise, relu, weights_of
from tests.reference import relative_error


def make(channels, **options):
    """A small cell; its params have no values yet, unless there is dropout."""
    options = {"expansion": 2, "groups": 2, "param_dtype": jnp.float64} | options

    def build():
        return MultiscaleCell(channels, rngs=nnx.Rngs(0, dropout=1), **options)

    return build() if "dropout" in options else nnx.eval_shape(build)


def formula(weights, z, x, *, groups=2, lipschitz=None):
    """The cell of the class's docstring, with the names of its modules."""
    slope = 1.0 if lipschitz is None else lipschitz.slope

    def norm(y, weights, groups=groups):
        return group_norm(y, weights, groups, mean_only=lipschitz is not None)

    def act(y):
        if lipschitz is not None and lipschitz.activation == "groupsort":
            return slope * -np.sort(-y, axis=-1)
        return slope * relu(y)

    outputs = []
    for i, block in weights["blocks"].items():
        y = conv(act(norm(conv(z[i], block["conv1"]["kernel"]), block["norm1"])),
                 block["conv2"]["kernel"])  # fmt: skip
        y = norm(y + x if i == 0 else y, block["norm2"])
        y = z[i] + y if lipschitz is None else 0.5 * z[i] + 0.5 * y
        outputs.append(norm(act(y), block["norm3"]))
    results = []
    count = len(z)
    for i in range(count):
        terms = {}
        for j, path in weights["fusion"][i].items():
            y = outputs[j]
            if j > i:
                y = norm(conv(y, path["conv"]["kernel"]), path.get("norm"))
                y = y.repeat(2 ** (j - i), 1).repeat(2 ** (j - i), 2)
            else:
                for step in range(i - j):
                    y = act(y) if step else y
                    kernel = path["convs"][step]["kernel"]
                    scales = path["norms"][step] if "norms" in path else None
                    y = norm(conv(y, kernel, stride=2), scales)
            terms[j] = y
        if lipschitz is None:
            y = outputs[i] + sum(terms.values())
        else:
            likely = {j: np.exp(-(j - i)) if j > i else 1.0 for j in terms}
            total = sum(likely.values())
            y = 0.7 * outputs[i] + 0.3 * sum(likely[j] / total * terms[j] for j in terms)
        mixed = conv(act(y), weights["mixing"][i]["kernel"])
        results.append(norm(mixed, weights.get("norms", {}).get(i), groups // 2))
    return tuple(results)


def point(cell, rng, shape=(2, 4, 8)):
    x = rng.normal(size=(*shape, cell.channels[0]))
    z = tuple(rng.normal(size=leaf.shape) for leaf in cell.zeros(x))
    return z, x


@pytest.mark.parametrize(
    ("channels", "options"),
    [
        ((4, 6), {"final_affine": True, "kernel_size": (5, 3)}),
        ((2, 4, 6), {"block_affine": True}),
        ((2, 4, 6), {"lipschitz": Lipschitz()}),
        ((2, 4), {"lipschitz": Lipschitz(activation="groupsort"), "fusion_affine": False}),
    ],
)
def test_cell_is_the_formula(x64, channels, options):
    rng = np.random.default_rng(0)
    cell = randomise(make(channels, **options), rng)
    z, x = point(cell, rng)
    got = jax.jit(cell)(z, x)
    expected = formula(weights_of(cell), z, x, lipschitz=cell.lipschitz)
    for leaf, reference in zip(got, expected, strict=True):
        assert leaf.dtype == jnp.float64
        assert relative_error(leaf, reference) < 1e-10


@pytest.mark.slow
def test_values_and_gradients_of_the_equilibrium(x64):
    """With weight normalisation, against dense solves."""
    rng = np.random.default_rng(1)
    cell = randomise(make((4, 2)), rng, kernel_scale=0.5)
    layer = DEQ(
        cell,
        solver=Anderson(tol=1e-13, max_iter=300),
        gradient=Implicit(tol=1e-13, max_iter=300),
        normalization=WEIGHT_NORM,
    )
    names = sorted(layer.scale)
    assert names == sorted(
        [f"blocks/{i}/{name}/kernel" for i in (0, 1) for name in ("conv1", "conv2")]
        + [f"mixing/{i}/kernel" for i in (0, 1)]
    )
    for name in names:  # g is not ‖v‖ any more
        layer.scale[name][...] = layer.scale[name][...] * rng.uniform(0.4, 0.9)
    z, x = point(cell, rng, (1, 4, 4))
    cotangent = tuple(rng.normal(size=leaf.shape) for leaf in z)
    definition, params, rest = nnx.split(layer, nnx.Param, ...)

    @jax.jit
    def solved(params, x):
        def value(params, x):
            layer = nnx.merge(definition, params, rest, copy=True)
            z, stats = layer(x, return_stats=True)
            return sum(jnp.vdot(c, leaf) for c, leaf in zip(cotangent, z, strict=True)), (z, stats)

        return jax.grad(value, (0, 1), has_aux=True)(params, x)

    (by_params, by_x), (z_star, stats) = solved(params, x)
    assert stats.converged.all()

    def normalised(weights, z, x):
        cell = jax.tree.map(lambda leaf: leaf, weights["cell"])
        for name, g in weights["scale"].items():
            first, i, *others = name.split("/")
            holder = cell[first][int(i)]
            holder = holder[others[0]] if len(others) > 1 else holder
            kernel = holder["kernel"]
            holder["kernel"] = kernel * g / np.sqrt((kernel**2).sum((0, 1, 2)))
        return formula(cell, z, x)

    weights = weights_of(layer)
    directions = [jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), weights) for _ in range(3)]
    start = tuple(np.asarray(leaf) + 1e-3 for leaf in z_star)
    reference, by_x_reference, by_weights = formulas.implicit(
        normalised, weights, start, x, cotangent, directions
    )
    assert relative_error(formulas.flat(z_star), formulas.flat(reference)) < 1e-8
    assert relative_error(by_x, by_x_reference) < 1e-8
    gradient = jax.tree.map(np.asarray, nnx.to_pure_dict(by_params))
    got = [
        sum(jax.tree.leaves(jax.tree.map(np.vdot, gradient, direction))) for direction in directions
    ]
    assert relative_error(got, by_weights) < 1e-8


@pytest.mark.slow
def test_one_dropout_mask_for_a_solve():
    lipschitz = Lipschitz(kernel_norm=1.5)
    cell = make((4, 4), param_dtype=jnp.float32, dropout=0.5, lipschitz=lipschitz)
    layer = DEQ(cell, solver=Picard(tol=1e-6))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, 4, 4, 4)), jnp.float32)
    definition, state = nnx.split(layer)

    @jax.jit
    def solved(state):
        layer = nnx.merge(definition, state, copy=True)
        z, stats = layer(x, return_stats=True)
        return z, stats, nnx.state(layer)

    first, stats, state = solved(state)
    assert stats.converged.all()  # another mask in each evaluation would leave a residual
    second, stats, _ = solved(state)
    assert stats.converged.all()
    assert relative_error(first[0], second[0]) > 1e-4


# ---------------------------------------------------------------------------- the Lipschitz variant


def dense_jacobian(cell):
    """A jitted function of the parameters and a point of one sample: `[D, D]`."""
    definition, _, rest = nnx.split(cell, nnx.Param, ...)

    @jax.jit
    def jacobian(params, z, x):
        def f(vector):
            splits = np.cumsum([leaf.size for leaf in z])[:-1]
            parts = jnp.split(vector, splits)
            state = [part.reshape(leaf.shape) for part, leaf in zip(parts, z, strict=True)]
            out = nnx.merge(definition, params, rest, copy=True)(tuple(state), x)
            return jnp.concatenate([leaf.ravel() for leaf in out])

        return jax.jacfwd(f)(jnp.concatenate([leaf.ravel() for leaf in z]))

    return jacobian


def projector(cell, size):
    """A jitted function: the projected parameters, and the bound of these."""
    definition, _, rest = nnx.split(cell, nnx.Param, ...)

    @jax.jit
    def project(params):
        cell = nnx.merge(definition, params, rest, copy=True)
        cell.constrain(size)
        return nnx.state(cell, nnx.Param), cell.lipschitz_bound(size)

    return project


@pytest.mark.slow
def test_bound_holds_for_projected_random_weights(x64):
    rng = np.random.default_rng(4)
    cell = make((2, 2, 4), dropout=0.3, lipschitz=Lipschitz())
    jacobian, project = dense_jacobian(cell), projector(cell, (4, 8))
    largest = []
    for scale in (0.3, 3.0, 100.0):
        randomise(cell, rng, scale)
        z, x = point(cell, rng, (1, 4, 8))
        params, bound = project(nnx.state(cell, nnx.Param))
        norm = np.linalg.norm(jacobian(params, z, x), 2)
        assert norm <= bound < 1
        largest.append(norm / bound)
    assert max(largest) > 0.05  # the bound says something


@pytest.mark.slow
def test_bound_is_attained(x64):
    """Each part of J has the norm that L gives it, where all activations are open.

    Kernels are the identity at the middle tap. Biases open the activations. Dropout keeps a channel
    of each block.
    """
    rng = np.random.default_rng(5)
    options = {"expansion": 1, "dropout": 0.25, "lipschitz": Lipschitz(kernel_norm=1.5)}
    cell = randomise(make((2, 2), **options), rng)
    for path, leaf in nnx.to_flat_state(nnx.state(cell, nnx.Param)):
        if path[-1] == "kernel":
            size = leaf.shape[0]
            kernel = np.zeros(leaf.shape)
            kernel[size // 2, size // 2] = np.eye(2)
            leaf[...] = jnp.asarray(kernel)
        elif path[-1] == "bias":
            leaf[...] = jnp.full(leaf.shape, 20.0)
        else:
            leaf[...] = jnp.ones(leaf.shape)
    z, x = point(cell, rng, (1, 4, 4))
    z = tuple(leaf + 20 for leaf in z)
    jacobian = np.asarray(dense_jacobian(cell)(nnx.state(cell, nnx.Param), z, x))
    block = 0.4 * (0.5 + 0.5 * 0.4 / 0.75)
    expected = 0.4 * block * np.array([[0.7, 0.3 * 2], [0.3, 0.7]])
    fine = z[0].size
    parts = [[jacobian[:fine, :fine], jacobian[:fine, fine:]],
             [jacobian[fine:, :fine], jacobian[fine:, fine:]]]  # fmt: skip
    norms = [[np.linalg.norm(part, 2) for part in row] for row in parts]
    np.testing.assert_allclose(norms, expected)
    bound = cell.lipschitz_bound((4, 4))
    np.testing.assert_allclose(bound, np.linalg.norm(expected, 2), rtol=1e-5)


@pytest.mark.slow
def test_projection_of_matrices_guarantees_nothing(x64):
    """Smooth kernels: a matrix of norm 2, a convolution of almost 6."""
    cells = {
        projection: make((2, 2), groups=1, lipschitz=Lipschitz(projection=projection))
        for projection in ("matrix", "operator")
    }
    cell = randomise(cells["operator"], np.random.default_rng(6))
    params = nnx.state(cell, nnx.Param)
    for path, leaf in nnx.to_flat_state(params):
        if path[-1] == "kernel":
            leaf[...] = jnp.asarray(10 * np.broadcast_to(np.eye(*leaf.shape[2:]), leaf.shape))
        elif path[-1] == "bias":
            leaf[...] = jnp.full(leaf.shape, 200.0)  # opens the activations
        else:
            leaf[...] = jnp.ones(leaf.shape)
    z, x = point(cell, np.random.default_rng(6), (1, 8, 8))
    z = tuple(leaf + 200 for leaf in z)
    jacobian, norms = dense_jacobian(cell), {}
    for projection, projecting in cells.items():
        projected, bound = projector(projecting, (8, 8))(params)
        for path, leaf in nnx.to_flat_state(projected):
            if path[-1] == "kernel":
                matrix = np.asarray(leaf[...]).reshape(-1, leaf.shape[-1])
                assert np.linalg.norm(matrix, 2) < 2.0001
        norms[projection] = np.linalg.norm(jacobian(projected, z, x), 2)
        assert norms[projection] <= bound
    assert norms["operator"] < 1
    assert norms["matrix"] > 1, norms


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("channels", "options", "message"),
    [
        ((4,), {}, r"two branches or more, got \(4,\)"),
        ((4, 5), {}, r"channels=\(4, 5\) must be multiples of groups=2"),
        ((4, 4), {"kernel_size": (3, 3, 3)}, r"must be one number, or 2"),
        ((4, 4), {"kernel_size": 4}, "kernel_size=4 must be odd"),
        ((4, 4), {"dropout": 1.0}, "dropout must be finite, >= 0 and < 1, got 1.0"),
        ((4, 4), {"lipschitz": Lipschitz(kernel_norm=5.0)}, "which must be below 1"),
        ((4, 0), {}, r"each of channels=\(4, 0\) must be at least 1, got 0"),
        ((4, 4), {"groups": 0}, "groups must be at least 1, got 0"),
        ((4, 4), {"kernel_size": -1}, "kernel_size must be at least 1, got -1"),
        ((4, 4), {"expansion": 0}, "expansion must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(channels, options, message):
    with pytest.raises(ValueError, match=message):
        make(channels, **{"param_dtype": jnp.float32} | options)


@pytest.mark.parametrize("field", ["slope", "residual", "fusion", "kernel_norm"])
def test_bad_lipschitz_options_are_named(field):
    with pytest.raises(ValueError, match=field):
        Lipschitz(**{field: -1.0})


def test_bad_states_and_inputs_are_named():
    cell = randomise(make((4, 2, 2), param_dtype=jnp.float32), np.random.default_rng(0))
    with pytest.raises(
        ValueError, match=r"H and W multiples of 4 for 3 branches; got \[1, 6, 4, 4\]"
    ):
        cell.zeros(jnp.zeros((1, 6, 4, 4)))
    x = jnp.zeros((1, 4, 4, 4))
    for z, got in (
        (x, r"an array of shape \(1, 4, 4, 4\)"),
        (cell.zeros(x)[:2], r"a tuple of shapes \[\(1, 4, 4, 4\), \(1, 2, 2, 2\)\]"),
        (None, "a NoneType"),
    ):
        with pytest.raises(ValueError, match=f"{got}. Leave z0 out"):
            jax.eval_shape(cell, z, x)
    with pytest.raises(TypeError, match=r"must be Lipschitz\(...\) or None, got True"):
        make((4, 4), lipschitz=True)
    with pytest.raises(ValueError, match=r"lipschitz=Lipschitz\(\)"):
        cell.lipschitz_bound((4, 4))
    with pytest.raises(ValueError, match="projection must be one of"):
        dataclasses.replace(Lipschitz(), projection="both")
