"""Train a deep equilibrium Transformer on the characters of your own text file, and let it write.

    python experiments/examples/own_text.py FILE

The last tenth of the file is held out; its loss is printed in nats per character.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_jax import Anderson
from deq_jax.models.deq_transformer import DEQTransformer
from deq_jax.models.generation import generate


def loss_of(model, windows):
    """Mean cross entropy of the next character; `windows` `[B, length + 1]`."""
    logits, stats = model(windows[:, :-1], return_stats=True)
    return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean(), stats


@nnx.jit
def train_step(model, optimizer, windows):
    (loss, stats), gradient = nnx.value_and_grad(loss_of, has_aux=True)(model, windows)
    optimizer.update(model, gradient)
    return loss, stats


held_out_loss = nnx.jit(lambda model, windows: loss_of(model, windows)[0])


def main(file, steps=1000, batch=16, length=64, features=64, every=100):
    text = pathlib.Path(file).read_text(encoding="utf-8")
    characters = sorted(set(text))
    codes = {character: code for code, character in enumerate(characters)}
    tokens = np.array([codes[character] for character in text], np.int32)
    split = len(tokens) * 9 // 10
    train, held_out = tokens[:split], tokens[split:]
    if len(held_out) <= length + 1:
        sys.exit(f"{file} has {len(tokens)} characters, but {10 * length + 20} are needed")
    print(f"{len(tokens)} characters, {len(characters)} different ones")

    model = DEQTransformer(
        len(characters),
        features,
        heads=4,
        hidden_features=4 * features,
        solver=Anderson(tol=1e-2, max_iter=20),
        rngs=nnx.Rngs(0),
    )
    schedule = optax.warmup_cosine_decay_schedule(0, 2e-3, max(1, steps // 20), steps)
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    optimizer = nnx.Optimizer(model, transform, wrt=nnx.Param)

    rows = len(held_out) // (length + 1)
    held_out = held_out[: rows * (length + 1)].reshape(rows, length + 1)[:64]
    random = np.random.default_rng(0)
    for step in range(1, steps + 1):
        starts = random.integers(0, len(train) - length, batch)
        windows = train[starts[:, None] + np.arange(length + 1)]
        loss, stats = train_step(model, optimizer, windows)
        if step % every == 0 or step == steps:
            validation = float(held_out_loss(model, held_out))
            print(
                f"step {step:5d}  loss {loss:.3f}  held out {validation:.3f}  "
                f"evaluations {stats.evaluations}  converged {stats.converged.mean():.0%}"
            )

    prompt = jnp.asarray(train[None, :16])
    written = generate(nnx.view(model, deterministic=True), prompt, 200, key=jax.random.key(1))
    print("".join(characters[code] for code in [*prompt[0].tolist(), *written.tokens[0].tolist()]))
    return validation


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
