"""The cells and the network in PyTorch: NCHW, functional, for the tutorial and torchdeq."""

import torch
import torch.nn.functional as F

Tensors = dict[str, torch.Tensor]

GROUPS, HEADS, EPSILON, SLOPE = 8, 4, 1e-5, 0.1


def residual(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`norm(relu(z + norm(x + W₂ * norm(relu(W₁ * z)))))`."""
    p = params

    def norm(y: torch.Tensor, number: int) -> torch.Tensor:
        return F.group_norm(y, GROUPS, p[f"scale{number}"], p[f"bias{number}"], EPSILON)

    y = norm(F.relu(F.conv2d(z, p["kernel1"], padding=1)), 1)
    y = norm(x["x"] + F.conv2d(y, p["kernel2"], padding=1), 2)
    return norm(F.relu(z + y), 3)


def once(cell: str, params: Tensors, x: Tensors) -> Tensors:
    """x, with what depends on it alone computed: PyTorch users take it out of the loop by hand."""
    return {"x": F.linear(x["x"], params["u"], params["b"])} if cell == "dense" else x


def dense(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`tanh(W z + U x + b)`, x holding `U x + b`."""
    return torch.tanh(F.linear(z, params["w"]) + x["x"])


def gains(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`x + gain * B φ(A z)`, `φ(v) = tanh(0.1 v) / 0.1`."""
    hidden = torch.tanh(SLOPE * (z @ params["inner"])) / SLOPE
    return x["x"] + x["gain"] * (hidden @ params["outer"])


def transformer(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`h = norm(z + x + attention(z))`, then `norm(h + feedforward(h))`."""
    p, width = params, z.shape[-1:]

    def heads(name: str) -> torch.Tensor:
        return (z @ p[name]).unflatten(-1, (HEADS, -1)).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(heads("query"), heads("key"), heads("value"))
    attention = mixed.transpose(1, 2).flatten(-2) @ p["out"]
    h = F.layer_norm(z + x["x"] + attention, width, p["scale1"], p["bias1"], EPSILON)
    v = F.gelu(h @ p["up"] + p["up_bias"], approximate="tanh") @ p["down"] + p["down_bias"]
    return F.layer_norm(h + v, width, p["scale2"], p["bias2"], EPSILON)


def low_rank(params: Tensors, z: torch.Tensor, x: Tensors) -> torch.Tensor:
    """`tanh(d * z + P Q z + x)`."""
    return torch.tanh(params["diagonal"] * z + (z @ params["down"]) @ params["up"] + x["x"])


CELLS = {f.__name__: f for f in (residual, dense, gains, transformer, low_rank)}


def batch_norm(y: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """BatchNorm in training mode."""
    return F.batch_norm(y, None, None, scale, bias, training=True, eps=EPSILON)


def injection(params: Tensors, images: torch.Tensor) -> torch.Tensor:
    """What the network gives to its equation."""
    y = F.conv2d(images, params["stem.kernel"], params["stem.bias"], padding=1)
    return batch_norm(y, params["norm_in.scale"], params["norm_in.bias"])


def cross_entropy(params: Tensors, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The network's loss, from the solution of its equation."""
    y = batch_norm(z, params["norm_out.scale"], params["norm_out.bias"])
    # The number of windows a side, from the size of the linear layer.
    side = int((params["head.weight"].shape[0] // y.shape[1]) ** 0.5)
    pooled = F.avg_pool2d(y, y.shape[2] // side)
    features = pooled.permute(0, 2, 3, 1).flatten(1)  # the linear layer's weights are for NHWC
    logits = features @ params["head.weight"] + params["head.bias"]
    return F.cross_entropy(logits, labels.long())
