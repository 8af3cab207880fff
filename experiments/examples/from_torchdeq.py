"""Coming from torchdeq: a layer with fixed-point correction.

    python experiments/examples/from_torchdeq.py

docs/from_torchdeq.md has each option of torchdeq beside ours.

PyTorch's layers hold their parameters; here f is given them, `f(params, z, x)`, and what is
differentiated is an ordinary argument. For fixed-point correction torchdeq has `n_states`: losses
at earlier states, weighted, beside the loss at the last one.
"""

import jax
import jax.numpy as jnp

from deq_jax import Broyden, Implicit, Phantom, deq_fixed_point


def f(params, z, x):
    return jnp.tanh(z @ params["w"] + x @ params["u"] + params["b"])


def layer(params, x, width):
    """The solution and the states of evaluations 4 and 8, as torchdeq's list `z_out` has them."""
    z0 = jnp.zeros((len(x), width))
    z, stats, earlier = deq_fixed_point(
        f,
        params,
        x,
        z0,
        solver=Broyden(tol=1e-5, max_iter=30),
        gradient=Implicit(),
        return_stats=True,
        sample_at=(4, 8),
        sample_gradient=Phantom(steps=1, damping=1.0),
    )
    return [*earlier, z], stats


def loss(params, x, target):
    states, stats = layer(params, x, params["w"].shape[0])
    errors = [((z - target) ** 2).mean() for z in states]
    weights = [0.5, 0.8, 1.0]  # the later, the more
    return sum(w * e for w, e in zip(weights, errors, strict=True)), stats


def main(batch=16, width=24):
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "w": 0.5 * jax.random.normal(keys[0], (width, width)) / width**0.5,
        "u": jax.random.normal(keys[1], (6, width)),
        "b": jnp.zeros(width),
    }
    x = jax.random.normal(keys[2], (batch, 6))
    target = 0.5 * jax.random.normal(keys[3], (batch, width))
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    losses = []
    for number in range(30):
        (value, stats), gradient = step(params, x, target)
        params = jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient)
        losses.append(float(value))
        if number % 10 == 0:
            converged = float(stats.converged.mean())
            print(f"step {number:2d}  loss {value:.4f}  converged {converged:.0%}")
    print(f"last loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
