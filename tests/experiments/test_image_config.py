import dataclasses

import pytest
from experiments.train.image_config import Config
from experiments.train.image_presets import PRESETS, parse

from deq_jax import (
    GMRES,
    Anderson,
    BiCGStab,
    Broyden,
    Implicit,
    Neumann,
    NewtonKrylov,
    OneStep,
    Phantom,
    Picard,
    Unrolled,
)


def test_picard_and_a_backward_solver_of_its_own():
    config = parse(["--solver=picard", "--damping=0.7", "--backward-solver=anderson"])
    config = dataclasses.replace(config, backward_tol=0.05, backward_max_iter=9, history=3)
    solver = config.forward_solver()
    assert (type(solver).__name__, solver.damping, solver.tol) == ("Picard", 0.7, 1e-2)
    backward = config.gradient_policy().backward_solver(solver)
    assert type(backward).__name__ == "Anderson"
    assert (backward.tol, backward.max_iter, backward.history) == (0.05, 9, 3)


SOLVERS = {
    "anderson": Anderson(tol=1e-2, max_iter=25),
    "picard": Picard(tol=1e-2, max_iter=25),
    "broyden": Broyden(memory=7, tol=1e-2, max_iter=25),
    "newton_krylov": NewtonKrylov(GMRES(restart=9), tol=1e-2, max_iter=25),
    "gmres": GMRES(restart=9, tol=1e-2, max_iter=25),
    "bicgstab": BiCGStab(tol=1e-2, max_iter=25),
}

GRADIENTS = {
    "implicit": Implicit(),
    "one_step": OneStep(),
    "neumann": Neumann(3, 0.5),
    "phantom": Phantom(3, 0.5),
    "unrolled": Unrolled(),
    "shine": Implicit(max_iter=3, reuse=True),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    sizes = ["--memory=7", "--restart=9"]
    if name not in ("gmres", "bicgstab"):
        assert parse([f"--solver={name}", *sizes]).forward_solver() == SOLVERS[name]
    policy = parse([f"--backward-solver={name}", *sizes]).gradient_policy()
    assert policy == Implicit(solver=SOLVERS[name])


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients(name):
    more = {
        "neumann": ["--gradient-steps=3", "--gradient-damping=0.5"],
        "phantom": ["--gradient-steps=3"],
        "shine": ["--solver=broyden", "--backward-max-iter=3"],
    }
    assert parse([f"--gradient={name}", *more.get(name, [])]).gradient_policy() == GRADIENTS[name]


def test_presets():
    assert {name: config.preset for name, config in PRESETS.items()} == {
        name: name for name in ("digits", "mnist", "cifar10")
    }
    cifar10 = parse(["--preset", "cifar10", "--batch-size=7"])
    assert cifar10 == dataclasses.replace(PRESETS["cifar10"], batch_size=7)
    assert (cifar10.channels, cifar10.inner_channels, cifar10.groups, cifar10.pool) == (
        48,
        64,
        8,
        8,
    )
    assert (cifar10.epochs, cifar10.learning_rate, cifar10.final_learning_rate) == (50, 1e-3, 1e-6)
    assert (cifar10.tol, cifar10.max_iter) == (1e-2, 25)
    assert parse(["--seed=3", "--preset=mnist"]).pool == 7


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--unknown=1"], "--unknown"),
        (["--preset=imagenet"], "imagenet"),
        (["--preset"], "--preset"),
        (["--batch-size=0"], "--batch-size must be at least 1, got 0"),
        (["--epochs=two"], "--epochs"),
        (["--learning-rate=-1"], "--learning-rate must be positive and finite, got -1.0"),
        (["--learning-rate=nan"], "--learning-rate must be positive and finite, got nan"),
        (["--final-learning-rate=1"], "--final-learning-rate must be at most --learning-rate"),
        (["--channels=20"], "--channels must be a multiple of --groups, 8, got 20"),
        (["--validation-fraction=1"], "--validation-fraction must be at least 0 and below 1"),
        (["--damping=0"], "--damping must be above 0 and at most 1, got 0.0"),
        (["--train-examples=0"], "--train-examples must be at least 1, got 0"),
        (["--backward-max-iter=0"], "--backward-max-iter must be at least 1, got 0"),
        (["--seed=-1"], "--seed must be at least 0, got -1"),
        (["--gradient=shine"], "--gradient shine needs --solver broyden, got anderson"),
        (["--gradient-steps=3"], "--gradient-steps is for --gradient neumann or phantom"),
        (["--gradient=one_step", "--backward-tol=1e-3"], "is for --gradient implicit or shine"),
        (["--backward-solver=gmres", "--max-iter=1"], "GMRES.max_iter must be at least 2"),
    ],
)
def test_bad_flags_are_named(flags, named, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(flags)
    assert caught.value.code == 2
    # The message stands in a box that breaks its lines.
    text = capsys.readouterr().err.replace("│", " ")
    assert named in " ".join(text.split())


def test_help_explains_each_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in text
    assert "most evaluations of the cell in a solve" in " ".join(text.split())
