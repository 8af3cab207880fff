"""The cell of positive concave deep equilibrium networks (pcDEQ)."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from deq_jax.checks import check_count
from deq_jax.partitioning import logical_axes

PyTree = Any
Activation = Literal["tanh", "softsign", "relu6", "sigmoid"]

_ACTIVATIONS = {
    "tanh": jnp.tanh,
    "softsign": nnx.soft_sign,
    "relu6": nnx.relu6,
    "sigmoid": nnx.sigmoid,
}
_LARGEST = {"tanh": 1.0, "softsign": 1.0, "relu6": 6.0, "sigmoid": 1.0}
_SHARPNESS = 5.0


class ConcaveCell(nnx.Module):
    """One layer with non-negative weights and an activation that is concave where it is used.

    The cell and its injection are

        f(z, c) = σ(W z + c),                    W >= 0
        c = softplus(5 x) / 5    where σ is tanh, softsign or relu6     (pcDEQ-1)
        c = relu(x)              where σ is the logistic sigmoid        (pcDEQ-2)

    with z and x `[B, ..., features]`. W is dense, or a convolution over the two axes before the
    last, padded with zeros to keep their lengths. It has no bias.

    For `z >= 0` this f is monotone, concave, bounded and positive: `f(z) >= f(0) > 0`. Such a map
    has exactly one fixed point z* with `z* >= 0`, which Picard iteration finds from every start
    `z >= 0`. (With pcDEQ-1 there may be others that have negative entries.) From zero it rises to
    z*, and its error shrinks by a known factor, which `rate` returns:

        0 <= z* - z_k <= r^k z*,    r = 1 - min_i f(0)_i / f(b)_i < 1

    where b is the largest value of σ. The spectral radius of `∂f/∂z` at z* is at most r as well,
    so that Picard iteration solves the backward pass too. (Let `ℓ = 1 - r`. By concavity
    `f(λz) >= λ f(z) + (1 - λ) f(0) >= (λ + (1 - λ) ℓ) f(z)` for λ in [0, 1]. So if `z_k >= λ z*`
    then `z_{k+1} >= (1 - r (1 - λ)) z*`. And `∂f/∂z z* <= f(z*) - f(0) <= r z*`.)

    All of this needs `W >= 0`, which an optimiser does not keep. After each of its steps, `project`
    sets what is negative to zero:

        params["layer"] = ConcaveCell.project(params["layer"])

    The kernel starts uniform on `[0, 0.01 / √(2 features))`.

    ```python
    import jax.numpy as jnp
    from deq_jax import Picard
    from deq_jax.cells import ConcaveCell
    from deq_jax.nnx import DEQ
    from flax import nnx

    cell = ConcaveCell(16, rngs=nnx.Rngs(0))
    z = DEQ(cell, solver=Picard())(jnp.ones((4, 16)))  # [4, 16]
    ```

    Source: Gabor, Piotrowski, Cavalcante, "Positive concave deep equilibrium models",
    arXiv:2402.04029. The factor r is ours.

    Args:
        features: size of the last axis of z and x.
        kernel_size: side of the convolution's kernel; None for a dense W.
        activation: σ.
        param_dtype: dtype of the parameters.
        rngs: stream `params`.

    Raises:
        ValueError: `activation` is none of the four, or a size is not positive.
    """

    def __init__(
        self,
        features: int,
        *,
        kernel_size: int | None = None,
        activation: Activation = "tanh",
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}"
            )
        self.activation, self.features, self.kernel_size = activation, features, kernel_size
        check_count(self, "features")
        if kernel_size is not None:
            check_count(self, "kernel_size")
        largest = 0.01 / (2 * features) ** 0.5
        options: dict[str, Any] = {
            "use_bias": False,
            "kernel_init": nnx.initializers.uniform(largest),
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.weight: nnx.Linear | nnx.Conv
        if kernel_size is None:
            names = logical_axes("embed", "mlp")
            self.weight = nnx.Linear(features, features, kernel_metadata=names, **options)
        else:
            names = logical_axes(None, None, None, "channels")
            window = (kernel_size, kernel_size)
            self.weight = nnx.Conv(features, features, window, kernel_metadata=names, **options)

    def inject(self, x: jax.Array) -> jax.Array:
        """c, like x: the positive part of the input, at least 2⁻⁶⁴ where the class says softplus.

        Raises:
            ValueError: x has another width than the cell.
        """
        if x.shape[-1] != self.features:
            raise ValueError(f"x must be [B, ..., {self.features}], got {list(x.shape)}")
        if self.activation == "sigmoid":
            return nnx.relu(x)
        # Rounded to zero, it would make a fixed point of zero. And where a solve begins with far
        # less than this and ends at 1, the squares of one of them are out of range.
        least = max(float(jnp.finfo(x.dtype).tiny), 2.0**-64)
        return jnp.maximum(nnx.softplus(_SHARPNESS * x) / _SHARPNESS, least)

    def __call__(self, z: jax.Array, injection: jax.Array) -> jax.Array:
        """One application, `[B, ..., features]`."""
        return _ACTIVATIONS[self.activation](self.weight(z) + injection)

    def rate(self, injection: jax.Array) -> jax.Array:
        """The factor r of the class's description for each sample, `[B]`; NaN if W has negatives.

        It is that of the cell's own kernel. In a layer with a normalisation the cell is
        `layer.effective_cell()`.

        Args:
            injection: what `inject` returned.
        """
        largest = jnp.full_like(injection, _LARGEST[self.activation])
        least, most = self(jnp.zeros_like(injection), injection), self(largest, injection)
        rate = 1 - (least / most).reshape(len(injection), -1).min(1)
        return jnp.where(jnp.all(self.weight.kernel[...] >= 0), rate, jnp.nan)

    @staticmethod
    def project(params: PyTree) -> PyTree:
        """Sets all that is negative to zero.

        Args:
            params: the parameters of the cell, or of the layer around it, with the gains of a
                `WeightNorm`, if it has such.

        Returns:
            A pytree like `params`.
        """
        return jax.tree.map(lambda leaf: jnp.maximum(leaf, 0), params)
