"""The command line of image classification: what it means, and what it says of bad flags."""

import dataclasses
import json
import math

import jax.numpy as jnp
import pytest

from deq_jax import (
    GMRES,
    SQUAREM,
    Anderson,
    BiCGStab,
    Broyden,
    Execution,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Reversed,
    Reversible,
    Unrolled,
    Wegstein,
)
from deq_jax.stability import JacobianRegularization, SpectralNorm
from experiments import copy_memory, image_classification, language_model
from experiments.image_classification import PRESETS, Config, parse_arguments
from experiments.train.config import Stability
from experiments.train.runs import differences, flat_settings
from tests.experiments.training import run

LIMITS = {"tol": 1e-2, "max_iter": 25}

CHOICES = {
    ("solver:anderson", "--solver.history=3"): ("solver", Anderson(3, **LIMITS)),
    ("--solver.history=3",): ("solver", Anderson(3, **LIMITS)),
    ("solver:picard", "--solver.damping=0.7"): ("solver", Picard(0.7, **LIMITS)),
    ("solver:broyden", "--seed=0", "--solver.memory=7"): ("solver", Broyden(memory=7, **LIMITS)),
    ("solver:newton",): ("solver", NewtonKrylov(**LIMITS)),
    ("solver:squarem",): ("solver", SQUAREM(**LIMITS)),
    ("solver:wegstein", "--solver.upper=0"): ("solver", Wegstein(upper=0.0, **LIMITS)),
    ("solver:reversible", "--solver.damping=0.8"): ("solver", Reversible(0.8, **LIMITS)),
    ("gradient:implicit", "--gradient.tol=0.3"): ("gradient", Implicit(tol=0.3)),
    ("gradient:one-step",): ("gradient", OneStep()),
    ("gradient:neumann", "--gradient.terms=3"): ("gradient", Neumann(3)),
    ("gradient:phantom", "--gradient.damping=0.5"): ("gradient", Phantom(damping=0.5)),
    ("gradient:unrolled",): ("gradient", Unrolled()),
    ("backward:same",): ("backward", None),
    ("backward:anderson", "--backward.tol=0.3"): ("backward", Anderson(tol=0.3, max_iter=25)),
    ("backward:gmres", "--backward.restart=9"): ("backward", GMRES(restart=9, **LIMITS)),
    ("backward:bicgstab",): ("backward", BiCGStab(**LIMITS)),
    ("stability:off",): ("stability", None),
    ("stability:on", "--stability.jacobian.weight=0.2", "stability.normalization:spectral"): (
        "stability",
        Stability(jacobian=JacobianRegularization(0.2), normalization=SpectralNorm()),
    ),
}


def test_reversed_goes_with_its_solver():
    config = parse_arguments(("solver:reversible", "gradient:reversed"))
    assert (config.solver, config.gradient) == (Reversible(**LIMITS), Reversed())


@pytest.mark.parametrize("words", CHOICES)
def test_choices(words):
    name, value = CHOICES[words]
    assert parse_arguments(words) == dataclasses.replace(PRESETS["digits"], **{name: value})


def test_a_backward_solver_of_its_own():
    config = parse_arguments(["solver:picard", "backward:gmres", "--backward.max-iter=9"])
    policy = config.gradient_policy()
    assert policy == Implicit(solver=GMRES(tol=1e-2, max_iter=9))
    assert policy.backward_solver(config.solver) == GMRES(tol=1e-2, max_iter=9)
    shine = parse_arguments(["solver:broyden", "--gradient.reuse", "--gradient.max-iter=3"])
    assert shine.gradient_policy() == Implicit(max_iter=3, reuse=True)


def test_presets_come_first_and_flags_change_them():
    cifar10 = parse_arguments(["cifar10", "--batch-size=7", "solver:picard"])
    solver = Picard(**LIMITS)
    assert cifar10 == dataclasses.replace(PRESETS["cifar10"], batch_size=7, solver=solver)
    network = cifar10.network
    sizes = (network.channels, network.inner_channels, network.groups, network.pool)
    assert sizes == (48, 64, 8, 8)
    assert (cifar10.epochs, cifar10.optim.lr, cifar10.optim.final_lr) == (50, 1e-3, 1e-6)
    assert PRESETS["cifar10"].solver == Anderson(**LIMITS)
    assert parse_arguments(["mnist", "--seed=3"]).network.pool == 7
    assert parse_arguments([]) == PRESETS["digits"] == Config()


def test_the_learning_rate_by_its_formula():
    """A linear rise over the warmup, and then half a cosine to the last rate."""
    optim = parse_arguments(["--optim.lr=4", "--optim.final-lr=2", "--optim.warmup=3"]).optim
    schedule = optim.schedule(9)
    got = [float(schedule(step)) for step in range(10)]
    cosine = [3 + math.cos(math.pi * (step - 3) / 6) for step in range(3, 10)]
    assert got == pytest.approx([1, 2, 3, *cosine])


def test_settings_by_the_names_of_their_flags():
    config = parse_arguments(["solver:picard", "--optim.lr=0.5", "--data.dir=a"])
    settings = flat_settings(config)
    assert settings["solver"] == "Picard"
    assert (settings["solver.damping"], settings["optim.lr"]) == (1.0, 0.5)
    other = parse_arguments(["--data.dir=b", "--run.dir=c"])
    assert differences(flat_settings(other), settings) == {
        "optim.lr": "optim.lr was 0.001, is now 0.5",
        "solver": "solver was Anderson, is now Picard",
        "solver.damping": "solver.damping was absent, is now 1.0",
        "solver.decay": "solver.decay was absent, is now 0.5",
        "solver.history": "solver.history was 5, is now absent",
        "solver.mixing": "solver.mixing was 1.0, is now absent",
        "solver.patience": "solver.patience was absent, is now None",
        "solver.ridge": "solver.ridge was 0.0001, is now absent",
    }
    json.dumps(settings, allow_nan=False)


def test_one_execution_for_all_flags():
    half = jnp.bfloat16
    cases = {
        (): Execution(),
        ("--devices=2",): Execution(shard_axis="data"),
        ("--precision=mixed", "--shrink-to=4"): Execution(shrink_to=4, cell_dtype=half),
        ("--precision=bfloat16",): Execution(cell_dtype=half, state_dtype=half),
    }
    for flags, execution in cases.items():
        assert parse_arguments(flags).layer()["execution"] == execution


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        # What Tyro says
        (["--unknown=1"], "--unknown"),
        (["imagenet"], "imagenet"),
        (["--epochs=two"], "--epochs"),
        (["--precision=half"], "--precision"),
        (["solver:newtons"], "solver:newtons"),
        (["solver:picard", "--solver.history=3"], "--solver.history"),
        # What the library says of its own dataclasses
        (["--solver.history=0"], "Anderson.history must be at least 1, got 0"),
        (["--solver.max-iter=0"], "Anderson.max_iter must be at least 1, got 0"),
        (["solver:picard", "--solver.damping=0"], "Picard.damping must be"),
        (["backward:gmres", "--backward.max-iter=1"], "GMRES.max_iter must be at least 2"),
        (["--gradient.max-iter=0"], "Implicit.max_iter must be at least 1, got 0"),
        (["--gradient.reuse"], "solver:, gradient: and backward: do not fit"),
        (["stability:on", "--stability.jacobian.weight=-1"], "JacobianRegularization.weight"),
        # What the commands say of theirs
        (["--batch-size=0"], "--batch-size must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--optim.lr=-1"], "--optim.lr must be above 0, got -1.0"),
        (["--optim.lr=nan"], "--optim.lr must be above 0, got nan"),
        (["--optim.final-lr=1"], "--optim.final-lr must be at most --optim.lr"),
        (["--optim.beta2=1"], "--optim.beta2 must be at least 0 and below 1, got 1.0"),
        (["--network.channels=20"], "--network.channels must be a multiple of --network.groups, 8"),
        (["--network.dropout=1"], "--network.dropout must be at least 0 and below 1, got 1.0"),
        (["--data.validation=1"], "--data.validation must be at least 0 and below 1"),
        (["--data.train=0"], "--data.train must be at least 1, got 0"),
        (["--run.save-every=0"], "--run.save-every must be at least 1, got 0"),
        (["--run.warn-below=2"], "--run.warn-below must be from 0 to 1, got 2.0"),
        (["gradient:phantom", "backward:gmres"], "backward: is the solver of gradient:implicit"),
        (["--shrink-to=0"], "--shrink-to must be at least 1, got 0"),
        (["--shrink-to=2", "gradient:unrolled"], "--shrink-to must be left out where a loop is"),
        (["--devices=0"], "--devices must be at least 1, got 0"),
        (["--devices=4", "--fsdp=3"], "--devices must be a multiple of --fsdp times --tensor, 3"),
        (
            ["--devices=3"],
            "--batch-size must be a multiple of the devices that share a batch, 3, got 32",
        ),
        (
            ["--devices=4", "--eval-batch-size=25"],
            "--eval-batch-size must be a multiple of the devices that share a batch, 4, got 25",
        ),
    ],
    ids=str,
)
def test_bad_flags_are_named(flags, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run(image_classification, *flags)
    assert ended.code == 2
    assert named in ended.complaint
    assert "Traceback" not in ended.errors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [image_classification, language_model, copy_memory])
def test_help_fits_a_screen(script, monkeypatch):
    """90 lines of 80 columns for the images; a terminal breaks longer lines in two."""
    monkeypatch.setenv("COLUMNS", "80")
    ended = run(script, "--help")
    assert (ended.code, ended.errors) == (0, "")
    usage, *lines = ended.lines
    rows = sum(math.ceil(len(line) / 80) for line in ended.lines)
    assert usage.startswith(f"usage: python -m {script.__name__} [{' | '.join(script.PRESETS)}]")
    assert rows <= (90 if script is image_classification else 100)
    for heading in ("options", "optim options", "run options", "data options", "network options"):
        assert any(line.startswith(f"╭─ {heading} ─") for line in lines)
    for field in dataclasses.fields(script.Config):
        value = getattr(script.PRESETS[next(iter(script.PRESETS))], field.name)
        names = [f"--{field.name}"]
        if field.name in ("solver", "gradient", "backward", "stability", "cell"):
            names = [f"{field.name}:"]
        elif dataclasses.is_dataclass(value):
            # What is on by default has a flag that turns it off.
            names = [
                f"--{field.name}.{'no-' * (getattr(value, inner.name) is True)}{inner.name}"
                for inner in dataclasses.fields(value)
            ]
        for name in names:
            assert name.replace("_", "-") in ended.output


def test_help_of_a_choice_has_its_flags(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    ended = run(image_classification, "solver:broyden", "--help")
    assert ended.code == 0
    assert "--solver.memory" in ended.output
    assert "--solver.history" not in ended.output
