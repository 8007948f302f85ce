"""Reads the next decoder layer's part of a checkpoint into the page cache, while a layer runs.

A thread of its own reads ranges of files and throws the bytes away: no MLX is in it, and what is
read for good is read from memory then. A range that cannot be read is left to whoever needs it,
who says so.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mlxfun.checkpoint.headers import Header

CHUNK = 8 << 20
"""Bytes that are read at once; between two of them a request that is out of date is dropped."""

NEAR = 1 << 20
"""Ranges that are no further apart are read as one."""

Ranges = list[tuple[Path, int, int]]
"""(file, first byte, end) of what belongs to a layer."""


class ReadAhead:
    """Layers by their number, of which one at a time is read ahead."""

    def __init__(self, headers: Sequence[Header], layers: Sequence[str]) -> None:
        """layers: paths of the decoder layers, in order."""
        self._ranges = [_ranges(headers, layer) for layer in layers]
        self._pool = ThreadPoolExecutor(1, "read-ahead")
        self._wanted = -1
        self._lock = threading.Lock()

    def bytes_of(self, number: int) -> int:
        """Bytes on disk of a layer, as far as its names tell."""
        return sum(end - start for _, start, end in self._ranges[number])

    def want(self, number: int) -> None:
        """Read that layer ahead, in place of any other; numbers beyond the last are none."""
        with self._lock:
            self._wanted = number
        if 0 <= number < len(self._ranges):
            with contextlib.suppress(RuntimeError):  # it was closed
                self._pool.submit(self._read, number)

    def close(self) -> None:
        """Stop reading; the thread ends with the chunk it is at."""
        with self._lock:
            self._wanted = -1
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, number: int) -> None:
        buffer = bytearray(CHUNK)
        for file, start, end in self._ranges[number]:
            with contextlib.suppress(OSError), open(file, "rb", buffering=0) as opened:
                _warm(opened.fileno(), start, end)
                for place in range(start, end, CHUNK):
                    if self._wanted != number:
                        return
                    part = memoryview(buffer)[: min(CHUNK, end - place)]
                    os.preadv(opened.fileno(), [part], place)


def _warm(file: int, start: int, end: int) -> None:
    """Tell the system what comes, where it can be told."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, end - start, os.POSIX_FADV_WILLNEED)


def _ranges(headers: Sequence[Header], layer: str) -> Ranges:
    """The ranges of tensors whose name holds the last two parts of a layer's path."""
    tail = ".".join(layer.split(".")[-2:])
    found: Ranges = []
    for header in headers:
        own = [info for name, info in header.tensors.items() if f".{tail}." in f".{name}"]
        for info in sorted(own, key=lambda info: info.start):
            if found and found[-1][0] == header.path and info.start - found[-1][2] <= NEAR:
                found[-1] = (header.path, found[-1][1], max(found[-1][2], info.end))
            else:
                found.append((header.path, info.start, info.end))
    return found
