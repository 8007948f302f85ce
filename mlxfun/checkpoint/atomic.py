"""Atomic replacement of a directory: a kill at any point loses neither the old nor the new one.

A model is written to a hidden sibling of its destination and renamed when complete. Replacing an
existing directory exchanges the two in one system call; where that is not to be had, the old one
is moved aside first, and `recoverable` finds it if the process dies in between.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from pathlib import Path

from mlxfun.errors import SaveError

BACKUP = ".mlxfun-bak"
_TEMPORARY = re.compile(r"\..+\.saving-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # the same number as macOS's RENAME_SWAP
# Answers that mean "not on this kernel or file system", as opposed to a failure.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def temporary_sibling(target: Path) -> Path:
    """Make an empty hidden directory beside `target`, whose name tells who writes it."""
    name = f".{target.name}.saving-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    path = target.parent / name
    path.mkdir()  # not mkdtemp: the result must have ordinary permissions
    return path


def _host() -> str:
    return hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()


def sweep(parent: Path) -> list[Path]:
    """Remove what killed saves left in `parent`; returns the removed paths.

    Only directories named by this module whose process, on this machine, is dead, and backups
    beside the whole model that replaced them.
    """
    removed = []
    for path in _directories(parent):
        match = _TEMPORARY.fullmatch(path.name)
        stale = match is not None and match["host"] == _host() and not _alive(int(match["pid"]))
        if stale or (path.name.endswith(BACKUP) and _original(path).exists()):
            shutil.rmtree(path, ignore_errors=True)
            removed.append(path)
    return removed


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


def commit(temporary: Path, target: Path) -> None:
    """Make `temporary`, complete and synced, the directory `target`. Atomic where the system can.

    Raises OSError; `target` is then what it was.
    """
    if target.exists() and any(target.iterdir()):
        _replace(temporary, target)
    else:
        temporary.rename(target)
    sync_directory(target.parent)


def _replace(temporary: Path, target: Path) -> None:
    if exchange(temporary, target):
        # The old model now carries the temporary name; a kill here leaves it for `sweep`.
        shutil.rmtree(temporary, ignore_errors=True)
        return
    backup = target.with_name(target.name + BACKUP)
    if backup.exists():
        shutil.rmtree(backup)
    target.rename(backup)
    try:
        temporary.rename(target)
    except OSError:
        backup.rename(target)
        raise
    sync_directory(target.parent)
    shutil.rmtree(backup, ignore_errors=True)


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False where kernel or file system cannot.

    Raises OSError when the call fails for another reason.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    a, b = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        function, arguments = "renamex_np", (a, b, ctypes.c_uint(_RENAME_EXCHANGE))
    else:
        cwd = ctypes.c_int(_AT_FDCWD)
        function, arguments = "renameat2", (cwd, a, cwd, b, ctypes.c_uint(_RENAME_EXCHANGE))
    call = getattr(libc, function, None)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))


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


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's process
    return True
