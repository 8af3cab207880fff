"""What there is to know about the solves of a trained network, as plain NumPy."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deq_jax import Solver, Status
from deq_jax.models.conv_deq import ConvDEQ
from deq_jax.stability.spectrum import spectral_radius, spectrum
from experiments.common.sources import Images
from experiments.common.training import to_float

PyTree = Any

BATCH = 32
"""Images solved at once; also those whose spectral radius is taken."""

BUDGETS = (1, 2, 3, 5, 8, 12, 18, 25, 50, 100)

_NEWTON_BUDGET = 25
"""Largest budget tried of a solver with many products in each evaluation."""


@dataclasses.dataclass(frozen=True)
class Solves:
    """The answers to all images, with the solver as it was trained.

    Attributes:
        labels: `[N]`, true classes.
        predicted: `[N]`, predicted classes.
        softmax: `[N]`, the largest class probability.
        residual: `[N]`, relative residual; infinite where no evaluation was finite.
        iterations: `[N]`, evaluations until the sample stopped.
        status: `[N]`, values of `Status`.
    """

    labels: np.ndarray
    predicted: np.ndarray
    softmax: np.ndarray
    residual: np.ndarray
    iterations: np.ndarray
    status: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """`[N]` boolean."""
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
    """Eigenvalues of `∂f/∂z` at the answers to some images.

    Attributes:
        radius: `[n]`, spectral radius; NaN where the Jacobian is not finite.
        error: `[n]`, estimate of its error.
        converged: `[n]` boolean, the error is small.
        looked_at: index of the images that Ritz values were computed for, under `slowest`,
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
        converged: `[n]`, share of samples whose residual is at most the trained tolerance.
        residual: `[n]`, mean of the finite residuals; NaN if there is none.
        trained: `max_iter` that the run is evaluated with.
    """

    budgets: np.ndarray
    accuracy: np.ndarray
    converged: np.ndarray
    residual: np.ndarray
    trained: int


class Network:
    """A trained network and the images that it is looked at with.

    Args:
        model: the network in evaluation mode; left as it is.
        examples: the images.
        white: pixel value that becomes 1.
    """

    def __init__(self, model: ConvDEQ, examples: Images, white: int):
        self.solver = model.core.solver
        self._definition, self._state = nnx.split(model)
        self._examples = examples
        self._white = white
        self._answer = self._answering(self.solver)

    def solves(self) -> Solves:
        """The answers to all images."""
        return self._all(self._answer)

    def budgets(self, budgets: Sequence[int]) -> Budgets:
        """Solves all images with each budget, and with that of the run.

        The tolerance is 0, so that each solve uses its whole budget: it shows what a closer look
        at the equilibrium would change. All else of the solver stays.
        """
        if getattr(self.solver, "linearizes", False):
            budgets = [budget for budget in budgets if budget <= _NEWTON_BUDGET]
        tried = sorted({*budgets, self.solver.max_iter})
        rows = []
        for budget in tried:
            solver = dataclasses.replace(self.solver, tol=0.0, atol=0.0, max_iter=budget)
            solves = self._all(self._answering(solver))
            within = solves.residual <= self.solver.tol
            mean = solves.record()["forward_residual_mean"]
            rows.append((budget, solves.correct.mean(), within.mean(), mean))
        return Budgets(*map(np.array, zip(*rows, strict=True)), trained=self.solver.max_iter)

    def spectra(self, hardest_first: np.ndarray, count: int = BATCH, *, seed: int = 0) -> Spectra:
        """Eigenvalues at the answers to `count` images from the hardest to the easiest.

        Args:
            hardest_first: from `Solves.hardest_first`.
            count: how many, spread evenly over that order.
            seed: of the first vectors.
        """
        ranks = np.linspace(0, len(hardest_first) - 1, min(count, len(hardest_first)))
        chosen = hardest_first[ranks.round().astype(int)]
        key = jax.random.key(seed)

        @jax.jit
        def radii(state: PyTree, images: jax.Array, z: jax.Array) -> PyTree:
            f, params, x = self._equation(state, images)
            return spectral_radius(f, params, z.astype(x.dtype), x, key)

        @jax.jit
        def ritz(state: PyTree, images: jax.Array, z: jax.Array) -> PyTree:
            f, params, x = self._equation(state, images)
            return spectrum(f, params, z.astype(x.dtype), x, key)

        images = jnp.asarray(self._examples.images[chosen])
        z = self._answer(self._state, images)[0]
        found = jax.device_get(radii(self._state, images, z))
        # With one image or two, these are the same.
        rows = {"slowest": 0, "median": len(chosen) // 2, "fastest": len(chosen) - 1}
        few = np.array(list(rows.values()))
        values, errors = jax.device_get(ritz(self._state, images[few], z[few]))
        return Spectra(
            radius=found.radius,
            error=found.error,
            converged=found.converged,
            looked_at={name: int(chosen[row]) for name, row in rows.items()},
            values=dict(zip(rows, values, strict=True)),
            errors=dict(zip(rows, errors, strict=True)),
        )

    def _equation(self, state: PyTree, images: jax.Array) -> tuple[Any, PyTree, PyTree]:
        model = nnx.merge(self._definition, state, copy=True)
        return model.core.equation(model.injection(to_float(images, self._white)))

    def _answering(self, solver: Solver) -> Callable[[PyTree, jax.Array], PyTree]:
        """A jitted function from images to z and the fields of `Solves` that are not labels."""

        @jax.jit
        def answer(state: PyTree, images: jax.Array) -> PyTree:
            model = nnx.merge(self._definition, state, copy=True)
            model.core.solver = solver
            injection = model.injection(to_float(images, self._white))
            z, stats = model.core(injection, model.start(injection), return_stats=True)
            logits = model.classify(z.astype(injection.dtype))
            softmax = jax.nn.softmax(logits).max(-1)
            solved = (stats.residual, stats.iterations, stats.status)
            return z, (logits.argmax(-1), softmax, *solved)

        return answer

    def _all(self, answer: Callable[[PyTree, jax.Array], PyTree]) -> Solves:
        images, labels = self._examples.images, self._examples.labels
        size = min(BATCH, len(images))
        parts = []
        for start in range(0, len(images), size):
            # The last batch is filled up with repeated images, so that one program serves all.
            rows = start + np.arange(size) % (len(images) - start)
            taken = jnp.asarray(images[rows])
            parts.append(jax.device_get(answer(self._state, taken)[1]))
        fields = (np.concatenate(field)[: len(images)] for field in zip(*parts, strict=True))
        return Solves(labels, *fields)


def backward_record(trace: np.ndarray, tol: float) -> dict[str, float]:
    """The figures that `SolveTotals.record` gives of backward solves, from their residuals.

    Args:
        trace: `[evaluations, B]`, NaN after a sample's stop.
        tol: tolerance of the solve.

    Returns:
        The figures; none where no residual is finite, as where there was nothing to solve.
    """
    lowest = np.where(np.isfinite(trace), trace, np.inf).min(0)
    finite = lowest[np.isfinite(lowest)]
    if finite.size == 0:
        return {}
    return {
        "backward_residual_mean": float(finite.mean()),
        "backward_residual_worst": float(lowest.max()),
        "backward_converged": float((lowest <= tol).mean()),
    }
