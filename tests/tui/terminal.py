"""A real shell in a real pseudo-terminal, driven by bytes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
_ESCAPES = re.compile(rb"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07]*(\x07|\x1b\\)|[()][A-Z0-9]|[=>78])")


class Terminal:
    """`mlxfun-shell` with `arguments` in a terminal of `size` = (columns, rows)."""

    def __init__(
        self, *arguments: str, size: tuple[int, int], home: Path, env: Mapping[str, str] = {}
    ) -> None:
        self.began = time.monotonic()
        self.output = b""
        self.status: int | None = None
        command = [sys.executable, "-m", "commands.cli", *arguments]
        environment = {
            **os.environ,
            "TERM": "xterm-256color",
            "COLORTERM": "truecolor",
            "XDG_STATE_HOME": str(home),
            "COLUMNS": str(size[0]),
            "LINES": str(size[1]),
            **env,
        }
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, command, environment)
        window = struct.pack("HHHH", size[1], size[0], 0, 0)
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, window)

    @property
    def text(self) -> str:
        """All output so far, without escape sequences."""
        return _ESCAPES.sub(b"", self.output).decode("utf-8", "replace")

    def send(self, keys: str) -> None:
        """Type `keys`."""
        os.write(self.fd, keys.encode())

    def read(self, seconds: float) -> bool:
        """Take output for at most `seconds`, returning early when some came; False at the end."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            chunk = os.read(self.fd, 1 << 16)
        except OSError:  # Linux says so when the other end is closed
            return False
        self.output += chunk
        return bool(chunk)

    def wait_for(self, text: str, seconds: float = 30.0) -> float:
        """Read until `text` appears in what comes from now on; returns the seconds it took."""
        began, start = time.monotonic(), len(self.output)
        while time.monotonic() - began < seconds:
            alive = self.read(0.02)
            if text in _ESCAPES.sub(b"", self.output[start:]).decode("utf-8", "replace"):
                return time.monotonic() - began
            assert alive, f"the shell ended while waiting for {text!r}:\n{self.text[-3000:]}"
        raise AssertionError(f"no {text!r} in {seconds} s:\n{self.text[-3000:]}")

    def rest(self, seconds: float) -> None:
        """Let the shell work for `seconds`."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.read(left)

    def leave(self, keys: str = "\x11", seconds: float = 10.0) -> tuple[int, float]:
        """Send `keys`, by default Ctrl+Q; returns the exit code and the seconds until the end."""
        began = time.monotonic()
        self.send(keys)
        while time.monotonic() - began < seconds and self.read(0.1):
            pass
        return self.end(), time.monotonic() - began

    def end(self) -> int:
        """Reap the process, killing it if it still runs; returns its exit code."""
        if self.status is None:
            for _ in range(50):
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    break
                time.sleep(0.1)
            else:
                os.kill(self.pid, 9)
                _, status = os.waitpid(self.pid, 0)
            self.status = os.waitstatus_to_exitcode(status)
            os.close(self.fd)
        return self.status
