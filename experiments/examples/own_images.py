"""Train a convolutional deep equilibrium network on your own images, in one folder per class.

    python experiments/examples/own_images.py FOLDER      # FOLDER/<class>/<image>.png or .jpg

All images are resized to SIZE x SIZE; a fifth of each class, chosen at random, is the test set.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image
from sklearn.model_selection import train_test_split

from deq_jax import Anderson
from deq_jax.cells import ResNetCell
from deq_jax.nnx import DEQ

SIZE = 32
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def read_folder(folder):
    """Images `[N, SIZE, SIZE, 3]` in [-1, 1], labels `[N]`, and the names of the classes."""
    classes = sorted(path.name for path in pathlib.Path(folder).iterdir() if path.is_dir())
    images, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted(pathlib.Path(folder, name).iterdir()):
            if path.suffix.lower() in SUFFIXES:
                image = Image.open(path).convert("RGB").resize((SIZE, SIZE))
                images.append(np.asarray(image, np.float32) / 127.5 - 1)
                labels.append(label)
    if len(set(labels)) < 2:
        sys.exit(f"{folder} must have at least two folders with images, got {classes}")
    return np.stack(images), np.array(labels), classes


class Network(nnx.Module):
    """Convolution, equilibrium of a residual cell, average pool, linear layer."""

    def __init__(self, classes, channels=16, *, rngs):
        self.stem = nnx.Conv(3, channels, (3, 3), strides=2, rngs=rngs)
        cell = ResNetCell(channels, 2 * channels, rngs=rngs)
        self.equilibrium = DEQ(cell, solver=Anderson(tol=1e-3, max_iter=25))
        self.head = nnx.Linear((SIZE // 8) ** 2 * channels, classes, rngs=rngs)

    def __call__(self, images):
        z, stats = self.equilibrium(self.stem(images), return_stats=True)
        pooled = nnx.avg_pool(z, (4, 4), strides=(4, 4))
        return self.head(pooled.reshape(len(images), -1)), stats


@nnx.jit
def train_step(model, optimizer, images, labels):
    def loss_of(model):
        logits, stats = model(images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats

    (loss, stats), gradient = nnx.value_and_grad(loss_of, has_aux=True)(model)
    optimizer.update(model, gradient)
    return loss, stats


@nnx.jit
def classify(model, images):
    return model(images)[0].argmax(-1)


def main(folder, epochs=10, batch=32):
    images, labels, classes = read_folder(folder)
    print(f"{len(images)} images of {len(classes)} classes: {', '.join(classes)}")
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = parts
    batch = min(batch, len(train_images))

    model = Network(len(classes), rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    for epoch in range(epochs):
        order = np.asarray(jax.random.permutation(jax.random.key(epoch), len(train_images)))
        for start in range(0, len(order) - batch + 1, batch):
            chosen = order[start : start + batch]
            step = train_step(model, optimizer, train_images[chosen], train_labels[chosen])
        loss, stats = step
        accuracy = float(jnp.mean(classify(model, test_images) == test_labels))
        print(
            f"epoch {epoch + 1:2d}  loss {loss:.3f}  test accuracy {accuracy:.3f}  "
            f"evaluations {stats.evaluations}  converged {stats.converged.mean():.0%}"
        )
    return accuracy


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
