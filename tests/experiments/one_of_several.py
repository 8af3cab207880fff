"""One process of a run with several, for test_processes.py: commands one after another.

    python -m tests.experiments.one_of_several COMMANDS

COMMANDS is a JSON list of `[script, flags, seconds]`; each step of the command is preceded by a
sleep of so many seconds, so that a test can send a signal in the middle. Figures are not drawn. The
exit code of each command is written to stderr, and where it stopped.
"""

import faulthandler
import importlib
import json
import sys
import time

from experiments.train import loop

_HANGS_SECONDS = 200
"""After so long a process says in which lines it hangs, and ends."""


def main() -> int:
    faulthandler.dump_traceback_later(_HANGS_SECONDS, exit=True)
    place_batch, stopped = loop.place_batch, loop.Stopped
    pause = {}

    def place_slowly(*arguments):
        time.sleep(pause["seconds"])
        return place_batch(*arguments)

    def stopped_aloud(message, code):
        print(message, file=sys.stderr, flush=True)
        return stopped(message, code)

    loop.draw = lambda *arguments: None
    loop.place_batch, loop.Stopped = place_slowly, stopped_aloud
    code = 0
    for script, flags, pause["seconds"] in json.loads(sys.argv[1]):
        code = importlib.import_module(f"experiments.{script}").main(flags)
        print(f"{script} returned {code}", file=sys.stderr, flush=True)
        if code:
            break
    return code


if __name__ == "__main__":
    sys.exit(main())
