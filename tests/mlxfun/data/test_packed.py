"""Parquet and Zstandard files as pyarrow and zstandard write them, whole and damaged."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mlxfun.data.datasets import Line, read_lines
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import DatasetError
from mlxfun.tally import DataUse, Tally

ASK = {"role": "user", "content": "What is two and two?"}
SAY = {"role": "assistant", "content": "Four of them."}


def read(path: Path) -> tuple[list[Line], DataUse]:
    tally = Tally()
    return read_lines(DatasetOptions(str(path)), tally), tally.uses()[0]


# --- Parquet ---------------------------------------------------------------------------------

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write columns as a Parquet file."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def made(columns: dict[str, Any], file: str = "a.parquet", **options: Any) -> Path:
        types = options.pop("types", {})
        arrays = {
            name: values
            if isinstance(values, arrow.Array)
            else arrow.array(values, types.get(name))
            for name, values in columns.items()
        }
        parquet.write_table(arrow.table(arrays), tmp_path / file, **options)
        return tmp_path / file

    return made


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "lz4", "brotli"])
def test_rows_are_records_in_order_over_row_groups(write: Write, codec: str) -> None:
    texts = [f"sample number {n}" for n in range(500)]
    file = write({"text": texts}, row_group_size=70, compression=codec)
    lines, use = read(file)
    assert [line.payload for line in lines] == texts
    assert (use.read, use.refused, lines[321].where) == (500, {}, f"{file}[321]")


def test_messages_are_lists_of_structs_with_every_field_in_each(write: Write) -> None:
    """Columnar files give each struct all fields of all rows, as null where they are absent."""
    call = {"type": "function", "function": {"name": "get", "arguments": '{"city": "Paris"}'}}
    file = write({
        "messages": [
            [ASK, SAY],
            [ASK, {"role": "assistant", "content": None, "tool_calls": [call]},
             {"role": "tool", "content": "sunny", "name": "get"}, SAY],
            None,
        ],
        "text": [None, None, "plain text"],
        "id": [1, 2, 3],
    })  # fmt: skip
    lines, use = read(file)
    assert (use.read, use.refused) == (3, {})
    assert lines[0].messages == [ASK, SAY]
    assert lines[1].messages is not None
    assert lines[1].messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert lines[2].payload == "plain text"


def test_structs_of_prompts_and_sharegpt_turns_are_read(write: Write) -> None:
    file = write({
        "conversations": [
            [{"from": "human", "value": ASK["content"]}, {"from": "gpt", "value": SAY["content"]}],
            None, None,
        ],
        "prompt": [None, [ASK], None],
        "completion": [None, [SAY], None],
        "chosen": [None, None, [ASK, SAY]],
    })  # fmt: skip
    lines, _ = read(file)
    assert [line.messages for line in lines] == [[ASK, SAY]] * 3


def test_large_dictionary_and_binary_strings_are_text(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    texts = ["some words", "more words — and signs"]
    types = {
        "large.parquet": arrow.large_string(),
        "dictionary.parquet": arrow.dictionary(arrow.int32(), arrow.string()),
    }
    for name, type_ in types.items():
        found, _ = read(write({"text": texts}, name, types={"text": type_}))
        assert [line.payload for line in found] == texts
    # Files of other writers do not say which bytes are text.
    found, _ = read(write({"text": [text.encode() for text in texts]}, "binary.parquet"))
    assert [line.payload for line in found] == texts


def test_a_map_is_an_object(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    map_ = arrow.map_(arrow.string(), arrow.string())
    turns = arrow.list_(arrow.struct([("role", arrow.string()), ("content", arrow.string()),
        ("tool_calls", arrow.list_(arrow.struct([("name", arrow.string()), ("arguments", map_)])))]))  # fmt: skip
    call = {"name": "get", "arguments": [("city", "Paris")]}
    file = write(
        {"messages": [[ASK, {"role": "assistant", "content": "", "tool_calls": [call]}, SAY]]},
        types={"messages": turns},
    )
    ((line,), _) = read(file)
    assert line.messages is not None
    (found,) = line.messages[1]["tool_calls"]
    assert found["function"] == {"name": "get", "arguments": {"city": "Paris"}}


def test_text_that_is_no_utf8_is_one_broken_row(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    rows = [f"row {n}".encode() for n in range(100)]
    rows[70] = b"caf\xe9"
    buffers = arrow.array(rows, arrow.binary()).buffers()
    strings = arrow.StringArray.from_buffers(100, buffers[1], buffers[2])
    lines, use = read(write({"text": strings}))
    assert len(lines) == 99
    assert (use.refused, use.where) == ({"not UTF-8": 1}, {"not UTF-8": ("[70]",)})


def test_pictures_beside_text_are_no_part_of_it(write: Write) -> None:
    picture = {"bytes": b"\x89PNG\r\n\xff\xfe" * 100, "path": None}
    lines, _ = read(write({"image": [picture, picture], "text": ["one of them", "another"]}))
    assert [line.payload for line in lines] == ["one of them", "another"]
    with pytest.raises(DatasetError, match=r"'text' must be a string, found binary data"):
        read(write({"text": [b"\x89PNG\xff"]}, "b.parquet"))


def test_a_column_by_another_name_is_named(write: Write) -> None:
    with pytest.raises(DatasetError, match=r"\[0\]: no text under 'content' \(keys seen: 'body'"):
        read(write({"body": ["a text"], "n": [1]}))


def test_a_file_without_rows_holds_no_samples(write: Write) -> None:
    arrow = pytest.importorskip("pyarrow")
    with pytest.raises(DatasetError, match="holds no samples"):
        read(write({"text": []}, types={"text": arrow.string()}))


@pytest.mark.parametrize("keep", [0, 3, 200, -1, -300])
def test_a_file_that_was_cut_off_is_named(write: Write, tmp_path: Path, keep: int) -> None:
    data = write({"text": [f"sample {n}" for n in range(300)]}).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(data[:keep])
    with pytest.raises(DatasetError, match=r"cut\.parquet is not a readable Parquet file .*again$"):
        read(tmp_path / "cut.parquet")


@pytest.mark.parametrize("texts", [["x" * (9 << 20)], ["x" * (1 << 20)] * 9])
def test_a_few_bytes_do_not_unpack_to_more_than_the_bound(
    write: Write, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    """One long value, and one value that is written once and repeated by number."""
    monkeypatch.setattr("mlxfun.data.sources.DATA_BYTES", 8 << 20)
    file = write({"text": texts}, compression="zstd")
    assert file.stat().st_size < 1 << 16
    with pytest.raises(DatasetError, match="unpacks to more than 8 MiB; split it"):
        read(file)


def test_long_rows_are_held_one_by_one(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxfun.data.sources._ROWS_BYTES", 2 << 20)
    texts = [str(n) * (1 << 20) for n in range(5)]
    lines, _ = read(write({"text": texts}, compression="zstd"))
    assert [line.payload for line in lines] == texts


def test_a_damaged_page_is_named_or_a_broken_row(write: Write, tmp_path: Path) -> None:
    """Whatever bytes are wrong: an error of ours, and never what the reader itself raises."""
    whole = write({"text": [f"sample {n}" for n in range(300)]}, compression="snappy").read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(6):
            data[rng.randrange(len(data))] = rng.randrange(256)
        (tmp_path / "bad.parquet").write_bytes(data)
        with suppress(DatasetError):
            lines, use = read(tmp_path / "bad.parquet")
            assert use.read == len(lines) + use.blank + sum(use.refused.values())


def test_shards_in_a_directory_are_one_set(write: Write, tmp_path: Path) -> None:
    for n in (2, 0, 1):
        write({"text": [f"shard {n}"]}, f"train-{n:05d}-of-00003.parquet")
    lines, _ = read(tmp_path)
    assert [line.payload for line in lines] == ["shard 0", "shard 1", "shard 2"]


# --- Zstandard -------------------------------------------------------------------------------

JSONL = b"".join(json.dumps({"text": f"sample number {n}"}).encode() + b"\n" for n in range(400))
SKIPPED = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
"""A frame without data, as parallel packers write them."""


def test_one_frame_or_many_with_skipped_ones_are_unpacked(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packer = zstandard.ZstdCompressor(level=3)
    middle = JSONL.index(b"\n", len(JSONL) // 2) - 7  # within a line
    parts = [packer.compress(JSONL[:middle]), packer.compress(JSONL[middle:])]
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(JSONL)
    for name, data in {
        "one": packer.compress(JSONL), "two": b"".join(parts), "unsized": unsized,
        "parallel": SKIPPED + SKIPPED.join(parts) + SKIPPED,
    }.items():  # fmt: skip
        file = tmp_path / f"{name}.jsonl.zst"
        file.write_bytes(data)
        lines, use = read(file)
        assert (len(lines), use.read, lines[-1].payload) == (400, 400, "sample number 399"), name


def test_a_frame_that_was_cut_off_is_named_and_not_taken_for_the_end(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    rng = random.Random(0)
    noisy = b"".join(
        json.dumps({"text": f"{rng.getrandbits(4000):x}"}).encode() + b"\n" for _ in range(400)
    )
    packer = zstandard.ZstdCompressor()
    data = packer.compress(noisy)
    second = packer.compress(JSONL)
    for cut in (data[:3], data[: len(data) // 2], data[:-1], data + second[: len(second) // 2]):
        (tmp_path / "a.jsonl.zst").write_bytes(cut)
        with pytest.raises(DatasetError, match=r"a\.jsonl\.zst is not a whole \.zst file .*again"):
            read(tmp_path / "a.jsonl.zst")


@pytest.mark.parametrize("data", [b"", b"no such thing", JSONL])
def test_what_is_no_zst_file_is_named(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    with pytest.raises(DatasetError, match=r"a\.jsonl\.zst (is not a whole|holds no samples)"):
        read(tmp_path / "a.jsonl.zst")


def test_the_windows_of_large_dumps_are_taken(tmp_path: Path) -> None:
    """As `zstd --ultra --long=31` packs them; the default limit is 128 MiB."""
    zstandard = pytest.importorskip("zstandard")
    settings = zstandard.ZstdCompressionParameters(window_log=30, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings)
    stream = packer.compressobj()  # without a known size, which would shrink the window
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(JSONL) + stream.flush())
    assert len(read(tmp_path / "a.jsonl.zst")[0]) == 400


def test_what_unpacks_to_more_than_the_bound_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zstandard = pytest.importorskip("zstandard")
    monkeypatch.setattr("mlxfun.data.sources.DATA_BYTES", 4 << 20)
    frame = zstandard.ZstdCompressor().compress(b" " * (3 << 20))
    (tmp_path / "a.jsonl.zst").write_bytes(frame * 3)
    with pytest.raises(DatasetError, match="unpacks to more than 4 MiB"):
        read(tmp_path / "a.jsonl.zst")
