"""Measures how fast a disk gives experts: parallel reads of some megabytes at scattered places."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mlxfun.checkpoint.headers import weight_files
from mlxfun.checkpoint.identity import Stamp
from mlxfun.memory.slots.reader import FileReader, Wanted

READ_BYTES = 2 << 20
"""Of one read: about an expert's projection."""

TOTAL_BYTES = 192 << 20
"""Read in all; less where the model is smaller."""


def disk_bandwidth(directory: Path) -> float | None:
    """Bytes a second that the model's files are read with, None for a model of a few megabytes.

    What of the files is in the system's cache is dropped first where the system allows that
    (Linux); elsewhere what was read lately counts as fast as memory.
    """
    files = [file for file in weight_files(directory) if file.stat().st_size >= 2 * READ_BYTES]
    if not files:
        return None
    places = _places(files)
    for number in {number for number, _ in places}:
        _drop_cached(files[number])
    reader = FileReader([(file, _stamp(file)) for file in files])
    buffers = [np.empty(READ_BYTES, np.uint8) for _ in places]
    try:
        reader.read(
            Wanted(number, start, buffer.data)
            for (number, start), buffer in zip(places, buffers, strict=True)
        )
        return reader.traffic.bytes / max(reader.traffic.seconds, 1e-9)
    finally:
        reader.close()


def _places(files: list[Path]) -> list[tuple[int, int]]:
    """(file, first byte) of reads all over the files, none of which touch."""
    room = [
        (number, start)
        for number, file in enumerate(files)
        for start in range(0, file.stat().st_size - READ_BYTES, 2 * READ_BYTES)
    ]
    random = np.random.default_rng(0)
    count = min(len(room), TOTAL_BYTES // READ_BYTES)
    return [room[i] for i in random.choice(len(room), count, replace=False)]


def _drop_cached(file: Path) -> None:
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return
    descriptor = os.open(file, os.O_RDONLY)
    try:
        advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _stamp(file: Path) -> Stamp:
    found = file.stat()
    return Stamp(file.name, found.st_size, found.st_mtime_ns, found.st_ino)
