"""A program in a terminal of ours: what it draws, and when each typed character appeared.

The emulator knows what Textual writes (cursor moves, text, colours to ignore) and nothing more. A
thread reads all the time, as a terminal does, and notes the moment a character that was typed is
drawn; characters are chosen that the program draws nowhere else.
"""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_TOKEN = re.compile(
    r"\x1b\[(?P<args>[0-9;:?<>=$]*)(?P<final>[@-~])"
    r"|\x1b[\]P_^][^\x07\x1b]*(?:\x07|\x1b\\)"
    r"|\x1b[()][0-9A-B]|\x1b[=>78cM]"
    r"|(?P<control>[\r\n\b])"
    r"|(?P<text>[^\x1b\r\n\b\x00-\x1f]+)"
)
_INCOMPLETE = re.compile(r"\x1b(?:\[[0-9;:?<>=$]*|[\]P_^][^\x07\x1b]*\x1b?|[()]?)?\Z")


class Screen:
    """The cells of the terminal."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self.cells = [[" "] * columns for _ in range(rows)]
        self.x = self.y = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        """Draw what the program wrote."""
        text = self._rest + text
        cut = _INCOMPLETE.search(text)
        self._rest = text[cut.start() :] if cut else ""
        text = text[: cut.start()] if cut else text
        for token in _TOKEN.finditer(text):
            if token["text"]:
                self._write(token["text"])
            elif token["control"]:
                self._control(token["control"])
            elif token["final"]:
                self._escape(token["args"], token["final"])

    def _write(self, text: str) -> None:
        for char in text:
            if self.x < self.columns and self.y < self.rows:
                self.cells[self.y][self.x] = char
            self.x += 1

    def _control(self, char: str) -> None:
        if char == "\r":
            self.x = 0
        elif char == "\n":
            self.x, self.y = 0, min(self.y + 1, self.rows - 1)
        else:
            self.x = max(self.x - 1, 0)

    def _escape(self, args: str, final: str) -> None:
        numbers = [int(n) if n.isdigit() else 0 for n in args.split(";")]
        if final == "H":
            self.y = max(numbers[0], 1) - 1
            self.x = max(numbers[1] if len(numbers) > 1 else 1, 1) - 1
        elif final == "J" and numbers[0] == 2:
            self.cells = [[" "] * self.columns for _ in range(self.rows)]

    def text(self) -> str:
        """All rows."""
        return "\n".join("".join(row).rstrip() for row in self.cells)


class Terminal:
    """A process on a pseudo-terminal of `columns` x `rows`, read by a thread of its own."""

    def __init__(
        self, command: list[str], environment: dict[str, str], cwd: Path, columns: int, rows: int
    ) -> None:
        self.screen = Screen(columns, rows)
        self.fd, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.began = time.monotonic()
        self.output = bytearray()
        self.painted: float | None = None
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**environment, "TERM": "xterm-256color"}, stdin=inner,
            stdout=inner, stderr=inner, start_new_session=True,
        )  # fmt: skip
        os.close(inner)
        self._lock = threading.Lock()
        self._awaited: str | None = None
        self._seen = threading.Event()
        self._when = 0.0
        self._closing = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        while not self._closing:
            if not select.select([self.fd], [], [], 0.2)[0]:
                continue
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # the program has gone
                return
            now = time.monotonic()
            self.output += data
            text = decode(data)
            with self._lock:
                if self._awaited is not None and self._awaited in text:
                    self._awaited, self._when = None, now
                    self._seen.set()
                self.screen.feed(text)
                if self.painted is None and self.screen.text().strip():
                    self.painted = now

    @classmethod
    def shell(cls, *arguments: str, home: Path, size: tuple[int, int] = (120, 40)) -> Terminal:
        """`mlxfun-shell` with `arguments`, in `home`, which also keeps its state."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLORTERM": "truecolor"}
        environment["XDG_STATE_HOME"] = str(home / "state")
        environment["XDG_CACHE_HOME"] = str(home / "cache")
        environment.pop("NO_COLOR", None)
        command = [sys.executable, "-m", "commands.cli", *arguments]
        return cls(command, environment, home, *size)

    def type(self, text: str) -> None:
        """Keys, as the terminal sends them."""
        os.write(self.fd, text.encode())

    def echo(self, char: str, patience: float = 10.0) -> float:
        """Seconds from typing `char`, which is nowhere on the screen, until it is drawn."""
        with self._lock:
            assert char not in self.screen.text(), f"{char!r} is on the screen already"
            self._awaited = char
            self._seen.clear()
        began = time.monotonic()
        self.type(char)
        drawn = self._seen.wait(patience)
        assert drawn, f"{char!r} was not drawn within {patience} s on\n{self.text()}"
        return self._when - began

    def text(self) -> str:
        """What is on the screen now."""
        with self._lock:
            return self.screen.text()

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        """Until `pattern` is on the screen."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.text())
            if found:
                return found
            assert time.monotonic() < deadline, f"{pattern!r} did not appear on\n{self.text()}"
            assert self.process.poll() is None, f"the program ended:\n{self.text()}"
            time.sleep(0.02)

    def end(self, seconds: float = 20.0) -> int:
        """The exit code, once it is there."""
        return self.process.wait(timeout=seconds)

    def close(self) -> None:
        """Leave no process and no thread behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._closing = True
        self._thread.join()
        os.close(self.fd)
