"""`mlxfun-shell` on the stub session, killed at the KILL_AT-th operation on a file of its directory.

Operations are what Python audits: opening, renaming, removing, truncating, making directories. When
it ends without being killed it leaves exit code 0.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.truncate", "os.mkdir", "os.rmdir", "os.chmod"}
HERE = os.getcwd()
LEFT = [int(os.environ["KILL_AT"])]


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event not in EVENTS or not arguments or isinstance(arguments[0], int):
        return
    path = os.path.abspath(os.fsdecode(arguments[0]))
    if path.startswith(HERE + os.sep):
        LEFT[0] -= 1
        if LEFT[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    from tests.commands import stub_program

    sys.addaudithook(watch)
    stub_program.main()
