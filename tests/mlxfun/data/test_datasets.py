"""Reading, tokenizing, batching and splitting data sets."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxfun.data.datasets import Line, batches, prompt_tokens, read_lines, tokenize
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import DatasetError, UsageError


class Bytes:
    """A tokenizer of one token a byte, with or without a chat template."""

    def __init__(self, template: bool = True) -> None:
        self.has_chat_template = template

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def apply_chat_template(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, **_: Any
    ) -> Any:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return self.encode(text + ("<assistant>" if add_generation_prompt else ""))


def jsonl(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read(source: Path | str, **options: Any) -> list[Line]:
    return read_lines(DatasetOptions(str(source), **options))


def texts(sequences: list[Any]) -> list[str]:
    return [bytes(s.tolist()).decode() for s in sequences]


# --- formats ---------------------------------------------------------------------------------


def test_each_line_is_recognised_by_its_own_keys(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    file = jsonl(
        tmp_path / "a.jsonl",
        {"content": "plain"},
        {"messages": turns, "prompt": "ignored", "content": "ignored"},
        {"prompt": "two and two", "completion": "four", "content": "ignored"},
        {"text": "the other key"},
        {"prompt": "a lonely prompt"},
    )
    lines = read(file)
    assert [line.kind for line in lines] == ["text", "messages", "prompt", "text", "prompt"]
    assert lines[0].payload == "plain"
    assert lines[1].messages == turns
    assert lines[2].messages == [
        {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": "four"},
    ]
    assert lines[3].payload == "the other key"
    assert lines[4].messages == [{"role": "user", "content": "a lonely prompt"}]
    assert [line.where for line in lines] == [f"{file}:{n}" for n in (1, 2, 3, 4, 5)]


def test_blank_lines_and_a_byte_order_mark_are_skipped_but_counted(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"content": "one"}\n\n   \r\n{"content": "two"}')
    assert [(line.payload, line.where) for line in read(file)] == [
        ("one", f"{file}:1"),
        ("two", f"{file}:4"),
    ]


def test_a_unicode_line_separator_inside_a_string_does_not_split_the_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"content": "one\u2028still one"}\n', encoding="utf-8")
    assert [line.payload for line in read(file)] == ["one\u2028still one"]


def test_an_explicit_text_key_is_the_only_one_accepted(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"text": "x", "body": "wanted"})
    assert read(file, text_key="body")[0].payload == "wanted"
    with pytest.raises(DatasetError, match=r"a\.jsonl:1: no text under 'boddy'.*'text', 'body'.*"):
        read(file, text_key="boddy")


def test_a_directory_is_one_text_a_file_in_name_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "b" / "two.py").write_text("print(2)")
    (tmp_path / "a.sol").write_text("contract A {}")
    (tmp_path / "c.md").write_text("# C")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "skipped.bin").write_bytes(b"\xff")
    (tmp_path / ".git" / "hidden.txt").write_text("hidden")
    jsonl(tmp_path / "d.jsonl", {"content": "four"}, {"content": "five"})
    assert [line.payload for line in read(tmp_path)] == [
        "contract A {}",
        "print(2)",
        "# C",
        "four",
        "five",
    ]


# --- subsampling -----------------------------------------------------------------------------


def test_a_subsample_is_reproducible_keeps_the_order_and_differs_by_seed(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", *({"content": f"{i:02d}"} for i in range(50)))
    first = [line.payload for line in read(file, max_samples=10, seed=1)]
    assert first == [line.payload for line in read(file, max_samples=10, seed=1)]
    assert first == sorted(first)
    assert len(set(first)) == 10
    assert first != [line.payload for line in read(file, max_samples=10, seed=2)]
    assert len(read(file, max_samples=500)) == 50


def test_a_subsample_below_one_is_a_usage_error(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"content": "x"})
    with pytest.raises(UsageError, match="--max-samples 0"):
        read(file, max_samples=0)


# --- bad input -------------------------------------------------------------------------------


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no such file or directory: .*nowhere\.jsonl"):
        read(tmp_path / "nowhere.jsonl")


def test_an_unknown_sample_set_lists_the_valid_ones() -> None:
    with pytest.raises(DatasetError, match=r"demo:wiki;.*demo:mixed, demo:solidity"):
        read("demo:wiki")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"content": "ok"}\n{"content": ', r"a\.jsonl:2: not valid JSON"),
        (b'{"content": "ok"}\n[1, 2]', r"a\.jsonl:2: expected a JSON object, found a list"),
        (b'{"content": 7}', r"a\.jsonl:1: 'content' must be a string, found a number"),
        (b'{"content": null}', r"a\.jsonl holds no samples: every line of it is blank"),
        (b"\n \n", r"a\.jsonl holds no samples: every line of it is blank"),
        (b"", r"a\.jsonl holds no samples: it is empty; choose another file"),
        (b'{"content": null, "x": 1}\n{"y": 1}', r"a\.jsonl:2: no text under 'content'"),
        (b'{"content": "ok"}\n{"content": "\xff"}', r"a\.jsonl:2 is not UTF-8 \(byte 0xff"),
        (b'{"content": "\\ud800"}', r"a\.jsonl:1: 'content' holds half a surrogate pair"),
        (b'{"messages": []}', r"'messages' must be a non-empty list, found an empty list"),
        (b'{"messages": "hi"}', r"'messages' must be a non-empty list, found a string"),
        (b'{"messages": [{"role": "user"}]}', r"messages\[0\] needs a 'role' and a 'content'"),
        (b'{"messages": [{"role": "user", "content": 7}]}', r"'messages\[0\].content' must be a s"),
        (b'{"messages": [{"role": 1, "content": "x"}]}', r"'messages\[0\].role' must be a string"),
        (b'{"prompt": {"a": 1}}', r"'prompt' must be a string, found an object"),
        (b"{}", r"a\.jsonl:1: no text under 'content' \(keys seen: none\)"),
        (b"[" * 100_000, r"a\.jsonl:1: nested too deeply"),
        (b"\n \n", r"a\.jsonl holds no samples"),
        (b"", r"a\.jsonl holds no samples"),
    ],
)
def test_a_broken_line_is_named_with_its_file_and_number(
    tmp_path: Path, content: bytes, message: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        read(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(("messages", "role", "content", "prompt", "completion", "text", "x")),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(json_values, st.booleans())
def test_any_json_line_is_a_sample_that_tokenizes_or_a_data_set_error(
    value: Any, template: bool
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            lines = read(jsonl(Path(directory) / "a.jsonl", value))
            sequences = tokenize(lines, Bytes(template), 64)
        except DatasetError:
            return
    # A list of objects is a file of as many records.
    assert len(sequences) == len(lines) >= 1
    assert len(lines) == 1 or isinstance(value, list)


def test_text_parts_are_joined_and_the_null_of_a_message_is_no_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two", "image": None}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
    (line,) = read(jsonl(tmp_path / "a.jsonl", {"messages": turns}))
    assert line.messages == [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": ""},
    ]
    assert texts(tokenize([line], Bytes(template=False), 64)) == ["one two\n"]


def test_a_source_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DatasetError, match=r"a\.txt is not UTF-8 \(byte 0xe9 at offset 3\)"):
        read(tmp_path)


def test_a_directory_without_text_files_says_what_it_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"x")
    with pytest.raises(DatasetError, match=r"has no \.sol, \.txt, \.py, \.md, \.jsonl, .* files"):
        read(tmp_path)


# --- tokens ----------------------------------------------------------------------------------


def test_chat_lines_take_the_template_and_plain_text_does_not() -> None:
    lines = [
        Line("text", "plain", "a:1"),
        Line("prompt", ("why", "because"), "a:2"),
        Line(
            "messages", ({"role": "system", "content": "S"}, {"role": "user", "content": "U"}), ""
        ),
    ]
    assert texts(tokenize(lines, Bytes(), 100)) == [
        "plain",
        "<user>why<assistant>because",
        "<system>S<user>U",
    ]
    assert texts(tokenize(lines, Bytes(template=False), 100)) == ["plain", "why\nbecause", "S\nU"]


def test_sequences_are_cut_to_length_and_single_tokens_left_out() -> None:
    lines = [Line("text", t, "a:1") for t in ("abcdef", "x", "", "yz")]
    sequences = tokenize(lines, Bytes(), 3)
    assert texts(sequences) == ["abc", "yz"]
    assert all(s.dtype == np.int32 for s in sequences)


def test_nothing_but_single_tokens_is_an_error() -> None:
    with pytest.raises(DatasetError, match=r"all 2 samples from a\.jsonl:1 on are shorter"):
        tokenize([Line("text", "x", "a.jsonl:1"), Line("text", "", "a.jsonl:2")], Bytes(), 8)
    with pytest.raises(UsageError, match="--max-tokens 1"):
        tokenize([], Bytes(), 1)


@pytest.mark.parametrize(
    "shape",
    [
        lambda ids: ids,
        lambda ids: [ids],
        lambda ids: {"input_ids": ids, "attention_mask": [1] * len(ids)},
        lambda ids: {"input_ids": [ids]},
        lambda ids: SimpleNamespace(ids=ids),
        lambda ids: np.array([ids]),
    ],
)
def test_every_return_shape_of_a_chat_template_gives_the_same_tokens(shape: Any) -> None:
    class Shaped(Bytes):
        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            return shape(super().apply_chat_template(messages, **options))

    messages = [{"role": "user", "content": "hi"}]
    assert texts([prompt_tokens(messages, Shaped())]) == ["<user>hi<assistant>"]


def test_a_template_that_refuses_a_conversation_names_the_line() -> None:
    from jinja2 import TemplateError

    class Strict(Bytes):
        def apply_chat_template(self, *_: Any, **__: Any) -> Any:
            raise TemplateError("roles must alternate")

    with pytest.raises(DatasetError, match=r"b\.jsonl:7: .*refuses.*roles must alternate"):
        tokenize([Line("prompt", ("a", "b"), "b.jsonl:7")], Strict(), 8)


def test_the_thinking_switch_reaches_the_template_only_when_set() -> None:
    seen: list[dict[str, Any]] = []

    class Spy(Bytes):
        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            seen.append(options)
            return [1, 2]

    prompt_tokens([{"role": "user", "content": "x"}], Spy())
    prompt_tokens([{"role": "user", "content": "x"}], Spy(), thinking=False)
    assert seen == [
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "enable_thinking": False},
    ]


def test_the_real_tokenizer_applies_chatml(capfd: pytest.CaptureFixture[str]) -> None:
    from mlxfun.checkpoint.load import load

    tokenizer = load("demo").tokenizer
    lines = [Line("prompt", ("hi", "there"), "a:1"), Line("text", "word " * 900, "a:2")]
    chat, long = tokenize(lines, tokenizer, 64)
    assert tokenizer.decode(chat.tolist()) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nthere<|im_end|>\n"
    )
    assert len(long) == 64
    ids = prompt_tokens([{"role": "user", "content": "hi"}], tokenizer)
    assert tokenizer.decode(ids.tolist()).endswith("<|im_end|>\n<|im_start|>assistant\n")
    # A text longer than the context must not make transformers write over the screen.
    assert capfd.readouterr().err == ""


# --- batches ---------------------------------------------------------------------------------

lengths = st.lists(st.integers(2, 40), min_size=1, max_size=40)


@settings(deadline=None)
@given(lengths, st.integers(1, 120), st.integers(1, 6))
def test_batches_hold_every_sequence_once_within_the_bounds(
    sizes: list[int], batch_tokens: int, max_batch: int
) -> None:
    sequences = [np.arange(1, n + 1, dtype=np.int32) + 100 * i for i, n in enumerate(sizes)]
    result = batches(sequences, batch_tokens, max_batch)
    assert sorted(i for batch in result for i in batch.rows) == list(range(len(sizes)))
    for batch in result:
        assert batch.tokens.dtype == np.int32
        assert batch.mask.dtype == np.bool_
        assert batch.tokens.shape == batch.mask.shape == (len(batch.rows), batch.mask.shape[1])
        assert len(batch.rows) <= max_batch
        assert batch.tokens.size <= batch_tokens or len(batch.rows) == 1
        for row, index in enumerate(batch.rows):
            np.testing.assert_array_equal(batch.tokens[row][batch.mask[row]], sequences[index])
            assert batch.mask[row, : sizes[index]].all()
            assert not batch.tokens[row, sizes[index] :].any()


def test_like_lengths_share_a_batch_and_batches_keep_the_order_of_the_data() -> None:
    sequences = [np.ones(n, np.int32) for n in (30, 3, 31, 4, 3, 29)]
    result = batches(sequences, 100, 3)
    assert [batch.rows for batch in result] == [(5, 0, 2), (1, 4, 3)]


def test_impossible_bounds_are_a_usage_error() -> None:
    with pytest.raises(UsageError, match="0 rows"):
        batches([np.ones(3, np.int32)], 10, 0)


# --- hold-out --------------------------------------------------------------------------------
