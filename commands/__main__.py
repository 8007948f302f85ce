"""The entry point of `mlxfun-shell`: an interrupt during the first imports ends it silently.

This module imports nothing that the interpreter has not imported itself, so that the time in which
Ctrl-C is nobody's is as short as can be.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # signal itself imports enum and more
import os
import sys


def main() -> None:
    """Run `commands.cli.main`. Exits with 130, without a word, if Ctrl-C comes before it is there."""
    ours = _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler
    try:
        if ours:  # not where whoever started us has it ignored
            # Not an exception: in an import that would be a traceback, or be caught on the way.
            _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
        from commands.cli import main as run  # which begins with a handler of its own
    except KeyboardInterrupt:
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
