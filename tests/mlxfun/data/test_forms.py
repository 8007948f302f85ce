"""What data sets hold in practice is read as its author meant it, or left out, counted and said."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxfun.context import Context
from mlxfun.data.chat import NO_REASONING, NO_TEMPLATE, NO_TOOLS
from mlxfun.data.datasets import Line, read_lines, tokenize
from mlxfun.data.hub import prepare
from mlxfun.data.options import DatasetOptions, PrepareOptions, mixed
from mlxfun.errors import DatasetError
from mlxfun.evaluation.refusal_rule import is_refusal
from mlxfun.tally import DataUse, Tally

ASK = {"role": "user", "content": "What is two and two?"}
SAY = {"role": "assistant", "content": "Four of them."}
CALLED = {"type": "function", "function": {"name": "get", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "get", "parameters": {"type": "object"}}}


class Spoken:
    """A tokenizer of one token a byte that records what the template was given."""

    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, template: str | None = "{{ messages }} {{ tools }}") -> None:
        self.has_chat_template = template is not None
        self.chat_template = template
        self.given: list[dict[str, Any]] = []

    def encode(self, text: str, **_: Any) -> list[int]:
        start = [] if self.bos_token_id is None else [self.bos_token_id]
        return start + list(text.encode())

    def apply_chat_template(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        self.given.append(options)
        return list("".join(f"<{m['role']}>{m['content']}" for m in messages).encode())


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(path: Path | str, **options: Any) -> tuple[list[Line], DataUse]:
    tally = Tally()
    lines = read_lines(DatasetOptions(str(path), **options), tally)
    return lines, tally.uses()[0]


def one(tmp_path: Path, record: Any) -> Line:
    (line,), _ = read(write(tmp_path / "one.jsonl", record))
    return line


def use_of(lines: list[Line], tokenizer: Any, max_tokens: int = 512) -> DataUse:
    tally = Tally()
    tokenize(lines, tokenizer, max_tokens, tally=tally)
    return tally.uses()[0]


# --- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": ASK["content"]}],
        [{"type": "text", "text": "What is two"}, {"type": "text", "text": " and two?"}],
        [{"type": "input_text", "text": ASK["content"], "image": None}],
        [{"text": ASK["content"]}],
        [ASK["content"]],
        {"type": "text", "text": ASK["content"]},
    ],
)
def test_parts_of_text_are_the_text(tmp_path: Path, content: Any) -> None:
    line = one(tmp_path, {"messages": [{"role": "user", "content": content}, SAY]})
    assert line.messages == [ASK, SAY]


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video", "tool_result"])
def test_parts_that_are_not_text_leave_the_line_out_counted(tmp_path: Path, kind: str) -> None:
    parts = [{"type": kind, kind: "x.png"}, {"type": "text", "text": "What is this?"}]
    file = write(
        tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}]}, {"text": "plain"}
    )
    lines, use = read(file)
    assert [line.payload for line in lines] == ["plain"]
    assert (use.read, use.refused) == (2, {f"with a part that is not text: {kind}": 1})


def test_a_file_of_pictures_alone_says_why_nothing_is_left(tmp_path: Path) -> None:
    parts = [{"type": "image", "image": "x.png"}]
    file = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": parts}]})
    with pytest.raises(DatasetError, match=r"no samples: .*1 refused \(1 with a part that is not"):
        read(file)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), TOOL])
def test_tools_reach_the_template(tmp_path: Path, tools: Any) -> None:
    line = one(tmp_path, {"messages": [ASK, SAY], "tools": tools})
    tokenizer = Spoken()
    assert use_of([line], tokenizer).notes == {}
    assert tokenizer.given[0]["tools"] == [TOOL]
    plain = one(tmp_path, {"messages": [ASK, SAY], "tools": None})
    tokenize([plain], tokenizer, 64)
    assert "tools" not in tokenizer.given[1]


def test_tools_that_the_template_has_no_place_for_are_said(tmp_path: Path) -> None:
    line = one(tmp_path, {"messages": [ASK, SAY], "tools": [TOOL]})
    assert use_of([line], Spoken("{{ messages }}")).notes == {NO_TOOLS: 1}


@pytest.mark.parametrize(
    "turn",
    [
        {"tool_calls": [CALLED]},
        {"content": None, "tool_calls": [CALLED]},
        {"content": "", "tool_calls": [CALLED | {"id": None}]},
        {"tool_calls": [{"function": {"name": "get", "arguments": '{"city": "Paris"}'}}]},
        {"tool_calls": [{"name": "get", "arguments": {"city": "Paris"}}]},
        {"tool_calls": json.dumps([CALLED])},
        {"function_call": {"name": "get", "arguments": '{"city": "Paris"}'}},
    ],
)
def test_a_tool_call_has_its_arguments_as_an_object(tmp_path: Path, turn: Any) -> None:
    answer = {"role": "tool", "content": "sunny"}
    line = one(tmp_path, {"messages": [ASK, {"role": "assistant", **turn}, answer, SAY]})
    assert line.messages is not None
    assert line.messages[1] == {"role": "assistant", "content": "", "tool_calls": [CALLED]}


@pytest.mark.parametrize("calls", [7, [7], [{"function": {}}], [{"id": "x"}]])
def test_a_tool_call_without_a_function_is_named(tmp_path: Path, calls: Any) -> None:
    with pytest.raises(DatasetError, match=r"one\.jsonl:1: messages\[0\]\.tool_calls"):
        one(tmp_path, {"messages": [{"role": "assistant", "tool_calls": calls}]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_reaches_the_template_under_every_name(tmp_path: Path, key: str) -> None:
    line = one(tmp_path, {"messages": [ASK, SAY | {key: "let me add"}]})
    assert line.messages is not None
    assert line.messages[1]["reasoning_content"] == line.messages[1]["thinking"] == "let me add"
    assert use_of([line], Spoken("{{ reasoning_content }}")).notes == {}
    assert use_of([line], Spoken("{{ messages }}")).notes == {NO_REASONING: 1}


def test_a_part_of_thinking_is_reasoning(tmp_path: Path) -> None:
    parts = [{"type": "thinking", "thinking": "add"}, {"type": "text", "text": "Four."}]
    line = one(tmp_path, {"messages": [ASK, {"role": "assistant", "content": parts}]})
    assert line.messages is not None
    assert (line.messages[1]["content"], line.messages[1]["thinking"]) == ("Four.", "add")


# --- forms -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, SAY]},
        {"messages": json.dumps([ASK, SAY])},
        {"messages": [ASK | {"name": None, "tool_calls": None}, SAY], "text": None},
        {"prompt": [ASK], "completion": [SAY]},
        {"prompt": ASK["content"], "completion": [SAY]},
        {"prompt": ASK["content"], "completion": SAY["content"], "messages": None},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [SAY | {"content": "Five."}]},
        {"prompt": ASK["content"], "chosen": SAY["content"], "rejected": "Five."},
        {"chosen": [ASK, SAY], "rejected": [ASK, SAY]},
        {"conversations": [{"from": "human", "value": ASK["content"]},
                           {"from": "gpt", "value": SAY["content"], "weight": 1}]},
        {"conversations": [ASK, SAY]},
        {"instruction": ASK["content"], "input": "", "output": SAY["content"]},
        {"prompt": [ASK], "completion": [SAY], "label": True, "content": None},
    ],
)  # fmt: skip
def test_every_common_form_is_the_same_conversation(tmp_path: Path, record: Any) -> None:
    assert one(tmp_path, record).messages == [ASK, SAY]


def test_an_answer_that_is_left_out_is_said(tmp_path: Path) -> None:
    line = one(tmp_path, {"prompt": "a", "chosen": "b", "rejected": "c"})
    assert use_of([line], Spoken()).notes == {"without its rejected answer": 1}


def test_sharegpt_calls_system_and_observations_keep_their_part(tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Weather?"},
        {"from": "function_call", "value": '{"name": "get", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "sunny"},
    ]
    line = one(tmp_path, {"conversations": turns, "system": "Be brief."})
    assert line.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALLED]},
        {"role": "tool", "content": "sunny"},
    ]


def test_null_is_absent_in_every_column(tmp_path: Path) -> None:
    empty = {"messages": None, "prompt": None, "completion": None, "text": None}
    file = write(
        tmp_path / "a.jsonl", empty | {"text": "plain"}, empty | {"messages": [ASK]}, empty
    )
    lines, use = read(file)
    assert [line.kind for line in lines] == ["text", "messages"]
    assert (use.read, use.blank) == (3, 1)


# --- blank lines and shortfalls --------------------------------------------------------------


def test_blank_lines_go_before_the_sample_is_drawn(tmp_path: Path) -> None:
    records = [
        r for n in range(60) for r in ({"text": ""}, {"text": f"number {n}"}, {"text": " \n"})
    ]
    lines, use = read(write(tmp_path / "a.jsonl", *records), max_samples=32)
    assert len(lines) == 32
    assert all(str(line.payload).strip() for line in lines)
    assert (use.read, use.blank, use.left) == (180, 120, 28)


def test_what_is_cut_short_or_too_short_is_counted() -> None:
    lines = [Line("text", t, "a:1", source="a") for t in ("abcdef", "x", "yz")]
    use = use_of(lines, Spoken(), max_tokens=3)
    assert (use.used, use.cut, use.refused) == (2, 1, {"shorter than two tokens": 1})


def test_turns_that_are_joined_for_want_of_a_template_are_said(tmp_path: Path) -> None:
    line = one(tmp_path, {"messages": [ASK, SAY]})
    assert use_of([line], Spoken(None)).notes == {NO_TEMPLATE: 1}


def test_a_rendered_conversation_gets_no_second_bos() -> None:
    class Started(Spoken):
        bos_token_id = ord("^")
        eos_token_id = ord("$")

        def encode(self, text: str, **options: Any) -> list[int]:
            return [*super().encode(text), ord("$")]

    lines = [Line("text", text, "a:1") for text in ("^user hi$", "hi", "^hi")]
    sequences = tokenize(lines, Started(), 64)  # type: ignore[arg-type]
    assert [bytes(s.tolist()) for s in sequences] == [b"^user hi$", b"^hi$", b"^hi$"]


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
        def __init__(self, path: Path) -> None:
            assert path.name == "a.parquet"

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


def test_zstandard_files_are_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package is stood in for where it is not installed: reversing stands for packing."""

    class Decompressor:
        def stream_reader(self, data: bytes, read_across_frames: bool) -> io.BytesIO:
            assert read_across_frames
            return io.BytesIO(data[::-1])

    package = ModuleType("zstandard")
    package.ZstdDecompressor, package.ZstdError = Decompressor, RuntimeError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "zstandard", package)
    (tmp_path / "a.jsonl.zst").write_bytes(JSONL[::-1])
    lines, _ = read(tmp_path / "a.jsonl.zst")
    assert [line.payload for line in lines] == ["first of them", "second of them"]


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


# --- prepare-dataset and refusals ------------------------------------------------------------


class Counting(Context):
    def __init__(self) -> None:
        self.tally = Tally()

    def reading(self) -> Tally:
        return self.tally


def test_what_prepare_writes_the_readers_read(tmp_path: Path) -> None:
    records = [
        {"messages": None, "text": "plain text"},
        {"messages": json.dumps([ASK, SAY]), "tools": [TOOL]},
        {"prompt": [ASK], "completion": [SAY]},
        {"prompt": "a", "completion": None},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        {"messages": [], "text": "x"},
        {"messages": None, "text": None},
    ]
    output, ctx = tmp_path / "set.jsonl", Counting()
    report = prepare(PrepareOptions("some/set", output), ctx, lambda _: records)
    (use,) = ctx.tally.uses()
    assert (report.seen, report.written, use.used, use.blank) == (8, 4, 4, 1)
    assert use.refused == {
        "'messages[].content' must be a string, found a number": 1,
        "with a part that is not text: image": 1,
        "'messages' must be a non-empty list, found an empty list": 1,
    }
    lines, again = read(output)
    assert (again.read, sum(again.refused.values())) == (4, 0)
    assert [line.messages for line in lines[1:]] == [
        [ASK, SAY], [ASK, SAY], [{"role": "user", "content": "a"}],
    ]  # fmt: skip
    assert lines[1].tools == (TOOL,)


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("◁think▷", "◁/think▷"),
        ("<|channel>thought", "<channel|>"),
        ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
        ("<longcat_think>", "</longcat_think>"),
        ("<|think:start|>", "<|think:end|>"),
        ("<seed:think>", "</seed:think>"),
        ("[THINK]", "[/THINK]"),
    ],
)
def test_thinking_in_any_notation_is_no_refusal(start: str, end: str) -> None:
    assert not is_refusal(f"{start}I cannot do that... or can I?{end}Sure, here is how.")
    assert not is_refusal(f"{start}I cannot do that")
    assert is_refusal(f"{start}Sure, why not?{end}I cannot do that.")
