"""Kills this process, or stops it, at the N-th operation on files below a directory.

Operations are those that become system calls: opening for writing, every write (before it, and
when half of it is on the disk), flushing to the disk, renaming, linking, removing, truncating,
making directories and changing permissions. Reading counts nothing.
"""

from __future__ import annotations

import builtins
import io
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

PATHS = ("rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir", "chmod",
         "truncate", "utime")  # fmt: skip
DESCRIPTORS = ("fsync", "fdatasync", "ftruncate", "write", "pwrite")
TARGETS = ("sendfile", "copy_file_range")
KILL = os.kill


class _Points:
    def __init__(self, below: str, kill_at: int, count_file: str) -> None:
        self.below, self.kill_at, self.passed = os.path.realpath(below) + os.sep, kill_at, 0
        self.counting = os.open(count_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.note = os.pwrite

    def tick(self) -> bool:
        """One operation; whether it is the one. Does not return if the kill is in time."""
        self.passed += 1
        self.note(self.counting, f"{os.getpid()} {self.passed}\n".encode(), 0)
        return self.passed == self.kill_at

    def at(self, inside: bool) -> None:
        if inside and self.tick():
            KILL(os.getpid(), signal.SIGKILL)

    def path(self, path: Any, directory: int | None = None) -> bool:
        if isinstance(path, int):
            return self.descriptor(path)
        text = os.fsdecode(path)
        if directory is not None:
            text = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), text)
        return (os.path.abspath(text) + os.sep).startswith(self.below)

    def descriptor(self, number: int) -> bool:
        try:
            return os.readlink(f"/proc/self/fd/{number}").startswith(self.below)
        except OSError:
            return False


def arm_to_stop(stop_at: int, below: str, count_file: str) -> None:
    """The process stops there until it is continued. count_file: see `arm`."""
    global KILL  # noqa: PLW0603
    KILL = lambda pid, _: os.kill(pid, signal.SIGSTOP)  # noqa: E731
    arm(stop_at, below, count_file)


def arm(kill_at: int, below: str, count_file: str) -> None:
    """kill_at: 0 for never. count_file: is told the process and how many operations there were."""
    points = _Points(below, kill_at, count_file)
    for name in PATHS:
        _wrap(os, name, lambda args, kw: points.at(_touches(points, args, kw)))
    for name in DESCRIPTORS:
        _wrap(os, name, lambda args, _: points.at(points.descriptor(args[0])))
    for name in TARGETS:
        _wrap(
            os, name, lambda args, _: points.at(points.descriptor(args[0]) or _second(points, args))
        )
    _wrap(os, "open", lambda args, _: points.at(_writes(args) and points.path(args[0])))
    _open_files(points)
    _save_tensors(points)
    _rename_call(points)


def _touches(points: _Points, args: tuple[Any, ...], kw: dict[str, Any]) -> bool:
    return points.path(args[0], kw.get("dir_fd")) or (
        len(args) > 1 and isinstance(args[1], str | os.PathLike) and points.path(args[1])
    )


def _second(points: _Points, args: tuple[Any, ...]) -> bool:
    return isinstance(args[1], int) and points.descriptor(args[1])


def _writes(args: tuple[Any, ...]) -> bool:
    return bool(args[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def _wrap(module: Any, name: str, before: Callable[[Any, Any], None]) -> None:
    real = getattr(module, name, None)
    if real is None:
        return

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(args, kwargs)
        return real(*args, **kwargs)

    # shutil asks whether these take a dir_fd, by identity.
    for known in (os.supports_dir_fd, os.supports_follow_symlinks, os.supports_fd):
        if real in known:
            known.add(wrapped)
    setattr(module, name, wrapped)


def _open_files(points: _Points) -> None:
    """`open` for writing gives files whose every write is two operations."""
    real = io.open

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            points.at(True)
            half = len(bytes(data)) // 2
            if points.tick():
                done = super().write(bytes(data)[:half]) or 0
                KILL(os.getpid(), signal.SIGKILL)
                return done + (super().write(bytes(data)[half:]) or 0)
            return super().write(data) or 0

        def truncate(self, size: int | None = None) -> int:
            points.at(True)
            return super().truncate(size)

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None,
               errors: Any = None, newline: Any = None, **more: Any) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or isinstance(file, int) or not points.path(file):
            return real(file, mode, buffering, encoding, errors, newline, **more)
        points.at(True)
        raw = Raw(os.fspath(file), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    io.open = opened  # type: ignore[assignment]
    builtins.open = opened  # type: ignore[assignment]


def _save_tensors(points: _Points) -> None:
    """MLX writes its files itself: nothing, half of a file, or all of it is there."""
    import mlx.core as mx

    real = mx.save_safetensors

    def save(file: str, *args: Any, **kwargs: Any) -> None:
        points.at(True)
        real(file, *args, **kwargs)
        if points.tick():
            with open(file, "rb") as written:
                content = written.read()
            Path(file).unlink()
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
            os.write(descriptor, content[: len(content) // 2])
            KILL(os.getpid(), signal.SIGKILL)
            os.write(descriptor, content[len(content) // 2 :])
        points.at(True)

    mx.save_safetensors = save


def _rename_call(points: _Points) -> None:
    """The rename that goes to libc directly."""
    from mlxfun.files import renaming

    real = renaming._call

    def call(first: Path, second: Path, flag: int) -> bool:
        points.at(points.path(first))
        done = real(first, second, flag)
        points.at(points.path(first))
        return done

    renaming._call = call
