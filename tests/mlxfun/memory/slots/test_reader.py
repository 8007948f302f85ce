"""Ranges of files are read as they are, and a file that is not as it was is a sentence."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from mlxfun.checkpoint.identity import Stamp
from mlxfun.errors import ModelError
from mlxfun.memory.slots.reader import TASK_BYTES, FileReader, Wanted


def stamp(path: Path) -> Stamp:
    found = path.stat()
    return Stamp(path.name, found.st_size, found.st_mtime_ns, found.st_ino)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(rng.bytes(3 * TASK_BYTES + 17))
    return paths


def reader_of(files: list[Path]) -> FileReader:
    return FileReader([(path, stamp(path)) for path in files])


def test_ranges_arrive_whatever_their_order_and_length(files: list[Path]) -> None:
    reader, contents = reader_of(files), [path.read_bytes() for path in files]
    ranges = [(1, 5, 0), (0, 0, 7), (0, 7, 2 * TASK_BYTES + 3), (1, 9, 1), (0, 40, 40), (1, 0, 5)]
    buffers = [np.full(size, 255, np.uint8) for _, _, size in ranges]
    reader.read(
        Wanted(file, start, memoryview(buffer))
        for (file, start, _), buffer in zip(ranges, buffers, strict=True)
    )
    for (file, start, size), buffer in zip(ranges, buffers, strict=True):
        assert buffer.tobytes() == contents[file][start : start + size]
    assert reader.traffic.bytes == sum(size for _, _, size in ranges)
    reader.close()


def test_neighbours_are_read_at_once(files: list[Path]) -> None:
    reader, buffers = reader_of(files), [bytearray(100) for _ in range(6)]
    reader.read(Wanted(0, 100 * i, memoryview(b)) for i, b in reversed(list(enumerate(buffers))))
    assert reader.traffic.reads == 1
    assert b"".join(buffers) == files[0].read_bytes()[:600]
    reader.close()


def require_fails(reader: FileReader, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        reader.read([Wanted(0, 0, memoryview(bytearray(10)))])
    assert "unharmed" in str(caught.value)


def test_a_file_that_is_cut_short_or_written_to_and_comes_back(files: list[Path]) -> None:
    reader, path = reader_of(files), files[0]
    before, kept = path.stat(), path.read_bytes()
    wanted = bytearray(10)
    reader.read([Wanted(0, 0, memoryview(wanted))])
    os.truncate(path, 5)
    require_fails(reader, "was changed")
    path.write_bytes(b"x" * len(kept))  # as long as it was
    require_fails(reader, "was changed")
    path.write_bytes(kept)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = bytearray(10)
    reader.read([Wanted(0, 0, memoryview(again))])
    assert again == wanted == kept[:10]
    reader.close()


def test_a_file_that_is_gone_before_it_was_opened(files: list[Path]) -> None:
    reader = reader_of(files)
    files[0].unlink()
    require_fails(reader, "No such file")
    reader.close()


def test_a_file_that_was_replaced_is_read_as_it_was(files: list[Path], tmp_path: Path) -> None:
    """A save over the model renames files: what is open stays what was loaded."""
    reader, kept = reader_of(files), files[0].read_bytes()
    reader.read([Wanted(0, 0, memoryview(bytearray(1)))])
    other = tmp_path / "other"
    other.write_bytes(b"y" * len(kept))
    other.rename(files[0])
    found = bytearray(20)
    reader.read([Wanted(0, 10, memoryview(found))])
    assert found == kept[10:30]
    reader.close()
