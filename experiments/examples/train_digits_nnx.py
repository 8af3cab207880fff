"""Train a deep equilibrium classifier on real handwritten digits, in Flax NNX.

    python experiments/examples/train_digits_nnx.py

The hidden state z* solves z = tanh(W z + U x + b); a linear layer reads the class from it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from deq_jax import Anderson
from deq_jax.nnx import DEQ


class Cell(nnx.Module):
    """`tanh(W z + U x + b)`. `inject` is computed once, outside of the solver's loop."""

    def __init__(self, inputs, width, rngs):
        small = nnx.initializers.normal(0.3 / width**0.5)  # a contraction at the start
        self.recurrent = nnx.Linear(width, width, use_bias=False, kernel_init=small, rngs=rngs)
        self.input = nnx.Linear(inputs, width, rngs=rngs)

    def inject(self, x):
        return self.input(x)

    def __call__(self, z, injected):
        return nnx.tanh(self.recurrent(z) + injected)


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.equilibrium = DEQ(Cell(64, 128, rngs), solver=Anderson(tol=1e-4))
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        z, stats = self.equilibrium(x, return_stats=True)
        return self.head(z), stats


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_of(model):
        logits, stats = model(images)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, stats

    (loss, stats), gradient = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradient)
    return loss, stats


@nnx.jit
def count_correct(model, images, labels):
    return (model(images)[0].argmax(-1) == labels).sum()


def main(epochs=20, batch=64):
    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.float32) / 16  # [1797, 64]
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)

    model = Classifier(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    key = jax.random.key(0)
    for epoch in range(epochs):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), len(train_labels))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            step = train_step(model, optimizer, train_images[chosen], train_labels[chosen])
        loss, stats = step
        accuracy = int(count_correct(model, test_images, test_labels)) / len(test_labels)
        print(
            f"epoch {epoch + 1:2d}  loss {loss:.3f}  test accuracy {accuracy:.3f}  "
            f"evaluations {stats.evaluations}  largest residual {stats.residual.max():.1e}"
        )
    return accuracy


if __name__ == "__main__":
    main()
