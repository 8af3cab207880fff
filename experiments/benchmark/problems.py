"""The equations that are benchmarked: NumPy arrays from fixed seeds, the same for everybody."""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation `z = cell(params, z, x)`, or a network around one.

    Images are NHWC and kernels HWIO.

    Attributes:
        cell: name of the cell.
        params: parameters by name; in a network those of the cell are called `cell.NAME`.
        x: inputs by name; the state is shaped like `x["x"]`. A network has `images` and `labels`.
        cotangent: cotangent of the solution, shaped like it; a network makes its own.
        tol: bound on the relative residual.
        max_iter: most evaluations, and most transposed products.
        network: the equation is a layer of a network that is trained by cross entropy.
    """

    cell: str
    params: Arrays
    x: Arrays
    cotangent: np.ndarray
    tol: float
    max_iter: int
    network: bool = False

    def settings(self) -> str:
        """All that is not an array, as JSON."""
        names = ("cell", "tol", "max_iter", "network")
        return json.dumps({name: getattr(self, name) for name in names})

    def arrays(self) -> Arrays:
        """All arrays in one dictionary."""
        return {
            **{f"params/{name}": array for name, array in self.params.items()},
            **{f"x/{name}": array for name, array in self.x.items()},
            "cotangent": self.cotangent,
        }

    def digest(self, *more: bytes) -> str:
        """Hash of everything, and of `more`."""
        hashed = hashlib.sha256(self.settings().encode())
        for item in more:
            hashed.update(item)
        for name, array in sorted(self.arrays().items()):
            hashed.update(f"{name} {array.shape} {array.dtype}".encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
        return hashed.hexdigest()[:16]

    def save(self, path: pathlib.Path) -> None:
        """Writes an .npz file."""
        np.savez(path, settings=np.array(self.settings()), **self.arrays())

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "Problem":
        """Reads what `save` wrote."""
        with np.load(path) as data:
            arrays = {name: data[name] for name in data.files if name != "settings"}
            settings = json.loads(str(data["settings"]))
        cotangent = arrays.pop("cotangent")
        return cls(
            params=under("params", arrays), x=under("x", arrays), cotangent=cotangent, **settings
        )


def under(prefix: str, arrays: Arrays, separator: str = "/") -> Arrays:
    """The entries called `PREFIX/NAME`, by NAME."""
    start = prefix + separator
    return {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}


def cell_params(params: Arrays) -> Arrays:
    """The parameters of the cell among those of a network; works on arrays of any framework."""
    return under("cell", params, ".")


def to_channels_first(name: str, array: np.ndarray) -> np.ndarray:
    """Images NHWC -> NCHW, kernels HWIO -> OIHW, anything that is not 4-dimensional as it is."""
    if array.ndim != 4:
        return array
    return np.ascontiguousarray(array.transpose((3, 2, 0, 1) if _is_kernel(name) else (0, 3, 1, 2)))


def to_channels_last(name: str, array: np.ndarray) -> np.ndarray:
    """The inverse of `to_channels_first`."""
    if array.ndim != 4:
        return array
    return np.ascontiguousarray(array.transpose((2, 3, 1, 0) if _is_kernel(name) else (0, 2, 3, 1)))


def _is_kernel(name: str) -> bool:
    return "kernel" in name


def float32(arrays: Arrays) -> Arrays:
    """Floating arrays in single precision."""
    return {
        name: array.astype(np.float32) if np.issubdtype(array.dtype, np.floating) else array
        for name, array in arrays.items()
    }


def _problem(cell: str, params: Arrays, x: Arrays, rng: np.random.Generator, **rest) -> Problem:
    cotangent = rng.normal(size=x["x"].shape).astype(np.float32)
    return Problem(cell, float32(params), float32(x), cotangent, **rest)


def _residual_params(rng: np.random.Generator, channels: int, inner: int) -> Arrays:
    params = {
        "kernel1": 0.01 * rng.normal(size=(3, 3, channels, inner)),
        "kernel2": 0.01 * rng.normal(size=(3, 3, inner, channels)),
    }
    for number, width in enumerate((inner, channels, channels), 1):
        params |= {f"scale{number}": np.ones(width), f"bias{number}": np.zeros(width)}
    return params


def residual(
    *, batch: int, size: int, channels: int, inner: int, tol: float = 1e-4, max_iter: int = 50
) -> Problem:
    """The tutorial's residual convolution cell on random images."""
    rng = np.random.default_rng(0)
    params = _residual_params(rng, channels, inner)
    x = {"x": rng.normal(size=(batch, size, size, channels))}
    return _problem("residual", params, x, rng, tol=tol, max_iter=max_iter)


def network(*, batch: int, size: int, channels: int, inner: int, pool: int = 8) -> Problem:
    """The tutorial's network: convolution, BatchNorm, cell, BatchNorm, average pool, linear."""
    rng = np.random.default_rng(1)
    features, classes = (size // pool) ** 2 * channels, 10
    bounds = 1 / np.sqrt(27), 1 / np.sqrt(features)  # PyTorch's initialisation
    params = {
        "stem.kernel": rng.uniform(-bounds[0], bounds[0], (3, 3, 3, channels)),
        "stem.bias": rng.uniform(-bounds[0], bounds[0], channels),
        "norm_in.scale": np.ones(channels),
        "norm_in.bias": np.zeros(channels),
        "norm_out.scale": np.ones(channels),
        "norm_out.bias": np.zeros(channels),
        "head.weight": rng.uniform(-bounds[1], bounds[1], (features, classes)),
        "head.bias": rng.uniform(-bounds[1], bounds[1], classes),
    }
    cell = _residual_params(rng, channels, inner)
    params |= {f"cell.{name}": array for name, array in cell.items()}
    x = {
        "images": rng.normal(size=(batch, size, size, 3)),
        "labels": rng.integers(classes, size=batch).astype(np.int32),
    }
    state = np.zeros((batch, size, size, channels), np.float32)
    return Problem(
        "residual", float32(params), float32(x), state, tol=1e-2, max_iter=25, network=True
    )


def dense(*, batch: int, width: int, tol: float = 1e-5, max_iter: int = 100) -> Problem:
    """`tanh(W z + U x + b)`, the spectral norm of W 0.9."""
    rng = np.random.default_rng(2)
    w = rng.normal(size=(width, width))
    params = {
        "w": 0.9 * w / np.linalg.norm(w, 2),
        "u": rng.normal(size=(width, width)) / np.sqrt(width),
        "b": 0.1 * rng.normal(size=width),
    }
    x = {"x": rng.normal(size=(batch, width))}
    return _problem("dense", params, x, rng, tol=tol, max_iter=max_iter)


def gains(gain: np.ndarray, *, width: int, tol: float = 1e-5, max_iter: int = 200) -> Problem:
    """A map for each sample that contracts by its gain: `x + gain * B φ(A z)`, φ nearly linear.

    B A is symmetric with eigenvalues evenly spaced in [-1, 1]; A is a rotation.

    Args:
        gain: the gains, `[B]`.
        width: size of the state.
        tol: tolerance.
        max_iter: most evaluations.
    """
    rng = np.random.default_rng(3)
    basis, rotation = (np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(2))
    symmetric = basis @ np.diag(np.linspace(-1, 1, width)) @ basis.T
    params = {"inner": rotation, "outer": rotation.T @ symmetric}
    x = {"x": 0.2 * rng.normal(size=(len(gain), width)), "gain": gain[:, None]}
    return _problem("gains", params, x, rng, tol=tol, max_iter=max_iter)


def transformer(*, batch: int, tokens: int, width: int) -> Problem:
    """A small post-norm transformer block with the input added to the residual stream."""
    rng = np.random.default_rng(4)
    shapes = {
        "query": (width, width),
        "key": (width, width),
        "value": (width, width),
        "out": (width, width),
        "up": (width, 4 * width),
        "down": (4 * width, width),
    }
    params = {
        name: 0.5 * rng.normal(size=shape) / np.sqrt(shape[0]) for name, shape in shapes.items()
    }
    params |= {"up_bias": np.zeros(4 * width), "down_bias": np.zeros(width)}
    for number in (1, 2):
        params |= {f"scale{number}": np.ones(width), f"bias{number}": np.zeros(width)}
    x = {"x": rng.normal(size=(batch, tokens, width))}
    return _problem("transformer", params, x, rng, tol=1e-4, max_iter=50)


def low_rank(*, batch: int, width: int) -> Problem:
    """`tanh(d * z + P Q z + x)` with P and Q of rank 8: work in proportion to the width."""
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(width, 8)))[0]
    params = {"diagonal": rng.uniform(0, 0.5, width), "down": basis, "up": 0.4 * basis.T}
    x = {"x": rng.normal(size=(batch, width))}
    return _problem("low_rank", params, x, rng, tol=1e-5, max_iter=100)
