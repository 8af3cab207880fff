"""The tutorial's layer in eager PyTorch, written from its formulas.

Anderson on a window of m points per sample, the stop on the whole batch; the backward pass solves
`u = Jᵀu + y` by the same solver, in a hook on the solution.

Source: "Deep Implicit Layers", ch. 4.
"""

import dataclasses
from collections.abc import Callable

import torch

Map = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class TutorialLayer:
    """The layer and its solver.

    Attributes:
        tol: bound on `‖f(z) - z‖ / ‖f(z)‖`, norms of the whole batch.
        max_iter: most evaluations in a solve, and most products in a backward pass.
        relative: the ridge is in proportion to the mean of the Gram matrix's diagonal.
        ridge: added to the diagonal of the Gram matrix.
        history: m.
        evaluations: of the last forward solve.
        products: of the last backward solve.
    """

    tol: float
    max_iter: int
    relative: bool = False
    ridge: float = 1e-4
    history: int = 5
    evaluations: int = 0
    products: int = 0

    def anderson(self, f: Map, z: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The last point evaluated, and the evaluations.

        In every step `[[0, 1ᵀ], [1, G Gᵀ + λ I]] [ν; α] = [1; 0]`, then `z = Σ α_i f(z_i)`.
        """
        batch, shape = z.shape[0], z.shape
        points = z.new_zeros(batch, self.history, z[0].numel())
        values = torch.zeros_like(points)
        points[:, 0], values[:, 0] = z.flatten(1), f(z).flatten(1)
        points[:, 1] = values[:, 0]
        values[:, 1] = f(values[:, 0].view(shape)).flatten(1)
        system = z.new_zeros(batch, self.history + 1, self.history + 1)
        system[:, 0, 1:] = system[:, 1:, 0] = 1
        right = z.new_zeros(batch, self.history + 1, 1)
        right[:, 0] = 1
        for count in range(2, self.max_iter):
            n, slot = min(count, self.history), count % self.history
            g = values[:, :n] - points[:, :n]
            gram = torch.bmm(g, g.transpose(1, 2))
            system[:, 1 : n + 1, 1 : n + 1] = gram + self._ridge(gram)
            solution = torch.linalg.solve(system[:, : n + 1, : n + 1], right[:, : n + 1])
            points[:, slot] = torch.bmm(solution[:, 1:].transpose(1, 2), values[:, :n])[:, 0]
            values[:, slot] = f(points[:, slot].view(shape)).flatten(1)
            size = values[:, slot].norm()
            if (values[:, slot] - points[:, slot]).norm().item() < self.tol * size.item():
                break
        return points[:, slot].view(shape), count + 1

    def _ridge(self, gram: torch.Tensor) -> torch.Tensor:
        identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        if not self.relative:
            return self.ridge * identity
        scale = gram.diagonal(dim1=1, dim2=2).mean(1)
        return self.ridge * scale[:, None, None] * identity

    def solve(self, f: Map, z: torch.Tensor) -> torch.Tensor:
        """The solution, without a gradient."""
        with torch.no_grad():
            value, self.evaluations = self.anderson(f, z)
        return value

    def attach(self, f: Map, z: torch.Tensor) -> torch.Tensor:
        """The solution with its gradient: f on the tape once more, and a hook."""
        value = f(self.solve(f, z))
        at = value.detach().requires_grad_()
        again = f(at)

        def hook(y: torch.Tensor) -> torch.Tensor:
            def transposed(u: torch.Tensor) -> torch.Tensor:
                return torch.autograd.grad(again, at, u, retain_graph=True)[0] + y

            u, self.products = self.anderson(transposed, y)
            return u

        value.register_hook(hook)
        return value
