"""What the reports of solves say is wrong, in plain words, and what to try against it.

`diagnose` reads what a forward and a backward solve reported, and `diagnose_budgets` reads how
accuracy depends on the number of evaluations. Both return findings as data. They run on the host,
outside `jax.jit`, on values that have been computed.
"""

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import numpy as np

from deq_jax.gradients.implicit import Implicit
from deq_jax.gradients.neumann import Neumann
from deq_jax.gradients.one_step import OneStep
from deq_jax.gradients.policy import GradientPolicy, check_policy
from deq_jax.linear.gmres import GMRES
from deq_jax.linear.krylov import LinearSolver
from deq_jax.solve import Solver, check_solver
from deq_jax.solvers.anderson import Anderson
from deq_jax.solvers.broyden import Broyden
from deq_jax.solvers.newton_krylov import NewtonKrylov
from deq_jax.solvers.picard import Picard
from deq_jax.stability.spectrum import SpectralRadius
from deq_jax.stats import BackwardProbe, SolveStats, Status

_CLOSE_TO_TOLERANCE = 3.0
"""A mean residual within this factor of the tolerance is called close to it."""


class Severity(enum.IntEnum):
    """How bad a finding is. Severities can be compared: `finding.severity >= Severity.WARNING`."""

    NOTE = 1
    """Good to know. Results are accurate, or nearly so."""
    WARNING = 2
    """Results are less accurate than was asked for, or will soon be."""
    ERROR = 3
    """Results are not numbers, or hardly better than the answer zero."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that is wrong. `print(finding)` shows it in a few lines.

    Attributes:
        title: what is wrong, in a few words. The same trouble has the same title every time.
        severity: how bad it is.
        evidence: one sentence with the figures that say so.
        advice: what to try, as sentences, most promising first. Code stands in backticks: it names
            arguments and classes of this library.
    """

    title: str
    severity: Severity
    evidence: str
    advice: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.severity.name.lower()}: {self.title}", f"    {self.evidence}"]
        return "\n".join(lines + [f"    try: {advice}" for advice in self.advice])


@dataclasses.dataclass(frozen=True)
class Limits:
    """The values beyond which a figure becomes a finding.

    Attributes:
        converged: lowest share of samples that should converge, forward and backward.
        backward_residual: highest mean residual of the backward solves.
        unusable: mean residual of solves from which on a finding is an `ERROR`. The answer zero
            has a residual of 1.
        diverged: most samples that may become non-finite.
        expanding: highest share of samples with a spectral radius above 1.
        radius: highest median of the spectral radius.
        uncertain: highest share of samples whose spectral radius is not known accurately.
        accuracy: most that the accuracy may fall when the solver goes on beyond its budget.
        lost: fewest right answers that must be lost by that, so that it is not chance.
    """

    converged: float = 0.5
    backward_residual: float = 0.1
    unusable: float = 0.5
    diverged: int = 0
    expanding: float = 0.1
    radius: float = 0.95
    uncertain: float = 0.25
    accuracy: float = 0.02
    lost: int = 3


@dataclasses.dataclass(frozen=True)
class SolveSummary:
    """Figures of one or many solves, as Python numbers. `summarize` makes one from a report.

    A loop that keeps sums over an epoch can build its own. A figure that is left out is NaN, and
    so is one that is passed as None (what JSON has in the place of NaN); it leads to no finding.

    Attributes:
        samples: number of samples solved.
        converged: share of samples that met their tolerance, in [0, 1].
        diverged: number of samples that became non-finite.
        residual_mean: mean residual of the samples whose residual is finite.
        residual_worst: largest residual; infinite if a sample never had a finite one.
        evaluations: evaluations of f (backward: products) in a solve, mean over the solves.
        iterations: evaluations until a sample stopped, mean over the samples.

    Raises:
        TypeError: a field is no number, or is traced because this runs inside `jax.jit`.
    """

    samples: float = math.nan
    converged: float = math.nan
    diverged: float = math.nan
    residual_mean: float = math.nan
    residual_worst: float = math.nan
    evaluations: float = math.nan
    iterations: float = math.nan

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value: Any = getattr(self, field.name)
            number = math.nan if value is None else _number(f"SolveSummary.{field.name}", value)
            object.__setattr__(self, field.name, number)


def summarize(stats: SolveStats | BackwardProbe) -> SolveSummary:
    """The figures of a report, over all of its samples.

    Args:
        stats: the report of a forward solve or the cotangent of a probe. Its arrays may have any
            shape: `[B]`, none with `batched=False`, or `[steps, B]` for the reports of several
            solves that were stacked, with `evaluations` `[steps]`.

    Raises:
        TypeError: `stats` is no report, or is traced because this runs inside `jax.jit`.
    """
    if not isinstance(stats, SolveStats | BackwardProbe):
        raise TypeError(f"stats must be SolveStats or a BackwardProbe, got {stats!r}")
    names = ("residual", "iterations", "status", "evaluations")
    fields = {name: getattr(stats, name) for name in names}
    on_host = _on_host(type(stats).__name__, fields)
    residual, iterations, status, evaluations = (
        np.asarray(on_host[name], np.float64) for name in names
    )
    known = residual[~np.isnan(residual)]
    return SolveSummary(
        samples=status.size,
        converged=_mean(status == Status.CONVERGED),
        diverged=int((status == Status.DIVERGED).sum()),
        residual_mean=_mean(residual[np.isfinite(residual)]),
        residual_worst=known.max() if known.size else math.nan,
        evaluations=_mean(evaluations),
        iterations=_mean(iterations),
    )


def diagnose(
    stats: SolveStats | SolveSummary | None = None,
    report: BackwardProbe | SolveStats | SolveSummary | None = None,
    *,
    solver: Solver | None = None,
    gradient: GradientPolicy | None = None,
    spectrum: SpectralRadius | None = None,
    limits: Limits = Limits(),
) -> list[Finding]:
    """What is wrong with solves, and what to try; an empty list where nothing is.

    Reads results on the host, for example once in 100 training steps:

        stats, report = jax.device_get((stats, report))
        for finding in diagnose(stats, report, solver=Anderson(), gradient=Implicit()):
            print(finding)

    Figures that are missing or NaN lead to no finding.

    Args:
        stats: the report of the forward solve, or a summary of many. None leaves it out.
        report: the report of the backward solve: the cotangent of a `BackwardProbe`, or a summary
            of many. None leaves it out.
        solver: the solver of the forward solve. Its tolerance and its options make the advice more
            precise, and what is in use is not recommended. With `tol=0` and `atol=0` no solve is
            meant to converge, and none is missed. None means that the solver is not known.
        gradient: the policy of the gradient. The report of `OneStep` and of `Neumann` says what
            they neglect, and never that they converged. None means that the policy is not known.
        spectrum: spectral radii of ∂f/∂z at the solutions, from `spectral_radius`.
        limits: the values beyond which a figure becomes a finding.

    Returns:
        Findings about the forward solves, then the backward solves, then the spectral radii.

    Raises:
        TypeError: an argument has the wrong type, or is traced because this runs inside `jax.jit`.
    """
    if solver is not None:
        check_solver("solver", solver)
    if gradient is not None:
        check_policy("gradient", gradient)
    findings: list[Finding] = []
    if stats is not None:
        if isinstance(stats, BackwardProbe):
            raise TypeError(
                "stats is the report of the forward solve, got a BackwardProbe; to diagnose the "
                "backward solve alone, write diagnose(None, report)"
            )
        findings += _forward(_summary("stats", stats), solver, limits)
    if report is not None:
        sound = not findings
        findings += _backward(_summary("report", report), solver, gradient, limits, sound=sound)
    if spectrum is not None:
        findings += _spectrum(spectrum, solver, gradient, limits)
    return findings


def diagnose_budgets(
    budgets: Sequence[int],
    accuracy: Sequence[float],
    *,
    trained: int,
    answers: int,
    limits: Limits = Limits(),
) -> list[Finding]:
    """Whether accuracy falls when the solver goes on beyond the budget that was trained with.

    Args:
        budgets: `max_iter` of the solver, one for each evaluation of the network.
        accuracy: the accuracy with each of them, in [0, 1].
        trained: the budget that the network was trained with, one of `budgets`.
        answers: number of answers that each accuracy is the mean of.
        limits: the values beyond which a figure becomes a finding.

    Returns:
        One finding, or none.

    Raises:
        ValueError: `trained` is not one of `budgets`, or `accuracy` has another length.
    """
    reached = dict(zip(budgets, accuracy, strict=True))
    if trained not in reached:
        raise ValueError(f"trained must be one of budgets {tuple(budgets)}, got {trained}")
    last = max(reached)
    fall = reached[trained] - reached[last]
    if last <= trained or not fall > limits.accuracy or round(fall * answers) < limits.lost:
        return []
    evidence = (
        f"Accuracy is {reached[trained]:.1%} with at most {trained} evaluations and "
        f"{reached[last]:.1%} with {last}."
    )
    advice = (
        f"Keep the solver and `max_iter={trained}` for this network, which has learned what the "
        "solver returns by then and not the equilibrium.",
        "Train with a larger `max_iter` or a smaller `tol`.",
        *_KEEP_SMALL,
    )
    return [Finding("Accuracy falls when the solver goes on", Severity.WARNING, evidence, advice)]


def _forward(figures: SolveSummary, solver: Solver | None, limits: Limits) -> list[Finding]:
    smaller_steps = (_LEARN_SLOWER, _damping(solver), *_KEEP_SMALL)
    findings = _diverged(figures, "forward", smaller_steps, limits)
    # A comparison with NaN is false.
    if not figures.converged < limits.converged or _never_converges(solver):
        return findings
    tol = None if solver is None else _number("solver.tol", solver.tol)
    close = _is_close(figures.residual_mean, tol)
    advice = (
        *_looser("`tol` of the solver", tol, close),
        f"Raise `max_iter`{_above(solver)} if residuals still fall when it is used up.",
        *_expansion(solver),
        *_tuning(solver),
        *_KEEP_SMALL,
        _LEARN_SLOWER,
    )
    severity = Severity.NOTE if close else _severity(figures, limits)
    evidence = _evidence(figures, "forward")
    return [*findings, Finding("Few forward solves converge", severity, evidence, advice)]


def _backward(
    figures: SolveSummary,
    solver: Solver | None,
    gradient: GradientPolicy | None,
    limits: Limits,
    *,
    sound: bool,
) -> list[Finding]:
    """`sound`: the forward solves show no trouble."""
    first = () if sound else ("Put the forward solves right first.",)
    if isinstance(gradient, OneStep | Neumann):
        return _neglected(figures, gradient, first, limits)
    used, tol = _backward_solver(solver, gradient)
    to_gmres: tuple[str, ...] = ()
    if not isinstance(used, GMRES):
        how = "`gradient=Implicit(solver=GMRES())`"
        to_gmres = (f"Use {how}, which does not need a spectral radius below 1.",)
    findings = _diverged(figures, "backward", (*first, *to_gmres, _LEARN_SLOWER), limits)
    few = figures.converged < limits.converged and not _never_converges(used, tol)
    if not few and not figures.residual_mean > limits.backward_residual:
        return findings
    close = _is_close(figures.residual_mean, tol)
    advice = (
        *_looser("`Implicit(tol=...)`", tol, close),
        *first,
        *to_gmres,
        f"Raise `Implicit(max_iter=...)`{_above(used, gradient)}.",
        *_KEEP_SMALL,
        _LEARN_SLOWER,
    )
    severity = Severity.NOTE if close else _severity(figures, limits)
    evidence = _evidence(figures, "backward")
    return [*findings, Finding("Gradients are inexact", severity, evidence, advice)]


def _neglected(
    figures: SolveSummary, gradient: OneStep | Neumann, first: tuple[str, ...], limits: Limits
) -> list[Finding]:
    """Findings about a gradient that solves nothing: its residual is the part that it neglects."""
    to_exact = "Use `gradient=Implicit()`, which solves for the gradient."
    findings = _diverged(figures, "backward", (*first, to_exact, _LEARN_SLOWER), limits)
    if not figures.residual_mean > limits.backward_residual:
        return findings
    if isinstance(gradient, Neumann):
        more_terms = f"Raise `terms` of `Neumann` above {gradient.terms}"
    else:
        more_terms = "Use `gradient=Neumann()` with several `terms`"
    evidence = f"The neglected part of the gradient is large: {_residuals(figures)}."
    advice = (
        *first,
        to_exact,
        f"{more_terms}, which helps only where the spectral radius is below 1.",
        *_KEEP_SMALL,
    )
    return [*findings, Finding("Gradients are rough", Severity.WARNING, evidence, advice)]


def _spectrum(
    spectrum: SpectralRadius,
    solver: Solver | None,
    gradient: GradientPolicy | None,
    limits: Limits,
) -> list[Finding]:
    if not isinstance(spectrum, SpectralRadius):
        raise TypeError(f"spectrum must be what spectral_radius returns, got {spectrum!r}")
    names = ("radius", "error", "converged")
    on_host = _on_host("SpectralRadius", {name: getattr(spectrum, name) for name in names})
    radius, error = (np.asarray(on_host[name], np.float64).ravel() for name in names[:2])
    converged = np.asarray(on_host["converged"], bool).ravel()
    known = np.isfinite(radius)
    findings = []
    if known.any():
        median = float(np.median(radius[known]))
        largest = int(np.argmax(np.where(known, radius, -np.inf)))
        extent = f"median {median:.3g}, largest {radius[largest]:.3g} ± {error[largest]:.1g}"
        above = int((radius[known] > 1).sum())
        if above > limits.expanding * known.sum():
            evidence = (
                f"{above} of {known.sum()} samples have a spectral radius above 1 ({extent})."
            )
            advice = (
                *_expansion(solver),
                *_KEEP_SMALL,
                _LEARN_SLOWER,
                _exact_gradient(gradient),
            )
            findings.append(
                Finding("The cell does not contract", Severity.WARNING, evidence, advice)
            )
        elif median > limits.radius:
            # Each plain iteration reduces the error by the radius, in the end.
            tenfold = math.log(10) / max(-math.log(min(median, 1.0)), 1e-12)
            pace = f"about {tenfold:.0f}" if tenfold < 1000 else "more than 1000"
            evidence = (
                f"The spectral radius is close to 1 ({extent}), so that `Picard` would take {pace} "
                "evaluations for each further digit."
            )
            advice = (_slowness(solver), *_KEEP_SMALL)
            findings.append(Finding("The cell hardly contracts", Severity.NOTE, evidence, advice))
    unknown = int((~known | ~converged).sum())
    if unknown > limits.uncertain * len(radius):
        broken = int((~known).sum())
        detail = f", {broken} of them because the Jacobian is not finite" if broken else ""
        evidence = f"{unknown} of {len(radius)} estimates did not reach their accuracy{detail}."
        right_first = (
            "Put the forward solves right first, because away from a solution the radius says "
            "little."
        )
        advice = (
            "Read the `error` of each radius before its value.",
            _LEARN_SLOWER if broken else right_first,
        )
        severity = Severity.WARNING if broken else Severity.NOTE
        findings.append(Finding("The spectral radius is uncertain", severity, evidence, advice))
    return findings


def _diverged(
    figures: SolveSummary, direction: str, advice: tuple[str, ...], limits: Limits
) -> list[Finding]:
    count = figures.diverged
    if not count > limits.diverged:
        return []
    of_all = "" if math.isnan(figures.samples) else f" of {figures.samples:.0f}"
    samples = "sample" if count == 1 and not of_all else "samples"
    evidence = f"{count:.0f}{of_all} {samples} became NaN or infinite."
    title = f"Some {direction} solves became NaN or infinite"
    return [Finding(title, Severity.ERROR, evidence, advice)]


def _severity(figures: SolveSummary, limits: Limits) -> Severity:
    return Severity.ERROR if figures.residual_mean >= limits.unusable else Severity.WARNING


def _evidence(figures: SolveSummary, direction: str) -> str:
    residuals = _residuals(figures)
    if math.isnan(figures.converged):
        return f"{residuals[:1].upper()}{residuals[1:]}."
    share = f"{figures.converged:.1%} of the {direction} solves reach the tolerance"
    return f"{share}; {residuals}." if residuals else f"{share}."


def _residuals(figures: SolveSummary) -> str:
    mean, worst = figures.residual_mean, figures.residual_worst
    if math.isnan(mean):
        return "" if math.isnan(worst) else f"the worst residual is {worst:.2g}"
    begin = f"the mean residual is {mean:.2g}"
    return begin if math.isnan(worst) else f"{begin} and the worst {worst:.2g}"


# Advice depends on the solver and the gradient in use, so that nobody is told to switch to them.

_KEEP_SMALL = (
    "Keep the Jacobian of f small: train with `JacobianRegularization`, or give the layer "
    "`normalization=WeightNorm()` or `normalization=SpectralNorm()`.",
    "Start gently: train the first steps with `solver=Picard(tol=0, max_iter=9)` and "
    "`gradient=Unrolled()`.",
)
_LEARN_SLOWER = "Train with a smaller learning rate."


def _damping(solver: Solver | None) -> str:
    """Smaller steps of the solver."""
    if isinstance(solver, Anderson):
        return f"Damp the solver with `solver=Anderson(mixing={_smaller(solver.mixing)})`."
    if isinstance(solver, Picard):
        return f"Damp the solver with `solver=Picard(damping={_smaller(solver.damping)})`."
    if isinstance(solver, Broyden) and not solver.line_search:
        # A smaller `step_size` alone keeps hardly a sample from overflow.
        return "Damp the solver with `solver=Broyden(line_search=True)`."
    # Newton's method halves its steps by itself.
    return "Use a damped solver: `solver=Anderson(mixing=0.5)` or `solver=Picard(damping=0.5)`."


def _expansion(solver: Solver | None) -> tuple[str, ...]:
    """Solvers that cope with a spectral radius above 1; none where the best of them is in use."""
    if isinstance(solver, Broyden):
        return ()
    advice = "Use `solver=Broyden()`, which copes with a spectral radius above 1. "
    if not isinstance(solver, NewtonKrylov):
        advice += "`NewtonKrylov()` does too, but it may stall, above all with a ReLU. "
    return (f"{advice}`Picard` cannot, and `Anderson` often can.",)


def _slowness(solver: Solver | None) -> str:
    """Solvers that are better than plain iteration where that takes long."""
    if isinstance(solver, Anderson):
        return f"Use a longer `history` of `Anderson` than {solver.history}."
    if isinstance(solver, Broyden):
        return "Keep `solver=Broyden()`, which needs fewer evaluations than `Picard`."
    advice = "Use `solver=Anderson()` or `solver=Broyden()`, which need fewer evaluations"
    if solver is None:
        return f"{advice} than `Picard`. A longer `history` helps `Anderson`."
    return f"{advice}."


def _tuning(solver: Solver | None) -> tuple[str, ...]:
    """Other settings of Anderson's method, where it may be in use."""
    if solver is None:
        return ("With `Anderson`, set `mixing` below 1, such as 0.5, or use a longer `history`.",)
    if isinstance(solver, Anderson):
        mixing = _smaller(solver.mixing)
        return (f"Set `mixing={mixing}` or use a longer `history` than {solver.history}.",)
    return ()


def _exact_gradient(gradient: GradientPolicy | None) -> str:
    """Which gradients there are where the spectral radius exceeds 1."""
    verb = "Keep" if isinstance(gradient, Implicit) else "Use"
    return (
        f"{verb} `gradient=Implicit()`: `OneStep`, `Neumann` and `Phantom` need a spectral radius "
        "below 1."
    )


def _looser(argument: str, tol: float | None, close: bool) -> tuple[str, ...]:
    """A looser tolerance, where it would make do."""
    if not close:
        return ()
    return (f"Set {argument} above {tol:g}, since the mean residual is close to it.",)


def _above(solver: Any, gradient: GradientPolicy | None = None) -> str:
    """The number of evaluations now in use, for advice to raise it."""
    number = getattr(solver, "max_iter", None)
    if isinstance(gradient, Implicit) and gradient.max_iter is not None:
        number = gradient.max_iter
    return "" if number is None else f" above {number}"


def _smaller(step: Any) -> str:
    """At most half of the length of a solver's steps."""
    return f"{min(0.5, _number('solver', step) / 2):g}"


def _backward_solver(
    solver: Solver | None, gradient: GradientPolicy | None
) -> tuple[Solver | LinearSolver | None, float | None]:
    """The solver of the backward solve and its tolerance, each None where it is not known."""
    if not isinstance(gradient, Implicit):
        return None, None
    if solver is None and gradient.solver is None:
        tol = gradient.tol
        return None, None if tol is None else _number("gradient.tol", tol)
    # With a solver of its own the policy does not ask for the forward one.
    used = gradient.backward_solver(solver if solver is not None else Anderson())
    return used, _number("gradient.tol", used.tol)


def _never_converges(solver: Any, tol: float | None = None) -> bool:
    """Whether the solver is told to use up its evaluations, so that nothing counts as converged."""
    if solver is not None:
        tol = _number("solver.tol", solver.tol)
    return tol == 0 and not _number("solver.atol", getattr(solver, "atol", 0.0)) > 0


def _is_close(residual: float, tol: float | None) -> bool:
    return tol is not None and residual <= _CLOSE_TO_TOLERANCE * tol


def _summary(name: str, report: Any) -> SolveSummary:
    if isinstance(report, SolveSummary):
        return report
    if not isinstance(report, SolveStats | BackwardProbe):
        expected = "SolveStats" if name == "stats" else "a BackwardProbe"
        raise TypeError(f"{name} must be {expected} or a SolveSummary, got {report!r}")
    return summarize(report)


def _on_host(name: str, tree: Any) -> Any:
    """Values of a pytree as NumPy arrays; raises a TypeError if one of them is traced."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{name} is traced, because a diagnosis was called inside jax.jit, jax.grad or jax.vmap"
            ", where there are no values yet. Return the report from the compiled function, and "
            "call diagnose on what that returns"
        )
    return jax.device_get(tree)


def _number(name: str, value: Any) -> float:
    """A scalar of any kind as a Python number."""
    value = _on_host(name, value)
    if np.ndim(value) or not isinstance(value, int | float | np.generic | np.ndarray):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return float(value)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan
