"""Writes the journal of the running session, as a session file."""

from __future__ import annotations

import fcntl
import os
import stat
from importlib import metadata
from pathlib import Path
from typing import IO

from commands.workbench.files import Loaded
from commands.workbench.session_file import FORMAT, MAGIC, Mark, encode
from mlxfun import __version__
from mlxfun.errors import UsageError


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


class _Sink:
    """A file that receives the journal line by line."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self._stream = path, stream

    def write(self, text: str) -> None:
        """Append `text` and flush it, so that it survives the process."""
        self._stream.write(text.encode())
        self._stream.flush()

    def remove(self, text: str) -> None:
        """Remove `text`, which was appended last."""
        self._stream.seek(self._stream.seek(0, os.SEEK_END) - len(text.encode()))
        self._stream.truncate()

    def lock(self) -> None:
        """Lock the file until this process ends, however it ends."""
        fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class Journal:
    """The session so far as a session file: in memory, and in up to two files.

    One is the recording that a user asked for, the other is kept for `resume` after a crash. Each
    line is flushed when it is known, so that a crash loses nothing: the line that was running is
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
        """The lines that a recording holds now."""
        return "".join(self._text).splitlines()

    @property
    def path(self) -> Path | None:
        """The file that is being recorded to."""
        return self._recording.path if self._recording else None

    @property
    def kept(self) -> Path | None:
        """The file kept for `resume`."""
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
        """Remove the kept file, after a normal end. Returns its path."""
        sink, self._keeping = self._keeping, None
        if sink is None:
            return None
        sink.path.unlink(missing_ok=True)
        sink.close()
        return sink.path

    def close(self) -> None:
        """Close the files; the kept one stays on disk for `resume`."""
        for sink in self._sinks():
            sink.close()
        self._recording = self._keeping = None

    def records(self, loads: bool) -> bool:
        """Whether a command is written as a line; the first load becomes the header instead."""
        return not loads or self._body or self._model

    def loaded(self, model: Loaded) -> None:
        """Write the model into the header."""
        self._model = True
        self._write(f"#: model {model.source}\n")
        if model.revision:
            self._write(f"#: revision {model.revision}\n")
        if model.chat_template:
            self._write(f"#: chat-template {model.chat_template}\n")
        self._write(f"#: checkpoint {model.checkpoint}\n")

    def begin(self, line: str) -> None:
        """Write a command that starts to run."""
        self._body = self._open = True
        self.commands += 1
        self._write(encode(line) + "\n")

    @property
    def running(self) -> bool:
        """Whether a command began and has not ended."""
        return self._open

    def after(self, line: str) -> None:
        """Note a command that ran inside the running one; it is written when that one ends."""
        self._after.append(line)

    def done(self, mark: Mark | None, note: str = "") -> None:
        """The running command succeeded; the state is `mark` (None without a model)."""
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
        """The running command failed: it becomes a comment, since it changed nothing."""
        if not self._open:
            return
        self._open = False
        self.commands -= 1
        line = self._text.pop()
        for sink in self._sinks():
            sink.remove(line)
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
    """Rename an existing recording at `path`. Raises UsageError for any other file there."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return None  # opening it raises the error, if there is one
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
