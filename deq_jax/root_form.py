"""An equation in root form, `0 = F(params, z, x)`, as a fixed-point equation.

    z = f(params, z, x) = z - s F(params, z, x),        I - ∂f/∂z = s ∂F/∂z

Every solver and every gradient policy of the library works with f, and the implicit function
theorem for f is the one for F: the number s cancels.

s is one number for each sample, and it makes the unit and the sign of F arbitrary. With J = ∂F/∂z
at the start and a random vector v of signs,

    |s| = ‖v‖ / ‖J v‖, rounded to a power of two,        sign s = sign ⟨v, J v⟩.

‖s F(z)‖ is then an estimate of the length of the step from z to the root, in the unit of z, and the
relative residual `‖s F(z)‖ / ‖z - s F(z)‖` an estimate of the relative error of z. Without s, an F
in a large unit would throw Picard's and Anderson's iterates far away, an F in a small one would
count as solved at once, and `u - (u - Jᵀ u)` in the backward pass would lose the digits of Jᵀ u.
The sign of s points downhill where F is the gradient of a convex function or an elliptic operator,
or the negative of one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from deq_jax import _compat, checks, tree
from deq_jax.closure import Cell, Closure, add_batch_axis, close

PyTree = Any


@dataclasses.dataclass(frozen=True)
class RootForm:
    """`(params, z, (x, s)) -> z - s F(params, z, x)`, a cell.

    Attributes:
        function: F; it returns the structure, shapes and dtypes of z.
    """

    function: Cell

    def __call__(self, params: PyTree, z: PyTree, x_and_scale: tuple[PyTree, jax.Array]) -> PyTree:
        """`z - s F(params, z, x)`."""
        x, scale = x_and_scale
        return tree.subtract(z, tree.scale(scale, self.value(params, z, x)))

    def value(self, params: PyTree, z: PyTree, x: PyTree) -> PyTree:
        """`F(params, z, x)`.

        Raises:
            ValueError: it is not like z.
        """
        value = self.function(params, z, x)
        remedy = "; cast what F returns, or start from a z of that dtype"
        checks.check_same_form("F must return", "z", value, z, remedy)
        return value

    def input_with_scale(
        self, params: PyTree, x: PyTree, z: PyTree, *, batched: bool, **options: Any
    ) -> tuple[PyTree, jax.Array]:
        """`(x, s)`, with s `[B]`, or `[]` with `batched=False`, from ∂F/∂z at `z`.

        Args:
            params: as for F.
            x: as for F.
            z: the start, leaves `[B, ...]`.
            batched: axis 0 is the batch.
            **options: more arguments of `close`.
        """
        closed = close(self.value, params, x, z, batched=batched, **options)
        return x, _scale_compiled(closed, z, batched)


def _scale(f: Closure, z: PyTree, batched: bool) -> jax.Array:
    """The number s of each sample, where `f` is F as a function of z alone."""

    def estimate(f: Closure, z: PyTree) -> jax.Array:
        f, z = lax.stop_gradient((f, z))
        z = z if batched else add_batch_axis(z)
        z = tree.vary_over(z, f.state_axes)
        v = _signs(z)
        _, product = f.linearize(z)
        scale = _signed_ratio(v, product(v))
        return scale if batched else scale[0]

    if _compat.explicit_axes():  # as in a solve
        specs = [jax.typeof(leaf).sharding.spec for leaf in jax.tree.leaves(z)]
        batch = next((spec[0] for spec in specs if batched and spec and spec[0]), None)
        spread: Any = jax.sharding.auto_axes(estimate, out_sharding=P(batch) if batched else P())
        return spread(f, z)
    return estimate(f, z)


_scale_compiled = jax.jit(_scale, static_argnames=("batched",))


def _signed_ratio(v: PyTree, image: PyTree) -> jax.Array:
    """`‖v‖ / ‖J v‖` as a power of two, with the sign of `⟨v, J v⟩`; 1 without a usable J v."""
    # Of a J v of unit size, so that no inner product overflows or vanishes.
    largest = tree.largest(image)
    usable = jnp.isfinite(largest) & (largest > 0)
    _, exponent = jnp.frexp(jnp.where(usable, largest, 1))
    image = tree.scale(tree.power_of_two(-exponent, largest.dtype), image)
    size = jnp.where(usable, tree.norm(image), 1)
    ratio = jnp.round(jnp.log2(tree.norm(v) / size)).astype(exponent.dtype)
    magnitude = tree.power_of_two(ratio - exponent, size.dtype)
    sign = jnp.where(tree.dot(v, image) < 0, -1, 1).astype(size.dtype)
    return jnp.where(usable, sign * magnitude, 1)


def _signs(z: PyTree) -> PyTree:
    """A pytree like `z` of random signs, the same for every sample and in every call."""
    leaves, structure = jax.tree.flatten(z)
    axes = tree.varying_axes(z)

    def like(leaf: jax.Array, number: int) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), number)
        signs = jax.random.rademacher(key, (1, *leaf.shape[1:]), leaf.real.dtype)
        return jnp.zeros_like(leaf) + tree.vary_over(signs, axes).astype(leaf.dtype)

    return jax.tree.unflatten(structure, map(like, leaves, range(len(leaves))))
