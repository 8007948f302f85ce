"""What data sets hold in practice is read as its author meant it, or left out, counted and said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxfun.context import Context
from mlxfun.data.chat import NO_REASONING, NO_TEMPLATE, NO_TOOLS
from mlxfun.data.datasets import Line, tokenize
from mlxfun.data.hub import prepare
from mlxfun.data.options import PrepareOptions
from mlxfun.errors import DatasetError
from mlxfun.evaluation.refusal_rule import is_refusal
from mlxfun.tally import Tally
from tests.mlxfun.data.reading import ASK, CALLED, SAY, TOOL, Spoken, one, read, use_of, write

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
