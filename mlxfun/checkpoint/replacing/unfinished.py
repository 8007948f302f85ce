"""Files of weights that a killed save has finished, which a save like it takes over.

While a model is written, its hidden directory holds a record: an identity of everything that decides
about the bytes (weights, the files they are read from, how they are packed and split, versions), and
size and time of each file that is finished and flushed. What is taken over is put through the gate
like the rest, which compares every tensor.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from mlxfun.checkpoint.replacing import atomic

RECORD = ".unfinished.json"
_WEIGHTS = re.compile(r"model[0-9a-z-]*\.safetensors")

Finished = dict[str, tuple[int, int]]
"""{file name: (bytes, time of change in ns)}."""


class Ledger:
    """The finished files of a save that is under way in `directory`."""

    def __init__(self, directory: Path, identity: str) -> None:
        """identity: "" where nothing shall be taken over."""
        self._directory, self._identity = directory, identity
        self.finished: Finished = {}
        self.taken = 0  # bytes of what a killed save had finished

    def there(self, target: Path) -> int:
        """Bytes of the files that a killed save to `target` has left and that fit."""
        found: Finished = {}
        for left in atomic.abandoned_saves(target):
            found |= self._fitting(left)
        return sum(size for size, _ in found.values())

    def take_over(self, target: Path) -> None:
        """Have those files here. Whatever else killed saves to `target` have left is removed."""
        for left in atomic.abandoned_saves(target):
            self._move(left, self._fitting(left))
            shutil.rmtree(left, ignore_errors=True)
        if self.finished:
            self._write()
        self.taken = sum(size for size, _ in self.finished.values())

    def note(self, file: Path) -> None:
        """That file is written; it is flushed first."""
        if not self._identity:
            return
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
        self.finished[file.name] = _stamp(file)
        self._write()

    def close(self) -> None:
        """The model is whole: what was noted is no part of it."""
        (self._directory / RECORD).unlink(missing_ok=True)

    def _fitting(self, left: Path) -> Finished:
        found = _read(left)
        if not self._identity or found is None or found[0] != self._identity:
            return {}
        return {
            name: stamp
            for name, stamp in found[1].items()
            if (left / name).exists() and _stamp(left / name) == stamp
        }

    def _move(self, left: Path, finished: Mapping[str, tuple[int, int]]) -> None:
        for name, stamp in finished.items():
            with contextlib.suppress(OSError):
                if name not in self.finished:
                    os.rename(left / name, self._directory / name)
                    self.finished[name] = stamp

    def _write(self) -> None:
        record, fresh = self._directory / RECORD, self._directory / f"{RECORD}.new"
        fresh.write_text(json.dumps({"identity": self._identity, "finished": self.finished}))
        os.replace(fresh, record)


def recorded(directory: Path) -> bool:
    """Whether a directory holds finished files of a save."""
    return _read(directory) is not None


def _read(directory: Path) -> tuple[str, Finished] | None:
    """(identity, finished files) of what a save has left, None for no record that can be used."""
    try:
        found = json.loads((directory / RECORD).read_text())
        files = {
            name: (int(size), int(time))
            for name, (size, time) in found["finished"].items()
            if _WEIGHTS.fullmatch(name)
        }
        return str(found["identity"]), files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _stamp(file: Path) -> tuple[int, int]:
    found = file.lstat()
    return found.st_size, found.st_mtime_ns
