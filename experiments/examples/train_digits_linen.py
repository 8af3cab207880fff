"""Train a deep equilibrium classifier on real handwritten digits, in Flax Linen.

    python experiments/examples/train_digits_linen.py

The hidden state z* solves z = tanh(W z + U x + b); a linear layer reads the class from it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from deq_jax import Anderson
from deq_jax.linen import DEQ


class Cell(nn.Module):
    """`tanh(W z + U x + b)`. The injection `U x + b` is what the layer is given as x."""

    width: int

    @nn.compact
    def __call__(self, z, injected):
        small = nn.initializers.normal(0.3 / self.width**0.5)  # a contraction at the start
        return nn.tanh(nn.Dense(self.width, use_bias=False, kernel_init=small)(z) + injected)


class Classifier(nn.Module):
    width: int = 128

    @nn.compact
    def __call__(self, x):
        injected = nn.Dense(self.width)(x)
        z, stats = DEQ(Cell(self.width), solver=Anderson(tol=1e-4))(injected, return_stats=True)
        return nn.Dense(10)(z), stats


MODEL = Classifier()
OPTIMIZER = optax.adam(1e-3)


@jax.jit
def train_step(params, state, images, labels):
    def loss_of(params):
        logits, stats = MODEL.apply(params, images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, stats

    (loss, stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
    updates, state = OPTIMIZER.update(gradient, state)
    return optax.apply_updates(params, updates), state, loss, stats


@jax.jit
def count_correct(params, images, labels):
    return (MODEL.apply(params, images)[0].argmax(-1) == labels).sum()


def main(epochs=20, batch=64):
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16  # [1797, 64]
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)

    key = jax.random.key(0)
    params = MODEL.init(key, train_images[:batch])
    state = OPTIMIZER.init(params)
    permuted = functools.partial(jax.random.permutation, x=len(train_labels))
    for epoch in range(epochs):
        order = permuted(jax.random.fold_in(key, epoch))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            params, state, loss, stats = train_step(
                params, state, train_images[chosen], train_labels[chosen]
            )
        accuracy = int(count_correct(params, test_images, test_labels)) / len(test_labels)
        print(
            f"epoch {epoch + 1:2d}  loss {loss:.3f}  test accuracy {accuracy:.3f}  "
            f"evaluations {stats.evaluations}  largest residual {stats.residual.max():.1e}"
        )
    return accuracy


if __name__ == "__main__":
    main()
