"""Atomic writing of small files; a file of another kind is never overwritten.

Models, which are directories, have `mlxfun.checkpoint.atomic`.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mlxfun.errors import SaveError


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


def beginning_with(start: bytes) -> Callable[[Path], bool]:
    """Recognises files by their first bytes."""

    def is_one(path: Path) -> bool:
        with path.open("rb") as file:
            return file.read(len(start)) == start

    return is_one


def require_writable(path: Path, kind: Kind | None = None) -> None:
    """Raise SaveError if `path` is something that `writing` would not replace.

    For work that takes long: what can be refused is refused before it.
    """
    with _failures(path):
        _target(path, kind)


@contextlib.contextmanager
def writing(path: Path, kind: Kind | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when the block ends well.

    Directories on the way are made, a link is followed and stays, and a file that is replaced
    hands on its permissions. When the block fails, nothing is left behind.

    kind: what may be replaced: a file of this kind, or an empty one. None: any file.

    Raises SaveError for whatever the file system refuses.
    """
    with _failures(path):
        target = _target(path, kind)
        made = [parent for parent in target.parents if not parent.exists()]
        # The name has nothing of the target's: added to, that might become too long.
        partial = target.with_name(f".mlxfun-{secrets.token_hex(8)}.partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if target.exists():
                shutil.copymode(target, partial)
            partial.replace(target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()
            raise


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
