"""Reads session files, and writes the journal of the running session as one.

    #!mlxfun-session 1
    #: mlxfun 0.1.0
    #: model demo
    #: checkpoint 0c4d...
    #: seed 1
    collect --dataset demo:mixed --max-samples 32
    #= state 0c4d...
    prune --n-prune 4
    #= state 0c4d... staged 9e1a...
    expect perplexity.all <= 14.2

One command a line. `#:` lines are the header, `#=` holds the state after the command above it, any
other `#` line is a comment. A command that holds line breaks is written as a JSON string.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO

from commands.workbench import Loaded
from mlxfun import __version__
from mlxfun.data.options import require_seed
from mlxfun.errors import UsageError

MAGIC = "#!mlxfun-session"
FORMAT = 1
KEYS = ("mlxfun", "mlx", "mlx-lm", "model", "revision", "checkpoint", "seed", "directory")

_MARK = re.compile(r"#=\s*state\s+(\S+)(?:\s+staged\s+(\S+))?\s*\Z")


@dataclass(frozen=True, slots=True)
class Mark:
    """The state after a command. staged: the state that apply would give, None with no plan."""

    state: str
    staged: str | None = None

    def __str__(self) -> str:
        return f"state {self.state}" + (f" staged {self.staged}" if self.staged else "")


@dataclass(slots=True)
class Entry:
    """A command of a script. number: its line in the file, from 1."""

    number: int
    line: str
    mark: Mark | None = None


@dataclass(frozen=True, slots=True)
class Script:
    """A session file in memory. header: the `#:` lines, without their `#:`."""

    path: Path
    header: dict[str, str] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()

    def where(self, entry: Entry) -> str:
        """`file:line` of an entry."""
        return f"{self.path}:{entry.number}"

    @property
    def seed(self) -> int | None:
        """The seed of the header."""
        return int(self.header["seed"]) if "seed" in self.header else None


def encode(line: str) -> str:
    """A command line as one line of a session file."""
    plain = line.isprintable() and not line.startswith(("#", '"')) and line == line.strip()
    return line if plain else json.dumps(line)


def decode(text: str) -> str:
    """The reverse of `encode`. Raises ValueError for a broken JSON string."""
    if not text.startswith('"'):
        return text
    line = json.loads(text)
    if not isinstance(line, str):
        raise ValueError("not a JSON string")
    return line


def read_script(path: Path) -> Script:
    """Parse a session file. Raises UsageError with file and line."""
    try:
        text = path.read_text("utf-8")
    except OSError as problem:
        reason = problem.strerror or str(problem)
        raise UsageError(f"cannot read the replay file {path}: {reason}") from None
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        raise UsageError(f"{path}:{line}: not UTF-8 text, so not a replay file") from None
    header: dict[str, str] = {}
    entries: list[Entry] = []
    # Not splitlines(): it also breaks at characters that text inside a command may hold.
    for number, raw in enumerate(text.split("\n"), 1):
        try:
            _read_line(raw.strip(), number, header, entries)
        except ValueError as problem:
            raise UsageError(f"{path}:{number}: {problem}") from None
    if not entries:
        raise UsageError(f"{path} holds no command: a replay file has one command a line")
    return Script(path, header, tuple(entries))


def _read_line(text: str, number: int, header: dict[str, str], entries: list[Entry]) -> None:
    if text.startswith(MAGIC):
        version = text.removeprefix(MAGIC).strip()
        if version != str(FORMAT):
            raise ValueError(f"session format {version!r} is unknown, this is format {FORMAT}")
    elif text.startswith("#:"):
        key, _, value = text[2:].strip().partition(" ")
        _check_header(key, value)
        header[key] = value.strip()
    elif text.startswith("#="):
        match = _MARK.match(text)
        if match is None:
            raise ValueError(
                f"{text!r} is not of the form '#= state ID' or '#= state ID staged ID'"
            )
        if not entries or entries[-1].mark is not None:
            raise ValueError(f"{text!r} follows no command")
        entries[-1].mark = Mark(match[1], match[2])
    elif text and not text.startswith("#"):
        entries.append(Entry(number, decode(text)))


def _check_header(key: str, value: str) -> None:
    if key not in KEYS or not value.strip():
        raise ValueError(f"header line {key!r} is not one of {', '.join(KEYS)} with a value")
    if key == "seed":
        try:
            require_seed(int(value))
        except (ValueError, UsageError):
            shown = value.strip()[:40]
            raise ValueError(f"the seed {shown!r} is not a whole number from 0 on") from None


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


class _Sink:
    """A file that the journal is written to as it grows."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self._stream = path, stream

    def write(self, text: str) -> None:
        """Add `text`; it is out of this process's hands when this returns."""
        self._stream.write(text.encode())
        self._stream.flush()

    def take_back(self, text: str) -> None:
        """Remove `text`, which was written last."""
        self._stream.seek(self._stream.seek(0, os.SEEK_END) - len(text.encode()))
        self._stream.truncate()

    def lock(self) -> None:
        """Mark the file as in use for as long as this process lives, however it ends."""
        fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Nothing more comes."""
        self._stream.close()


class Journal:
    """Everything done so far, as a session file; in memory, and on disk where it is asked for.

    It may be recorded, for a person, and kept, to be resumed after a crash: two files. Each line is
    flushed as soon as it is known, so that a crash loses nothing: the line that was running is
    there, without its `#=`.
    """

    def __init__(self, seed: int) -> None:
        self.versions = {
            "mlxfun": __version__,
            "mlx": _version("mlx"),
            "mlx-lm": _version("mlx-lm"),
        }
        self._text = [f"{MAGIC} {FORMAT}\n"]
        self._text += [f"#: {name} {version}\n" for name, version in self.versions.items()]
        self._text.append(f"#: seed {seed}\n")
        self._body = False
        self._model = False
        self._open = False  # whether the last piece is a command that is still running
        self._after: list[str] = []  # lines that ran in the middle of the running one
        self._recording: _Sink | None = None
        self._keeping: _Sink | None = None
        self.commands = 0

    @property
    def lines(self) -> list[str]:
        """What a recording would hold by now."""
        return "".join(self._text).splitlines()

    @property
    def path(self) -> Path | None:
        """The file that is being recorded to."""
        return self._recording.path if self._recording else None

    @property
    def kept(self) -> Path | None:
        """The file that a crash would leave behind."""
        return self._keeping.path if self._keeping else None

    def attach(self, path: Path) -> Path | None:
        """Record to `path` from now on, all that was done before included.

        An older recording of that name is moved aside, to the path returned; any other file there
        is left alone: UsageError.
        """
        moved = _make_room(path)
        try:
            stream = path.open("xb")
        except OSError as problem:
            reason = problem.strerror or str(problem)
            raise UsageError(f"cannot record to {path}: {reason}") from None
        self.detach()
        self._recording = _Sink(path, stream)
        self._recording.write("".join(self._text))
        return moved

    def detach(self) -> Path | None:
        """Stop recording; returns the path that was written."""
        sink, self._recording = self._recording, None
        if sink is not None:
            sink.close()
        return sink.path if sink else None

    def keep(self, path: Path) -> None:
        """Keep the session at `path`, a new file, locked until this process ends. Raises OSError."""
        sink = _Sink(path, path.open("xb"))
        sink.lock()
        sink.write("".join(self._text) + f"#: directory {Path.cwd()}\n")
        self._keeping = sink

    def forget(self) -> Path | None:
        """The session ended as it should: keep it no longer. Returns the path that was removed."""
        sink, self._keeping = self._keeping, None
        if sink is None:
            return None
        sink.path.unlink(missing_ok=True)
        sink.close()
        return sink.path

    def close(self) -> None:
        """Write no more; what is kept stays on disk for `resume`."""
        for sink in self._sinks():
            sink.close()
        self._recording = self._keeping = None

    def wants(self, loads: bool) -> bool:
        """Whether a command is written as a line: a first load becomes the header instead."""
        return not loads or self._body or self._model

    def loaded(self, model: Loaded) -> None:
        """Write the model into the header."""
        self._model = True
        self._write(f"#: model {model.source}\n")
        if model.revision:
            self._write(f"#: revision {model.revision}\n")
        self._write(f"#: checkpoint {model.checkpoint}\n")

    def begin(self, line: str) -> None:
        """A command starts."""
        self._body = self._open = True
        self.commands += 1
        self._write(encode(line) + "\n")

    @property
    def running(self) -> bool:
        """Whether a command began and has not ended."""
        return self._open

    def after(self, line: str) -> None:
        """A command ran in the middle of the running one; it is written when that one ends."""
        self._after.append(line)

    def done(self, mark: Mark | None, note: str = "") -> None:
        """The command that began has ended well, at `mark` (None without a model)."""
        self._end(mark, note)
        self._write_late(mark)

    def _write_late(self, mark: Mark | None) -> None:
        late, self._after = self._after, []
        for line in late:
            self._write("# in the middle of the answer before:\n")
            self.begin(line)
            self._end(mark, "")

    def _end(self, mark: Mark | None, note: str) -> None:
        self._open = False
        if mark is not None:
            self._write(f"#= {mark}\n")
        if note:
            self._write(f"# {_one_line(note)}\n")

    def failed(self, error: str) -> None:
        """The command that began has failed: it becomes a comment, for it changed nothing."""
        if not self._open:
            return
        self._open = False
        self.commands -= 1
        line = self._text.pop()
        for sink in self._sinks():
            sink.take_back(line)
        self._write(f"# failed: {line}")
        self._write(f"#         {_one_line(error)}\n")
        self._write_late(None)

    def _write(self, text: str) -> None:
        self._text.append(text)
        for sink in self._sinks():
            sink.write(text)

    def _sinks(self) -> list[_Sink]:
        return [sink for sink in (self._recording, self._keeping) if sink is not None]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _make_room(path: Path) -> Path | None:
    """Move an older recording aside. Raises UsageError for anything else that is there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None  # opening it says what is wrong, if anything
    if not stat.S_ISREG(mode) or not _is_recording(path):
        raise UsageError(f"{path} exists and is not a session recording: choose another name")
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(aside)
    return aside


def _is_recording(path: Path) -> bool:
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC.encode()
    except OSError:
        return False
