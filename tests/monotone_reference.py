"""Monotone operators as dense matrices in NumPy, assembled from their definitions.

Parameters are dictionaries of arrays. All functions are analytic in them, so that a step in the
imaginary direction gives exact derivatives.
"""

import numpy as np


def dense(p, m):
    """W of `MonotoneDenseCell`."""
    return (1 - m) * np.eye(len(p["a"])) - p["a"].T @ p["a"] + p["b"] - p["b"].T


def circular(kernel, height, width):
    """The matrix of a circular convolution `[k, k, C, D]` on the grid, states flattened as HWC."""
    size, _, into, out = kernel.shape
    matrix = np.zeros((height, width, out, height, width, into), kernel.dtype)
    for row in range(height):
        for column in range(width):
            for i in range(size):
                for j in range(size):
                    source = (row + i - size // 2) % height, (column + j - size // 2) % width
                    matrix[row, column, :, source[0], source[1]] += kernel[i, j].T
    return matrix.reshape(height * width * out, height * width * into)


def unit(kernel):
    return kernel / np.sqrt((kernel * kernel).sum())


def root(g):
    """`√|g|`, analytic for real parts other than 0."""
    return np.sqrt(g * np.sign(np.real(g)))


def conv(p, m, grid):
    """W of `MonotoneConvCell`."""
    a, b = circular(unit(p["a"]), *grid), circular(unit(p["b"]), *grid)
    scale = root(p["g"]) ** 2
    return (1 - m) * np.eye(len(a)) - scale * a.T @ a + p["h"] * (b - b.T)


def strided(kernel, grid):
    """Every second row and column of a circular convolution, and zeros behind them."""
    height, width = grid
    full = circular(kernel, height, width).reshape(height, width, kernel.shape[3], -1)
    half = full[::2, ::2]
    border = kernel.shape[0] // 2
    padded = np.pad(half, ((0, border), (0, border), (0, 0), (0, 0)))
    return padded.reshape(-1, full.shape[-1])


def multitier(p, m, grids):
    """W of `MonotoneMultiTierCell`, the resolutions one behind the other."""
    count = len(grids)
    a = [root(p["g"][i]) * circular(unit(p["a"][i]), *grids[i]) for i in range(count)]
    b = [p["h"][i] * circular(unit(p["b"][i]), *grids[i]) for i in range(count)]
    s = [root(p["s"][i]) * strided(unit(p["stride"][i]), grids[i]) for i in range(count - 1)]
    sizes = [len(matrix) for matrix in a]
    at = np.cumsum([0, *sizes])
    w = np.zeros((at[-1], at[-1]), np.result_type(*a, *b, *s))
    for i in range(count):
        block = slice(at[i], at[i + 1])
        w[block, block] = (1 - m) * np.eye(sizes[i]) - a[i].T @ a[i] + b[i] - b[i].T
        if i < count - 1:
            w[block, block] -= s[i].T @ s[i]
            w[at[i + 1] : at[i + 2], block] = -2 * a[i + 1].T @ s[i]
    return w


def inject(p, x, grid):
    """`U x + b` of convolutional cells on an image `[H, W, C]`, `[H + 2, W + 2, D]`."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = circular(p["input_kernel"], *grid) @ padded.reshape(-1)
    return out.reshape(*grid, -1) + p["input_bias"]


def inside(grid, channels, border=1):
    """Which entries of a state `[H, W, C]` are not on the border."""
    mask = np.zeros((*grid, channels), bool)
    mask[border:-border, border:-border] = True
    return mask.reshape(-1)


def solve(w, c, free):
    """`z = relu(W z + c)`, zero where not `free`, by Newton's method on which entries are positive.

    Falls back on small forward-backward steps where that goes round in circles.
    """
    identity = np.eye(len(c))
    z = np.zeros(len(c))
    distance = identity - w
    m = np.linalg.eigvalsh((distance + distance.T) / 2)[0]
    step = m / np.linalg.norm(distance, 2) ** 2
    for _ in range(2000):
        positive = free & (w @ z + c > 0)
        j = np.diag(positive.astype(float))
        newton = np.linalg.solve(identity - j @ w, j @ c)
        again = free & (w @ newton + c > 0)
        if (again == positive).all():
            return np.where(positive, newton, 0)
        for _ in range(20):
            z = np.where(free, np.maximum(z + step * (w @ z + c - z), 0), 0)
    raise AssertionError("no solution found")


def cotangents(w, z, t):
    """Of c and W, given the cotangent t of z*: by the implicit function theorem."""
    j = np.diag((z > 0).astype(float))
    c_bar = j @ np.linalg.solve((np.eye(len(z)) - j @ w).T, t)
    return c_bar, np.outer(c_bar, z)
