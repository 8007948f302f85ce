"""Runs the whole program many times, without its imports each time: a handle on `warm_server`."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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
        home.mkdir(exist_ok=True)
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(home), "OMP_NUM_THREADS": "1",
            "XDG_STATE_HOME": str(home), "XDG_CACHE_HOME": str(home), "XDG_CONFIG_HOME": str(home),
            "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1",
        }  # fmt: skip
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.hostile.warm_server"],
            cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

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
        files = {name: str(self.home / f"run.{name}") for name in ("stdin", "stdout", "stderr")}
        Path(files["stdin"]).write_text(typed)
        task = {
            "directory": str(directory or self.directory), "arguments": arguments,
            "environment": environment or {}, "call": list(call), "before": list(before),
            "seconds": seconds, **files,
        }  # fmt: skip
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(task) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        assert line, "the server has ended"
        said = [Path(files[n]).read_text(errors="backslashreplace") for n in ("stdout", "stderr")]
        return Ended(**json.loads(line), out=said[0], err=said[1])

    def lines(self, *lines: str, **more: Any) -> Ended:
        """A headless run of command lines that must succeed."""
        ended = self.run("--headless", *[word for ln in lines for word in ("-c", ln)], **more)
        assert ended.code == 0, ended.err
        return ended

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)
        assert self._server.stdout is not None
        self._server.stdout.close()


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
