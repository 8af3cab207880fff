"""Ctrl-C and SIGTERM as a request that the training loop answers between two steps."""

import os
import signal
from types import FrameType, TracebackType


class GracefulStop:
    """While entered, the first SIGINT or SIGTERM is only noted; the second one kills.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def requested(self) -> bool:
        """Whether somebody asked to stop."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process ended by this signal: 130 or 143; 0 without one."""
        return 0 if self.signal is None else 128 + self.signal

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        for each in self._previous:
            signal.signal(each, signal.SIG_DFL)
        # Not `print`: the signal may have interrupted one, whose buffer must not be entered twice.
        os.write(2, b"\nstopping after this step; once more to stop without saving\n")
