"""Findings: from where on there are any, what they say, and that what they name exists."""

import ast
import dataclasses
import inspect
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import deq_jax
import deq_jax.nnx
from deq_jax import (
    GMRES,
    Anderson,
    BackwardProbe,
    BiCGStab,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    SolveStats,
    Status,
    Unrolled,
    deq_fixed_point,
    diagnose,
    solve_fixed_point,
)
from deq_jax.stability import (
    Finding,
    JacobianRegularization,
    Limits,
    Severity,
    SolveSummary,
    SpectralNorm,
    SpectralRadius,
    WeightNorm,
    diagnose_budgets,
    spectral_radius,
    summarize,
)

ROOT = Path(__file__).parent.parent.parent
FORWARD = SolveSummary(
    samples=64, converged=1.0, diverged=0, residual_mean=0.008, residual_worst=0.01, evaluations=20
)
BACKWARD = SolveSummary(converged=0.9, diverged=0, residual_mean=0.02, residual_worst=0.9)
SOLVERS = (None, Anderson(), Broyden(), NewtonKrylov(), Picard())
GRADIENTS = (None, Implicit(), OneStep(), Neumann(), Phantom(), Unrolled())


def found(forward=None, backward=None, **kwargs):
    """Findings about good figures with some of them changed."""
    stats = dataclasses.replace(FORWARD, **(forward or {}))
    report = dataclasses.replace(BACKWARD, **(backward or {}))
    return diagnose(stats, report, **kwargs)


def titles(*args, **kwargs):
    return [finding.title for finding in found(*args, **kwargs)]


@pytest.mark.parametrize(
    ("forward", "backward", "expected"),
    [
        ({}, {}, []),
        ({"converged": 0.5}, {}, []),
        ({"converged": 0.49}, {}, ["Few forward solves converge"]),
        ({"diverged": 1}, {}, ["Some forward solves became NaN or infinite"]),
        ({}, {"converged": 0.5}, []),
        ({}, {"converged": 0.49}, ["Gradients are inexact"]),
        ({}, {"residual_mean": 0.1}, []),
        ({}, {"residual_mean": 0.11}, ["Gradients are inexact"]),
        ({}, {"residual_mean": math.inf}, ["Gradients are inexact"]),
        ({}, {"diverged": 2}, ["Some backward solves became NaN or infinite"]),
        (
            {"converged": 0.0},
            {"converged": 0.0},
            ["Few forward solves converge", "Gradients are inexact"],
        ),
        (
            {"converged": 0.0, "diverged": 3},
            {"residual_mean": 0.2, "diverged": 3},
            [
                "Some forward solves became NaN or infinite",
                "Few forward solves converge",
                "Some backward solves became NaN or infinite",
                "Gradients are inexact",
            ],
        ),
        # A missing figure, or None, which JSON has in the place of NaN.
        ({"residual_worst": None}, {"residual_mean": math.nan}, []),
        ({"converged": None, "diverged": None}, {"converged": math.nan, "diverged": None}, []),
    ],
)
def test_figures(forward, backward, expected):
    assert titles(forward, backward) == expected


def test_missing_figures_say_nothing():
    assert diagnose() == diagnose(SolveSummary(), SolveSummary()) == []
    (finding,) = diagnose(SolveSummary(converged=0.25))
    assert finding.evidence == "25.0% of the forward solves reach the tolerance."
    (finding,) = diagnose(None, SolveSummary(residual_mean=0.25))
    assert finding.evidence == "The mean residual is 0.25."
    assert diagnose(SolveSummary(residual_worst=1.0), SolveSummary(residual_worst=1.0)) == []


def test_limits():
    assert titles({}, {}, limits=Limits(converged=0.95)) == ["Gradients are inexact"]
    assert titles({}, {}, limits=Limits(backward_residual=0.01)) == ["Gradients are inexact"]
    assert titles({"diverged": 3}, {}, limits=Limits(diverged=3)) == []
    assert titles({"diverged": 4}, {}, limits=Limits(diverged=3)) != []


def test_severity():
    def severity(*args, **kwargs):
        (finding,) = found(*args, **kwargs)
        return finding.severity

    few = {"converged": 0.0}
    assert severity({"diverged": 1}) == Severity.ERROR
    assert severity(few | {"residual_mean": 0.49}) == Severity.WARNING
    assert severity(few | {"residual_mean": 0.5}) == Severity.ERROR
    assert severity(few | {"residual_mean": 0.5}, limits=Limits(unusable=0.6)) == Severity.WARNING
    assert severity(few | {"residual_mean": None}) == Severity.WARNING
    assert severity({}, {"residual_mean": 0.6}) == Severity.ERROR
    # What is close to its tolerance is nearly as accurate as was asked for.
    assert severity(few, solver=Anderson(tol=0.003)) == Severity.NOTE
    assert severity({}, few, gradient=Implicit(tol=0.01)) == Severity.NOTE
    # An approximation is rough by choice.
    assert severity({}, {"residual_mean": 0.9}, gradient=OneStep()) == Severity.WARNING
    assert Severity.NOTE < Severity.WARNING < Severity.ERROR


def test_evidence_has_the_figures():
    (finding,) = found({"converged": 0.125, "residual_mean": 0.034})
    assert finding.evidence == (
        "12.5% of the forward solves reach the tolerance; the mean residual is 0.034 and the worst "
        "0.01."
    )
    (finding,) = found({"converged": 0.125, "residual_mean": None})
    assert finding.evidence.endswith("reach the tolerance; the worst residual is 0.01.")
    (finding,) = found({}, {"converged": 0.25})
    assert finding.evidence.startswith("25.0% of the backward solves reach")
    (finding,) = found({"diverged": 2})
    assert finding.evidence == "2 of 64 samples became NaN or infinite."
    # BACKWARD does not say how many samples there are.
    for count, begin in ((1, "1 sample became"), (2, "2 samples became")):
        (finding,) = found({}, {"diverged": count})
        assert finding.evidence.startswith(begin)


def test_a_looser_tolerance_only_where_the_residual_is_close():
    few = {"converged": 0.0}
    for tol, close in ((0.003, True), (0.0025, False)):
        (finding,) = found(few, solver=Picard(tol=tol))
        looser = finding.advice[0].startswith(f"Set `tol` of the solver above {tol:g}, since")
        assert looser == close
    for tol, close in ((0.007, True), (0.0065, False)):
        for options in (
            {"gradient": Implicit(tol=tol)},
            {"gradient": Implicit(tol=np.float32(tol)), "solver": Anderson()},
            {"gradient": Implicit(solver=GMRES(tol=tol)), "solver": Anderson(tol=1e-9)},
            {"gradient": Implicit(), "solver": Anderson(tol=tol)},
        ):
            (finding,) = found({}, few, **options)
            looser = finding.advice[0].startswith(f"Set `Implicit(tol=...)` above {tol:g}, since")
            assert looser == close
    # Not known: neither the forward tolerance nor, without a policy, the backward one.
    forward, backward = found(few, few)
    assert "`tol`" not in str(forward)
    assert "tol=..." not in str(backward)
    (finding,) = found({}, few, solver=Anderson(tol=0.01))
    assert "tol=..." not in str(finding)


def test_nothing_is_meant_to_converge_without_a_tolerance():
    few = {"converged": 0.0}
    assert titles(few, few, solver=Picard(tol=0, max_iter=9), gradient=Implicit()) == []
    assert titles(few, solver=Picard(tol=0, atol=1e-3)) == ["Few forward solves converge"]
    assert titles({}, few, solver=Anderson(tol=0), gradient=Implicit(tol=1e-3)) != []
    assert titles({}, few, gradient=Implicit(solver=GMRES(tol=0))) == []
    inexact = few | {"residual_mean": 0.2}
    assert titles({}, inexact, gradient=Implicit(tol=0)) == ["Gradients are inexact"]


@pytest.mark.parametrize("gradient", [OneStep(), Neumann(terms=3)])
def test_approximate_gradients_are_judged_by_what_they_neglect(gradient):
    assert titles({}, {"converged": 0.0}, gradient=gradient) == []
    report = {"converged": 0.0, "residual_mean": 0.3}
    (finding,) = found({}, report, gradient=gradient)
    assert finding.title == "Gradients are rough"
    assert "the mean residual is 0.3 and the worst 0.9" in finding.evidence
    assert finding.advice[0].startswith("Use `gradient=Implicit()`")
    more = {OneStep: "Use `gradient=Neumann()`", Neumann: "Raise `terms` of `Neumann` above 3"}
    assert finding.advice[1].startswith(more[type(gradient)])
    (finding,) = found({}, {"diverged": 1}, gradient=gradient)
    assert finding.advice[0].startswith("Use `gradient=Implicit()`")


def test_the_forward_solves_come_first():
    for gradient in (None, OneStep()):
        _, backward = found({"converged": 0.0}, {"residual_mean": 0.3}, gradient=gradient)
        assert backward.advice[0] == "Put the forward solves right first."
        (backward,) = found({}, {"residual_mean": 0.3}, gradient=gradient)
        assert "Put the forward solves right first." not in backward.advice


def of_spectrum(radius, error=0.0, converged=True, **kwargs):
    radius = np.asarray(radius, float)
    error, converged = (np.broadcast_to(one, radius.shape) for one in (error, converged))
    return diagnose(spectrum=SpectralRadius(radius, error, converged, np.int32(32)), **kwargs)


def test_spectra_that_do_not_contract():
    assert of_spectrum([0.5] * 9 + [1.5]) == []  # a tenth is allowed
    (finding,) = of_spectrum([0.5] * 8 + [1.25, 1.5], error=0.01)
    assert finding.title == "The cell does not contract"
    assert finding.evidence == (
        "2 of 10 samples have a spectral radius above 1 (median 0.5, largest 1.5 ± 0.01)."
    )
    assert of_spectrum([0.95, 0.95, 0.95]) == []
    (finding,) = of_spectrum([0.96, 0.96, 0.96])
    assert finding.title == "The cell hardly contracts"
    # 0.96^56.4 = 0.1.
    assert "about 56 evaluations for each further digit" in finding.evidence
    assert "more than 1000" in of_spectrum([1.0])[0].evidence
    assert of_spectrum(1.5)[0].evidence.startswith("1 of 1")  # batched=False


def test_limits_of_spectra():
    some = [0.5] * 7 + [1.5] * 3
    assert of_spectrum(some, limits=Limits(expanding=0.3)) == []
    assert len(of_spectrum(some, limits=Limits(expanding=0.29))) == 1
    assert of_spectrum([0.98], limits=Limits(radius=0.98)) == []
    assert len(of_spectrum([0.98], limits=Limits(radius=0.97))) == 1
    converged = np.array([True, False])
    assert of_spectrum([0.5, 0.5], 0.2, converged, limits=Limits(uncertain=0.5)) == []
    assert len(of_spectrum([0.5, 0.5], 0.2, converged, limits=Limits(uncertain=0.49))) == 1


def test_spectra_that_are_not_known():
    converged = np.array([True] * 3 + [False])
    assert of_spectrum([0.5] * 4, 0.2, converged) == []
    (finding,) = of_spectrum([0.5, 0.5, 0.5, np.nan], converged=[True, False, True, False])
    assert finding.title == "The spectral radius is uncertain"
    assert finding.evidence == (
        "2 of 4 estimates did not reach their accuracy, 1 of them because the Jacobian is not "
        "finite."
    )
    assert finding.severity == Severity.WARNING
    assert finding.advice[1] == "Train with a smaller learning rate."
    for converged in (False, True):
        (finding,) = of_spectrum([np.nan, np.nan], np.nan, converged)
        assert finding.evidence.startswith("2 of 2 estimates")
    (finding,) = of_spectrum([0.5, 0.5], 0.2, False)
    assert finding.evidence == "2 of 2 estimates did not reach their accuracy."
    assert finding.severity == Severity.NOTE
    assert finding.advice[1].startswith("Put the forward solves right first")


def test_budgets():
    budgets = (1, 5, 25, 100)

    def of_budgets(accuracy, trained, answers, **kwargs):
        return diagnose_budgets(budgets, accuracy, trained=trained, answers=answers, **kwargs)

    assert of_budgets((0.1, 0.8, 0.9, 0.89), 25, 1000) == []
    assert of_budgets((0.1, 0.8, 0.9, 0.5), 100, 1000) == []
    assert of_budgets((0.1, 0.8, 0.9, 0.8), 25, 20) == []  # two answers
    assert of_budgets((0.1, 0.8, 0.9, 0.8), 25, 30, limits=Limits(accuracy=0.11)) == []
    assert of_budgets((0.1, 0.8, 0.9, 0.8), 25, 30, limits=Limits(lost=4)) == []
    assert of_budgets((0.1, 0.8, 0.9, math.nan), 25, 30) == []
    (finding,) = of_budgets((0.1, 0.8, 0.9, 0.8), 25, 30)
    assert finding.evidence == "Accuracy is 90.0% with at most 25 evaluations and 80.0% with 100."
    with pytest.raises(ValueError, match=r"trained must be one of budgets \(1, 5, 25, 100\)"):
        of_budgets((0.1, 0.8, 0.9, 0.8), 24, 30)


def test_text():
    finding = Finding("Title", Severity.WARNING, "Evidence.", ("One.", "Two."))
    assert str(finding) == "warning: Title\n    Evidence.\n    try: One.\n    try: Two."


def everything(solver=None, gradient=None):
    """Each finding there is, at figures close to their tolerance and far from it."""
    options = {"solver": solver, "gradient": gradient}
    bad = SolveSummary(converged=0.0, diverged=1, residual_mean=1.0, residual_worst=1.0)
    close = dataclasses.replace(bad, residual_mean=2e-4)
    findings = diagnose(bad, bad, **options) + diagnose(close, close, **options)
    findings += diagnose(None, bad, **options)
    for radius, error, converged in ((2.0, 0, True), (0.99, 0, True), (np.nan, 0, True)):
        findings += of_spectrum([radius], error, converged, **options)
    findings += of_spectrum([0.5], 1, False, **options)
    return findings + diagnose_budgets((1, 2), (0.9, 0.1), trained=1, answers=100)


EVERYTHING = [
    (solver, gradient, everything(solver, gradient)) for solver in SOLVERS for gradient in GRADIENTS
]


def code_in(words):
    return re.findall(r"`([^`]+)`", words)


def test_everything_is_there():
    assert {finding.title for _, _, findings in EVERYTHING for finding in findings} == {
        "Some forward solves became NaN or infinite",
        "Few forward solves converge",
        "Some backward solves became NaN or infinite",
        "Gradients are inexact",
        "Gradients are rough",
        "The cell does not contract",
        "The cell hardly contracts",
        "The spectral radius is uncertain",
        "Accuracy falls when the solver goes on",
    }
    assert all(finding.advice for _, _, findings in EVERYTHING for finding in findings)


@pytest.mark.parametrize("solver", SOLVERS[1:])
def test_nobody_is_told_to_switch_to_what_is_in_use(solver):
    name = type(solver).__name__
    advice = [words for finding in everything(solver, Implicit()) for words in finding.advice]
    for words in advice:
        switches = f"solver={name}()" in words or f"solver={name}(max" in words
        assert not switches or words.startswith("Keep ")
        # What belongs to another solver alone is said to be that one's.
        for option, owner in (("mixing", Anderson), ("history", Anderson), ("damping=", Picard)):
            if option in words and isinstance(solver, Anderson | Picard | Broyden):
                assert isinstance(solver, owner)
    others = {"Anderson", "Broyden", "NewtonKrylov", "Picard"} - {name}
    named = {other for other in others if any(f"solver={other}(" in words for words in advice)}
    assert named or isinstance(solver, Broyden)
    assert len(everything(solver)) == len(everything())


def test_expansion_has_broyden_first_unless_it_is_in_use():
    few = {"converged": 0.0}
    for solver in SOLVERS:
        (finding,) = found(few, solver=solver)
        assert finding.advice[0].startswith("Raise `max_iter`")
        assert finding.advice[1].startswith("Use `solver=Broyden()`") == (
            not isinstance(solver, Broyden)
        )
        assert ("NewtonKrylov" in str(finding)) == isinstance(solver, Anderson | Picard | None)


def test_options_in_use_are_named():
    few, diverged = {"converged": 0.0}, {"diverged": 1}
    (finding,) = found(few, solver=Anderson(history=7, mixing=0.4, max_iter=31))
    assert "Raise `max_iter` above 31 " in str(finding)
    assert "`mixing=0.2` or use a longer `history` than 7" in str(finding)
    (finding,) = found(diverged, solver=Picard(damping=np.float32(0.25)))
    assert "`solver=Picard(damping=0.125)`" in str(finding)
    (finding,) = found(diverged, solver=Broyden())
    assert "Damp the solver with `solver=Broyden(line_search=True)`." in finding.advice
    (finding,) = found(diverged, solver=Broyden(line_search=True))
    assert "Broyden" not in str(finding)
    assert "`solver=Anderson(mixing=0.5)` or `solver=Picard(damping=0.5)`" in str(finding)
    for gradient, limit in (
        (Implicit(), 50),
        (Implicit(max_iter=12), 12),
        (Implicit(solver=GMRES(max_iter=70)), 70),
    ):
        (finding,) = found({}, few, solver=Anderson(), gradient=gradient)
        assert f"Raise `Implicit(max_iter=...)` above {limit}." in finding.advice
    (finding,) = found({}, few)
    assert "Raise `Implicit(max_iter=...)`." in finding.advice


def test_gmres_is_not_advised_where_it_is_used():
    few = {"converged": 0.0}
    (finding,) = found({}, few)
    assert finding.advice[0].startswith("Use `gradient=Implicit(solver=GMRES())`")
    for solver in (None, Picard()):
        (known,) = found({}, few, solver=solver, gradient=Implicit(solver=GMRES(), max_iter=9))
        assert "GMRES" not in str(known)
        assert len(known.advice) == len(finding.advice) - 1
    (finding,) = found({}, few, gradient=Implicit(solver=BiCGStab()))
    assert "GMRES" in finding.advice[0]


def test_the_gradient_in_use_is_kept():
    for gradient, begin in ((Implicit(), "Keep"), (OneStep(), "Use"), (None, "Use")):
        (finding,) = of_spectrum([2.0], gradient=gradient)
        assert f"{begin} `gradient=Implicit()`: `OneStep`" in str(finding)


def test_code_that_is_named_exists():
    options = (*SOLVERS[1:], *GRADIENTS[1:], GMRES())
    fields = {field.name for one in options for field in dataclasses.fields(one)}
    fields |= set(SpectralRadius._fields)
    scope = {
        **{name: getattr(deq_jax, name) for name in deq_jax.__all__},
        **{one.__name__: one for one in (JacobianRegularization, WeightNorm, SpectralNorm)},
    }
    layer = inspect.signature(deq_jax.nnx.DEQ.__init__).parameters
    named = set()
    for *_, findings in EVERYTHING:
        for finding in findings:
            named |= set(code_in(f"{finding.evidence} {' '.join(finding.advice)}"))
    assert len(named) > 15
    for code in named:
        call = ast.parse(f"call({code})", mode="eval").body
        for keyword in call.keywords:
            assert keyword.arg in fields | set(layer), code
            # `...` stands for a number.
            value = ast.unparse(keyword.value).replace("...", "1")
            assert eval(value, scope) is not None, code
        for argument in call.args:
            source = ast.unparse(argument).replace("...", "1")
            assert source in fields or eval(source, scope) is not None, code


def test_wording_is_plain():
    for *_, findings in EVERYTHING:
        for finding in findings:
            assert not finding.title.endswith(".")
            for words in (finding.evidence, *finding.advice):
                assert re.fullmatch(r"[A-Z0-9].*[^.!]\.", words), words
                assert "  " not in words
                assert words.count("`") % 2 == 0
                assert "--" not in words
            assert len(set(finding.advice)) == len(finding.advice)


# Reports.


def stats_of(residual, status, iterations=1):
    residual, status = np.float32(residual), np.int32(status)
    return SolveStats(residual, np.full_like(status, iterations), status, np.int32(iterations))


def test_summaries():
    residual, status = [0.1, 0.3, np.inf, np.nan], [0, 1, 2, 2]
    stats = stats_of(residual, status, 7)
    summary = summarize(stats)
    np.testing.assert_allclose(summary.residual_mean, 0.2, rtol=1e-6)
    expected = SolveSummary(4, 0.25, 2, summary.residual_mean, math.inf, 7, 7)
    assert summary == expected
    # The probe's floats, on the device.
    assert summarize(BackwardProbe.of(jax.tree.map(jnp.asarray, stats))) == expected
    # Two solves of two samples each, and their mean numbers of evaluations.
    steps = [stats_of([0.1, 0.3], [0, 1], 4), stats_of([np.inf, np.nan], [2, 2], 10)]
    together = summarize(jax.tree.map(lambda *parts: np.stack(parts), *steps))
    assert dataclasses.replace(expected, evaluations=7, iterations=7) == together
    single = summarize(stats_of(0.5, 1, 3))
    assert single == SolveSummary(1, 0.0, 0, 0.5, 0.5, 3, 3)
    assert all(type(value) is float for value in dataclasses.astuple(single))


def test_summaries_of_nothing():
    nothing = summarize(stats_of(np.zeros(0), np.zeros(0)))
    assert nothing.samples == nothing.diverged == 0
    assert math.isnan(nothing.converged)
    assert math.isnan(nothing.residual_worst)
    assert diagnose(nothing, nothing) == []


def test_wrong_arguments():
    stats = stats_of([0.1], [0])
    probe = BackwardProbe.of(jax.tree.map(jnp.asarray, stats))
    with pytest.raises(TypeError, match=r"write diagnose\(None, report\)"):
        diagnose(probe)
    with pytest.raises(TypeError, match="stats must be SolveStats or a SolveSummary, got"):
        diagnose((stats,))
    with pytest.raises(TypeError, match="report must be a BackwardProbe or a SolveSummary"):
        diagnose(stats, {"residual": 1})
    with pytest.raises(TypeError, match="solver must be a solver"):
        diagnose(stats, solver="anderson")
    with pytest.raises(TypeError, match="gradient must be a policy"):
        diagnose(stats, gradient="implicit")
    with pytest.raises(TypeError, match="spectrum must be what spectral_radius returns"):
        diagnose(stats, spectrum=np.ones(3))
    with pytest.raises(TypeError, match=r"SolveSummary\.converged must be a number"):
        SolveSummary(converged="all")
    with pytest.raises(TypeError, match="stats must be SolveStats or a BackwardProbe"):
        summarize(FORWARD)


def test_traced_reports_are_refused():
    stats = jax.tree.map(jnp.asarray, stats_of([0.1], [0]))
    radius = SpectralRadius(jnp.ones(1), jnp.ones(1), jnp.ones(1, bool), jnp.int32(1))
    inside = "called inside jax.jit.*Return the report from the compiled function"
    for call, argument in (
        (diagnose, stats),
        (lambda stats: diagnose(None, BackwardProbe.of(stats)), stats),
        (summarize, stats),
        (lambda radius: diagnose(spectrum=radius), radius),
        (lambda mean: diagnose(SolveSummary(residual_mean=mean)), jnp.float32(1)),
        (lambda tol: diagnose(SolveSummary(converged=0.0), solver=Picard(tol=tol)), 1e-3),
    ):
        with pytest.raises(TypeError, match=inside):
            jax.jit(call)(argument)
    assert diagnose(jax.device_get(stats)) == diagnose(stats) == []


# Real solves.


def affine(matrix, z, x):
    return z @ matrix.T + x


def rotation(radius, angle=2.0):
    """Eigenvalues of this modulus: `z = M z + x` has one solution, which plain steps leave."""
    c, s = np.cos(angle), np.sin(angle)
    return jnp.asarray(radius * np.array([[c, -s], [s, c]]), jnp.float32)


X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 2)), jnp.float32)


def solve(f, params, x, solver, gradient):
    """The report of a forward and of a backward solve."""

    def loss(params, probe):
        options = {"solver": solver, "gradient": gradient, "backward_probe": probe}
        z, stats = deq_fixed_point(f, params, x, return_stats=True, **options)
        return (z**2).sum(), stats

    differentiate = jax.jit(jax.grad(loss, argnums=1, has_aux=True))
    report, stats = differentiate(params, BackwardProbe.zeros(len(x)))
    return stats, report


@pytest.mark.slow
def test_a_healthy_solve_has_no_findings():
    matrix = rotation(0.5)
    for solver in SOLVERS[1:]:
        stats, report = solve(affine, matrix, X, solver, Implicit())
        radius = spectral_radius(affine, matrix, X, X, jax.random.key(0))
        options = {"solver": solver, "gradient": Implicit(), "spectrum": radius}
        assert summarize(stats).converged == summarize(report).converged == 1
        assert diagnose(stats, report, **options) == []


def test_plain_iteration_of_an_expanding_map_is_told_of_broyden():
    matrix, picard = rotation(1.5), Picard(max_iter=20)
    stats = solve_fixed_point(affine, matrix, X, solver=picard).stats
    (finding,) = diagnose(stats, solver=picard)
    assert finding.title == "Few forward solves converge"
    assert finding.evidence.startswith("0.0% of the forward solves")
    assert any(words.startswith("Use `solver=Broyden()`") for words in finding.advice)
    # The advice is right.
    assert diagnose(solve_fixed_point(affine, matrix, X, solver=Broyden()).stats) == []
    # With Broyden in use, and too few evaluations for it, nobody is told to use Broyden.
    broyden = Broyden(max_iter=2)
    stats = solve_fixed_point(affine, matrix, X, solver=broyden).stats
    (finding,) = diagnose(stats, solver=broyden)
    assert finding.title == "Few forward solves converge"
    assert "Broyden" not in str(finding)
    assert finding.advice[0].startswith("Raise `max_iter` above 2 ")
    assert any("Broyden" in words for words in diagnose(stats)[0].advice)


@pytest.mark.slow
def test_a_solve_that_overflows_is_told_of_a_line_search():
    f = lambda params, z, x: x - (z @ params) ** 3  # noqa: E731
    params = 0.4 * jax.random.normal(jax.random.key(0), (16, 16))
    x = 0.8 * jax.random.normal(jax.random.key(1), (64, 16))
    (overflow, *_) = diagnose(solve_fixed_point(f, params, x, solver=Broyden()).stats)
    assert overflow.evidence == "64 of 64 samples became NaN or infinite."
    (overflow, *_) = diagnose(
        solve_fixed_point(f, params, x, solver=Broyden()).stats, solver=Broyden()
    )
    assert "`solver=Broyden(line_search=True)`" in overflow.advice[1]
    # The advice is right.
    stats = solve_fixed_point(f, params, x, solver=Broyden(line_search=True)).stats
    assert summarize(stats).diverged == 0


def test_the_spectrum_of_an_expanding_map():
    radius = spectral_radius(affine, rotation(1.5), X, X, jax.random.key(0))
    (finding,) = diagnose(spectrum=radius, solver=Picard())
    assert finding.title == "The cell does not contract"
    assert finding.evidence.startswith(
        "6 of 6 samples have a spectral radius above 1 (median 1.5, largest 1.5"
    )
    assert finding.advice[0].startswith("Use `solver=Broyden()`")


@pytest.mark.slow
def test_backward_solves_that_do_not_converge_are_told_of_gmres():
    matrix, solver = rotation(1.5), Broyden()
    gradient = Implicit(solver=Picard(max_iter=10))
    stats, report = solve(affine, matrix, X, solver, gradient)
    (finding,) = diagnose(stats, report, solver=solver, gradient=gradient)
    assert finding.title == "Gradients are inexact"
    assert finding.severity == Severity.ERROR
    assert finding.advice[0].startswith("Use `gradient=Implicit(solver=GMRES())`")
    gradient = Implicit(solver=GMRES())
    stats, report = solve(affine, matrix, X, solver, gradient)
    assert diagnose(stats, report, solver=solver, gradient=gradient) == []


def test_one_step_neglects_as_much_as_the_jacobian_is_large():
    for radius, expected in ((0.05, []), (0.8, ["Gradients are rough"])):
        stats, report = solve(affine, rotation(radius), X, Broyden(), OneStep())
        findings = diagnose(stats, report, solver=Broyden(), gradient=OneStep())
        assert [finding.title for finding in findings] == expected
        # A rotation times the radius: ‖Jᵀ y‖ / ‖y‖ is the radius.
        np.testing.assert_allclose(summarize(report).residual_mean, radius, rtol=1e-5)
    assert findings[0].evidence.endswith("the mean residual is 0.8 and the worst 0.8.")
    # Taken for a solve, the same report would be of one that did not converge.
    (finding,) = diagnose(stats, report, solver=Broyden(), gradient=Implicit())
    assert finding.title == "Gradients are inexact"


def test_a_sample_that_is_nan():
    x = X.at[2].set(jnp.nan)
    stats, report = solve(affine, rotation(0.5), x, Anderson(), Implicit())
    assert summarize(stats).diverged == 1
    (finding,) = diagnose(stats, report, solver=Anderson(), gradient=Implicit())
    assert finding.title == "Some forward solves became NaN or infinite"
    assert finding.severity == Severity.ERROR
    assert finding.evidence == "1 of 6 samples became NaN or infinite."
    assert finding.advice[1] == "Damp the solver with `solver=Anderson(mixing=0.5)`."


def test_unbatched_solves():
    stats = solve_fixed_point(
        affine, rotation(1.5), X[0], solver=Picard(max_iter=9), batched=False
    ).stats
    assert np.shape(stats.status) == ()
    (finding,) = diagnose(stats, solver=Picard(max_iter=9))
    assert finding.title == "Few forward solves converge"


class Halving:
    """A solver of somebody's own."""

    tol, atol, max_iter, trace = 1e-4, 0.0, 5, False

    def init(self, z, fz):
        return ()

    def step(self, z, fz, state):
        return (z + fz) / 2, state


def test_a_solver_of_ones_own():
    stats = solve_fixed_point(affine, rotation(1.5), X, solver=Halving()).stats
    assert (stats.status == Status.MAX_ITER).all()
    (finding,) = diagnose(stats, solver=Halving())
    assert "Raise `max_iter` above 5 " in finding.advice[0]
    assert not any(words.startswith("With `Anderson`") for words in finding.advice)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.slow
def test_the_loop_of_the_guide(capsys):
    guide = (ROOT / "docs" / "stability.md").read_text(encoding="utf-8")
    pattern = r'```python title="A loop[^"]*"\n(.*?)```.*?```text\n(.*?)```'
    ((block, expected),) = re.findall(pattern, guide, flags=re.DOTALL)
    exec(compile(block, "docs/stability.md", "exec"), {})
    printed = capsys.readouterr().out
    # Residuals may differ from machine to machine, words may not.
    words = [
        re.sub(r"\b\d+\.\d+(%| and|\.$)", "x", text, flags=re.MULTILINE)
        for text in (printed, expected)
    ]
    assert words[0].startswith(words[1])
    # With what it advises nothing is wrong.
    assert "try: Use `solver=Broyden()`" in expected
    advised = block.replace("solver, gradient = Anderson(), ", "solver, gradient = Broyden(), ")
    assert advised != block
    exec(compile(advised, "docs/stability.md", "exec"), {"Broyden": Broyden})
    assert capsys.readouterr().out == ""
