"""Atomic writing of small files; a file of another kind is never overwritten.

Models, which are directories, have `mlxfun.checkpoint.replacing.atomic`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlxfun.errors import SaveError
from mlxfun.files.renaming import onto_nothing

_PARTIAL = re.compile(
    r"\.mlxfun-(?:(?P<host>[0-9a-f]{8})-(?P<pid>\d{1,18})-[0-9a-f]{8}|[0-9a-f]{16})\.partial"
)
_DAY = 86400.0


_PIECE = 1 << 20

DATA_BYTES = 4 << 30
"""The most that is read of a data set's file."""

DOCUMENT_BYTES = 256 << 20
"""The most that is read of any other file: reports, lists, sessions, configurations."""


def read_file(path: Path, most: int = DOCUMENT_BYTES) -> bytes:
    """The content of an ordinary file of at most `most` bytes.

    Raises OSError for what `Path.read_bytes` does, and for a pipe or a device, which may never end
    or never begin, and a file that is larger, or goes on growing while it is read.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = _content(file, size, most) if size <= most else None
    if data is None or len(data) > most:
        raise OSError(errno.EFBIG, f"it has more than {most >> 20:,} MiB")
    return data


def _content(file: BinaryIO, size: int, most: int) -> bytes:
    """At most `most` + 1 bytes, in the memory of what there is: a read sets aside all it is asked
    for. size: as the file says, which may grow, or say none (as those of /proc)."""
    data = file.read(size + 1)
    while len(data) <= most and (more := file.read(min(_PIECE, most + 1 - len(data)))):
        data += more
    return data


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of such a file, line ends as \\n. Raises OSError and UnicodeDecodeError."""
    return read_file(path).decode(encoding).replace("\r\n", "\n").replace("\r", "\n")


def open_file(path: Path) -> BinaryIO:
    """An ordinary file, open for reading. Raises OSError as `read_file` does."""
    # Opening a pipe would wait for somebody who writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is a pipe or a device, not an ordinary file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is. name: as in "PATH is no ..."; is_one: whether the file at a path is one."""

    name: str
    is_one: Callable[[Path], bool]


def json_with(key: str) -> Callable[[Path], bool]:
    """Recognises JSON objects that have `key`."""

    def is_one(path: Path) -> bool:
        try:
            document = json.loads(path.read_text("utf-8-sig"))
        except (ValueError, RecursionError):
            return False
        return isinstance(document, dict) and key in document

    return is_one


def beginning_with(*starts: bytes) -> Callable[[Path], bool]:
    """Recognises files by their first bytes: one of `starts`."""

    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(max(map(len, starts))).startswith(starts)

    return is_one


def require_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise SaveError if `path` is something that `writing` would not replace.

    For work that takes long: what can be refused is refused before it.
    """
    with _failures(path):
        _target(path, kind)


@contextlib.contextmanager
def writing(path: Path, kind: Kind | None = None, new: bool = False) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well.

    Directories on the way are made, a link is followed and stays, and a file that is replaced
    hands on its permissions. When the block fails, nothing is left behind.

    kind: what may be replaced: a file of this kind, or an empty one. None: any file. new: nothing
    may be. What appears at `path` before the block ends is judged by the same rules.

    Raises SaveError for whatever the file system refuses.
    """
    with _failures(path):
        target = _target(path, kind)
        made = [parent for parent in target.parents if not parent.exists()]
        partial = partial_beside(target)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            sweep(target.parent)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            _put(partial, path, kind, new)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


def _put(partial: Path, path: Path, kind: Kind | None, new: bool) -> None:
    """Give a finished file its name. Raises SaveError where that must not be, and OSError."""
    target = _target(path, kind)
    if new or not target.exists():
        try:
            onto_nothing(partial, target)
        except FileExistsError:
            if new:
                raise SaveError(
                    f"{path} appeared while it was being written, and is left alone; choose "
                    "another name, or add --force"
                ) from None
            target = _target(path, kind)  # another shell has written it meanwhile
        else:
            return
    shutil.copymode(target, partial)
    partial.replace(target)


def write_text(path: Path, text: str, kind: Kind | None = None) -> None:
    """Write UTF-8 text; see `writing`."""
    with writing(path, kind) as file:
        file.write(text.encode())


def write_json(path: Path, document: dict[str, Any], kind: Kind | None = None) -> None:
    """Write a JSON object; see `writing`. Raises SaveError for NaN and infinity too."""
    try:
        text = json.dumps(document, allow_nan=False) + "\n"
    except ValueError as error:  # other tools do not read what Python would write for them
        raise SaveError(f"{path} is not written: it would hold NaN or infinity") from error
    write_text(path, text, kind)


def partial_beside(target: Path) -> Path:
    """A hidden name beside `target` for what is not finished; see `sweep`."""
    # It has nothing of the target's name: added to, that might become too long.
    return target.with_name(f".mlxfun-{writer()}-{secrets.token_hex(4)}.partial")


def writer() -> str:
    """Names this process on this machine, for files that are not finished: HOST-PID."""
    return f"{_host()}-{os.getpid()}"


def abandoned(host: str, pid: int) -> bool:
    """Whether the `writer` of that name is dead; False where that cannot be told."""
    return host == _host() and not _alive(pid)


def _host() -> str:
    import hashlib  # most commands write no file

    return hashlib.blake2b(os.uname().nodename.encode(), digest_size=4).hexdigest()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # somebody else's process
    return True


def sweep(directory: Path) -> None:
    """Remove what killed processes left of files that they were writing in `directory`."""
    for path in directory.glob(".mlxfun-*.partial"):
        match = _PARTIAL.fullmatch(path.name)
        if match is None:
            continue
        with contextlib.suppress(OSError):
            found = path.lstat()
            if match["pid"] is not None:
                left = abandoned(match["host"], int(match["pid"]))
            else:  # of an earlier version, which did not say whose it is
                left = time.time() - found.st_mtime > _DAY
            if left and stat.S_ISREG(found.st_mode):
                path.unlink()


@contextlib.contextmanager
def _failures(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveError(f"cannot write {path}: {error.strerror or error}") from error


def _target(path: Path, kind: Kind | None) -> Path:
    """The file behind links that is to be replaced. Raises SaveError if it must not be, OSError."""
    target = Path(os.path.realpath(path))
    try:
        found = target.stat()
    except FileNotFoundError:
        return target
    if stat.S_ISDIR(found.st_mode):
        raise SaveError(f"{path} is a directory; name a file in it")
    if not stat.S_ISREG(found.st_mode):
        raise SaveError(f"{path} is not an ordinary file; choose another name")
    if kind is not None and found.st_size and not kind.is_one(target):
        raise SaveError(f"{path} exists and is no {kind.name}; choose another name")
    return target
