"""Records are read from every kind of file, and from several at once."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxfun.data.datasets import read_lines
from mlxfun.data.options import mixed
from mlxfun.errors import DatasetError
from mlxfun.tally import Tally
from tests.mlxfun.data.reading import ASK, SAY, read, write

# --- files -----------------------------------------------------------------------------------

RECORDS = [{"text": "first of them"}, {"text": "second of them"}]
JSONL = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", JSONL),
        ("a.JSONL", JSONL),
        ("a.ndjson", JSONL),
        ("a.json", JSONL),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
        ("a.jsonl", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps({"data": RECORDS}).encode()),
        ("a.jsonl.gz", gzip.compress(JSONL, mtime=0)),
        ("a.json.GZ", gzip.compress(json.dumps(RECORDS).encode(), mtime=0)),
        ("a.jsonl", b"\xef\xbb\xbf" + JSONL),
        ("a.jsonl", JSONL.decode().encode("utf-16")),
        ("a.jsonl", JSONL.replace(b"\n", b"\r\n")),
    ],
)
def test_records_are_read_from_every_kind_of_file(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    lines, use = read(tmp_path / name)
    assert [line.payload for line in lines] == ["first of them", "second of them"]
    assert (use.read, use.blank) == (2, 0)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.TXT", b"Some plain text.\n"),
        ("a.Md", b"\xef\xbb\xbfSome plain text.\n"),
        ("a.txt.gz", gzip.compress(b"Some plain text.\n", mtime=0)),
        ("a.txt", "Some plain text.\n".encode("utf-16")),
    ],
)
def test_texts_are_read_whatever_the_case_and_the_mark(
    tmp_path: Path, name: str, data: bytes
) -> None:
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, tmp_path):
        assert [line.payload for line in read(source)[0]] == ["Some plain text.\n"]


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL, mtime=0)[:-6])
    with pytest.raises(DatasetError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "package", "remedy"),
    [
        ("a.jsonl.zst", "zstandard", "pip install zstandard"),
        ("a.parquet", "pyarrow", "pip install pyarrow"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str, remedy: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(DatasetError, match=remedy):
        read(tmp_path / name)


def test_parquet_rows_are_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow is stood in for where it is not installed: its rows are dictionaries with nulls."""

    class File:
        nbytes, num_row_groups, num_columns = 40, 0, 2

        def __init__(self, path: Path) -> None:
            assert path.name == "a.parquet"
            self.metadata = self

        def iter_batches(self, batch_size: int) -> Iterable[Any]:
            return [self]

        def to_pylist(self) -> list[dict[str, Any]]:
            return [{"messages": None, "text": "plain"}, {"messages": [ASK, SAY], "text": None}]

    package, parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    package.ArrowException, package.parquet = RuntimeError, parquet  # type: ignore[attr-defined]
    parquet.ParquetFile = File  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", package)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", parquet)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    lines, _ = read(tmp_path / "a.parquet")
    assert [line.payload for line in lines] == ["plain", (ASK, SAY)]
    assert lines[1].where.endswith("a.parquet[1]")


def test_what_unpacks_to_more_than_the_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxfun.data.sources.DATA_BYTES", 4 << 20)
    packed = gzip.compress(b" " * (9 << 20), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed)
    with pytest.raises(DatasetError, match="unpacks to more than 4 MiB"):
        read(tmp_path / "a.jsonl.gz")


def test_settings_beside_sources_are_no_samples_and_said(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("print(1)\n")
    (tmp_path / "package.json").write_text('{"name": "x"}')
    lines, use = read(tmp_path)
    assert [line.payload for line in lines] == ["print(1)\n"]
    assert (use.read, sum(use.refused.values())) == (2, 1)


# --- mixtures --------------------------------------------------------------------------------


def numbered(path: Path, count: int) -> str:
    return str(write(path, *({"text": f"{path.stem} {n}"} for n in range(count))))


def test_several_sources_are_read_and_counted_each(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 4), numbered(tmp_path / "b.jsonl", 3)
    tally = Tally()
    lines = read_lines(mixed(((a, None), (b, None))), tally)
    assert [str(line.payload)[0] for line in lines] == list("aaaabbb")
    assert [(u.source, u.read, u.left) for u in tally.uses()] == [(a, 4, 0), (b, 3, 0)]


def test_weights_are_shares_and_no_line_is_used_twice(tmp_path: Path) -> None:
    a, b = numbered(tmp_path / "a.jsonl", 90), numbered(tmp_path / "b.jsonl", 10)
    tally = Tally()
    lines = read_lines(mixed(((a, 2.0), (b, None))), tally)
    assert [str(line.payload)[0] for line in lines] == ["a"] * 20 + ["b"] * 10
    assert len({line.payload for line in lines}) == 30
    assert [use.left for use in tally.uses()] == [70, 0]
