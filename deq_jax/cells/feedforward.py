"""The feed-forward cell, the plainest of equilibrium models."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.partitioning import logical_axes


class FeedForwardCell(nnx.Module):
    """`f(z, x) = tanh(W z + U x + b)`, z `[B, ..., features]`, x `[B, ..., in_features]`.

    `U x + b` depends on the input alone: it is the injection, which a DEQ layer computes once.

    W starts as N(0, (scale / √features)²), whose spectral radius is about `scale`; below 1 that
    makes a cell that contracts, since tanh has slopes of at most 1.

    Source: "Deep Implicit Layers", ch. 4; Bai, Kolter and Koltun, 2019.

    Args:
        in_features: width of x.
        features: width of the state.
        scale: see above.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.
    """

    def __init__(
        self,
        in_features: int,
        features: int,
        *,
        scale: float = 0.5,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        options["kernel_metadata"] = logical_axes("embed", "mlp")
        self.recurrent = nnx.Linear(
            features,
            features,
            use_bias=False,
            kernel_init=nnx.initializers.variance_scaling(scale**2, "fan_in", "normal"),
            **options,
        )
        self.input = nnx.Linear(in_features, features, **options)

    def inject(self, x: jax.Array) -> jax.Array:
        """`U x + b`, `[B, ..., features]`."""
        return self.input(x)

    def __call__(self, z: jax.Array, injection: jax.Array) -> jax.Array:
        """`tanh(W z + injection)`."""
        return jnp.tanh(self.recurrent(z) + injection)
