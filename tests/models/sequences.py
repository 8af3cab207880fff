"""What tests of sequence models share: tiny models of random weights, and NumPy renderings."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_jax import Picard
from deq_jax.cells import Memory, SequenceInput, TrellisInput, TrellisState
from deq_jax.models.deq_transformer import (
    DEQTransformer,
    ExplicitTransformer,
    WeightTiedTransformer,
)
from deq_jax.models.deq_trellis import DEQTrellisNet, ExplicitTrellisNet, WeightTiedTrellisNet
from deq_jax.models.sequence import EquilibriumSequenceModel
from tests.cells import test_transformer, test_trellis
from tests.cells.test_transformer import MODERN, numbers

B, L, V = 2, 5, 7
DEPTH = 3
SOLVER = Picard(tol=1e-12, max_iter=600)
TRANSFORMER = (V, test_transformer.D, test_transformer.H, test_transformer.F)
TRELLIS = (V, test_trellis.E, test_trellis.H)

MODELS = {
    "deq_transformer": DEQTransformer,
    "tied_transformer": WeightTiedTransformer,
    "explicit_transformer": ExplicitTransformer,
    "deq_trellis": DEQTrellisNet,
    "tied_trellis": WeightTiedTrellisNet,
    "explicit_trellis": ExplicitTrellisNet,
}
TRANSFORMERS = [name for name in MODELS if name.endswith("transformer")]
UNROLLED = [name for name in MODELS if not name.startswith("deq")]
RELATIVE = {"window": 3}
ROTARY = MODERN | {"window": 3}
__all__ = ["MODERN", "numbers"]


def sizes(name):
    return TRANSFORMER if name.endswith("transformer") else TRELLIS


def make(name, *, depth=DEPTH, solver=SOLVER, dtype=jnp.float64, seed=0, remat=False, **options):
    """A model of random weights with one equilibrium: what comes in counts most."""
    own = {"solver": solver} if name.startswith("deq") else {"depth": depth, "remat": remat}

    def build():
        rngs = nnx.Rngs(seed, dropout=seed + 1)
        return MODELS[name](*sizes(name), **own, **options, param_dtype=dtype, rngs=rngs)

    # All values are drawn anew below; a random stream or a normalisation has to have its own.
    real = "dropout" in options or "normalization" in options
    model = build() if real else nnx.eval_shape(build)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        text = jax.tree_util.keystr(path)
        if "scale" in text:  # of a normalisation: some weights grow, some shrink
            return leaf * jnp.asarray(1 + 0.15 * np.tanh(rng.normal(size=leaf.shape)), dtype)
        scale = 0.3 if "bias" in text else 1 / np.sqrt(model.features)
        if "kernel" in text:
            transformer = 0.6 if "injection" in text else 0.5 if "output" in text else 0.12
            scale = transformer if name.endswith("transformer") else 0.4
        return jnp.asarray(scale * rng.normal(size=leaf.shape), dtype)

    nnx.update(model, jax.tree_util.tree_map_with_path(draw, nnx.state(model, nnx.Param)))
    return model


def cells_of(model):
    return [model.core.cell] if isinstance(model, EquilibriumSequenceModel) else list(model.cells)


def give_cell(model, source):
    """All parameters of `source`; each cell of `model` gets those of its only cell."""
    for name in ("embedding", "bias", "head"):
        if getattr(model, name) is not None:
            getattr(model, name)[...] = getattr(source, name)[...]
    for cell in cells_of(model):
        nnx.update(cell, nnx.state(cells_of(source)[0], nnx.Param))


def tokens(length=L, seed=0, batch=B):
    drawn = np.random.default_rng([seed, length]).integers(V, size=(batch, length))
    return jnp.asarray(drawn, jnp.int32)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(definition, options, state, inputs):
    return nnx.merge(definition, state, copy=True)(inputs, **dict(options))


def call(model, inputs, **options):
    """`model(inputs)`, compiled; the model stays as it is."""
    definition, state = nnx.split(model)
    return _call(definition, tuple(options.items()), state, inputs)


def whole(name, options):
    """The cell's formula in NumPy, `f(weights, state, embedding)`, for all of a sequence."""
    if name.endswith("trellis"):
        rest = {key: value for key, value in options.items() if key == "dilation"}
        return lambda weights, z, e, **more: test_trellis.formula(
            weights, z, TrellisInput(e), **rest, **more
        )
    return lambda weights, z, e, **more: test_transformer.formula(
        weights, z, SequenceInput(e), **options, **more
    )


def zero_state(name, embedding):
    if name.endswith("transformer"):
        return np.zeros_like(embedding)
    h = np.zeros((*embedding.shape[:2], test_trellis.H))
    return TrellisState(h, h)


def read_out(name, z, options, xp=np):
    """What the head is given of a state."""
    if name.endswith("trellis"):
        return z.h[..., -test_trellis.E :]
    if options.get("norm_order") != "pre":
        return z
    if options.get("norm", "layer") == "layer":
        z = z - z.mean(-1, keepdims=True) if xp is np else z - xp.mean(z, -1, keepdims=True)
    return z / xp.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)


def by_numpy(name, model, inputs, options, masks=None):
    """Logits of the whole network in NumPy, float64."""
    weights = numbers(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    f = whole(name, options)
    e = weights["embedding"][np.asarray(inputs)] * np.sqrt(model.features)
    z = zero_state(name, e)
    if name.startswith("deq"):
        for _ in range(600):
            old, z = z, f(weights["core"]["cell"], z, e)
            if max(np.abs(a - b).max() for a, b in zip(z, old, strict=True)) < 1e-13:
                break
    else:
        for index in range(model.depth):
            z = f(weights["cells"][index if name.startswith("explicit") else 0], z, e)
    head = weights.get("head", weights["embedding"])
    return read_out(name, z, options) @ head.T + weights["bias"]


__all__ += ["Memory"]
