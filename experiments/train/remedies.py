"""What to try against troubles with solves, in terms of the scripts' flags.

`solver` is `--solver` of the run, so that nobody is told to switch to what is in use; None where it
is not known.
"""

KEEP_SMALL = (
    "train with --jacobian-weight or --normalization (weight or spectral), which keep the cell's "
    "Jacobian small; --pretrain-steps is a gentler start"
)
LEARN_SLOWER = "train with a smaller --learning-rate"


def damping(solver: str | None) -> str:
    """Smaller steps of the solver."""
    known = {"anderson": "--mixing 0.5", "picard": "--damping 0.5"}
    # The others have no damping of their own.
    either = "--mixing 0.5 with anderson, --damping 0.5 with picard"
    return f"a damped solver: {known.get(solver, either)}"


def expansion(solver: str | None) -> tuple[str, ...]:
    """Solvers that cope with a spectral radius above 1; none where the best of them is in use."""
    if solver == "broyden":
        return ()
    words = "--solver broyden, which copes with a spectral radius above 1"
    if solver != "newton_krylov":
        words += "; newton_krylov does too, but may stall on cells with ReLU"
    return (f"{words}. Picard cannot, anderson often can",)


def slowness(solver: str | None) -> str:
    """Solvers that are better than plain iteration where that takes long."""
    known = {
        None: "keep --solver anderson or broyden; with anderson a longer --history",
        "anderson": "a longer --history",
        "broyden": "keep --solver broyden",
    }
    return known.get(solver, "--solver anderson or broyden")


def tuning(solver: str | None) -> tuple[str, ...]:
    """Other settings of Anderson's method, where it may be in use."""
    words = "--mixing below 1, such as 0.5, or a longer --history"
    known = {None: (f"with anderson: {words}",), "anderson": (words,)}
    return known.get(solver, ())
