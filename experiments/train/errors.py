"""What can go wrong that the user can put right; scripts print it and show no traceback."""


class ExperimentError(Exception):
    """Base of these errors.

    Attributes:
        exit_code: what a script that ends with this error returns.
    """

    exit_code = 2


class UsageError(ExperimentError, ValueError):
    """A flag has a value that it cannot have; the message names the flag."""


class RunMismatchError(UsageError):
    """A run was started with settings or data other than those it is asked to go on with."""


class DatasetNotFoundError(ExperimentError, FileNotFoundError):
    """A data set is not where it was looked for, or not in a form that can be read."""


class MissingExtraError(ExperimentError, ImportError):
    """Something optional was asked for and is not installed."""


class NonFiniteError(ExperimentError, ArithmeticError):
    """A loss or gradient became NaN or infinite."""

    exit_code = 1


class RunInUseError(ExperimentError):
    """Another process is training in the run's folder."""


class CheckpointError(ExperimentError, OSError):
    """A checkpoint could not be written or read."""


class LostProcessError(ExperimentError):
    """Another process of the run has ended or does not answer, so that this one cannot go on."""

    exit_code = 3


class Stopped(ExperimentError):
    """Somebody asked the training to stop; all is saved.

    Args:
        message: where it stands.
        exit_code: what a shell expects of a process ended by the signal.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code
