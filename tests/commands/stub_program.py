"""`mlxfun-shell` on the stub session, for tests that need a whole process.

With STUB_GATE in the environment, collecting waits for ever (until it is cancelled). With
STUB_TERMINAL, stdin becomes the controlling terminal, so that Ctrl-C typed there is a signal. With
STUB_UNFLUSHED, the program only writes a line that nobody flushes, and ends with that exit code.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
import termios
import threading
from pathlib import Path
from typing import Any

import commands.cli
import commands.engine
from commands.cli import main
from tests.commands.stub_session import StubSession


class GatedSession(StubSession):
    @classmethod
    def open(
        cls, source: str | Path, _options: Any = None, *, seed: int = 0, **_: Any
    ) -> StubSession:
        gate = threading.Event() if "STUB_GATE" in os.environ else None
        return cls(source, seed, gate)


commands.engine.Engine = functools.partial(  # type: ignore[misc, assignment]
    commands.engine.Engine, session_class=lambda _: GatedSession
)


def unflushed() -> int:
    sys.stdout.write("a result\n")
    return int(os.environ["STUB_UNFLUSHED"])


def run() -> None:
    if "STUB_UNFLUSHED" in os.environ:
        commands.cli._main = unflushed
    if "STUB_TERMINAL" in os.environ:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    main()


if __name__ == "__main__":
    run()
