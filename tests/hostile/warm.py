"""Runs the whole program many times, without its imports each time: in `tests/warm`."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.warm.programs import ROOT, SHELL, ask, share_kernels

SECONDS = 20
"""How long a run may take before it is ended, and reported by `Ended.late`."""


@dataclass(frozen=True)
class Ended:
    """code: exit code, negative for a signal. grown: bytes above what the imports take, at most."""

    code: int
    out: str
    err: str
    grown: int
    cpu: float

    @property
    def late(self) -> bool:
        return self.code == -signal.SIGALRM

    @property
    def last(self) -> str:
        """The last line of stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]


class Warm:
    """Runs of `mlxfun-shell` in `directory`. What it keeps for its user is in `home`."""

    def __init__(self, directory: Path, home: Path) -> None:
        self.directory, self.home = directory, home
        home.mkdir()
        share_kernels(home)
        self.environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home),
            "XDG_STATE_HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home),
            "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
        }  # fmt: skip

    def run(
        self,
        *arguments: str,
        directory: Path | None = None,
        call: Sequence[Any] = (),
        before: Sequence[Any] = (),
        seconds: float = SECONDS,
        typed: str = "",
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """One run with these arguments, or of the function `call` (its name and its arguments).

        before: a function that is called first. typed: what stdin holds.
        """
        task = {
            "program": SHELL, "arguments": arguments, "directory": str(directory or self.directory),
            "environment": self.environment | (environment or {}), "call": list(call),
            "before": list(before), "seconds": seconds, "quick": True,
        }  # fmt: skip
        with ExitStack() as opened:
            streams = [opened.enter_context(tempfile.TemporaryFile("w+b")) for _ in range(3)]
            streams[0].write(typed.encode())
            streams[0].seek(0)
            answered = ask(task, [stream.fileno() for stream in streams])
            said = []
            for stream in streams[1:]:
                stream.seek(0)
                said.append(stream.read().decode(errors="backslashreplace"))
        return Ended(**answered, out=said[0], err=said[1])

    def lines(self, *lines: str, **more: Any) -> Ended:
        """A headless run of command lines that must succeed."""
        ended = self.run("--headless", *[word for ln in lines for word in ("-c", ln)], **more)
        assert ended.code == 0, ended.err
        return ended


Tree = dict[str, tuple[object, ...]]


def tree(directory: Path) -> Tree:
    """{relative path: what it is}: kind, permissions, bytes, time of change, content."""
    found: Tree = {}
    for root, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(root, name)
            info = path.lstat()
            content = ""
            if stat.S_ISREG(info.st_mode):
                content = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
            elif stat.S_ISLNK(info.st_mode):
                content = os.readlink(path)
            facts = (info.st_mode, info.st_ino, info.st_size, info.st_mtime_ns, content)
            found[str(path.relative_to(directory))] = facts
    return found
