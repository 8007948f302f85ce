"""A data set of the Hub becomes JSONL that the readers take; the Hub itself is stood in for."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlxfun.context import Context
from mlxfun.data.datasets import read_lines
from mlxfun.data.hub import prepare
from mlxfun.data.options import DatasetOptions, PrepareOptions
from mlxfun.errors import Cancelled, DatasetError, UsageError

TEXTS = [
    {"text": "a short one", "lang": "en", "score": 3},
    {"text": "ein kurzer Text", "lang": "de", "score": 3},
    {"text": "a much longer text with ümlauts and\u2028separators", "lang": "en", "score": 1},
    {"text": "", "lang": "en", "score": 3},
    {"text": "the last one of them", "lang": "en", "score": 3},
]


def endless():
    """A stream that must not be read to its end."""
    while True:
        yield {"text": "again and again"}


def run(tmp_path: Path, records: Any, **options: Any):
    wanted = PrepareOptions("some/set", tmp_path / "out" / "set.jsonl", **options)
    return prepare(wanted, stream=lambda _: records), wanted.output


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def test_texts_are_written_and_read_back_as_they_are(tmp_path):
    report, path = run(tmp_path, TEXTS)
    assert (report.seen, report.written) == (5, 4)
    assert [r["content"] for r in written(path)] == [t["text"] for t in TEXTS if t["text"]]
    lines = read_lines(DatasetOptions(str(path)))
    assert lines[2].payload == TEXTS[2]["text"]
    assert [p.name for p in path.parent.iterdir()] == ["set.jsonl"]


def test_filters_keep_what_passes_all_of_them(tmp_path):
    _, path = run(tmp_path, TEXTS, where=(("lang", "en"), ("score", "3")), min_chars=12)
    assert [r["content"] for r in written(path)] == ["the last one of them"]
    _, path = run(tmp_path, TEXTS, max_chars=15)
    assert [r["content"] for r in written(path)] == ["a short one", "ein kurzer Text"]


def test_a_stream_is_left_once_there_is_enough(tmp_path):
    report, path = run(tmp_path, endless(), max_samples=3)
    assert (report.seen, report.written) == (3, 3)
    assert len(written(path)) == 3


def test_conversations_and_pairs_keep_their_form_unless_a_column_is_named(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    records = [
        {"messages": turns, "text": "plain"},
        {"prompt": "Two?", "completion": "2", "text": "pair"},
    ]
    _, path = run(tmp_path, records)
    assert written(path) == [{"messages": turns}, {"prompt": "Two?", "completion": "2"}]
    assert [line.kind for line in read_lines(DatasetOptions(str(path)))] == ["messages", "prompt"]
    _, path = run(tmp_path, records, text_column="text")
    assert written(path) == [{"content": "plain"}, {"content": "pair"}]


def test_a_missing_column_is_named_with_those_there_are(tmp_path):
    with pytest.raises(DatasetError, match=r"no column 'body' \(columns: text, lang, score\)"):
        run(tmp_path, TEXTS, text_column="body")


def test_when_nothing_passes_no_file_appears_and_an_old_one_stays(tmp_path):
    with pytest.raises(DatasetError, match="none of the 5 records of some/set passed"):
        run(tmp_path, TEXTS, min_chars=1000)
    assert not (tmp_path / "out").exists()
    _, path = run(tmp_path, TEXTS)
    before = path.read_bytes()

    def broken():
        yield TEXTS[0]
        raise ConnectionError("the Hub went away")

    with pytest.raises(DatasetError, match="reading some/set failed: the Hub went away"):
        run(tmp_path, broken())
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["set.jsonl"]


def test_a_cancel_leaves_nothing(tmp_path):
    class Stop(Context):
        def check(self) -> None:
            raise Cancelled("cancelled")

    options = PrepareOptions("some/set", tmp_path / "set.jsonl")
    with pytest.raises(Cancelled):
        prepare(options, Stop(), lambda _: endless())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_samples": 0}, "--max-samples 0 must be at least 1"),
        ({"min_chars": 9, "max_chars": 3}, "--max-chars 3 is below --min-chars 9"),
    ],
)
def test_impossible_numbers_are_refused_before_the_hub_is_asked(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        prepare(PrepareOptions("s", tmp_path / "x.jsonl", **options), stream=None)


def test_the_hub_is_asked_for_a_stream_of_the_right_split(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments: Any, **options: Any):
        asked.append((arguments, options))
        return iter(TEXTS)

    module = ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    options = PrepareOptions("a/b", tmp_path / "x.jsonl", "test", "main", "abc123", max_samples=1)
    assert prepare(options).written == 1
    expected = {"split": "test", "revision": "abc123", "streaming": True}
    assert asked == [(("a/b", "main"), expected)]

    def refuses(*_: Any, **__: Any):
        raise ValueError("Unknown split 'test'")

    module.load_dataset = refuses
    with pytest.raises(DatasetError, match="cannot open the data set a/b: Unknown split"):
        prepare(replace(options, max_samples=None))


def test_without_the_extra_package_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'mlxfun\[dataset\]'"):
        prepare(PrepareOptions("a/b", tmp_path / "x.jsonl"))


@pytest.mark.slow
def test_the_datasets_package_itself_streams_a_data_set_of_files(tmp_path, monkeypatch):
    """As from the Hub, but from a directory: the part of the work that is not ours to stand in for."""
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    source = tmp_path / "set"
    source.mkdir()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": "word " * n},
            ],
            "lang": "en" if n % 2 else "de",
        }
        for n in range(60)
    ]
    (source / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", "utf-8")
    output = tmp_path / "out.jsonl"
    wanted = PrepareOptions(
        str(source), output, where=(("lang", "en"),), min_chars=60, max_samples=7
    )
    report = prepare(wanted)
    passing = [r for r in rows if r["lang"] == "en" and len(r["messages"][1]["content"]) > 48]
    assert written(output) == [{"messages": r["messages"]} for r in passing[:7]]
    assert report.seen == rows.index(passing[6]) + 1  # not a record more than was needed
    with pytest.raises(DatasetError, match=r"Available splits: \['train'\]"):
        prepare(replace(wanted, split="test"))
    with pytest.raises(DatasetError, match="cannot open the data set"):
        prepare(replace(wanted, source=str(tmp_path / "nothing")))
