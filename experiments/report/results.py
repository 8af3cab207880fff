"""What is measured of a trained network, as plain NumPy."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from deq_jax import Status


@dataclasses.dataclass(frozen=True)
class Solves:
    """The answers to all examples, with the solver as it was trained.

    Attributes:
        labels: `[N]`, true classes; `[N, L]` where there are L answers to each example.
        predicted: predicted classes, likewise.
        softmax: `[N]`, the largest class probability, the mean of L.
        loss: `[N]`, cross-entropy, the mean of L.
        residual: `[N]`, relative residual; infinite where no evaluation was finite.
        iterations: `[N]`, evaluations until the sample stopped.
        status: `[N]`, values of `Status`.
    """

    labels: np.ndarray
    predicted: np.ndarray
    softmax: np.ndarray
    loss: np.ndarray
    residual: np.ndarray
    iterations: np.ndarray
    status: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """Boolean, shaped like `labels`."""
        return self.predicted == self.labels

    @property
    def converged(self) -> np.ndarray:
        """`[N]` boolean."""
        return self.status == Status.CONVERGED

    def hardest_first(self) -> np.ndarray:
        """Indices `[N]`: diverged, not converged, converged; then by evaluations and residual."""
        return np.lexsort((self.residual, self.iterations, self.status))[::-1]

    def record(self) -> dict[str, float]:
        """The figures that `SolveTotals.record` gives of the forward solves."""
        finite = self.residual[np.isfinite(self.residual)]
        return {
            "forward_iterations": float(self.iterations.mean()),
            "forward_residual_mean": float(finite.mean()) if finite.size else float("nan"),
            "forward_residual_worst": float(self.residual.max()),
            "forward_converged": float(self.converged.mean()),
            "forward_diverged": int((self.status == Status.DIVERGED).sum()),
        }


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Eigenvalues of `∂f/∂z` at the answers to some examples.

    Attributes:
        radius: `[n]`, spectral radius; NaN where the Jacobian is not finite.
        error: `[n]`, estimate of its error.
        converged: `[n]` boolean, the error is small.
        looked_at: index of the examples that Ritz values were computed for, under `slowest`,
            `median` and `fastest`.
        values: their Ritz values, complex with NaN at the end.
        errors: residuals of these.
    """

    radius: np.ndarray
    error: np.ndarray
    converged: np.ndarray
    looked_at: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Budgets:
    """What the same network comes to with other budgets and a tolerance of 0.

    Attributes:
        budgets: `[n]`, `max_iter`.
        accuracy: `[n]`.
        loss: `[n]`, mean of all; NaN if one is.
        converged: `[n]`, share of samples whose residual is at most the trained tolerance.
        residual: `[n]`, mean of the finite residuals; NaN if there is none.
        trained: `max_iter` that the run is evaluated with.
    """

    budgets: np.ndarray
    accuracy: np.ndarray
    loss: np.ndarray
    converged: np.ndarray
    residual: np.ndarray
    trained: int
