"""Writes the journal of the running session, as a session file."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from commands.workbench.files import Loaded
from commands.workbench.session_file import FORMAT, MAGIC, Mark, encode
from mlxfun import __version__
from mlxfun.errors import UsageError
from mlxfun.files import partial_beside, sweep
from mlxfun.files.renaming import onto_nothing
from mlxfun.text import installed_version


class _Sink:
    """A new file that receives the journal line by line, locked until this process ends.

    It holds whole lines only: what could not be written to its end is taken out again.
    """

    def __init__(self, path: Path, text: str) -> None:
        """Create the file with `text`. Raises OSError, and leaves no file then.

        It has its name only when it holds `text` and is locked: who finds it half-written, or not
        locked, would take it for that of a dead process.
        """
        self.path = path
        sweep(path.parent)
        partial = partial_beside(path)
        # Unbuffered: what a full disk refuses must not be written later.
        self._stream = partial.open("xb", buffering=0)
        self._size = 0
        self.broken = False
        try:
            self.locked = _locked(self._stream)
            self.write(text)
            onto_nothing(partial, path)
        except BaseException:
            self._stream.close()
            with suppress(OSError):
                partial.unlink()
            raise

    def write(self, text: str) -> None:
        """Append `text`, so that it survives the process. Raises OSError, and is broken then."""
        data = memoryview(text.encode("utf-8", "surrogateescape"))
        written = 0
        try:
            while written < len(data):
                written += self._stream.write(data[written:]) or 0
        except OSError:
            self.broken = True
            with suppress(OSError):
                self._stream.truncate(self._size)
            raise
        self._size += written

    def remove(self, text: str) -> None:
        """Remove `text`, which was appended last. Raises OSError."""
        self._size -= len(text.encode("utf-8", "surrogateescape"))
        self._stream.seek(self._size)
        self._stream.truncate()

    def names(self, path: Path) -> bool:
        """Whether `path` is this file."""
        try:
            return os.path.samestat(path.stat(), os.fstat(self._stream.fileno()))
        except (OSError, ValueError):
            return False

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._stream.close()


class Journal:
    """The session so far as a session file: in memory, and in up to two files.

    One is the recording that a user asked for, the other is kept for `resume` after a crash. Each
    line is flushed when it is known, so that a crash loses nothing: the line that was running is
    there, without its `#=`. A file that cannot be written any more (a full disk) is given up with
    one call of `lost`, and commands go on; it holds what ran before.
    """

    def __init__(self, seed: int, lost: Callable[[str], None] = lambda _: None) -> None:
        self._lost = lost
        self.versions = {
            "mlxfun": __version__,
            "mlx": installed_version("mlx"),
            "mlx-lm": installed_version("mlx-lm"),
        }
        self._text = [f"{MAGIC} {FORMAT}\n"]
        self._text += [f"#: {name} {version}\n" for name, version in self.versions.items()]
        self._text.append(f"#: seed {seed}\n")
        self._body = False
        self._model = False
        self._open = False  # whether the last piece is a command that is still running
        self._after: list[tuple[int, str]] = []  # what ran in the middle of the running one
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
        return self._recording.path if self._recording and not self._recording.broken else None

    @property
    def kept(self) -> Path | None:
        """The file kept for `resume`."""
        return self._keeping.path if self._keeping and not self._keeping.broken else None

    def attach(self, path: Path) -> Path | None:
        """Record to `path` from now on, all that was done before included.

        An older recording of that name is moved aside, to the path returned; any other file there
        is left alone: UsageError.
        """
        own = self._recording is not None and self._recording.names(path)
        moved = _make_room(path, own)
        try:
            sink = _Sink(path, "".join(self._text))
        except (OSError, ValueError) as problem:  # ValueError: a zero byte in the name
            if moved is not None:
                with suppress(OSError):
                    onto_nothing(moved, path)
            reason = (problem.strerror if isinstance(problem, OSError) else None) or str(problem)
            raise UsageError(f"cannot record to {path}: {reason}") from None
        self.detach()
        self._recording = sink
        return moved

    def detach(self) -> Path | None:
        """Stop recording; returns the path that was written."""
        sink, self._recording = self._recording, None
        if sink is not None:
            sink.close()
        return sink.path if sink else None

    def keep(self, path: Path) -> None:
        """Keep the session at `path`, a new file, locked until this process ends. Raises OSError."""
        sink = _Sink(path, "".join(self._text) + f"#: directory {encode(str(Path.cwd()))}\n")
        if not sink.locked:  # others would take it for that of a dead process
            sink.close()
            path.unlink(missing_ok=True)
            raise OSError(errno.ENOLCK, f"{path} cannot be locked")
        self._keeping = sink

    def forget(self) -> Path | None:
        """Remove the kept file, after a normal end. Returns its path."""
        sink, self._keeping = self._keeping, None
        if sink is None:
            return None
        with suppress(OSError):
            sink.path.unlink(missing_ok=True)
        sink.close()
        return sink.path

    def close(self) -> None:
        """Close the files; the kept one stays on disk for `resume`."""
        for sink in (self._recording, self._keeping):
            if sink is not None:
                sink.close()
        self._recording = self._keeping = None

    def records(self, loads: bool) -> bool:
        """Whether a command is written as a line; the first load becomes the header instead."""
        return not loads or self._body or self._model

    def loaded(self, model: Loaded) -> None:
        """Write the model into the header."""
        self._model = True
        self._write(f"#: model {encode(model.source)}\n")
        if model.revision:
            self._write(f"#: revision {encode(model.revision)}\n")
        if model.chat_template:
            self._write(f"#: chat-template {encode(model.chat_template)}\n")
        if model.residency:
            self._write(f"#: residency {encode(model.residency)}\n")
        self._write(f"#: checkpoint {encode(model.checkpoint)}\n")

    def begin(self, line: str) -> None:
        """Write a command that starts to run."""
        self._body = self._open = True
        self.commands += 1
        self._write(encode(line) + "\n")

    @property
    def running(self) -> bool:
        """Whether a command began and has not ended."""
        return self._open

    def after(self, line: str, tokens: int) -> None:
        """Note a command that ran inside the running answer, once that had so many tokens.

        It is written when the answer ends.
        """
        self._after.append((tokens, line))

    def done(self, mark: Mark | None, note: str = "") -> None:
        """The running command succeeded; the state is `mark` (None without a model)."""
        self._end(mark, note)
        self._write_late(mark, inside=True)

    def _write_late(self, mark: Mark | None, *, inside: bool) -> None:
        """Write what ran in the middle. inside: the answer is in the file; else they stand alone."""
        late, self._after = self._after, []
        for tokens, line in late:
            if inside:
                self._write(f"#~ after {tokens} tokens of the answer above\n")
            self.begin(line)
            self._end(mark, "")

    def _end(self, mark: Mark | None, note: str) -> None:
        self._open = False
        if mark is not None:
            self._write(f"#= {mark}\n")
        if note:
            self._write(f"# {_one_line(note)}\n")

    def failed(self, error: str, mark: Mark | None = None, *, cancelled: bool = False) -> None:
        """The running command failed or was cancelled: it becomes a comment, since it changed nothing.

        mark: the state, if commands in the middle of it have changed that.
        """
        if not self._open:
            return
        self._open = False
        self.commands -= 1
        line = self._text.pop()
        self._each(lambda sink: sink.remove(line))
        self._write(f"# {'cancelled' if cancelled else 'failed'}: {line}")
        self._write(f"#         {_one_line(error)}\n")
        self._write_late(mark, inside=False)

    def _write(self, text: str) -> None:
        self._text.append(text)
        self._each(lambda sink: sink.write(text))

    def _each(self, act: Callable[[_Sink], None]) -> None:
        """Do `act` with each file; one for which it fails is given up."""
        for sink, what in ((self._recording, "recording to"), (self._keeping, "keeping")):
            if sink is None or sink.broken:
                continue
            try:
                act(sink)
            except OSError as problem:
                sink.broken = True
                self._lost(
                    f"{what} {sink.path} has stopped: {problem.strerror or problem}; it holds what "
                    "ran before, and the session goes on"
                )


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _locked(stream: FileIO) -> bool:
    """Lock a new file until it is closed; False where the file system has no locks."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _make_room(path: Path, own: bool) -> Path | None:
    """Rename an existing recording at `path`, to the path returned; None if there is none.

    own: it is the recording of this shell. Raises UsageError for one of another shell, and for any
    other file. Shells that do this at the same time lock the old recording first.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise UsageError(f"{path} exists and is not a session recording: choose another name")
        with path.open("rb") as old:
            if old.read(len(MAGIC)) != MAGIC.encode():
                raise UsageError(
                    f"{path} exists and is not a session recording: choose another name"
                )
            same = own or (_free(old) and os.path.samestat(path.stat(), os.fstat(old.fileno())))
            if not same:
                raise UsageError(f"another shell records to {path}: choose another name")
            return _aside(path)
    except OSError:
        return None  # creating the new one raises the error, if there is one


def _free(stream: BinaryIO) -> bool:
    """Whether no process holds the file locked; locks it then."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def _aside(path: Path) -> Path:
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.{number}")
        try:
            onto_nothing(path, aside)
        except FileExistsError:
            number += 1
        else:
            return aside
