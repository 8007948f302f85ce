"""A shell whose terminal is gone ends, also where the kernel would not tell it."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

SCRIPT = """
import sys, time
from commands.interrupts import end_with_terminal
end_with_terminal()
print("ready", flush=True)
time.sleep(60)
"""


def test_it_ends_when_a_terminal_that_does_not_control_it_is_closed() -> None:
    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdin=slave, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        os.close(slave)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        os.close(master)
        # Ignored where nohup runs the tests.
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        ends = (128 + signal.SIGHUP,) if ignored else (-signal.SIGHUP, 128 + signal.SIGHUP)
        assert process.wait(20) in ends
