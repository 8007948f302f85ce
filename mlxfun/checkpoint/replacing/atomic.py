"""Atomic replacement of a directory: a kill at any point loses neither the old nor the new one.

A model is written to a hidden sibling of its destination and renamed when complete. Replacing an
existing directory exchanges the two in one system call; where that is not to be had, the old one
is moved aside first, and `recoverable` finds it if the process dies in between.

Only what was looked at is replaced: a directory that appeared or changed meanwhile stays, and the
commit is refused; see `mlxfun.files.renaming` for how, and for systems that cannot.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from mlxfun.errors import SaveError
from mlxfun.files import abandoned, writer
from mlxfun.files.renaming import exchange, onto_nothing

BACKUP = ".mlxfun-bak"
_TEMPORARY = re.compile(r"\..+\.saving-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")


def temporary_sibling(target: Path) -> Path:
    """Make an empty hidden directory beside `target`, whose name tells who writes it."""
    name = f".{target.name}.saving-{writer()}-{secrets.token_hex(4)}"
    path = target.parent / name
    path.mkdir()  # not mkdtemp: the result must have ordinary permissions
    return path


def sweep(parent: Path, spared: Callable[[Path], bool] = lambda _: False) -> list[Path]:
    """Remove what killed saves left in `parent`; returns the removed paths.

    Only directories named by this module whose process, on this machine, is dead, unless they are
    spared, and backups beside the whole model that replaced them.
    """
    removed = []
    for path in _directories(parent):
        stale = _stale(path) and not spared(path)
        if stale or (path.name.endswith(BACKUP) and _original(path).exists()):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


def abandoned_saves(target: Path) -> list[Path]:
    """The directories that killed saves to `target` have left."""
    beginning = f".{target.name}.saving-"
    return [p for p in _directories(target.parent) if p.name.startswith(beginning) and _stale(p)]


def _stale(path: Path) -> bool:
    match = _TEMPORARY.fullmatch(path.name)
    return match is not None and abandoned(match["host"], int(match["pid"]))


def recoverable(parent: Path) -> list[Path]:
    """Backups in `parent` whose original is missing: a replacement was killed half-way."""
    return [
        path
        for path in _directories(parent)
        if path.name.endswith(BACKUP) and not _original(path).exists()
    ]


def recover(backup: Path) -> Path:
    """Put a backup that `recoverable` listed back in its place; returns that place.

    Raises SaveError when something has taken the place meanwhile.
    """
    original = _original(backup)
    if not backup.name.endswith(BACKUP) or original.exists():
        raise SaveError(f"{backup} cannot be recovered: {original} exists")
    backup.rename(original)
    sync_directory(original.parent)
    return original


Seen = tuple[tuple[str, int, int, int], ...]
"""What a directory held: (relative path, inode, bytes, time of change in ns); empty for nothing."""


def look(directory: Path) -> Seen:
    """What `directory` holds now, to tell later whether it is still the same. Raises OSError."""
    found = []
    for root, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = Path(root) / name
            info = path.lstat()
            facts = (info.st_size, info.st_mtime_ns) if name in files else (0, 0)
            found.append((str(path.relative_to(directory)), info.st_ino, *facts))
    return tuple(sorted(found))


def commit(temporary: Path, target: Path, seen: Seen = ()) -> None:
    """Make `temporary`, complete and synced, the directory `target`. Atomic where the system can.

    seen: what `look` found at `target` when it was decided that this may be replaced.

    Raises SaveError if something else is there by now, and OSError; `target` then is what it was.
    """
    if seen:
        _replace(temporary, target, seen)
    else:
        _place(temporary, target)
    sync_directory(target.parent)


def _place(temporary: Path, target: Path) -> None:
    """Give `temporary` the name `target`, which is free or an empty directory."""
    try:
        if target.is_dir():
            os.rename(temporary, target)  # onto a directory only if that is empty
        else:
            onto_nothing(temporary, target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise SaveError(
                f"{target} appeared while this was being saved, and is left alone; choose another "
                "place"
            ) from error
        raise


def _replace(temporary: Path, target: Path, seen: Seen) -> None:
    _require_same(target, seen, target)
    if exchange(temporary, target):
        try:
            # What was written between the look and the exchange would be lost with the old one.
            _require_same(temporary, seen, target)
        except BaseException:
            exchange(temporary, target)
            raise
        # The old model now carries the temporary name; a kill here leaves it for `sweep`.
        shutil.rmtree(temporary, ignore_errors=True)
        return
    backup = target.with_name(target.name + BACKUP)
    if backup.exists():
        shutil.rmtree(backup)
    target.rename(backup)
    try:
        _require_same(backup, seen, target)
        _place(temporary, target)
    except BaseException as error:
        _put_back(backup, target, error)
        raise
    sync_directory(target.parent)
    shutil.rmtree(backup, ignore_errors=True)


def _put_back(backup: Path, target: Path, why: BaseException) -> None:
    try:
        backup.rename(target)
    except OSError:  # its place is taken; under the name of a backup it would be swept away
        kept = target.with_name(f"{target.name}.before-save-{secrets.token_hex(4)}")
        backup.rename(kept)
        raise SaveError(
            f"{target} was taken by something else while this was being saved; what was there "
            f"before is now {kept}"
        ) from why


def _require_same(directory: Path, seen: Seen, shown: Path) -> None:
    now = look(directory)
    if now == seen:
        return
    names = sorted({entry[0] for entry in set(now) ^ set(seen)})
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise SaveError(
        f"{shown} was changed by something else while this was being saved "
        f"({', '.join(names[:3])}{more}), and is left alone; look at it, then save again or choose "
        "another place"
    )


def sync_tree(directory: Path) -> None:
    """Flush every file below `directory`, and the directories, to the disk."""
    for root, _, files in os.walk(directory):
        for name in files:
            descriptor = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_directory(Path(root))


def sync_directory(directory: Path) -> None:
    """Flush a directory's entries; file systems that refuse this need no flushing."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _directories(parent: Path) -> list[Path]:
    if not parent.is_dir():
        return []
    return sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink())


def _original(backup: Path) -> Path:
    return backup.with_name(backup.name.removesuffix(BACKUP))
