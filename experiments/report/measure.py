"""Measures the solves of a trained network: answers, residuals, spectra and other budgets."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deq_jax import Implicit, Solver, Status, solve_adjoint, solve_fixed_point
from deq_jax.stability import SolveSummary
from deq_jax.stability.spectrum import spectral_radius, spectrum

PyTree = Any

BATCH = 32
"""Number of examples solved at once, and of examples whose spectral radius is estimated."""

BUDGETS = (1, 2, 3, 5, 8, 12, 18, 25, 50, 100)
"""The values of `max_iter` that the report tries."""

LARGEST_NEWTON_BUDGET = 25
"""Largest budget tried of a solver that computes many products in each evaluation."""

ENOUGH = 10
"""Number of good and of bad answers that a ROC curve needs."""


class EquilibriumModel(Protocol):
    """A network of a batch, with an equilibrium in it: `classify(core(injection, start))`.

    Attributes:
        core: the `deq_jax.nnx.DEQ`.
    """

    core: Any

    def injection(self, inputs: Any, /) -> PyTree:
        """What the core is given."""
        ...

    def zeros(self, x: Any, /) -> PyTree:
        """The zero state for an injection."""
        ...

    def start(self, x: Any, /) -> PyTree:
        """The state that a solve starts from."""
        ...

    def classify(self, z: Any, /) -> jax.Array:
        """Logits from the core's output."""
        ...


@dataclasses.dataclass(frozen=True)
class Solves:
    """The answers to all examples, with the solver as it was trained.

    Attributes:
        labels: `[N]`, true classes; `[N, L]` where each example has L answers.
        predicted: predicted classes, shaped like `labels`.
        softmax: `[N]`, the largest class probability, averaged over the L answers.
        loss: `[N]`, cross-entropy, averaged over the L answers.
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

    @property
    def finite_residual(self) -> np.ndarray:
        """The finite entries of `residual`."""
        return self.residual[np.isfinite(self.residual)]

    def hardest_first(self) -> np.ndarray:
        """Indices `[N]`: diverged, not converged, converged; then by evaluations and residual."""
        return np.lexsort((self.residual, self.iterations, self.status))[::-1]

    def summary(self) -> SolveSummary:
        """The figures of the forward solves, for `deq_jax.diagnose`."""
        finite = self.finite_residual
        return SolveSummary(
            samples=len(self.status),
            converged=float(self.converged.mean()),
            diverged=int((self.status == Status.DIVERGED).sum()),
            residual_mean=float(finite.mean()) if finite.size else float("nan"),
            residual_worst=float(self.residual.max()),
            iterations=float(self.iterations.mean()),
        )


@dataclasses.dataclass(frozen=True)
class Spectra:
    """Eigenvalues of `∂f/∂z` at the answers to some examples.

    Attributes:
        radius: `[n]`, spectral radius; NaN where the Jacobian is not finite.
        error: `[n]`, estimate of its error.
        converged: `[n]` boolean, whether the error is small.
        looked_at: the indices of three examples, under `slowest`, `median` and `fastest`.
        values: the Ritz values of these three, complex with NaN at the end.
        errors: the residuals of these Ritz values.
    """

    radius: np.ndarray
    error: np.ndarray
    converged: np.ndarray
    looked_at: Mapping[str, int]
    values: Mapping[str, np.ndarray]
    errors: Mapping[str, np.ndarray]

    @property
    def known(self) -> np.ndarray:
        """`[n]` boolean, whether the Jacobian is finite."""
        return np.isfinite(self.radius)


@dataclasses.dataclass(frozen=True)
class Budgets:
    """How well the same network does with other budgets and a tolerance of 0.

    Attributes:
        budgets: `[n]`, `max_iter`.
        accuracy: `[n]`.
        loss: `[n]`, the mean over all examples; NaN if one of them is.
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


class Network:
    """A trained network and the examples that it is looked at with.

    Args:
        model: the network in evaluation mode. It is not changed.
        examples: the examples.
    """

    def __init__(self, model: EquilibriumModel, examples: Any):
        self.solver = model.core.solver
        self._definition, self._state = nnx.split(model)
        self._examples = examples
        self._answer = self._answering(self.solver)

    def solves(self) -> Solves:
        """The answers to all examples."""
        return self._all(self._answer)

    def budgets(self, budgets: Sequence[int]) -> Budgets:
        """Solves all examples with each budget, and with that of the run.

        The tolerance is 0, so that each solve uses its whole budget and shows what a closer look at
        the equilibrium would change. The other settings of the solver stay as they are.
        """
        if getattr(self.solver, "linearizes", False):
            budgets = [budget for budget in budgets if budget <= LARGEST_NEWTON_BUDGET]
        rows = []
        for budget in sorted({*budgets, self.solver.max_iter}):
            solver = dataclasses.replace(self.solver, tol=0.0, atol=0.0, max_iter=budget)
            solves = self._all(self._answering(solver))
            within = solves.residual <= self.solver.tol
            mean = solves.summary().residual_mean
            rows.append((budget, solves.correct.mean(), solves.loss.mean(), within.mean(), mean))
        return Budgets(*map(np.array, zip(*rows, strict=True)), trained=self.solver.max_iter)

    def spectra(self, hardest_first: np.ndarray, count: int = BATCH, *, seed: int = 0) -> Spectra:
        """Eigenvalues at the answers to `count` examples from the hardest to the easiest.

        Args:
            hardest_first: from `Solves.hardest_first`.
            count: number of examples, spread evenly over that order.
            seed: seed of the start vectors.
        """
        ranks = np.linspace(0, len(hardest_first) - 1, min(count, len(hardest_first)))
        chosen = hardest_first[ranks.round().astype(int)]
        key = jax.random.key(seed)

        def at_answers(estimate: Callable[..., PyTree]) -> Callable[..., PyTree]:
            @jax.jit
            def estimated(state: PyTree, inputs: jax.Array, z: PyTree) -> PyTree:
                model = nnx.merge(self._definition, state, copy=True)
                f, params, x = model.core.equation(model.injection(self._examples.prepare(inputs)))
                return estimate(f, params, z, x, key)

            return lambda inputs, z: jax.device_get(estimated(self._state, inputs, z))

        inputs, targets = self._batch(chosen)
        z = self._answer(self._state, inputs, targets)[0]
        found = at_answers(spectral_radius)(inputs, z)
        # With one example or two, some of these three are the same.
        rows = {"slowest": 0, "median": len(chosen) // 2, "fastest": len(chosen) - 1}
        few = np.array(list(rows.values()))
        values, errors = at_answers(spectrum)(*jax.tree.map(lambda leaf: leaf[few], (inputs, z)))
        return Spectra(
            radius=found.radius,
            error=found.error,
            converged=found.converged,
            looked_at={name: int(chosen[row]) for name, row in rows.items()},
            values=dict(zip(rows, values, strict=True)),
            errors=dict(zip(rows, errors, strict=True)),
        )

    def _answering(self, solver: Solver) -> Callable[[PyTree, jax.Array, jax.Array], PyTree]:
        """A jitted function of inputs and targets: z*, and the fields of `Solves` after labels."""
        asked = self._examples.asked

        @jax.jit
        def answer(state: PyTree, inputs: jax.Array, targets: jax.Array) -> PyTree:
            model = nnx.merge(self._definition, state, copy=True)
            model.core.solver = solver
            injection = model.injection(self._examples.prepare(inputs))
            z, stats = model.core(injection, model.start(injection), return_stats=True)
            z = _in_dtypes_of(model.zeros(injection), z)
            logits, labels = asked(model.classify(z)), asked(targets)
            softmax = jax.nn.softmax(logits).max(-1)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            means = (leaf.reshape(leaf.shape[0], -1).mean(1) for leaf in (softmax, loss))
            return z, (logits.argmax(-1), *means, stats.residual, stats.iterations, stats.status)

        return answer

    def _batch(self, rows: np.ndarray) -> tuple[jax.Array, jax.Array]:
        examples = self._examples
        return jnp.asarray(examples.inputs[rows]), jnp.asarray(examples.targets[rows])

    def _all(self, answer: Callable[[PyTree, jax.Array, jax.Array], PyTree]) -> Solves:
        count = len(self._examples)
        size = min(BATCH, count)
        parts = []
        for start in range(0, count, size):
            # Repeated examples fill up the last batch, so that one program serves all batches.
            rows = start + np.arange(size) % (count - start)
            parts.append(jax.device_get(answer(self._state, *self._batch(rows))[1]))
        fields = (np.concatenate(field)[:count] for field in zip(*parts, strict=True))
        return Solves(self._examples.asked(self._examples.targets), *fields)


def residual_traces(
    model: EquilibriumModel, inputs: PyTree, targets: jax.Array
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Residuals at each evaluation of the forward and, where it keeps a trace, the backward solve.

    The backward solve is that of the mean cross-entropy, at the equilibria of the forward solve,
    and in the precision of the weights.

    Args:
        model: the network in evaluation mode. It is not changed.
        inputs: input of the network, `[B, ...]`.
        targets: `[B]` int32, or `[B, L]`.

    Returns:
        Residuals `[max_iter, B]`, NaN after a sample's stop, and tolerances, each under `forward`
        and `backward`. `backward` is missing where no solver with a trace runs backwards.
    """
    definition, state = nnx.split(model)
    core = model.core
    solver = dataclasses.replace(core.solver, trace=True)
    adjoint_solver = None
    if isinstance(core.gradient, Implicit):
        chosen = core.gradient.backward_solver(core.solver)
        if isinstance(chosen, Solver):
            adjoint_solver = dataclasses.replace(chosen, trace=True)
    # The precision is that of the training. The batch is in one piece here.
    execution = dataclasses.replace(core.execution, shard_axis=None, shrink_to=None)

    @jax.jit
    def solve_both(state: PyTree, inputs: PyTree, targets: jax.Array) -> list[PyTree]:
        network = nnx.merge(definition, state, copy=True)
        injection = network.injection(inputs)
        f, params, x = network.core.equation(injection)
        z0 = network.start(injection)
        z, stats = solve_fixed_point(f, params, x, z0, solver=solver, execution=execution)
        if adjoint_solver is None:
            return [stats.trace]

        def loss_of(z: PyTree) -> jax.Array:
            logits = nnx.merge(definition, state, copy=True).classify(z)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        z = _in_dtypes_of(network.zeros(injection), z)
        # The gradient of the loss at the equilibrium is where a backward pass starts.
        adjoint = solve_adjoint(f, params, x, z, jax.grad(loss_of)(z), solver=adjoint_solver)
        return [stats.trace, adjoint.stats.trace]

    found = jax.device_get(solve_both(state, inputs, targets))
    traces, tolerances = {"forward": found[0]}, {"forward": solver.tol}
    if adjoint_solver is not None:
        traces["backward"], tolerances["backward"] = found[1], adjoint_solver.tol
    return traces, tolerances


def backward_summary(trace: np.ndarray, tol: float) -> SolveSummary:
    """The figures of backward solves, for `deq_jax.diagnose`.

    A sample that never had a finite residual counts as diverged.

    Args:
        trace: residuals `[evaluations, B]`, NaN after a sample's stop.
        tol: tolerance of the solve.
    """
    lowest = np.where(np.isfinite(trace), trace, np.inf).min(0)
    finite = lowest[np.isfinite(lowest)]
    return SolveSummary(
        samples=len(lowest),
        converged=float((lowest <= tol).mean()),
        diverged=len(lowest) - finite.size,
        residual_mean=float(finite.mean()) if finite.size else float("nan"),
        residual_worst=float(lowest.max()),
    )


class RocCurve(NamedTuple):
    """Receiver operating characteristic of a score that should be larger for good answers.

    Attributes:
        bad: shares of the bad answers whose score is above each threshold.
        good: shares of the good answers above the same thresholds.
        area: AUROC, the chance that a good answer has a larger score than a bad one.
    """

    bad: np.ndarray
    good: np.ndarray
    area: float


def roc_curves(solves: Solves, good: np.ndarray) -> dict[str, RocCurve]:
    """How well softmax, residual and evaluations tell good answers from bad ones.

    Args:
        solves: the solves. A score that is NaN counts as the lowest.
        good: `[N]` boolean, from `Examples.good`.

    Returns:
        A curve for each score; none with fewer than `ENOUGH` good or bad answers.
    """
    # Imported here, since a training that draws `residual_traces` does without it.
    from sklearn.metrics import auc, roc_curve

    if min(good.sum(), (~good).sum()) < ENOUGH:
        return {}
    curves = {}
    for name, score in (
        ("softmax maximum", solves.softmax),
        ("-residual", -solves.residual),
        ("-evaluations", -solves.iterations),
    ):
        ranked = np.nan_to_num(score.astype(np.float64), nan=-np.finfo(np.float64).max)
        above_bad, above_good, _ = roc_curve(good, ranked)
        curves[name] = RocCurve(above_bad, above_good, float(auc(above_bad, above_good)))
    return curves


def _in_dtypes_of(like: PyTree, z: PyTree) -> PyTree:
    """The state z in the dtypes of another, since a solve may be in a lower precision."""
    return jax.tree.map(lambda leaf, model: leaf.astype(model.dtype), z, like)
