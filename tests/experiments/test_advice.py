"""Warnings: from where on there are any, what they say, and that what they name exists."""

import dataclasses
import math
import re
from typing import get_args

import numpy as np
import pytest
from experiments.train.advice import Limits, Trouble
from experiments.train.image_config import Config

from experiments.train import advice
from experiments.train.config import SolverName

GOOD = {
    "forward_converged": 1.0,
    "forward_residual_mean": 0.008,
    "forward_residual_worst": 0.01,
    "forward_diverged": 0,
    "backward_converged": 0.9,
    "backward_residual_mean": 0.02,
    "backward_residual_worst": 0.9,
    "backward_diverged": 0,
    "forward_evaluations": 20.0,
    "train_loss": 0.1,
}


def titles(record, *args, **kwargs):
    return [trouble.title for trouble in advice.of_record(record, *args, **kwargs)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"forward_converged": 0.5}, []),
        ({"forward_converged": 0.49}, ["Few forward solves converge"]),
        ({"forward_diverged": 1}, ["Some forward solves became NaN or infinite"]),
        ({"backward_converged": 0.49}, ["Gradients are inexact"]),
        ({"backward_residual_mean": 0.1}, []),
        ({"backward_residual_mean": 0.11}, ["Gradients are inexact"]),
        ({"backward_residual_mean": math.inf}, ["Gradients are inexact"]),
        ({"backward_diverged": 2}, ["Some backward solves became NaN or infinite"]),
        (
            {"forward_converged": 0.0, "backward_converged": 0.0},
            ["Few forward solves converge", "Gradients are inexact"],
        ),
        # What JSON cannot hold is None in metrics.jsonl.
        ({"forward_residual_worst": None, "backward_residual_mean": math.nan}, []),
    ],
)
def test_records(changes, expected):
    assert titles(GOOD | changes) == expected


def test_missing_figures_say_nothing():
    assert titles({"train_loss": 0.1}) == []
    (trouble,) = advice.of_record({"forward_converged": 0.25})
    assert trouble.evidence == "25.0% of the forward solves reach the tolerance"


def test_prefix_and_limits():
    record = {f"test_{name}": value for name, value in GOOD.items()} | {"forward_converged": 0.0}
    assert titles(record, prefix="test_") == []
    assert titles(record) == ["Few forward solves converge"]
    assert titles(GOOD, Limits(converged=0.95)) == ["Gradients are inexact"]
    assert titles(GOOD, Limits(backward_residual=0.01)) == ["Gradients are inexact"]
    assert titles(GOOD | {"forward_diverged": 3}, Limits(diverged=3)) == []


def test_evidence_has_the_figures():
    record = GOOD | {"forward_converged": 0.125, "forward_residual_mean": 0.034}
    (trouble,) = advice.of_record(record)
    assert trouble.evidence == (
        "12.5% of the forward solves reach the tolerance; mean residual 0.034, worst residual 0.01"
    )
    (trouble,) = advice.of_record(GOOD | {"backward_diverged": 2})
    assert trouble.evidence == "2 samples diverged"


def test_a_looser_tolerance_only_where_the_residual_is_close():
    record = GOOD | {"forward_converged": 0.0, "backward_converged": 0.0}
    looser = {"forward": "a looser --tol than", "backward": "a looser --backward-tol than"}
    for tolerances, close in (
        ({"forward": 0.003, "backward": 0.007}, True),
        ({"forward": 0.0025, "backward": 0.0065}, False),
        (None, False),
    ):
        forward, backward = advice.of_record(record, tolerances=tolerances)
        assert forward.advice[0].startswith(looser["forward"]) == close
        assert backward.advice[0].startswith(looser["backward"]) == close


def test_approximate_gradients_are_judged_by_what_they_neglect():
    record = GOOD | {"backward_converged": 0.0}
    assert titles(record, approximate=True) == []
    (trouble,) = advice.of_record(record | {"backward_residual_mean": 0.3}, approximate=True)
    assert trouble.title == "Gradients are rough"
    assert "mean residual 0.3" in trouble.evidence
    assert trouble.advice[0].startswith("--gradient implicit")


def spectrum(radius, error=0.0, converged=True, solver=None):
    radius = np.asarray(radius, float)
    error, converged = (np.broadcast_to(one, radius.shape) for one in (error, converged))
    return advice.of_spectrum(radius, error, converged, solver=solver)


def test_spectra_that_do_not_contract():
    assert spectrum([0.5] * 9 + [1.5]) == []  # a tenth is allowed
    (trouble,) = spectrum([0.5] * 8 + [1.25, 1.5], error=0.01)
    assert trouble.title == "The cell does not contract"
    assert trouble.evidence == (
        "2 of 10 samples have a spectral radius above 1 (median 0.5, largest 1.5 ± 0.01)"
    )
    assert spectrum([0.95, 0.95, 0.95]) == []
    (trouble,) = spectrum([0.96, 0.96, 0.96])
    assert trouble.title == "The cell hardly contracts"
    # 0.96^56.4 = 0.1.
    assert "about 56 evaluations for each further digit" in trouble.evidence
    assert "more than 1000" in spectrum([1.0])[0].evidence


def test_spectra_that_are_not_known():
    converged = np.array([True] * 3 + [False])
    assert spectrum([0.5] * 4, 0.2, converged) == []
    (trouble,) = spectrum([0.5, 0.5, 0.5, np.nan], converged=[True, False, True, False])
    assert trouble.title == "The spectral radius is uncertain"
    assert trouble.evidence == (
        "2 of 4 estimates did not reach their accuracy, 1 of them because the Jacobian is not "
        "finite"
    )
    (trouble,) = spectrum([np.nan, np.nan], np.nan, False)
    assert trouble.evidence.startswith("2 of 2 estimates")


def test_budgets():
    budgets = (1, 5, 25, 100)
    assert advice.of_budget(budgets, (0.1, 0.8, 0.9, 0.89), 25, 1000) == []
    assert advice.of_budget(budgets, (0.1, 0.8, 0.9, 0.5), 100, 1000) == []
    assert advice.of_budget(budgets, (0.1, 0.8, 0.9, 0.8), 25, 20) == []  # two answers
    (trouble,) = advice.of_budget(budgets, (0.1, 0.8, 0.9, 0.8), 25, 30)
    assert trouble.evidence == "accuracy is 90.0% with at most 25 evaluations and 80.0% with 100"


def test_text():
    trouble = Trouble("title", "evidence", ("one", "two"))
    assert advice.text(trouble) == "warning: title\n    evidence\n    try: one\n    try: two"


def everything(solver=None):
    bad = {name: 1.0 if name.endswith(("_diverged", "_mean")) else 0.0 for name in GOOD}
    tolerances = {"forward": 1.0, "backward": 1.0}
    troubles = advice.of_record(bad, tolerances=tolerances, solver=solver)
    troubles += advice.of_record(bad, approximate=True, solver=solver)
    for radius, error, converged in ((2.0, 0, True), (0.99, 0, True), (np.nan, 0, True)):
        troubles += spectrum([radius], error, converged, solver)
    troubles += spectrum([0.5], 1, False, solver)
    return troubles + advice.of_budget((1, 2), (0.9, 0.1), 1, 100)


@pytest.mark.parametrize("solver", get_args(SolverName))
def test_nobody_is_told_to_switch_to_what_is_in_use(solver):
    others = {name for name in get_args(SolverName) if name != solver}
    troubles = everything(solver=solver)
    advice_texts = [words for trouble in troubles for words in trouble.advice]
    for words in advice_texts:
        assert f"--solver {solver}" not in words or words.startswith("keep ")
        # What belongs to another solver alone is said to be that one's.
        for flag, owner in (("--mixing", "anderson"), ("--damping", "picard")):
            if flag in words and solver in ("anderson", "picard"):
                assert owner == solver
    named = {name for name in others if any(name in words for words in advice_texts)}
    assert named or solver == "broyden"
    assert len(everything(solver=solver)) == len(everything())


def test_gmres_is_not_advised_where_it_is_used():
    (trouble,) = advice.of_record(GOOD | {"backward_converged": 0.0})
    assert trouble.advice[0].startswith("--backward-solver gmres")
    record = GOOD | {"backward_converged": 0.0}
    (known,) = advice.of_record(record, backward_solver="gmres", solver="anderson")
    assert known.advice == trouble.advice[1:]


def test_flags_that_are_named_exist():
    fields = {field.name for field in dataclasses.fields(Config)}
    named = set()
    for trouble in everything():
        assert trouble.advice
        named |= set(re.findall(r"--[a-z-]+", advice.text(trouble)))
    assert len(named) > 10
    assert {name[2:].replace("-", "_") for name in named} <= fields


def test_wording_is_plain():
    solvers = (None, *get_args(SolverName))
    for trouble in [one for solver in solvers for one in everything(solver)]:
        for words in (trouble.title, trouble.evidence, *trouble.advice):
            assert words == words.strip()
            assert "!" not in words
            assert not words.endswith(".")
