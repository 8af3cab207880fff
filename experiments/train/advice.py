"""What a run's figures say is wrong with its solves, in plain words, and what to try."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.train import remedies
from experiments.train.remedies import KEEP_SMALL, LEARN_SLOWER

_CLOSE_TO_TOLERANCE = 3.0
"""A mean residual within this factor of the tolerance is called close to it."""


@dataclasses.dataclass(frozen=True)
class Trouble:
    """Something that is wrong.

    Attributes:
        title: what, in a few words.
        evidence: the figures that say so.
        advice: what to try, most promising first.
    """

    title: str
    evidence: str
    advice: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """From where on a figure means trouble.

    Attributes:
        converged: lowest share of samples that should converge, forward and backward.
        backward_residual: highest mean residual of the backward solves.
        diverged: most samples that may become non-finite.
        expanding: highest share of samples with a spectral radius above 1.
        radius: highest median of the spectral radius.
        uncertain: highest share of samples whose spectral radius could not be had.
        accuracy: most that the accuracy may fall when the solver goes on beyond its budget.
        lost: fewest right answers that must be lost with that, so that it is not chance.
    """

    converged: float = 0.5
    backward_residual: float = 0.1
    diverged: int = 0
    expanding: float = 0.1
    radius: float = 0.95
    uncertain: float = 0.25
    accuracy: float = 0.02
    lost: int = 3


def of_record(
    record: Mapping[str, Any],
    limits: Limits = Limits(),
    *,
    prefix: str = "",
    tolerances: Mapping[str, float | None] | None = None,
    approximate: bool = False,
    solver: str | None = None,
    backward_solver: str | None = None,
) -> list[Trouble]:
    """Troubles that a metrics record shows.

    Args:
        record: figures named as by `SolveTotals.record`: `forward_converged`,
            `backward_residual_mean` and so on. Those that are missing, None or NaN say nothing.
        limits: from where on a figure means trouble.
        prefix: stands before each name, such as `test_`.
        tolerances: of the solves, under `forward` and `backward`, where known.
        approximate: the gradient is `OneStep` or `Neumann`, which solves nothing backwards: its
            report is what was neglected and never says converged.
        solver: `--solver` of the run; None: not known, and advice is for any.
        backward_solver: likewise.
    """
    figures = {name: _known(record.get(prefix + name)) for name in _NAMES}
    tolerances = tolerances or {}
    forward = _forward(figures, limits, tolerances.get("forward"), solver)
    backward = _backward(
        figures,
        limits,
        tolerances.get("backward"),
        approximate=approximate,
        founded=not forward,
        solver=backward_solver,
    )
    return forward + backward


def of_spectrum(
    radius: np.ndarray,
    error: np.ndarray,
    converged: np.ndarray,
    limits: Limits = Limits(),
    *,
    solver: str | None = None,
) -> list[Trouble]:
    """Troubles that spectral radii show.

    Args:
        radius: as the field of `SpectralRadius`, `[B]`.
        error: likewise.
        converged: likewise.
        limits: from where on a figure means trouble.
        solver: `--solver` of the run; None: not known, and advice is for any.
    """
    radius, error, converged = np.asarray(radius), np.asarray(error), np.asarray(converged, bool)
    known = np.isfinite(radius)
    troubles = []
    if known.any():
        median = float(np.median(radius[known]))
        largest = int(np.nanargmax(np.where(known, radius, np.nan)))
        extent = f"median {median:.3g}, largest {radius[largest]:.3g} ± {error[largest]:.1g}"
        above = int((radius[known] > 1).sum())
        if above > limits.expanding * known.sum():
            troubles.append(
                Trouble(
                    "The cell does not contract",
                    f"{above} of {known.sum()} samples have a spectral radius above 1 ({extent})",
                    (
                        *remedies.expansion(solver),
                        KEEP_SMALL,
                        LEARN_SLOWER,
                        "not --gradient one_step, neumann or phantom, which need a radius below 1",
                    ),
                )
            )
        elif median > limits.radius:
            # Each plain iteration reduces the error by the radius, in the end.
            tenfold = math.log(10) / max(-math.log(min(median, 1.0)), 1e-12)
            pace = f"about {tenfold:.0f}" if tenfold < 1000 else "more than 1000"
            troubles.append(
                Trouble(
                    "The cell hardly contracts",
                    f"the spectral radius is close to 1 ({extent}): picard would take {pace} "
                    "evaluations for each further digit",
                    (remedies.slowness(solver), KEEP_SMALL),
                )
            )
    unknown = int((~known | ~converged).sum())
    if unknown > limits.uncertain * len(radius):
        broken = int((~known).sum())
        detail = f", {broken} of them because the Jacobian is not finite" if broken else ""
        troubles.append(
            Trouble(
                "The spectral radius is uncertain",
                f"{unknown} of {len(radius)} estimates did not reach their accuracy{detail}",
                (
                    "read the error bars before the values",
                    "put the forward solve right first: away from a solution the radius says little"
                    if not broken
                    else LEARN_SLOWER,
                ),
            )
        )
    return troubles


def of_budget(
    budgets: Sequence[int],
    accuracy: Sequence[float],
    trained: int,
    count: int,
    limits: Limits = Limits(),
) -> list[Trouble]:
    """Whether accuracy falls when the solver may use more than the `trained` evaluations.

    Args:
        budgets: `max_iter` of each solve, `trained` among them.
        accuracy: what each came to, in [0, 1].
        trained: `max_iter` that the run is evaluated with.
        count: answers that each accuracy is taken over.
        limits: from where on a figure means trouble.
    """
    reached = dict(zip(budgets, accuracy, strict=True))
    last = max(reached)
    fall = reached[trained] - reached[last]
    if last <= trained or not fall > limits.accuracy or round(fall * count) < limits.lost:
        return []
    return [
        Trouble(
            "Accuracy falls when the solver goes on",
            f"accuracy is {reached[trained]:.1%} with at most {trained} evaluations and "
            f"{reached[last]:.1%} with {last}",
            (
                f"keep the solver and its {trained} evaluations for this network, which has "
                "learned what they come to and not the equilibrium",
                "train with a larger --max-iter or a tighter --tol",
                KEEP_SMALL,
            ),
        )
    ]


def text(trouble: Trouble) -> str:
    """A few lines for a terminal."""
    lines = [f"warning: {trouble.title}", f"    {trouble.evidence}"]
    return "\n".join(lines + [f"    try: {advice}" for advice in trouble.advice])


_NAMES = tuple(
    f"{solve}_{name}"
    for solve in ("forward", "backward")
    for name in ("converged", "diverged", "residual_mean", "residual_worst")
)


def _known(value: Any) -> float | None:
    return None if value is None or math.isnan(value) else float(value)


def _forward(
    figures: Mapping[str, float | None], limits: Limits, tol: float | None, solver: str | None
) -> list[Trouble]:
    smaller_steps = (LEARN_SLOWER, remedies.damping(solver), KEEP_SMALL)
    troubles = _diverged(figures, limits, "forward", smaller_steps)
    converged, mean = figures["forward_converged"], figures["forward_residual_mean"]
    if converged is None or converged >= limits.converged:
        return troubles
    advice = [
        "raise --max-iter, if residuals still fall when it is used up",
        *remedies.expansion(solver),
        *remedies.tuning(solver),
        KEEP_SMALL,
        LEARN_SLOWER,
    ]
    if _is_close(mean, tol):
        advice.insert(0, f"a looser --tol than {tol:g}, since the residual is close to it")
    evidence = _evidence(figures, "forward")
    return [*troubles, Trouble("Few forward solves converge", evidence, tuple(advice))]


def _backward(
    figures: Mapping[str, float | None],
    limits: Limits,
    tol: float | None,
    *,
    approximate: bool,
    founded: bool,
    solver: str | None,
) -> list[Trouble]:
    first = () if founded else ("put the forward solve right first",)
    to_exact = "--gradient implicit, which solves for the gradient"
    to_gmres = ("--backward-solver gmres, which does not need a spectral radius below 1",)
    if solver == "gmres":
        to_gmres = ()
    solves = (to_exact,) if approximate else to_gmres
    troubles = _diverged(figures, limits, "backward", (*first, *solves, LEARN_SLOWER))
    converged, mean = figures["backward_converged"], figures["backward_residual_mean"]
    few = not approximate and converged is not None and converged < limits.converged
    if not few and (mean is None or mean <= limits.backward_residual):
        return troubles
    if approximate:
        evidence = f"the part of the gradient that is neglected: {_residuals(figures, 'backward')}"
        advice = (*first, to_exact, "with neumann: more --gradient-steps", KEEP_SMALL)
        return [*troubles, Trouble("Gradients are rough", evidence, advice)]
    advice = (*first, *to_gmres, "raise --backward-max-iter", KEEP_SMALL, LEARN_SLOWER)
    if _is_close(mean, tol):
        advice = (f"a looser --backward-tol than {tol:g}, since the residual is close", *advice)
    return [*troubles, Trouble("Gradients are inexact", _evidence(figures, "backward"), advice)]


def _diverged(
    figures: Mapping[str, float | None], limits: Limits, solve: str, advice: tuple[str, ...]
) -> list[Trouble]:
    count = figures[f"{solve}_diverged"]
    if count is None or count <= limits.diverged:
        return []
    title = f"Some {solve} solves became NaN or infinite"
    return [Trouble(title, f"{count:.0f} samples diverged", advice)]


def _evidence(figures: Mapping[str, float | None], solve: str) -> str:
    residuals = _residuals(figures, solve)
    converged = figures[f"{solve}_converged"]
    if converged is None:
        return residuals
    share = f"{converged:.1%} of the {solve} solves reach the tolerance"
    return f"{share}; {residuals}" if residuals else share


def _residuals(figures: Mapping[str, float | None], solve: str) -> str:
    known = {kind: figures[f"{solve}_residual_{kind}"] for kind in ("mean", "worst")}
    return ", ".join(
        f"{kind} residual {value:.2g}" for kind, value in known.items() if value is not None
    )


def _is_close(residual: float | None, tol: float | None) -> bool:
    return residual is not None and tol is not None and residual <= _CLOSE_TO_TOLERANCE * tol
