"""Finds out what there is to know about the solves of a trained network."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_jax import Solver
from deq_jax.stability.spectrum import spectral_radius, spectrum
from experiments.report.examples import Examples
from experiments.report.results import Budgets, Solves, Spectra
from experiments.train.objective import EquilibriumModel

PyTree = Any

BATCH = 32
"""Examples solved at once; also those whose spectral radius is taken."""

BUDGETS = (1, 2, 3, 5, 8, 12, 18, 25, 50, 100)

_NEWTON_BUDGET = 25
"""Largest budget tried of a solver with many products in each evaluation."""


class Network:
    """A trained network and the examples that it is looked at with.

    Args:
        model: the network in evaluation mode; left as it is.
        examples: the examples.
    """

    def __init__(self, model: EquilibriumModel, examples: Examples):
        self.solver = model.core.solver
        self._definition, self._state = nnx.split(model)
        self._examples = examples
        self._answer = self._answering(self.solver)

    def solves(self) -> Solves:
        """The answers to all examples."""
        return self._all(self._answer)

    def budgets(self, budgets: Sequence[int]) -> Budgets:
        """Solves all examples with each budget, and with that of the run.

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
            accuracy, loss = solves.correct.mean(), solves.loss.mean()
            rows.append((budget, accuracy, loss, within.mean(), mean))
        return Budgets(*map(np.array, zip(*rows, strict=True)), trained=self.solver.max_iter)

    def spectra(self, hardest_first: np.ndarray, count: int = BATCH, *, seed: int = 0) -> Spectra:
        """Eigenvalues at the answers to `count` examples from the hardest to the easiest.

        Args:
            hardest_first: from `Solves.hardest_first`.
            count: how many, spread evenly over that order.
            seed: of the first vectors.
        """
        ranks = np.linspace(0, len(hardest_first) - 1, min(count, len(hardest_first)))
        chosen = hardest_first[ranks.round().astype(int)]
        key = jax.random.key(seed)

        @jax.jit
        def radii(state: PyTree, inputs: jax.Array, z: PyTree) -> PyTree:
            f, params, x = self._equation(state, inputs)
            return spectral_radius(f, params, z, x, key)

        @jax.jit
        def ritz(state: PyTree, inputs: jax.Array, z: PyTree) -> PyTree:
            f, params, x = self._equation(state, inputs)
            return spectrum(f, params, z, x, key)

        inputs, targets = self._taken(chosen)
        z = self._answer(self._state, inputs, targets)[0]
        found = jax.device_get(radii(self._state, inputs, z))
        # With one example or two, these are the same.
        rows = {"slowest": 0, "median": len(chosen) // 2, "fastest": len(chosen) - 1}
        few = np.array(list(rows.values()))
        inputs, z = jax.tree.map(lambda leaf: leaf[few], (inputs, z))
        values, errors = jax.device_get(ritz(self._state, inputs, z))
        return Spectra(
            radius=found.radius,
            error=found.error,
            converged=found.converged,
            looked_at={name: int(chosen[row]) for name, row in rows.items()},
            values=dict(zip(rows, values, strict=True)),
            errors=dict(zip(rows, errors, strict=True)),
        )

    def _equation(self, state: PyTree, inputs: jax.Array) -> tuple[Any, PyTree, PyTree]:
        model = nnx.merge(self._definition, state, copy=True)
        return model.core.equation(model.injection(self._examples.prepare(inputs)))

    def _answering(self, solver: Solver) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
        """A jitted function from inputs and targets to z and the fields of `Solves` but labels."""
        asked = self._examples.asked

        @jax.jit
        def answer(state: PyTree, inputs: jax.Array, targets: jax.Array) -> PyTree:
            model = nnx.merge(self._definition, state, copy=True)
            model.core.solver = solver
            injection = model.injection(self._examples.prepare(inputs))
            z, stats = model.core(injection, model.start(injection), return_stats=True)
            # The state may have been solved for in another precision.
            like = model.zeros(injection)
            z = jax.tree.map(lambda leaf, like: leaf.astype(like.dtype), z, like)
            logits, labels = asked(model.classify(z)), asked(targets)
            softmax = jax.nn.softmax(logits).max(-1)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            means = (leaf.reshape(leaf.shape[0], -1).mean(1) for leaf in (softmax, loss))
            return z, (logits.argmax(-1), *means, stats.residual, stats.iterations, stats.status)

        return answer

    def _taken(self, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        examples = self._examples
        return jnp.asarray(examples.inputs[rows]), jnp.asarray(examples.targets[rows])

    def _all(self, answer: Callable[[PyTree, jax.Array, jax.Array], PyTree]) -> Solves:
        count = len(self._examples)
        size = min(BATCH, count)
        parts = []
        for start in range(0, count, size):
            # The last batch is filled up with repeated examples, so that one program serves all.
            rows = start + np.arange(size) % (count - start)
            parts.append(jax.device_get(answer(self._state, *self._taken(rows))[1]))
        fields = (np.concatenate(field)[:count] for field in zip(*parts, strict=True))
        return Solves(self._examples.asked(self._examples.targets), *fields)


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
