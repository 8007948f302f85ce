"""Renaming that replaces nothing, and exchanging two names: system calls that Python does not offer.

| | Linux: renameat2(2) | macOS: renamex_np(2) |
|---|---|---|
| onto nothing | RENAME_NOREPLACE, 1 | RENAME_EXCL, 4 |
| exchange | RENAME_EXCHANGE, 2 | RENAME_SWAP, 2 |

Neither has it on every file system: ENOSYS, EINVAL and ENOTSUP mean so. What is done then is told at
each function.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path
from typing import Literal

_AT_FDCWD = -100
_FLAGS = {
    "linux": {"onto nothing": 1, "exchange": 2},
    "darwin": {"onto nothing": 4, "exchange": 2},
}
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
# What a file system without hard links says.
_NO_LINKS = {errno.EPERM, errno.EMLINK, errno.EXDEV, *_UNSUPPORTED}

Kind = Literal["onto nothing", "exchange"]


def exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one system call; False where kernel or file system cannot.

    Raises OSError when the call fails for another reason.
    """
    return _call(first, second, "exchange")


def onto_nothing(first: Path, second: Path) -> None:
    """Give `first` the name `second`. Raises FileExistsError if something has that name, OSError.

    Where the system has no such call, a file is linked to its new name and loses the old one, which
    replaces nothing either. A directory is renamed as usual: that fails unless `second` is free or
    an empty directory, so nothing is lost. For a file where there are no links, `second` is looked
    for and then renamed onto: what appears in the microseconds between is lost.
    """
    if _call(first, second, "onto nothing"):
        return
    if first.is_dir() and not first.is_symlink():
        os.rename(first, second)
        return
    try:
        os.link(first, second, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.lexists(second):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(second)) from error
        os.rename(first, second)
    else:
        os.unlink(first)


def _call(first: Path, second: Path, kind: Kind) -> bool:
    """Whether it was done; False where the system cannot. Raises OSError."""
    flags = _FLAGS.get(sys.platform)
    if flags is None:
        return False
    flag, libc = ctypes.c_uint(flags[kind]), ctypes.CDLL(None, use_errno=True)
    a, b = ctypes.c_char_p(os.fsencode(first)), ctypes.c_char_p(os.fsencode(second))
    if sys.platform == "darwin":
        function, arguments = "renamex_np", (a, b, flag)
    else:
        here = ctypes.c_int(_AT_FDCWD)
        function, arguments = "renameat2", (here, a, here, b, flag)
    call = getattr(libc, function, None)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(second))
