"""The records of files: JSONL, JSON arrays, Parquet and plain text, compressed or not.

The kind of a file is told by its name (whatever the case), and by its first character where the
name leaves it open. Compressed files have the kind of the name without .gz or .zst.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxfun.data import demo
from mlxfun.data.lines import BrokenLine
from mlxfun.errors import DatasetError
from mlxfun.files import DATA_BYTES, open_file, read_file

TEXT_SUFFIXES = (".sol", ".txt", ".py", ".md")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
PACKED_SUFFIXES = (".gz", ".zst")

_ROWS = 64
"""Rows of a Parquet file that are held at once, at most; they may have pictures in them."""

_ROWS_BYTES = 256 << 20
"""What these rows may take at worst: a column's values are repeated by number, so that a few bytes
of a file can stand for gigabytes of one text."""

_PIECE = 4096
"""Bytes of a .zst file that are unpacked at once."""

_BOMS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One value of a file. value: a JSON value, or None for a blank line.

    text: the whole of a source file instead. broken: why there is neither. where: "file:line", or
    the file alone.
    """

    where: str
    value: Any = None
    text: str | None = None
    broken: BrokenLine | None = None


def resolve(source: str) -> Path:
    """The file or directory that a source names. Raises DatasetError."""
    if source.startswith("demo:"):
        return demo.dataset_path(source.removeprefix("demo:"))
    path = Path(os.path.expanduser(source))
    if not os.path.exists(path):  # path.exists() raises for a name that is too long
        sets = ", ".join(f"demo:{name}" for name in demo.DATASETS)
        shown = source if len(source) <= 200 else f"{source[:200]}..."
        raise DatasetError(f"no such file or directory: {shown}; bundled sample sets are {sets}")
    return path


def kind(file: Path) -> str:
    """The suffix that tells what is in a file: lower case, that of what is compressed in it."""
    inner = file.with_suffix("") if file.suffix.lower() in PACKED_SUFFIXES else file
    return inner.suffix.lower()


def files(path: Path) -> list[Path]:
    """The files to read, a directory's sorted by relative name; hidden ones are left out.

    Raises DatasetError for a directory without any.
    """
    if not path.is_dir():
        return [path]
    wanted = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
    chosen = _below(path, wanted)
    # A folder of sources has settings and the like in .json; one of data has nothing else.
    chosen = [file for file in chosen if kind(file) != ".json"] or chosen
    if not chosen:
        raise DatasetError(
            f"{path} has no {', '.join(wanted)} files to read; choose another directory"
        )
    return chosen


def left_out(path: Path) -> int:
    """How many .json files `files` leaves out of a directory for the others in it."""
    if not path.is_dir():
        return 0
    return len({*_below(path, RECORD_SUFFIXES)} - {*files(path)})


def _below(path: Path, wanted: tuple[str, ...]) -> list[Path]:
    found = sorted(
        (file.relative_to(path) for file in path.rglob("*") if kind(file) in wanted),
        key=lambda relative: relative.as_posix(),
    )
    visible = [path / f for f in found if not any(part.startswith(".") for part in f.parts)]
    return [file for file in visible if file.is_file()]


def values(file: Path) -> Iterator[Found]:
    """What a file holds, in order. Raises DatasetError for a file that cannot be read."""
    suffix = kind(file)
    if suffix in TEXT_SUFFIXES:
        yield _text(read(file), str(file))
    elif suffix == ".parquet":
        yield from _parquet(file)
    else:
        yield from _json(file, read(file), suffix)


def read(file: Path) -> bytes:
    """The bytes of a file, unpacked. Raises DatasetError."""
    try:
        data = read_file(file, DATA_BYTES)
        if file.suffix.lower() == ".gz":
            with gzip.open(io.BytesIO(data)) as stream:
                return _bounded(_all(stream), file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DatasetError(f"{file} is not a whole gzip file ({error}); fetch it again") from error
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror}; check the path") from error
    return _unpacked(data, file) if file.suffix.lower() == ".zst" else data


def _all(stream: Any) -> bytes:
    """What is left of a stream, a little more than the bound at most."""
    parts, left = [], DATA_BYTES
    # In pieces: zstandard makes a buffer of the size that is asked for.
    while left >= 0 and (part := stream.read(1 << 20)):
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _bounded(data: bytes, file: Path) -> bytes:
    if len(data) > DATA_BYTES:
        raise _too_large(file)
    return data


def _unpacked(data: bytes, file: Path) -> bytes:
    try:
        import zstandard
    except ImportError as error:
        raise DatasetError(
            f"{file} is compressed with Zstandard; to read it: pip install zstandard"
        ) from error
    try:
        # Windows of 2 GiB are what `zstd --long=31` makes, and what large dumps are packed with.
        unpacker = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        return _bounded(_frames(unpacker, data), file)
    except (zstandard.ZstdError, EOFError) as error:
        raise DatasetError(f"{file} is not a whole .zst file ({error}); fetch it again") from error


def _frames(unpacker: Any, data: bytes) -> bytes:
    """What is in all frames, a little more than the bound at most.

    In pieces, because a few bytes may unpack to many, and frame by frame, because a stream reader
    takes the end of the data for the end of a frame that was cut off. Raises EOFError for that.
    """
    parts, left, frame = [], DATA_BYTES, None
    view = memoryview(data)
    pieces = deque(view[at : at + _PIECE] for at in range(0, len(data), _PIECE))
    while pieces and left >= 0:
        frame = frame or unpacker.decompressobj()
        parts.append(frame.decompress(pieces.popleft()))
        left -= len(parts[-1])
        if frame.eof:
            if frame.unused_data:
                pieces.appendleft(frame.unused_data)
            frame = None
    if frame is not None and left >= 0:
        raise EOFError("it ends within a frame")
    return b"".join(parts)


def decode(data: bytes, where: str) -> str:
    """The text in `data`: UTF-8, or UTF-16 with a byte order mark. Raises BrokenLine."""
    encoding = next((name for mark, name in _BOMS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        at = f" (byte {data[error.start]:#04x} at offset {error.start}); convert it to UTF-8"
        raise BrokenLine(where, "is not UTF-8", at) from error


def _text(data: bytes, where: str) -> Found:
    try:
        return Found(where, text=decode(data, where))
    except BrokenLine as error:
        return Found(where, broken=error)


def _json(file: Path, data: bytes, suffix: str) -> Iterator[Found]:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        data = decode(data, str(file)).encode()
    data = data.removeprefix(b"\xef\xbb\xbf")
    whole = _document(data, suffix)
    if whole is not None:
        for number, value in enumerate(whole):
            yield Found(f"{file}[{number}]", value)
        return
    # Bytes are split on \n alone: str.splitlines would also cut at U+2028 inside a JSON string.
    lines = data.split(b"\n")
    if not lines[-1].strip():
        lines.pop()  # the file ends with a newline, which begins no line
    for number, line in enumerate(lines, 1):
        where = f"{file}:{number}"
        yield _parsed(line, where) if line.strip() else Found(where)


def _document(data: bytes, suffix: str) -> list[Any] | None:
    """The records of a file that is one JSON document: a list of objects, or one under a key."""
    start = data.lstrip()[:1]
    if start != b"[" and (start != b"{" or suffix != ".json"):
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None  # one record a line, or broken: told apart line by line
    if isinstance(found, dict):
        lists = [found[k] for k in ("data", "train", "rows", "examples") if k in found]
        found = lists[0] if lists and isinstance(lists[0], list) else [found]
    # A list with an object in it is one of records; what else is in it are broken ones.
    return found if any(isinstance(value, dict) for value in found) else None


def _parsed(line: bytes, where: str) -> Found:
    try:
        return Found(where, json.loads(decode(line, where)))
    except BrokenLine as error:
        return Found(where, broken=error)
    except json.JSONDecodeError as error:
        at = f" ({error.msg} at column {error.colno}); a data set holds one JSON object a line"
        return Found(where, broken=BrokenLine(where, "not valid JSON", at))
    except RecursionError:
        return Found(where, broken=BrokenLine(where, "nested too deeply to be a sample"))
    except ValueError:
        what = "a number of thousands of digits is no sample"
        return Found(where, broken=BrokenLine(where, what))


def _parquet(file: Path) -> Iterator[Found]:
    if file.suffix.lower() in PACKED_SUFFIXES:
        raise DatasetError(f"{file}: unpack it first; Parquet is read from the file itself")
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise DatasetError(f"{file} is a Parquet file; to read it: pip install pyarrow") from error
    try:
        with open_file(file):  # a pipe would be waited for
            pass
        number, left = 0, DATA_BYTES
        opened = parquet.ParquetFile(file)
        for batch in opened.iter_batches(batch_size=_rows_at_once(opened.metadata, file)):
            left -= batch.nbytes
            if left < 0:
                raise _too_large(file)
            for row in _rows(batch):
                where = f"{file}[{number}]"
                if row is None:
                    what = "is not UTF-8"
                    yield Found(where, broken=BrokenLine(where, what, "; write it anew as UTF-8"))
                else:
                    yield Found(where, _plain(row))
                number += 1
    except (pyarrow.ArrowException, OSError, ValueError, MemoryError) as error:
        # The last two: names of columns that are no text, sizes that are damaged.
        said = " ".join(str(error).split())[:200]
        raise DatasetError(
            f"{file} is not a readable Parquet file ({said}); fetch it again"
        ) from error


def _rows_at_once(metadata: Any, file: Path) -> int:
    """How many rows of a Parquet file are read at once. Raises DatasetError for one whose largest
    column of a group of rows is beyond what is read of any file.

    No value is larger than the unpacked pages of its column.
    """
    chunks = (
        metadata.row_group(group).column(column).total_uncompressed_size
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    largest = max(chunks, default=0)
    if largest > DATA_BYTES:
        raise _too_large(file)
    return max(1, min(_ROWS, _ROWS_BYTES // max(largest, 1)))


def _too_large(file: Path) -> DatasetError:
    return DatasetError(
        f"{file} unpacks to more than {DATA_BYTES >> 20:,} MiB; split it into several files"
    )


def _rows(batch: Any) -> Iterator[dict[str, Any] | None]:
    """The rows of a batch, None for one with text that is none."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for at in range(batch.num_rows):
            try:
                yield from batch.slice(at, 1).to_pylist()
            except UnicodeDecodeError:
                yield None


def _plain(value: Any) -> Any:
    """A value of Parquet as JSON would hold it: maps as objects, bytes that are text as text."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        if value and all(isinstance(one, tuple) for one in value):
            return {str(key): _plain(one) for key, one in value}
        return [_plain(one) for one in value]
    if isinstance(value, bytes):
        with suppress(UnicodeDecodeError):
            return value.decode()
    return value
