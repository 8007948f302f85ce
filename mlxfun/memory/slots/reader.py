"""Reads byte ranges of files in parallel, straight into buffers.

`mx.load` reads a whole tensor where one expert is wanted, and a memory map reads by page faults, one
after the other. Several positioned reads at a time are what a solid-state disk is fast at.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from time import perf_counter

from mlxfun.checkpoint.identity import Stamp
from mlxfun.errors import ModelError

WORKERS = 8
"""Reads at a time; what others measured best (1.2 to 1.7 times one)."""

TASK_BYTES = 4 << 20
"""The most bytes of one read, so that a long range is shared among the workers."""

MOST_BUFFERS = 512
"""Of one read; systems take 1,024."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A range of a file and where its bytes go. into: as long as the range."""

    file: int
    start: int
    into: memoryview

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + len(self.into)


@dataclass(slots=True)
class Traffic:
    """What was read. seconds: in which at least one read was under way, for the caller."""

    bytes: int = 0
    seconds: float = 0.0
    reads: int = 0


@dataclass(frozen=True, slots=True)
class _Task:
    file: int
    start: int
    buffers: tuple[memoryview, ...]


class FileReader:
    """Reads of a checkpoint's files. Safe to use from several threads.

    files: path and stamp of each, in the order that numbers refer to them.
    """

    def __init__(self, files: Sequence[tuple[Path, Stamp]], workers: int = WORKERS) -> None:
        self._files = files
        self._open: dict[int, int] = {}
        self._retired: list[int] = []  # another thread may still be reading from them
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(workers, "mlxfun-read")
        self.traffic = Traffic()

    def read(self, wanted: Iterable[Wanted]) -> None:
        """Fill every buffer. Raises ModelError for a file that is not as it was when it was loaded;
        what the buffers hold then means nothing."""
        began = perf_counter()
        tasks = _tasks(list(wanted))
        touched = sorted({task.file for task in tasks})
        opened = {file: self._require_unchanged(file) for file in touched}
        done = sum(self._pool.map(lambda task: self._fill(task, opened[task.file]), tasks))
        # A file that was written to meanwhile may have given bytes of both.
        for file in touched:
            self._require_unchanged(file)
        with self._lock:
            self.traffic.bytes += done
            self.traffic.reads += len(tasks)
            self.traffic.seconds += perf_counter() - began

    def close(self) -> None:
        """Stop the workers and close the files."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        for descriptor in (*self._open.values(), *self._retired):
            os.close(descriptor)
        self._open.clear()
        self._retired.clear()

    def _fill(self, task: _Task, descriptor: int) -> int:
        path = self._files[task.file][0]
        start, buffers = task.start, list(task.buffers)
        done = 0
        while buffers:
            try:
                count = os.preadv(descriptor, buffers, start + done)
            except OSError as error:
                raise ModelError(
                    f"cannot read experts from {path}: {error.strerror}; {_REMEDY}"
                ) from error
            if count == 0:
                raise ModelError(f"{path} ends before the experts that it holds; {_REMEDY}")
            done += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if buffers and count:
                buffers[0] = buffers[0][count:]
        return done

    def _require_unchanged(self, file: int) -> int:
        """The descriptor of a file that is as it was when it was loaded."""
        path, stamp = self._files[file]
        with self._lock:
            held = self._open.get(file)
            # A file that was replaced stays readable as it was; one that was written to does not.
            if held is not None and _is(os.fstat(held), stamp):
                return held
            if held is not None:
                self._retired.append(self._open.pop(file))
            try:
                descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError as error:
                raise ModelError(
                    f"cannot read experts from {path}: {error.strerror}; {_REMEDY}"
                ) from error
            if not _is(os.fstat(descriptor), stamp):
                os.close(descriptor)
                raise ModelError(
                    f"{path} was changed since the model was loaded from it; {_REMEDY}"
                )
            self._open[file] = descriptor
            return descriptor


_REMEDY = "put the file back as it was and ask again: the model in memory is unharmed"


def _is(found: os.stat_result, stamp: Stamp) -> bool:
    # Not the inode: a file that is put back from a copy has another one.
    return found.st_size == stamp.bytes and found.st_mtime_ns == stamp.mtime_ns


def _tasks(wanted: list[Wanted]) -> list[_Task]:
    """Ranges that touch are read at once, long ones in several reads."""
    tasks: list[_Task] = []
    run: list[memoryview] = []
    file = start = end = size = 0
    for one in sorted(wanted, key=lambda w: (w.file, w.start)):
        buffer = one.into
        place = one.start
        while len(buffer):
            joins = run and one.file == file and place == end
            if not joins or size >= TASK_BYTES or len(run) >= MOST_BUFFERS:
                if run:
                    tasks.append(_Task(file, start, tuple(run)))
                run, file, start, end, size = [], one.file, place, place, 0
            part = buffer[: TASK_BYTES - size]
            run.append(part)
            size += len(part)
            end += len(part)
            place += len(part)
            buffer = buffer[len(part) :]
    if run:
        tasks.append(_Task(file, start, tuple(run)))
    return tasks
